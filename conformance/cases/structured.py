"""Structured output: what is asked for is what comes, or the request is refused."""

from __future__ import annotations

import asyncio
import json
import re

from conformance.case import Group
from conformance.client import COUNTING, Json, Server, parse, text_of
from conformance.outcome import NotOffered, expect, expect_equal, fail
from conformance.schema import violation

GROUP = Group("structured")
case = GROUP.case


def an_object(**properties: Json) -> Json:
    """A schema of an object with all of `properties` and no other, as OpenAI's strict mode wants it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def obeying(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


COLOUR = {"enum": ["red", "green", "blue"], "type": "string"}
FLAG = an_object(colour=COLOUR, on={"type": "boolean"})


def check_obeys(text: str, schema: Json) -> None:
    if broken := violation(parse(text.encode()), schema):
        fail(f"{broken} in {text!r}")


async def _answers_obey(server: Server, schema: Json, **fields: Json) -> Json:
    answer = await server.chat("Give me JSON.", response_format=obeying(schema), max_tokens=200, **fields)
    for index, choice in enumerate(answer["choices"]):
        check_obeys(text_of(answer, index), schema)
        expect_equal(choice["finish_reason"], "stop", "finish_reason")
    return answer


@case("text")
async def the_format_text_changes_nothing(server: Server) -> None:
    plain = text_of(await server.chat())
    expect_equal(text_of(await server.chat(response_format={"type": "text"})), plain, "the text")


@case("json-object")
async def a_json_object_is_one(server: Server) -> None:
    """A model may go on for ever in it, so that only the beginning can be asked for."""
    prompt = 'Answer with the JSON {"a": 1} and nothing else.'
    answer = await server.chat(prompt, response_format={"type": "json_object"}, max_tokens=200)
    text = text_of(answer)
    if answer["choices"][0]["finish_reason"] == "length":
        expect(text.lstrip().startswith("{"), f"the text is {text[:60]!r}")
    else:
        expect(isinstance(parse(text.encode()), dict), f"the text is {text[:60]!r}")


@case("schema")
async def an_answer_obeys_its_schema(server: Server) -> None:
    await _answers_obey(server, FLAG)


@case("schema-sampled")
async def sampled_answers_obey_their_schema(server: Server) -> None:
    for seed in range(4):
        await _answers_obey(server, FLAG, temperature=1.5, seed=seed)


@case("schema-nested")
async def an_answer_obeys_a_nested_schema(server: Server) -> None:
    point = an_object(x={"enum": [0, 1]}, label=COLOUR)
    schema = an_object(points={"type": "array", "items": point, "minItems": 2, "maxItems": 3}, last=point)
    await _answers_obey(server, schema)


@case("schema-any-of")
async def an_answer_obeys_one_of_several_alternatives(server: Server) -> None:
    await _answers_obey(server, an_object(value={"anyOf": [{"type": "boolean"}, COLOUR, {"type": "null"}]}))


@case("schema-integer")
async def integers_keep_to_their_range(server: Server) -> None:
    limits = {"type": "integer", "minimum": 10, "maximum": 99}
    await _answers_obey(server, an_object(a=limits, b=limits), temperature=1, seed=4)


@case("schema-string-length")
async def strings_keep_to_their_length(server: Server) -> None:
    await _answers_obey(server, an_object(name={"type": "string", "minLength": 2, "maxLength": 8}))


@case("schema-pattern")
async def strings_match_their_pattern(server: Server) -> None:
    await _answers_obey(server, an_object(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"}))


@case("schema-unicode")
async def a_schema_may_name_any_characters(server: Server) -> None:
    schema = an_object(größe={"enum": ["groß", "小さい", "🤖"]})
    await _answers_obey(server, schema)


@case("schema-ref")
async def a_schema_may_refer_to_its_definitions(server: Server) -> None:
    schema = an_object(a={"$ref": "#/$defs/colour"}, b={"$ref": "#/$defs/colour"})
    answer = await server.chat(
        "Give me JSON.", response_format=obeying(schema | {"$defs": {"colour": COLOUR}}), max_tokens=200
    )
    check_obeys(text_of(answer), an_object(a=COLOUR, b=COLOUR))


@case("schema-stream")
async def a_stream_obeys_its_schema_and_is_the_whole_answer(server: Server) -> None:
    whole = text_of(await _answers_obey(server, FLAG))
    stream = await server.stream_chat("Give me JSON.", response_format=obeying(FLAG), max_tokens=200)
    expect_equal(stream.text(), whole, "the streamed text")
    expect_equal(stream.finish_reasons(), ["stop"], "the finish reasons")


@case("schema-n")
async def every_choice_obeys_the_schema(server: Server) -> None:
    answer = await _answers_obey(server, FLAG, n=3, temperature=1, seed=1)
    expect_equal(len(answer["choices"]), 3, "the number of choices")


@case("schema-cut")
async def an_answer_that_is_cut_says_so(server: Server) -> None:
    answer = await server.chat("Give me JSON.", response_format=obeying(FLAG), max_tokens=3)
    expect_equal(answer["choices"][0]["finish_reason"], "length", "finish_reason")


@case("schema-and-company")
async def a_schema_binds_its_own_request_alone(server: Server) -> None:
    plain = text_of(await server.chat(max_tokens=24))
    together = await asyncio.gather(
        *(_answers_obey(server, FLAG, temperature=1, seed=seed) for seed in range(3)),
        server.chat(max_tokens=24),
    )
    expect_equal(text_of(together[-1]), plain, "the free text in company")


async def _offered(server: Server) -> None:
    """Lest a refusal of all formats count as one of a mistake in them."""
    await server.chat("Give me JSON.", response_format=obeying(FLAG), max_tokens=1)


@case("unknown-type")
async def an_unknown_type_of_format_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(response_format={"type": "yaml"})


@case("missing-schema")
async def a_format_without_its_schema_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(response_format={"type": "json_schema"})


@case("bad-schema")
async def a_schema_that_is_none_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(response_format=obeying({"type": "no such type"}))


@case("bad-format")
async def a_format_that_is_a_string_is_refused(server: Server) -> None:
    await _offered(server)
    await server.refuses_chat(response_format="json")


@case("completion")
async def a_completion_obeys_a_schema(server: Server) -> None:
    answer = await server.complete(COUNTING, response_format=obeying(FLAG), max_tokens=200)
    try:
        json.loads(text_of(answer))
    except ValueError:
        raise NotOffered("response_format of a completion has no effect") from None
    check_obeys(text_of(answer), FLAG)


async def _constrained(server: Server, kind: str, constraint: Json, **own: Json) -> str:
    """A text under one of vLLM's constraints, or under a server's own field for the same."""
    plain = text_of(await server.complete())
    reason = ""
    for fields in ({"structured_outputs": {kind: constraint}}, own):
        try:
            text = text_of(await server.complete(**fields)) if fields else plain
        except NotOffered as error:
            reason = str(error)
            continue
        if text != plain:
            return text
    raise NotOffered(reason or f"structured_outputs.{kind} has no effect")


@case("regex")
async def a_text_matches_its_regular_expression(server: Server) -> None:
    text = await _constrained(server, "regex", "[a-c]{3}-[0-9]{2}", regex="[a-c]{3}-[0-9]{2}")
    expect(re.fullmatch("[a-c]{3}-[0-9]{2}", text), f"the text is {text!r}")


@case("choice")
async def a_text_is_one_of_the_given_choices(server: Server) -> None:
    text = await _constrained(server, "choice", ["left", "right"], guided_choice=["left", "right"])
    expect(text in ("left", "right"), f"the text is {text!r}")


@case("grammar")
async def a_text_obeys_its_grammar(server: Server) -> None:
    lark, gbnf = 'start: "x" ("yes" | "no")', 'root ::= "x" ("yes" | "no")'
    text = await _constrained(server, "grammar", lark, grammar=gbnf)
    expect(text in ("xyes", "xno"), f"the text is {text!r}")
