"""`make bench-quality`: what number formats cost in quality, on the embedded Gemma 3 270M.

Each format computes the same text, and goes on from the same 20 beginnings, in an engine of its own:

- perplexity: e to the mean of -log p(token), over all tokens of the text but the first;
- same first choice: the share of the text's tokens at which the likeliest token is the one that bf16 finds;
- same beginning: of 32 tokens, each the likeliest, how many equal bf16's before the first that does not.

fp32 shows how much of the difference is the rounding of bf16 itself. The text (quality_text.txt) is chapter 4
of Lewis Carroll, Alice's Adventures in Wonderland, 1865, from Project Gutenberg, and is in the public domain.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from server import embedded_model
from server.cache_directory import cache_directory
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.types import EngineConfig, GenerateRequest, SamplingParams, SequenceOutput
from server.gguf_tokenizer import tokenizer_for_gguf
from server.tokenizer import Tokenizer

TEXT = Path(__file__).parent / "quality_text.txt"
CONTINUED_TOKENS = 32
BEGINNINGS = (
    "The history of the bicycle begins",
    "To make a simple tomato soup, first",
    "Water boils at a lower temperature on a mountain because",
    "def is_prime(n):\n    ",
    "The main difference between a crocodile and an alligator is",
    "In the year 1815, the volcano",
    "Dear neighbours,\n\nI am writing to tell you that",
    "A triangle with sides 3, 4 and 5",
    "The old lighthouse keeper climbed the stairs and",
    "Photosynthesis is the process by which",
    "SELECT customer_id, SUM(amount)\nFROM orders\nWHERE",
    "Les quatre saisons de l'année sont",
    "Der Bodensee liegt",
    "My three favourite books are:\n1.",
    "Question: Why is the sky blue?\nAnswer:",
    "The stock market closed lower on Friday after",
    '{"city": "Lisbon", "country": "Portugal", "population":',
    "She opened the letter, read it twice, and",
    "The quick brown fox",
    "import numpy as np\n\nx = np.linspace(",
)


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    dtype: str
    quantization: str
    backend: str = "auto"


BASELINE = Format("bf16", "bfloat16", "none")
FORMATS = (
    BASELINE,
    Format("fp32", "float32", "none"),
    Format("int8 weights, bf16", "bfloat16", "int8"),
    Format("fp8 weights and activations, bf16", "bfloat16", "fp8", "reference"),
    Format("int4 weights, bf16", "bfloat16", "int4", "reference"),
)


@dataclass(frozen=True, slots=True)
class Quality:
    """What one format made of the text and of the beginnings."""

    weight_bytes: int
    logprobs: list[float]
    first_choices: list[int]
    """The likeliest token at each place of the text."""
    continuations: list[list[int]]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def same_first_choices(self, other: Quality) -> float:
        same = sum(a == b for a, b in zip(self.first_choices, other.first_choices, strict=True))
        return same / len(self.first_choices)

    def same_beginnings(self, other: Quality) -> list[int]:
        """For each continuation, how many tokens are the same before the first that is not."""
        return [_common(*pair) for pair in zip(self.continuations, other.continuations, strict=True)]


def measure(model: Path, number_format: Format, text: list[int], beginnings: list[list[int]]) -> Quality:
    """text and beginnings: token ids."""
    config = EngineConfig(
        model_path=str(model),
        dtype=number_format.dtype,
        quantization=number_format.quantization,
        backend=number_format.backend,
        device="cpu",
        max_model_len=len(text) + 1,
        weight_cache=False,
    )
    core, info = build_engine(config, lambda *_: None)
    [scored] = _finish(core, [_greedy("text", text, max_tokens=1, prompt_logprobs=1)])
    tokens = [token for token in scored.prompt_logprobs or [] if token is not None]
    requests = [_greedy(str(index), ids, max_tokens=CONTINUED_TOKENS) for index, ids in enumerate(beginnings)]
    return Quality(
        weight_bytes=info.weight_bytes,
        logprobs=[token.logprob for token in tokens],
        first_choices=[token.top[0][0] for token in tokens],
        continuations=[output.token_ids for output in _finish(core, requests)],
    )


def format_quality(rows: list[tuple[Format, Quality]]) -> str:
    """A Markdown table; the first row is what the others are compared with."""
    _, baseline = rows[0]
    lines = [
        "| format | weights, MiB | perplexity | same first choice | same beginning, mean of "
        f"{CONTINUED_TOKENS} | all {CONTINUED_TOKENS} the same |",
        "|---|---|---|---|---|---|",
    ]
    for number_format, quality in rows:
        same = quality.same_beginnings(baseline)
        lines.append(
            f"| {number_format.name} | {quality.weight_bytes / 2**20:.0f} | {quality.perplexity:.3f} "
            f"| {quality.same_first_choices(baseline):.2%} | {sum(same) / len(same):.1f} "
            f"| {sum(n == CONTINUED_TOKENS for n in same)} of {len(same)} |"
        )
    return "\n".join(lines)


def _greedy(
    request_id: str, token_ids: list[int], max_tokens: int, prompt_logprobs: int | None = None
) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, prompt_logprobs=prompt_logprobs)
    return GenerateRequest(request_id=request_id, prompt_token_ids=token_ids, params=params)


def _finish(core: EngineCore, requests: list[GenerateRequest]) -> list[SequenceOutput]:
    """One output for each request, with all of its tokens."""
    collected: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work():
        for output in core.step().outputs:
            if output.error is not None:
                raise RuntimeError(f"the engine gave up on {output.request_id!r}: {output.error}")
            collected[output.request_id].append(output)
    return [
        SequenceOutput(
            request_id=request_id,
            token_ids=[token for output in outputs for token in output.token_ids],
            prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        )
        for request_id, outputs in collected.items()
    ]


def _common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(first))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--max-tokens", type=int, help="tokens of the text to compute; all, if not given")
    arguments = parser.parse_args()
    model = embedded_model.locate()
    tokenizer = Tokenizer.from_file(tokenizer_for_gguf(model, cache_directory()))
    text = tokenizer.encode_prompt(TEXT.read_text(encoding="utf-8"))[: arguments.max_tokens]
    beginnings = [tokenizer.encode_prompt(beginning) for beginning in BEGINNINGS]
    rows = [(each, measure(model, each, text, beginnings)) for each in FORMATS]
    print(f"{model.name}, {len(text)} tokens of text, {len(beginnings)} beginnings\n")
    print(format_quality(rows))


if __name__ == "__main__":
    main()
