"""The loads that every engine gets. Each scenario turns one running server into figures and raw reports.

Laws:
1. A scenario sends the same prompts to every engine, and no two scenarios share a prompt: a prefix cache helps
   only where that is the point.
2. Nothing is dropped in silence: failed requests are in the reports; a figure that could not be had is None.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import httpx

from benchmarks.load import LoadSettings, StreamRecorder, request_body, run_load, send_request
from benchmarks.peers.variants import INTERFERENCE, MIXED, PREFILL, PREFIX, SAMPLING, SCALING, STANDARD
from benchmarks.stats import Report, RequestRecord, percentile
from benchmarks.words import make_prompts, single_token_words


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long a run is. Token counts include `<bos>`."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    concurrency: tuple[int, ...] = (1, 8, 32)
    long_prompt_tokens: int = 1024
    long_prompts: int = 5
    prefix_tokens: int = 512
    stream_tokens: int = 192
    """Of each of the 8 streams that long prompts disturb; the first quarter is undisturbed."""
    disturbances: int = 6
    scaling_concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    context_steps: int = 32
    """Decode steps from which a context's step time is taken."""
    budget: float = 25.0
    """Seconds after which a run starts no more requests; each of those at a time still gets its first."""


SMALL_SIZES = Sizes()
LARGE_SIZES = Sizes(output_tokens=16, concurrency=(1, 8), long_prompts=3)
"""For the large checkpoint, whose steps take a second on a small machine."""


@dataclass(slots=True)
class Outcome:
    """What one scenario found."""

    figures: dict[str, float | None]
    """By name, with the unit at its end: `c8.tokens_per_s`, `prefill.ms`."""
    reports: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Target:
    """A running server, and how hard to load it."""

    url: str
    model: str
    sizes: Sizes


async def run_scenario(name: str, target: Target) -> Outcome:
    return await _SCENARIOS[name](target)


async def _standard(target: Target) -> Outcome:
    outcome = Outcome({})
    for concurrency in target.sizes.concurrency:
        await _load(outcome, f"c{concurrency}", target, concurrency, seed=100 + concurrency)
    return outcome


async def _sampling(target: Target) -> Outcome:
    return await _most(target, "sampling", seed=200, temperature=1.0, top_p=0.95)


async def _mixed(target: Target) -> Outcome:
    """Every fourth request has penalties, which need its whole history, and logprobs, which need all logits."""
    demanding = {"presence_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 5}
    return await _most(target, "mixed", seed=300, fields=(demanding, {}, {}, {}))


async def _prefix(target: Target) -> Outcome:
    sizes = target.sizes
    outcome = Outcome({})
    lengths = {"prompt_tokens": sizes.prefix_tokens + sizes.prompt_tokens, "shared_prefix": sizes.prefix_tokens}
    await _load(outcome, "prefix", target, 8, seed=400, **lengths)
    return outcome


async def _prefill(target: Target) -> Outcome:
    sizes = target.sizes
    outcome = Outcome({})
    lengths = {"prompt_tokens": sizes.long_prompt_tokens, "output_tokens": 1, "requests": sizes.long_prompts}
    report = await _load(outcome, "prefill", target, 1, seed=500, budget=None, **lengths)
    outcome.figures = {"prefill.ms": report.ttft_ms.p50}
    return outcome


async def _most(target: Target, name: str, **settings: Any) -> Outcome:
    """At the highest concurrency of the standard run, whose throughput it is compared with."""
    outcome = Outcome({})
    await _load(outcome, name, target, max(target.sizes.concurrency), **settings)
    return outcome


async def _load(outcome: Outcome, name: str, target: Target, concurrency: int, **settings: Any) -> Report:
    """One closed loop of two rounds (four alone) within the budget; its figures begin with `name`."""
    chosen = {
        "requests": max(4, 2 * concurrency),
        "prompt_tokens": target.sizes.prompt_tokens,
        "output_tokens": target.sizes.output_tokens,
        "budget": target.sizes.budget,
        **settings,
    }
    report = await run_load(LoadSettings(url=target.url, model=target.model, concurrency=concurrency, **chosen))
    outcome.reports.append(asdict(report))
    outcome.figures |= {
        f"{name}.tokens_per_s": report.output_tokens_per_second if report.requests else None,
        f"{name}.ttft_ms": report.ttft_ms.p50,
        f"{name}.itl_ms": report.inter_token_ms.p50,
        f"{name}.errors": report.errors,
    }
    return report


async def _scaling(target: Target) -> Outcome:
    outcome = Outcome({})
    for concurrency in target.sizes.scaling_concurrency:
        await _load(outcome, f"scaling.c{concurrency}", target, concurrency, seed=1000 + concurrency)
    for context in target.sizes.contexts:
        lengths = {"prompt_tokens": context, "output_tokens": target.sizes.context_steps + 1}
        once = {"requests": 1, "warmup": 0}
        await _load(outcome, f"context.{context}", target, 1, seed=2000 + context, **lengths, **once)
    return outcome


async def _interference(target: Target) -> Outcome:
    """8 streams; once each has a quarter of its tokens, long prompts arrive one after another."""
    sizes = target.sizes
    streaming = LoadSettings(
        url=target.url, model=target.model, concurrency=8, output_tokens=sizes.stream_tokens
    )
    arriving = LoadSettings(url=target.url, model=target.model, concurrency=1, output_tokens=1)
    async with httpx.AsyncClient(
        base_url=target.url, timeout=streaming.timeout, trust_env=False, limits=httpx.Limits()
    ) as client:
        words = await single_token_words(client, target.model)
        prompts = make_prompts(words, 8, sizes.prompt_tokens, seed=600)
        long_prompts = make_prompts(words, sizes.disturbances, sizes.long_prompt_tokens, seed=601)
        recorders = [StreamRecorder() for _ in prompts]
        streams = [
            asyncio.create_task(
                send_request(client, "completions", request_body(streaming, prompt, 0), recorder)
            )
            for prompt, recorder in zip(prompts, recorders, strict=True)
        ]
        quarter = sizes.stream_tokens // 4
        disturbances: list[RequestRecord] = []
        while min(recorder.num_tokens for recorder in recorders) < quarter and not _any_done(streams):
            await asyncio.wait(streams, timeout=0.005)
        for prompt in long_prompts:
            if _any_done(streams):
                break
            body = request_body(arriving, prompt, 0)
            disturbances.append(await send_request(client, "completions", body, StreamRecorder()))
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return interference_figures([recorder.record(0.0, 0.0) for recorder in recorders], disturbances)


def interference_figures(streams: Sequence[RequestRecord], disturbances: Sequence[RequestRecord]) -> Outcome:
    """Inter-token latency of the streams before the first disturbance, and while disturbances last.

    Counted from the moment at which every stream had begun; the streams themselves were cut off.
    """
    if not disturbances or not all(stream.chunk_times for stream in streams):
        return Outcome({"interference.undisturbed_ms": None, "interference.p99_ms": None})
    all_started = max(stream.chunk_times[0] for stream in streams)
    first, last = disturbances[0].sent_at, max(record.finished_at for record in disturbances)
    before: list[float] = []
    during: list[float] = []
    for stream in streams:
        for (begin, end), tokens in zip(pairwise(stream.chunk_times), stream.chunk_tokens[1:], strict=True):
            gaps = [1000 * (end - begin) / tokens] * tokens
            if all_started <= begin and end <= first:
                before += gaps
            elif first < end <= last:
                during += gaps
    errors = [record.error for record in disturbances if record.error is not None]
    figures: dict[str, float | None] = {
        "interference.undisturbed_ms": median(before) if before else None,
        "interference.p99_ms": percentile(sorted(during), 99) if during else None,
        "interference.prompts": len(disturbances),
        "interference.errors": len(errors),
    }
    return Outcome(figures, [{"before_ms": before, "during_ms": during, "first_errors": errors[:3]}])


def _any_done(tasks: Iterable[asyncio.Task[RequestRecord]]) -> bool:
    return any(task.done() for task in tasks)


_SCENARIOS: dict[str, Callable[[Target], Awaitable[Outcome]]] = {
    STANDARD: _standard,
    PREFILL: _prefill,
    PREFIX: _prefix,
    SAMPLING: _sampling,
    MIXED: _mixed,
    INTERFERENCE: _interference,
    SCALING: _scaling,
}
