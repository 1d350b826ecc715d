"""The section of docs/performance.md that a run writes, and its plots, all from the run's JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.plots import Bar, BarPanel, Line, LinePanel, bar_chart, figure, line_chart
from benchmarks.peers.variants import LLAMA_CPP, OURS, VLLM

BEGIN = "<!-- written by `make bench-peers`: begin -->"
END = "<!-- written by `make bench-peers`: end -->"
THROUGHPUT_PLOT = "peers-throughput.svg"
SCALING_PLOT = "scaling.svg"

Run = Mapping[str, Any]
"""One variant on one checkpoint: see `benchmarks.peers.run`."""

_COLORS = {OURS: "#0969da", VLLM: "#bc4c00", LLAMA_CPP: "#6e7781"}
_SECOND_COLOR = "#54aeff"
_GIB, _MIB = 2**30, 2**20


def replace_section(page: str, section: str) -> str:
    """The page with `section` between its markers. Raises ValueError if it lacks them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} followed by {END}")
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"


def section(result: Mapping[str, Any]) -> str:
    """The whole section, without its markers."""
    parts = [_paragraph(_setting(result))]
    for name, weights in result["weights"].items():
        runs = [run for run in result["runs"] if run["weights"] == name]
        if not runs:
            continue
        parts += [f"#### {weights['title']}", _paragraph(weights["load"]), main_table(runs)]
        if any(_has(run, "sampling", "interference", "mixed") for run in runs):
            parts += [detail_table(runs)]
        if floor := _floor(weights, result):
            parts.append(_paragraph(floor))
        if throughput_plot(runs) and name == next(iter(result["weights"])):
            parts.append(f"![Output tokens per second by engine](images/{THROUGHPUT_PLOT})")
    if scaling_plot(result["runs"]):
        parts += ["#### How cost grows", f"![Throughput and step time](images/{SCALING_PLOT})"]
        parts += [scaling_tables(result["runs"])]
    parts += ["#### How it was run", "\n".join(_notes(result))]
    return "\n\n".join(parts) + "\n"


def main_table(runs: Sequence[Run]) -> str:
    """Throughput and time to first token at each concurrency, a long prompt, a shared prefix, start, memory."""
    levels = _levels(runs)
    header = [
        "engine",
        *(f"{level} at a time" for level in levels),
        "one long prompt",
        "shared prefix, 8",
        "start to first answer",
        "memory",
    ]
    rows = [
        [
            run["variant"],
            *(_speed(run, f"c{level}") for level in levels),
            _with_unit(run, "prefill.ms", "ms"),
            _speed(run, "prefix"),
            "-" if run["start_seconds"] is None else f"{figure(run['start_seconds'])} s",
            "-" if run["memory_bytes"] is None else f"{run['memory_bytes'] / _MIB:,.0f} MiB",
        ]
        for run in runs
    ]
    return _table(header, rows)


def detail_table(runs: Sequence[Run]) -> str:
    """Inter-token medians, what sampling and a mixed batch keep of greedy's throughput, and interference."""
    levels = _levels(runs)
    most = levels[-1]
    header = [
        "engine",
        *(f"ITL p50, {level}" for level in levels),
        f"sampled, {most}",
        f"mixed, {most}",
        "8 streams, ITL p50",
        "beside long prompts, ITL p99",
    ]
    rows = [
        [
            run["variant"],
            *(_with_unit(run, f"c{level}.itl_ms", "ms") for level in levels),
            *(_share_of_greedy(run, name, f"c{most}") for name in ("sampling", "mixed")),
            _with_unit(run, "interference.undisturbed_ms", "ms"),
            _multiple(run, "interference.p99_ms", "interference.undisturbed_ms"),
        ]
        for run in runs
    ]
    return _table(header, rows)


def scaling_tables(runs: Sequence[Run]) -> str:
    """Throughput by concurrency, and decode step time by context, of the runs that measured them."""
    runs = [run for run in runs if _scaling(run, "scaling.c", ".tokens_per_s")]
    levels = [level for level, _ in _scaling(runs[0], "scaling.c", ".tokens_per_s")]
    contexts = [context for context, _ in _scaling(runs[0], "context.", ".itl_ms")]
    throughput = _table(
        ["output tokens/s, at a time", *(f"{level:,.0f}" for level in levels)],
        [
            [run["variant"], *(_plain(run, f"scaling.c{level:.0f}.tokens_per_s") for level in levels)]
            for run in runs
        ],
    )
    step = _table(
        ["decode step in ms, context", *(f"{context:,.0f}" for context in contexts)],
        [
            [run["variant"], *(_plain(run, f"context.{context:.0f}.itl_ms") for context in contexts)]
            for run in runs
        ],
    )
    return f"{throughput}\n\n{step}"


def throughput_plot(runs: Sequence[Run]) -> str | None:
    """SVG: output tokens per second of every engine, one panel for each concurrency."""
    measured = [run for run in runs if _has(run, "standard")]
    if not measured:
        return None
    panels = [
        BarPanel(
            f"tokens/s, {level} at a time",
            [
                Bar(run["variant"], run["figures"].get(f"c{level}.tokens_per_s"), _COLORS[run["peer"]])
                for run in measured
            ],
        )
        for level in _levels(measured)
    ]
    return bar_chart(panels)


def scaling_plot(runs: Sequence[Run]) -> str | None:
    """SVG: our throughput against concurrency, and our decode step time against context."""
    measured = [run for run in runs if _scaling(run, "scaling.c", ".tokens_per_s")]
    if not measured:
        return None

    def lines(prefix: str, suffix: str) -> list[Line]:
        colors = (_COLORS[OURS], _SECOND_COLOR)
        return [
            Line(run["variant"], _scaling(run, prefix, suffix), color)
            for run, color in zip(measured, colors, strict=False)
        ]

    return line_chart(
        [
            LinePanel("output tokens/s", "requests at a time", lines("scaling.c", ".tokens_per_s")),
            LinePanel("decode step, ms", "tokens of context", lines("context.", ".itl_ms")),
        ]
    )


# --- text --------------------------------------------------------------------------------------------------


def _setting(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['timestamp'][:10]}, commit {result['commit']}, {machine['cpu']} "
        f"({result['instruction_set']}) with {machine['cores']} cores and "
        f"{machine['memory_bytes'] / _GIB:.0f} GiB, Python {machine['python']}, "
        f"torch {machine['packages']['torch']}. One engine at a time, all in one run, "
        "the client on the same cores. Throughput is output tokens per second of all requests together; behind "
        "it stands the median time to first token. ITL is the inter-token latency. A dash: not measured."
    )


def _floor(weights: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    bandwidth = result.get("read_bandwidth")
    if not bandwidth:
        return None
    milliseconds = 1000 * weights["bf16_bytes"] / bandwidth
    return (
        f"Reading the {weights['bf16_bytes'] / 1e6:,.0f} MB of bf16 weights once takes "
        f"{figure(milliseconds)} ms at the {figure(bandwidth / 1e9)} GB/s that this machine read in the same "
        "run: no decode step in bf16 can be shorter."
    )


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [
        "Every engine served the same bf16 weights: ours and vLLM a directory with safetensors, llama.cpp a "
        "GGUF file made from that directory, and quantisations of it by its own llama-quantize. The precision "
        "is in the engine's name.",
        "Prompts are random words, fresh in every scenario; each run was preceded by one request. A run sends "
        "two requests for each one under way (four where there is one), or one where the first took more than "
        f"{result['budget_seconds']:g} s.",
        "Starts are second starts: whatever an engine keeps on disk between starts was there.",
        "Memory is the proportional set size of all processes of the engine after its last scenario.",
        "Sampled: temperature 1, top_p 0.95. Mixed: a quarter of the requests with presence_penalty 0.5, "
        "repetition_penalty 1.1 and 5 logprobs, all greedy. In brackets: the share of greedy's throughput.",
        "The last column is the inter-token latency of 8 running streams while prompts of 1,024 tokens arrive "
        "one after another, and its multiple of the undisturbed median before it.",
        *(f"{name}: {text}." for name, text in result["versions"].items()),
    ]
    if not result["complete"]:
        notes.append("This was a part of the whole run; nothing in it was merged with another run.")
    for run in result["runs"]:
        notes.append(
            f"{run['variant']}, {run['weights']}: `{run['command']}`; load average before it "
            f"{run['load_average'][0]:.1f}."
        )
        if errors := sum(int(value or 0) for name, value in run["figures"].items() if name.endswith(".errors")):
            notes.append(f"{run['variant']}, {run['weights']}: {errors} requests failed.")
        if run["error"]:
            notes.append(f"{run['variant']}, {run['weights']}: stopped by `{run['error'].splitlines()[0]}`.")
    return [textwrap.fill(note, 112, initial_indent="- ", subsequent_indent="  ", **_WHOLE) for note in notes]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 112, **_WHOLE)


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


# --- figures -----------------------------------------------------------------------------------------------


def _levels(runs: Sequence[Run]) -> list[int]:
    """The concurrencies of the standard run, ascending."""
    names = {name.split(".")[0] for run in runs for name in run["figures"] if name.endswith(".tokens_per_s")}
    return sorted(int(name[1:]) for name in names if name[0] == "c" and name[1:].isdigit()) or [1]


def _has(run: Run, *scenarios: str) -> bool:
    return any(name in run["scenarios"] for name in scenarios)


def _scaling(run: Run, prefix: str, suffix: str) -> list[tuple[float, float]]:
    found = [
        (float(name.removeprefix(prefix).removesuffix(suffix)), value)
        for name, value in run["figures"].items()
        if name.startswith(prefix) and name.endswith(suffix) and value is not None
    ]
    return sorted(found)


def _plain(run: Run, name: str) -> str:
    value = run["figures"].get(name)
    return "-" if value is None else figure(value)


def _with_unit(run: Run, name: str, unit: str) -> str:
    value = run["figures"].get(name)
    return "-" if value is None else f"{figure(value)} {unit}"


def _speed(run: Run, name: str) -> str:
    if run["figures"].get(f"{name}.tokens_per_s") is None:
        return "-"
    return f"{_plain(run, f'{name}.tokens_per_s')}; {_with_unit(run, f'{name}.ttft_ms', 'ms')}"


def _share_of_greedy(run: Run, name: str, greedy: str) -> str:
    value, base = run["figures"].get(f"{name}.tokens_per_s"), run["figures"].get(f"{greedy}.tokens_per_s")
    if value is None:
        return "-"
    return figure(value) if not base else f"{figure(value)} ({value / base:.2f})"


def _multiple(run: Run, name: str, of: str) -> str:
    value, base = run["figures"].get(name), run["figures"].get(of)
    if value is None:
        return "-"
    return f"{figure(value)} ms" if not base else f"{figure(value)} ms ({value / base:.1f} times)"
