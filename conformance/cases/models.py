"""Models: what is served, and asking for what is not."""

from __future__ import annotations

from urllib.parse import quote

from conformance.case import Group
from conformance.client import Server, refusal
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys

GROUP = Group("models")
case = GROUP.case
NOBODY = "nobody/serves-this-model"


@case("list")
async def models_are_listed_in_the_shape_of_openai(server: Server) -> None:
    listed = await server.answered_get("/v1/models")
    expect_equal(listed.get("object"), "list", "object")
    expect(listed["data"], "the list is empty")
    for model in listed["data"]:
        expect_keys(model, "id object created owned_by", "a model")
        expect_equal(model["object"], "model", "object of a model")
        expect(type(model["created"]) is int, "created is no integer")


@case("served-is-listed")
async def the_model_that_answers_is_in_the_list(server: Server) -> None:
    listed = await server.answered_get("/v1/models")
    answer = await server.chat(max_tokens=1)
    expect(answer["model"] in [model["id"] for model in listed["data"]], f"{answer['model']} is not listed")


@case("retrieve")
async def a_listed_model_can_be_retrieved_by_its_name(server: Server) -> None:
    model = await server.answered_get(f"/v1/models/{quote(server.model, safe='')}")
    expect_keys(model, "id object created owned_by", "the model")
    expect_equal(model["id"], server.model, "id")


@case("retrieve-unknown")
async def retrieving_an_unknown_model_is_a_404_with_an_error(server: Server) -> None:
    known = await server.get(f"/v1/models/{quote(server.model, safe='')}")
    if known.status != 200:
        raise NotOffered(f"models are not retrieved: {known.status}")
    refusal(await server.get(f"/v1/models/{NOBODY}"), 404)


@case("unknown-chat")
async def a_chat_with_an_unknown_model_is_a_404(server: Server) -> None:
    answer = await server.post("/v1/chat/completions", server.chat_body(model=NOBODY))
    error = refusal(answer, 404)
    expect_equal(error.get("code"), "model_not_found", "the code")


@case("unknown-completion")
async def a_completion_with_an_unknown_model_is_a_404(server: Server) -> None:
    answer = await server.post("/v1/completions", server.completion_body(model=NOBODY))
    error = refusal(answer, 404)
    expect_equal(error.get("code"), "model_not_found", "the code")


@case("unknown-stream")
async def a_stream_from_an_unknown_model_is_a_404_and_no_stream(server: Server) -> None:
    answer = await server.post("/v1/chat/completions", server.chat_body(model=NOBODY, stream=True))
    refusal(answer, 404)
    await server.check_alive()


@case("answer-names-model")
async def an_answer_says_which_model_gave_it(server: Server) -> None:
    answer = await server.chat(max_tokens=1)
    expect(isinstance(answer["model"], str) and answer["model"], "model is empty")
