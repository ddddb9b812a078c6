"""Keys of a coordinator are replaced, and nobody is enrolled again."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.site.enrolment import coordinator_of, join
from common.enrolment import Endorsement, read_kit, write_kit
from common.errors import ConfigError
from common.signing import load_key, public_text
from server.cli.federation import federation as group
from server.federation import services
from server.federation.configure import rotate
from server.federation.registry import Federation, approve, renew_site
from tests.helpers.enrolment import a_request
from tests.helpers.quick_federation import quick_federation

SITE = "hospital-a"


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    return quick_federation(tmp_path / "fed", monkeypatch)


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> Path:
    """Enrolled, and joined with the federation's first keys."""
    folder = tmp_path / "site"
    (folder / "state").mkdir(parents=True)
    (folder / "run").mkdir()
    fields = "images: i\nlabels: l.csv\nnominal_patients: 50\ncohort: c\nkind: synthetic\n"
    (folder / "site.yaml").write_text(f"name: {SITE}\n{fields}")
    from common.signing import new_key

    key = new_key(folder / "state" / "signing.key")
    approve(federation, a_request(SITE, signing=key))
    assert take(federation, folder, tmp_path / "first.zip") == federation.fingerprint
    return folder


def take(federation: Federation, site: Path, kit: Path, fingerprint: str = "") -> str:
    """Renew, send, join; the fingerprint that the site then pins."""
    write_kit(kit, renew_site(federation, SITE), federation.signing_key())
    join(site, kit, fingerprint or federation.fingerprint)
    pinned = coordinator_of(site / "state")
    assert pinned is not None
    return pinned["fingerprint"]


@pytest.mark.parametrize("authority", [False, True])
def test_a_site_follows_its_coordinator_to_new_keys(
    authority: bool, federation: Federation, site: Path, tmp_path: Path
) -> None:
    old, before = federation.fingerprint, federation.ca_certificate.read_bytes()
    enrolled = federation.site(SITE).request
    rotate(federation, authority=authority)
    assert federation.fingerprint != old
    assert (federation.ca_certificate.read_bytes() != before) == authority
    assert federation.certificate_days() > 300
    assert federation.site(SITE).request == enrolled
    for path in (federation.coordinator_key, federation.ca_key, federation.server_key):
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError) as refused:
        take(federation, site, tmp_path / "old-fingerprint.zip", old)
    assert refused.value.code == "wrong-fingerprint"
    assert take(federation, site, tmp_path / "second.zip") == federation.fingerprint
    assert (site / "node" / "ca.crt").read_bytes() == federation.ca_certificate.read_bytes()


def test_a_site_that_slept_through_two_rotations_follows_the_chain(
    federation: Federation, site: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        rotate(federation, authority=False)
    assert len(read_kit_of(federation, tmp_path).endorsements) == 2
    assert take(federation, site, tmp_path / "third.zip") == federation.fingerprint


def read_kit_of(federation: Federation, folder: Path):  # type: ignore[no-untyped-def]
    path = folder / "read.zip"
    write_kit(path, renew_site(federation, SITE), federation.signing_key())
    return read_kit(path)


@pytest.mark.parametrize("forgery", ["none", "by itself", "another fingerprint", "another key"])
def test_a_stranger_s_federation_does_not_pass_for_the_successor(
    forgery: str, federation: Federation, site: Path, tmp_path: Path
) -> None:
    old, stranger = public_text(federation.signing_key()), Ed25519PrivateKey.generate()
    honest = Endorsement.by(federation.signing_key(), public_text(stranger), "0" * 64)
    rotate(federation, authority=False)
    kit = renew_site(federation, SITE)
    forged = {
        "none": (),
        "by itself": (
            Endorsement.by(stranger, kit.coordinator_key, kit.fingerprint).model_copy(
                update={"previous_key": old}
            ),
        ),
        "another fingerprint": (honest.model_copy(update={"key": kit.coordinator_key}),),
        "another key": (honest,),
    }[forgery]
    path = tmp_path / "forged.zip"
    write_kit(path, kit.model_copy(update={"endorsements": forged}), load_key(federation.coordinator_key))
    with pytest.raises(ConfigError) as refused:
        join(site, path, federation.fingerprint)
    assert refused.value.code == "other-federation"


def test_the_command_says_what_each_site_needs(
    federation: Federation, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["rotate", "--federation", str(federation.folder)]
    old = federation.fingerprint
    kept = CliRunner().invoke(group, words, input="n\n").exception
    assert isinstance(kept, Exception)
    assert getattr(kept, "code", "") == "not-confirmed"
    monkeypatch.setattr(services, "running", lambda federation: 7)
    running = CliRunner().invoke(group, [*words, "--yes"]).exception
    assert getattr(running, "code", "") == "already-running"
    assert federation.fingerprint == old
    monkeypatch.setattr(services, "running", lambda federation: None)
    said = CliRunner().invoke(group, [*words, "--yes", "--authority"])
    assert said.exit_code == 0
    assert f"fedqc federation renew {SITE}" in said.output
    assert federation.fingerprint in said.output
    assert federation.fingerprint != old
