"""A request or kit is read as it was signed, or not at all; neither holds a private key."""

from __future__ import annotations

import base64
import io
import stat
import zipfile
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.enrolment import (
    MAX_BYTES,
    Endorsement,
    Kit,
    Request,
    federation_fingerprint,
    read_kit,
    read_request,
    write_kit,
    write_request,
)
from common.errors import ConfigError
from common.signing import DOMAIN, public_text, sign

SITE_KEY, KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3))
REQUEST = Request(
    site="hospital-a",
    kind="hospital",
    nominal_patients=200,
    node_key="ecdsa-sha2-nistp384 AAAAE2VjZHNh",
    signing_key=public_text(SITE_KEY),
    version="0.1.0",
)
KIT = Kit(
    federation="qc",
    site="hospital-a",
    address="qc.example.org:443",
    ca_certificate="-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
    coordinator_key=public_text(KEY),
    bundle_sha256="0" * 64,
    site_key=public_text(SITE_KEY),
    version="0.1.0",
    expires=date(2030, 1, 31),
)
ROOM = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "request.json": (read_request, "bad-request-file"),
    "kit.json": (read_kit, "bad-kit"),
}


def refused(path: Path, name: str = "kit.json") -> str:
    read, code = READERS[name]
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    write_kit(tmp_path / "kit.zip", KIT, KEY)
    return tmp_path / "kit.zip"


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, content: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content:
            archive.writestr(name, data)
    return path


def signature(text: bytes, domain: bytes, key: Ed25519PrivateKey = KEY) -> bytes:
    return base64.b64encode(sign(text, key, domain)) + b"\n" + public_text(key).encode() + b"\n"


def test_a_request_and_a_kit_read_back_as_they_were_written(kit: Path, tmp_path: Path) -> None:
    write_request(tmp_path / "request.zip", REQUEST, SITE_KEY)
    assert read_request(tmp_path / "request.zip") == REQUEST
    assert read_kit(kit) == KIT


def test_neither_holds_a_private_key(kit: Path, tmp_path: Path) -> None:
    write_request(tmp_path / "request.zip", REQUEST, SITE_KEY)
    for path in (kit, tmp_path / "request.zip"):
        everything = path.read_bytes() + b"".join(members(path).values())
        for key in (SITE_KEY, KEY):
            raw = key.private_bytes(
                serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
            )
            assert not [
                form for form in (raw, base64.b64encode(raw), raw.hex().encode()) if form in everything
            ]
        assert b"PRIVATE" not in everything


def test_neither_overwrites_what_is_there(kit: Path) -> None:
    before = kit.read_bytes()
    for write in (lambda: write_kit(kit, KIT, KEY), lambda: write_request(kit, REQUEST, SITE_KEY)):
        with pytest.raises(ConfigError) as caught:
            write()
        assert caught.value.code == "output-exists"
    assert kit.read_bytes() == before
    with pytest.raises(ConfigError) as caught:
        write_kit(kit.parent / "missing" / "kit.zip", KIT, KEY)
    assert caught.value.code == "not-writable"


@pytest.mark.parametrize("name", Kit.model_fields)
def test_a_kit_with_one_field_changed_is_refused(name: str, kit: Path) -> None:
    other: object = {
        "expires": date(2040, 1, 1),
        "endorsements": (Endorsement.by(OTHER, public_text(OTHER), "0" * 64),),
        "bundle_sha256": "1" * 64,
        "address": "evil.example.org:443",
        "coordinator_key": public_text(OTHER),
        "site_key": public_text(OTHER),
    }.get(name, "other")
    held = members(kit)
    text = KIT.model_copy(update={name: other}).model_dump_json(indent=1).encode()
    assert text != held["kit.json"]
    assert "altered" in refused(
        zipped(kit.with_name("changed.zip"), [("kit.json", text), ("signature", held["signature"])])
    )


def test_a_request_is_signed_by_the_key_it_names(tmp_path: Path) -> None:
    """Else anybody who saw a hospital's public key could ask in its name."""
    write_request(tmp_path / "request.zip", REQUEST, OTHER)
    assert "altered" in refused(tmp_path / "request.zip", "request.json")


def test_a_kit_made_by_another_coordinator_has_another_fingerprint(tmp_path: Path) -> None:
    """Its signature is in order: only the fingerprint that reached the operator another way tells them
    apart.
    """
    forged = KIT.model_copy(update={"coordinator_key": public_text(OTHER)})
    write_kit(tmp_path / "kit.zip", forged, OTHER)
    assert read_kit(tmp_path / "kit.zip").fingerprint != KIT.fingerprint
    write_kit(tmp_path / "mixed.zip", KIT, OTHER)
    refused(tmp_path / "mixed.zip")


@given(name=st.sampled_from(sorted(Kit.model_fields)))
def test_a_kits_fingerprint_is_of_the_federation_alone(name: str) -> None:
    changed = KIT.model_copy(update={name: "other"})
    assert (changed.fingerprint == KIT.fingerprint) == (name not in ("ca_certificate", "coordinator_key"))
    assert KIT.fingerprint == federation_fingerprint(KIT.ca_certificate, KIT.coordinator_key)


@given(name=st.sampled_from(sorted(Request.model_fields)))
def test_a_requests_fingerprint_covers_name_and_both_keys(name: str) -> None:
    changed = REQUEST.model_copy(update={name: "other"})
    assert (changed.fingerprint == REQUEST.fingerprint) == (name not in ("site", "node_key", "signing_key"))


def test_a_signature_of_another_kind_of_paper_is_refused(kit: Path) -> None:
    text = members(kit)["kit.json"]
    for domain in (b"fedqc request v1\0", DOMAIN, b""):
        path = zipped(
            kit.with_name("domain.zip"), [("kit.json", text), ("signature", signature(text, domain))]
        )
        assert "altered" in refused(path)
    zipped(
        kit.with_name("right.zip"), [("kit.json", text), ("signature", signature(text, b"fedqc kit v1\0"))]
    )
    assert read_kit(kit.with_name("right.zip")) == KIT


def test_a_kit_is_no_request_and_a_request_no_kit(kit: Path, tmp_path: Path) -> None:
    write_request(tmp_path / "request.zip", REQUEST, SITE_KEY)
    refused(kit, "request.json")
    refused(tmp_path / "request.zip")
    text = members(kit)["kit.json"]
    refused(
        zipped(tmp_path / "renamed.zip", [("request.json", text), ("signature", members(kit)["signature"])]),
        "request.json",
    )


@ROOM
@given(st.data())
def test_a_truncated_kit_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    held = io.BytesIO()
    path = tmp_path / "whole.zip"
    if not path.exists():
        write_kit(path, KIT, KEY)
    held.write(path.read_bytes())
    (tmp_path / "cut.zip").write_bytes(held.getvalue()[: data.draw(st.integers(0, len(held.getvalue()) - 1))])
    refused(tmp_path / "cut.zip")


@ROOM
@given(st.data())
def test_a_kit_with_one_damaged_byte_is_the_kit_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "whole.zip"
    if not path.exists():
        write_kit(path, KIT, KEY)
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "damaged.zip").write_bytes(whole)
    with suppress(ConfigError):
        assert read_kit(tmp_path / "damaged.zip") == KIT  # a time stamp, or another byte that says nothing


@ROOM
@given(content=st.binary(max_size=200))
def test_any_file_is_a_kit_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any.zip").write_bytes(content)
    refused(tmp_path / "any.zip")


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED]
)
def test_a_bomb_is_refused_before_it_is_unpacked(
    method: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(tmp_path / "bomb.zip", [("kit.json", b" " * (MAX_BYTES + 1)), ("signature", b"x")], method)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    refused(path)


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    """The central directory says a hundred bytes, the stream holds sixteen mebibytes."""
    path = zipped(tmp_path / "bomb.zip", [("kit.json", b" " * (16 * MAX_BYTES)), ("signature", b"x")])
    whole = path.read_bytes()
    assert whole.count((16 * MAX_BYTES).to_bytes(4, "little")) >= 1
    path.write_bytes(whole.replace((16 * MAX_BYTES).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    refused(path)


def test_a_zip_of_other_files_is_refused(kit: Path, tmp_path: Path) -> None:
    held = members(kit)
    both = list(held.items())
    for number, content in enumerate(
        (
            [],
            both[:1],
            both[1:],
            [*both, ("../../evil", b"x")],
            [*both, ("evil/", b"")],
            [("./kit.json", held["kit.json"]), both[1]],
            [("kit.json", b"\xff\xfe"), both[1]],
            [("kit.json", b"[" * 100_000), both[1]],
            [both[0], ("signature", b"")],
            [both[0], ("signature", b"*not base64*\n")],
            [both[0], ("signature", "é".encode())],
        )
    ):
        refused(zipped(tmp_path / f"{number}.zip", content))
    refused(tmp_path / "missing.zip")
    refused(tmp_path)


def test_a_member_that_stands_there_twice_is_refused(kit: Path, tmp_path: Path) -> None:
    """What is checked must be what another reader of the same archive would see."""
    held = members(kit)
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zipped(tmp_path / "twice.zip", [("kit.json", b"{}"), *held.items()])
    refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate")
def test_an_encrypted_member_is_refused(kit: Path) -> None:
    whole = bytearray(kit.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(mark) + at] |= 1
    kit.write_bytes(whole)
    refused(kit)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", "../x"),
        ("site", "hospital-a\n"),
        ("federation", ""),
        ("address", "qc.example.org"),
        ("address", "qc.example.org:443\nproxy_pass"),
        ("address", "qc example.org:443"),
        ("address", "$(id):443"),
        ("coordinator_key", "AAAA"),
        ("coordinator_key", ""),
        ("bundle_sha256", "0" * 63),
        ("ca_certificate", "x" * 20_001),
    ],
)
def test_a_signed_kit_with_values_out_of_bounds_is_refused(name: str, value: str, tmp_path: Path) -> None:
    text = KIT.model_copy(update={name: value}).model_dump_json().encode()
    refused(
        zipped(tmp_path / "kit.zip", [("kit.json", text), ("signature", signature(text, b"fedqc kit v1\0"))])
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", "Hospital A"),
        ("kind", "clinic"),
        ("nominal_patients", 0),
        ("node_key", "ssh-rsa AAAA"),
        ("node_key", "ecdsa-sha2-nistp384 AAAA\nssh-rsa AAAA"),
        ("node_key", "ecdsa-sha2-nistp384 AAAA\n"),
        ("signing_key", "AAAA"),
        ("signing_key", "ключ"),
    ],
)
def test_a_signed_request_with_values_out_of_bounds_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    text = REQUEST.model_copy(update={name: value}).model_dump_json().encode()
    path = zipped(
        tmp_path / "r.zip",
        [("request.json", text), ("signature", signature(text, b"fedqc request v1\0", SITE_KEY))],
    )
    refused(path, "request.json")


def test_a_request_and_a_kit_are_files_that_travel(kit: Path) -> None:
    """No secret is in them: they may be read by whoever carries them."""
    assert stat.S_IMODE(kit.stat().st_mode) & 0o400
