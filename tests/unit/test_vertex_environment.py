from __future__ import annotations

from pathlib import Path

import pytest

from server.config import OptionError, load_config

ON_VERTEX = {"AIP_HTTP_PORT": "8085", "AIP_MODE": "PREDICTION"}


def test_the_platforms_variables_are_options() -> None:
    config = load_config(
        [],
        {
            **ON_VERTEX,
            "AIP_HEALTH_ROUTE": "/h",
            "AIP_PREDICT_ROUTE": "/p",
            "AIP_STORAGE_URI": "gs://bucket/model",
            "MODEL_ID": "google/gemma-2b-it",
        },
    )
    assert (config.host, config.port, config.allow_unauthenticated) == ("0.0.0.0", 8085, True)
    assert (config.health_route, config.predict_route) == ("/h", "/p")
    assert config.model == "gs://bucket/model"
    assert config.log_format == "json"


def test_without_a_copy_of_the_model_its_id_counts() -> None:
    config = load_config([], {**ON_VERTEX, "AIP_STORAGE_URI": "", "MODEL_ID": "google/gemma-2b-it"})
    assert config.model == "google/gemma-2b-it"


def test_routes_that_are_not_given_follow_from_the_endpoints_ids() -> None:
    config = load_config([], {"AIP_MODE": "PREDICTION", "AIP_ENDPOINT_ID": "1", "AIP_DEPLOYED_MODEL_ID": "2"})
    assert config.port == 8080
    assert config.health_route == "/v1/endpoints/1/deployedModels/2"
    assert config.predict_route == "/v1/endpoints/1/deployedModels/2:predict"


def test_the_command_line_and_our_own_variables_win_and_a_file_does_not(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 1\nmodel: from-file\nmax-num-seqs: 3")
    environment = {**ON_VERTEX, "AIP_STORAGE_URI": "gs://b/m", "GEMMA_SERVER_PORT": "2"}
    config = load_config(["--config", str(file), "--model", "embedded"], environment)
    assert (config.port, config.model, config.max_num_seqs) == (2, "embedded", 3)
    assert load_config(["--config", str(file)], environment).model == "gs://b/m"


def test_a_file_wins_over_what_is_only_assumed(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("host: 127.0.0.1\nport: 7\nallow-unauthenticated: false\nlog-format: text")
    config = load_config(["--config", str(file)], {"AIP_MODE": "PREDICTION"})
    assert (config.host, config.port) == ("127.0.0.1", 7)
    assert (config.allow_unauthenticated, config.log_format) == (False, "text")
    assert load_config(["--config", str(file)], ON_VERTEX).port == 8085, "which the platform says"


def test_elsewhere_the_variables_mean_nothing() -> None:
    config = load_config([], {"MODEL_ID": "x", "AIP_STORAGE_URI": "gs://b/m", "AIP_HEALTH_ROUTE": "/h"})
    assert (config.model, config.host, config.health_route) == ("embedded", "127.0.0.1", None)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AIP_HTTP_PORT", "tcp://x"), ("AIP_HEALTH_ROUTE", "h"), ("AIP_PREDICT_ROUTE", "/a/{b}")],
)
def test_a_value_that_cannot_be_used_is_named(variable: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"environment variable {variable}"):
        load_config([], {**ON_VERTEX, variable: value})
