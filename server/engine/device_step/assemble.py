"""Puts a device's steps together, and finds out what they take of its memory before the KV pools are sized."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from server.engine.device_step.queue import DeviceQueue
from server.engine.device_step.step import DeviceModel, DeviceStep
from server.engine.kv_cache.tensors import KVTensors
from server.engine.memory import MIB, OutOfMemoryError, PoolLimits
from server.engine.models.gemma import GemmaModel
from server.engine.sampling.arrays import SAMPLING_ARRAYS

if TYPE_CHECKING:
    from server.engine.device_step.backend import DeviceBackend

logger = logging.getLogger(__name__)


class StepMaker:
    """Makes the steps of one model on one device."""

    def __init__(
        self,
        backend: DeviceBackend,
        suppress_token_ids: tuple[int, ...],
        limits: PoolLimits,
        *,
        records: bool = True,
    ) -> None:
        """To be made before the weights are loaded, for the measure of what they take.

        records: whether steps are recorded.
        """
        self._backend = backend
        self._suppress_token_ids = suppress_token_ids
        self._limits = limits
        self._records = records
        self._at_start = backend.queue().memory()

    def make(self, model: GemmaModel, kv: KVTensors) -> DeviceStep:
        return self._make(self._backend.queue(), model, kv)

    def measure(self, model: GemmaModel) -> MemoryUse:
        """Runs the largest steps, and records them if steps are, to see what they take.

        Raises OutOfMemoryError.

        The recordings share memory, in which the largest one's tensors leave room for all others'. So the
        largest is counted in full, and each other one as much as the second largest adds to it.
        """
        try:
            use = self._measure(model)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            raise OutOfMemoryError(
                f"a step of {self._limits.max_num_batched_tokens} tokens and {self._limits.max_num_seqs} "
                f"sequences does not fit: lower --max-num-batched-tokens or --max-num-seqs ({error})"
            ) from error
        logger.info(
            "device memory: weights %d MiB, the largest step %d, recorded steps %d, other %d",
            *(size // MIB for size in (use.weights, use.step, use.recordings, use.other)),
        )
        return use

    def _make(self, queue: DeviceQueue, model: GemmaModel, kv: KVTensors) -> DeviceStep:
        device_model = DeviceModel(
            forward=model.decoder(kv.by_layer),
            logits=model.compute_logits,
            sample=self._backend.device_sampler(model.config.vocab_size, self._suppress_token_ids),
            sampling=SAMPLING_ARRAYS,
            hidden_size=model.config.hidden_size,
            dtype=model.backend.dtype,
        )
        return DeviceStep(queue, device_model, self._limits, kv.num_groups, records=self._records)

    def _measure(self, model: GemmaModel) -> MemoryUse:
        groups = model.config.kv_groups()
        queue = self._backend.queue()  # of its own: its recordings end with it
        kv = KVTensors(model.backend, groups, [1] * len(groups), self._limits.block_size)
        before = queue.memory()
        step = self._make(queue, model, kv)
        step.run_largest()
        after_largest = queue.memory()
        recordings = _measure_recordings(step, queue, after_largest.free) if self._records else 0
        del step
        end = queue.memory()
        start = self._at_start
        return MemoryUse(
            weights=before.allocated - start.allocated,
            step=after_largest.peak - before.allocated,
            recordings=recordings,
            other=max(0, start.free - end.free - (end.allocated - start.allocated)),
        )


def _measure_recordings(step: DeviceStep, queue: DeviceQueue, free_bytes: int) -> int:
    """Records the largest steps. Returns the bytes that all recordings take of those that are free before."""
    free = [free_bytes]
    chunks, decodes = step.shapes.chunks(), step.shapes.decodes()
    for shape in [*chunks, *decodes][:2]:
        step.record(shape)
        free.append(queue.memory().free)
    taken = [max(0, earlier - later) for earlier, later in pairwise(free)]
    num_others = len(chunks) + 2 * len(decodes) - 1  # decodes are recorded with and without sampling
    return taken[0] + sum(taken[1:]) * num_others


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What of a device's memory is not the KV pools'. Bytes."""

    weights: int
    step: int
    """The largest step's tensors, beside weights and pools."""
    recordings: int
    """All recorded steps'."""
    other: int
    """What the process has taken besides: kernels, the allocator's gaps."""

    @property
    def total(self) -> int:
        return self.weights + self.step + self.recordings + self.other
