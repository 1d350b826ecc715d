"""The number formats of weights and activations, by name and without torch."""

from __future__ import annotations

import enum

import numpy as np


class DType(enum.StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 4 if self is DType.FLOAT32 else 2

    def round(self, value: float) -> float:
        """The nearest number of this format; of two equally near ones, the even one."""
        if self is DType.FLOAT16:
            return float(np.float16(value))
        single = np.float32(value)
        if self is DType.FLOAT32:
            return float(single)
        bits = int(single.view(np.uint32))
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # bf16 is the upper half of fp32
        return float(np.uint32(rounded).view(np.float32))
