"""Which back end an engine computes with."""

from __future__ import annotations

import logging

from server.engine.backend.base import AnyBackend
from server.engine.backend.native import NativeBackend
from server.engine.backend.native_library import NativeUnavailableError
from server.engine.dtype import DType

logger = logging.getLogger(__name__)


class BackendError(ValueError):
    """The configuration asks for a back end that this machine does not have."""


def choose_backend(
    name: str,
    cpu_isa: str,
    device: str,
    dtype: DType,
    num_threads: int,
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
) -> AnyBackend:
    """name: auto, native, triton or reference. cpu_isa: auto or one of the native back end's levels.

    quantization: of the weight matrices, none, int8, fp8 or int4. kv_cache_dtype: auto or fp8. auto is
    native on a CPU and triton on a GPU, where they work. Raises BackendError where what is asked for by name
    cannot be.
    """
    if name == "reference":
        return _reference(device, dtype, num_threads, quantization, kv_cache_dtype)
    if device == "cpu":
        if name == "triton":
            raise BackendError("--backend triton: it computes on a GPU, and --device is cpu")
        return _on_cpu(name, cpu_isa, dtype, num_threads, quantization, kv_cache_dtype)
    if name == "native":
        raise BackendError(f"--backend native: it computes on a CPU, and --device is {device}")
    return _on_gpu(name, device, dtype, quantization, kv_cache_dtype)


def _on_cpu(
    name: str, cpu_isa: str, dtype: DType, num_threads: int, quantization: str, kv_cache_dtype: str
) -> AnyBackend:
    if quantization in ("fp8", "int4"):
        raise BackendError(
            f"--quantization {quantization}: the native CPU kernels do not have it; take int8, or --backend "
            "reference, which is much slower"
        )
    if kv_cache_dtype != "auto":
        raise BackendError(
            f"--kv-cache-dtype {kv_cache_dtype}: the native CPU kernels do not have it; leave it out, or take"
            " --backend reference, which is much slower"
        )
    try:
        backend = NativeBackend(dtype, num_threads, cpu_isa, quantization)
    except NativeUnavailableError as error:
        if name == "native" or cpu_isa != "auto":
            option = "--backend native" if name == "native" else f"--cpu-isa {cpu_isa}"
            raise BackendError(f"{option}: no native CPU kernels: {error}") from error
        logger.warning("no native CPU kernels, so steps take two to three times as long: %s", error)
        return _reference("cpu", dtype, num_threads, quantization, kv_cache_dtype)
    logger.info("native CPU kernels: %s, %d threads", backend.level, num_threads)
    return backend


def _on_gpu(name: str, device: str, dtype: DType, quantization: str, kv_cache_dtype: str) -> AnyBackend:
    if quantization == "int8":
        if name == "triton":
            raise BackendError("--backend triton: it does not have --quantization int8; take fp8 or int4")
        return _reference(device, dtype, 1, quantization, kv_cache_dtype)
    _check_e4m3(device, quantization, kv_cache_dtype)
    try:
        import torch

        from server.engine.backend.triton.backend import TritonBackend
        from server.engine.backend.triton.self_test import self_test

        self_test(torch.device(device), dtype, kv_cache_dtype, quantization)
    except Exception as error:  # whatever a compiler or a driver raises, the other back end may do
        if name == "triton":
            raise BackendError(f"--backend triton: the kernels do not work here: {error}") from error
        logger.warning("no Triton kernels, so steps take many times as long: %s", error)
        return _reference(device, dtype, 1, quantization, kv_cache_dtype)
    return TritonBackend(torch.device(device), dtype, kv_cache_dtype, quantization)


def _check_e4m3(device: str, quantization: str, kv_cache_dtype: str) -> None:
    """Raises BackendError if a GPU is asked for e4m3 numbers and has no instructions for them."""
    if "fp8" not in (quantization, kv_cache_dtype):
        return
    import torch

    if not torch.cuda.is_available() or (capability := torch.cuda.get_device_capability(device)) >= (8, 9):
        return
    asked, instead = (
        ("--quantization fp8", "take int4")
        if quantization == "fp8"
        else ("--kv-cache-dtype fp8", "leave it out")
    )
    raise BackendError(
        f"{asked}: it takes a GPU of compute capability 8.9 (Ada, Hopper) or later, and {device} has "
        f"{capability[0]}.{capability[1]}; {instead}"
    )


def _reference(
    device: str, dtype: DType, num_threads: int, quantization: str, kv_cache_dtype: str
) -> AnyBackend:
    # Imported only where it serves, for it imports torch.
    import torch

    from server.engine.backend.reference import ReferenceBackend

    if device == "cpu":
        torch.set_num_threads(num_threads)
    return ReferenceBackend(torch.device(device), dtype, quantization, kv_cache_dtype)
