"""The samplers that the tests of sampling run on: each such test module runs once for every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.sampling import draw, native_sampler, sampler
from server.engine.sampling.native_sampler import NativeSampler
from server.engine.sampling.penalties import adjust_logits
from server.engine.sampling.sampler import Sampler
from server.engine.sampling.types import SampledToken, TokenMask
from server.engine.sequence import Sequence
from server.engine.types import PromptTokenLogprob
from tests.unit.native_backends import native_backend

LEVELS = ("avx2", "avx512")
"""The higher ones compile the same passes as avx512."""


class SamplerUnderTest(Protocol):
    def sample(
        self, logits: Tensor, seqs: Seq[Sequence], masks: Mapping[int, TokenMask] | None = None
    ) -> list[SampledToken]: ...

    def gather_logprobs(
        self, logits: Tensor, chosen: Seq[int], num_top: Seq[int]
    ) -> list[PromptTokenLogprob]: ...

    def adjust(self, logits: Tensor, seqs: Seq[Sequence]) -> None:
        """Bias, min_tokens and penalties, in place."""


class _Torch(Sampler):
    def adjust(self, logits: Tensor, seqs: Seq[Sequence]) -> None:
        adjust_logits(logits, seqs)


class _Native:
    """Takes tensors, as the torch sampler does."""

    def __init__(self, native: NativeSampler) -> None:
        self.native = native

    def sample(
        self, logits: Tensor, seqs: Seq[Sequence], masks: Mapping[int, TokenMask] | None = None
    ) -> list[SampledToken]:
        return self.native.sample(logits.numpy(), seqs, masks)

    def gather_logprobs(self, logits: Tensor, chosen: Seq[int], num_top: Seq[int]) -> list[PromptTokenLogprob]:
        return self.native.gather_logprobs(logits.numpy(), chosen, num_top)

    def adjust(self, logits: Tensor, seqs: Seq[Sequence]) -> None:
        self.native.sample(logits.numpy(), seqs)


def native_sampler_of(
    level: str, num_threads: int, vocab_size: int, suppress: tuple[int, ...] = ()
) -> NativeSampler:
    """Skips where there are no native kernels."""
    return native_backend(torch.float32, level, num_threads).sampler(vocab_size, suppress)


_current = "torch"


@pytest.fixture(scope="module", autouse=True, params=["torch", "native"])
def every_sampler(request: pytest.FixtureRequest) -> Iterator[None]:
    """What `make_sampler` makes is of this kind."""
    global _current
    _current = request.param
    make_sampler(1)  # builds the library, where that is still to be done
    yield
    _current = "torch"


def make_sampler(vocab_size: int, suppress: tuple[int, ...] = ()) -> SamplerUnderTest:
    if _current == "torch":
        return _Torch(vocab_size, suppress, "cpu")
    return _Native(native_sampler_of("auto", 2, vocab_size, suppress))


def torch_only() -> None:
    """For tests of how the torch sampler does it."""
    if _current != "torch":
        pytest.skip("about the torch sampler")


def look_at_few(patch: pytest.MonkeyPatch, count: int) -> None:
    """So few candidates are looked at before a row is searched again."""
    patch.setattr(sampler, "_NUM_CANDIDATES", count)
    patch.setattr(native_sampler, "_FEW", count)


def draw_with(patch: pytest.MonkeyPatch, number: float) -> None:
    """Every uniform number is this one."""
    for module in (draw, native_sampler):
        patch.setattr(module, "uniform", lambda seed, index: number)


def allow(ids: Seq[int], vocab_size: int) -> TokenMask:
    """A mask of these ids."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)
