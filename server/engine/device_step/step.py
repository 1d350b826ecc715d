"""The whole step on the device: from packed inputs to sampled tokens, without a word to the host in between.

One step:

    host      build_inputs ── pack ──┐ one copy                                   ┌── wait ── token ids
    device                           └─ embed ── layers ── logits ── sample ──────┘ one copy
                                          └──────── tokens of the step before

Laws:

- The tensors that a step reads and writes stay where they are, so that it can be recorded and replayed.
- Steps are padded to one of a few shapes. The first step of a shape runs as it is and is recorded behind that;
  later ones are replays. Those that are too large for that run as they are, on the same buffer; so do, padded,
  those for whose recording there was no memory.
- The sampled tokens of two steps are kept: a step reads the other half of them than it writes. Run twice, it
  does the same.
- A pinned buffer is written again only when its copy is done, and a step is launched only when the one before
  the last has been waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.device_step.inputs import DeviceInputs, StepArrays
from server.engine.device_step.layout import StepLayout, StepShape
from server.engine.device_step.queue import DeviceQueue, Mark
from server.engine.device_step.sizes import RecordedShapes
from server.engine.dtype import DType
from server.engine.inputs import Int32Array, ModelInputs, null_inputs
from server.engine.memory import PoolLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """What a step computes, in torch operations whose shapes follow from those of their inputs alone."""

    forward: Callable[[DeviceInputs], Tensor]
    """Stores the step's keys and values. Returns the normalised hidden states of all rows, [T, hidden]."""
    logits: Callable[[Tensor], Tensor]
    """[R, hidden] -> [R, vocabulary] of any floating dtype"""
    sample: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """Logits, which may be overwritten, and the sampler's arrays -> ids [R]; negative where there is none."""
    sampling: Mapping[str, np.dtype[Any]]
    """Name and type of each of those arrays; zeros are a row that is cheap to sample."""
    hidden_size: int
    dtype: DType
    """Of the hidden states."""


class PendingTokens:
    """The sampled tokens of a step that may not be done yet."""

    def __init__(self, tokens: Tensor, mark: Mark) -> None:
        self._tokens = tokens
        self._mark = mark

    def wait(self) -> list[int]:
        """An id for each output row, in order; negative where none could be sampled."""
        self._mark.wait()
        token_ids: list[int] = self._tokens.tolist()
        return token_ids


class DeviceStep:
    """Launches steps on one queue. Not thread-safe."""

    def __init__(
        self,
        queue: DeviceQueue,
        model: DeviceModel,
        limits: PoolLimits,
        num_groups: int,
        *,
        records: bool = True,
    ) -> None:
        """records: whether steps are padded and recorded; else all of them run as they are."""
        self._queue = queue
        self._model = model
        self._limits = limits
        self._num_groups = num_groups
        self._records = records
        self.shapes = RecordedShapes(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._recorded: dict[tuple[StepShape, bool], _Recorded] = {}
        """By shape and by whether they sample, those that were asked for."""
        num_tokens, num_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        num_words = self._layout(StepShape(num_tokens, num_seqs + 1, num_tokens), model.sampling).num_words
        self._inputs = queue.persistent((num_words,), torch.int32)
        self._staging = [_Staging(queue.pinned(num_words)) for _ in range(2)]
        self._hidden = queue.persistent((num_seqs, model.hidden_size), getattr(torch, model.dtype))
        """Of decodes that do not sample."""
        self._sampled = queue.persistent((2, num_seqs), torch.int32)
        self._taken = [queue.pinned(num_seqs) for _ in range(2)]
        self._half = 0
        """Which of each two the next step writes."""

    def launch(self, inputs: ModelInputs, sampling: Mapping[str, npt.NDArray[Any]]) -> PendingTokens:
        """Enqueues a step all of whose output rows sample; `inputs.previous_rows` are of the last one launched.

        sampling: the arrays of `DeviceModel.sampling`, each [R].
        """
        shape = StepShape.of(inputs)
        padded = self._padded(shape)
        if padded is None:
            return self._launch_unrecorded(inputs, sampling)
        recorded = self._upload_recorded(padded, inputs, sampling)
        recorded.enqueue(self._queue)
        pending = self._take(shape.num_output_rows)
        recorded.record(self._queue)
        return pending

    def hidden(self, inputs: ModelInputs) -> Tensor:
        """Runs a step whose tokens are chosen elsewhere, and all of whose token ids the host knows.

        Returns the hidden states of its output rows, [R, hidden], until the next step.
        """
        shape = StepShape.of(inputs)
        padded = self._padded(shape) if shape.is_decodes else None
        if padded is None:
            arrays = self._upload_unrecorded(self._layout(shape, {}), inputs, {})
            return self._queue.result(partial(self._forward, arrays))
        recorded = self._upload_recorded(padded, inputs, None)
        recorded.enqueue(self._queue)
        recorded.record(self._queue)
        return self._queue.result(lambda: self._hidden[: shape.num_seqs])

    # --- steps for their costs alone ------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Records the shape that needs most memory, in which all others find room, and those at the other ends,
        so that all kernels are compiled. Without recordings it runs them for their kernels alone."""
        for shapes in (self.shapes.chunks(), self.shapes.decodes()):
            for shape in (shapes[0], shapes[-1]):
                self.record(shape)

    def record(self, shape: StepShape) -> None:
        """Runs a step of one of `shapes`, to its end, in the null block, and records it if steps are."""
        num_seqs = shape.num_seqs if shape.is_decodes else min(shape.num_output_rows, shape.num_tokens - 1)
        inputs, sampling = self._null_step(shape.num_tokens, num_seqs)
        self.launch(inputs, sampling).wait()

    def run_largest(self) -> None:
        """Runs the largest step that there may be, to its end, in the null block, and does not record it."""
        inputs, sampling = self._null_step(self._limits.max_num_batched_tokens, self._limits.max_num_seqs)
        self._launch_unrecorded(inputs, sampling).wait()

    def _null_step(self, num_tokens: int, num_seqs: int) -> tuple[ModelInputs, dict[str, npt.NDArray[Any]]]:
        """So many tokens of so many sequences, as long as they may be and evenly, all of which sample."""
        counts = np.full(num_seqs, num_tokens // num_seqs, dtype=np.int32)
        counts[: num_tokens % num_seqs] += 1
        lengths = np.full_like(counts, self._limits.max_model_len)
        counts = np.minimum(counts, lengths)
        inputs = null_inputs(counts, lengths, self._num_groups, self._limits.block_size)
        return inputs, {name: np.zeros(num_seqs, dtype) for name, dtype in self._model.sampling.items()}

    def _padded(self, shape: StepShape) -> StepShape | None:
        """The shape that is recorded for steps of this one, if there is one."""
        if not self._records:
            return None
        if shape.is_decodes:
            return self.shapes.decodes_of(shape.num_seqs)
        return self.shapes.chunks_of(shape.num_tokens, shape.num_seqs)

    # --- packing --------------------------------------------------------------------------------------------

    def _layout(self, shape: StepShape, sampling: Mapping[str, np.dtype[Any]]) -> StepLayout:
        max_blocks = -(-self._limits.max_model_len // self._limits.block_size)
        return StepLayout(shape, self._num_groups, max_blocks, sampling)

    def _launch_unrecorded(
        self, inputs: ModelInputs, sampling: Mapping[str, npt.NDArray[Any]]
    ) -> PendingTokens:
        shape = StepShape.of(inputs)
        arrays = self._upload_unrecorded(self._layout(shape, self._model.sampling), inputs, sampling)
        self._queue.run(partial(self._sample, arrays))
        return self._take(shape.num_output_rows)

    def _upload_unrecorded(
        self, layout: StepLayout, inputs: ModelInputs, sampling: Mapping[str, npt.NDArray[Any]]
    ) -> StepArrays:
        metadata = inputs.attention[0]
        max_query_len, max_seq_len = int(np.diff(metadata.query_start).max()), int(metadata.seq_lens.max())
        self._upload(layout, inputs, sampling)
        return StepArrays.of(self._inputs, layout, self._limits.block_size, max_query_len, max_seq_len)

    def _upload_recorded(
        self, shape: StepShape, inputs: ModelInputs, sampling: Mapping[str, npt.NDArray[Any]] | None
    ) -> _Recorded:
        """shape: of what is run. sampling: None if the step does not sample."""
        samples = sampling is not None
        recorded = self._recorded.get((shape, samples))
        if recorded is None:
            layout = self._layout(shape, self._model.sampling if samples else {})
            limits = self._limits
            max_query_len = 1 if shape.is_decodes else shape.num_tokens
            arrays = StepArrays.of(self._inputs, layout, limits.block_size, max_query_len, limits.max_model_len)
            work = partial(self._sample if samples else self._keep_hidden, arrays)
            recorded = self._recorded[shape, samples] = _Recorded(layout, work)
        self._upload(recorded.layout, inputs, sampling or {})
        return recorded

    def _upload(
        self, layout: StepLayout, inputs: ModelInputs, sampling: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        staging = self._staging[self._half]
        if staging.copied is not None:
            staging.copied.wait()
        slots = self._sampled.shape[1]
        num_words = layout.pack(staging.words, inputs, sampling, (1 - self._half) * slots, self._half * slots)
        self._queue.copy(self._inputs[:num_words], staging.pinned[:num_words])
        staging.copied = self._queue.mark()

    def _take(self, num_tokens: int) -> PendingTokens:
        """Enqueues the copy of the tokens to the host, and turns to the other halves."""
        tokens = self._taken[self._half][:num_tokens]
        if num_tokens > 0:
            self._queue.copy(tokens, self._sampled[self._half, :num_tokens])
        self._half = 1 - self._half
        return PendingTokens(tokens, self._queue.mark())

    # --- in the queue ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _sample(self, arrays: StepArrays) -> None:
        hidden = self._forward(arrays)
        if len(hidden) > 0:
            token_ids = self._model.sample(self._model.logits(hidden), arrays.sampling)
            self._sampled.view(-1).index_copy_(0, arrays.sampled_slots.long(), token_ids.int())

    @torch.inference_mode()
    def _keep_hidden(self, arrays: StepArrays) -> None:
        self._hidden[: len(arrays.output_rows)].copy_(self._forward(arrays))

    @torch.inference_mode()
    def _forward(self, arrays: StepArrays) -> Tensor:
        hidden = self._model.forward(arrays.with_tokens_of(self._sampled.view(-1)))
        return hidden.index_select(0, arrays.output_rows)


@dataclass(slots=True)
class _Staging:
    """A step's arrays on their way to the device."""

    pinned: Tensor
    copied: Mark | None = None
    """Until then the buffer is the device's."""

    @property
    def words(self) -> Int32Array:
        words: Int32Array = self.pinned.numpy()
        return words


@dataclass(slots=True)
class _Recorded:
    """Steps of one shape."""

    layout: StepLayout
    work: Callable[[], None]
    replay: Callable[[], None] | None = None
    """Once recorded."""
    has_no_room: bool = False
    """Whether there was no memory for a recording."""

    def enqueue(self, queue: DeviceQueue) -> None:
        if self.replay is None:
            queue.run(self.work)
        else:
            self.replay()

    def record(self, queue: DeviceQueue) -> None:
        """Once it has run, so that all that an operation does when it is first called has been done."""
        if self.replay is not None or self.has_no_room:
            return
        try:
            self.replay = queue.record(self.work)
        except torch.OutOfMemoryError:
            self.has_no_room = True
            logger.warning(
                "no device memory is left to record steps of %d tokens and %d sequences, which run unrecorded "
                "from now on, and slower: lower --gpu-memory-utilization or --kv-cache-memory-bytes",
                self.layout.shape.num_tokens,
                self.layout.shape.num_seqs,
            )
