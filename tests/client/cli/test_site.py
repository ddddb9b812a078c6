from __future__ import annotations

import json
import sys
import types
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.cli.site import site as group
from client.site.approvals import is_approved
from client.site.config import site_key
from client.site.ledger import Ledger, ledger_file_name
from common.enrolment import Kit, read_request, write_kit
from common.errors import FedqcError
from common.plan import read_plan
from common.privacy import GaussianSteps
from common.signing import load_key, public_text
from tests.helpers.consortium import write_plan

STEPS = GaussianSteps(noise_multiplier=20.0, sample_rate=1.0, steps=10)


def typed(*words: object, given: str = "") -> Result:
    return CliRunner().invoke(group, [str(word) for word in words], input=given)


def done(*words: object, given: str = "") -> Result:
    result = typed(*words, given=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0, result.output
    return result


def refused(*words: object) -> FedqcError:
    error = typed(*words).exception
    assert isinstance(error, FedqcError), error
    return error


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDQC_SITE", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    folder = tmp_path / "site"
    words = ["--name", "hospital-a", "--images", tmp_path / "images", "--labels", tmp_path / "labels.csv"]
    words += ["--nominal-patients", 200, "--cohort", "c1", "--level", "usual", "--yes"]
    words += ["--ethics-approval", "2026-17", "--consent-basis", "broad consent"]
    done("init", "--site", folder, *words)
    return folder


def kit_of(folder: Path, path: Path) -> str:
    key = Ed25519PrivateKey.generate()
    kit = Kit(
        federation="north",
        site="hospital-a",
        address="127.0.0.1:9",
        ca_certificate="-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n",
        coordinator_key=public_text(key),
        bundle_sha256="ab" * 32,
        site_key=public_text(load_key(folder / "state" / "signing.key")),
        version="0.1.0",
        expires=date.today() + timedelta(days=300),
    )
    write_kit(path, kit, key)
    return kit.fingerprint


def test_init_asks_for_what_is_not_given_and_shows_each_level(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    answers = [
        "hospital",
        "hospital-a",
        str(tmp_path / "images"),
        str(tmp_path / "labels.csv"),
        "c1",
        "200",
        "cautious",
        "2026-17",
        "broad",
    ]
    result = done("init", "--site", tmp_path / "site", given="\n".join(answers) + "\n")
    assert yaml.safe_load((tmp_path / "site" / "site.yaml").read_text())["name"] == "hospital-a"
    assert yaml.safe_load((tmp_path / "site" / "policy.yaml").read_text())["max_epsilon"] == 2.0
    for word in ("cautious", "usual", "open", "ε at most 8", "δ at most 1e-06", "times in 100"):
        assert word in result.stderr
    assert result.stdout.strip() == read_request(tmp_path / "site" / "request.zip").fingerprint


def test_init_with_yes_asks_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    error = refused("init", "--site", tmp_path / "site", "--name", "hospital-a", "--yes")
    assert (error.code, "--images" in error.message) == ("bad-argument", True)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("how", ["option", "environment", "present folder"])
def test_a_site_is_found_in_three_ways(how: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv("FEDQC_SITE", str(site))
    elif how == "present folder":
        monkeypatch.chdir(site)
    words = ["--site", site] if how == "option" else []
    assert json.loads(done("sent", "--format", "json", *words).stdout) == []


def test_no_site_is_said(site: Path) -> None:
    assert refused("status").code == "no-such-site"


def test_join_and_its_units(site: Path, tmp_path: Path) -> None:
    fingerprint = kit_of(site, tmp_path / "kit.zip")
    result = done("join", tmp_path / "kit.zip", "--fingerprint", fingerprint, "--site", site)
    assert "north" in result.stderr
    assert sorted(path.name for path in (site / "systemd").iterdir()) == [
        "fedqc-agent.service",
        "fedqc-node.service",
    ]
    assert (site / "node" / "node.yaml").is_file()
    kit_of(site, tmp_path / "other.zip")
    assert (
        refused("join", tmp_path / "other.zip", "--fingerprint", fingerprint, "--site", site).code
        == "wrong-fingerprint"
    )


def test_check_gives_a_table_json_and_an_exit_status(site: Path) -> None:
    result = typed("check", "--site", site, "--format", "json")
    checks = {found["check"]: found for found in json.loads(result.stdout)}
    assert set(checks["data"]) == {"check", "ok", "found", "problem", "fix"}
    assert (checks["data"]["ok"], checks["enrolment"]["ok"], checks["modes"]["ok"]) == (False, None, True)
    assert "FAIL  data" in typed("check", "--site", site).stdout


def test_approve_shows_the_plan_in_plain_words_and_asks(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", question="Does it work?", arms=["federated_dp", "federated"])
    plan = read_plan(path)
    result = typed("approve", path, "--site", site, given="n\n")
    for word in (
        "Does it work?",
        plan.sha256(),
        "small_cnn",
        "ε 8.00",
        "times in 100",
        "NOT PRIVATE",
        "rounds     2",
        "unknown: this site has not joined",
    ):
        assert word in result.output
    assert not is_approved(site / "state", plan.sha256())
    done("approve", path, "--site", site, given="y\n")
    assert is_approved(site / "state", plan.sha256())
    assert "already approved" in done("approve", path, "--site", site).output


def test_approve_with_yes_asks_nothing(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", held_out=["hospital-a"])
    result = done("approve", path, "--site", site, "--yes")
    assert "only scores" in result.output
    assert is_approved(site / "state", read_plan(path).sha256())


def spend(site: Path, cohort: str = "c1") -> None:
    with Ledger.open(
        site / "state" / ledger_file_name(cohort), cohort=cohort, key=site_key(site / "state")
    ) as ledger:
        ledger.reserve(
            request=json.dumps(["run-1", "federated_dp"]),
            steps=STEPS,
            purpose="federated_dp",
            fingerprint="",
            max_epsilon=8.0,
            delta=1e-5,
        )


def test_the_budget_says_what_was_spent_on_what(site: Path) -> None:
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert (account["spent"], account["left"], account["entries"]) == (0.0, 8.0, [])
    spend(site)
    (account,) = json.loads(done("budget", "--site", site, "--format", "json", "--verify").stdout)
    assert 0 < account["spent"] < 8.0
    assert account["left"] == pytest.approx(8.0 - account["spent"])
    assert (account["cohort"], account["delta"], account["verified"], account["rows"]) == (
        "c1",
        1e-5,
        True,
        2,
    )
    assert account["entries"][0]["request"] == "run-1 federated_dp"
    text = done("budget", "--site", site, "--verify").stdout
    assert "times in 100" in text
    assert "verified: 2 entries" in text


def test_a_site_whose_unit_is_the_study_says_so_beside_every_epsilon(site: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((site / "site.yaml").read_text()) | {"patients": {"fallback": "study"}}
    (site / "site.yaml").write_text(yaml.safe_dump(values))
    spend(site)
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert account["unit"] == "study"
    text = done("budget", "--site", site).stdout
    assert "per study" in text
    assert "one study took part" in " ".join(text.split())
    path = write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    assert "costs each study" in typed("approve", path, "--site", site, given="n\n").output


def test_a_plan_is_not_approved_without_ethics_approval(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml")
    done("approve", path, "--site", site, "--yes")
    (note,) = (site / "state" / "approvals").glob("*.json")
    assert json.loads(note.read_text())["ethics_approval"] == "2026-17"
    (site / "cohort.yaml").write_text("ethics_approval: ''\nconsent_basis: broad\n")
    assert refused("approve", path, "--site", site, "--yes").code == "ethics-missing"


def test_a_run_without_privacy_is_never_hidden_by_a_number(site: Path) -> None:
    with Ledger.open(
        site / "state" / ledger_file_name("c1"), cohort="c1", key=site_key(site / "state")
    ) as ledger:
        ledger.record_non_private(
            request=json.dumps(["run-2", "federated"]), purpose="federated", fingerprint=""
        )
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert (account["has_non_private"], account["entries"][0]["epsilon"]) == (True, None)
    assert "NOT PRIVATE" in done("budget", "--site", site).stdout


def test_an_earlier_cohort_is_still_accounted_for(site: Path) -> None:
    spend(site)
    path = site / "site.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("cohort: c1", "cohort: c2"), encoding="utf-8")
    accounts = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert [(account["cohort"], account["spent"] > 0) for account in accounts] == [
        ("c2", False),
        ("c1", True),
    ]
    spend(site, "c2")
    accounts = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert [account["cohort"] for account in accounts] == ["c2", "c1"]


def test_a_ledger_that_was_tampered_with_is_refused(site: Path) -> None:
    import sqlite3

    spend(site)
    path = site / "state" / ledger_file_name("c1")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE rows SET content = replace(content, '20.0', '90.0') WHERE sequence = 2")
    connection.close()
    error = refused("budget", "--site", site, "--verify")
    assert (error.code, error.exit_status) == ("ledger-damaged", 4)


def test_a_ledger_that_is_gone_is_refused(site: Path) -> None:
    spend(site)
    (site / "state" / ledger_file_name("c1")).unlink()
    assert refused("budget", "--site", site).code == "ledger-missing"


def line(**changes: Any) -> dict[str, Any]:
    return {
        "at": "2026-03-01T10:00:00+01:00",
        "kind": "SiteUpdate",
        "class": "dp",
        "purpose": "train federated_dp",
        "run": "run-1",
        "round": 1,
        "bytes": 100,
        "sha256": "ab" * 32,
    } | changes


def test_every_message_that_left_is_shown(site: Path) -> None:
    lines = [line(), line(run="run-2", kind="Refusal", **{"class": "public"}, round=0, bytes=7)]
    (site / "state" / "sent.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8"
    )
    assert json.loads(done("sent", "--site", site, "--format", "json").stdout) == lines
    assert json.loads(done("sent", "run-2", "--site", site, "--format", "json").stdout) == lines[1:]
    text = done("sent", "--site", site).stdout
    assert "2 messages, 107 bytes" in text
    assert text.count("ab" * 32) == 2
    assert max(map(len, text.splitlines())) <= 80


def test_a_damaged_line_of_what_was_sent_is_said(site: Path) -> None:
    (site / "state" / "sent.jsonl").write_text(json.dumps(line()) + "\n{\n", encoding="utf-8")
    error = refused("sent", "--site", site)
    assert (error.code, "line 2" in error.message) == ("sent-damaged", True)


@pytest.fixture
def agent_answers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the caller that reaches the agent."""
    caller = types.ModuleType("client.ipc.client")
    caller.agent_health = lambda socket, timeout_s=2.0: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "client.ipc.client", caller)
    return caller


def test_status_is_good_only_when_both_are_up(
    site: Path, tmp_path: Path, agent_answers: types.ModuleType
) -> None:
    import os

    done("join", tmp_path / "kit.zip", "--fingerprint", kit_of(site, tmp_path / "kit.zip"), "--site", site)
    result = typed("status", "--site", site, "--format", "json")
    found = json.loads(result.stdout)
    assert (found["agent"], found["node"], found["federation"], found["supervised"]) == (
        True,
        False,
        "north",
        False,
    )
    status = {"connected": True, "since": "2026-03-01T10:00:00+01:00", "pid": os.getpid(), "last_error": ""}
    (site / "node" / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert json.loads(typed("status", "--site", site, "--format", "json").stdout)["node"] is True
    assert "connected since 2026-03-01" in typed("status", "--site", site).stdout


def test_the_node_shows_its_state_where_it_sees_nothing_else_of_the_site(
    tmp_path: Path, agent_answers: types.ModuleType
) -> None:
    import os

    bare = tmp_path / "bare"
    (bare / "node").mkdir(parents=True)
    assert exit_status_of("status", "--only", "node", "--site", bare) == 3
    status = {"connected": True, "since": "2026-03-01T10:00:00+01:00", "pid": os.getpid(), "last_error": ""}
    (bare / "node" / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert exit_status_of("status", "--only", "node", "--site", bare) == 0
    assert refused("status", "--only", "agent", "--site", bare).code == "no-such-site"
    assert refused("start", "--only", "node", "--site", bare).code == "not-joined"


def exit_status_of(*words: object) -> int:
    """What the command returns, as common/cli.py turns it into an exit status."""
    import typer

    status = typer.main.get_command(group).main(
        [str(word) for word in words], prog_name="site", standalone_mode=False
    )
    return status if isinstance(status, int) else 0


def test_exit_statuses(
    site: Path, tmp_path: Path, agent_answers: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_status_of("check", "--site", site) == 2
    assert exit_status_of("status", "--site", site) == 3
    assert exit_status_of("sent", "--site", site) == 0
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert exit_status_of("approve", write_plan(tmp_path / "plan.yaml"), "--site", site) == 4
    assert refused("stop", "--site", site).code == "not-running"
    assert refused("start", "--only", "both", "--site", site).code == "bad-argument"
