"""A federation's folder: it appears whole, each hospital has one file of its own, and keys mean one site for
good.
"""

from __future__ import annotations

import ipaddress
import json
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.enrolment import read_kit, write_kit
from common.errors import ConfigError
from common.signing import public_text
from server.federation import registry
from server.federation.certificates import certificate_days
from server.federation.configure import configure, init_federation, renew_server_certificate
from server.federation.notify import Notify
from server.federation.registry import Federation, approve, renew_site, revoke, site_keys
from tests.helpers.enrolment import a_request
from tests.helpers.quick_federation import BUNDLE_SHA, spare_bundle


@pytest.fixture(autouse=True)
def _no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle has its own tests, with the real `flwr build`."""
    spare_bundle(monkeypatch)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "fed", name="loop", host="qc.example.org", port=8443)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(code: str, call: object, *words: object, **more: object) -> None:
    with pytest.raises(ConfigError) as caught:
        call(*words, **more)  # type: ignore[operator]
    assert caught.value.code == code
    assert "\n" not in caught.value.message


def test_a_new_federation_is_closed_to_others_and_reads_back(federation: Federation) -> None:
    assert stat.S_IMODE(federation.folder.stat().st_mode) == 0o700
    keys = sorted((federation.folder / "keys").iterdir())
    assert [key.name for key in keys] == ["ca.key", "coordinator.key", "server.key", "superexec.secret"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert federation.superexec_secret.stat().st_size == 48
    assert Federation.open(federation.folder) == federation
    assert federation.sites() == ()


def test_what_is_written_names_the_final_folder(federation: Federation) -> None:
    written = (
        federation.proxy / "nginx.conf",
        federation.flower_home / "config.toml",
        *(federation.folder / "systemd").iterdir(),
    )
    for path in written:
        text = path.read_text()
        assert str(federation.folder) in text
        assert f".{federation.folder.name}." not in text


def test_a_federation_that_fails_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> str:
        raise ConfigError("no flwr", code="no-program")

    monkeypatch.setattr("server.federation.configure.write_bundle", fail)
    refused("no-program", init_federation, tmp_path / "fed", name="loop", host="h", port=8443)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "fed").mkdir()
    (tmp_path / "fed" / "note").write_text("mine")
    refused("output-exists", init_federation, tmp_path / "fed", name="loop", host="h", port=8443)
    assert contents(tmp_path) == {"fed/note": b"mine"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": "Not A Name"}, "bad-federation"),
        ({"host": "h;}"}, "bad-federation"),
        ({"host": ""}, "bad-federation"),
        ({"port": 70000}, "bad-federation"),
        ({"superlink_port": 8443}, "bad-federation"),
        ({"listen": "everywhere"}, "bad-federation"),
    ],
)
def test_values_that_make_no_federation_are_refused(
    tmp_path: Path, changes: dict[str, object], code: str
) -> None:
    refused(
        code, init_federation, tmp_path / "fed", **({"name": "loop", "host": "h", "port": 8443} | changes)
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ['a"b', "a;b", "a$b", "a{b", "a%b", "a\nb"])
def test_a_path_that_would_be_read_as_configuration_is_refused(tmp_path: Path, name: str) -> None:
    refused("bad-path", init_federation, tmp_path / name, name="loop", host="h", port=8443)


def test_settings_that_an_editor_spoiled_are_one_line(federation: Federation) -> None:
    path = federation.folder / "federation.yaml"
    good = path.read_text()
    refused("no-such-federation", Federation.open, federation.folder / "nowhere")
    for bad in (
        good + "surprise: 1\n",
        good.replace("port: 8443", "port: http"),
        good + "port: 1\n",
        "- a\n",
        "a: [",
        "",
    ):
        path.write_text(bad)
        refused("bad-federation", Federation.open, federation.folder)


def test_an_edited_date_and_webhook_are_understood(federation: Federation) -> None:
    path = federation.folder / "federation.yaml"
    values = yaml.safe_load(path.read_text())
    # a YAML date
    path.write_text(
        f"{yaml.safe_dump(values | {'notify': {'webhook': 'https://example.org/x'}})}".replace("'", "")
    )
    assert Federation.open(federation.folder).notify == Notify(webhook="https://example.org/x")


@pytest.mark.parametrize("host", ["qc.example.org", "192.0.2.7", "2001:db8::7", "localhost"])
def test_the_server_certificate_names_the_host_and_loopback(tmp_path: Path, host: str) -> None:
    made = init_federation(tmp_path / "fed", name="loop", host=host, port=8443)
    certificate = x509.load_pem_x509_certificate(made.server_certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert "localhost" in dns
    assert "127.0.0.1" in addresses
    try:
        assert str(ipaddress.ip_address(host)) in addresses
    except ValueError:
        assert host in dns
    authority = x509.load_pem_x509_certificate(made.ca_certificate.read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert certificate_days(made.server_certificate.read_bytes()) in (364, 365)
    ssl.create_default_context(cafile=str(made.ca_certificate))
    assert made.settings.address == (f"[{host}]:8443" if ":" in host else f"{host}:8443")


def test_a_renewed_certificate_keeps_every_kit_valid(federation: Federation) -> None:
    kit = approve(federation, a_request("hospital-a"))
    renew_server_certificate(federation, days=0)
    assert certificate_days(federation.server_certificate.read_bytes()) == -1
    renew_server_certificate(federation)
    assert certificate_days(federation.server_certificate.read_bytes()) > 300
    assert federation.fingerprint == kit.fingerprint == renew_site(federation, "hospital-a").fingerprint


def test_a_server_certificate_never_outlives_its_authority(federation: Federation) -> None:
    renew_server_certificate(federation, days=100_000)
    ends = [
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (federation.ca_certificate, federation.server_certificate)
    ]
    assert ends[0].not_valid_after_utc == ends[1].not_valid_after_utc


def test_a_kit_says_what_a_hospital_must_pin_and_no_secret(federation: Federation, tmp_path: Path) -> None:
    request = a_request("hospital-a")
    kit = approve(federation, request, days=30)
    write_kit(tmp_path / "kit.zip", kit, federation.signing_key())
    read = read_kit(tmp_path / "kit.zip")
    assert read == kit
    assert (read.site, read.site_key, read.address) == (
        "hospital-a",
        request.signing_key,
        "qc.example.org:8443",
    )
    assert read.bundle_sha256 == BUNDLE_SHA
    assert read.fingerprint == federation.fingerprint
    assert read.expires == datetime.now(UTC).date() + timedelta(days=30)
    text = kit.model_dump_json()
    assert "PRIVATE" not in text
    assert federation.superexec_secret.read_bytes().hex() not in text


def test_a_request_again_is_a_longer_kit_and_the_same_node(federation: Federation) -> None:
    request = a_request("hospital-a")
    approve(federation, request, days=10)
    federation.set_node("hospital-a", request.node_key, 17)
    kit = approve(federation, request, days=20)
    (enrolment,) = federation.sites()
    assert (enrolment.node_id, enrolment.expires, enrolment.replaced) == (17, kit.expires, ())


def test_a_name_is_not_taken_over_by_other_keys(federation: Federation) -> None:
    request = a_request("hospital-a")
    approve(federation, request)
    before = contents(federation.sites_folder)
    refused("site-exists", approve, federation, a_request("hospital-a"))
    half = a_request("hospital-a").model_copy(update={"node_key": request.node_key})
    refused("site-exists", approve, federation, half)
    assert contents(federation.sites_folder) == before


def test_one_key_is_one_site(federation: Federation) -> None:
    node, signing = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
    approve(federation, a_request("hospital-a", node, signing))
    refused("duplicate-key", approve, federation, a_request("hospital-b", node=node))
    refused("duplicate-key", approve, federation, a_request("hospital-b", signing=signing))
    revoke(federation, "hospital-a")
    refused("duplicate-key", approve, federation, a_request("hospital-b", node=node))
    assert [enrolment.site for enrolment in federation.sites()] == ["hospital-a"]


def test_the_same_key_written_otherwise_is_the_same_key(federation: Federation) -> None:
    """Unused bits of the last base64 digit may be set: another text, the same 32 bytes."""
    first = a_request("hospital-a")
    approve(federation, first)
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    text = first.signing_key
    other = text[:-2] + digits[digits.index(text[-2]) + 1] + "="
    assert other != text
    refused(
        "duplicate-key",
        approve,
        federation,
        a_request("hospital-b").model_copy(update={"signing_key": other}),
    )


@pytest.mark.parametrize("change", [{"node_key": "ecdsa-sha2-nistp384 AAAA"}, {"signing_key": "AAAA"}])
def test_what_is_no_key_is_refused(federation: Federation, change: dict[str, str]) -> None:
    refused("bad-key", approve, federation, a_request("hospital-a").model_copy(update=change))
    assert federation.sites() == ()


def test_a_revoked_site_comes_back_with_new_keys_only(federation: Federation) -> None:
    old, new = a_request("hospital-a"), a_request("hospital-a")
    approve(federation, old)
    federation.set_node("hospital-a", old.node_key, 17)
    revoke(federation, "hospital-a")
    assert site_keys(federation) == {}
    refused("key-revoked", approve, federation, old)
    refused("key-revoked", approve, federation, new.model_copy(update={"node_key": old.node_key}))
    refused("site-revoked", renew_site, federation, "hospital-a")
    approve(federation, new)
    (enrolment,) = federation.sites()
    assert (enrolment.status, enrolment.node_id) == ("active", None)
    assert [(keys.node_key, keys.node_id) for keys in enrolment.replaced] == [(old.node_key, 17)]
    revoke(federation, "hospital-a")
    refused("key-revoked", approve, federation, old)


def test_only_active_sites_in_time_count(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    for site, days in (("hospital-a", 10), ("hospital-b", 30), ("hospital-c", 30)):
        approve(federation, a_request(site), days=days)
    revoke(federation, "hospital-c")
    assert set(site_keys(federation)) == {"hospital-a", "hospital-b"}
    keys = site_keys(federation)
    assert public_text(keys["hospital-b"]) == federation.site("hospital-b").request.signing_key
    later = datetime.now(UTC).date() + timedelta(days=11)
    monkeypatch.setattr(registry, "today", lambda: later)
    assert set(site_keys(federation)) == {"hospital-b"}


def test_what_happens_to_one_hospital_touches_no_other_file(federation: Federation) -> None:
    """Byte for byte, over a hospital's whole life."""
    approve(federation, a_request("hospital-a"))
    approve(federation, a_request("hospital-c"))
    mine = "sites/hospital-b.json"
    permitted = {
        "approve": {mine},
        "renew": {mine},
        "revoke": {mine},
        "new keys": {mine},
        "server certificate": {"certificates/server.crt"},
        "configure": set(),
    }
    for step, files in permitted.items():
        before = contents(federation.folder)
        match step:
            case "approve" | "new keys":
                approve(federation, a_request("hospital-b"))
            case "renew":
                renew_site(federation, "hospital-b", days=700)
            case "revoke":
                revoke(federation, "hospital-b")
            case "server certificate":
                renew_server_certificate(federation)
            case "configure":
                configure(federation)
        after = contents(federation.folder)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed == files, step


def test_an_unknown_site_is_named_with_those_known(federation: Federation) -> None:
    approve(federation, a_request("hospital-a"))
    for call in (revoke, renew_site):
        with pytest.raises(ConfigError, match="hospital-z") as caught:
            call(federation, "hospital-z")
        assert (caught.value.code, "hospital-a" in caught.value.hint) == ("unknown-site", True)


def test_a_damaged_or_swapped_site_file_is_refused(federation: Federation) -> None:
    approve(federation, a_request("hospital-a"))
    path = federation.sites_folder / "hospital-a.json"
    good = path.read_bytes()
    values = json.loads(good)
    for bad in (
        good[:-20],
        b"\xff",
        json.dumps(values | {"status": "trusted"}).encode(),
        json.dumps(values | {"more": 1}).encode(),
    ):
        path.write_bytes(bad)
        refused("bad-enrolment", federation.sites)
    path.rename(federation.sites_folder / "hospital-b.json")
    (federation.sites_folder / "hospital-b.json").write_bytes(good)
    refused("bad-enrolment", federation.sites)


def test_a_late_answer_does_not_name_a_new_key_s_node(federation: Federation) -> None:
    """The SuperLink registered the old key while the site was enrolled anew."""
    old = a_request("hospital-a")
    approve(federation, old)
    revoke(federation, "hospital-a")
    approve(federation, a_request("hospital-a"))
    federation.set_node("hospital-a", old.node_key, 17)
    assert federation.site("hospital-a").node_id is None
