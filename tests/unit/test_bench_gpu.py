"""The benchmark of a GPU: floors, targets and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.floors import CardRates, ModelCosts, card_class, decode_floor, decode_target, prefill_target
from benchmarks.gpu.models import SHAPES

H100 = CardRates("NVIDIA H100 80GB HBM3", 3.35e12, 990e12)


@pytest.mark.parametrize(
    ("model", "weights", "kv", "batch", "milliseconds"),
    [
        ("2b", 5.01e9, 18 * 1024, 1, 1.50),
        ("2b", 5.01e9, 18 * 1024, 32, 1.68),
        ("2b", 5.01e9, 18 * 1024, 256, 2.94),
        ("7b", 17.1e9, 448 * 1024, 1, 5.24),
        ("7b", 17.1e9, 448 * 1024, 32, 9.58),
    ],
)
def test_floors_are_those_computed_by_hand(
    model: str, weights: float, kv: int, batch: int, milliseconds: float
) -> None:
    costs = ModelCosts(SHAPES[model], int(weights), kv)
    assert decode_floor(costs, H100, [1024] * batch) * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_a_prompt_costs_two_operations_for_each_weight_and_token_and_its_attention() -> None:
    costs = ModelCosts(SHAPES["2b"], 0, 0)
    assert costs.body_flops_per_token() == pytest.approx(2 * 1.98e9, rel=0.01)
    attention = 4 * 18 * 8 * 256 * (2048 * 2049 // 2)
    expected = 2048 * costs.body_flops_per_token() + attention + costs.logits_flops_per_row()
    assert costs.prefill_flops(2048) == expected


def test_targets_are_for_a_kind_of_card_a_model_and_a_context() -> None:
    assert card_class("NVIDIA L4") == "l4"
    assert card_class("NVIDIA L40S") == "datacentre"
    target = decode_target("datacentre", "2b", 32, 1024)
    assert target is not None
    assert (target.verdict(1.5), target.verdict(1.51)) == ("pass", "fail")
    assert decode_target("datacentre", "2b", 32, 128) is None
    prefill = prefill_target("datacentre", "7b", 2048)
    assert prefill is not None
    assert (prefill.verdict(0.6), prefill.verdict(0.59)) == ("pass", "fail")


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run.main([]) == 2
    assert "no GPU, so nothing is measured" in capsys.readouterr().err


def test_the_most_telling_parts_come_first() -> None:
    names = [job.name for job in run.plan_jobs(["2b", "7b"], ["bf16", "fp8"])]
    assert names[:5] == ["card", "steps 2b bf16", "server 2b bf16", "steps 7b bf16", "server 7b bf16"]


@pytest.mark.slow
def test_a_tiny_run_measures_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--models", "tiny", "--variants", "bf16"]
    assert run.main([*options, "--folder", str(tmp_path / "models"), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    kinds = [row["kind"] for row in result["steps"][0]["rows"]]
    assert kinds == ["start", "prefill", "prefill", *["decode"] * 4]
    assert [row["report"]["errors"] for row in result["server"]] == [0, 0]
    assert "over HTTP" in capsys.readouterr().out
