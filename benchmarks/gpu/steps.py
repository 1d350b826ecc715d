"""Step times of one model in one engine: `EngineCore` with the back end and the runner that serve requests.

    python -m benchmarks.gpu.steps --model 2b --folder .cache/gpu --device cuda --options '{}' --seconds 120

prints a line of JSON for each figure as soon as it is known, so that a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.models import SHAPES, make_model
from benchmarks.gpu.plan import FULL, TINY, Plan
from benchmarks.gpu.profile import busy_seconds
from server.engine.build import StartError, build_engine
from server.engine.core import EngineCore
from server.engine.types import EngineConfig, EngineInfo, GenerateRequest, SamplingParams, StepStats

Row = dict[str, Any]


class Driver:
    """Has an engine compute steps of a wanted kind. What it holds is gone after each of its calls."""

    def __init__(self, core: EngineCore, info: EngineInfo, seed: int = 0) -> None:
        self._core = core
        self._info = info
        self._random = np.random.default_rng(seed)
        self._num_requests = 0
        self.prefill_rate = 0.0
        """Prompt tokens a second, as last measured."""

    def capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return min(self._info.num_blocks.values()) * self._info.block_size

    def prefill(self, num_tokens: int, repeats: int) -> float:
        """Median seconds from a prompt of so many tokens to its first token."""
        seconds = []
        for _ in range(repeats + 1):  # the first pays for what is compiled at first use
            self._add(num_tokens, 1)
            started = time.perf_counter()
            self._drain()
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds[1:])
        self.prefill_rate = num_tokens / median
        return median

    def decode(self, batch: int, context: int, num_steps: int, num_profiled: int) -> Row:
        """Times of steps of `batch` decodes with at least `context` tokens each, of which the last
        `num_profiled` run under a profiler for the device's own time.
        """
        lengths = {self._add(context, self._info.max_model_len - context): context for _ in range(batch)}
        started = time.perf_counter()
        while min(lengths.values()) == context:
            self._step(lengths)
        filled = time.perf_counter() - started
        for _ in range(3):  # the first step of a size is the one that is recorded
            self._step(lengths)
        contexts = [length + num_steps // 2 for length in lengths.values()]
        started = time.perf_counter()
        stats = [self._step(lengths) for _ in range(num_steps)]
        seconds = (time.perf_counter() - started) / num_steps
        if any(one.num_decode_tokens != batch for one in stats):
            raise RuntimeError(f"a step of {batch} decodes had others: is the KV cache too small?")
        host = statistics.fmean(one.step_seconds - one.wait_seconds for one in stats)
        busy = None
        if num_profiled and self._info.device == "cuda":
            busy = busy_seconds(lambda: self._step(lengths), num_profiled)
        self._core.abort(lengths)
        self._drain()
        return {
            "seconds": seconds,
            "host_seconds": host,
            "wait_seconds": statistics.fmean(one.wait_seconds for one in stats),
            "busy_seconds": busy,
            "contexts": contexts,
            "fill_seconds": filled,
        }

    def _add(self, num_tokens: int, max_tokens: int) -> str:
        self._num_requests += 1
        prompt = self._random.integers(5, self._info.vocab_size, num_tokens).tolist()
        params = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        request_id = str(self._num_requests)
        self._core.add(GenerateRequest(request_id=request_id, prompt_token_ids=prompt, params=params))
        return request_id

    def _step(self, lengths: dict[str, int]) -> StepStats:
        taken = self._core.step()
        for output in taken.outputs:
            if output.error is not None:
                raise RuntimeError(f"a sequence failed: {output.error}")
            lengths[output.request_id] += len(output.token_ids)
        return taken.stats

    def _drain(self) -> None:
        while self._core.has_work():
            for output in self._core.step().outputs:
                if output.error is not None:
                    raise RuntimeError(f"a sequence failed: {output.error}")


def measure(model: Path, options: dict[str, Any], plan: Plan, device: str, deadline: float) -> Iterator[Row]:
    """Rows of the kinds start, prefill, decode, skipped and refused. deadline: by `time.monotonic`."""
    unknown = [name for name in options if name not in EngineConfig.__struct_fields__]
    if unknown:
        yield {"kind": "refused", "reason": f"the server has no option --{unknown[0].replace('_', '-')}"}
        return
    config = EngineConfig(
        model_path=str(model),
        device=device,
        max_num_seqs=max(plan.batches),
        # A prompt takes half of a step at most.
        max_num_batched_tokens=max(2 * max(plan.chunks), *plan.batches),
        # Prompts are only there to fill the cache: as large a piece as a step holds, whatever it costs streams.
        prefill_stretch=1000.0,
        enable_prefix_caching=False,
        speculative_ngram_tokens=0,
        kv_cache_memory_bytes=plan.kv_cache_bytes,
        weight_cache=False,
        **options,
    )
    started = time.perf_counter()
    try:
        core, info = build_engine(config, lambda *_: None)
    except StartError as error:
        yield {"kind": "refused", "reason": str(error)}
        return
    tokens_held = (min(info.num_blocks.values()) + 1) * info.block_size
    yield {
        "kind": "start",
        "backend": info.backend,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "weight_bytes": info.weight_bytes,
        "kv_bytes_per_token": info.kv_cache_bytes / tokens_held,
        "kv_capacity_tokens": tokens_held - info.block_size,
        "start_seconds": time.perf_counter() - started,
    }
    driver = Driver(core, info)
    for chunk in plan.chunks:
        yield {"kind": "prefill", "tokens": chunk, "seconds": driver.prefill(chunk, plan.repeats)}
    for batch, context in plan.points():
        row: Row = {"batch": batch, "context": context}
        expected = batch * context / driver.prefill_rate + 2.0
        if (reason := _reason_to_skip(driver, plan, batch, context, deadline - expected)) is not None:
            yield {"kind": "skipped", **row, "reason": reason}
            continue
        num_profiled = plan.num_profiled if batch in plan.profiled_batches and context == plan.context else 0
        yield {"kind": "decode", **row, **driver.decode(batch, context, plan.num_steps, num_profiled)}


def _reason_to_skip(driver: Driver, plan: Plan, batch: int, context: int, latest: float) -> str | None:
    """latest: when the row would have to begin."""
    # While the last prompts are computed, the first sequences grow by a token a step.
    grown = batch * context // max(*plan.chunks, *plan.batches) + plan.num_steps + plan.num_profiled + 8
    needed, capacity = batch * (context + grown), driver.capacity()
    if needed > capacity:
        return f"needs {needed} tokens of KV cache, and there are {capacity}"
    return None if time.monotonic() < latest else "no time left"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where models are made")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--options", type=json.loads, default={}, help="of the engine, as JSON")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no row is begun")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    directory = make_model(arguments.folder, arguments.model, arguments.device)
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    plan = TINY if arguments.tiny else FULL
    for row in measure(directory, arguments.options, plan, arguments.device, deadline):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
