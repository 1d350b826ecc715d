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
    name: str, cpu_isa: str, device: str, dtype: DType, num_threads: int, quantization: str = "none"
) -> AnyBackend:
    """name: auto, native or reference. cpu_isa: auto or one of the native back end's levels.

    quantization: of the weight matrices, none or int8. auto is native on a CPU that has it. Raises BackendError
    where what is asked for by name cannot be.
    """
    if name == "reference" or (name == "auto" and device != "cpu"):
        return _reference(device, dtype, num_threads, quantization)
    if device != "cpu":
        raise BackendError(f"--backend native: it computes on a CPU, and --device is {device}")
    try:
        backend = NativeBackend(dtype, num_threads, cpu_isa, quantization)
    except NativeUnavailableError as error:
        if name == "native" or cpu_isa != "auto":
            option = "--backend native" if name == "native" else f"--cpu-isa {cpu_isa}"
            raise BackendError(f"{option}: no native CPU kernels: {error}") from error
        logger.warning("no native CPU kernels, so steps take two to three times as long: %s", error)
        return _reference(device, dtype, num_threads, quantization)
    logger.info("native CPU kernels: %s, %d threads", backend.level, num_threads)
    return backend


def _reference(device: str, dtype: DType, num_threads: int, quantization: str) -> AnyBackend:
    # Imported only where it serves, for it imports torch.
    import torch

    from server.engine.backend.reference import ReferenceBackend

    if device == "cpu":
        torch.set_num_threads(num_threads)
    return ReferenceBackend(torch.device(device), dtype, quantization)
