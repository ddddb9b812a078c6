"""Hospitals that never train score the model of a finished run, over real processes: one with noise, one
exactly.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.pricing import plan_epsilon
from common.wire import Envelope, SiteEvaluation
from server.run_folder import RunFolder
from tests.helpers.consortium import settle
from tests.helpers.rig import LIMIT_S, Deployment, deployed_plan

pytestmark = pytest.mark.slow
TRAINS, ALSO_TRAINS, NOISED, DISCLOSED, AWAY = (f"hospital-{letter}" for letter in "abcde")
RUN, EPSILON = "finished", 1.5
PLAN = deployed_plan(
    name="finished",
    arms=["public", "federated"],
    training={"rounds": 1},
    federation={"quorum": 2, "codec": "lossless", "deadline_s": 300},
)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two sites train; then two hospitals join that never do, and a third that is never started."""
    running = Deployment(tmp_path_factory.mktemp("evaluated"), sites=5, patients=60, running=False)
    with running:
        running.make_data()
        running.init()
        for name in (TRAINS, ALSO_TRAINS):
            running.enrol(name)
        running.start_federation()
        for name in (TRAINS, ALSO_TRAINS):
            running.start_site(name)
        running.run_start(PLAN, RUN)
        ethics = {"ethics_approval": "2026-17", "consent_basis": "broad consent"}
        for name in (NOISED, DISCLOSED, AWAY):
            running.enrol(name, level="usual", kind="hospital", nominal=500, **ethics)
        exact = {"evaluation": "disclosed", "require_approval": True, "answer_grid_s": 0}
        settle(running.site(DISCLOSED), exact, split={"train": 0.0, "test": 1.0})  # it will never train
        for name in (NOISED, DISCLOSED):
            running.start_site(name)
        yield running
    assert running.left_behind == []


def evaluate(hospitals: Deployment, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    model = hospitals.run(RUN) / "arms" / "federated" / "model.safetensors"
    to = ("--federation", hospitals.fed, "--epsilon", EPSILON)
    said = hospitals.call("evaluate", model, *to, *words, limit_s=LIMIT_S)
    assert said.returncode == status, hospitals.told(said)
    return said


def kept(folder: Path) -> dict[str, bytes]:
    """Site -> the bytes that it answered, without its signature, which is new each time."""
    answers = RunFolder.open(folder).kept_scores()
    return {site: Envelope.from_bytes(answer).payload for site, answer in answers.items()}


def budget(hospitals: Deployment, name: str) -> dict[str, Any]:
    (account,) = hospitals.json("site", "budget", "--site", hospitals.site(name))
    return dict(account)


@pytest.fixture(scope="module")
def first(hospitals: Deployment) -> tuple[RunFolder, subprocess.CompletedProcess[str]]:
    """The plan is written, approved at both hospitals, and carried out."""
    sites = ("--sites", f"{NOISED},{DISCLOSED}")
    plan = hospitals.folder / "evaluation.yaml"
    refused = evaluate(hospitals, *sites, status=4)
    assert "not-approved" in refused.stderr
    evaluate(hospitals, *sites, "--write-plan", plan)
    for name in (NOISED, DISCLOSED):
        hospitals.do("site", "approve", plan, "--site", hospitals.site(name), "--yes")
    said = evaluate(hospitals, *sites, "--name", "first")
    return RunFolder.open(hospitals.run("first")), said


def test_hospitals_that_never_trained_score_the_model_each_by_its_policy(
    hospitals: Deployment, first: tuple[RunFolder, subprocess.CompletedProcess[str]]
) -> None:
    folder, said = first
    evaluation = folder.evaluation
    assert (evaluation["status"], evaluation["incomplete"]) == ("completed", [])
    assert {site["site"]: site["role"] for site in evaluation["sites"]} == {
        NOISED: "held_out",
        DISCLOSED: "held_out",
    }
    assert {site: found["mode"] for site, found in evaluation["scoring"].items()} == {
        NOISED: "dp",
        DISCLOSED: "disclosed",
    }
    answers = {site: SiteEvaluation.from_bytes(answer) for site, answer in kept(folder.path).items()}
    assert answers[NOISED].histograms.size == answers[NOISED].covariance.size == 0
    assert answers[DISCLOSED].noised.size == 0
    assert [*evaluation["matrix"]] == ["federated"]
    assert evaluation["model_scores"]["federated"][DISCLOSED]["value"] is not None
    assert "charged epsilon 1.50" in said.stderr
    assert said.stderr.index("charged epsilon") < said.stderr.index("version")  # before anybody is asked
    assert "evaluation: accept, with noise, charged epsilon 1.50; estimable at this n" in said.stderr
    assert "evaluation: accept, exact and outside the guarantee, not charged" in said.stderr
    assert (evaluation["scoring"][NOISED]["nominal_tested"], evaluation["scoring"][NOISED]["estimable"]) == (
        333,
        True,
    )
    assert f"not trained here: {NOISED}, {DISCLOSED}. Nothing was trained." in said.stdout
    (entry,) = budget(hospitals, NOISED)["entries"]
    assert (entry["purpose"], entry["request"]) == ("evaluate", f"{evaluation['run']} evaluation")
    assert entry["epsilon"] == pytest.approx(plan_epsilon(folder.plan))
    assert budget(hospitals, DISCLOSED)["entries"] == []


def test_asked_again_the_hospitals_give_the_stored_bytes_and_are_charged_nothing(
    hospitals: Deployment, first: tuple[RunFolder, subprocess.CompletedProcess[str]]
) -> None:
    """In the same folder, in another one, and one hospital without the other."""
    before, spent = kept(first[0].path), {name: budget(hospitals, name) for name in (NOISED, DISCLOSED)}
    evaluate(hospitals, "--sites", f"{NOISED},{DISCLOSED}", "--name", "first")
    assert kept(hospitals.run("first")) == before
    evaluate(hospitals, "--sites", NOISED, "--name", "alone")
    assert kept(hospitals.run("alone")) == {NOISED: before[NOISED]}
    assert {name: budget(hospitals, name) for name in (NOISED, DISCLOSED)} == spent


def test_another_price_is_another_plan_which_nobody_approved(
    hospitals: Deployment, first: tuple[RunFolder, subprocess.CompletedProcess[str]]
) -> None:
    said = evaluate(hospitals, "--epsilon", 1.0, "--sites", NOISED, status=4)
    assert "not-approved" in said.stderr
    assert len(budget(hospitals, NOISED)["entries"]) == 1


def test_a_site_that_is_away_or_unknown_is_named_in_one_line(
    hospitals: Deployment, first: tuple[RunFolder, subprocess.CompletedProcess[str]]
) -> None:
    said = evaluate(hospitals, "--sites", f"{NOISED},{AWAY}", "--wait", 2, "--name", "away", status=4)
    (error,) = [line for line in said.stderr.splitlines() if line.startswith("fedqc: error")]
    assert error == f"fedqc: error [sites-missing]: not every site would take part ({AWAY}: no answer)"
    said = evaluate(hospitals, "--sites", "hospital-z", status=2)
    assert "fedqc: error [unknown-site]: --sites hospital-z: no such site" in said.stderr


def test_the_evaluation_is_recomputed_from_what_its_hospitals_signed(
    hospitals: Deployment, first: tuple[RunFolder, subprocess.CompletedProcess[str]]
) -> None:
    said = hospitals.do("verify", first[0].path, "--format", "json")
    found = {one["check"]: one["holds"] for one in json.loads(said.stdout)}
    assert found == {"plan": True, "federated, model": True, "evaluation": True}


def test_a_site_that_trained_is_scored_on_its_test_patients(
    hospitals: Deployment, first: tuple[RunFolder, subprocess.CompletedProcess[str]]
) -> None:
    evaluate(hospitals, "--sites", TRAINS, "--name", "trained")
    found, before = hospitals.evaluation("trained"), hospitals.evaluation(RUN)
    assert [site["role"] for site in found["sites"]] == ["training"]
    assert found["matrix"]["federated"][TRAINS] == before["matrix"]["federated"][TRAINS]
