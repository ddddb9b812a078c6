from __future__ import annotations

import json
import shutil
import sys
import types
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import yaml
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.cli.site import site as group
from client.simulation.phantom_sites import write_consortium
from client.site.approvals import approval_of, approve, index_approved, note_run
from client.site.config import read_site
from client.site.run_data import DataDigests, bind_data
from client.site.sent_log import note_sent
from client.site.site_ledger import LEDGER, open_ledger
from client.supervision import supervisor
from common.enrolment import Kit, read_request, write_kit
from common.errors import DataError, FedqcError
from common.leave_one_out import members_of
from common.plan import Split, read_plan
from common.pricing import schedule, with_noise
from common.privacy import GaussianSteps, epsilon_of, epsilon_text
from common.signing import load_key, public_text
from tests.helpers.command_line import ROOT
from tests.helpers.command_line import typed as type_fedqc
from tests.helpers.consortium import write_plan
from tests.helpers.own_slices import write as write_image
from tests.helpers.spies import slow_until_spoken

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


def test_a_wrong_answer_is_asked_for_again_when_it_is_typed_and_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    answers = [
        *("clinic", "hospital"),
        *("Hospital A", "", "hospital-a"),
        *("~/missing", "~/images"),
        *("~/images", "~/missing/labels.csv", "~/labels.csv"),
        *("my cohort", "c1"),
        *("about 200", "0", "200"),
        *("strict", "usual"),
        *("pending", "2026-17"),
        *("none", "broad"),
    ]
    result = done("init", "--site", tmp_path / "site", given="\n".join(answers) + "\n")
    config = read_site(tmp_path / "site")[0]
    assert (config.name, config.images, config.nominal_patients) == (
        "hospital-a",
        str(tmp_path / "images"),
        200,
    )
    assert config.labels == str(tmp_path / "labels.csv")
    for wrong in (
        "one of hospital, public, synthetic",
        "missing: no such folder",
        "'pending' states nothing",
    ):
        assert wrong in result.stderr


def test_a_set_up_that_ends_early_says_how_to_go_on(tmp_path: Path) -> None:
    result = typed("init", "--site", tmp_path / "site", given="hospital\nhospital-a\n")
    assert result.exit_code != 0
    assert "fedqc site init --kind hospital --name hospital-a" in result.stderr
    assert not (tmp_path / "site").exists()


def test_what_set_up_join_and_approval_end_in_is_json_for_programs(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDQC_SITE", str(site))
    fingerprint = kit_of(site, tmp_path / "kit.zip")
    words = [tmp_path / "kit.zip", "--fingerprint", fingerprint, "--format", "json"]
    joined = json.loads(done("join", *words).stdout)
    assert (joined["site"], joined["federation"]) == ("hospital-a", "north")
    path = write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    approved = json.loads(done("approve", path, "--yes", "--format", "json").stdout)
    assert (approved["plan"], approved["state"], approved["runs_left"]) == ("tiny", "open", 1)
    withdrawn = json.loads(done("approve", "--withdraw", path, "--format", "json").stdout)
    assert withdrawn["plan_sha256"] == approved["plan_sha256"]
    assert withdrawn["state"] != "open"


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
    plan = with_noise(read_plan(path))
    result = typed("approve", path, "--site", site, given="n\n")
    for word in (
        "Does it work?",
        plan.sha256(),
        "small_cnn",
        "ε 2.00 at δ 1e-05",
        "times in 100",
        "NOT PRIVATE",
        "rounds     2",
        "unknown: this site has not joined",
    ):
        assert word in result.output
    assert "for 1 new run" in result.output
    assert approval_of(site / "state", plan.sha256()) is None
    done("approve", path, "--site", site, given="y\n")
    assert approval_of(site / "state", plan.sha256()) is not None
    assert "already approved" in done("approve", path, "--site", site).output


@pytest.mark.parametrize("words", ["\x1b[8m", "\u202e", "a\ncost  ε 0.01"])
def test_a_question_that_would_hide_the_cost_is_no_plan(site: Path, tmp_path: Path, words: str) -> None:
    path = write_plan(tmp_path / "plan.yaml", question=f"Why? {words}", arms=["federated_dp"])
    assert refused("approve", path, "--site", site).code == "bad-plan"


def test_a_question_cannot_look_like_the_line_of_the_cost(site: Path, tmp_path: Path) -> None:
    forged = "Why?" + "\u00a0" * 65 + "cost       all together, to each patient: ε 0.01 at δ 1e-09"
    path = write_plan(tmp_path / "plan.yaml", question=forged, arms=["federated_dp"])
    shown = typed("approve", path, "--site", site, given="n\n").output.splitlines()
    assert [line for line in shown if line.startswith("cost")] == [
        line for line in shown if line.startswith("cost       all together, to each patient (add/remove")
    ]
    assert "question   Why? cost all together" in "\n".join(shown)
    assert max(len(line) for line in shown if line.startswith(("question", " " * 11))) <= 80


def test_approve_with_yes_asks_nothing(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", held_out=["hospital-a"])
    result = done("approve", path, "--site", site, "--yes")
    assert "only scores" in result.output
    assert approval_of(site / "state", with_noise(read_plan(path)).sha256()) is not None


def test_a_study_is_shown_with_its_runs_and_their_price_together(site: Path, tmp_path: Path) -> None:
    sites = ("hospital-a", "hospital-b", "hospital-c")
    values = {"arms": ["federated_dp"], "held_out": [], "leave_one_site_out": [*sites]}
    path = write_plan(tmp_path / "plan.yaml", **values, held_out_patients="test")
    study = with_noise(read_plan(path))
    members, delta = members_of(study), study.privacy.delta
    own = [steps for plan in members for steps in schedule(plan, trains=plan.trains_at("hospital-a"))]
    shown = " ".join(done("approve", path, "--site", site, "--yes").output.split())
    assert (
        f"cost all runs together, to each patient (add/remove): ε {epsilon_text(epsilon_of(own, delta))}"
        in shown
    )
    assert "study 4 runs, which are approved together" in shown
    for member in members:
        assert f"without {', '.join(member.held_out) or 'none'}: hash {member.sha256()}" in shown
    assert "for 1 new run of each of its 4 members" in shown
    one = tmp_path / "member.yaml"
    one.write_text(members[1].canonical_json(), encoding="utf-8")
    assert "4 runs left" in done("approve", one, "--site", site).output, "its study is what is approved"
    note_run(site / "state", members[1].canonical_json(), "r")
    (row,) = json.loads(done("approve", "--list", "--site", site, "--format", "json").stdout)
    assert (row["plan_sha256"], row["runs_left"], row["begun"]) == (study.sha256(), 3, ["r"])
    done("approve", "--withdraw", one, "--site", site)
    (row,) = json.loads(done("approve", "--list", "--site", site, "--format", "json").stdout)
    assert row["state"] == "withdrawn"


def test_changed_data_of_a_run_of_a_study_are_accepted_by_the_study(site: Path, tmp_path: Path) -> None:
    values = {"held_out": [], "leave_one_site_out": ["hospital-a", "hospital-b", "hospital-c"]}
    path = write_plan(tmp_path / "plan.yaml", **values, held_out_patients="test")
    study, state = with_noise(read_plan(path)), site / "state"
    approve(site, study, index="i")
    first = DataDigests(images="i", labels={"p": "1"}, split={"p": "train"})
    run = "without-b", members_of(study)[2].sha256()
    bind_data(state, *run, first)
    with pytest.raises(DataError):
        bind_data(state, *run, replace(first, images="j"))
    done("approve", path, "--site", site, "--changed-data", "without-b", "--yes")
    assert bind_data(state, *run, replace(first, images="j")) is True
    assert index_approved(state, study.sha256()) == "j", "the runs that follow begin with it"


def test_approvals_are_listed_renewed_and_withdrawn(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    signed = with_noise(read_plan(path))
    assert json.loads(done("approve", "--list", "--site", site, "--format", "json").stdout) == []
    last = date.today() + timedelta(days=5)
    done("approve", path, "--site", site, "--yes", "--runs", 2, "--until", last)
    note_run(site / "state", signed.canonical_json(), "demo-1")
    (row,) = json.loads(done("approve", "--list", "--site", site, "--format", "json").stdout)
    assert (row["plan_sha256"], row["runs_left"], row["begun"]) == (signed.sha256(), 1, ["demo-1"])
    assert (row["until"], row["state"], row["by"] != "") == (last.isoformat(), "open", True)
    text = done("approve", "--list", "--site", site).stdout
    for word in (signed.sha256(), "open", "demo-1", "1 left", last.isoformat()):
        assert word in text
    done("approve", path, "--site", site, "--yes", "--days", 30)
    (row,) = json.loads(done("approve", "--list", "--site", site, "--format", "json").stdout)
    assert (row["runs_left"], row["until"]) == (1, (date.today() + timedelta(days=30)).isoformat())
    done("approve", "--withdraw", path, "--site", site)
    assert "withdrawn" in done("approve", "--list", "--site", site).stdout
    assert refused("approve", "--withdraw", signed.sha256(), "--site", site).code == "no-such-approval"
    done("approve", path, "--site", site, "--yes")
    done("approve", "--withdraw", signed.sha256()[:12], "--site", site)


def test_approving_freezes_the_images_and_approving_again_freezes_them_anew(
    data: Path, tmp_path: Path
) -> None:
    path, site = write_plan(tmp_path / "plan.yaml"), data / "hospital-a"

    def index() -> str | None:
        (row,) = json.loads(done("approve", "--list", "--site", site, "--format", "json").stdout)
        return row["index"]  # type: ignore[no-any-return]

    said = done("approve", path, "--site", site, "--yes").output
    first = index()
    assert first is not None
    assert f"index {first}" in said
    checks = json.loads(typed("check", path, "--site", site, "--format", "json").stdout)
    assert next(one for one in checks if one["check"] == "index")["ok"] is True
    images = sorted((site / "images").glob("*.dcm"))
    images[0].unlink()
    checks = json.loads(typed("check", path, "--site", site, "--format", "json").stdout)  # reads it anew
    assert "approve it again" in next(one for one in checks if one["check"] == "index")["fix"]
    assert "already approved" in done("approve", path, "--site", site).output
    second = index()
    assert second not in (None, first)
    for image in images[1 : len(images) // 4]:
        image.write_bytes(b"damaged")
    said = done("approve", path, "--site", site, "--yes", "--days", 3).output
    assert "too-many-quarantined" in said
    assert "approve the plan again" in said
    assert index() == second, "the run still has these images"


def test_a_plan_is_approved_without_images_and_the_operator_is_told(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    said = done("approve", path, "--site", site, "--yes").output
    assert "the images are not frozen for this plan [" in said
    assert approval_of(site / "state", with_noise(read_plan(path)).sha256()).index == ""  # type: ignore[union-attr]


def test_approve_needs_a_plan_and_one_end(site: Path, tmp_path: Path) -> None:
    assert refused("approve", "--site", site).code == "bad-argument"
    path = write_plan(tmp_path / "plan.yaml")
    both = ["--days", 3, "--until", date.today()]
    assert refused("approve", path, "--site", site, "--yes", *both).code == "bad-argument"
    assert refused("approve", path, "--site", site, "--yes", "--until", "2020-01-01").code == "bad-argument"


def spend(site: Path) -> None:
    with open_ledger(*read_site(site)) as ledger:
        ledger.reserve(
            request=json.dumps(["run-1", "federated_dp"]),
            steps=STEPS,
            purpose="federated_dp",
            fingerprint="",
            max_epsilon=8.0,
            max_delta=1e-5,
        )


def test_the_budget_says_what_was_spent_on_what(site: Path) -> None:
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert (account["spent"], account["cap"], account["entries"]) == (0.0, 8.0, [])
    spend(site)
    (account,) = json.loads(done("budget", "--site", site, "--format", "json", "--verify").stdout)
    assert 0 < account["spent"] < 8.0
    assert (account["cohorts"], account["delta"], account["verified"], account["rows"]) == (
        *(["c1"], 1e-5, True),
        3,
    )
    assert account["entries"][0]["request"] == "run-1 federated_dp"
    text = done("budget", "--site", site, "--verify").stdout
    assert "times in 100" in text
    assert "verified: 3 entries" in text
    shown = " ".join(text.split())
    assert f"ε {epsilon_text(account['spent'])} spent; guaranteed: at most ε 8.00" in shown
    assert "per patient (add/remove one patient), at δ 1e-05" in shown
    (bar,) = (line.strip() for line in text.splitlines() if line.strip().startswith("["))
    assert (len(bar), bar.count("#")) == (42, round(40 * account["spent"] / 8))


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
    assert "to each study" in typed("approve", path, "--site", site, given="n\n").output


def test_a_plan_is_not_approved_without_ethics_approval(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml")
    done("approve", path, "--site", site, "--yes")
    (note,) = (site / "state" / "approvals").glob("*.json")
    assert json.loads(note.read_text())["ethics_approval"] == "2026-17"
    (site / "cohort.yaml").write_text("ethics_approval: ''\nconsent_basis: broad\n")
    assert refused("approve", path, "--site", site, "--yes").code == "ethics-missing"


def test_a_run_without_privacy_is_never_hidden_by_a_number(site: Path) -> None:
    with open_ledger(*read_site(site)) as ledger:
        ledger.record_non_private(
            request=json.dumps(["run-2", "federated"]), purpose="federated", fingerprint=""
        )
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert (account["has_non_private"], account["entries"][0]["epsilon"]) == (True, None)
    assert "NOT PRIVATE" in done("budget", "--site", site).stdout


def rename_cohort(site: Path, **fields: object) -> None:
    values = yaml.safe_load((site / "site.yaml").read_text()) | fields
    (site / "site.yaml").write_text(yaml.safe_dump(values))


def test_a_renamed_cohort_goes_on_with_the_same_budget(site: Path) -> None:
    spend(site)
    (before,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    rename_cohort(site, cohort="c2")
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert account["spent"] == before["spent"] > 0
    spend(site)
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert account["spent"] > before["spent"]
    assert [entry["cohort"] for entry in account["entries"]] == ["c1", "c2"]


def test_a_disjoint_cohort_is_an_account_of_its_own(site: Path) -> None:
    with open_ledger(*read_site(site)) as ledger:
        ledger.admit_patients({"p": []})
    spend(site)
    rename_cohort(site, cohort="c2", cohort_disjoint=True)
    accounts = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert [(account["account"], account["spent"] > 0) for account in accounts] == [("c2", False), ("", True)]
    assert "cohort c2, disjoint: ε 0.00 spent" in done("budget", "--site", site).stdout


def test_the_cap_is_raised_by_name_and_reason_only(site: Path) -> None:
    assert refused("budget", "--site", site, "--raise", "9", "--reason", "more").code == "bad-cap"
    spend(site)
    assert refused("budget", "--site", site, "--raise", "9").code == "bad-request"
    done("budget", "--site", site, "--raise", "9", "--reason", "new consent form")
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert account["cap"] == 8.0, "policy.yaml still says 8"
    assert [(row["epsilon"], row["reason"]) for row in account["raised"]] == [(9.0, "new consent form")]
    policy = yaml.safe_load((site / "policy.yaml").read_text()) | {"max_epsilon": 9.0}
    (site / "policy.yaml").write_text(yaml.safe_dump(policy))
    (account,) = json.loads(done("budget", "--site", site, "--format", "json").stdout)
    assert account["cap"] == 9.0
    assert "cap raised to ε 9" in done("budget", "--site", site).stdout


def test_a_budget_below_what_was_spent_is_shown(site: Path) -> None:
    spend(site)
    policy = yaml.safe_load((site / "policy.yaml").read_text())
    policy |= {"max_epsilon": 0.01, "max_epsilon_per_run": 0.01}
    (site / "policy.yaml").write_text(yaml.safe_dump(policy))
    text = done("budget", "--site", site).stdout
    assert "OVER the cap" in text
    assert "[" + "#" * 40 + "]" in text


def test_a_ledger_that_was_tampered_with_is_refused(site: Path) -> None:
    import sqlite3

    spend(site)
    path = site / "state" / LEDGER
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE rows SET content = replace(content, '20.0', '90.0') WHERE sequence = 3")
    connection.close()
    error = refused("budget", "--site", site, "--verify")
    assert (error.code, error.exit_status) == ("ledger-damaged", 4)


def test_a_ledger_that_is_gone_is_refused(site: Path) -> None:
    spend(site)
    for path in (site / "state").glob("ledger.sqlite3*"):
        path.unlink()
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
    note_sent(site / "state", line())
    note_sent(site / "state", line(round=2))
    path = site / "state" / "sent.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"round": 2', '"round": 3'), encoding="utf-8")
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


def test_stop_says_that_it_waits(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = slow_until_spoken(monkeypatch, supervisor, "stop", "stopped")
    assert exit_status_of("stop", "--site", site) == 0
    assert sum(line.startswith(f"{site}: stopping") for line in told) >= 3


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


def test_the_way_of_the_readme_leads_to_that_of_deployment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """site.yaml by hand, check, workbooks for readers, their merge; then `site init` in the same folder."""
    folder = tmp_path / "mysite"
    write_consortium(tmp_path / "phantoms", sites=2, patients=8, seed=7, say=lambda text: None)
    shutil.copytree(tmp_path / "phantoms" / "hospital-a" / "images", folder / "images")
    example = (ROOT / "configs" / "sites" / "example.yaml").read_text(encoding="utf-8")
    (folder / "site.yaml").write_text(example.replace("kind: hospital", "kind: synthetic"), encoding="utf-8")
    assert type_fedqc(capsys, "data", "check", str(folder))[0] == 2, "no labels yet"
    assert type_fedqc(capsys, "data", "labels", str(folder), "--sheets", "1", "--per", "series")[0] == 0
    sheet = folder / "sheets" / "labels-reader-1.xlsx"
    book = openpyxl.load_workbook(sheet)
    page = book.worksheets[0]
    titles = [str(cell.value).split("\n")[0] for cell in page[1]]
    for place, row in enumerate(page.iter_rows(min_row=2), start=2):
        modality = "CT" if "CT" in [cell.value for cell in row] else "MR"
        name = "metal" if modality == "CT" else "motion"
        row[titles.index(name)].value = place // 2 % 2
    book.save(sheet)
    assert type_fedqc(capsys, "data", "labels", str(folder), "--merge", str(sheet))[0] == 0
    key = (folder / "state" / "site.key").read_bytes()
    text = (folder / "site.yaml").read_text(encoding="utf-8")
    result = done("init", "--site", folder, "--yes")
    assert "adopted" in result.stderr
    assert (folder / "state" / "site.key").read_bytes() == key
    assert (folder / "site.yaml").read_text(encoding="utf-8").startswith(text.rstrip())
    config, _ = read_site(folder)
    assert (config.name, config.assessed, config.split) == ("my-hospital", ("metal", "motion"), Split())
    assert type_fedqc(capsys, "data", "labels", str(folder))[0] == 0, (
        "the rows of the workbook still name their images"
    )
    assert type_fedqc(capsys, "data", "check", str(folder))[0] == 0
    assert read_request(folder / "request.zip").site == "my-hospital"


def test_init_asks_only_for_what_site_yaml_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    (folder / "images").mkdir(parents=True)
    (folder / "site.yaml").write_text("name: a\nkind: public\ncohort: c\nnominal_patients: 50\n")
    (folder / "labels.csv").write_text("file,metal,motion\na,1,\n")
    result = done("init", "--site", folder, given="open\nmetal\n")
    assert read_site(folder)[0].assessed == ("metal",)
    assert "Name of the site" not in result.stderr
    assert refused("init", "--site", folder, "--yes").code == "site-exists"


def test_none_assessed_is_declared_by_a_word(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    words = ["--name", "a", "--images", tmp_path / "images", "--labels", tmp_path / "labels.csv", "--yes"]
    words += ["--nominal-patients", 50, "--cohort", "c", "--kind", "public"]
    done("init", "--site", tmp_path / "one", *words, "--assessed", "none")
    assert read_site(tmp_path / "one")[0].assessed == ()
    done("init", "--site", tmp_path / "two", *words)
    assert read_site(tmp_path / "two")[0].assessed is None
    assert refused("init", "--site", tmp_path / "three", *words, "--assessed", "zebra").code == "bad-site"


def test_a_site_that_is_no_hospital_is_declared_so(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "1.dcm", ours=False)
    words = ["--name", "a", "--images", tmp_path / "images", "--labels", tmp_path / "labels.csv", "--yes"]
    words += ["--nominal-patients", 50, "--cohort", "c", "--kind", "public"]
    assert refused("init", "--site", tmp_path / "a", *words).code == "bad-argument"
    assert not (tmp_path / "a").exists()
    prompted = [word for word in words if word != "--yes"]
    asked = typed("init", "--site", tmp_path / "b", *prompted, given="open\nvolunteers\n")
    assert "why are these no hospital's patients" in asked.output
    assert read_site(tmp_path / "b")[0].declared_not_hospital.why == "volunteers"  # type: ignore[union-attr]
    done("init", "--site", tmp_path / "a", *words, "--declare", "a public\ncollection")
    declared = read_site(tmp_path / "a")[0].declared_not_hospital
    assert declared is not None
    assert (declared.why, declared.images) == ("a public collection", str(tmp_path / "images"))
    assert refused("declare", "again", "--site", tmp_path / "a").code == "already-declared"


def test_a_folder_of_an_earlier_version_is_declared_by_one_command(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    text = "name: a\nkind: public\ncohort: c\nnominal_patients: 50  # about\n"
    (tmp_path / "site.yaml").write_text(text)
    assert refused("declare", " ", "--site", tmp_path).code == "bad-argument"
    done("declare", "a public collection: CC BY", "--site", tmp_path)
    assert (tmp_path / "site.yaml").read_text().startswith(text)
    declared = read_site(tmp_path)[0].declared_not_hospital
    assert declared is not None
    assert (declared.why, declared.images) == ("a public collection: CC BY", "images")
    (tmp_path / "site.yaml").write_text(text.replace("public", "hospital"))
    assert refused("declare", "no", "--site", tmp_path).code == "bad-argument"


def test_images_that_were_accepted_in_a_run_are_those_of_later_runs_too(site: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml")
    signed, state = with_noise(read_plan(path)), site / "state"
    approve(site, signed, runs=2, index="i")
    first = DataDigests(images="i", labels={"p": "1"}, split={"p": "train"})
    bind_data(state, "run-1", signed.sha256(), first)
    with pytest.raises(DataError):
        bind_data(state, "run-1", signed.sha256(), replace(first, images="j"))
    assert index_approved(state, signed.sha256()) == "i"
    done("approve", path, "--site", site, "--changed-data", "run-1", "--yes")
    assert index_approved(state, signed.sha256()) == "j"
    assert approval_of(state, signed.sha256()).runs_left == 2  # type: ignore[union-attr]


def test_changed_data_are_shown_and_accepted_by_the_operator(site: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.yaml")
    first = DataDigests(images="i", labels={"p": "1"}, split={"p": "train"})
    state, digest = site / "state", read_plan(plan).sha256()
    bind_data(state, "run-1", digest, first)
    error = refused("approve", plan, "--site", site, "--changed-data", "run-1", "--yes")
    assert error.code == "no-changed-data"
    with pytest.raises(DataError):
        bind_data(state, "run-1", digest, replace(first, labels={"p": "2"}))
    result = typed("status", "--site", site)
    assert "run-1: labels changed since its first round" in " ".join(result.stdout.split())
    assert all(line[11] == " " != line[12] for line in result.stdout.splitlines())  # two columns
    assert max(map(len, result.stdout.splitlines())) <= 80
    said = json.loads(typed("status", "--site", site, "--format", "json").stdout)
    assert said["data_changed"] == [{"run": "run-1", "changes": ["labels"]}]
    declined = typed("approve", plan, "--site", site, "--changed-data", "run-1", given="n\n")
    assert "nothing was changed" in declined.stderr
    assert "other labels than in its first round" in declined.stderr
    done("approve", plan, "--site", site, "--changed-data", "run-1", "--yes")
    assert bind_data(state, "run-1", digest, replace(first, labels={"p": "2"})) is True
    assert json.loads(typed("status", "--site", site, "--format", "json").stdout)["data_changed"] == []
