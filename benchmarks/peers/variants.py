"""What is compared, each engine in each precision, as data; and which of it a run takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

OURS, VLLM, LLAMA_CPP = "ours", "vllm", "llama.cpp"
PEERS = (OURS, VLLM, LLAMA_CPP)

STANDARD, PREFILL, PREFIX, SAMPLING, MIXED, INTERFERENCE, SCALING = SCENARIOS = (
    "standard",
    "prefill",
    "prefix",
    "sampling",
    "mixed",
    "interference",
    "scaling",
)
SMALL, LARGE = WEIGHTS = ("270m", "2b")

_OF_ALL = (STANDARD, PREFILL, PREFIX, SAMPLING, INTERFERENCE)
_SHORT = (STANDARD, PREFILL)
_WITHOUT_GUESSES = (STANDARD, SAMPLING, MIXED, SCALING)
"""Guesses would hide what a step costs."""

_NO_GUESSES = ("--speculative-ngram-tokens", "0")
"""As the peers run by default."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine in one precision."""

    name: str
    peer: str
    precision: str
    """The --dtype of vLLM, the type of llama.cpp's file, what stands in the table for ours."""
    scenarios: tuple[str, ...]
    weights: tuple[str, ...] = (SMALL,)
    options: tuple[str, ...] = ()
    """Ours: the server's options; a variant with an option that the server does not have is skipped."""
    needs_avx512: bool | None = None
    """Run only on a CPU that has AVX-512 (True), only on one without (False), or on any."""


VARIANTS = (
    Variant("ours bf16", OURS, "bf16", (*_OF_ALL, MIXED), WEIGHTS),
    Variant("ours int8", OURS, "int8", (*_OF_ALL, MIXED), WEIGHTS, options=("--quantization", "int8")),
    Variant("ours bf16, no guesses", OURS, "bf16", _WITHOUT_GUESSES, options=_NO_GUESSES),
    Variant(
        "ours int8, no guesses",
        OURS,
        "int8",
        _WITHOUT_GUESSES,
        options=("--quantization", "int8", *_NO_GUESSES),
    ),
    Variant("vLLM bf16", VLLM, "bfloat16", (*_OF_ALL, MIXED), WEIGHTS, needs_avx512=True),
    # Without AVX-512 its matrix products are several times faster in float32 than in bf16.
    Variant("vLLM bf16", VLLM, "bfloat16", (STANDARD,), needs_avx512=False),
    Variant("vLLM fp32", VLLM, "float32", (*_OF_ALL, MIXED), WEIGHTS, needs_avx512=False),
    Variant("llama.cpp bf16", LLAMA_CPP, "bf16", _SHORT, WEIGHTS),
    Variant("llama.cpp Q8_0", LLAMA_CPP, "Q8_0", _OF_ALL, WEIGHTS),
    Variant("llama.cpp Q4_K_M", LLAMA_CPP, "Q4_K_M", _SHORT),
    Variant("llama.cpp Q4_0", LLAMA_CPP, "Q4_0", _OF_ALL, WEIGHTS),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One variant to run on one checkpoint."""

    variant: Variant
    weights: str
    scenarios: tuple[str, ...]


def choose(
    peers: Sequence[str],
    scenarios: Sequence[str],
    weights: Sequence[str],
    server_options: Collection[str],
    has_avx512: bool,
    variants: Sequence[Variant] = VARIANTS,
) -> list[Choice]:
    """What to run of what was asked for, checkpoint by checkpoint. `server_options`: those that ours has."""
    return [
        Choice(variant, of_weights, wanted)
        for of_weights in WEIGHTS
        if of_weights in weights
        for variant in variants
        if variant.peer in peers
        and of_weights in variant.weights
        and variant.needs_avx512 in (None, has_avx512)
        and not {option for option in variant.options if option.startswith("--")} - set(server_options)
        and (wanted := _of_checkpoint(of_weights, [name for name in variant.scenarios if name in scenarios]))
    ]


def _of_checkpoint(weights: str, scenarios: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in scenarios if weights == SMALL or name in _SHORT)


def cpu_has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
