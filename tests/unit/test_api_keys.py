"""Where keys come from, and what is said when they cannot be used: never a key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main
from server.api_keys import KeyRing, Limits, check_exposure
from server.config import OptionError, load_config
from server.options import ServerConfig

CANARY = "sk-canary-1234"


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def ring(path: Path | None = None, **options: Any) -> KeyRing:
    return KeyRing(ServerConfig(api_key_file=path, **options))


def id_of(keys: KeyRing, key: str) -> str | None:
    found = keys.find(key.encode())
    return found and found.id


@pytest.mark.covers("S03")
def test_keys_come_from_a_file_one_a_line_as_they_are_or_hashed(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"second").hexdigest()
    path = write(tmp_path / "keys", f"# ours\n\n  first \nsha256:{hashed}\n")
    keys = ring(path, api_key=["third"])
    ids = {id_of(keys, key) for key in ("first", "second", "third")}
    assert len(ids) == 3
    assert None not in ids
    for wrong in ("", "fourth", "# ours", hashed, f"sha256:{hashed}", " first"):
        assert id_of(keys, wrong) is None, wrong


def test_entries_of_a_yaml_file_have_names_limits_and_several_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys.yaml",
        f"""
- name: team-a
  keys: [old, new]
  max-sequences: 4
  tokens-per-minute: null
- name: ops
  keys: ["sha256:{hashlib.sha256(b"root").hexdigest().upper()}"]
  admin: true
  least-priority: -5
""",
    )
    keys = ring(path, requests_per_minute=60, tokens_per_minute=1000)
    old, ops = keys.find(b"old"), keys.find(b"root")
    assert old is not None
    assert old == keys.find(b"new")
    assert (old.limits, old.least_priority, old.is_admin) == (Limits(4, 60, None), 0, False)
    assert ops is not None
    assert (ops.limits, ops.least_priority, ops.is_admin) == (Limits(None, 60, 1000), -5, True)
    assert keys.has_admin


@pytest.mark.covers("S02")
def test_every_key_is_compared_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    keys = ring(api_key=[f"key-{number}" for number in range(20)])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("key-0", "key-19", "key-", "x", ""):
        compared.clear()
        keys.find(key.encode())
        assert len(compared) == 20
        assert {len(each) for pair in compared for each in pair} == {32}, "not digests"


@pytest.mark.covers("S03")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("keys", "", "no key"),
        ("keys", "# nothing\n", "no key"),
        ("keys", f"{CANARY}\n{CANARY}\n", "twice"),
        ("keys", f"sha256:{CANARY}\n", "64 hexadecimal digits"),
        ("keys", "sha256:abcd\n", "64 hexadecimal digits"),
        ("keys.yaml", "", "valid list"),
        ("keys.yaml", f"- !!int {CANARY}\n", "YAML"),
        ("keys.yaml", f"- name: 2024-02-30\n  keys: [{CANARY}]\n", "YAML"),
        ("keys.yaml", "[" * 3000, "YAML"),
        ("keys.json", f'[{{"name": "a", "keys": ["{CANARY}\\ud800"]}}]', "surrogate"),
        ("keys.yaml", f"- {CANARY}\n", "0"),
        ("keys.yaml", f"{CANARY}: [\n", "line 2"),
        ("keys.yaml", f"- *{CANARY}\n", "line 1"),
        ("keys.yaml", f"- {CANARY}: 1\n", "0"),
        ("keys.yaml", f"- name: a\n  keys: {CANARY}\n", "0.keys"),
        ("keys.yaml", f"- name: a\n  keys: [{CANARY}, 5]\n", "0.keys.1"),
        ("keys.yaml", "- name: a\n  keys: []\n", "0.keys"),
        ("keys.yaml", f"- name: {CANARY}/b\n  keys: [x]\n", "0.name"),
        ("keys.yaml", f"- name: a\n  keys: [{CANARY}]\n  max-sequences: 0\n", "0.max-sequences"),
        ("keys.yaml", f"- name: a\n  keys: [{CANARY}]\n  limit: 0\n", "0"),
        ("keys.yaml", f"- name: a\n  keys: [{CANARY}]\n- name: a\n  keys: [y]\n", "one name"),
        ("keys.yaml", f"- name: a\n  keys: [{CANARY}]\n- name: b\n  keys: [{CANARY}]\n", "twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_without_a_word_of_it(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(OptionError) as caught:
        ring(path)
    message = str(caught.value).replace(str(path), "FILE")
    assert message.startswith("--api-key-file FILE: ")
    assert said in message
    assert CANARY not in message


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xff")
    for name in ("keys", "none"):
        with pytest.raises(OptionError, match=name):
            ring(tmp_path / name)


@pytest.mark.covers("S03")
def test_another_file_takes_over_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys", "old\n")
    keys = ring(path, api_key=["given"])
    path.write_text("old\nnew\n")
    assert id_of(keys, "new") is None
    with caplog.at_level(logging.INFO):
        keys.reload()
        assert id_of(keys, "new")
        path.write_text("new\n")
        keys.reload()
        assert id_of(keys, "old") is None
        for broken in ("", f"sha256:{CANARY}"):
            path.write_text(broken)
            keys.reload()
            assert id_of(keys, "new")
        path.unlink()
        keys.reload()
    assert id_of(keys, "new")
    assert id_of(keys, "given")
    assert CANARY not in caplog.text


@pytest.mark.covers("S03")
def test_neither_a_mistake_in_the_options_nor_their_repr_shows_a_key(tmp_path: Path) -> None:
    path = write(tmp_path / "server.yaml", f"api-key: {CANARY}\nport: many\napikey: {CANARY}\n")
    with pytest.raises(OptionError) as caught:
        load_config(["--config", str(path)], {})
    assert "api_key: Input should be a valid list" in str(caught.value)
    assert "many" in str(caught.value)
    assert CANARY not in str(caught.value)
    path.write_text(f"api-key: *{CANARY}\n")
    with pytest.raises(OptionError, match="line 1") as caught:
        load_config(["--config", str(path)], {})
    assert CANARY not in str(caught.value)
    assert CANARY not in repr(ServerConfig(api_key=[CANARY]))


# --- the address -------------------------------------------------------------------------------------------


@pytest.mark.covers("S21")
@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    config = ServerConfig(host=host)
    check_exposure(config, KeyRing(config))


@pytest.mark.covers("S21")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.com", "localhost.example.com"])
def test_other_machines_are_let_in_with_a_key_or_a_word(host: str) -> None:
    def check(**options: Any) -> None:
        config = ServerConfig(host=host, **options)
        check_exposure(config, KeyRing(config))

    with pytest.raises(OptionError, match="--allow-unauthenticated"):
        check()
    check(api_key=["a"])
    check(allow_unauthenticated=True)


@pytest.mark.covers("S21")
def test_a_server_that_would_be_open_to_all_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert ServerConfig().host == "127.0.0.1"
    assert main(["serve", "--host", "0.0.0.0"]) == os.EX_CONFIG
    assert "--api-key-file" in capsys.readouterr().err
