"""`gemma-server run-batch` as its users run it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main

OPTIONS = ("--dtype", "float32", "--num-threads", "1", "--no-weight-cache")


def write_requests(path: Path, *bodies: dict[str, Any]) -> Path:
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "ab", "max_tokens": 10, "seed": number, **body},
        }
        for number, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(model: Path, source: str, output: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "server", "run-batch", source, output, "--model", str(model), *OPTIONS]
    return subprocess.run(command, capture_output=True, check=False, timeout=100, **options)


def results(text: bytes) -> dict[str, Any]:
    lines = [json.loads(line) for line in text.splitlines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def test_a_file_is_answered_and_one_that_was_begun_is_gone_on_with(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = write_requests(tmp_path / "in", *[{} for _ in range(50)])
    output = tmp_path / "out"
    done = run(tiny_checkpoint, str(source), str(output))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    assert b"tokens/s" not in done.stderr  # which is no terminal
    whole = results(output.read_bytes())
    assert set(whole) == {str(number) for number in range(50)}
    # As a run that died left it: some lines, the last one cut.
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:30]) + lines[30][:40])
    assert run(tiny_checkpoint, str(source), str(output)).returncode == 0
    assert output.read_bytes().splitlines(keepends=True)[:30] == lines[:30]
    again = results(output.read_bytes())
    for custom_id, line in whole.items():
        assert again[custom_id]["response"]["body"]["choices"] == line["response"]["body"]["choices"]


def test_a_request_that_fails_shows_in_the_exit_code(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in", {}, {"temperature": 9}, {"model": "nope"})
    with source.open("rb") as requests:
        done = run(tiny_checkpoint, "-", "-", stdin=requests)
    assert done.returncode == 1, done.stderr.decode()
    statuses = {key: line["response"]["status_code"] for key, line in results(done.stdout).items()}
    assert statuses == {"0": 200, "1": 400, "2": 404}


def test_a_terminal_shows_how_far_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in", {}, {"temperature": 9})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "server", "run-batch", str(source), str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--model", str(tiny_checkpoint), *OPTIONS], stderr=theirs)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(20) == 1
    assert b"2 of 2 requests, 1 failed" in shown


def test_a_model_that_cannot_be_loaded_ends_the_run(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in", {})
    done = run(tmp_path / "none", str(source), str(tmp_path / "out"))
    assert done.returncode == os.EX_CONFIG
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no request"),
        ("{\n", "Line 1"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/files", "body": {}}\n', "'url'"),
        (
            '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}\n',
            "'stream'",
        ),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n' * 2, "custom_id"),
    ],
)
def test_an_input_that_cannot_be_used_is_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    source = tmp_path / "in"
    source.write_text(text)
    assert main(["run-batch", str(source), str(tmp_path / "out")]) == os.EX_DATAERR
    assert message in capsys.readouterr().err


def test_arguments_that_are_wrong_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_requests(tmp_path / "in", {})
    assert main(["run-batch"]) == 2
    assert main(["run-batch", str(source), "--model", "x"]) == 2
    assert main(["run-batch", str(tmp_path / "none"), str(tmp_path / "out")]) == os.EX_IOERR
    assert main(["run-batch", str(source), str(source)]) == os.EX_DATAERR
    assert "one file" in capsys.readouterr().err
    (tmp_path / "out").write_text("something else\n")
    assert main(["run-batch", str(source), str(tmp_path / "out")]) == os.EX_DATAERR
    assert main(["run-batch", str(source), str(tmp_path / "out"), "--port", "x"]) == os.EX_CONFIG
    assert main(["run-batch", "--help"]) == 0
    assert "usage: gemma-server run-batch" in capsys.readouterr().out
    assert (tmp_path / "out").read_text() == "something else\n"
    (tmp_path / "out").write_text("something else")
    assert main(["run-batch", str(source), str(tmp_path / "out")]) == os.EX_DATAERR
    assert (tmp_path / "out").read_text() == "something else"
