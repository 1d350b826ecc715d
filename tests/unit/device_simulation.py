"""A device without arithmetic, which computes behind the host's back and trusts nothing but what it was handed.

`launch` takes a copy of the step's arrays and then fills the originals with garbage, as they are the host's
again. The step is computed some time between that and `wait`, in the order of launching. As in
`engine_simulation`, an entry of the KV cache says what it is, so that a read of a stale, foreign or uncomputed
slot fails at once. A block that a sequence has lost must not be written by it again.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from server.engine.batch import ScheduledBatch
from server.engine.inputs import ModelInputs, build_inputs, missing_prompt_rows
from server.engine.kv_cache.manager import KVCacheManager
from server.engine.models.config import KVGroupSpec
from server.engine.sampling.constraints import TokenConstraints
from server.engine.sampling.types import SampledToken
from server.engine.types import PromptTokenLogprob, SamplingParams, TokenLogprob
from tests.unit.engine_simulation import VOCAB_SIZE, fingerprints, next_token

Entry = tuple[int, int, int]
"""Position, fingerprint of the tokens before it, fingerprint of all up to it."""
Writer = tuple[str, int, int]
"""Request id, number of preemptions, and which block of the sequence it is."""
Fault = Callable[[ScheduledBatch], Exception | None]
GARBAGE = 2**30
NAN = "NaN"


@dataclass
class Launched:
    device: SimulatedDevice
    batch: ScheduledBatch
    """For the checks and for the host's part of a step that is not plain; the device does not look at it."""
    inputs: ModelInputs
    num_generated: list[int]
    """Of each row that samples."""
    writers: list[tuple[str, int]]
    """Whose each row is: request id and number of preemptions."""
    behind: Launched | None
    """The one that was in flight when it was launched."""
    error: Exception | None
    sampled: list[int] = field(default_factory=list)
    results: list[SampledToken] | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> list[SampledToken]:
        return self.device.wait(self)

    @property
    def is_garbage(self) -> bool:
        return self.error is not None or (self.behind is not None and self.behind.is_garbage)


class SimulatedDevice:
    def __init__(self, groups: Sequence[KVGroupSpec], num_blocks: Sequence[int], block_size: int) -> None:
        self._windows = [group.window for group in groups]
        self._block_size = block_size
        self._slots: list[list[Entry | None]] = [[None] * ((count + 1) * block_size) for count in num_blocks]
        self._past_writers: list[list[list[Writer]]] = [[[] for _ in range(count + 1)] for count in num_blocks]
        self._constraints = TokenConstraints(32)
        self._pending: list[Launched] = []
        """Not computed yet, in order."""
        self._last: Launched | None = None
        """Launched last, if it has not been waited for."""
        self.bad_rows: set[str] = set()
        """Request ids whose logits come out as NaN; the tokens then are none, and -1 for the next step."""
        self.is_eager: Callable[[], bool] = lambda: False
        """Whether what was launched is computed at once; if not, when it is waited for."""
        self.fault_in_launch: Fault = lambda batch: None
        self.fault_in_step: Fault = lambda batch: None
        self.num_launched_ahead = 0
        self.tracks_writers = True
        self.broken: list[Exception] = []
        """Checks that failed."""

    # --- the host's side ----------------------------------------------------------------------------------

    def launch(self, batch: ScheduledBatch) -> Launched:
        if (error := self.fault_in_launch(batch)) is not None:
            raise error
        prompt_rows = [rows for one in batch.sequences if (rows := missing_prompt_rows(one)) is not None]
        inputs = build_inputs(batch.sequences, prompt_rows, len(self._windows), self._block_size)
        if not batch.is_plain:
            assert self._last is None, "a step that needs the host came behind one in flight"
        if self._last is None:
            assert (inputs.previous_rows == -1).all(), "there are no tokens to take"
        else:
            assert self._last.batch.is_plain, "the host had a part in the tokens of the step in front"
            self.num_launched_ahead += 1
        step = Launched(
            self,
            batch,
            _copied(inputs),
            [one.num_generated + count for one in batch.sequences for count in range(one.num_sampled)],
            [
                (one.seq.request_id, one.seq.num_preemptions)
                for one in batch.sequences
                for _ in range(one.num_new)
            ],
            self._last,
            self.fault_in_step(batch),
        )
        _spoil(inputs)
        self._last = step
        self._enqueue(step)
        return step

    @property
    def has_one_in_flight(self) -> bool:
        return self._last is not None

    def wait(self, step: Launched) -> list[SampledToken]:
        self._compute_until(step)
        if self._last is step:
            self._last = None
        step.behind = None
        if step.error is not None:
            raise step.error
        if step.batch.is_plain:
            return [
                SampledToken(token) if token >= 0 else SampledToken(-1, error=NAN) for token in step.sampled
            ]
        assert step.results is not None
        return step.results

    def _enqueue(self, step: Launched) -> None:
        self._pending.append(step)
        if self.is_eager():
            self._compute_until(step)

    def _compute_until(self, step: Launched) -> None:
        while not step.done.is_set():
            self._compute(self._pending.pop(0))

    # --- the device's side --------------------------------------------------------------------------------

    def _compute(self, step: Launched) -> None:
        try:
            self._compute_checked(step)
        except Exception as error:  # the engine would take it for a step that failed
            self.broken.append(error)
        step.done.set()

    def _compute_checked(self, step: Launched) -> None:
        inputs, is_garbage = step.inputs, step.is_garbage
        previous = step.behind.sampled if step.behind is not None else []
        tokens = [
            token if row < 0 else previous[row]
            for token, row in zip(inputs.token_ids.tolist(), inputs.previous_rows.tolist(), strict=True)
        ]
        prints: list[int] = []
        for row, (token, position) in enumerate(zip(tokens, inputs.positions.tolist(), strict=True)):
            is_first = row in inputs.attention[0].query_start
            before = self._fingerprint_before(step, row, position) if is_first else prints[-1]
            prints.append(hash(("garbage" if is_garbage else before, token)))
            for group, attention in enumerate(inputs.attention):
                slot = int(attention.slot_mapping[row])
                self._note_writer(
                    group, slot // self._block_size, (*step.writers[row], position // self._block_size)
                )
                self._slots[group][slot] = (position, before, prints[-1])
        if not is_garbage:
            self._check_reads(step)
        outputs = [prints[row] for row in inputs.output_rows.tolist()[: len(step.num_generated)]]
        step.sampled = [
            next_token(hash((value, count))) for value, count in zip(outputs, step.num_generated, strict=True)
        ]
        owners = [step.writers[row][0] for row in inputs.output_rows.tolist()[: len(step.num_generated)]]
        step.sampled = [
            -1 if owner in self.bad_rows else token for owner, token in zip(owners, step.sampled, strict=True)
        ]
        if not step.batch.is_plain and not is_garbage:
            step.results = self._sample_on_host(step)

    def _fingerprint_before(self, step: Launched, row: int, position: int) -> int:
        if position == 0:
            return 0
        sequence = int(np.searchsorted(step.inputs.attention[0].query_start, row, side="right")) - 1
        entry = self._slots[0][self._slot(step, 0, sequence, position - 1)]
        assert step.is_garbage or entry is not None
        return 0 if entry is None else entry[2]

    def _slot(self, step: Launched, group: int, sequence: int, position: int) -> int:
        block = int(step.inputs.attention[group].block_table[sequence, position // self._block_size])
        assert block != 0, f"position {position} is in the null block"
        return block * self._block_size + position % self._block_size

    def _note_writer(self, group: int, block: int, writer: Writer) -> None:
        past = self._past_writers[group][block]
        if self.tracks_writers and (not past or past[-1] != writer):
            assert writer not in past, f"{writer} writes to a block that it has lost to {past[-1]}"
            past.append(writer)

    def _check_reads(self, step: Launched) -> None:
        for group, (window, attention) in enumerate(zip(self._windows, step.inputs.attention, strict=True)):
            for sequence, end in enumerate(attention.seq_lens.tolist()):
                start = int(step.inputs.positions[attention.query_start[sequence]])
                first = 0 if window is None else max(0, start - window + 1)
                before = None
                for position in range(first, end):
                    entry = self._slots[group][self._slot(step, group, sequence, position)]
                    assert entry is not None, "an entry that nobody wrote"
                    assert entry[0] == position, "another position's entry"
                    assert before in (None, entry[1]), "another text's entry"
                    before = entry[2]

    def _sample_on_host(self, step: Launched) -> list[SampledToken]:
        masks, row, results = self._constraints.masks(step.batch.sequences), 0, []
        for scheduled in step.batch.sequences:
            if missing_prompt_rows(scheduled) is not None:
                end = min(scheduled.start + scheduled.num_new, scheduled.seq.num_prompt_tokens)
                for position in range(scheduled.start, end):
                    known = PromptTokenLogprob(scheduled.seq.token_ids[position], -float(position), [], rank=1)
                    scheduled.seq.prompt_logprobs.append(known if position else None)
            for count in range(scheduled.num_sampled):
                known_ids = [*scheduled.seq.token_ids, *scheduled.draft[:count]]
                num_generated = len(known_ids) - scheduled.seq.num_prompt_tokens
                token = adjusted(scheduled.seq.params, known_ids, num_generated, step.sampled[row])
                if row in masks:
                    allowed = [token_id for token_id in range(32) if masks[row][0] >> token_id & 1]
                    token = token if token in allowed else allowed[token % len(allowed)]
                logprob = None
                if scheduled.seq.params.logprobs is not None:
                    logprob = TokenLogprob(token, -float(step.sampled[row]), [])
                results.append(SampledToken(token, logprob))
                row += 1
        return self._constraints.take(step.batch.sequences, results) if masks else results

    # --- checks -------------------------------------------------------------------------------------------

    def check_published(self, kv: KVCacheManager) -> None:
        """Whatever the prefix cache can find is what it is said to be."""
        for group, pool in enumerate(kv._pools):
            for block in pool._published.values():
                prefix, contents = pool.prefix_of(block), []
                while prefix.parent is not None:
                    contents.append(np.frombuffer(prefix.content, dtype=np.int32).tolist())
                    prefix = prefix.parent
                prints = fingerprints(itertools.chain.from_iterable(reversed(contents)))
                first = len(prints) - self._block_size
                for offset in range(self._block_size):
                    entry = self._slots[group][block * self._block_size + offset]
                    assert entry is not None
                    assert (entry[0], entry[2]) == (first + offset, prints[first + offset]), "a wrong entry"


class ThreadedDevice(SimulatedDevice):
    """The same with a thread of its own and a delay before each step."""

    def __init__(
        self,
        groups: Sequence[KVGroupSpec],
        num_blocks: Sequence[int],
        block_size: int,
        delay: Callable[[], float],
    ) -> None:
        super().__init__(groups, num_blocks, block_size)
        self._delay = delay
        self._stream: queue.SimpleQueue[Launched | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stream.put(None)
        self._thread.join()

    def _enqueue(self, step: Launched) -> None:
        self._stream.put(step)

    def _compute_until(self, step: Launched) -> None:
        assert step.done.wait(10)

    def _run(self) -> None:
        while (step := self._stream.get()) is not None:
            time.sleep(self._delay())
            self._compute(step)


def adjusted(params: SamplingParams, known_ids: list[int], num_generated: int, token: int) -> int:
    """What the host makes of the model's wish, after a look at the tokens so far."""
    if params.presence_penalty and num_generated and token == known_ids[-1]:
        token = (token + 1) % VOCAB_SIZE
    if num_generated < params.min_tokens:
        while token in params.stop_token_ids:
            token = (token + 1) % VOCAB_SIZE
    return token


def _copied(inputs: ModelInputs) -> ModelInputs:
    arrays = {one.name: getattr(inputs, one.name).copy() for one in fields(inputs) if one.name != "attention"}
    attention = tuple(
        replace(
            one,
            query_start=one.query_start.copy(),
            seq_lens=one.seq_lens.copy(),
            block_table=one.block_table.copy(),
            slot_mapping=one.slot_mapping.copy(),
        )
        for one in inputs.attention
    )
    return ModelInputs(**arrays, attention=attention)


def _spoil(inputs: ModelInputs) -> None:
    for one in fields(inputs):
        if one.name != "attention":
            getattr(inputs, one.name).fill(GARBAGE)
    for attention in inputs.attention:
        for array in (
            attention.query_start,
            attention.seq_lens,
            attention.block_table,
            attention.slot_mapping,
        ):
            array.fill(GARBAGE)
