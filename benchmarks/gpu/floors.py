"""The least time that a step can take on a card, and how near to it a step should come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.models.config import GemmaConfig, expected_weights


@dataclass(frozen=True, slots=True)
class CardRates:
    """What one card was measured to do."""

    name: str
    bytes_per_second: float
    """The best of reading and of copying, the latter counting both directions."""
    flops_per_second: float
    """bf16 matrix products, one multiply-add being two operations."""


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What a step reads and computes, by the shape of the model and the engine's own account of its memory."""

    config: GemmaConfig
    weight_bytes: int
    """Of all weights in the form in which they lie on the device. A step reads each of them once: the tied
    embedding in the output layer."""
    kv_bytes_per_token: float
    """In all layers."""

    def body_flops_per_token(self) -> int:
        """Of all matrices but the embedding: two for each weight."""
        sizes = {name: math.prod(shape) for name, shape in expected_weights(self.config).items()}
        return 2 * sum(size for name, size in sizes.items() if "_proj." in name)

    def logits_flops_per_row(self) -> int:
        return 2 * self.config.vocab_size * self.config.hidden_size

    def attention_flops(self, start: int, count: int) -> int:
        """Of `count` new tokens behind `start` others: QK^T and PV, two for each multiply-add."""
        total = 0
        for layer in self.config.layers:
            attention = layer.attention
            window = attention.window
            seen = sum(
                position + 1 if window is None else min(position + 1, window)
                for position in range(start, start + count)
            )
            total += 4 * attention.num_heads * attention.head_dim * seen
        return total

    def decode_bytes(self, contexts: Sequence[int]) -> float:
        """A step of a token for each sequence, of so many tokens with it: weights, KV read, KV written."""
        return self.weight_bytes + self.kv_bytes_per_token * (sum(self._read(contexts)) + len(contexts))

    def decode_flops(self, contexts: Sequence[int]) -> int:
        rows = len(contexts)
        products = rows * (self.body_flops_per_token() + self.logits_flops_per_row())
        return products + sum(self.attention_flops(context - 1, 1) for context in contexts)

    def prefill_flops(self, num_tokens: int) -> int:
        """One prompt in one step, of which the last row samples."""
        body = num_tokens * self.body_flops_per_token()
        return body + self.attention_flops(0, num_tokens) + self.logits_flops_per_row()

    def _read(self, contexts: Sequence[int]) -> list[float]:
        """Tokens whose keys and values each sequence reads, averaged over the layers."""
        windows = [layer.attention.window for layer in self.config.layers]
        return [
            sum(context if window is None else min(context, window) for window in windows) / len(windows)
            for context in contexts
        ]


def decode_floor(costs: ModelCosts, card: CardRates, contexts: Sequence[int]) -> float:
    """Seconds: bytes over bandwidth or operations over their rate, whichever takes longer."""
    return max(
        costs.decode_bytes(contexts) / card.bytes_per_second,
        costs.decode_flops(contexts) / card.flops_per_second,
    )


@dataclass(frozen=True, slots=True)
class Target:
    limit: float
    is_least: bool = False
    """Whether figures must be at least so large, not at most."""

    def verdict(self, value: float) -> str:
        is_met = value >= self.limit if self.is_least else value <= self.limit
        return "pass" if is_met else "fail"

    def __str__(self) -> str:
        return f"{'>=' if self.is_least else '<='} {self.limit:g}"


TARGET_CONTEXT = 1024
"""Tokens of context for which the targets of decode steps are meant."""

_DECODE = {
    ("datacentre", "2b"): {1: 1.35, 32: 1.5, 256: 1.6},
    ("datacentre", "7b"): {1: 1.2, 32: 1.3},
    ("l4", "2b"): {1: 1.15, 32: 1.25},
}
_PREFILL = {("datacentre", "2b"): 0.5, ("datacentre", "7b"): 0.6}
_HOST_MS = 1.0
_HOST_BATCHES = (1, 32)


def card_class(name: str) -> str:
    """Which card's targets are meant, by the driver's name of the card."""
    return "l4" if "L4" in name.split() else "datacentre"


def decode_target(card: str, model: str, batch: int, context: int) -> Target | None:
    """Of a step's time as a multiple of its floor, in bf16."""
    limit = _DECODE.get((card, model), {}).get(batch) if context == TARGET_CONTEXT else None
    return None if limit is None else Target(limit)


def prefill_target(card: str, model: str, num_tokens: int) -> Target | None:
    """Of prefill's share of the measured rate of matrix products, for the longest chunk."""
    limit = _PREFILL.get((card, model)) if num_tokens == 2048 else None
    return None if limit is None else Target(limit, is_least=True)


def host_target(batch: int) -> Target | None:
    """Of the host's own time in a step, in milliseconds."""
    return Target(_HOST_MS) if batch in _HOST_BATCHES else None
