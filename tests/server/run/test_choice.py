"""Which round an arm hands on, and when it ends: by the public set, also in a resumed run; and recomputed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from client.site.config import read_site
from client.site.site_ledger import open_ledger
from common.arms import ARMS
from common.model_file import load_model
from common.models import build
from common.plan import RunPlan
from common.pricing import plan_epsilon, training_steps, with_noise
from common.weights import flatten, manifest_of
from server.evaluation.report.page import write_report
from server.run import conduct
from server.run.choice import MEAN, Choice, choice_of
from server.run.conduct import initial_weights
from server.run.recompute import recompute
from server.run_folder import RunFolder, mean_of
from tests.helpers.consortium import TRAINING, Consortium, tiny_plan

MANIFEST = manifest_of(build("small_cnn").state_dict())
EVERY = ["public", "local", "local_dp", "federated", "federated_clipped", "federated_dp"]


def records(*scores: float | None) -> list[dict[str, Any]]:
    return [{"round": number, "public": {"auroc": one}} for number, one in enumerate(scores, start=1)]


def rules(**changes: Any) -> Choice:
    return Choice(**({"rounds": 9, "by_public": True, "patience": None} | changes))


def test_the_best_round_is_the_first_of_equals_and_an_undefined_score_is_the_worst() -> None:
    assert rules().chosen(records(None, 0.7, 0.8, 0.8, 0.6)) == 3
    assert rules().chosen(records(None, None)) == 1
    assert rules(by_public=False).chosen(records(0.9, 0.8)) == 2


@pytest.mark.parametrize(
    ("scores", "ended"),
    [
        ((), False),
        ((0.7,), False),
        ((0.7, 0.6), False),
        ((0.7, 0.6, 0.7), True),  # as good is not better
        ((0.7, 0.6, 0.8), False),
        ((0.7, 0.6, 0.8, 0.7, None), True),
    ],
)
def test_an_arm_ends_when_its_patience_does(scores: tuple[float | None, ...], ended: bool) -> None:
    assert rules(patience=2).has_ended(records(*scores)) is ended
    assert rules().has_ended(records(*scores)) is False


def test_an_arm_ends_with_the_last_round_of_the_plan() -> None:
    assert rules(rounds=2).has_ended(records(0.1, 0.2))


def test_the_score_of_a_mean_decides_where_there_is_one() -> None:
    found = records(0.9, 0.8)
    found[1][MEAN] = {"auroc": 0.95}
    assert rules().chosen(found) == 2


def by_public(plan: RunPlan) -> set[str]:
    return {arm for arm in ARMS if choice_of(plan, arm).by_public}


def test_without_the_keys_only_a_local_model_is_chosen() -> None:
    assert by_public(tiny_plan()) == {"local", "local_frozen"}
    trained = {"rounds": 2}
    assert by_public(tiny_plan(training=trained | {"choose_round": "last"})) == set()
    assert by_public(tiny_plan(training=trained | {"choose_round": "public"})) == set(ARMS)
    assert by_public(tiny_plan(training=trained | {"early_stopping": 1})) == set(ARMS)
    assert by_public(tiny_plan(training=trained | {"early_stopping": 1, "choose_round": "last"})) == set()


def plan_of(**training: Any) -> RunPlan:
    values = {"epsilon": 8.0, "average_rounds": 2, "alternatives": True}
    return with_noise(tiny_plan(arms=EVERY, privacy=values, training={"rounds": 5} | training))


@pytest.fixture(scope="module")
def _worse_with_distance() -> Iterator[None]:
    """The public score falls with the distance from the start, so that the first round is the best."""
    start = initial_weights(tiny_plan(), MANIFEST)

    def measured(model: nn.Module, *_: object) -> dict[str, float]:
        return {"loss": 0.0, "auroc": 1 / (1 + float(np.linalg.norm(flatten(model.state_dict()) - start)))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct, "measure", measured)
        yield


def arms_of(run: RunFolder) -> dict[str, Any]:
    groups = [(arm, site) for arm in EVERY[1:3] for site in TRAINING] + [(arm, None) for arm in EVERY[3:]]
    return {f"{arm}/{site}" if site else arm: run.arm(arm, site) for arm, site in groups}


@pytest.fixture(scope="module")
def stopped(
    _worse_with_distance: None, tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """A run of every kind of arm that ends after three of five rounds. Read only."""
    root = tmp_path_factory.mktemp("stopped")
    consortium = Consortium(data=Path(shutil.copytree(tiny_consortium, root / "data")))
    found: RunFolder = consortium.conduct(plan_of(early_stopping=2), root / "run")
    return found


@pytest.fixture
def copy(stopped: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(stopped.path, tmp_path / "run")))


def test_every_arm_ends_early_and_hands_on_its_best_round(stopped: RunFolder) -> None:
    found = arms_of(stopped)
    assert stopped.evaluation["chosen_rounds"] == dict.fromkeys(found, 1)
    for folder in found.values():
        assert len(folder.rounds()) == folder.last_round() == 3
        first = load_model(folder.checkpoint_path(1), MANIFEST)
        assert np.array_equal(load_model(folder.model_path, MANIFEST), first)
    assert stopped.evaluation["status"] == "completed"
    assert [len(curve) for curve in stopped.evaluation["curves"].values()] == [4] * len(found)


def test_only_a_mean_over_rounds_is_measured_apart(stopped: RunFolder) -> None:
    for name, folder in arms_of(stopped).items():
        measured = [record.get(MEAN) for record in folder.rounds()]
        if not ARMS[name.partition("/")[0]].clips:
            assert measured == [None, None, None]
            continue
        assert measured[0] == folder.rounds()[0]["public"]
        second = folder.model_of(2, MANIFEST, mean_of(stopped.plan, name.partition("/")[0]))
        start = initial_weights(stopped.plan, MANIFEST)
        assert measured[1]["auroc"] == 1 / (1 + float(np.linalg.norm(second - start)))


def test_what_was_charged_up_front_is_not_given_back(stopped: RunFolder) -> None:
    """Each hospital reserved all five rounds; the rows of the three that were done are the actuals."""
    plan, site_yaml = stopped.plan, stopped.path.parent / "data" / TRAINING[0] / "site.yaml"
    config, folder = read_site(site_yaml)
    with open_ledger(config, folder) as ledger:
        rows = ledger.rows()
    reserved = [row.steps for row in rows if row.kind == "reserve"]
    assert reserved == [training_steps(plan).steps] * 2  # local_dp, federated_dp
    assert sum(row.kind == "commit" for row in rows) == 2 * 3
    assert all(
        claim["epsilon"] == pytest.approx(plan_epsilon(plan))
        for claim in stopped.evaluation["privacy"].values()
    )


def test_it_is_recomputed(stopped: RunFolder) -> None:
    found = {finding.check: finding for finding in recompute(stopped)}
    assert not [finding for finding in found.values() if finding.holds is False]
    assert all(found[f"{name}, model"].holds for name in arms_of(stopped))


def change_records(run: RunFolder, arm: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = run.arm(arm).path / "rounds.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    change(found)
    path.write_text("".join(json.dumps(record) + "\n" for record in found))


CHANGES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "a round is left out": (
        lambda found: found.pop(),
        "2 rounds, but by plan and public scores it ends later",
    ),
    "another round is the best": (
        lambda found: found[1]["public"].update(auroc=0.999),
        "3 rounds, but by plan and public scores it ends later",
    ),
    "all rounds are as good": (
        lambda found: [record["public"].update(auroc=0.5) for record in found],
        "",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_choice_that_the_scores_do_not_make_is_found(what: str, copy: RunFolder) -> None:
    change, words = CHANGES[what]
    change_records(copy, "federated", change)
    wrong = {finding.check: finding.detail for finding in recompute(copy) if finding.holds is False}
    assert wrong == ({"federated, model": words} if words else {})


def test_a_model_of_another_round_is_found(copy: RunFolder) -> None:
    path = copy.path / "evaluation.json"
    noted = json.loads(path.read_text())
    noted["chosen_rounds"]["federated_dp"] = 3
    path.write_text(json.dumps(noted))
    wrong = {finding.check: finding.detail for finding in recompute(copy) if finding.holds is False}
    assert wrong == {
        "federated_dp, model": "of the mean of 2 rounds up to 3, but the public scores choose "
        "the mean of 2 rounds up to 1"
    }


def test_the_report_draws_arms_that_ended_after_different_rounds(copy: RunFolder) -> None:
    path = copy.path / "evaluation.json"
    noted = json.loads(path.read_text())
    noted["curves"]["federated"].pop()
    path.write_text(json.dumps(noted))
    page = write_report(copy).read_text(encoding="utf-8")
    assert "Over the rounds" in page


@pytest.mark.parametrize("stop_at", [5, 10])
@pytest.mark.usefixtures("_worse_with_distance")
def test_a_resumed_run_chooses_the_same(consortium: Consortium, tmp_path: Path, stop_at: int) -> None:
    """Interrupted within the first arm, and at the beginning of the next."""
    arms = ["public", "federated", "federated_clipped"]
    training = {"rounds": 5, "early_stopping": 2, "ema": 0.5}
    plan = tiny_plan(arms=arms, training=training, privacy={"average_rounds": 2})
    whole = consortium.conduct(plan, tmp_path / "whole")
    consortium.asked.clear()
    consortium.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        consortium.conduct(plan, tmp_path / "resumed")
    consortium.stop_at = None
    resumed = consortium.conduct(plan, tmp_path / "resumed")
    assert resumed.evaluation["chosen_rounds"] == whole.evaluation["chosen_rounds"]
    for arm in arms[1:]:
        one, other = resumed.arm(arm), whole.arm(arm)
        assert np.array_equal(load_model(one.model_path, MANIFEST), load_model(other.model_path, MANIFEST))
        scores = [
            [(record["public"], record.get(MEAN)) for record in folder.rounds()] for folder in (one, other)
        ]
        assert scores[0] == scores[1]
        assert len(scores[0]) == 3


@pytest.mark.usefixtures("_worse_with_distance")
def test_it_says_on_the_way_why_an_arm_ended(
    consortium: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny_plan(arms=["public", "federated"], training={"rounds": 5, "early_stopping": 1})
    consortium.conduct(plan, tmp_path / "run")
    said = capsys.readouterr().err
    assert "federated: ended after round 2, none better in public since round 1" in said
    assert "[6/6] evaluation" in said
