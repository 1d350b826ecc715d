"""Which back end serves, and what is said where the native one cannot."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from server.engine.backend import native_library
from server.engine.backend.choose import BackendError, choose_backend
from server.engine.backend.native_library import NativeUnavailableError, build_library, load_library
from server.engine.dtype import DType


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_library, "_FLAGS", ("-unheard-of",))  # so that no library that exists fits


def test_the_reference_can_be_asked_for() -> None:
    assert choose_backend("reference", "auto", "cpu", DType.FLOAT32, 1).name == "reference"


def test_without_a_gpu_its_kernels_are_replaced_with_a_warning_or_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose_backend("auto", "auto", "cuda", DType.FLOAT32, 1).name == "reference"
    assert "no Triton kernels" in caplog.text
    with pytest.raises(BackendError, match="--backend triton: the kernels do not work here"):
        choose_backend("triton", "auto", "cuda", DType.FLOAT32, 1)


def test_each_device_has_its_own_kernels() -> None:
    with pytest.raises(BackendError, match=r"--backend triton: .* --device is cpu"):
        choose_backend("triton", "auto", "cpu", DType.FLOAT32, 1)
    with pytest.raises(BackendError, match=r"--backend triton: it does not have --quantization int8"):
        choose_backend("triton", "auto", "cuda", DType.FLOAT32, 1, "int8")
    with pytest.raises(BackendError, match=r"--kv-cache-dtype fp8: the native CPU kernels do not have it"):
        choose_backend("auto", "auto", "cpu", DType.BFLOAT16, 1, "none", "fp8")
    with pytest.raises(BackendError, match=r"--backend native: .* --device is cuda"):
        choose_backend("native", "auto", "cuda", DType.FLOAT32, 1)


@pytest.mark.parametrize(
    ("option", "quantization", "kv_cache_dtype"),
    [
        ("--quantization fp8: .* compute capability 8.9 .* 8.0; take int4", "fp8", "fp8"),
        ("--kv-cache-dtype fp8: .* compute capability 8.9 .* 8.0; leave it out", "int4", "fp8"),
    ],
)
def test_a_gpu_without_e4m3_is_not_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, option: str, quantization: str, kv_cache_dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(BackendError, match=option):
        choose_backend("auto", "auto", "cuda", DType.BFLOAT16, 1, quantization, kv_cache_dtype)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_serves_and_one_line_says_what_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_backend("auto", "auto", "cpu", DType.BFLOAT16, 1).name == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no-such-compiler" in caplog.text


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("name", "isa", "option"), [("native", "auto", "--backend native"), ("auto", "avx2", "--cpu-isa avx2")]
)
def test_what_was_asked_for_by_name_is_not_replaced(name: str, isa: str, option: str) -> None:
    with pytest.raises(BackendError, match=option):
        choose_backend(name, isa, "cpu", DType.BFLOAT16, 1)


def test_a_dtype_without_kernels_is_served_by_the_reference() -> None:
    assert choose_backend("auto", "auto", "cpu", DType.FLOAT16, 1).name == "reference"


def test_a_library_that_cannot_be_built_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NativeUnavailableError, match="false cannot build them"):
        build_library(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_a_built_library_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        load_library()
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library()
    monkeypatch.setenv("CXX", "false")
    load_library()
