"""Tiny models to damage, and what a start does with them.

A refusal is one of `REFUSALS`: those become one line in the log and exit code 78 (server/runtime.py).
"""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from benchmarks.peers.checkpoints import write_gguf
from server.engine.build import build_engine
from server.engine.types import EngineConfig
from server.model_source import ModelSourceError, resolve
from server.runtime import _read_model
from tests.fixtures_tokenizers import tiny_vocabulary

REFUSALS = (ModelSourceError, ValueError, OSError)
HUGE = 10**400
MANY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([-(2**63), 2**31, 2**64, HUGE]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=3),
    st.lists(st.lists(st.none(), max_size=1), max_size=7),
    st.dictionaries(st.sampled_from(["full_attention", "rope_type", "factor", "rope_theta"]), st.integers()),
)


def start(model: Path) -> None:
    """All that a start reads, in the front and then in the engine."""
    files = resolve(str(model))
    _read_model(files)
    config = EngineConfig(
        model_path=str(files.path), device="cpu", num_threads=1, backend="reference", weight_cache=False
    )
    build_engine(config, lambda *_: None)


def refusal(model: Path) -> str:
    """Why a start is refused, after a glance at the memory that it took."""
    tracemalloc.start()
    try:
        with pytest.raises(REFUSALS) as caught:
            start(model)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert len(message) < 1000
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture(scope="module")
def gguf_content(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pieces, types, scores = tiny_vocabulary()
    vocabulary = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny_checkpoint, vocabulary)
    return path.read_bytes()


@pytest.fixture(scope="module")
def arena(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For many files in turn."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("arena") / "model"))
