"""Hospitals at the levels that `site init` offers take part in a private run and are scored with noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.wire import Envelope, SiteEvaluation
from server.run_folder import RunFolder
from tests.helpers.rig import Deployment, deployed_plan

pytestmark = pytest.mark.slow
USUAL, CAUTIOUS, SMALL = "hospital-a", "hospital-b", "hospital-c"
RUN = "private"
PLAN = deployed_plan(
    name="hospitals",
    arms=["public", "federated_dp"],
    privacy={"epsilon": 1.0, "delta": 1e-6},
    federation={"quorum": 2, "codec": "lossless", "deadline_s": 300},
)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three hospitals whose operators took a level of `site init`, and approved the plan."""
    running = Deployment(tmp_path_factory.mktemp("hospitals"), sites=3, running=False)
    with running:
        running.make_data()
        running.init()
        for name, level, nominal in (
            (USUAL, "usual", 500),
            (CAUTIOUS, "cautious", 500),
            (SMALL, "cautious", 50),
        ):
            ethics = {"ethics_approval": "2026-17", "consent_basis": "broad consent"}
            running.enrol(name, level=level, kind="hospital", nominal=nominal, **ethics)
            running.do("site", "approve", running.write_plan(PLAN), "--site", running.site(name), "--yes")
        running.start_federation()
        for name in running.names:
            running.start_site(name)
        yield running
    assert running.left_behind == []


@pytest.fixture(scope="module")
def scores(hospitals: Deployment) -> dict[str, SiteEvaluation]:
    """The run, and the scores that its sites signed."""
    hospitals.run_start(PLAN, RUN, "--accept-missing", status=6)  # partial: one refuses
    return kept(hospitals)


def kept(hospitals: Deployment) -> dict[str, SiteEvaluation]:
    answers = RunFolder.open(hospitals.run(RUN)).kept_scores()
    return {
        site: SiteEvaluation.from_bytes(Envelope.from_bytes(answer).payload)
        for site, answer in answers.items()
    }


def budget(hospitals: Deployment, name: str) -> dict[str, Any]:
    (account,) = hospitals.json("site", "budget", "--site", hospitals.site(name))
    return dict(account)


def test_hospitals_of_bucket_500_take_part_and_are_scored_with_noise(
    hospitals: Deployment, scores: dict[str, SiteEvaluation]
) -> None:
    evaluation = hospitals.evaluation(RUN)
    assert evaluation["private_arms"] == ["federated_dp"]
    for name in (USUAL, CAUTIOUS):
        claim = evaluation["privacy"][name]
        assert claim["refused"] is None
        assert 0.99 < claim["epsilon"] <= 1.0
        assert claim["delta"] == 1e-6
        assert scores[name].mode == "dp"
        assert (scores[name].histograms.size, scores[name].covariance.size) == (0, 0)
        assert (scores[name].noised < 0).any()
        assert evaluation["scoring"][name]["mode"] == "dp"
        purposes = [entry["purpose"] for entry in budget(hospitals, name)["entries"]]
        assert purposes == ["federated_dp", "evaluate"]
        assert 0.99 < budget(hospitals, name)["spent"] <= 1.0 or name == USUAL  # at 1e-5 it is less


def test_a_hospital_of_bucket_50_is_refused_and_nothing_is_charged(
    hospitals: Deployment, scores: dict[str, SiteEvaluation]
) -> None:
    evaluation = hospitals.evaluation(RUN)
    assert evaluation["privacy"][SMALL]["refused"]["code"] == "too-few-patients"
    assert SMALL not in scores
    assert budget(hospitals, SMALL)["entries"] == []
    assert budget(hospitals, SMALL)["spent"] == 0


def test_asked_again_the_hospitals_give_the_same_bytes_and_are_charged_nothing(
    hospitals: Deployment, scores: dict[str, SiteEvaluation]
) -> None:
    spent = {name: budget(hospitals, name) for name in hospitals.names}
    hospitals.call("run", "resume", RUN, "--federation", hospitals.fed, "--accept-missing")
    again = kept(hospitals)
    assert {name: one.to_bytes() for name, one in again.items()} == {
        name: one.to_bytes() for name, one in scores.items()
    }
    assert {name: budget(hospitals, name) for name in hospitals.names} == spent


def test_the_run_is_recomputed_from_what_its_hospitals_signed(
    hospitals: Deployment, scores: dict[str, SiteEvaluation]
) -> None:
    said = hospitals.do("verify", hospitals.run(RUN), "--format", "json")
    found = {one["check"]: one["holds"] for one in json.loads(said.stdout)}
    assert found["federated_dp"] is found["evaluation"] is found["plan"] is True
    assert "signatures" not in found


def test_no_exact_number_of_patients_stands_anywhere_in_the_run_folder(
    hospitals: Deployment, scores: dict[str, SiteEvaluation]
) -> None:
    text = Path(hospitals.run(RUN) / "evaluation.json").read_text(encoding="utf-8")
    metrics = json.loads(text)["metrics"]["federated_dp"][USUAL]
    assert all(one["n_pos"] is None and one["n_neg"] is None for one in metrics.values())
