"""What a coordinator types, and reads."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner, Result

from common.enrolment import read_kit, write_request
from common.errors import ConfigError, FedqcError, NetworkError, RefusedError
from common.signing import public_text
from server.cli.federation import federation as group
from server.cli.federation import sites_table
from server.federation import flower_app, registry, services
from server.federation.registry import Federation
from server.run.control_files import write_outcome
from tests.helpers.command_line import fedqc
from tests.helpers.enrolment import a_request
from tests.helpers.quick_federation import spare_bundle
from tests.helpers.spies import slow_until_spoken


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spare_bundle(monkeypatch)
    monkeypatch.delenv("FEDQC_FEDERATION", raising=False)
    monkeypatch.chdir(tmp_path)


def type_in(*words: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(group, [str(word) for word in words], input=answer)


def done(*words: object, answer: str | None = None) -> Result:
    result = type_in(*words, answer=answer)
    assert result.exception is None, result.output
    assert result.exit_code == 0
    return result


def error_of(*words: object, answer: str | None = None) -> FedqcError:
    error = type_in(*words, answer=answer).exception
    assert isinstance(error, FedqcError)
    assert "\n" not in error.message
    return error


@pytest.fixture
def fed(tmp_path: Path) -> Federation:
    done("init", "loop", "--dir", tmp_path / "fed", "--host", "qc.example.org", "--port", 8443)
    return Federation.open(tmp_path / "fed")


def test_what_changes_a_federation_ends_in_json_for_programs(
    fed: Federation, request_zip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDQC_FEDERATION", str(fed.folder))
    monkeypatch.setattr("server.federation.flower_app.is_current", lambda folder: True)

    def told(*words: object) -> dict[str, Any]:
        return dict(json.loads(done(*words, "--format", "json").stdout))

    enrolled = told("approve", request_zip, "--yes")
    assert (enrolled["site"], enrolled["fingerprint"]) == ("hospital-a", fed.fingerprint)
    assert read_kit(Path(enrolled["kit"])).expires.isoformat() == enrolled["expires"]
    assert told("renew", "hospital-a", "--out", "again.zip")["kit"] == "again.zip"
    assert told("renew")["needs_kit"] == []
    rotated = told("rotate", "--yes")
    assert (rotated["authority"], rotated["needs_kit"]) == (False, ["hospital-a"])
    assert rotated["fingerprint"] == fed.fingerprint
    assert told("revoke", "hospital-a", "--yes") == {"site": "hospital-a", "status": "revoked"}


@pytest.fixture
def request_zip(tmp_path: Path) -> Path:
    return a_request_file(tmp_path, "hospital-a")


def a_request_file(folder: Path, site: str) -> Path:
    key = Ed25519PrivateKey.generate()
    path = folder / f"request-{site}-{public_text(key)[:6].replace('/', '_')}.zip"
    write_request(path, a_request(site, signing=key), key)
    return path


def fingerprint_of(path: Path) -> str:
    from common.enrolment import read_request

    return read_request(path).fingerprint


def test_init_says_the_fingerprint_and_the_next_step(tmp_path: Path) -> None:
    said = done("init", "loop", "--host", "qc.example.org", "--webhook", "https://example.org/told").output
    made = Federation.open(tmp_path / "loop")
    assert made.fingerprint in said
    assert said.strip().splitlines()[-1].split()[-1] == made.fingerprint
    assert "qc.example.org:443" in said
    assert "fedqc federation start" in said
    assert made.notify.webhook == "https://example.org/told"
    assert made.settings.superlink_port != made.settings.health_port


def test_approve_shows_who_asks_and_waits_for_the_fingerprint_to_be_typed(
    fed: Federation, request_zip: Path
) -> None:
    spoken = fingerprint_of(request_zip)
    for answer, code in (("\n", "not-confirmed"), (f"{fed.fingerprint}\n", "wrong-fingerprint")):
        result = type_in("approve", request_zip, "--federation", fed.folder, answer=answer)
        assert isinstance(result.exception, FedqcError)
        assert result.exception.code == code
        assert spoken not in result.output, "what is shown is not compared with what was heard"
    assert fed.sites() == ()
    assert not Path("kit-hospital-a.zip").exists()
    typed = f" {spoken.upper().replace('-', ' ')} \n"
    said = done("approve", request_zip, "--federation", fed.folder, answer=typed).output
    for shown in ("hospital-a", "synthetic", "about 100", spoken, fed.fingerprint):
        assert shown in said
    assert read_kit(Path("kit-hospital-a.zip")).fingerprint == fed.fingerprint


@pytest.mark.parametrize("field", ["stand_in", "version"])
def test_a_request_that_forges_the_lines_of_approve_is_refused(
    fed: Federation, tmp_path: Path, field: str
) -> None:
    key = Ed25519PrivateKey.generate()
    words = "\x1b[8m\nfingerprint  2cf6-3fbd"[:32]
    forged = a_request("hospital-a", signing=key).model_copy(update={field: words})
    write_request(tmp_path / "forged.zip", forged, key)
    refused = error_of("approve", tmp_path / "forged.zip", "--federation", fed.folder, "--yes")
    assert (refused.code, fed.sites()) == ("bad-request-file", ())


def test_a_long_description_stays_in_its_column(fed: Federation, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    forged = "people" + "\u00a0" * 60 + "fingerprint  2cf6-3fbd-32a9"
    request = a_request("hospital-a", signing=key).model_copy(update={"stand_in": forged})
    write_request(tmp_path / "long.zip", request, key)
    said = done("approve", tmp_path / "long.zip", "--federation", fed.folder, "--yes").stderr
    assert "kind         synthetic (people fingerprint 2cf6-3fbd-32a9)" in said


@pytest.mark.parametrize("name", ["r" * 65, "a\x1b[2K", "a/b", ".hidden", "宽" * 70, "-x"])
def test_a_run_is_given_a_name_that_files_and_signatures_can_carry(fed: Federation, name: str) -> None:
    from server.cli.run import run as runs

    plan = Path("configs/plans/demo.yaml")
    plan = Path(__file__).parents[3] / plan
    words = ["start", str(plan), "--federation", str(fed.folder), f"--name={name}"]
    error = CliRunner().invoke(runs, words).exception
    assert isinstance(error, ConfigError)
    assert error.code == "bad-argument"


def test_a_fingerprint_given_as_people_write_it_needs_no_yes(fed: Federation, request_zip: Path) -> None:
    spoken = fingerprint_of(request_zip).upper().replace("-", " ")
    done("approve", request_zip, "--federation", fed.folder, "--fingerprint", spoken, "--out", "k.zip")
    assert read_kit(Path("k.zip")).site == "hospital-a"


def test_another_fingerprint_enrols_nobody_even_with_yes(fed: Federation, request_zip: Path) -> None:
    wrong = error_of(
        "approve", request_zip, "--federation", fed.folder, "--fingerprint", fed.fingerprint, "--yes"
    )
    assert (wrong.code, fed.sites()) == ("wrong-fingerprint", ())


def test_a_kit_that_would_replace_a_file_stops_before_anything_is_changed(
    fed: Federation, request_zip: Path
) -> None:
    Path("kit-hospital-a.zip").write_bytes(b"mine")
    assert error_of("approve", request_zip, "--federation", fed.folder, "--yes").code == "output-exists"
    assert (
        error_of("approve", request_zip, "--federation", fed.folder, "--yes", "--out", "no/where.zip").code
        == "not-writable"
    )
    assert fed.sites() == ()


def test_a_damaged_request_is_refused(fed: Federation, request_zip: Path) -> None:
    request_zip.write_bytes(request_zip.read_bytes()[:-30])
    assert error_of("approve", request_zip, "--federation", fed.folder, "--yes").code == "bad-request-file"


def test_a_hospital_s_life(fed: Federation, tmp_path: Path) -> None:
    first = a_request_file(tmp_path, "hospital-a")
    options = ("--federation", fed.folder)
    done("approve", first, "--yes", "--days", 20, *options)
    said = done("sites", *options)
    assert "fedqc federation renew hospital-a" in said.stderr
    done("renew", "hospital-a", "--out", "later.zip", *options)
    assert read_kit(Path("later.zip")).expires > read_kit(Path("kit-hospital-a.zip")).expires
    assert error_of("revoke", "hospital-a", *options, answer="n\n").code == "not-confirmed"
    assert "answers are ignored" in done("revoke", "hospital-a", "--yes", *options).output
    assert error_of("renew", "hospital-a", "--out", "never.zip", *options).code == "site-revoked"
    assert error_of("approve", first, "--yes", "--out", "never.zip", *options).code == "key-revoked"
    assert error_of("revoke", "hospital-b", "--yes", *options).code == "unknown-site"
    assert not Path("never.zip").exists()


def test_renew_without_a_site_is_for_the_server(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.federation import flower_app

    monkeypatch.setattr(flower_app, "is_current", lambda folder: False)
    monkeypatch.setattr(
        flower_app, "write_bundle", lambda folder: (folder / "bundle.sha256").write_text("1" * 64)
    )
    fed.server_certificate.write_text("damaged")
    registry.approve(fed, a_request("hospital-a"))
    said = done("renew", "--federation", fed.folder).output
    assert fed.certificate_days() > 300
    # the bundle is new: every node needs a kit that pins it
    assert "fedqc federation renew hospital-a" in said
    assert fed.bundle_sha256 == "1" * 64


def rows(fed: Federation) -> dict[str, dict[str, Any]]:
    found = json.loads(done("sites", "--federation", fed.folder, "--format", "json").stdout)
    return {row["site"]: row for row in found}


def test_sites_without_services_says_what_the_folder_knows(fed: Federation) -> None:
    registry.approve(fed, a_request("hospital-a"), days=30)
    registry.approve(fed, a_request("hospital-b"))
    registry.revoke(fed, "hospital-b")
    found = rows(fed)
    assert [found[site]["status"] for site in ("hospital-a", "hospital-b")] == ["active", "revoked"]
    assert found["hospital-a"]["enrolment_days"] == 30
    assert found["hospital-a"]["certificate_days"] in (364, 365)
    assert {row["connection"] for row in found.values()} == {"unknown"}
    assert {row["last_contact"] for row in found.values()} == {None}
    assert set(found["hospital-a"]) == {
        *(
            "site",
            "status",
            "kind",
            "connection",
            "last_contact",
            "version",
            "enrolment_days",
            "certificate_days",
            "readiness",
        )
    }


def test_sites_says_who_is_connected_and_what_was_last_answered(
    fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = {"online-at": "N/A", "offline-at": "N/A"}
    nodes = [
        {"node-id": "1", "status": "online", "online-at": "2026-11-24 10:00:00Z", "offline-at": "N/A"},
        {
            "node-id": "2",
            "status": "offline",
            "online-at": "2026-11-24 10:00:00Z",
            "offline-at": "2026-11-24 11:00:00Z",
        },
        {"node-id": "3", "status": "registered", **never},
    ]
    monkeypatch.setattr(services, "flower_nodes", lambda federation: nodes)
    for node, site in enumerate(("hospital-a", "hospital-b", "hospital-c", "hospital-d"), start=1):
        request = a_request(site)
        registry.approve(fed, request)
        if node < 4:
            fed.set_node(site, request.node_key, node)
    for name, answer in (("old", "refuse"), ("new", "accept")):
        sites = {"hospital-a": {"answer": answer, "takes_part": answer == "accept"}}
        write_outcome(fed.folder, name, "check", {"plan": "p", "sites": sites})
        os.utime(fed.state / "orders" / f"{name}.check.json", (0, 100 if name == "new" else 50))
    (fed.state / "orders" / "broken.check.json").write_text("{")
    found = rows(fed)
    assert [row["connection"] for row in found.values()] == [
        "online",
        "offline",
        "registered",
        "not registered",
    ]
    assert found["hospital-b"]["last_contact"] == "2026-11-24 11:00:00Z"
    assert found["hospital-a"]["last_contact"] > found["hospital-b"]["last_contact"]
    assert found["hospital-c"]["last_contact"] is None
    assert found["hospital-a"]["readiness"] == {"plan": "p", "answer": "accept", "takes_part": True}
    assert found["hospital-b"]["readiness"] is None
    table = done("sites", "--federation", fed.folder).stdout
    assert "last rehearsal: accept (plan p)" in table
    assert max(map(len, table.splitlines())) <= 80


def test_the_table_of_sites_fits_eighty_columns_whatever_is_in_it() -> None:
    row: dict[str, object] = {
        "status": "expired",
        "connection": "not registered",
        "last_contact": "2026-11-24 11:00:00Z",
        "version": "0.1.0",
        "enrolment_days": -999,
    }
    readiness = {"answer": "refuse: " + "a reason of many words " * 9, "plan": "p" * 32}
    rows = [row | {"site": "s" * length, "readiness": readiness} for length in (1, 21, 22, 32)]
    lines = sites_table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("2026-11-24 11:00:00Z" in line for line in lines) == 4


def test_an_enrolment_that_ran_out_is_told(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime, timedelta

    past = datetime.now(UTC).date() - timedelta(days=400)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "today", lambda: past)
        registry.approve(fed, a_request("hospital-a"))
    row = rows(fed)["hospital-a"]
    assert (row["status"], row["enrolment_days"]) == ("expired", -35)
    said = (
        "hospital-a: its enrolment has expired, and the site takes no part: fedqc federation renew hospital-a"
    )
    assert said in type_in("sites", "--federation", fed.folder).output.splitlines()


def test_where_the_federation_is_looked_for(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error_of("sites").code == "no-such-federation"
    monkeypatch.setenv("FEDQC_FEDERATION", str(fed.folder))
    done("sites")
    monkeypatch.setenv("FEDQC_FEDERATION", "/nowhere")
    assert error_of("sites").code == "no-such-federation"
    done("sites", "--federation", fed.folder)
    monkeypatch.delenv("FEDQC_FEDERATION")
    monkeypatch.chdir(fed.folder)
    done("sites")


def test_start_finds_what_is_wrong_before_it_starts_anything(fed: Federation) -> None:
    """As a process of its own: exit status 2, one line, one hint, no traceback, no log."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", fed.settings.superlink_port))
        other.listen()
        said = fedqc("federation", "start", "--no-proxy", "--federation", fed.folder)
    assert said.returncode == 2
    lines = [line for line in said.stderr.splitlines() if line.startswith("fedqc:")]
    assert lines[0].startswith("fedqc: error [port-in-use]: superlink_port: 127.0.0.1:")
    assert lines[1].startswith("fedqc: hint: ")
    assert "Traceback" not in said.stderr
    assert list(fed.state.glob("*.log")) == []


def test_stop_of_what_does_not_run(fed: Federation) -> None:
    assert error_of("stop", "--federation", fed.folder).code == "not-running"


def test_the_kinds_of_errors_have_the_exit_status_that_people_expect() -> None:
    assert (ConfigError.exit_status, NetworkError.exit_status, RefusedError.exit_status) == (2, 3, 4)


@pytest.mark.parametrize(
    ("verb", "where", "name", "result", "said"),
    [
        ("renew", flower_app, "write_bundle", None, "building the app bundle"),
        ("stop", services, "stop", None, "loop: stopping"),
        ("sites", services, "flower_nodes", [], "asking the SuperLink"),
    ],
)
def test_what_takes_long_says_so_again_and_again(
    verb: str, where: Any, name: str, result: Any, said: str, fed: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = slow_until_spoken(monkeypatch, where, name, result)
    type_in(verb, "--federation", fed.folder)
    assert sum(line.startswith(said) for line in told) >= 3
