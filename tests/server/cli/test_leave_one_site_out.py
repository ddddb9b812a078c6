"""`fedqc run start --leave-one-site-out` begins each run once, goes on where it stopped, and says the table.

The SuperLink is left out: a run that is handed over is carried out by `conduct`, in this process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.leave_one_out import members_of, study_plan
from common.plan import RunPlan, read_plan
from common.pricing import with_noise
from server.cli import leave_one_site_out as module
from server.federation.registry import Federation
from server.run.control_files import write_outcome
from server.run_folder import RunFolder
from tests.helpers.command_line import typed
from tests.helpers.consortium import SITES, Consortium, tiny_plan
from tests.helpers.quick_federation import quick_federation

THREE = SITES[:3]
STUDY = study_plan(with_noise(tiny_plan(training={"rounds": 1}, arms=["public", "federated"])), THREE)
RUNS = ["first-all", *(f"first-without-{site}" for site in THREE)]


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    return quick_federation(tmp_path / "fed", monkeypatch)


@pytest.fixture
def begun(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were handed over, in their order. Four sites are connected, the study is of three."""
    names: list[str] = []

    def hand_over(federation: Federation, plan: RunPlan, name: str, order: Any) -> None:
        names.append(name)
        write_outcome(federation.folder, name, "check", {"sites": {}})
        consortium.conduct(plan, federation.runs / name)

    def go_on(federation: Federation, found: RunFolder, order: Any) -> None:
        hand_over(federation, found.plan, found.path.name, order)

    monkeypatch.setattr(module, "submit", hand_over)
    monkeypatch.setattr(module, "continue_run", go_on)
    monkeypatch.setattr(module, "follow_start", lambda *words, **more: 0)
    return names


def test_a_study_is_carried_out_once_and_continued_where_it_stopped(
    federation: Federation,
    consortium: Consortium,
    begun: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "study.yaml"
    plan.write_text(yaml.safe_dump(STUDY.model_dump(mode="json")), encoding="utf-8")
    to = ("--federation", federation.folder)
    consortium.stop_at = 3 + 1  # the second run is interrupted in its first round
    status, _, talk = typed(capsys, "run", "start", plan, *to, "--name", "first")
    assert status == 130
    assert talk.index("4 runs: 3 sites, each left out once, and none.") < talk.index("run 1 of 4: first-all")
    assert "first: begins no further run; fedqc run resume first goes on after this one" in talk
    assert begun == RUNS[:2]
    assert read_plan(federation.runs / "first" / "study.yaml") == STUDY
    status, _, talk = typed(capsys, "run", "start", plan, *to, "--name", "first")
    assert (status, "[run-exists]" in talk, "fedqc run resume first" in talk) == (2, True, True)
    assert module.present_run(federation, "first") == RUNS[1]
    assert module.present_run(federation, RUNS[2]) == RUNS[2]

    consortium.stop_at = None
    status, said, talk = typed(capsys, "run", "resume", "first", *to)
    assert (status, begun) == (0, [*RUNS[:2], *RUNS[1:]])
    assert said.startswith("3 hospitals, each left out once")
    folders = [RunFolder.open(federation.runs / name) for name in RUNS]
    assert [folder.plan for folder in folders] == [*members_of(STUDY)]
    assert all({one["site"] for one in folder.manifest["sites"]} == {*THREE} for folder in folders)
    results = json.loads((federation.runs / "first" / "results.json").read_text(encoding="utf-8"))
    assert [(one["held_out"], one["trained"], one["plan_sha256"]) for one in results["members"]] == [
        ([*member.held_out], [site for site in THREE if site not in member.held_out], member.sha256())
        for member in members_of(STUDY)
    ]
    assert set(results["scored_on"].values()) == {"test"}
    assert (federation.runs / "first" / "table.txt").read_text(encoding="utf-8").strip() in said
    assert (
        said.partition("\nstudy folder")[0].strip()
        == typed(capsys, "compare", *(folder.path for folder in folders))[1].strip()
    )

    status, again, _ = typed(capsys, "run", "resume", "first", *to)
    assert (status, again, len(begun)) == (0, said, 5)
    rounds = federation.runs / RUNS[1] / "rounds.jsonl"
    if not rounds.is_file():
        (rounds,) = (federation.runs / RUNS[1]).glob("arms/federated/rounds.jsonl")
    record = json.loads(rounds.read_text(encoding="utf-8"))
    rounds.write_text(json.dumps(record | {"answered": [*THREE]}) + "\n", encoding="utf-8")
    status, _, talk = typed(capsys, "run", "resume", "first", *to)
    assert (status, "[held-out-trained]" in talk) == (1, True)


def test_a_site_that_is_away_ends_the_study(
    federation: Federation, begun: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "study.yaml"
    away = study_plan(STUDY, (*THREE, "hospital-z"))
    plan.write_text(yaml.safe_dump(away.model_dump(mode="json")), encoding="utf-8")
    status, _, talk = typed(capsys, "run", "start", plan, "--federation", federation.folder, "--name", "x")
    assert (status, "[unknown-site]: leave_one_site_out = 'hospital-z'" in talk) == (2, True)
    assert begun == ["x-all"]


@pytest.mark.parametrize("option", ["--accept-missing", "--detach"])
def test_an_option_that_no_study_has_is_refused(
    option: str, federation: Federation, begun: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "study.yaml"
    plan.write_text(yaml.safe_dump(STUDY.model_dump(mode="json")), encoding="utf-8")
    status, _, talk = typed(capsys, "run", "start", plan, "--federation", federation.folder, option)
    assert (status, f"[bad-argument]: {option}: " in talk, begun) == (2, True, [])


def test_the_plan_of_the_study_is_written_for_hospitals_and_nobody_is_asked(
    federation: Federation, begun: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "study.yaml"
    values = tiny_plan(arms=["federated_dp"]).model_dump(mode="json")
    plan.write_text(
        yaml.safe_dump(
            values | {"leave_one_site_out": [*THREE], "held_out": []} | {"held_out_patients": "test"}
        ),
        encoding="utf-8",
    )
    words = ("run", "start", plan, "--federation", federation.folder, "--write-plan", out)
    status, _, talk = typed(capsys, *words)
    assert (status, begun, [*federation.runs.glob("*")]) == (0, [], [])
    assert "all together 3." in talk
    assert read_plan(out) == study_plan(with_noise(tiny_plan(arms=["federated_dp"])), THREE)
    few = (*words[:2], write_few(tmp_path), *words[3:5], "--leave-one-site-out")
    status, _, talk = typed(capsys, *few)
    assert (status, "[too-few-sites]" in talk) == (2, True), "nobody is enrolled here"


def write_few(folder: Path) -> Path:
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump(tiny_plan().model_dump(mode="json")), encoding="utf-8")
    return path
