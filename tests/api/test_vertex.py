"""Vertex AI's health and predict routes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.api.support import LiveServer, fresh, live_server, wait_until

HEALTH = "/v1/endpoints/1/deployedModels/2"
PREDICT = f"{HEALTH}:predict"
MESSAGES = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def _shared() -> Iterator[LiveServer]:
    with live_server(health_route=HEALTH, predict_route=PREDICT, max_queued_requests=8) as live:
        yield live


@pytest.fixture
def vertex(_shared: LiveServer) -> Iterator[LiveServer]:
    yield from fresh(_shared)


def predict(server: LiveServer, instances: Any, **fields: Any) -> httpx.Response:
    return server.http.post(PREDICT, json={"instances": instances, **fields})


def without_ids(text: str) -> str:
    return re.sub(r'"(chatcmpl|cmpl)-[0-9a-f]+"|"created":\d+', "", text)


# --- instances -------------------------------------------------------------------------------------------


def test_each_kind_of_instance_gets_its_prediction_in_order(vertex: LiveServer) -> None:
    answer = predict(vertex, [{"prompt": "ab"}, {"messages": MESSAGES}, "ab", {"inputs": "ab"}])
    assert answer.status_code == 200
    text, chat, plain, inputs = answer.json()["predictions"]
    assert text == plain == inputs == vertex.complete().json()["choices"][0]["text"]
    assert chat["object"] == "chat.completion"
    assert chat["choices"] == vertex.chat().json()["choices"]


def test_all_instances_are_in_the_engine_at_once(vertex: LiveServer) -> None:
    vertex.script.delay = 0.2
    seen: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: seen.append(predict(vertex, ["ab"] * 8)))
    asking.start()
    wait_until(lambda: len(vertex.engine.running) == 8)
    asking.join()
    assert seen[0].status_code == 200


def test_parameters_are_for_instances_without_their_own(vertex: LiveServer) -> None:
    predict(
        vertex,
        ["ab", {"prompt": "ab", "max_tokens": 2}, {"inputs": "ab", "parameters": {"max_new_tokens": 3}}],
        parameters={"maxOutputTokens": 5, "temperature": 0, "topK": 7, "stopSequences": ["zz"]},
    )
    asked = {request.params.max_tokens: request.params for request in vertex.engine.submitted}
    assert set(asked) == {5, 2, 3}
    assert {params.top_k for params in asked.values()} == {7}
    assert {params.temperature for params in asked.values()} == {0.0}


def test_several_texts_of_one_prompt_are_a_list(vertex: LiveServer) -> None:
    (prediction,) = predict(vertex, ["ab"], parameters={"n": 2, "max_tokens": 3}).json()["predictions"]
    assert len(prediction) == 2
    assert all(isinstance(text, str) for text in prediction)


def test_model_gardens_form_of_a_text_is_there_for_who_asks(vertex: LiveServer) -> None:
    raw, wrapped = predict(vertex, ["ab", {"prompt": "ab", "raw_response": False}]).json()["predictions"]
    assert wrapped == f"Prompt:\nab\nOutput:\n{raw}"


def test_one_conversation_with_its_format_named_is_all_the_predictions(vertex: LiveServer) -> None:
    """As Model Garden's clients read it: `predictions["choices"]`."""
    named = {"@requestFormat": "chatCompletions", "messages": MESSAGES}
    assert predict(vertex, [named]).json()["predictions"]["object"] == "chat.completion"
    several = predict(vertex, [named, named]).json()["predictions"]
    assert [prediction["object"] for prediction in several] == ["chat.completion"] * 2


def test_the_format_of_all_instances_can_be_named_once(vertex: LiveServer) -> None:
    answer = predict(vertex, [{"messages": MESSAGES}], **{"@requestFormat": "chatCompletions"})
    assert answer.json()["predictions"][0]["object"] == "chat.completion"


def test_a_field_without_effect_is_named(vertex: LiveServer) -> None:
    answer = predict(vertex, [{"prompt": "ab", "foo": 1}, {"prompt": "ab", "bar": 1}])
    assert answer.headers["x-ignored-fields"] == "bar, foo"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"instances": []}, "instances"),
        ({"instances": "ab"}, "instances"),
        ({"instances": [7]}, "instances[0]"),
        ({"instances": [{}]}, "instances[0].prompt"),
        ({"instances": [{"prompt": ["a", "b"]}]}, "instances[0].prompt"),
        ({"instances": ["ab"], "parameters": [1]}, "parameters"),
        ({"instances": ["ab"], "parameters": 0}, "parameters"),
        ({"instances": ["ab"], "parameters": []}, "parameters"),
        ({"instances": [{"prompt": "ab", "parameters": ""}]}, "instances[0].parameters"),
        ({"instances": [{"prompt": "ab", "inputs": "cd"}]}, "instances[0].inputs"),
        ({"instances": ["ab"], "temperature": 1}, "temperature"),
        ({"instances": ["ab"], "parameters": {"stream": True}}, "stream"),
        ({"instances": [{"messages": MESSAGES, "stream": True}]}, "stream"),
        ({"instances": ["ab", {"messages": 3}]}, "instances[1].messages"),
        ({"instances": ["ab", {"prompt": "ab", "topP": 9}]}, "instances[1].top_p"),
        ({"instances": ["ab"], "parameters": {"topP": 0.5, "top_p": 0.6}}, "parameters.top_p"),
        ({"instances": ["ab"], "parameters": {"raw_response": "no"}}, "instances[0].raw_response"),
        ({"instances": [{"@requestFormat": "other", "messages": MESSAGES}]}, "instances[0].@requestFormat"),
        ({"instances": [{"inputs": "ab", "parameters": 3}]}, "instances[0].parameters"),
        ({"parameters": {}}, "instances"),
        ({"@requestFormat": "other", "messages": MESSAGES}, "@requestFormat"),
    ],
)
def test_a_mistake_is_refused_and_says_where_it_is(vertex: LiveServer, body: Any, param: str) -> None:
    answer = vertex.http.post(PREDICT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    vertex.assert_idle()


def test_a_model_that_is_not_served_is_the_instances_mistake(vertex: LiveServer) -> None:
    answer = predict(vertex, ["ab", {"prompt": "ab", "model": "other"}])
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "instances[1].model"


@pytest.mark.parametrize(
    ("instances", "parameters"),
    [(["ab"] * 9, {}), (["ab"] * 5, {"n": 2}), (["ab", {"prompt": "ab", "n": 8}], {})],
)
def test_more_sequences_than_could_ever_run_are_refused_at_once(
    vertex: LiveServer, instances: Any, parameters: Any
) -> None:
    assert predict(vertex, instances, parameters=parameters).status_code == 400
    assert not vertex.engine.submitted


def test_an_instance_that_finds_no_room_ends_the_others(vertex: LiveServer) -> None:
    vertex.script.delay = 0.05
    vertex.script.ends_with_stop = False
    parameters = {"max_tokens": 40}
    asking = threading.Thread(target=lambda: predict(vertex, ["ab"] * 3, parameters=parameters))
    asking.start()
    wait_until(lambda: len(vertex.engine.running) == 3)
    answer = predict(vertex, ["ab"] * 6, parameters=parameters)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["param"] is None
    asking.join()
    vertex.assert_idle()
    assert len(vertex.engine.aborted) == 5


def test_a_client_that_leaves_ends_all_instances(vertex: LiveServer) -> None:
    vertex.script.delay = 0.1
    vertex.script.ends_with_stop = False
    with pytest.raises(httpx.ReadTimeout):
        vertex.http.post(PREDICT, json={"instances": ["ab"] * 3, "parameters": {"max_tokens": 50}}, timeout=0.5)
    vertex.assert_idle()
    assert len(vertex.engine.aborted) == 3


# --- bare bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5}),
        ("/v1/completions", {"prompt": "ab", "max_tokens": 5}),
        ("/v1/completions", {"prompt": ["ab", "ab"], "echo": True}),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 77}),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "other"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "unknown": 1}),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_bare_body_is_answered_as_its_own_route_does(
    vertex: LiveServer, route: str, body: dict[str, Any], streams: bool
) -> None:
    body = {**body, "stream": streams}
    answer, expected = (vertex.http.post(path, json=body) for path in (PREDICT, route))
    assert without_ids(answer.text) == without_ids(expected.text)
    assert answer.status_code == expected.status_code
    assert set(answer.headers) == set(expected.headers)
    for name in ("content-type", "x-ignored-fields"):
        assert answer.headers.get(name) == expected.headers.get(name)


def test_the_named_format_streams_too(vertex: LiveServer) -> None:
    body = {"@requestFormat": "chatCompletions", "messages": MESSAGES, "stream": True}
    answer = vertex.http.post(PREDICT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "x-ignored-fields" not in answer.headers
    *events, done = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    assert json.loads(events[0])["object"] == "chat.completion.chunk"


def test_a_client_that_leaves_a_stream_ends_it(vertex: LiveServer) -> None:
    vertex.script.delay = 0.05
    vertex.script.ends_with_stop = False
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 40}
    with vertex.http.stream("POST", PREDICT, json=body) as answer:
        next(answer.iter_lines())
    vertex.assert_idle()
    assert len(vertex.engine.aborted) == 1


# --- the document ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"instances": ["ab", {"prompt": "ab"}], "parameters": {"max_tokens": 2}},
        {"@requestFormat": "chatCompletions", "instances": [{"messages": MESSAGES}], "parameters": None},
        {"messages": MESSAGES, "max_tokens": 2},
        {"prompt": "ab", "max_tokens": 2},
    ],
)
def test_the_document_tells_what_the_route_takes_and_answers(vertex: LiveServer, body: dict[str, Any]) -> None:
    document = vertex.http.get("/openapi.json").json()
    route = document["paths"][PREDICT]["post"]
    asked, answered = (
        {**place["content"]["application/json"]["schema"], "components": document["components"]}
        for place in (route["requestBody"], route["responses"]["200"])
    )
    jsonschema.validate(body, asked)
    answer = vertex.http.post(PREDICT, json=body)
    assert answer.status_code == 200
    jsonschema.validate(answer.json(), answered)


@pytest.mark.parametrize(
    "wrong", [{"instances": []}, {"instances": [7]}, {"instances": ["ab"], "parameters": []}]
)
def test_what_the_document_does_not_allow_the_route_refuses(vertex: LiveServer, wrong: dict[str, Any]) -> None:
    document = vertex.http.get("/openapi.json").json()
    reference = {"$ref": "#/components/schemas/PredictRequest", "components": document["components"]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, reference)
    assert vertex.http.post(PREDICT, json=wrong).status_code == 400


# --- around it -------------------------------------------------------------------------------------------


def test_the_health_routes_follow_readiness(vertex: LiveServer) -> None:
    for path in (HEALTH, "/ping"):
        assert vertex.http.get(path).status_code == 200
    vertex.runtime.is_draining = True
    try:
        for path in (HEALTH, "/ping"):
            assert vertex.http.get(path).status_code == 503
    finally:
        vertex.runtime.is_draining = False


@pytest.mark.covers("L10")
def test_the_health_route_needs_no_key_and_the_predict_route_does() -> None:
    with live_server(health_route=HEALTH, predict_route=PREDICT, api_key=["k"]) as server:
        assert server.http.get(HEALTH).status_code == 200
        assert predict(server, ["ab"]).status_code == 401
        server.http.headers["authorization"] = "Bearer k"
        assert predict(server, ["ab"]).status_code == 200


def test_a_health_route_that_is_another_route_opens_nothing() -> None:
    with live_server(health_route="/v1/models", predict_route="/v1/chat/completions", api_key=["k"]) as server:
        assert server.http.get("/v1/models").status_code == 401
        server.http.headers["authorization"] = "Bearer k"
        assert server.http.get("/v1/models").json()["object"] == "list"
        assert server.chat().status_code == 200


@pytest.mark.covers("L10")
def test_a_health_route_that_is_the_predict_route_opens_nothing() -> None:
    with live_server(health_route=PREDICT, predict_route=PREDICT, api_key=["k"]) as server:
        assert predict(server, ["ab"]).status_code == 401
        assert server.http.get(PREDICT).status_code == 401


@pytest.mark.covers("L10")
def test_a_prediction_counts_as_one_request_of_its_key() -> None:
    with live_server(predict_route=PREDICT, requests_per_minute=3) as server:
        answer = predict(server, ["ab"] * 3)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"


def test_without_the_options_there_are_no_such_routes(server: LiveServer) -> None:
    assert server.http.post(PREDICT, json={"instances": ["ab"]}).status_code == 404
