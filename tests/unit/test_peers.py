"""What `make bench-peers` chooses to run, computes and writes; no engine is started here."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import report
from benchmarks.peers.plots import Bar, BarPanel, Line, LinePanel, bar_chart, figure, line_chart, nice_step
from benchmarks.peers.report import BEGIN, END, replace_section, section
from benchmarks.peers.scenarios import interference_figures
from benchmarks.peers.servers import Launch
from benchmarks.peers.variants import PEERS, SCENARIOS, VARIANTS, WEIGHTS, choose
from benchmarks.stats import RequestRecord

EVERY_OPTION = {option for variant in VARIANTS for option in variant.options}


# --- what is run -------------------------------------------------------------------------------------------


def chosen(**changes: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    arguments: dict[str, Any] = {
        "peers": PEERS,
        "scenarios": SCENARIOS,
        "weights": WEIGHTS,
        "server_options": EVERY_OPTION,
        "has_avx512": True,
    } | changes
    return [(choice.variant.name, choice.weights, choice.scenarios) for choice in choose(**arguments)]


def test_a_variant_whose_option_the_server_lacks_is_skipped() -> None:
    def names(options: set[str]) -> set[str]:
        return {name for name, _, _ in chosen(server_options=options)}

    lacking = names(EVERY_OPTION) - names(EVERY_OPTION - {"--quantization"})
    assert lacking == {"ours int8", "ours int8, no guesses"}


def test_peers_scenarios_and_weights_that_were_not_asked_for_are_not_run() -> None:
    runs = chosen(peers=["vllm"], scenarios=["prefill", "scaling"], weights=["270m"])
    assert runs == [("vLLM bf16", "270m", ("prefill",))]


def test_a_variant_with_none_of_the_scenarios_is_not_started() -> None:
    names = {name for name, _, _ in chosen(scenarios=["scaling"])}
    assert names == {"ours bf16, no guesses", "ours int8, no guesses"}


def test_without_avx512_vllm_runs_in_float32_too_and_in_bf16_for_the_standard_run_only() -> None:
    runs = {(name, weights): scenarios for name, weights, scenarios in chosen(has_avx512=False, peers=["vllm"])}
    assert runs["vLLM bf16", "270m"] == ("standard",)
    assert "sampling" in runs["vLLM fp32", "270m"]
    assert ("vLLM bf16", "2b") not in runs
    assert "vLLM fp32" not in {name for name, _, _ in chosen()}


def test_the_large_checkpoint_gets_the_short_scenarios_after_all_runs_of_the_small() -> None:
    weights = [weights for _, weights, _ in chosen()]
    assert weights == sorted(weights)
    assert {name for _, weights, names in chosen() for name in names if weights == "2b"} == {
        "standard",
        "prefill",
    }


def test_variants_of_one_machine_have_names_of_their_own() -> None:
    for has_avx512 in (True, False):
        runs = [(name, weights) for name, weights, _ in chosen(has_avx512=has_avx512)]
        assert len(runs) == len(set(runs))


def test_a_command_is_shown_without_the_places_of_its_files() -> None:
    launch = Launch(("/a/bin/python", "-m", "x", "--model", "/b/m.gguf"), "/", {"LD_PRELOAD": "/c/d.so:/e.so"})
    assert launch.shown() == "LD_PRELOAD=d.so:e.so python -m x --model m.gguf"


# --- interference ------------------------------------------------------------------------------------------


def stream(*chunk_times: float, tokens: int = 1) -> RequestRecord:
    return RequestRecord(0.0, 0.0, chunk_times, (tokens,) * len(chunk_times))


def test_gaps_count_as_undisturbed_before_the_first_long_prompt_and_as_disturbed_until_the_last_answer() -> (
    None
):
    # The second stream begins at 1.0, so that the gaps of 0.3 before it are not counted.
    streams = [stream(0.1, 0.4, 0.7, 1.0, 1.1, 1.4, 2.4, 9.0), stream(1.0, 1.1, 1.2, 1.9, 2.3)]
    figures = interference_figures(streams, [RequestRecord(1.2, 1.9), RequestRecord(1.9, 2.4)]).figures
    assert figures["interference.undisturbed_ms"] == pytest.approx(100)
    # 0.3, 1.0, 0.7 and 0.4 s: NumPy's 99th percentile of four values lies 0.97 of the way from 0.7 to 1.0.
    assert figures["interference.p99_ms"] == pytest.approx(991)


def test_a_chunk_of_two_tokens_counts_as_two_gaps() -> None:
    streams = [stream(0.0, 0.4, 1.0, tokens=2)]
    figures = interference_figures(streams, [RequestRecord(0.4, 1.0)]).figures
    assert figures["interference.undisturbed_ms"] == pytest.approx(200)
    assert figures["interference.p99_ms"] == pytest.approx(300)


def test_a_stream_that_never_began_leaves_no_figures() -> None:
    figures = interference_figures([stream(1.0, 2.0), stream()], [RequestRecord(1.0, 2.0)]).figures
    assert set(figures.values()) == {None}


# --- the page ----------------------------------------------------------------------------------------------


def a_run(variant: str, peer: str, weights: str = "270m", **changes: Any) -> dict[str, Any]:
    figures = {
        f"c{level}.{name}": level * value
        for level in (1, 8)
        for name, value in {"tokens_per_s": 10.0, "ttft_ms": 100.0, "itl_ms": 20.0, "errors": 0}.items()
    }
    return {
        "variant": variant,
        "peer": peer,
        "weights": weights,
        "scenarios": ["standard"],
        "command": f"serve {variant}",
        "load_average": (0.3, 0.2, 0.1),
        "start_seconds": 1.5,
        "memory_bytes": 700 * 2**20,
        "figures": figures,
        "reports": {},
        "error": None,
    } | changes


def a_result(*runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "timestamp": "2026-01-02T03:04:05Z",
        "commit": "abc1234",
        "complete": True,
        "machine": {
            "cpu": "A CPU",
            "cores": 2,
            "memory_bytes": 24 * 2**30,
            "python": "3.11",
            "packages": {"torch": "2"},
        },
        "instruction_set": "AVX2",
        "read_bandwidth": 20e9,
        "budget_seconds": 25.0,
        "versions": {"vllm": "vllm 1"},
        "weights": {"270m": {"title": "The small one", "load": "128 tokens.", "bf16_bytes": 500_000_000}},
        "runs": list(runs),
    } | changes


def rows(text: str) -> dict[str, list[list[str]]]:
    """The cells of every table row, by the first of them."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name, []).append(cells)
    return found


def test_the_table_gives_throughput_first_token_start_and_memory() -> None:
    (cells,) = rows(report.main_table([a_run("ours bf16", "ours")]))["ours bf16"]
    assert cells == ["10; 100 ms", "80; 800 ms", "-", "-", "1.5 s", "700 MiB"]


def test_what_was_not_measured_is_a_dash() -> None:
    run = a_run("vLLM bf16", "vllm", figures={}, start_seconds=None, memory_bytes=None)
    (cells,) = rows(report.main_table([a_run("ours bf16", "ours"), run]))["vLLM bf16"]
    assert cells == ["-"] * 6


def test_sampling_and_disturbance_are_given_beside_what_they_are_compared_with() -> None:
    run = a_run("ours bf16", "ours")
    run["figures"] |= {
        "sampling.tokens_per_s": 72.0,
        "interference.undisturbed_ms": 40.0,
        "interference.p99_ms": 100.0,
    }
    (cells,) = rows(report.detail_table([run]))["ours bf16"]
    assert cells == ["20 ms", "160 ms", "72 (0.90)", "-", "40 ms", "100 ms (2.5 times)"]


def test_the_section_says_where_when_how_and_with_what_the_figures_were_taken() -> None:
    text = " ".join(section(a_result(a_run("ours bf16", "ours"), a_run("vLLM bf16", "vllm"))).split())
    for fact in ("2026-01-02", "abc1234", "A CPU (AVX2) with 2 cores and 24 GiB", "vllm: vllm 1."):
        assert fact in text
    assert "`serve vLLM bf16`; load average before it 0.3." in text
    # 500 MB at 20 GB/s.
    assert "takes 25 ms at the 20 GB/s" in text


def test_failures_and_parts_of_a_run_are_said() -> None:
    failed = a_run("vLLM bf16", "vllm", error="ServerError: ended\nwith a long tale")
    failed["figures"]["c8.errors"] = 3
    text = " ".join(section(a_result(failed, complete=False)).split())
    assert "3 requests failed" in text
    assert "stopped by `ServerError: ended`" in text
    assert "long tale" not in text
    assert "a part of the whole run" in text


def test_cost_is_tabled_by_concurrency_and_context_in_order() -> None:
    scaling = {"scaling.c16.tokens_per_s": 90.0, "scaling.c2.tokens_per_s": 30.0, "context.128.itl_ms": 20.0}
    run = a_run("ours bf16", "ours", figures=scaling)
    found = rows(report.scaling_tables([a_run("vLLM bf16", "vllm"), run]))
    assert found["output tokens/s, at a time"] == [["2", "16"]]
    assert found["ours bf16"] == [["30", "90"], ["20"]]
    assert "How cost grows" in section(a_result(run))
    assert "How cost grows" not in section(a_result(a_run("ours bf16", "ours")))


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = replace_section(page, "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replace_section(once, "new") == once
    with pytest.raises(ValueError, match="followed by"):
        replace_section(f"{END}{BEGIN}", "new")


def test_the_page_has_the_markers() -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    replace_section(page.read_text(encoding="utf-8"), "")


# --- plots -------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_their_values_and_what_is_missing_is_said() -> None:
    panel = BarPanel("t", [Bar("a & b", 10.0, "#111"), Bar("c", 40.0, "#222"), Bar("d", None, "#333")])
    root = ET.fromstring(bar_chart([panel]))
    widths = {node.get("fill"): node.get("width") for node in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert float(widths["#222"] or 0) == pytest.approx(4 * float(widths["#111"] or 0), abs=0.2)
    assert widths["#333"] == "0.0"
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "10", "40", "-"} <= set(texts)


def test_lines_rise_with_their_values_and_double_at_equal_distances() -> None:
    line = Line("a", [(1, 0.0), (2, 50.0), (4, 100.0)], "#111")
    root = ET.fromstring(line_chart([LinePanel("t", "x", [line])]))
    dots = [
        (float(node.get("cx") or 0), float(node.get("cy") or 0))
        for node in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.2)
    assert dots[0][1] > dots[2][1]


@pytest.mark.parametrize("highest", [0.003, 1.0, 7.0, 59.9, 60.1, 1234.0])
def test_grid_lines_are_few_and_at_round_values(highest: float) -> None:
    step = nice_step(highest)
    assert 2 <= highest / step <= 6.0001
    assert f"{step:e}"[0] in "125"


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.0123, "0.0123"), (9.996, "10"), (45.67, "45.7"), (1234.5, "1,234")]
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert figure(value) == shown


def test_both_plots_come_from_what_was_measured() -> None:
    run = a_run("ours bf16", "ours")
    assert report.scaling_plot([run]) is None
    run["figures"] |= {"scaling.c1.tokens_per_s": 5.0, "context.128.itl_ms": 20.0}
    assert "ours bf16" in (report.throughput_plot([run]) or "")
    assert "tokens of context" in (report.scaling_plot([run]) or "")
    assert report.throughput_plot([a_run("x", "vllm", scenarios=["prefill"])]) is None


def test_every_variant_names_a_known_peer_and_known_scenarios() -> None:
    for variant in VARIANTS:
        assert variant.peer in PEERS
        assert set(variant.scenarios) <= set(SCENARIOS)
        assert set(variant.weights) <= set(WEIGHTS)
