"""Options: one declaration, three sources, and mistakes that are named by where they were made."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import OptionError, load_config, unknown_variables


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmax-num-seqs: 5\nblock_size: 32\n")
    environment = {"GEMMA_SERVER_PORT": "2", "GEMMA_SERVER_MAX_NUM_SEQS": "6"}
    config = load_config(["--config", str(file), "--port", "3"], environment)
    assert (config.port, config.max_num_seqs, config.block_size, config.max_body_bytes) == (3, 6, 32, 16 << 20)


def test_config_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model: /models/gemma\n")
    assert load_config([], {"GEMMA_SERVER_CONFIG": str(file)}).model == "/models/gemma"


def test_lists_come_as_words_on_the_command_line_and_with_commas_in_the_environment() -> None:
    assert load_config(["--served-model-name", "a", "b"], {}).served_model_name == ["a", "b"]
    assert load_config(["--api-key", "a", "--api-key", "b"], {}).api_key == ["a", "b"]
    assert load_config([], {"GEMMA_SERVER_API_KEY": "a,b"}).api_key == ["a", "b"]


def test_switches_can_be_turned_off() -> None:
    assert load_config([], {}).enable_prefix_caching
    assert not load_config(["--no-enable-prefix-caching"], {}).enable_prefix_caching
    assert not load_config([], {"GEMMA_SERVER_ENABLE_PREFIX_CACHING": "false"}).enable_prefix_caching


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--port", "many"], {}, "--port"),
        (["--max-num-seqs", "0"], {}, "--max-num-seqs"),
        (["--dtype", "int3"], {}, "--dtype"),
        ([], {"GEMMA_SERVER_GPU_MEMORY_UTILIZATION": "7"}, "GEMMA_SERVER_GPU_MEMORY_UTILIZATION"),
    ],
)
def test_a_bad_value_is_named_with_its_source(
    arguments: list[str], environment: dict[str, str], named: str
) -> None:
    with pytest.raises(OptionError, match=named):
        load_config(arguments, environment)


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("prot: 8000\n")
    with pytest.raises(OptionError, match="prot"):
        load_config(["--config", str(file)], {})


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\xff"])
def test_a_file_that_holds_no_options_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(OptionError, match=r"server\.yaml"):
        load_config(["--config", str(file)], {})


def test_variables_that_are_no_option_s_are_named_with_what_may_be_meant() -> None:
    environment = {
        "GEMMA_SERVER_MAX_NUM_SEQ": "8",
        "GEMMA_SERVER_ZZZZZZZZZZ": "1",
        "GEMMA_SERVER_CONFIG": "/x",
        "GEMMA_SERVER_PORT": "1",
        "MAX_NUM_SEQ": "8",
    }
    assert list(unknown_variables(environment)) == [
        "the environment variable GEMMA_SERVER_MAX_NUM_SEQ is no option's, and is ignored; did you mean "
        "GEMMA_SERVER_MAX_NUM_SEQS?",
        "the environment variable GEMMA_SERVER_ZZZZZZZZZZ is no option's, and is ignored",
    ]
