"""The few shapes to which steps are padded, so that each of them is recorded once."""

from __future__ import annotations

from itertools import pairwise

from server.engine.device_step.layout import StepShape

_CHUNK_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)
"""Of steps with prompts. A larger step keeps the device busy for longer than the host takes to call its kernels
one by one."""
_CHUNK_SEQS = (8, 32, 128)


class RecordedShapes:
    """Which shape a step is padded to."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._decodes = decode_sizes(max_num_seqs)
        most = min(max_num_batched_tokens, _CHUNK_TOKENS[-1])
        self._tokens = [size for size in _CHUNK_TOKENS if size < most] + [most]
        self._seqs = [size for size in _CHUNK_SEQS if size < max_num_seqs] + [max_num_seqs]

    def decodes_of(self, num_seqs: int) -> StepShape:
        return StepShape.of_decodes(next(size for size in self._decodes if size >= num_seqs))

    def chunks_of(self, num_tokens: int, num_seqs: int) -> StepShape | None:
        """For a step of any mix, each of whose sequences has an output row at most; None if it is too large."""
        if num_tokens > self._tokens[-1]:
            return None
        return _chunks(
            next(size for size in self._tokens if size >= num_tokens),
            next(size for size in self._seqs if size >= num_seqs),
        )

    def chunks(self) -> list[StepShape]:
        """All of them, those that need most memory first."""
        return [
            _chunks(num_tokens, num_seqs)
            for num_tokens in reversed(self._tokens)
            for smaller, num_seqs in reversed([*pairwise([0, *self._seqs])])
            if smaller < num_tokens - 1  # more sequences than tokens there cannot be
        ]

    def decodes(self) -> list[StepShape]:
        """All of them, those that need most memory first."""
        return [StepShape.of_decodes(size) for size in reversed(self._decodes)]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Few, and none much larger than its steps; ascending."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def _chunks(num_tokens: int, num_seqs: int) -> StepShape:
    """With a sequence more, for the rows that pad the step."""
    return StepShape(num_tokens, num_seqs + 1, num_seqs)
