"""A study that leaves out each hospital once, over real processes: approved once, interrupted, continued."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.leave_one_out import members_of, study_plan, together_epsilon
from common.plan import read_plan
from common.pricing import with_noise
from common.privacy import epsilon_text
from server.run_folder import RunFolder
from tests.helpers.consortium import settle
from tests.helpers.rig import LIMIT_S, Deployment, deployed_plan, wait_until

pytestmark = pytest.mark.slow
NOISED, DISCLOSED, SYNTHETIC = SITES = tuple(f"hospital-{letter}" for letter in "abc")
PLAN = deployed_plan(
    name="study",
    arms=["public", "federated_dp"],
    training={"rounds": 2},
    federation={"quorum": 2, "codec": "lossless", "deadline_s": 300},
)
STUDY = study_plan(with_noise(PLAN), SITES)
RUNS = ("first-all", *(f"first-without-{site}" for site in SITES))
TOGETHER = together_epsilon(members_of(STUDY), SITES)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    running = Deployment(tmp_path_factory.mktemp("left-out"), sites=3, patients=30, running=False)
    with running:
        running.make_data()
        running.init()
        ethics = {"ethics_approval": "2026-17", "consent_basis": "broad consent"}
        for name in (NOISED, DISCLOSED):
            running.enrol(name, level="usual", kind="hospital", nominal=500, **ethics)
        running.enrol(SYNTHETIC)
        approved = {"require_approval": True, "answer_grid_s": 0, "max_epsilon_per_run": 2.0}
        settle(running.site(NOISED), approved)
        settle(running.site(DISCLOSED), approved | {"evaluation": "disclosed"})
        running.start_federation()
        for name in SITES:
            running.start_site(name, wait=False)
        for name in SITES:
            running.await_site(name)
        yield running
    assert running.left_behind == []


@pytest.fixture(scope="module")
def approved(hospitals: Deployment) -> Path:
    """The study's plan, refused before anybody approved it, then approved once at each hospital."""
    flag, path = "--leave-one-site-out", hospitals.folder / "study.yaml"
    said = hospitals.run_start(PLAN, "first", flag, status=2)  # too few sites are left
    assert said.stderr.index(f"all together {epsilon_text(TOGETHER)}") < said.stderr.index("handing over")
    assert f"{NOISED}: not-approved" in said.stderr
    assert not hospitals.run("first-all").exists()
    hospitals.run_start(PLAN, "first", flag, "--write-plan", path)
    assert read_plan(path) == STUDY
    for name in (NOISED, DISCLOSED):
        said = hospitals.do("site", "approve", path, "--site", hospitals.site(name), "--yes")
        words = " ".join(said.stderr.split())
        assert f"ε {epsilon_text(TOGETHER)} at δ" in words
        assert all(f"hash {member.sha256()}" in words for member in members_of(STUDY))
        assert "for 1 new run of each of its 4 members" in words
    return path


@pytest.fixture(scope="module")
def finished(hospitals: Deployment, approved: Path) -> str:
    """The study, whose command is ended in the second of its runs and continued; gives what it printed."""
    words = ["run", "start", approved, "--federation", hospitals.fed, "--name", "first"]
    command = hospitals.background("study", words)
    second = hospitals.run(RUNS[1])
    wait_until((second / "plan.yaml").is_file, LIMIT_S, RUNS[1], hospitals.tails)
    command.send_signal(signal.SIGINT)
    assert command.wait(LIMIT_S) == 130
    assert "fedqc run resume first goes on after this one" in hospitals.log("study")
    assert not hospitals.run(RUNS[2]).exists()
    first = (hospitals.run(RUNS[0]) / "evaluation.json").stat().st_mtime_ns
    said = hospitals.call("run", "resume", "first", "--federation", hospitals.fed)
    assert said.returncode == 0, hospitals.told(said)
    assert (hospitals.run(RUNS[0]) / "evaluation.json").stat().st_mtime_ns == first
    return said.stdout


def test_every_member_is_the_plan_that_was_approved_and_trains_where_none_is_held_out(
    hospitals: Deployment, finished: str
) -> None:
    folders = [RunFolder.open(hospitals.run(name)) for name in RUNS]
    assert [folder.manifest["plan_sha256"] for folder in folders] == [
        member.sha256() for member in members_of(STUDY)
    ]
    for folder in folders:
        evaluation, out = folder.evaluation, folder.plan.held_out
        assert (evaluation["status"], evaluation["incomplete"]) == ("completed", [])
        roles = {site["site"]: site["role"] for site in evaluation["sites"]}
        assert roles == {site: "held_out" if site in out else "training" for site in SITES}
        assert {site: found["mode"] for site, found in evaluation["scoring"].items()} == {
            NOISED: "dp",
            DISCLOSED: "disclosed",
            SYNTHETIC: "synthetic",
        }
        verified = json.loads(hospitals.do("verify", folder.path, "--format", "json").stdout)
        assert {one["holds"] for one in verified} == {True}
    results = json.loads((hospitals.run("first") / "results.json").read_text(encoding="utf-8"))
    trained = {tuple(member["held_out"]): member["trained"] for member in results["members"]}
    assert trained == {
        member.held_out: [site for site in SITES if site not in member.held_out]
        for member in members_of(STUDY)
    }


def test_the_table_is_that_of_compare(hospitals: Deployment, finished: str) -> None:
    assert finished.startswith("3 hospitals, each left out once")
    said = hospitals.do("compare", *(hospitals.run(name) for name in RUNS))
    assert said.stdout.strip() == finished.partition("\nstudy folder")[0].strip()
    assert f"all 4 runs together: epsilon {epsilon_text(TOGETHER)}" in " ".join(said.stdout.split())


def test_each_run_is_charged_and_the_approval_serves_no_other(hospitals: Deployment, finished: str) -> None:
    def charged(name: str) -> list[tuple[str, str]]:
        (account,) = hospitals.json("site", "budget", "--site", hospitals.site(name))
        entries: list[dict[str, Any]] = account["entries"]
        return sorted((entry["request"].rsplit("-", 2)[0], entry["purpose"]) for entry in entries)

    trained = [(run, "federated_dp") for run in RUNS]
    scored = [(run, "evaluate") for run in RUNS]
    assert charged(NOISED) == sorted([*(one for one in trained if NOISED not in one[0]), *scored])
    assert charged(DISCLOSED) == sorted(one for one in trained if DISCLOSED not in one[0])
    (approval,) = hospitals.json("site", "approve", "--list", "--site", hospitals.site(NOISED))
    assert (approval["state"], approval["runs_left"], len(approval["begun"])) == ("used", 0, 4)
    said = hospitals.run_start(STUDY, "second", status=2)
    assert f"{NOISED}: approval-used" in said.stderr
