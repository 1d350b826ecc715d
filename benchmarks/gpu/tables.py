"""A GPU run as tables: figures beside floors and targets."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.floors import (
    CardRates,
    ModelCosts,
    Target,
    card_class,
    decode_floor,
    decode_target,
    host_target,
    prefill_target,
)
from benchmarks.gpu.models import SHAPES
from benchmarks.output import aligned

Row = dict[str, Any]


def tables(result: Row) -> str:
    """All of a run, `Run.result`, for a terminal."""
    parts = []
    card = result["card"]
    if card is not None:
        parts.append(_card_lines(card))
        for steps in result["steps"]:
            parts += _steps_tables(steps, card)
    if result["server"]:
        parts.append(_server_table(result["server"]))
    for title, key in (("left out", "left_out"), ("FAILED", "failed")):
        if result[key]:
            parts.append("\n".join([title, *(f"  {one['what']}: {one['why']}" for one in result[key])]))
    return "\n\n".join(parts)


def card_rates(card: Row) -> CardRates:
    """From the line of `benchmarks.gpu.card`."""
    bandwidth = max(card["copy_bytes_per_second"], card["read_bytes_per_second"])
    return CardRates(card["name"], bandwidth, max(card["gemm_flops_per_second"].values()))


def _card_lines(card: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    rates = card_rates(card)
    shape = max(card["gemm_flops_per_second"], key=card["gemm_flops_per_second"].__getitem__)
    return "\n".join(
        [
            f"{card['name']}; {versions}; {'; '.join(card['machine']['gpus']) or 'no NVIDIA driver'}",
            f"memory: copies {card['copy_bytes_per_second'] / 1e9:,.1f} GB/s (both directions), "
            f"reads {card['read_bytes_per_second'] / 1e9:,.1f} GB/s",
            f"bf16 products: {rates.flops_per_second / 1e12:,.2f} TFLOP/s at best ({shape})",
        ]
    )


def _steps_tables(steps: Row, card: Row) -> list[str]:
    start = next((row for row in steps["rows"] if row["kind"] == "start"), None)
    if start is None:
        return []
    model = steps["model"]
    costs = ModelCosts(SHAPES[model], start["weight_bytes"], start["kv_bytes_per_token"])
    rates, cards = card_rates(card), card_class(card["name"])
    title = (
        f"{model}, {steps['variant']}, back end {start['backend']}: {start['weight_bytes'] / 1e9:,.2f} GB of "
        f"weights, {start['kv_bytes_per_token'] / 1024:,.1f} KiB of KV cache a token, "
        f"{start['kv_capacity_tokens']:,} tokens fit, built in {start['start_seconds']:.1f} s"
    )
    decode = [
        ["batch", "context", "step ms", "floor ms", "ratio", "target", "", "host ms", "target", "", "idle"]
    ]
    prefill = [["prompt tokens", "ms", "tok/s", "share of peak", "target", ""]]
    for row in steps["rows"]:
        if row["kind"] == "decode":
            floor = decode_floor(costs, rates, row["contexts"])
            ratio, host_ms = row["seconds"] / floor, row["host_seconds"] * 1e3
            busy = row["busy_seconds"]
            cells = [str(row["batch"]), f"{row['context']:,}", f"{row['seconds'] * 1e3:.3f}"]
            cells += [f"{floor * 1e3:.3f}", f"{ratio:.2f}"]
            cells += _judged(ratio, decode_target(cards, model, row["batch"], row["context"]))
            cells += [f"{host_ms:.3f}", *_judged(host_ms, host_target(row["batch"]))]
            decode.append([*cells, "-" if busy is None else f"{max(0.0, 1 - busy / row['seconds']):.0%}"])
        elif row["kind"] == "prefill":
            share = costs.prefill_flops(row["tokens"]) / row["seconds"] / rates.flops_per_second
            judged = _judged(share, prefill_target(cards, model, row["tokens"]))
            speed = row["tokens"] / row["seconds"]
            prefill.append(
                [f"{row['tokens']:,}", f"{row['seconds'] * 1e3:.2f}", f"{speed:,.0f}", f"{share:.0%}", *judged]
            )
    return [title + "\n" + aligned(decode), aligned(prefill)]


def _judged(value: float, target: Target | None) -> list[str]:
    return ["", ""] if target is None else [str(target), target.verdict(value)]


def _server_table(rows: list[Row]) -> str:
    lines = [["over HTTP", "at a time", "tok/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms"]]
    for row in rows:
        report = row["report"]
        figures = (report["ttft_ms"]["p50"], report["inter_token_ms"]["p50"], report["inter_token_ms"]["p99"])
        lines.append(
            [
                f"{row['model']} {row['variant']}",
                str(report["settings"]["concurrency"]),
                f"{report['output_tokens_per_second']:,.0f}",
                *("-" if figure is None else f"{figure:,.1f}" for figure in figures),
            ]
        )
    return aligned(lines)
