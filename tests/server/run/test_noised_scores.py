"""A hospital at policy `dp` is scored with noise in a whole run, and every page says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.site.enrolment import LEVELS
from common.counts import EDGES, NOISED_BINS
from common.model_file import load_model
from common.models import build
from common.plan import RunPlan
from common.pricing import EVALUATION, charges, plan_epsilon, with_noise
from common.privacy import epsilon_of
from common.weights import unflatten
from common.wire import EvaluateTask, SiteEvaluation, message_type
from server.evaluation.compare import compare_runs, compare_table
from server.evaluation.report.page import render
from server.evaluation.tables import table
from server.public_model.public_set import public_bins, public_set
from server.run_folder import RunFolder
from tests.helpers.consortium import HELD_OUT, TRAINING, Consortium, settle, tiny_plan
from tests.helpers.site_agent import MANIFEST, ledger

A, B, C = TRAINING
USUAL = LEVELS["usual"].policy.model_dump(exclude_none=True) | {"require_approval": False}


def private_plan(**changes: Any) -> RunPlan:
    values = {"arms": ["public", "federated_dp"], "training": {"rounds": 1}, "privacy": {"epsilon": 2.0}}
    return with_noise(tiny_plan(**(values | changes)))


def hospitals(data: Path, *names: str, **policy: Any) -> None:
    for name in names:
        settle(data / name, kind="hospital", nominal_patients=500, policy=USUAL | policy)


class Asked:
    """Keeps the evaluation tasks and answers of a run."""

    def __init__(self) -> None:
        self.tasks: list[EvaluateTask] = []
        self.answers: dict[str, SiteEvaluation] = {}

    def __call__(self, question: Message, answer: Message) -> None:
        if message_type(question.content) == "EvaluateTask":
            self.tasks.append(EvaluateTask.from_record(question.content))
            if message_type(answer.content) == "SiteEvaluation":
                said = SiteEvaluation.from_record(answer.content)
                self.answers[said.site] = said


@pytest.fixture(scope="module")
def run(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path, Asked]:
    """Two hospitals that train and one that is held out, all at *usual*; the third site is synthetic."""

    folder = tmp_path_factory.mktemp("noised")
    data = Path(shutil.copytree(tiny_consortium, folder / "data"))
    hospitals(data, A, B, HELD_OUT)
    asked = Asked()
    consortium = Consortium(data=data, tamper=asked)
    return consortium.conduct(private_plan(), folder / "run"), data, asked


def test_every_hospital_is_scored_with_noise_and_its_ledger_holds_the_whole_plan(run: Any) -> None:
    folder, data, asked = run
    plan, found = folder.plan, folder.evaluation
    price = epsilon_of([charges(plan)[EVALUATION]], plan.privacy.delta)
    assert (found["status"], found["incomplete"]) == ("completed", [])
    for name in (A, B, HELD_OUT):
        assert found["scoring"][name]["mode"] == "dp"
        assert found["scoring"][name]["epsilon"] == price
        assert asked.answers[name].histograms.size == 0
        with ledger(data, name) as opened:
            charged = epsilon_of(opened.history(), plan.privacy.delta)
        assert charged == pytest.approx(plan_epsilon(plan, trains=name != HELD_OUT))
    assert found["scoring"][C] == {"mode": "synthetic"}
    assert price < plan_epsilon(plan) <= 2.0


def test_the_counts_are_kept_as_they_were_sent_and_no_number_of_patients_is_exact(run: Any) -> None:
    folder, _, asked = run
    found = folder.evaluation
    for number, model in enumerate(("public", "federated_dp")):
        for place, sign in enumerate(("positives", "negatives")):
            sent = asked.answers[A].noised[number, place]
            kept = [found["counts"][A][model][artifact][sign] for artifact in found["counts"][A][model]]
            assert np.array_equal(kept, sent)
    assert min(asked.answers[A].noised.min(), asked.answers[B].noised.min()) < 0
    for row in found["matrix"]["public"][A].values():
        assert (row["n_pos"], row["n_neg"]) == (None, None)
        assert row["n_pos_estimate"] >= 0
        assert (row["auroc"] is None) == (row.get("reason") == "not-estimable-at-this-noise")
    assert found["matrix"]["public"][C]["metal"]["n_pos"] >= 0


def test_the_bins_are_a_function_of_the_public_set_and_the_models(run: Any) -> None:
    folder, _, asked = run
    plan = folder.plan
    model, public = build(plan.model.name, plan.model.args), public_set(plan.public_set, plan.image_size)
    tasks = {task.everyone: task for task in asked.tasks}
    assert set(tasks) == {False}, "a held-out hospital is asked for its test patients"
    (task,) = {task.to_bytes(): task for task in asked.tasks}.values()
    assert (task.edges.dtype, task.edges.shape) == (np.dtype(np.float32), (2, 5, EDGES))
    public_counts = folder.evaluation["public_counts"]
    for name, flat, edges in zip(task.models, task.weights, task.edges, strict=True):
        model.load_state_dict(unflatten(flat, MANIFEST))
        expected = public_bins(model, public)
        assert np.array_equal(expected.edges, edges)
        assert public_counts[name] == expected.counts.to_json()
        assert (expected.counts.n_pos + expected.counts.n_neg).sum() > 0
    kept = [list(folder.evaluation["edges"][name].values()) for name in task.models]
    assert np.array_equal(np.float32(kept), task.edges)
    assert np.array_equal(load_model(folder.path / "model.safetensors", MANIFEST), task.weights[1])


def test_every_page_says_what_was_scored_with_noise(run: Any) -> None:
    folder, _, _ = run
    found = folder.evaluation
    price = found["scoring"][A]["epsilon"]
    card = (folder.path / "model_card.md").read_text(encoding="utf-8")
    page = render(found, folder.manifest, folder.plan)
    for text in (table(found), card, page):
        assert "scored with noise" in text
        for name in (A, B, HELD_OUT):
            assert name in text
    shown = f"{np.ceil(price * 100) / 100:.2f}"
    assert shown in table(found)
    assert shown in card
    assert shown in page
    assert "exact counts of test patients" not in page


def test_runs_with_noised_scores_are_compared_as_seeds_and_say_so(run: Any, tmp_path: Path) -> None:
    folder, data, _ = run

    copy = Path(shutil.copytree(data, tmp_path / "data"))
    hospitals(copy, A, B, HELD_OUT, max_epsilon=8.0)
    other = private_plan(seed=4)
    second = Consortium(data=copy).conduct(other, tmp_path / "run")
    result = compare_runs([folder, second])
    assert result["kind"] == "seeds"
    assert "scored with noise" in compare_table(result)


def test_a_large_hospital_has_an_auroc_through_the_noise(data: Path, tmp_path: Path) -> None:
    """With a generous budget the same machinery gives numbers: noise well below the counts."""
    for name in (A, B, C):
        generous = USUAL | {"max_epsilon": 1000.0, "max_epsilon_per_run": 1000.0}
        settle(data / name, kind="hospital", nominal_patients=500, policy=generous)
    plan = tiny_plan(
        arms=["public"],
        held_out=[],
        training={"rounds": 1},
        privacy={"evaluation_noise_multiplier": 0.2, "epsilon": 100.0},
        split={"train": 0.0, "test": 1.0},
    )
    folder = Consortium(data=data, names=TRAINING).conduct(plan, tmp_path / "run")
    rows = [row for site in (A, B, C) for row in folder.evaluation["matrix"]["public"][site].values()]
    known = [row for row in rows if row["auroc"] is not None]
    assert known
    for row in known:
        assert 0 <= row["low"] <= row["auroc"] <= row["high"] <= 1
        assert row["n_deviation"] == pytest.approx(0.2 * np.sqrt(5 * NOISED_BINS))


def test_a_hospital_whose_plan_prices_no_evaluation_gives_no_score_and_is_named(
    data: Path, tmp_path: Path
) -> None:
    hospitals(data, A)
    plan = private_plan(privacy={"epsilon": 2.0, "evaluation_share": 0.0})
    folder = Consortium(data=data).conduct(plan, tmp_path / "run")
    assert folder.evaluation["incomplete"] == [f"evaluation: {A} gave no score (evaluation-not-permitted)"]
    kept = json.loads((folder.path / "evaluation.json").read_text())
    assert A not in kept["scoring"]
