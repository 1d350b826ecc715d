"""What is measured, the most telling first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    chunks: tuple[int, ...]
    """Prompt tokens in one step."""
    batches: tuple[int, ...]
    """Decodes in one step, by importance."""
    context: int
    """Tokens of context for which all batches are measured first."""
    other_contexts: tuple[int, ...]
    profiled_batches: tuple[int, ...]
    """For which the device's idle share is measured, with `context` tokens."""
    concurrency: tuple[int, ...]
    """Requests at a time, over HTTP."""
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    """Over which a decode step is timed."""
    num_profiled: int
    repeats: int
    """Prompts whose median is taken."""
    kv_cache_bytes: int | None
    """None: what the card has left."""

    def points(self) -> list[tuple[int, int]]:
        """(batch, context), by importance."""
        return [(batch, context) for context in (self.context, *self.other_contexts) for batch in self.batches]


FULL = Plan(
    chunks=(2048, 1024, 512),
    batches=(1, 32, 256, 8, 128),
    context=1024,
    other_contexts=(128, 4096),
    profiled_batches=(1, 32, 256),
    concurrency=(1, 32, 256),
    prompt_tokens=128,
    output_tokens=128,
    num_steps=40,
    num_profiled=10,
    repeats=5,
    kv_cache_bytes=None,
)
TINY = Plan(
    chunks=(64, 32),
    batches=(1, 4),
    context=64,
    other_contexts=(16,),
    profiled_batches=(1,),
    concurrency=(1, 4),
    prompt_tokens=16,
    output_tokens=4,
    num_steps=4,
    num_profiled=2,
    repeats=2,
    kv_cache_bytes=4 << 20,
)
"""In seconds on a CPU, so that the benchmark's own tests run all of it."""

VARIANTS: dict[str, dict[str, str]] = {
    "bf16": {},
    "fp8-kv": {"kv_cache_dtype": "fp8"},
    "fp8": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    "int4": {"quantization": "int4"},
}
"""The engine's options (and, with dashes, the server's) by what the variant is called."""
