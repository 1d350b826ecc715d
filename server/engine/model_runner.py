"""Runs scheduled batches: the only part of a step that touches the device.

Laws:

- A batch's KV blocks are allocated before it comes here, and its sequences are not changed here but for
  `prompt_logprobs`, which grow.
- Logits exist only for rows that sample or that a prompt's logprobs need, the latter a slice at a time: a row
  of a 256k vocabulary is 1 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from server.engine.backend.base import TokenSampler
from server.engine.batch import ScheduledBatch, ScheduledSequence
from server.engine.faults import PendingStep
from server.engine.inputs import ModelInputs, PromptRows, build_inputs, missing_prompt_rows, null_inputs
from server.engine.kv_cache.tensors import KVTensors
from server.engine.models.gemma import GemmaModel
from server.engine.sampling.arrays import sampled_tokens, sampling_arrays
from server.engine.sampling.constraints import TokenConstraints
from server.engine.sampling.types import SampledToken
from server.engine.sequence import Sequence as EngineSequence

if TYPE_CHECKING:
    from server.engine.device_step.step import DeviceStep, PendingTokens

_PROMPT_ROWS_AT_ONCE = 32
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _HostStep:
    runner: ModelRunner
    batch: ScheduledBatch

    def wait(self) -> list[SampledToken]:
        return self.runner.execute(self.batch)


@dataclass(frozen=True, slots=True)
class _StepOnDevice:
    tokens: PendingTokens

    def wait(self) -> list[SampledToken]:
        return sampled_tokens(self.tokens.wait())


class ModelRunner:
    def __init__(
        self,
        model: GemmaModel,
        kv: KVTensors,
        sampler: TokenSampler[Any],
        max_num_batched_tokens: int,
        device: DeviceStep | None = None,
    ) -> None:
        """sampler: of the model's back end. max_num_batched_tokens: in one step at most. device: what computes
        steps behind the host, if it can."""
        self._model = model
        self._kv = kv
        self._sampler = sampler
        self._constraints = TokenConstraints(model.config.vocab_size)
        self._device = device
        self.can_run_ahead = device is not None
        """Whether a step is computed beside the host, so that the next can be launched meanwhile."""
        self._forward: Callable[[ModelInputs], Any] = (
            model.capture(kv.by_layer, max(max_num_batched_tokens, 1 + _WARM_UP_TOKENS))
            if device is None
            else device.hidden
        )

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """See `Runner.launch`. What needs the host is computed when it is waited for."""
        if self._device is None or not batch.is_plain:
            return _HostStep(self, batch)
        inputs = build_inputs(batch.sequences, [], self._kv.num_groups, self._kv.block_size)
        return _StepOnDevice(self._device.launch(inputs, sampling_arrays(batch.sequences)))

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Computes the batch's tokens. `num_sampled` results for each sequence, in the batch's order.

        Nothing is in flight in front of it, so that the host knows all tokens.
        """
        prompt_rows = [
            rows for scheduled in batch.sequences if (rows := missing_prompt_rows(scheduled)) is not None
        ]
        inputs = build_inputs(batch.sequences, prompt_rows, self._kv.num_groups, self._kv.block_size)
        hidden = self._forward(inputs)
        sampling = [seq for scheduled in batch.sequences for seq in _sampling_states(scheduled)]
        self._append_prompt_logprobs(hidden[len(sampling) :], prompt_rows)
        if not sampling:
            return []
        masks = self._constraints.masks(batch.sequences)
        sampled = self._sampler.sample(self._model.compute_logits(hidden[: len(sampling)]), sampling, masks)
        # It would index the embedding in the next step.
        assert all(token.token_id < self._model.config.vocab_size for token in sampled)
        return self._constraints.take(batch.sequences, sampled) if masks else sampled

    def warm_up(self) -> None:
        """Computes one small batch in the null block, so that no request pays for first-use costs."""
        counts = np.array([1, _WARM_UP_TOKENS], dtype=np.int32)
        inputs = null_inputs(counts, counts, self._kv.num_groups, self._kv.block_size)
        self._model.compute_logits(self._forward(inputs))
        if self._device is not None:
            self._device.warm_up()

    def _append_prompt_logprobs(self, hidden: Any, prompt_rows: Sequence[PromptRows]) -> None:
        """hidden: the rows of all of prompt_rows, in order."""
        first_row = 0
        for rows in prompt_rows:
            seq = rows.scheduled.seq
            if not seq.prompt_logprobs:
                seq.prompt_logprobs.append(None)
            num_top = seq.params.prompt_logprobs or 0
            for offset in range(0, rows.count, _PROMPT_ROWS_AT_ONCE):
                count = min(_PROMPT_ROWS_AT_ONCE, rows.count - offset)
                logits = self._model.compute_logits(hidden[first_row + offset : first_row + offset + count])
                first_token = rows.first_position + offset + 1
                chosen = seq.token_ids[first_token : first_token + count]
                seq.prompt_logprobs += self._sampler.gather_logprobs(logits, chosen, [num_top] * count)
            first_row += rows.count


def _sampling_states(scheduled: ScheduledSequence) -> Iterator[EngineSequence]:
    """The sequence as it is at each row that samples, were the draft to come true."""
    if scheduled.samples:
        yield scheduled.seq
        for count in range(1, len(scheduled.draft) + 1):
            yield scheduled.seq.followed_by(scheduled.draft[:count])
