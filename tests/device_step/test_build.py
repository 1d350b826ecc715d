"""An engine whose back end computes on a device behind the host, as it is built for a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.engine import build
from server.engine.build import build_engine
from server.engine.types import EngineConfig, GenerateRequest, SamplingParams
from tests.device_step.static_backend import StaticBackend, sample
from tests.device_step.thread_queue import ThreadQueue
from tests.unit.test_build import config, model_path

__all__ = ["model_path"]


@pytest.fixture
def queue() -> Iterator[ThreadQueue]:
    one = ThreadQueue()
    yield one
    one.close()


def generated(changes: EngineConfig) -> list[int]:
    core, _ = build_engine(changes, lambda *_: None)
    params = SamplingParams(max_tokens=12, seed=0, temperature=0.8)
    for index in range(3):
        core.add(GenerateRequest(request_id=str(index), prompt_token_ids=[2, 3 + index], params=params))
    tokens: dict[str, list[int]] = {"0": [], "1": [], "2": []}
    while core.has_work():
        for output in core.step().outputs:
            tokens[output.request_id] += output.token_ids
    return [token for index in sorted(tokens) for token in tokens[index]]


def test_an_engine_on_a_device_runs_ahead_and_generates_what_the_synchronous_one_does(
    model_path: str, queue: ThreadQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"dtype": "float32", "backend": "reference", "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 20}
    wanted = generated(config(model_path, **changes))
    assert len(wanted) == 36
    monkeypatch.setattr(build, "choose_backend", lambda *_: StaticBackend(queue, sample))
    assert generated(config(model_path, **changes)) == wanted
    assert queue.num_replays > 8
    replays = queue.num_replays
    assert generated(config(model_path, enforce_eager=True, **changes)) == wanted
    assert queue.num_replays == replays
