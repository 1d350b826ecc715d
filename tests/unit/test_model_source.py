from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.model_source import DownloadProgress, ModelFiles, ModelSourceError, resolve
from tests.unit.hub_stand_in import COMMIT, HubStandIn, running

# --- what is on this machine --------------------------------------------------------------------------------


def test_importing_it_imports_neither_torch_nor_the_hub_library() -> None:
    code = "import sys, server.model_source; sys.exit(bool({'torch', 'huggingface_hub'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def make_directory(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def test_a_directory_with_a_checkpoint_is_used_as_it_is(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "my-gemma", "config.json", "tokenizer.json", "model.safetensors")
    assert resolve(str(directory)) == ModelFiles(directory, directory / "tokenizer.json", "my-gemma")


def test_a_directory_is_named_after_itself_even_if_given_as_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(
        make_directory(tmp_path / "my-gemma", "config.json", "tokenizer.json", "model.safetensors")
    )
    assert resolve(".").name == "my-gemma"


def test_a_gguf_file_is_used_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "gemma-2b.gguf"
    file.touch()
    assert resolve(str(file)) == ModelFiles(file, None, "gemma-2b")


def test_a_directory_with_one_gguf_file_means_that_file(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "d", "a.gguf", "README.md")
    assert resolve(str(directory)) == ModelFiles(directory / "a.gguf", None, "d")


@pytest.mark.covers("S07")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("config.json", "model.safetensors"), "tokenizer.json is missing from the model directory"),
        (("tokenizer.json", "model.safetensors"), "config.json is missing from the model directory"),
        (("a.gguf", "b.gguf"), "has several .gguf files, name one of them"),
        (("pytorch_model.bin",), "has neither config.json nor a .gguf file"),
    ],
)
def test_an_incomplete_directory_is_refused_with_what_is_missing(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelSourceError, match=message):
        resolve(str(make_directory(tmp_path / "d", *names)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelSourceError, match=r"must be a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "model",
    [
        "",
        "gemma",
        "./absent",
        "/absent/model",
        "google/../absent/etc",
        "google/..",
        "google/gemma/extra",
        "google/gemma-2b\n",
        "google/gemma 2b",
        "google/%2e%2e",
        "google\\gemma",
        "-google/gemma",
        "google/gemma:../x.gguf",
        "google/gemma:a/b.gguf",
        "google/gemma:model.bin",
        "https://example.com/google/gemma",
        "google/" + "g" * 97,
    ],
)
def test_a_value_that_is_neither_a_path_nor_an_id_is_refused(model: str) -> None:
    with pytest.raises(ModelSourceError, match="no such file or directory, and not a Hugging Face id"):
        resolve(model)


@pytest.mark.parametrize("revision", ["../main", "", "a b", "/main", "-x", "a/../../b"])
def test_a_revision_that_could_be_a_path_is_refused(revision: str) -> None:
    with pytest.raises(ModelSourceError, match="--revision"):
        resolve("google/gemma-2b", revision=revision)


def test_the_fraction_of_a_download_is_within_0_and_1() -> None:
    assert [DownloadProgress(*p).fraction for p in ((0, 0), (0, 8), (2, 8), (9, 8))] == [1.0, 0.0, 0.25, 1.0]


# --- what is on the hub -------------------------------------------------------------------------------------

CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "generation_config.json": b"{} ",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 4000,
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
NOT_WANTED = {
    "README.md": b"readme",
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"code",
    "gemma-2b.gguf": b"gguf",
    "original/model.safetensors": b"elsewhere",
}
DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from server.model_source import ModelSourceError, resolve
for line in sys.stdin:
    progress = []
    arguments = json.loads(line)
    arguments["download_dir"] = Path(arguments["download_dir"])
    try:
        files = resolve(**arguments, progress=lambda p: progress.append([p.done_bytes, p.total_bytes]))
        result = {key: str(value) for key, value in dataclasses.asdict(files).items()}
    except ModelSourceError as error:
        result = {"error": str(error)}
    print(json.dumps(result | {"progress": progress}), flush=True)
"""


class Server:
    """Resolves models in a process of its own, since the hub library reads its environment when imported."""

    def __init__(self, cache: Path, hub: HubStandIn) -> None:
        self.cache = cache
        self.hub = hub
        self.endpoint = hub.url
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self, **environment: str) -> None:
        self.stop()
        defaults = {
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "",
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env={**os.environ, **defaults, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def resolve(self, model: str, **arguments: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({"model": model, "download_dir": str(self.cache), **arguments}) + "\n"
        )
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(HubStandIn()) as hub:
        server = Server(tmp_path_factory.mktemp("cache"), hub)
        yield server
        server.stop()


@pytest.fixture
def server(shared_server: Server, hub: HubStandIn, tmp_path: Path) -> Server:
    shared_server.cache = tmp_path / "cache"
    return shared_server


@pytest.fixture
def hub(shared_server: Server) -> HubStandIn:
    hub = shared_server.hub
    hub.__init__(repos={"google/gemma-2b": CHECKPOINT | NOT_WANTED}, url=hub.url)  # type: ignore[misc]
    return hub


@pytest.fixture
def restarted(server: Server) -> Iterator[Server]:
    """For tests that change the environment: the next test gets a process with the usual one."""
    yield server
    server.endpoint = server.hub.url
    server.start()


def contents(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_a_checkpoint_is_downloaded_without_what_is_not_needed(hub: HubStandIn, server: Server) -> None:
    result = server.resolve("google/gemma-2b")
    assert result["name"] == "google/gemma-2b"
    assert result["path"].endswith(f"/snapshots/{COMMIT}")
    assert result["tokenizer_file"] == f"{result['path']}/tokenizer.json"
    assert contents(result["path"]) == CHECKPOINT
    assert {name for name, _ in hub.file_requests("GET")} == CHECKPOINT.keys()


def test_progress_counts_every_byte_once_and_ends_at_the_total(server: Server) -> None:
    total = sum(map(len, CHECKPOINT.values()))
    progress = server.resolve("google/gemma-2b")["progress"]
    assert {entry[1] for entry in progress} == {total}
    assert [entry[0] for entry in progress] == sorted(entry[0] for entry in progress)
    assert progress[-1] == [total, total]


def test_a_second_start_downloads_nothing(hub: HubStandIn, server: Server) -> None:
    first = server.resolve("google/gemma-2b")
    hub.requests.clear()
    second = server.resolve("google/gemma-2b")
    assert second == first | {"progress": []}
    assert hub.file_requests("GET") == []


def test_a_download_goes_on_where_the_connection_broke(hub: HubStandIn, server: Server) -> None:
    name = "model-00001-of-00002.safetensors"
    # The library writes, and so keeps, whole pieces of 10 MiB.
    hub.repos["google/gemma-2b"] = CHECKPOINT | {name: random.Random(0).randbytes(22 << 20)}
    hub.cut_once.add(name)
    result = server.resolve("google/gemma-2b")
    assert contents(result["path"]) == hub.repos["google/gemma-2b"]
    ranges = [byte_range for file, byte_range in hub.file_requests("GET") if file == name]
    assert ranges == [None, f"bytes={10 << 20}-"]
    assert result["progress"][-1][0] == result["progress"][-1][1]


def test_a_start_after_a_failed_one_fetches_only_what_is_missing(hub: HubStandIn, server: Server) -> None:
    shard = CHECKPOINT["model-00002-of-00002.safetensors"]
    hub.repos["google/gemma-2b"] = CHECKPOINT | {"model-00002-of-00002.safetensors": b""}
    server.resolve("google/gemma-2b")
    # The first start was cut before the last shard was complete.
    for path in server.cache.rglob("model-00002-of-00002.safetensors"):
        path.resolve().unlink()
        path.unlink()
    hub.repos["google/gemma-2b"] = CHECKPOINT
    hub.requests.clear()
    result = server.resolve("google/gemma-2b")
    assert [name for name, _ in hub.file_requests("GET")] == ["model-00002-of-00002.safetensors"]
    assert result["progress"] == [[len(shard), len(shard)]]


def test_a_gated_repository_says_where_to_accept_the_licence(hub: HubStandIn, server: Server) -> None:
    hub.gated.add("google/gemma-2b")
    assert server.resolve("google/gemma-2b")["error"] == (
        f"google/gemma-2b is gated: accept the licence at {hub.url}/google/gemma-2b and set HF_TOKEN to a "
        "token of the account that did"
    )


def test_a_token_in_the_environment_opens_a_gated_repository(hub: HubStandIn, restarted: Server) -> None:
    hub.gated.add("google/gemma-2b")
    restarted.start(HF_TOKEN=hub.token)
    assert contents(restarted.resolve("google/gemma-2b")["path"]) == CHECKPOINT


def test_a_missing_repository_says_what_to_check(hub: HubStandIn, server: Server) -> None:
    assert server.resolve("google/gemma-2bb")["error"] == (
        f"google/gemma-2bb does not exist at {hub.url}, or is private: check the spelling, or set HF_TOKEN to "
        "a token that may read it"
    )


def test_a_missing_revision_is_named(server: Server) -> None:
    result = server.resolve("google/gemma-2b", revision="v9")
    assert result["error"] == "google/gemma-2b has no revision 'v9': check --revision"


def test_a_commit_can_be_given_as_revision(server: Server) -> None:
    assert server.resolve("google/gemma-2b", revision=COMMIT)["path"].endswith(f"/snapshots/{COMMIT}")


def test_a_download_directory_replaces_the_cache(server: Server, tmp_path: Path) -> None:
    result = server.resolve("google/gemma-2b", download_dir=str(tmp_path / "elsewhere"))
    assert result["path"].startswith(str(tmp_path / "elsewhere"))
    assert not server.cache.exists()


@pytest.mark.covers("S07")
def test_a_repository_with_pickles_only_is_refused_and_nothing_is_downloaded(
    hub: HubStandIn, server: Server
) -> None:
    hub.repos["google/gemma-2b"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert "has neither safetensors nor a GGUF file" in server.resolve("google/gemma-2b")["error"]
    assert hub.file_requests("GET") == []


def test_one_gguf_file_of_a_repository_can_be_chosen(hub: HubStandIn, server: Server) -> None:
    result = server.resolve("google/gemma-2b:gemma-2b.gguf")
    assert (result["tokenizer_file"], result["name"]) == ("None", "google/gemma-2b")
    assert Path(result["path"]).read_bytes() == b"gguf"
    assert [name for name, _ in hub.file_requests("GET")] == ["gemma-2b.gguf"]


def test_the_only_gguf_file_of_a_repository_without_safetensors_is_taken(
    hub: HubStandIn, server: Server
) -> None:
    hub.repos["some/gguf"] = {"README.md": b"readme", "gemma.Q4_K_M.gguf": b"gguf"}
    assert Path(server.resolve("some/gguf")["path"]).read_bytes() == b"gguf"


def test_several_gguf_files_have_to_be_chosen_from(hub: HubStandIn, server: Server) -> None:
    hub.repos["some/gguf"] = {"a.gguf": b"a", "b.gguf": b"b"}
    assert server.resolve("some/gguf")["error"] == (
        "some/gguf has several GGUF files; choose one with --model some/gguf:FILE, of a.gguf, b.gguf"
    )
    assert "has no file c.gguf; it has a.gguf, b.gguf" in server.resolve("some/gguf:c.gguf")["error"]


@pytest.mark.parametrize("fault", ["offline", "unreachable", "failing"])
def test_without_the_hub_a_copy_in_the_cache_is_used(restarted: Server, fault: str) -> None:
    server = restarted
    first = server.resolve("google/gemma-2b")
    break_hub(server, fault)
    assert server.resolve("google/gemma-2b") == first | {"progress": []}


@pytest.mark.parametrize("fault", ["offline", "unreachable", "failing"])
def test_without_the_hub_and_a_copy_the_error_says_what_to_check(restarted: Server, fault: str) -> None:
    server = restarted
    break_hub(server, fault)
    error = server.resolve("google/gemma-2b")["error"]
    assert error.startswith(f"google/gemma-2b is not in the cache, and {server.endpoint} cannot be reached (")
    assert error.endswith(
        "): check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give --model a local directory"
    )
    assert "\n" not in error


def break_hub(server: Server, fault: str) -> None:
    if fault == "offline":
        server.start(HF_HUB_OFFLINE="1")
    elif fault == "unreachable":
        server.endpoint = "http://127.0.0.1:1"
        server.start()
    else:
        server.hub.failing = 503


def test_a_model_larger_than_the_disk_is_refused_before_it_is_downloaded(
    hub: HubStandIn, server: Server
) -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 60

    hub.repos["google/gemma-2b"] = CHECKPOINT | {"model-00002-of-00002.safetensors": Huge(b"")}
    error = server.resolve("google/gemma-2b")["error"]
    assert "google/gemma-2b needs 1152921504.6 GB, but" in error
    assert "GB free: make room, or choose another --download-dir" in error
    assert hub.file_requests("GET") == []
