"""The formats that the matrices of a GPU's back end can be rounded to; the reference back end has them, too."""

from __future__ import annotations

from torch import Tensor

from server.engine.backend import fp8, int4
from server.engine.backend.fp8 import Fp8Matrix
from server.engine.backend.int4 import Int4Matrix


def rounded(weight: Tensor, quantization: str) -> Tensor | Fp8Matrix | Int4Matrix:
    """weight: [outputs, inputs], any float. It comes back as it is unless quantization is fp8 or int4 and
    kernels multiply with a matrix of its shape in that."""
    if quantization == "fp8" and fp8.fits(weight.shape):
        return fp8.quantize(weight)
    if quantization == "int4" and int4.fits(weight.shape):
        return int4.quantize(weight)
    return weight
