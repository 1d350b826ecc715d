"""The server starts with what the manifests give it: options that it has, and places where it can write."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from server.api_keys import KeyRing, check_exposure
from server.config import ENV_PREFIX, OptionError, load_config, variable_name
from server.options import ServerConfig
from tests.deploy.objects import SINGLE_HOST, environment, server_pod
from tests.deploy.test_workloads import each
from tools.manifests import Combination

WRITTEN = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")
"""Where the server and its libraries write."""
READ = ("HF_TOKEN_PATH", "LD_LIBRARY_PATH")
MOUNTED_BY_GKE = "/usr/local/nvidia/lib64"


def below_a_mount(combination: Combination, path: str, *, written: bool) -> bool:
    """Whether a path is in a volume, into which the server can write or not."""
    pod = server_pod(combination)
    for mount_path, mount in pod.mounts.items():
        if PurePosixPath(path).is_relative_to(mount_path):
            return ("emptyDir" in pod.volumes[mount["name"]]) == written
    return False


@each(SINGLE_HOST)
def test_every_variable_is_an_option_or_a_place(combination: Combination) -> None:
    options = {variable_name(name) for name in ServerConfig.model_fields}
    for name in environment(combination):
        assert name in options or name in WRITTEN + READ, name


@each(SINGLE_HOST)
def test_the_server_takes_the_options_and_knows_whom_to_let_in(
    combination: Combination, tmp_path: Path
) -> None:
    values = environment(combination)
    asks_for_keys = variable_name("api_key_file") in values
    assert asks_for_keys != ("no-keys" in combination.components or combination.overlay == "cpu-demo")
    if asks_for_keys:
        keys = tmp_path / PurePosixPath(values[variable_name("api_key_file")]).name
        keys.write_text("- {name: team, keys: [secret]}")
        values[variable_name("api_key_file")] = str(keys)
    config = load_config([], values)
    check_exposure(config, KeyRing(config))
    assert config.host == "0.0.0.0"
    assert config.log_format == "json"
    batch = config.max_num_batched_tokens
    assert batch is None or batch >= (config.max_num_seqs or 0)


@each(SINGLE_HOST)
def test_what_is_written_can_be_written_and_what_is_read_is_mounted(combination: Combination) -> None:
    values = environment(combination)
    assert set(WRITTEN) <= values.keys()
    for name in WRITTEN:
        assert below_a_mount(combination, values[name], written=True), name
    for name in (*READ, variable_name("api_key_file")):
        if name in values and values[name] != MOUNTED_BY_GKE:
            assert below_a_mount(combination, values[name], written=False), name
    model = values.get(variable_name("model"), "embedded")
    if model.startswith("/"):
        assert below_a_mount(combination, model, written=False)
    else:
        assert model == "embedded" or re.fullmatch(r"gs://YOUR-BUCKET/[\w.-]+", model)
    assert not {"data_dir", "download_dir"} & {
        name for name in ServerConfig.model_fields if variable_name(name) in values
    }


def test_with_its_services_links_the_server_would_not_start() -> None:
    """Why enableServiceLinks is false: Kubernetes would set this for a Service named gemma-server."""
    with pytest.raises(OptionError, match="GEMMA_SERVER_PORT"):
        load_config([], {f"{ENV_PREFIX}PORT": "tcp://10.0.0.1:8000"})
