"""What a client does wrong gets an error that it can read, and costs nobody else anything."""

from __future__ import annotations

import json

from conformance.case import Group
from conformance.client import Server, refusal, with_choices
from conformance.outcome import NotOffered, expect, expect_equal, expect_keys

GROUP = Group("errors")
case = GROUP.case
CHAT = "/v1/chat/completions"


@case("shape")
async def an_error_has_all_four_keys_of_openai_s(server: Server) -> None:
    error = await server.refuses_chat(temperature="hot")
    expect_keys(error, "message type param code", "the error")
    expect(isinstance(error["type"], str), "type is no string")
    expect(error["code"] is None or isinstance(error["code"], str), f"code is {error['code']!r}, no string")


@case("type")
async def a_client_s_mistake_is_an_invalid_request_error(server: Server) -> None:
    expect_equal((await server.refuses_chat(temperature="hot")).get("type"), "invalid_request_error", "type")


@case("param")
async def an_error_names_the_field(server: Server) -> None:
    for field, value in (("temperature", "hot"), ("n", 0), ("stop", 5)):
        error = await server.refuses_chat(**{field: value})
        expect_equal(error.get("param"), field, "param")


@case("media-type")
async def an_error_is_json_and_says_so(server: Server) -> None:
    answer = await server.post(CHAT, server.chat_body(temperature="hot"))
    refusal(answer)
    expect(answer.headers.get("content-type", "").startswith("application/json"), "it does not")


@case("no-json")
async def a_body_that_is_no_json_is_refused(server: Server) -> None:
    for body in (b"{", b"no json", b'{"messages": [}'):
        refusal(await server.send(CHAT, body))
    await server.check_alive()


@case("no-object")
async def a_body_that_is_no_object_is_refused(server: Server) -> None:
    for body in (b"[]", b'"text"', b"5", b"null"):
        refusal(await server.send(CHAT, body))
    await server.check_alive()


@case("empty-body")
async def an_empty_body_is_refused(server: Server) -> None:
    refusal(await server.send(CHAT, b""))
    await server.check_alive()


@case("content-type")
async def a_body_of_another_media_type_is_refused(server: Server) -> None:
    body = json.dumps(server.chat_body()).encode()
    answer = await server.send(CHAT, body, "text/plain")
    expect(answer.status in (400, 415), f"the status is {answer.status}")
    expect(isinstance(answer.error.get("message"), str), "the error has no message")


@case("content-type-charset")
async def a_media_type_may_name_its_character_set(server: Server) -> None:
    body = json.dumps(server.chat_body(max_tokens=1)).encode()
    answer = await server.send(CHAT, body, "application/json; charset=utf-8")
    expect_equal(answer.status, 200, "the status")
    with_choices(answer.json)


@case("not-utf-8")
async def a_body_that_is_not_utf_8_is_refused(server: Server) -> None:
    body = json.dumps(server.chat_body("XX")).encode().replace(b"XX", b"\xff\xfe")
    refusal(await server.send(CHAT, body))
    await server.check_alive()


@case("lone-surrogate")
async def half_a_surrogate_pair_is_refused_or_replaced(server: Server) -> None:
    body = json.dumps(server.chat_body("XX", max_tokens=1)).encode().replace(b"XX", rb"\ud800")
    answer = await server.send(CHAT, body)
    await server.answers_or_refuses(answer)


@case("nan")
async def a_number_that_json_does_not_have_is_refused(server: Server) -> None:
    body = json.dumps(server.chat_body(temperature=float("nan"))).encode()
    refusal(await server.send(CHAT, body))
    await server.check_alive()


@case("deep")
async def a_body_of_ten_thousand_levels_is_refused_or_read(server: Server) -> None:
    nested = b"[" * 10_000 + b"]" * 10_000
    body = json.dumps(server.chat_body(max_tokens=1)).encode()[:-1] + b', "metadata": ' + nested + b"}"
    answer = await server.send(CHAT, body)
    await server.answers_or_refuses(answer)


@case("huge")
async def a_body_of_16_megabytes_is_refused(server: Server) -> None:
    """Far above what any context holds; 413 tells it from a long prompt."""
    body = json.dumps(server.chat_body("a b " * 4_000_000)).encode()
    answer = await server.send(CHAT, body)
    expect(answer.status in (400, 413), f"the status is {answer.status}")
    expect(isinstance(answer.error.get("message"), str), "the error has no message")
    await server.check_alive()


@case("short-message")
async def an_error_does_not_repeat_a_long_value(server: Server) -> None:
    answer = await server.post(CHAT, server.chat_body(temperature="x" * 200_000))
    refusal(answer)
    expect(len(answer.content) < 10_000, f"it has {len(answer.content)} bytes")


@case("discreet")
async def an_error_tells_nothing_of_the_server_s_insides(server: Server) -> None:
    bodies: list[dict[str, object]] = [
        {"messages": 5},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [[]]},
    ]
    for body in bodies:
        answer = await server.post(CHAT, server.chat_body() | body)
        refusal(answer)
        text = answer.content.decode("utf-8", "replace")
        for sign in ("Traceback", 'File "', ".py", ".cpp", "site-packages", " object at 0x"):
            expect(sign not in text, f"it has {sign!r}: {text[:120]}")


@case("no-messages")
async def a_chat_without_messages_is_refused(server: Server) -> None:
    body = server.chat_body()
    del body["messages"]
    await server.refuses(CHAT, body)


@case("messages-empty")
async def an_empty_list_of_messages_is_refused(server: Server) -> None:
    await server.refuses_chat(messages=[])


@case("messages-string")
async def messages_that_are_a_string_are_refused(server: Server) -> None:
    await server.refuses_chat(messages="Hi")


@case("message-string")
async def a_message_that_is_a_string_is_refused(server: Server) -> None:
    await server.refuses_chat(messages=["Hi"])


@case("no-role")
async def a_message_without_a_role_is_refused(server: Server) -> None:
    await server.refuses_chat(messages=[{"content": "Hi"}])


@case("unknown-role")
async def a_message_of_an_unknown_role_is_refused(server: Server) -> None:
    await server.refuses_chat(messages=[{"role": "wizard", "content": "Hi"}])


@case("no-content")
async def a_user_s_message_without_content_is_refused(server: Server) -> None:
    await server.refuses_chat(messages=[{"role": "user"}])


@case("content-number")
async def content_that_is_a_number_is_refused(server: Server) -> None:
    await server.refuses_chat(messages=[{"role": "user", "content": 5}])


@case("unknown-part")
async def a_part_of_an_unknown_type_is_refused(server: Server) -> None:
    await server.refuses_chat([{"type": "smell", "smell": "roses"}])


@case("no-prompt")
async def a_completion_without_a_prompt_is_answered_or_refused(server: Server) -> None:
    """OpenAI's default is the end of a text, which few servers have."""
    body = server.completion_body()
    del body["prompt"]
    answer = await server.post("/v1/completions", body)
    await server.answers_or_refuses(answer)


@case("types")
async def values_of_a_wrong_type_are_refused(server: Server) -> None:
    wrong = {"max_tokens": "5", "temperature": [], "top_p": "x", "seed": 1.5, "stream": "perhaps", "n": "two"}
    for field, value in wrong.items():
        answer = await server.post(CHAT, server.chat_body(**{field: value}))
        expect_equal(answer.status, 400, f"the status for {field} {value!r}")
    await server.check_alive()


@case("max-tokens-0")
async def a_chat_of_no_token_is_refused(server: Server) -> None:
    await server.refuses_chat(max_tokens=0)


@case("max-tokens-negative")
async def a_negative_number_of_tokens_is_refused(server: Server) -> None:
    await server.refuses_chat(max_tokens=-5)


@case("unknown-path")
async def an_unknown_path_is_a_404_with_an_error(server: Server) -> None:
    refusal(await server.get("/v1/no/such/path"), 404)


@case("method")
async def a_get_where_a_post_is_due_is_refused(server: Server) -> None:
    answer = await server.get(CHAT)
    expect(answer.status in (404, 405), f"the status is {answer.status}")
    expect(isinstance(answer.error.get("message"), str), "the error has no message")


@case("api-key")
async def a_wrong_key_is_a_401_with_an_error(server: Server) -> None:
    headers = {"authorization": "Bearer wrong"}
    response = await server.http.get(server.root + "/v1/models", headers=headers)
    if server.api_key is None and response.status_code == 200:
        raise NotOffered("the server was started without a key")
    expect_equal(response.status_code, 401, "the status")
    expect_keys(response.json()["error"], "message type param code", "the error")
