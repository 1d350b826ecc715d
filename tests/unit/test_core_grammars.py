"""Sequences with grammars in the engine: they wait for the compiler and hold nobody up, and whatever happens to
them afterwards, their text is that of a sequence that was alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from server.engine.batch import ScheduledBatch
from server.engine.core import EngineCore
from server.engine.grammar import compiler as compiler_module
from server.engine.grammar.compiler import GrammarCompiler
from server.engine.grammar.state import GrammarState
from server.engine.pacing import PrefillPacer
from server.engine.sampling.constraints import TokenConstraints
from server.engine.sampling.types import SampledToken
from server.engine.types import FinishReason, GenerateRequest, SequenceOutput
from server.grammar_library import GrammarError, Matcher, Vocabulary
from tests.unit.engine_simulation import (
    VOCAB_SIZE,
    Engine,
    HostRunner,
    fingerprints,
    make_engine,
    make_request,
    next_token,
)
from tests.unit.grammars import EOS, LANGUAGES, VOCABULARY_MESSAGE, make_vocabulary, text_of

REGEX = LANGUAGES["regex"]


class Constrained(HostRunner):
    """The simulated model with a sampler that keeps to the masks."""

    def __init__(self, engine: Engine) -> None:
        self._model = engine.model
        self._constraints = TokenConstraints(32)

    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        masks = self._constraints.masks(batch.sequences)
        sampled = self._model.execute(batch)
        for row, mask in masks.items():
            allowed = [token_id for token_id in range(32) if mask[0] >> token_id & 1]
            sampled[row] = SampledToken(_choose(sampled[row].token_id, allowed))
        return self._constraints.take(batch.sequences, sampled) if masks else sampled


def _choose(wanted: int, allowed: list[int]) -> int:
    """Guesses are of what the model wants, so some are right."""
    return wanted if wanted in allowed else allowed[wanted % len(allowed)]


def generate_alone(request: GenerateRequest, compiled: Matcher) -> tuple[list[int], FinishReason]:
    state = GrammarState(compiled, request.params.stop_token_ids)
    token_ids = list(request.prompt_token_ids)
    while True:
        row = np.zeros(1, dtype=np.uint32)
        state.fill_masks((), [row])
        allowed = [token_id for token_id in range(32) if row[0] >> token_id & 1]
        token_ids.append(_choose(next_token(fingerprints(token_ids)[-1]), allowed))
        generated = token_ids[len(request.prompt_token_ids) :]
        if generated[-1] in request.params.stop_token_ids or state.move_over(generated[-1]):
            return generated, FinishReason.STOP
        if len(generated) == request.params.max_tokens:
            return generated, FinishReason.LENGTH


@pytest.mark.covers("K02")
@pytest.mark.parametrize("max_draft_tokens", [0, 1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_preemption_and_guesses_change_no_text(seed: int, max_draft_tokens: int) -> None:
    engine = make_engine(
        num_blocks=[14], max_num_seqs=6, max_num_batched_tokens=12, max_draft_tokens=max_draft_tokens
    )
    engine.model = Constrained(engine)  # type: ignore[assignment]  # a stand-in
    vocabulary = make_vocabulary()
    compiled = {name: vocabulary.compile(language.grammar) for name, language in LANGUAGES.items()}
    chance = random.Random(seed)
    requests, aborted = {}, set()
    for number in range(80):
        name = chance.choice([*LANGUAGES, "open", "open", None])
        request = requests[str(number)] = make_request(
            str(number),
            [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 20))],
            chance.randrange(1, 25),
            grammar=name,  # which stands for the grammar
            stop_token_ids=chance.choice([(EOS,), ()]) if name != "choices" else (EOS,),
        )
        seq = engine.add(request)
        seq.compiled_grammar = None if name is None else compiled[name]
        for _ in range(chance.randrange(5)):
            engine.step()
        if chance.random() < 0.1:
            victim = str(chance.randrange(number + 1))
            aborted |= {victim} if engine.scheduler.abort(victim) else set()
    engine.run()
    for request_id, request in requests.items():
        if request_id in aborted or request.params.grammar is None:
            continue
        expected, reason = generate_alone(request, compiled[request.params.grammar])
        assert engine.generated(request_id) == expected
        assert engine.finish_reason(request_id) is reason
        language, text = LANGUAGES[request.params.grammar], text_of([t for t in expected if t != EOS])
        assert reason is FinishReason.LENGTH or len(text) > language.longest or text in language.texts
        last = engine.outputs[request_id][-1]
        assert last.stop_token_id == (EOS if expected[-1] == EOS else None)
    assert engine.num_preemptions > 5
    assert engine.num_accepted_tokens > 20 or max_draft_tokens < 5  # with fewer, a step seldom has room


# --- compiling -----------------------------------------------------------------------------------------------


class Gate:
    """Holds the compiler's thread at each grammar."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.woken = threading.Event()
        self.num_compiled = 0
        compile_now = Vocabulary.compile

        def compile_later(vocabulary: Vocabulary, grammar: str) -> Matcher:
            assert self.opened.wait(10)
            self.num_compiled += 1
            return compile_now(vocabulary, grammar)

        patch.setattr(Vocabulary, "compile", compile_later)

    def open_and_wait(self, core: EngineCore) -> None:
        """Until the core has something to do."""
        self.opened.set()
        assert self.woken.wait(10)
        self.woken.clear()
        assert core.has_work()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def make_core(gate: Gate, *, with_vocabulary: bool = True) -> EngineCore:
    engine = make_engine()
    core = EngineCore(
        engine.scheduler,
        PrefillPacer(100.0, 16),
        Constrained(engine),
        GrammarCompiler(gate.woken.set),
    )
    if with_vocabulary:
        core.set_vocabulary(VOCABULARY_MESSAGE)
    return core


def run(core: EngineCore) -> dict[str, SequenceOutput]:
    """The last outputs, by request id."""
    last: dict[str, SequenceOutput] = {}
    while core.has_work():
        last |= {output.request_id: output for output in core.step().outputs}
    return last


def test_others_go_on_while_a_grammar_compiles(gate: Gate) -> None:
    core = make_core(gate)
    core.add(make_request("waits", [1, 2], 9, grammar=REGEX.grammar, stop_token_ids=(EOS,)))
    assert not core.has_work(), "nothing but the compiler has something to do"
    core.add(make_request("goes on", [1, 2], 9))
    step = core.step()
    assert [output.request_id for output in step.outputs] == ["goes on"]
    assert step.stats.num_waiting == 1
    assert set(run(core)) == {"goes on"}
    gate.open_and_wait(core)
    assert run(core)["waits"].finish_reason is not None


@pytest.mark.covers("K04", "K17")
def test_a_sequence_can_leave_while_its_grammar_compiles(gate: Gate) -> None:
    core = make_core(gate)
    core.add(make_request("leaves", [1, 2], 9, grammar=REGEX.grammar))
    core.abort(["leaves"])
    assert run(core)["leaves"].finish_reason is FinishReason.ABORT
    gate.opened.set()
    assert gate.woken.wait(10)
    assert run(core) == {}


def test_a_grammar_is_compiled_once_for_all_that_have_it(gate: Gate) -> None:
    core = make_core(gate)
    for number in range(4):
        core.add(make_request(str(number), [1, 2], 9, grammar=REGEX.grammar, stop_token_ids=(EOS,)))
    gate.open_and_wait(core)
    assert len(run(core)) == 4
    core.add(make_request("later", [1, 2], 9, grammar=REGEX.grammar, stop_token_ids=(EOS,)))
    assert run(core)["later"].finish_reason is not None
    assert gate.num_compiled == 1


@pytest.mark.covers("K04")
@pytest.mark.parametrize("with_vocabulary", [True, False])
def test_what_does_not_compile_ends_its_sequence_alone(gate: Gate, with_vocabulary: bool) -> None:
    core = make_core(gate, with_vocabulary=with_vocabulary)
    core.add(make_request("bad", [1, 2], 9, grammar="start: (" if with_vocabulary else REGEX.grammar))
    core.add(make_request("good", [1, 2], 9))
    if with_vocabulary:
        gate.open_and_wait(core)
    last = run(core)
    assert last["bad"].finish_reason is FinishReason.ERROR
    assert last["bad"].error
    assert last["good"].finish_reason is FinishReason.LENGTH


@pytest.mark.covers("E14")
def test_a_compiler_that_fails_on_one_grammar_goes_on_with_the_next(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, compile_later = make_core(gate), Vocabulary.compile

    def compile_or_fail(vocabulary: Vocabulary, grammar: str) -> Matcher:
        if grammar == "bad":
            raise ZeroDivisionError("a bug")
        return compile_later(vocabulary, grammar)

    monkeypatch.setattr(Vocabulary, "compile", compile_or_fail)
    core.add(make_request("bad", [1, 2], 9, grammar="bad"))
    gate.open_and_wait(core)
    assert run(core)["bad"].finish_reason is FinishReason.ERROR
    core.add(make_request("good", [1, 2], 9, grammar=REGEX.grammar, stop_token_ids=(EOS,)))
    gate.open_and_wait(core)
    assert run(core)["good"].finish_reason is not FinishReason.ERROR


@pytest.mark.covers("R28")
def test_the_compiler_forgets_what_was_asked_for_longest_ago(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_CACHED", 2)
    compiler = GrammarCompiler(gate.woken.set)
    compiler.set_vocabulary(VOCABULARY_MESSAGE)
    gate.opened.set()

    def compiled(grammar: str) -> Matcher | GrammarError:
        while (answer := compiler.compiled(grammar)) is None:
            assert gate.woken.wait(10)
        return answer

    first = compiled('start: "a"')
    compiled('start: "b"')
    assert compiled('start: "a"') is first
    compiled('start: "ab"')
    assert compiled('start: "a"') is first
    assert gate.num_compiled == 3
    compiled('start: "b"')
    assert gate.num_compiled == 4
