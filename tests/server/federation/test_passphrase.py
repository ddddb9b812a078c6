"""The key of the certificate authority under a passphrase: whatever command uses it asks for it once."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from common.errors import ConfigError, FedqcError
from server.cli import federation as commands
from server.federation.certificates import is_sealed, load_ec_key
from server.federation.registry import Federation
from tests.helpers.quick_federation import spare_bundle

WORDS = "seventeen slow herons"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spare_bundle(monkeypatch)
    monkeypatch.setattr("server.federation.flower_app.is_current", lambda folder: True)
    monkeypatch.delenv(commands.CA_PASSPHRASE, raising=False)
    monkeypatch.setenv("FEDQC_FEDERATION", str(tmp_path / "fed"))


def typed(*words: str) -> FedqcError | None:
    """The error of a command, None where it worked."""
    error = CliRunner().invoke(commands.federation, list(words)).exception
    assert error is None or isinstance(error, FedqcError), repr(error)
    return error


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setenv(commands.CA_PASSPHRASE, WORDS)
    folder = str(tmp_path / "fed")
    assert not typed("init", "loop", "--dir", folder, "--host", "qc.example.org", "--passphrase")
    monkeypatch.delenv(commands.CA_PASSPHRASE)
    return Federation.open(tmp_path / "fed")


def test_only_the_passphrase_opens_the_key_and_no_other_key_has_one(sealed: Federation) -> None:
    pem = sealed.ca_key.read_bytes()
    assert pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert serialization.load_pem_private_key(pem, WORDS.encode())
    for wrong in (b"", b"another passphrase"):
        with pytest.raises(ConfigError) as refused:
            load_ec_key(sealed.ca_key, wrong)
        assert refused.value.code == "wrong-passphrase"
    assert load_ec_key(sealed.server_key)
    assert sealed.signing_key()  # services start unattended


def test_renew_wants_it_and_changes_nothing_without(
    sealed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sealed.server_certificate.read_bytes()
    for given in ("", "another passphrase"):
        monkeypatch.setenv(commands.CA_PASSPHRASE, given)
        refused = typed("renew")
        assert refused
        assert refused.code == "wrong-passphrase"
        assert sealed.server_certificate.read_bytes() == before
    monkeypatch.setenv(commands.CA_PASSPHRASE, WORDS)
    assert not typed("renew")
    assert sealed.server_certificate.read_bytes() != before


def test_it_is_asked_once_at_a_terminal(sealed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prompt(text: str, **options: object) -> str:
        asked.append((text, options["hide_input"], options["confirmation_prompt"]))
        return WORDS

    monkeypatch.setattr(commands.typer, "prompt", prompt)
    monkeypatch.setattr(commands, "_is_terminal", lambda: True)
    assert not typed("renew")
    assert asked == [("passphrase of the certificate authority's key", True, False)]


def test_a_rotated_authority_stays_sealed_under_a_new_passphrase(
    sealed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not typed("rotate", "--yes")  # the coordinator's key alone: no passphrase is wanted
    refused = typed("rotate", "--authority", "--yes")
    assert refused
    assert refused.code == "wrong-passphrase"
    before = sealed.ca_key.read_bytes()
    monkeypatch.setenv(commands.CA_PASSPHRASE, "another dozen of words")
    assert not typed("rotate", "--authority", "--yes")
    assert is_sealed(sealed.ca_key)
    assert sealed.ca_key.read_bytes() != before
    assert load_ec_key(sealed.ca_key, b"another dozen of words")


def test_a_short_one_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(commands.CA_PASSPHRASE, "short")
    refused = typed("init", "loop", "--dir", str(tmp_path / "fed"), "--host", "a.example", "--passphrase")
    assert refused
    assert refused.code == "bad-argument"
    assert not (tmp_path / "fed").exists()
