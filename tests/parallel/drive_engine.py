"""Runs an engine of so many ranks over a few requests and prints what came of them: a program for `test_ranks`.

python -m tests.parallel.drive_engine MODEL RANKS QUANTIZATION [wait]

With `wait`, it prints the number of the other rank's process and computes until something fails.
"""

from __future__ import annotations

import json
import sys
import time

import psutil

from server.engine.build import build_engine
from server.engine.types import EngineConfig, GenerateRequest, SamplingParams


def main() -> None:
    path, num_ranks, quantization = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    config = EngineConfig(
        model_path=path,
        device="cpu",
        backend="auto" if num_ranks > 1 else "reference",
        dtype="float32",
        quantization=quantization,
        num_threads=1,
        tensor_parallel_size=num_ranks,
        max_model_len=128,
        max_num_seqs=3,
        max_num_batched_tokens=16,  # so that prompts come in chunks
        num_blocks_override=12,  # so that sequences are preempted
        block_size=4,
    )
    core, _ = build_engine(config, lambda *_: None)
    if sys.argv[4:] == ["wait"]:
        (other,) = psutil.Process().children()
        print(other.pid, flush=True)
        other.wait()
        time.sleep(0.1)
    prompts = [[(3 + 7 * place + length) % 67 for place in range(length)] for length in (19, 3, 30, 1, 9)]
    for index, token_ids in enumerate(prompts):
        params = SamplingParams(
            max_tokens=12,
            seed=index,
            temperature=0.8 * (index % 2),
            prompt_logprobs=0 if index == 0 else None,
        )
        core.add(GenerateRequest(request_id=f"r{index}", prompt_token_ids=token_ids, params=params))
    tokens: dict[str, list[int]] = {f"r{index}": [] for index in range(len(prompts))}
    logprobs: list[float] = []
    num_preemptions = 0
    while core.has_work():
        step = core.step()
        num_preemptions += step.stats.num_preemptions
        for output in step.outputs:
            assert output.error is None
            tokens[output.request_id] += output.token_ids
            if output.prompt_logprobs:
                logprobs = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
    assert num_preemptions > 0
    print(json.dumps({"tokens": tokens, "logprobs": logprobs, "prompt": prompts[0]}))


if __name__ == "__main__":
    main()
