"""Mends what Triton's interpreter does otherwise than a GPU.

It cuts bfloat16 off where a GPU rounds to the nearest, rounds float8 wrongly where the rounding carries, and
multiplies the bits of bfloat16 as integers (triton 3.7.1, runtime/interpreter.py: `_convert_float`,
`create_dot`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_TYPES = {
    tl.bfloat16: (torch.bfloat16, torch.int16),
    tl.float16: (torch.float16, torch.int16),
    tl.float32: (torch.float32, torch.int32),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8),
}


def mend_interpreter() -> None:
    create_dot = interpreter.InterpreterBuilder.create_dot

    def mended_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return create_dot(self, _in_fp32(a), _in_fp32(b), *others)

    interpreter.InterpreterBuilder.create_dot = mended_dot
    interpreter._convert_float = _convert


def _in_fp32(handle: Any) -> Any:
    """Products of bfloat16 or float8 numbers are exact in fp32."""
    if handle.dtype.scalar not in _TORCH_TYPES:
        return handle
    data = _convert(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _convert(data: npt.NDArray[Any], source: Any, target: Any, rounding_mode: Any) -> npt.NDArray[Any]:
    """The bits of numbers in `target`'s format, as unsigned integers; rounded to the nearest or even."""
    source_type, source_bits = _TORCH_TYPES[source]
    target_type, target_bits = _TORCH_TYPES[target]
    bits = np.ascontiguousarray(data).view(np.dtype(str(source_bits).removeprefix("torch.")))
    converted = torch.from_numpy(bits).view(source_type).to(target_type).view(target_bits).numpy()
    unsigned = f"uint{8 * converted.itemsize}"
    return converted.reshape(data.shape).view(unsigned)
