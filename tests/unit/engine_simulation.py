"""A model without arithmetic whose KV entries say what they are, so that every read can be checked.

`execute` writes one entry for each token it computes into the slot that the block tables name, and reads back
all that attention would read. An entry is (position, fingerprint of all tokens up to it, salt), so a read of a
stale, foreign, uncomputed or released slot fails at once. The next token depends on the history alone: whatever
the scheduler did, and whatever was guessed, the outputs must equal those of `generate_alone`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.batching import Scheduler, SchedulerConfig
from server.engine.batch import ScheduledBatch
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.models.config import KVGroupSpec
from server.engine.sampling.types import SampledToken
from server.engine.sequence import Sequence as EngineSequence
from server.engine.sequence import SequenceStatus
from server.engine.speculation import NgramSpeculator
from server.engine.types import (
    FinishReason,
    GenerateRequest,
    PromptTokenLogprob,
    SamplingParams,
    SequenceOutput,
)

VOCAB_SIZE = 7
Entry = tuple[int, int, str]


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 4,
    cache_salt: str = "",
    priority: int = 0,
    tenant: str = "",
    **params: object,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, seed=0, **params),  # type: ignore[arg-type]
        cache_salt=cache_salt,
        priority=priority,
        tenant=tenant,
    )


def make_sequence(request_id: str, prompt: Sequence[int], **fields: object) -> EngineSequence:
    return EngineSequence.from_request(make_request(request_id, prompt, **fields))  # type: ignore[arg-type]


def groups_of(*windows: int | None) -> list[KVGroupSpec]:
    """One KV group for each window, None for full attention."""
    return [
        KVGroupSpec("full" if window is None else "sliding", window, (layer,), num_kv_heads=1, head_dim=1)
        for layer, window in enumerate(windows)
    ]


def fingerprints(token_ids: Iterable[int]) -> list[int]:
    """For each position, a number that stands for all tokens up to it."""
    prints, last = [], 0
    for token_id in token_ids:
        last = hash((last, token_id))
        prints.append(last)
    return prints


def next_token(fingerprint: int) -> int:
    return (fingerprint >> 7) % VOCAB_SIZE


def generate_alone(request: GenerateRequest, max_sequence_tokens: int) -> tuple[list[int], FinishReason]:
    """What the request generates with the machine to itself."""
    fingerprint, params = fingerprints(request.prompt_token_ids)[-1], request.params
    generated: list[int] = []
    while True:
        generated.append(next_token(fingerprint))
        fingerprint = hash((fingerprint, generated[-1]))
        if generated[-1] in params.stop_token_ids and len(generated) >= params.min_tokens:
            return generated, FinishReason.STOP
        if len(generated) >= min(params.max_tokens, max_sequence_tokens - len(request.prompt_token_ids)):
            return generated, FinishReason.LENGTH


class HalfKnowing(NgramSpeculator):
    """Knows how each sequence goes on, and is wrong from one of the tokens on, or from none."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(max_tokens)
        self.known: set[EngineSequence] = set()
        self.next_guess: tuple[int, ...] = ()
        """Given in place of the next one, if there is room for it."""

    def propose(self, seq: EngineSequence, limit: int) -> tuple[int, ...]:
        self.known.add(seq)
        if self.next_guess:
            guess, self.next_guess = self.next_guess[: max(0, limit)], ()
            return guess
        fingerprint = fingerprints(seq.token_ids)[-1]
        num_right = (fingerprint >> 20) % (limit + 1) if limit > 0 else 0
        draft: list[int] = []
        while len(draft) < limit:
            error = 0 if len(draft) < num_right else 1
            draft.append((next_token(fingerprint) + error) % VOCAB_SIZE)
            fingerprint = hash((fingerprint, draft[-1]))
        return tuple(draft)

    def record(self, seq: EngineSequence, num_drafted: int, num_accepted: int) -> None:
        assert seq in self.known
        assert 0 <= num_accepted <= num_drafted > 0

    def forget(self, seq: EngineSequence) -> None:
        self.known.discard(seq)


class HostRunner:
    """A runner on the host, which computes a step when it is waited for."""

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        raise NotImplementedError

    def launch(self, batch: ScheduledBatch) -> HostStep:
        return HostStep(self, batch)


@dataclass(frozen=True)
class HostStep:
    runner: HostRunner
    batch: ScheduledBatch

    def wait(self) -> list[SampledToken]:
        return self.runner.execute(self.batch)


class SimulatedModel(HostRunner):
    """The storage behind the block tables, and the checks of every access to it."""

    def __init__(self, groups: Sequence[KVGroupSpec], num_blocks: Sequence[int], block_size: int) -> None:
        self._windows = [group.window for group in groups]
        self._block_size = block_size
        self._slots: list[list[Entry | None]] = [[None] * ((count + 1) * block_size) for count in num_blocks]
        self.bad_rows: set[str] = set()
        """Request ids whose logits come out as NaN."""

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        entries = {
            scheduled.seq: self._entries(scheduled.seq.followed_by(scheduled.draft))
            for scheduled in batch.sequences
        }
        for scheduled in batch.sequences:
            for position in range(scheduled.start, scheduled.start + scheduled.num_new):
                for group in range(len(self._windows)):
                    slot = self._slot(scheduled.seq, group, position)
                    self._slots[group][slot] = entries[scheduled.seq][position]
        sampled = []
        for scheduled in batch.sequences:
            seq, end = scheduled.seq, scheduled.start + scheduled.num_new
            for group, window in enumerate(self._windows):
                first = 0 if window is None else max(0, scheduled.start - window + 1)
                read = [self._slots[group][self._slot(seq, group, position)] for position in range(first, end)]
                assert read == entries[seq][first:end], (
                    f"{seq.request_id} reads foreign entries in group {group}"
                )
            if seq.params.prompt_logprobs is not None and not seq.num_generated:
                for position in range(scheduled.start, min(end, seq.num_prompt_tokens)):
                    known = PromptTokenLogprob(seq.token_ids[position], -float(position), [], rank=1)
                    seq.prompt_logprobs.append(known if position else None)
            assert scheduled.samples == (end == seq.num_tokens + len(scheduled.draft))
            for _, fingerprint, _ in entries[seq][end - scheduled.num_sampled : end]:
                if seq.request_id in self.bad_rows:
                    sampled.append(SampledToken(token_id=-1, error="NaN"))
                else:
                    sampled.append(SampledToken(token_id=next_token(fingerprint)))
        return sampled

    def _entries(self, seq: EngineSequence) -> list[Entry]:
        prints = fingerprints(seq.token_ids)
        return [(position, value, seq.request.cache_salt) for position, value in enumerate(prints)]

    def _slot(self, seq: EngineSequence, group: int, position: int) -> int:
        block = seq.block_tables[group][position // self._block_size]
        assert block != 0, f"{seq.request_id} needs position {position}, which is in the null block"
        return block * self._block_size + position % self._block_size


@dataclass
class Engine:
    """Scheduler, KV cache and simulated model, with all checks after every step."""

    config: SchedulerConfig
    kv: KVCacheManager
    model: SimulatedModel
    speculator: HalfKnowing
    scheduler: Scheduler
    outputs: dict[str, list[SequenceOutput]]
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    max_prefill_tokens: int = sys.maxsize

    def add(self, request: GenerateRequest) -> EngineSequence:
        seq = EngineSequence.from_request(request)
        self.scheduler.add(seq)
        return seq

    def step(self, during: Callable[[], object] = lambda: None) -> ScheduledBatch:
        """One step; `during` runs between the forward pass and `update`."""
        running = [seq for seq in self.scheduler.sequences if seq.block_tables]
        decodes = [seq for seq in running if seq.num_tokens - seq.num_computed == 1]
        batch = self.scheduler.schedule(self.max_prefill_tokens)
        self.kv.check(self.scheduler.sequences)
        planned = [scheduled.seq for scheduled in batch.sequences]
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len(set(planned)) == len(planned)
        for scheduled in batch.sequences:
            num_known = scheduled.num_new - len(scheduled.draft)
            assert 0 < num_known <= self.config.long_prefill_threshold
        if batch.num_draft_tokens:
            assert batch.num_tokens <= 1 + self.speculator.max_tokens
            assert not batch.preempted, "one had to leave for a guess"
        for seq in decodes:
            assert seq in planned or seq.status is not SequenceStatus.RUNNING, "a decode was left out"
        assert not batch.preempted or set(planned) <= set(running), (
            "one was admitted while another had to leave"
        )
        assert batch.sequences or not self.scheduler.sequences, "a step without progress"
        sampled = self.model.execute(batch)
        during()
        for output in self.scheduler.update(batch, sampled):
            self.outputs.setdefault(output.request_id, []).append(output)
        self.kv.check(self.scheduler.sequences)
        for seq in self.scheduler.sequences:
            num_blocks = -(-seq.num_computed // self.kv.block_size)
            assert all(len(table) == num_blocks for table in seq.block_tables), "a wrong guess keeps blocks"
        counts = self.scheduler.take_counts()
        assert counts.num_preemptions == len(batch.preempted)
        self.num_preemptions += counts.num_preemptions
        self.num_cached_tokens += counts.prefix_cache_hits
        self.num_draft_tokens += counts.num_draft_tokens
        self.num_accepted_tokens += counts.num_accepted_tokens
        return batch

    def run(self) -> None:
        while self.scheduler.has_work():
            self.step()
        assert set(self.kv.usage().values()) == {0.0}, "blocks leaked"
        assert not self.speculator.known, "sequences that have ended are remembered"

    def generated(self, request_id: str) -> list[int]:
        return [token_id for output in self.outputs[request_id] for token_id in output.token_ids]

    def finish_reason(self, request_id: str) -> FinishReason | None:
        *earlier, last = self.outputs[request_id]
        assert all(output.finish_reason is None for output in earlier)
        return last.finish_reason


def make_engine(
    windows: Sequence[int | None] = (None,),
    num_blocks: Sequence[int] = (64,),
    block_size: int = 4,
    enable_prefix_caching: bool = True,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 1000,
    long_prefill_threshold: int = 16,
    max_draft_tokens: int = 0,
) -> Engine:
    groups = groups_of(*windows)
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len, long_prefill_threshold)
    kv = KVCacheManager(groups, num_blocks, block_size, enable_prefix_caching, max_num_batched_tokens)
    model = SimulatedModel(groups, num_blocks, block_size)
    ticks = itertools.count(1)
    speculator = HalfKnowing(max_draft_tokens)
    scheduler = Scheduler(config, kv, speculator, clock=lambda: float(next(ticks)))
    return Engine(config, kv, model, speculator, scheduler, outputs={})
