"""A plan of slices with their neighbours: in training and in scoring, private or not, from public weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import client.agent.training
import client.dp.dp_sgd
from client.data.series import series_of_records
from client.data.studies import cohort_samples
from common.counts import Counts, per_patient
from common.learning import extract_features, score
from common.model_file import load_model
from common.models import build
from common.studies import StudyImages
from common.weights import manifest_of, resolve_initial, unflatten
from common.wire import SiteEvaluation
from server.public_model.public_set import public_samples, public_set
from tests.helpers.consortium import Consortium, tiny_plan
from tests.helpers.site_agent import agent, evaluate_task, train_task, update_of
from tests.helpers.spies import spied

MODEL = {"args": {"neighbours": True}}
PLAN = tiny_plan(name="neighbours", arms=["public", "federated", "federated_dp"], model=MODEL)
MANIFEST = manifest_of(build("small_cnn", PLAN.model.args).state_dict())
BASE = load_model(resolve_initial(PLAN.model.initial, None), MANIFEST, PLAN.model.labels)


def network() -> torch.nn.Module:
    """The public start, moved so that neighbours count."""
    found = build("small_cnn", PLAN.model.args)
    found.load_state_dict(unflatten(BASE, MANIFEST))
    with torch.no_grad():
        found.get_parameter("stem.weight")[:, 2:] += 0.1
    return found


def test_a_private_network_sees_slices_with_neighbours_of_their_patient(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"trainable": "norms", "steps_per_round": 1}
    one = agent(data, plan=tiny_plan(arms=["federated_dp"], model=MODEL, privacy=privacy))
    trained = spied(monkeypatch, client.dp.dp_sgd, "train_private_network")
    assert update_of(one.train(train_task(base=BASE))).update.any()
    (args,) = trained
    cohort = one.cohort()
    samples = cohort_samples(cohort, PLAN.model)
    rows = np.flatnonzero(samples.part == 0)
    assert args[2](np.arange(2)).shape == (2, 6, 32, 32)
    assert np.array_equal(args[4], samples.patients[rows])
    assert isinstance(samples.images, StudyImages)
    series, _, _ = series_of_records(cohort.records)
    for names in (cohort.patients, cohort.modality, series):
        assert (names[samples.images.rows] == names[:, None]).all()
    assert (samples.images.rows[:, 1:] != samples.images.rows[:, :1]).any(axis=1).all()


def test_a_private_head_is_trained_on_features_of_each_patient_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent(data, plan=PLAN)
    trained = spied(monkeypatch, client.dp.dp_sgd, "train_private_head")
    asked = spied(monkeypatch, client.agent.tasks, "extract_features")
    update = update_of(one.train(train_task(base=BASE)))
    samples = cohort_samples(one.cohort(), PLAN.model)
    assert [len(set(samples.patients[own])) for *_, own in asked] == [1] * len(asked)
    ((_, _, features, _, patients, _),) = trained
    start = build("small_cnn", PLAN.model.args)
    start.load_state_dict(unflatten(BASE, MANIFEST))
    rows = np.flatnonzero(samples.part == 0)
    expected = extract_features(start, samples.images, samples.modality, rows)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(patients, samples.patients[rows])
    assert update.private
    assert update.update.any()


def test_counts_are_of_patients_by_slices_seen_with_their_neighbours(data: Path) -> None:
    one, model = agent(data, plan=PLAN), network()
    weights = np.concatenate([tensor.numpy().ravel() for tensor in model.state_dict().values()])
    answer = one.evaluate(evaluate_task().model_copy(update={"weights": weights[None]}))
    assert isinstance(answer, SiteEvaluation), answer
    samples = cohort_samples(one.cohort(), PLAN.model)
    rows = np.flatnonzero(samples.part == 2)
    logits = score(model, samples.images, samples.modality, rows)
    expected = Counts.of(*per_patient(logits, samples.labels[rows], samples.patients[rows]))
    assert np.array_equal(answer.histograms[0, 0], expected.positives)
    turned = np.random.default_rng(0).permutation(rows)
    assert not np.allclose(score(model, samples.images, samples.modality, turned), logits)


def test_a_public_set_of_phantoms_has_neighbours() -> None:
    slices = public_set(PLAN.public_set, 32)
    samples = public_samples(slices, PLAN.model)
    assert isinstance(samples.images, StudyImages)
    assert len(samples.images) == len(slices.images)
    assert (slices.patients[samples.images.rows] == slices.patients[:, None]).all()
    features = extract_features(network(), samples.images, samples.modality, np.arange(4))
    assert np.isfinite(features).all()


def test_a_run_with_neighbours_trains_every_arm_from_public_weights_and_scores_it(
    consortium: Consortium, tmp_path: Path
) -> None:
    plan = tiny_plan(
        arms=["public", "local", "federated", "federated_dp", "pooled"], model=MODEL, training={"rounds": 1}
    )
    folder = consortium.conduct(plan, tmp_path / "run")
    assert folder.evaluation["status"] == "completed"
    scored = {
        arm
        for arm, sites in folder.evaluation["metrics"].items()
        if any(row["auroc"] is not None for rows in sites.values() for row in rows.values())
    }
    assert scored == set(plan.arms)
