"""Model files that were made to do harm, or are merely broken: refused for a reason, before memory is taken in
proportion to what they claim, and never executed.

A refusal is one of `REFUSALS`: those become one line in the log and exit code 78 (server/runtime.py).
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.peers.checkpoints import write_gguf
from server.chat_template import ChatMessage, render_chat
from server.engine.build import build_engine
from server.engine.dtype import DType
from server.engine.models import gguf as gguf_module
from server.engine.models.config import ConfigError
from server.engine.models.config_reader import read_gguf, read_hf
from server.engine.models.gguf import GGUFError, GGUFFile, read_metadata
from server.engine.models.loader import LoadError, open_checkpoint
from server.engine.types import EngineConfig
from server.gguf_tokenizer import GGUFTokenizerError, tokenizer_json
from server.model_source import ModelSourceError, resolve
from server.runtime import _read_model
from server.tokenizer import Tokenizer, TokenizerError
from tests.fixtures_tokenizers import make_tiny_tokenizer_json, tiny_vocabulary
from tests.one_torch_thread import one_torch_thread

__all__ = ["one_torch_thread"]

REFUSALS = (ModelSourceError, ValueError, OSError)
SOURCES = sorted((Path(__file__).parents[2] / "server").rglob("*.py"))
MANY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def start(model: Path) -> None:
    """All that a start reads, in the front and then in the engine."""
    files = resolve(str(model))
    _read_model(files)
    config = EngineConfig(
        model_path=str(files.path), device="cpu", num_threads=1, backend="reference", weight_cache=False
    )
    build_engine(config, lambda *_: None)


def refusal(model: Path) -> str:
    """Why a start is refused, after a glance at the memory that it took."""
    tracemalloc.start()
    try:
        with pytest.raises(REFUSALS) as caught:
            start(model)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert len(message) < 1000
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture(scope="module")
def gguf_content(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pieces, types, scores = tiny_vocabulary()
    vocabulary = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny_checkpoint, vocabulary)
    return path.read_bytes()


@pytest.fixture(scope="module")
def arena(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For many files in turn."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("arena") / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_mistreated_here_is_served_when_it_is_whole(
    model: Path, gguf_content: bytes, tmp_path: Path
) -> None:
    start(model)
    (tmp_path / "m.gguf").write_bytes(gguf_content)
    start(tmp_path / "m.gguf")


# --- code --------------------------------------------------------------------------------------------------


@pytest.mark.covers("S07")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "w.pkl", "w.ckpt"])
def test_weights_in_pickles_are_refused_with_the_way_out(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    assert "convert the weights to safetensors" in refusal(model)


@pytest.mark.covers("S06", "S07", "S08")
def test_nothing_in_the_server_can_run_code_from_a_file() -> None:
    """Neither pickles nor templates nor modules: what could do it is imported nowhere and called nowhere."""
    modules = {"jinja2", "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "runpy", "imp"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "importlib.import_module"}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            assert not modules.intersection(names), source
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, source


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch %s') }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
]


@pytest.mark.covers("S06")
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_in_the_model_s_directory_changes_no_token(model: Path, template: str) -> None:
    trace = model.parent / "exploded"

    def rendered() -> list[int]:
        tokenizer = _read_model(resolve(str(model)))[0]
        return render_chat([ChatMessage("user", "hello")], tokenizer).token_ids(tokenizer)

    expected = rendered()
    hostile = template.replace("%s", str(trace))
    (model / "chat_template.jinja").write_text(hostile)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": hostile}))
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": hostile}))
    assert rendered() == expected
    assert not trace.exists()


@pytest.mark.covers("S08")
def test_modules_that_the_configuration_names_are_not_imported(model: Path) -> None:
    trace = model.parent / "exploded"
    (model / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    for name in ("config.json", "generation_config.json"):
        edit_json(model / name, auto_map=auto_map, trust_remote_code=True)
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    start(model)
    assert not trace.exists()


# --- config.json -------------------------------------------------------------------------------------------

HUGE = 10**400
CONFIGURATIONS: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 7),
    ("vocab_size", 10**9),
    ("vocab_size", 300),
    ("hidden_size", 10**12),
    ("intermediate_size", 2**63),
    ("head_dim", -16),
    ("head_dim", 10**6),
    ("head_dim", 16.0),
    ("num_attention_heads", 10**9),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("max_position_embeddings", 10**18),
    ("sliding_window", -1),
    ("rms_norm_eps", HUGE),
    ("rms_norm_eps", float("inf")),
    ("query_pre_attn_scalar", float("nan")),
    ("final_logit_softcapping", -30.0),
    ("layer_types", [["full_attention"]] * 6),
    ("layer_types", [1, "x", None, {}, [], 2.0]),
    ("layer_types", "full_attention"),
    ("rope_parameters", "linear"),
    ("rope_parameters", {"full_attention": [1], "sliding_attention": None}),
    ("rope_parameters", {"full_attention": {"rope_theta": float("inf")}}),
    ("eos_token_id", [[1]]),
    ("eos_token_id", {"a": 1}),
    ("model_type", ["gemma3_text"]),
    ("quantization_config", {"quant_method": "x" * 10**6}),
]


@pytest.mark.covers("S08")
@pytest.mark.parametrize(("key", "value"), CONFIGURATIONS, ids=lambda value: repr(value)[:40])
def test_a_configuration_that_is_absurd_or_a_lie_is_refused(model: Path, key: str, value: Any) -> None:
    edit_json(model / "config.json", **{key: value})
    message = refusal(model)
    assert key in message or "do not fit" in message or "do not belong together" in message


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([-(2**63), 2**31, 2**64, HUGE]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=3),
    st.lists(st.lists(st.none(), max_size=1), max_size=7),
    st.dictionaries(st.sampled_from(["full_attention", "rope_type", "factor", "rope_theta"]), st.integers()),
)
KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "eos_token_id",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "hidden_activation",
    "tie_word_embeddings",
    "quantization_config",
]


@pytest.mark.covers("S08")
@settings(MANY, max_examples=400)
@given(
    model_type=st.sampled_from(["gemma", "gemma2", "gemma3_text"]),
    values=st.dictionaries(st.sampled_from(KEYS), STRANGE, min_size=1, max_size=3),
)
def test_no_configuration_gets_past_config_error(model_type: str, values: dict[str, Any]) -> None:
    try:
        config = read_hf({"model_type": model_type, **values})
        config.kv_groups()
    except ConfigError:
        return
    assert len(config.layers) <= 1024


# --- safetensors -------------------------------------------------------------------------------------------

Header = dict[str, Any]


def rewrite_header(file: Path, change: Callable[[Header], object]) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])


EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def shifted(header: Header) -> None:
    """Two tensors in one place, and a gap."""
    header[EMBEDDING]["data_offsets"] = [offset - 4 for offset in header[EMBEDDING]["data_offsets"]]


def past_the_end(header: Header) -> None:
    header[NORM]["data_offsets"] = [10**9, 10**9 + 256]


def backwards(header: Header) -> None:
    header[NORM]["data_offsets"] = header[NORM]["data_offsets"][::-1]


def of_another_dtype(header: Header) -> None:
    header[NORM] |= {"dtype": "I32"}


def of_no_dtype(header: Header) -> None:
    header[NORM] |= {"dtype": "Q4_K"}


def of_another_shape(header: Header) -> None:
    header[EMBEDDING]["shape"] = header[EMBEDDING]["shape"][::-1]


def of_an_overflowing_shape(header: Header) -> None:
    header[NORM]["shape"] = [2**32, 2**32]


def without_a_tensor(header: Header) -> None:
    header["model.unknown.weight"] = header.pop(NORM)


@pytest.mark.covers("S07")
@pytest.mark.parametrize(
    "damage",
    [
        shifted,
        past_the_end,
        backwards,
        of_another_dtype,
        of_no_dtype,
        of_another_shape,
        of_an_overflowing_shape,
        without_a_tensor,
    ],
)
def test_a_safetensors_header_that_lies_is_refused(model: Path, damage: Callable[[Header], object]) -> None:
    rewrite_header(model / "model.safetensors", damage)
    assert "safetensors" in (message := refusal(model)) or "do not fit" in message


@pytest.mark.covers("S07")
@pytest.mark.parametrize("size", [0, 1, 10**9, 2**40, 2**64 - 1])
def test_a_safetensors_header_of_an_absurd_size_is_refused(model: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    if size == 10**9:
        os.truncate(file, 2 * 10**9)  # sparse: it claims a gigabyte, and has it
    assert "cannot be read as safetensors" in refusal(model)


@pytest.fixture(scope="module")
def small_file(tiny_checkpoint: Path) -> bytes:
    return (tiny_checkpoint / "model.safetensors").read_bytes()


mutations = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
)


def mutated(content: bytes, end: int, changes: list[tuple[float, bytes]]) -> bytes:
    """Overwritten in some places before `end`."""
    result = bytearray(content)
    for place, new in changes:
        start = int(place * end)
        result[start : start + len(new)] = new
    return bytes(result)


@pytest.mark.covers("S07")
@MANY
@given(changes=mutations)
def test_no_damage_to_a_safetensors_file_gets_past_load_error(
    arena: Path, small_file: bytes, changes: list[tuple[float, bytes]]
) -> None:
    (size,) = struct.unpack("<Q", small_file[:8])
    (arena / "model.safetensors").write_bytes(mutated(small_file, 8 + size, changes))
    read_whole(arena)


@pytest.mark.covers("S07")
@MANY
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.one_of(
        STRANGE,
        st.lists(st.integers(0, 2**64), max_size=5),
        st.sampled_from(["F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64"]),
    ),
)
def test_no_value_in_a_safetensors_header_gets_past_load_error(
    arena: Path, small_file: bytes, field: str, value: Any
) -> None:
    file = arena / "model.safetensors"
    file.write_bytes(small_file)
    rewrite_header(file, lambda header: header[NORM].__setitem__(field, value))
    read_whole(arena)


def read_whole(path: Path) -> None:
    try:
        for _, tensor in open_checkpoint(path).tensors(DType.FLOAT32, "cpu"):
            assert tensor.ndim in (1, 2)
    except (LoadError, ConfigError, GGUFError):
        pass


# --- files that are others ---------------------------------------------------------------------------------


@pytest.mark.covers("S07")
def test_the_links_of_a_hub_cache_are_followed(model: Path) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(f"../blobs/{number:064x}")
    start(model)


@pytest.mark.covers("S07")
def test_a_shard_that_is_a_link_to_something_else_is_refused_without_telling_what_is_in_it(model: Path) -> None:
    secret = model.parent / "secret"
    secret.write_text("hunter2 " * 100)
    (model / "a.safetensors").symlink_to(secret)
    index = {"weight_map": {NORM: "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "hunter2" not in refusal(model)


@pytest.mark.covers("S07", "S08", "S09")
@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_without_an_end_is_refused(model: Path, name: str, target: str) -> None:
    (model / name).unlink()
    if target == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to(target)
    assert "regular file" in refusal(model)


@pytest.mark.covers("S07")
@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {NORM: 1}, {NORM: ["a"]}, {NORM: "/etc/passwd"}, {NORM: "../model.safetensors"}]
)
def test_an_index_that_names_no_shards_beside_it_is_refused(model: Path, weight_map: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refusal(model)


# --- GGUF --------------------------------------------------------------------------------------------------


@pytest.mark.covers("S07")
@MANY
@given(changes=mutations)
def test_no_damage_to_a_gguf_file_gets_past_its_errors(
    arena: Path, gguf_content: bytes, changes: list[tuple[float, bytes]]
) -> None:
    path = arena / "m.gguf"
    path.write_bytes(gguf_content)
    with GGUFFile.open(path) as file:
        end = min(tensor.offset for tensor in file.tensors.values())
    path.write_bytes(mutated(gguf_content, end, changes))
    read_whole(path)
    try:
        made = tokenizer_json(read_metadata(path))
    except (GGUFError, GGUFTokenizerError):
        return
    try:
        (arena / "made.json").write_bytes(made)
        Tokenizer.from_file(arena / "made.json")
    except TokenizerError:
        pass


@pytest.mark.covers("S07")
@settings(MANY, max_examples=400)
@given(data=st.data())
def test_no_metadata_of_a_gguf_file_gets_past_config_error(
    arena: Path, gguf_content: bytes, data: st.DataObject
) -> None:
    path = arena / "whole.gguf"
    if not path.exists():
        path.write_bytes(gguf_content)
    metadata: dict[str, Any] = dict(read_metadata(path, with_pieces=False))
    optional = ["gemma3.vocab_size", "gemma3.rope.scaling.type", "gemma3.rope.scaling.factor"]
    keys = data.draw(st.lists(st.sampled_from([*metadata, *optional]), min_size=1, max_size=3))
    metadata |= {key: data.draw(STRANGE) for key in keys}
    try:
        read_gguf(metadata)
    except ConfigError:
        pass


@pytest.mark.covers("S07")
def test_what_a_gguf_header_takes_is_bounded_however_large_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "MAX_HEADER_BYTES", 1 << 16)
    key = struct.pack("<Q", 1) + b"k"
    count = 1 << 30
    numbers = struct.pack("<IIQ", 9, 0, count)
    path = tmp_path / "m.gguf"
    for value in (numbers, struct.pack("<IQ", 8, count), struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", count)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value)
        os.truncate(path, 2 * count)
        with pytest.raises(GGUFError, match="of the limit of 65536 bytes for a header"):
            GGUFFile.open(path)


@pytest.mark.covers("S09")
def test_pieces_whose_merges_would_take_minutes_are_refused() -> None:
    pieces, types, scores = tiny_vocabulary()
    long = ["a" * length for length in range(900, 1000)] + [f"{number:0999}" for number in range(400)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + long,
        "tokenizer.ggml.token_type": types + [1] * len(long),
        "tokenizer.ggml.scores": scores + [0.0] * len(long),
    }
    with pytest.raises(GGUFTokenizerError, match="longer than any vocabulary's"):
        tokenizer_json(metadata)


# --- tokenizer.json ----------------------------------------------------------------------------------------


def tokenizer_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(make_tiny_tokenizer_json())
    change(content)
    return json.dumps(content).encode()


def with_a_regular_expression(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pattern"] = {"Regex": "(a+)+$"}


def with_one_in_a_sequence(content: dict[str, Any]) -> None:
    hidden = {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], hidden]}


def with_a_long_replacement(content: dict[str, Any]) -> None:
    content["normalizer"]["content"] = "▁" * 10**6


def of_another_model(content: dict[str, Any]) -> None:
    """Of more tokens than the embedding has rows."""
    content["added_tokens"] += [
        content["added_tokens"][0] | {"id": len(content["model"]["vocab"]) + number, "content": f"<new{number}>"}
        for number in range(3)
    ]


def with_control_tokens_beyond_the_rows(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<bos>"] = 10**9
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<bos>"]


def without_a_start_of_sequence(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<b_o_s>"] = content["model"]["vocab"].pop("<bos>")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<bos>"]


def nested(content: dict[str, Any]) -> None:
    for _ in range(500):
        content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}


@pytest.mark.covers("S09")
@pytest.mark.parametrize(
    "change",
    [
        with_a_regular_expression,
        with_one_in_a_sequence,
        with_a_long_replacement,
        of_another_model,
        with_control_tokens_beyond_the_rows,
        without_a_start_of_sequence,
        nested,
    ],
)
def test_a_tokenizer_that_is_a_trap_or_another_model_s_is_refused(
    model: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    (model / "tokenizer.json").write_bytes(tokenizer_with(change))
    assert "tokenizer" in refusal(model)


@pytest.mark.covers("S09")
def test_a_tokenizer_far_smaller_than_the_embedding_is_another_model_s(tiny_tokenizer: Tokenizer) -> None:
    tiny_tokenizer.check_fits(tiny_tokenizer.vocab_size + 1024)
    with pytest.raises(TokenizerError, match="do not belong together"):
        tiny_tokenizer.check_fits(tiny_tokenizer.vocab_size + 1025)


@pytest.mark.covers("S09")
def test_the_official_tokenizer_fits_the_models_without_images(gemma3_tokenizer: Tokenizer) -> None:
    for num_embeddings in (262_144, 262_145, 262_208):
        gemma3_tokenizer.check_fits(num_embeddings)
    with pytest.raises(TokenizerError, match="do not belong together"):
        gemma3_tokenizer.check_fits(256_000)


@pytest.mark.covers("S09")
def test_a_tokenizer_of_hundreds_of_megabytes_is_refused_unread(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 1 << 30)
    assert "regular file of at most" in refusal(model)


PARTS = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens", "truncation"]


@pytest.mark.covers("S09")
@MANY
@given(
    part=st.sampled_from(PARTS),
    inner=st.sampled_from(["type", "vocab", "merges", "unk_token", "content", "decoders", "id", "pattern", None]),
    value=st.one_of(
        STRANGE,
        st.sampled_from(["<pad>", "BPE", "Unigram", "WordPiece", "WordLevel", "Sequence", "ByteLevel"]),
        st.dictionaries(st.text(max_size=4), st.integers(-1, 2**32), max_size=4),
        st.lists(st.one_of(st.text(max_size=5), st.lists(st.text(max_size=3), max_size=3)), max_size=3),
    ),
)
def test_no_damage_to_a_tokenizer_gets_past_its_error(
    arena: Path, part: str, inner: str | None, value: Any
) -> None:
    def change(content: dict[str, Any]) -> None:
        target = content[part][0] if part == "added_tokens" else content[part]
        if inner is None or not isinstance(target, dict):
            content[part] = value
        else:
            target[inner] = value

    file = arena / "tokenizer.json"
    file.write_bytes(tokenizer_with(change))
    try:
        tokenizer = Tokenizer.from_file(file)
        tokenizer.check_fits(tokenizer.vocab_size)
        tokenizer.decode(tokenizer.encode_prompt("a user <bos> é"))
    except TokenizerError:
        pass


@pytest.mark.covers("S07")
def test_a_checkpoint_without_some_of_its_tensors_names_them(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights[NORM]
    save_file(weights, model / "model.safetensors")
    assert "1 missing: norm.weight" in refusal(model)
