from __future__ import annotations

import json
import stat
from datetime import date, timedelta
from pathlib import Path

import pytest

from client.site.approvals import admit_approved, approval_of, approvals, approve, note_run, withdraw
from client.site.run_data import DataDigests, bind_data
from common.errors import ConfigError, RefusedError
from common.leave_one_out import members_of, study_of, study_plan
from common.plan import RunPlan, parse_plan
from common.pricing import with_noise

PLAN = parse_plan({"name": "demo", "arms": ["federated_dp"]})
SIGNED = with_noise(PLAN).canonical_json()
SHA256 = with_noise(PLAN).sha256()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    text = "name: hospital-a\nkind: hospital\ncohort: c\nnominal_patients: 200\n"
    (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "state").mkdir()
    return tmp_path


def refused(site: Path, run: str = "", text: str = SIGNED, today: date | None = None) -> str:
    """The code by which a run is refused, or ""."""
    try:
        admit_approved(site / "state", text, run, today=today)
    except RefusedError as refusal:
        return refusal.code if refusal.public_reason else "no reason"
    return ""


def begin(site: Path, run: str) -> str:
    code = refused(site, run)
    if not code:
        note_run(site / "state", SIGNED, run)
    return code


def note_of(site: Path) -> Path:
    return site / "state" / "approvals" / f"{SHA256}.json"


def test_the_text_that_the_coordinator_signs_is_what_is_approved(site: Path) -> None:
    assert refused(site) == "not-approved"
    approve(site, PLAN)
    assert json.loads(note_of(site).read_text())["text"] == SIGNED
    assert refused(site) == ""
    assert refused(site, text=PLAN.canonical_json()) == "not-approved", (
        "without its noise it costs something else"
    )
    louder = parse_plan({"name": "demo", "arms": ["federated_dp"], "privacy": {"noise_multiplier": 0.5}})
    for other in (with_noise(louder), parse_plan({"name": "demo", "seed": 8})):
        assert refused(site, text=other.canonical_json()) == "not-approved"
    assert refused(site, text=SIGNED + " ") == "not-approved"


def test_a_plan_with_its_noise_is_approved_as_the_plan_without(site: Path) -> None:
    assert approve(site, with_noise(PLAN)).plan_sha256 == approve(site, PLAN).plan_sha256


def test_one_approval_serves_one_run_which_may_be_resumed(site: Path) -> None:
    approve(site, PLAN)
    assert begin(site, "run-1") == ""
    assert begin(site, "run-1") == ""
    assert begin(site, "run-2") == "approval-used"
    assert refused(site) == "approval-used"
    approve(site, PLAN, runs=2)
    assert [begin(site, run) for run in ("run-1", "run-2", "run-3", "run-4")] == ["", "", "", "approval-used"]
    found = approval_of(site / "state", SHA256)
    assert found is not None
    assert (found.begun, found.runs_left) == (("run-1", "run-2", "run-3"), 0)


def test_the_name_of_a_run_is_what_it_is(site: Path) -> None:
    approve(site, PLAN, runs=2)
    for run in ("a\nb", "\x1b[2J"):
        assert begin(site, run) == ""
    assert begin(site, "a") == "approval-used"


def test_an_approval_holds_until_the_end_of_its_last_day(site: Path) -> None:
    today = date.today()
    approve(site, PLAN, until=today + timedelta(days=3))
    note_run(site / "state", SIGNED, "run-1")
    assert refused(site, "run-1", today=today + timedelta(days=3)) == ""
    assert refused(site, "run-1", today=today + timedelta(days=4)) == "approval-expired"
    approve(site, PLAN, until=today + timedelta(days=9))
    assert refused(site, "run-1", today=today + timedelta(days=4)) == ""


def test_what_was_withdrawn_is_not_approved_until_it_is_approved_again(site: Path) -> None:
    approve(site, PLAN)
    note_run(site / "state", SIGNED, "run-1")
    assert withdraw(site / "state", SHA256[:8]).plan == "demo"
    assert refused(site, "run-1") == "not-approved"
    assert [one.state(date.today()) for one in approvals(site / "state")] == ["withdrawn"]
    approve(site, PLAN)
    assert (refused(site, "run-1"), refused(site, "run-2")) == ("", "")
    withdraw(site / "state", SHA256)
    for unknown in (SHA256, SHA256[:4], "", "0" * 64):
        with pytest.raises(ConfigError) as caught:
            withdraw(site / "state", unknown)
        assert caught.value.code == "no-such-approval"


def approved_by_an_earlier_version(site: Path, plan: RunPlan) -> None:
    path = site / "state" / "approvals" / f"{plan.sha256()}.json"
    path.parent.mkdir()
    note = {"plan": plan.name, "plan_sha256": plan.sha256(), "at": "2026-01-01T00:00:00+00:00", "by": "li"}
    path.write_text(json.dumps(note))


def test_an_approval_without_text_serves_the_run_that_began_under_it_only(site: Path) -> None:
    approved_by_an_earlier_version(site, PLAN)
    text = PLAN.canonical_json()
    assert refused(site, "run-1", text=text) == "not-approved"
    data = DataDigests(images="i", labels={}, split={})
    bind_data(site / "state", "run-1", PLAN.sha256(), data)
    bind_data(site / "state", "run-2", "0" * 64, data)
    assert refused(site, "run-1", text=text) == ""
    assert refused(site, "run-2", text=text) == "not-approved", "begun under another plan"
    assert refused(site, text=text) == "not-approved"
    assert approvals(site / "state")[0].state(date.today()) == "earlier version"
    withdraw(site / "state", PLAN.sha256())
    assert refused(site, "run-1", text=text) == "not-approved"


def test_an_approval_says_when_and_who(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "dr-li")
    approved = approve(site, PLAN, ethics={"ethics_approval": "2026-17"})
    assert (approved.by, approved.plan, approved.ethics) == ("dr-li", "demo", {"ethics_approval": "2026-17"})
    assert approved.at
    assert stat.S_IMODE(note_of(site).stat().st_mode) == 0o600


def test_what_approves_nothing_is_refused(site: Path) -> None:
    for how in ({"runs": 0}, {"until": date.today() - timedelta(days=1)}):
        with pytest.raises(ConfigError) as caught:
            approve(site, PLAN, **how)
        assert caught.value.code == "bad-argument"
    assert approvals(site / "state") == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan_sha256": "0"}', "null"])
def test_a_damaged_note_approves_nothing(text: str, site: Path) -> None:
    approve(site, PLAN)
    note_of(site).write_text(text, encoding="utf-8")
    assert refused(site) == "not-approved"


def test_a_note_whose_text_was_exchanged_approves_nothing(site: Path) -> None:
    approve(site, PLAN)
    note = json.loads(note_of(site).read_text())
    other = parse_plan({"name": "demo", "seed": 8}).canonical_json()
    note_of(site).write_text(json.dumps(note | {"text": other}))
    assert refused(site) == refused(site, text=other) == "not-approved"


def test_a_note_of_another_plan_approves_nothing(site: Path) -> None:
    other = with_noise(parse_plan({"name": "other"}))
    approve(site, PLAN)
    note_of(site).rename(site / "state" / "approvals" / f"{other.sha256()}.json")
    assert refused(site, text=other.canonical_json()) == "not-approved"


@pytest.mark.parametrize("asked", ["", "../site", "0" * 63, "A" * 64, "0" * 64 + "/..", "0" * 64 + "\n"])
def test_what_is_no_hash_is_not_looked_up(asked: str, site: Path) -> None:
    assert approval_of(site / "state", asked) is None


def test_a_folder_that_is_no_site_approves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        approve(tmp_path, PLAN)
    assert caught.value.code == "no-such-site"


STUDY = study_plan(with_noise(PLAN), ("hospital-a", "hospital-b", "hospital-c"))


def member_refused(site: Path, member: RunPlan, run: str) -> str:
    """The code by which a run of a study is refused, or "", and then it has begun."""
    try:
        admit_approved(site / "state", member.canonical_json(), run, study=study_of(member).canonical_json())
    except RefusedError as refusal:
        return refusal.code
    note_run(site / "state", member.canonical_json(), run)
    return ""


def test_a_study_is_approved_once_and_each_of_its_runs_begins_once(site: Path) -> None:
    members = members_of(STUDY)
    assert member_refused(site, members[1], "r") == "not-approved"
    approve(site, STUDY)
    for number, member in enumerate(members):
        assert member_refused(site, member, f"run-{number}") == ""
        assert member_refused(site, member, f"run-{number}") == "", "it may be resumed"
        assert member_refused(site, member, "another") == "approval-used", "what is left is of the others"
    found = approval_of(site / "state", STUDY.sha256())
    assert found is not None
    assert (found.begun, found.runs_left) == (("run-0", "run-1", "run-2", "run-3"), 0)
    assert found.state(date.today()) == "used"
    approve(site, STUDY)
    assert [member_refused(site, one, "again") for one in members] == [""] * 4
    assert member_refused(site, members[0], "once more") == "approval-used"
    withdraw(site / "state", STUDY.sha256())
    assert {member_refused(site, one, "run-1") for one in members} == {"not-approved"}


def test_a_member_is_of_the_study_that_was_approved(site: Path) -> None:
    """One site more, another seed, or the plan alone: nobody approved these."""
    approve(site, STUDY)
    wider = study_plan(with_noise(PLAN), (*STUDY.leave_one_site_out, "hospital-d"))
    for other in (wider, STUDY.model_copy(update={"seed": 8})):
        assert {member_refused(site, one, "r") for one in members_of(other)} == {"not-approved"}
    assert refused(site, "r") == "not-approved"
    approve(site, PLAN)
    withdraw(site / "state", STUDY.sha256())
    assert member_refused(site, members_of(STUDY)[0], "r") == "not-approved"
