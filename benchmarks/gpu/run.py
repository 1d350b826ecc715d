"""`make bench-gpu`: what this card does with Gemma 2B and 7B (random weights), against what it could do.

Prints tables; benchmarks/results/ gets everything as JSON. Ends with 0 when all was measured or left out for a
reason that it names, 1 when something failed, and 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.plan import FULL, TINY, VARIANTS, Plan
from benchmarks.gpu.tables import tables
from benchmarks.load import LoadSettings, first_model, run_load
from benchmarks.serve import RESULTS, serving
from server.engine.device import DeviceError, resolve_device

_MODELS = Path(__file__).parents[2] / ".cache" / "gpu"


@dataclass(frozen=True, slots=True)
class Job:
    """A part of the run that has processes of its own, so that what it breaks is its own."""

    kind: str
    """card | steps | server"""
    model: str = ""
    variant: str = ""
    least_seconds: float = 0.0
    """Without so many left, it is not begun."""

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.kind, self.model, self.variant) if part)


def plan_jobs(models: Sequence[str], variants: Sequence[str]) -> list[Job]:
    """By importance: when time runs out, the last ones are left out."""
    first, others = variants[0], variants[1:]
    jobs = [Job("card", least_seconds=15)]
    for model in models:
        jobs.append(Job("steps", model, first, 45))
        jobs.append(Job("server", model, first, 45))
    jobs += [Job("steps", model, variant, 45) for model in reversed(models) for variant in others]
    jobs += [Job("server", model, variant, 45) for model in models for variant in others]
    return jobs


class Run:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._plan: Plan = TINY if arguments.tiny else FULL
        self._deadline = time.monotonic() + arguments.budget
        self._started = time.monotonic()
        self.result: dict[str, Any] = {"card": None, "steps": [], "server": [], "left_out": [], "failed": []}

    def all(self) -> None:
        self.result["began_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        models = ["tiny"] if self._arguments.tiny else self._arguments.models
        for job in plan_jobs(models, self._arguments.variants):
            left = self._deadline - time.monotonic()
            if left < (0 if self._arguments.tiny else job.least_seconds):
                self._leave_out(job.name, f"{max(left, 0):.0f} s left of --budget {self._arguments.budget:g}")
                continue
            self._say(job.name)
            try:
                self._do(job, left)
            except (RuntimeError, OSError, TimeoutError, httpx.HTTPError) as error:
                self.result["failed"].append({"what": job.name, "why": f"{type(error).__name__}: {error}"})
                self._say(f"{job.name} failed: {error}")

    def _do(self, job: Job, left: float) -> None:
        device = ["--device", self._arguments.device, *(["--tiny"] if self._arguments.tiny else [])]
        if job.kind == "card":
            rows: list[dict[str, Any]] = []
            json_lines("benchmarks.gpu.card", device, left, rows)
            self.result["card"] = rows[0]
            return
        options = VARIANTS[job.variant]
        if job.kind == "server":
            refusal = [one for one in self.result["steps"] if _is_refused(one, job)]
            if refusal or not self._directory(job.model).exists():
                self._leave_out(job.name, "its engine did not start")
                return
            self._serve(job, options, left)
            return
        rows = []
        self.result["steps"].append({"model": job.model, "variant": job.variant, "rows": rows})
        of_model = ["--model", job.model, "--folder", str(self._arguments.folder), *device]
        # The last row may take a while after it was begun.
        limits = ["--seconds", str(max(left - 20, left / 2)), "--options", json.dumps(options)]
        try:
            json_lines("benchmarks.gpu.steps", [*of_model, *limits], left, rows)
        finally:
            for row in rows:
                if row["kind"] in ("refused", "skipped"):
                    place = f" batch {row['batch']} context {row['context']}" if "batch" in row else ""
                    self._leave_out(job.name + place, row["reason"])

    def _serve(self, job: Job, options: dict[str, str], left: float) -> None:
        server = ["--model", str(self._directory(job.model)), "--device", self._arguments.device]
        for option, value in options.items():
            server += [f"--{option.replace('_', '-')}", value]
        deadline = time.monotonic() + left

        async def load() -> None:
            async with asyncio.timeout(left), serving(server, left) as url:
                model = await first_model(url)
                for number, concurrency in enumerate(self._plan.concurrency):
                    if time.monotonic() > deadline - 0.1 * left:
                        self._leave_out(f"{job.name} {concurrency} at a time", "no time left")
                        continue
                    settings = LoadSettings(
                        url=url,
                        model=model,
                        concurrency=concurrency,
                        requests=max(4, 2 * concurrency),
                        prompt_tokens=self._plan.prompt_tokens,
                        output_tokens=self._plan.output_tokens,
                        seed=number,
                    )
                    report = await run_load(settings)
                    row = {"model": job.model, "variant": job.variant, "report": asdict(report)}
                    self.result["server"].append(row)
                    if report.errors:
                        raise RuntimeError(f"{report.errors} of {report.requests} requests failed")

        asyncio.run(load())

    def _directory(self, model: str) -> Path:
        directory: Path = self._arguments.folder / f"gemma-{model}-random"
        return directory

    def _leave_out(self, what: str, why: str) -> None:
        self.result["left_out"].append({"what": what, "why": why})
        self._say(f"left out: {what}: {why}")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:4.0f} s] {text}", file=sys.stderr, flush=True)


def _is_refused(steps: dict[str, Any], job: Job) -> bool:
    is_same = (steps["model"], steps["variant"]) == (job.model, job.variant)
    return is_same and not any(row["kind"] == "start" for row in steps["rows"])


def json_lines(module: str, options: Sequence[str], limit_seconds: float, rows: list[dict[str, Any]]) -> None:
    """Run a module in a process of its own, and append what it prints, a JSON object a line, as it comes.

    Raises RuntimeError if it fails, and TimeoutError if it takes longer than `limit_seconds`, when it is ended.
    """
    command = [sys.executable, "-m", module, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_MODELS.parents[1]) as process:
        assert process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(limit_seconds, end)
        timer.start()
        try:
            rows.extend(json.loads(line) for line in process.stdout if line.startswith("{"))
            process.wait()
        finally:
            timer.cancel()
    if is_late.is_set():
        raise TimeoutError(f"{module} was not done after {limit_seconds:.0f} s")
    if process.returncode != 0:
        raise RuntimeError(f"{module} ended with exit code {process.returncode}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=["2b", "7b"])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--budget", type=float, default=440.0, help="seconds; the least telling goes first")
    parser.add_argument("--folder", type=Path, default=_MODELS, help="where models are made: 22 GB, kept")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, in seconds: the benchmark's own test"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; benchmarks/results/gpu-TIME.json if not given")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for --tiny: models of true size need a GPU")
    try:
        resolve_device(arguments.device)
    except DeviceError as error:
        print(f"no GPU, so nothing is measured: {error}", file=sys.stderr)
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run = Run(arguments)
    try:
        run.all()
    finally:
        path = arguments.out or RESULTS / f"gpu-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run.result, indent=1) + "\n", encoding="utf-8")
    print(tables(run.result))
    print(f"\nwritten to {path}")
    return 1 if run.result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
