"""A signature says who, over exactly which bytes; a key that others may read is none."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, RunError
from common.signing import (
    DOMAIN,
    Statement,
    fingerprint,
    load_key,
    new_key,
    parse_public,
    payload_sha256,
    public_text,
    sign,
    verify,
    write_secret,
)
from common.terminal import escaped

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
STATEMENT = Statement(
    site="a",
    kind="SiteUpdate",
    run="r",
    arm="federated",
    round=3,
    payload_sha256=payload_sha256(b"x"),
    nonce="ab12",
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def refused(text: str | bytes, signature: bytes, key: Ed25519PrivateKey = KEY, **domain: bytes) -> None:
    with pytest.raises(RunError) as caught:
        verify(text, signature, key.public_key(), **domain)
    assert caught.value.code == "bad-signature"


@given(TEXTS)
def test_what_was_signed_verifies_under_this_key_alone(text: str) -> None:
    signature = sign(text, KEY)
    verify(text, signature, KEY.public_key())
    verify(text.encode(), signature, KEY.public_key())
    refused(text, signature, OTHER)


@given(st.data())
def test_one_changed_bit_of_text_or_signature_is_refused(data: st.DataObject) -> None:
    text, signature = STATEMENT.text().encode(), sign(STATEMENT.text(), KEY)
    whole = bytearray(text + signature)
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    refused(bytes(whole[: len(text)]), bytes(whole[len(text) :]))


@given(st.binary(max_size=130))
def test_bytes_that_are_no_signature_are_refused(signature: bytes) -> None:
    refused("text", signature)


def test_a_signature_in_one_domain_is_none_in_another() -> None:
    refused("text", sign("text", KEY, b"fedqc kit v1\0"))
    refused("text", sign("text", KEY), domain=b"fedqc request v1\0")
    refused(DOMAIN.decode() + "text", sign("text", KEY))
    assert DOMAIN.endswith(b"\0"), "else a longer domain could continue as a text of this one"


@given(TEXTS, st.sampled_from(["site", "kind", "run", "arm", "nonce"]))
def test_a_statement_reads_back_as_it_was_signed(text: str, name: str) -> None:
    text = "".join(one for one in text if one == escaped(one) and one not in "\n\t")
    said = STATEMENT.model_copy(update={name: text})
    assert Statement.parse(said.text()) == said


@pytest.mark.parametrize("name", [name for name in Statement.model_fields if name != "round"])
def test_every_field_of_a_statement_is_under_the_signature(name: str) -> None:
    refused(STATEMENT.model_copy(update={name: "z"}).text(), sign(STATEMENT.text(), KEY))
    refused(STATEMENT.model_copy(update={"round": 4}).text(), sign(STATEMENT.text(), KEY))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "7",
        "[" * 100_000,
        '{"kind": "x", "payload_sha256": "", "nonce": "", "more": 1}',
        '{"kind": "x", "payload_sha256": "", "nonce": "", "round": -1}',
        '{"kind": "x", "payload_sha256": "", "nonce": "", "round": true}',
        '{"kind": "x", "payload_sha256": "", "nonce": "", "round": "3"}',
        '{"kind": 7, "payload_sha256": "", "nonce": ""}',
        '{"kind": "\\ud800", "payload_sha256": "", "nonce": ""}',
        '{"kind": "\ud800", "payload_sha256": "", "nonce": ""}',
        '{"kind": "x", "payload_sha256": "", "nonce": "' + "a" * 65 + '"}',
    ],
    ids=[
        "empty",
        "no-fields",
        "list",
        "number",
        "deep",
        "a-field-more",
        "round",
        "bool",
        "text",
        "kind",
        "escaped",
        "surrogate",
        "long",
    ],
)
def test_text_that_is_no_statement_is_refused(text: str) -> None:
    with pytest.raises(RunError) as caught:
        Statement.parse(text)
    assert caught.value.code == "bad-signature"


@given(TEXTS)
def test_any_text_is_a_statement_or_refused(text: str) -> None:
    with pytest.raises(RunError):
        Statement.parse(text)


def test_a_key_survives_the_disk_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "signing.key"
    before = os.umask(0)
    try:
        made = new_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert public_text(load_key(path)) == public_text(made)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    new_key(tmp_path / "key")
    held = (tmp_path / "key").read_bytes()
    for attempt in (lambda: new_key(tmp_path / "key"), lambda: write_secret(tmp_path / "key", b"x")):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert caught.value.code == "key-exists"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        write_secret(tmp_path / "link", b"x")
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "key").read_bytes() == held


def test_a_secret_that_could_not_be_written_whole_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError) as caught:
        write_secret(tmp_path / "key", b"x")
    assert caught.value.code == "not-writable"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_that_others_may_touch_is_refused(mode: int, tmp_path: Path) -> None:
    new_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}") as caught:
        load_key(tmp_path / "key")
    assert caught.value.code == "bad-key"
    assert "chmod 600" in caught.value.hint


def pem(key: Any, password: bytes | None = None) -> bytes:
    cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        pem(KEY)[:60],
        pem(KEY, b"secret"),
        pem(ec.generate_private_key(ec.SECP256R1())),
    ],
    ids=["empty", "bytes", "cut", "encrypted", "another-kind"],
)
def test_a_file_that_is_no_signing_key_is_refused(content: bytes, tmp_path: Path) -> None:
    write_secret(tmp_path / "key", content)
    for path in (tmp_path / "key", tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError) as caught:
            load_key(path)
        assert caught.value.code == "bad-key"


def test_a_public_key_reads_back_and_nothing_else_is_one() -> None:
    assert public_text(parse_public(public_text(KEY))) == public_text(KEY)
    for text in (
        "",
        "AAAA",
        public_text(KEY)[:-4],
        public_text(KEY) + "AAAA",
        "*" * 44,
        "ключ",
        public_text(KEY) + "\n",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_public(text)
        assert caught.value.code == "bad-key"


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_a_fingerprint_is_all_of_sha256_in_groups_of_four(first: bytes, second: bytes) -> None:
    assert [len(group) for group in fingerprint(first).split("-")] == [4] * 16
    assert fingerprint(first).replace("-", "") == payload_sha256(first)
    assert (fingerprint(first) == fingerprint(second)) == (first == second)
