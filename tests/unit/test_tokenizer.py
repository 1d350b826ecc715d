from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers

from server.tokenizer import InvalidTextError, Tokenizer, TokenizerError
from tests.fixtures_tokenizers import make_tiny_tokenizer_json, token_vectors

VECTORS = token_vectors()
CONTROL_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
FAMILIES = [("gemma1_2", "gemma2_tokenizer"), ("gemma3", "gemma3_tokenizer")]


@pytest.mark.parametrize(("family", "fixture"), FAMILIES)
@pytest.mark.parametrize("vector", VECTORS, ids=[ascii(vector["text"])[:30] for vector in VECTORS])
def test_control_aware_encoding_equals_the_official_parser(
    family: str, fixture: str, vector: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(fixture)
    assert tokenizer.encode_controls(vector["text"]) == vector[family]


@pytest.mark.parametrize("fixture", ["gemma2", "gemma3"])
def test_splitting_at_control_tokens_equals_the_librarys_own_parse(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    ours: Tokenizer = request.getfixturevalue(f"{fixture}_tokenizer")
    theirs = tokenizers.Tokenizer.from_file(str(request.getfixturevalue(f"{fixture}_tokenizer_file")))
    rng = random.Random(7)
    parts = [
        *CONTROL_PIECES,
        "<start_of_image>",
        "<image_soft_token>",
        "<mask>",
        "<unused5>",
        "[multimodal]",
        "<b>",
    ]
    parts += [
        "\n",
        "\n\n\n",
        " ",
        "    ",
        "▁",
        "<",
        "<<",
        ">",
        "user\n",
        "Hello",
        "日本",
        "\t\t",
        "<start_of",
        "12",
    ]
    for _ in range(1000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        assert ours.encode_controls(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.covers("S12")
def test_text_mode_never_yields_a_control_token(real_tokenizer: Tokenizer) -> None:
    rng = random.Random(8)
    parts = [
        *CONTROL_PIECES,
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
        "<",
        "a",
        " ",
        "\n",
        ">",
    ]
    texts = [*CONTROL_PIECES, "<end_of_turn>\n<start_of_turn>model\n", "<image_soft_token>"]
    texts += ["".join(rng.choices(parts, k=rng.randint(1, 10))) for _ in range(1000)]
    for text in texts:
        ids = real_tokenizer.encode_text(text)
        assert not real_tokenizer.control_token_ids.intersection(ids), repr(text)
        assert real_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_ids_that_the_server_needs_are_those_of_the_families(
    gemma2_tokenizer: Tokenizer, gemma3_tokenizer: Tokenizer
) -> None:
    for tokenizer, turn_ids, size in (
        (gemma2_tokenizer, (106, 107), 256000),
        (gemma3_tokenizer, (105, 106), 262145),
    ):
        assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
        assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == turn_ids
        assert tokenizer.vocab_size == size
        assert tokenizer.control_token_ids >= {0, 1, 2, 3, *turn_ids}


@pytest.mark.parametrize("text", ["Hi", "<bos>Hi", "<bos><bos><bos>Hi"])
def test_a_prompt_begins_with_exactly_one_bos(real_tokenizer: Tokenizer, text: str) -> None:
    assert real_tokenizer.encode_prompt(text) == [2, *real_tokenizer.encode_text("Hi")]


def test_a_bos_inside_a_prompt_stays(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.encode_prompt("<bos>a<bos>b").count(2) == 2


def test_an_empty_prompt_is_one_bos(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.encode_prompt("") == [2]
    assert real_tokenizer.encode_text("") == []


def test_an_image_token_in_a_prompt_yields_an_id_that_vocab_size_covers(gemma3_tokenizer: Tokenizer) -> None:
    (_, token_id) = gemma3_tokenizer.encode_prompt("<image_soft_token>")
    assert token_id == 262144 == gemma3_tokenizer.vocab_size - 1


@pytest.mark.parametrize("method", ["encode_text", "encode_controls", "encode_prompt"])
def test_a_lone_surrogate_is_refused_by_its_code_point(tiny_tokenizer: Tokenizer, method: str) -> None:
    with pytest.raises(InvalidTextError, match=r"U\+D83D"):
        getattr(tiny_tokenizer, method)("ab\ud83dcd")


@pytest.mark.parametrize(
    ("fixture", "token_id", "expected"),
    [
        ("gemma2_tokenizer", 25957, b" Hello"),
        ("gemma2_tokenizer", 226, b"\t"),
        ("gemma2_tokenizer", 457, b"\xf0"),
        ("gemma2_tokenizer", 108, b"\n"),
        ("gemma3_tokenizer", 26352, b" Hello"),
        ("gemma3_tokenizer", 255968, b"\t"),
        ("gemma3_tokenizer", 247, b"\x09"),
        ("gemma3_tokenizer", 478, b"\xf0"),
        ("gemma3_tokenizer", 138, b"  "),
        ("gemma3_tokenizer", 106, b"<end_of_turn>"),
        ("gemma3_tokenizer", 262145, b""),
        ("gemma3_tokenizer", -1, b""),
    ],
)
def test_token_bytes(fixture: str, token_id: int, expected: bytes, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(fixture).token_bytes(token_id) == expected


def test_token_text_of_a_part_of_a_character_is_the_replacement_character(gemma3_tokenizer: Tokenizer) -> None:
    assert gemma3_tokenizer.token_text(478) == "\ufffd"
    assert gemma3_tokenizer.token_text(26352) == " Hello"


@pytest.mark.parametrize("fixture", ["gemma2", "gemma3"])
def test_decode_equals_the_librarys_wherever_the_bytes_are_text(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    ours: Tokenizer = request.getfixturevalue(f"{fixture}_tokenizer")
    theirs = tokenizers.Tokenizer.from_file(str(request.getfixturevalue(f"{fixture}_tokenizer_file")))
    byte_ids = [token_id for token_id in range(600) if theirs.id_to_token(token_id).startswith("<0x")]
    first_byte = theirs.token_to_id("<0x00>")
    assert first_byte in byte_ids
    rng = random.Random(9)
    for _ in range(2000):
        ids = [rng.randrange(600, ours.vocab_size) for _ in range(rng.randint(0, 8))]
        ids += [first_byte + byte for byte in chr(rng.randrange(0x10000, 0x14000)).encode()] * rng.randint(0, 2)
        ids += rng.choices(range(first_byte), k=3)
        ids += [first_byte + rng.randrange(0x80, 0xC0)] * rng.randint(0, 3)  # wholly invalid
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_decode_keeps_the_characters_before_a_cut_one(gemma3_tokenizer: Tokenizer) -> None:
    ids = gemma3_tokenizer.encode_text("𓀀𓀁")
    assert gemma3_tokenizer.decode(ids[:-1]) == "𓀀\ufffd\ufffd\ufffd"


def test_decode_keeps_spaces_at_the_start(real_tokenizer: Tokenizer) -> None:
    for text in (" Hello", "   ", "\n Hello"):
        assert real_tokenizer.decode(real_tokenizer.encode_text(text)) == text


def test_unsampleable_ids_are_rows_without_a_piece_and_image_tokens(
    gemma2_tokenizer: Tokenizer, gemma3_tokenizer: Tokenizer
) -> None:
    assert list(gemma2_tokenizer.unsampleable_ids(256000)) == []
    assert sorted(gemma2_tokenizer.unsampleable_ids(256003)) == [256000, 256001, 256002]
    assert sorted(gemma3_tokenizer.unsampleable_ids(262144)) == [255999, 256000]
    assert sorted(gemma3_tokenizer.unsampleable_ids(262147)) == [255999, 256000, 262144, 262145, 262146]


def test_turn_tokens_are_control_even_where_the_file_does_not_say_so() -> None:
    content = json.loads(make_tiny_tokenizer_json())
    content["added_tokens"] = [
        {**token, "special": False} for token in content["added_tokens"] if token["content"] != "<end_of_turn>"
    ]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    assert tokenizer.control_token_ids == {0, 1, 2, 3, 4, 5}
    assert tokenizer.encode_controls("<start_of_turn>a<end_of_turn>") == [4, *tokenizer.encode_text("a"), 5]
    assert not tokenizer.control_token_ids.intersection(tokenizer.encode_text("<start_of_turn><end_of_turn>"))


@pytest.mark.covers("S09")
def test_a_file_that_is_no_tokenizer_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a readable"):
        Tokenizer.from_file(path)


@pytest.mark.covers("S09")
def test_a_tokenizer_of_another_kind_is_refused() -> None:
    content = json.loads(make_tiny_tokenizer_json())
    other = {
        **content,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    with pytest.raises(TokenizerError, match="ByteLevel"):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(other)))


@pytest.mark.covers("K05")
def test_no_text_is_kept(tiny_tokenizer: Tokenizer) -> None:
    chance, process = random.Random(1), psutil.Process()

    def encode_some(count: int) -> None:
        for _ in range(count):
            tiny_tokenizer.encode_text("".join(chance.choices("abcdefghij ", k=200)))

    encode_some(200)
    before = process.memory_info().rss
    encode_some(1000)
    assert process.memory_info().rss - before < 2 << 20, "9 KB for each, if they were kept"


@pytest.mark.covers("S09")
def test_a_tokenizer_that_is_not_bpe_is_refused() -> None:
    content = json.loads(make_tiny_tokenizer_json())
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "<unk>"}
    with pytest.raises(TokenizerError, match="model is WordLevel; Gemma's is BPE"):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


@pytest.mark.covers("S09")
def test_a_tokenizer_without_bos_is_refused() -> None:
    backend = tokenizers.Tokenizer.from_buffer(make_tiny_tokenizer_json().replace(b"<bos>", b"<b_o_s>"))
    with pytest.raises(TokenizerError, match="no <bos> token"):
        Tokenizer(backend)


@pytest.mark.covers("S23")
def test_the_text_of_a_million_tokens_takes_no_time(tiny_tokenizer: Tokenizer) -> None:
    ids = list(range(300)) * 5000
    started = time.process_time()
    text = tiny_tokenizer.decode(ids)
    assert time.process_time() - started < 1
    assert text == tiny_tokenizer.decode(ids[:300]) * 5000
