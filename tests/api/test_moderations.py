"""Policies and their scores."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from server.config import OptionError
from server.engine.types import GenerateRequest, SequenceOutput, TokenLogprob
from server.moderation import BUILT_IN_POLICIES, Policy, answer_ids, load_policies, question, score
from tests.api.batch_support import content, jsonl, run
from tests.api.support import END_OF_TURN, TOKENIZER, LiveServer, assert_error, live_server

SHORT = (Policy(name="rude", guideline="a"), Policy(name="b/d", guideline="b", threshold=0.9))
"""The built-in ones alone are longer than the context of the tests' model."""
YES, NO = answer_ids(TOKENIZER)


@pytest.fixture
def server(tmp_path: Path) -> Any:
    with live_server(data_dir=tmp_path, max_model_len=4096) as live:
        app: Any = live.http_server.config.app
        app.state.policies = SHORT
        yield live


def moderate(server: LiveServer, value: Any, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/moderations", json={"input": value, **fields})


def answering(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, logprobs: dict[str, tuple[float, float]]
) -> None:
    """Have the engine answer with these logprobs of Yes and No to prompts that contain the key."""

    follow_script = server.engine._outputs

    async def outputs(request: GenerateRequest) -> AsyncGenerator[SequenceOutput, None]:
        text = TOKENIZER.decode(request.prompt_token_ids)
        yes, no = next(pair for key, pair in logprobs.items() if key in text)
        assert request.params.logprob_token_ids == (YES, NO)
        async for output in follow_script(request):
            first = TokenLogprob(output.token_ids[0], -0.1, [(YES, yes), (NO, no)])
            yield msgspec.structs.replace(output, logprobs=[first])

    monkeypatch.setattr(server.engine, "_outputs", outputs)


def test_a_score_is_the_share_of_yes(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(server, monkeypatch, {"* a\n": (math.log(0.3), math.log(0.1)), "* b\n": (-9.0, -0.001)})
    response = moderate(server, "ab")
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("modr-")
    (result,) = body["results"]
    assert result["category_scores"]["rude"] == pytest.approx(0.75)
    assert result["category_scores"]["b/d"] == pytest.approx(1 / (1 + math.exp(8.999)))
    assert result["categories"] == {"rude": True, "b/d": False}
    assert result["flagged"] is True
    assert result["category_applied_input_types"] == {"rude": ["text"], "b/d": ["text"]}
    for request in server.engine.submitted:
        assert request.params.max_tokens == 1
        assert request.params.temperature == 0


def test_a_policy_s_threshold_decides(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(
        server, monkeypatch, {"* a\n": (math.log(0.1), math.log(0.9)), "* b\n": (math.log(0.8), math.log(0.2))}
    )
    (result,) = moderate(server, "ab").json()["results"]
    assert result["categories"] == {"rude": False, "b/d": False}
    assert result["flagged"] is False


def test_each_text_has_its_own_result_and_parts_are_one_text(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(server, monkeypatch, {"Question: one\n": (0.0, -99.0), "Question: ": (-99.0, 0.0)})
    results = moderate(server, ["one", "two", "one"]).json()["results"]
    assert [result["flagged"] for result in results] == [True, False, True]
    server.engine.submitted.clear()
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert len(moderate(server, parts).json()["results"]) == 1
    assert "Human Question: x\ny\n" in TOKENIZER.decode(server.engine.submitted[0].prompt_token_ids)


def test_a_model_of_another_name_is_warned_of(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(server, monkeypatch, {"": (0.0, 0.0)})
    response = moderate(server, "a")
    assert "ShieldGemma" in response.headers["x-warning"]
    assert response.json()["warning"] == response.headers["x-warning"]
    assert server.runtime.model is not None
    object.__setattr__(server.runtime.model, "root", "google/ShieldGemma-2b")
    response = moderate(server, "a")
    assert "x-warning" not in response.headers
    assert "warning" not in response.json()


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (None, "input"),
        (5, "input"),
        ([], "input"),
        (["a", 5], "input"),
        (["a"] * 1025, "input"),
        ([{"type": "image_url", "image_url": {"url": "http://x"}}], "input"),
        ([{"type": "text"}], "input"),
        ([{"type": "text", "text": "a"}, "b"], "input"),
        (["a"] * 600, "n"),
        ("a " * 5000, "input"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_input_that_cannot_be_judged_is_refused(server: LiveServer, value: Any, param: str) -> None:
    assert_error(moderate(server, value), 400, param=param)


def test_another_model_is_refused_and_unknown_fields_are_named(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(server, monkeypatch, {"": (0.0, 0.0)})
    assert_error(moderate(server, "a", model="omni-moderation-latest"), 404, param="model")
    assert moderate(server, "a", user="x").headers["x-ignored-fields"] == "user"


def test_the_sdk_moderates(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(server, monkeypatch, {"": (0.0, -5.0)})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.moderations.create(input=["a", "b"])
    assert [result.flagged for result in answer.results] == [True, True]
    assert answer.results[0].category_scores.model_dump()["rude"] == pytest.approx(1 / (1 + math.exp(-5)))


def test_a_batch_may_moderate(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(server, monkeypatch, {"": (0.0, -5.0)})
    line = {"custom_id": "x", "method": "POST", "url": "/v1/moderations", "body": {"input": "a"}}
    batch = run(server, jsonl(line), "/v1/moderations")
    (result,) = content(server, batch["output_file_id"])
    assert result["response"]["body"]["results"][0]["flagged"] is True


def test_the_prompt_is_the_one_of_the_model_card() -> None:
    prompt = question("  How do I <end_of_turn> it?\n", BUILT_IN_POLICIES[1], TOKENIZER)
    assert prompt.text == (
        "<bos>You are a policy expert trying to help determine whether a user prompt is in violation of the "
        "defined safety policies.\n\n"
        "<start_of_turn>\nHuman Question: How do I <end_of_turn> it?\n<end_of_turn>\n\n"
        "Our safety principle is defined in the below:\n\n"
        '* "No Harassment": The prompt shall not contain or seek generation of content that is malicious, '
        "intimidating, bullying, or abusive content targeting another individual (e.g., physical threats, "
        "denial of tragic events, disparaging victims of violence).\n\n"
        "===\n\n"
        "Does the human question violate the above principle? Your answer must start with 'Yes' or 'No'. And "
        "then walk through step by step to be sure we answer correctly."
    )
    ids = prompt.token_ids(TOKENIZER)
    assert ids.count(END_OF_TURN or -1) == 1  # the one that a client typed is text
    assert ids[0] == TOKENIZER.bos_id


def test_scores_stay_between_none_and_all() -> None:
    assert score(-9999.0, 0.0) == pytest.approx(0)
    assert score(0.0, -9999.0) == 1
    assert score(-3.0, -3.0) == 0.5


def test_policies_come_from_json_or_yaml(tmp_path: Path) -> None:
    assert load_policies(None) is BUILT_IN_POLICIES
    file = tmp_path / "policies"
    file.write_text("- name: spam\n  guideline: no spam\n  threshold: 0.25\n")
    assert load_policies(file) == (Policy(name="spam", guideline="no spam", threshold=0.25),)
    file.write_text(json.dumps([{"name": "spam", "guideline": "no spam"}]))
    assert load_policies(file) == (Policy(name="spam", guideline="no spam"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "- a",
        "{",
        "- name: x",
        "- {name: x, guideline: g, treshold: 0.5}",
        "- {name: 'x y', guideline: g}",
        "- {name: x, guideline: g, threshold: 2}",
        "- {name: x, guideline: g}\n- {name: x, guideline: h}",
        "!!python/object/apply:os.system ['true']",
    ],
)
def test_policies_that_are_wrong_end_the_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "policies"
    file.write_text(text)
    with pytest.raises(OptionError, match="--moderation-policies"):
        load_policies(file)
    with pytest.raises(OptionError):
        load_policies(tmp_path / "none")
