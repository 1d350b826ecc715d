"""Drives a device step one step ahead of its results, by a plan of who is computed when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.batch import ScheduledSequence
from server.engine.device_step.assemble import StepMaker
from server.engine.device_step.backend import DeviceBackend
from server.engine.device_step.queue import DeviceQueue
from server.engine.device_step.step import PendingTokens
from server.engine.inputs import ModelInputs, build_inputs
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.kv_cache.tensors import KVTensors
from server.engine.memory import PoolLimits
from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel
from server.engine.sampling.arrays import sampling_arrays
from server.engine.sequence import Sequence as EngineSequence
from tests.device_step.static_backend import Sample, StaticBackend, sample
from tests.parity.harness import CONFIGS, checkpoint, load_model

UNKNOWN = 10**6
"""Stands for a token that only the device knows; no vocabulary has it."""


@dataclass(eq=False)
class Driver:
    """At most one step is under way when another is launched. Sequences are computed as the caller says."""

    model: GemmaModel
    """Of a `DeviceBackend`."""
    num_blocks: int = 200
    records: bool = True
    _pending: tuple[PendingTokens, list[EngineSequence]] | None = None

    def __post_init__(self) -> None:
        limits = self.limits = PoolLimits(
            block_size=4, max_model_len=64, max_num_seqs=9, max_num_batched_tokens=64
        )
        groups = self.model.config.kv_groups()
        counts = [self.num_blocks] * len(groups)
        self.kv = KVTensors(self.model.backend, groups, counts, limits.block_size)
        self.manager = KVCacheManager(groups, counts, limits.block_size, False, limits.max_num_batched_tokens)
        assert isinstance(self.model.backend, DeviceBackend)
        self.step = StepMaker(self.model.backend, (), limits, records=self.records).make(self.model, self.kv)
        self.results: dict[str, list[int]] = {}

    def launch(self, plan: Iterable[tuple[EngineSequence, int]]) -> None:
        """Computes so many tokens of each, and takes the step before in."""
        previous = [] if self._pending is None else self._pending[1]
        scheduled, inputs = self.plan(plan)
        last_rows = inputs.attention[0].query_start[1:] - 1
        for row, one in zip(last_rows.tolist(), scheduled, strict=True):
            if inputs.token_ids[row] == UNKNOWN:
                inputs.previous_rows[row] = previous.index(one.seq)
        sampling = [one.seq for one in scheduled if one.samples]
        pending = self.step.launch(inputs, sampling_arrays(scheduled))
        for one in scheduled:
            one.seq.num_computed += one.num_new
        self.take()
        for one in scheduled:
            self.manager.commit(one.seq)
        for seq in sampling:
            seq.token_ids.append(UNKNOWN)
        self._pending = pending, sampling

    def compute(self, plan: Iterable[tuple[EngineSequence, int]]) -> None:
        """Computes so many tokens of each, greedily, with the tokens chosen by the host."""
        self.take()
        scheduled, inputs = self.plan(plan)
        sampling = [one.seq for one in scheduled if one.samples]
        logits = self.model.compute_logits(self.step.hidden(inputs))
        for seq, token in zip(sampling, logits.argmax(dim=1).tolist(), strict=True):
            seq.token_ids.append(token)
        for one in scheduled:
            one.seq.num_computed += one.num_new
            self.manager.commit(one.seq)

    def plan(self, plan: Iterable[tuple[EngineSequence, int]]) -> tuple[list[ScheduledSequence], ModelInputs]:
        """Takes the blocks for a step."""
        scheduled = []
        for seq, num_new in plan:
            assert self.manager.allocate(seq, 0, num_new)
            samples = seq.num_computed + num_new == seq.num_tokens
            scheduled.append(ScheduledSequence(seq, seq.num_computed, num_new, samples))
        return scheduled, build_inputs(scheduled, [], self.kv.num_groups, self.limits.block_size)

    def take(self) -> None:
        """Waits for the step that is under way."""
        if self._pending is not None:
            pending, seqs = self._pending
            self._pending = None
            for seq, token in zip(seqs, pending.wait(), strict=True):
                seq.token_ids[seq.token_ids.index(UNKNOWN)] = token

    def finish(self, seq: EngineSequence) -> list[int]:
        """What the sequence has generated; it leaves, with the token that is not known yet."""
        self.take()
        self.manager.free(seq)
        return seq.token_ids[seq.num_prompt_tokens :]


def static_model(name: str, queue: DeviceQueue, sample: Sample = sample, device: str = "cpu") -> GemmaModel:
    return load_model(read_hf(CONFIGS[name]), StaticBackend(queue, sample, device), checkpoint(name))
