"""A plan of studies: a study is one row of its patient, in training and in scoring, private or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import client.dp.dp_sgd
from client.agent.tasks import Agent
from client.data.studies import CohortSamples, cohort_samples
from client.privacy_checks.attack import first_step
from client.privacy_checks.membership import patient_losses
from client.privacy_checks.own_patients import labelled_rows
from common.counts import Counts, per_patient
from common.learning import extract_features, score, train_epochs
from common.models import build
from common.pricing import with_noise
from common.studies import StudyImages
from common.weights import manifest_of, unflatten
from common.wire import SiteEvaluation, SiteReadiness
from server.public_model.public_set import public_samples, public_set
from tests.helpers.consortium import Consortium, tiny_plan
from tests.helpers.site_agent import (
    BASE,
    HEAD,
    agent,
    evaluate_task,
    non_private,
    train_task,
    update_of,
)
from tests.helpers.spies import spied

SLICES = 4
MODEL = {"name": "study", "args": {"pooling": "mean", "slices": SLICES}}
PLAN = tiny_plan(name="studies", arms=["public", "federated", "federated_dp"], model=MODEL)


def samples_of(one: Agent) -> CohortSamples:
    return cohort_samples(one.cohort(), PLAN.model)


def network() -> torch.nn.Module:
    """The start of the slice network, which is one of its studies too."""
    found = build("study", PLAN.model.args)
    found.load_state_dict(unflatten(BASE, manifest_of(found.state_dict())))
    return found


def test_a_private_head_is_trained_on_one_row_a_study_of_each_patient_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent(data, plan=PLAN)
    trained = spied(monkeypatch, client.dp.dp_sgd, "train_private_head")
    asked = spied(monkeypatch, client.agent.tasks, "extract_features")
    update = update_of(one.train(train_task()))
    samples = samples_of(one)
    rows = np.flatnonzero(samples.part == 0)
    ((_, _, features, labels, patients, request),) = trained
    assert len(rows) < (one.cohort().part == 0).sum()
    assert np.array_equal(patients, samples.patients[rows])
    assert np.array_equal(labels, samples.labels[rows], equal_nan=True)
    assert [len(set(samples.patients[own])) for *_, own in asked] == [1] * len(asked)
    assert len(asked) == len(set(patients)) > 3
    expected = extract_features(network(), samples.images, samples.modality, rows)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert request.max_slices_per_patient == PLAN.privacy.max_slices_per_patient
    assert update.private
    assert update.update.size == HEAD.stop - HEAD.start
    assert update.update.any()


@pytest.mark.parametrize("engine", ["opacus", "patient_loop"])
def test_a_private_network_sees_whole_studies(
    engine: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"trainable": "norms", "engine": engine, "steps_per_round": 1}
    one = agent(data, plan=tiny_plan(arms=["federated_dp"], model=MODEL, privacy=privacy))
    trained = spied(monkeypatch, client.dp.dp_sgd, "train_private_network")
    assert update_of(one.train(train_task())).update.any()
    (args,) = trained
    samples = samples_of(one)
    rows = np.flatnonzero(samples.part == 0)
    assert args[2](np.arange(2)).shape == (2, SLICES, 2, 32, 32)
    assert np.array_equal(args[4], samples.patients[rows])


def test_those_who_opt_out_are_left_out_of_the_features_that_are_kept(data: Path) -> None:
    one = agent(data, plan=PLAN)
    update_of(one.train(train_task()))
    cohort = one.cohort()
    gone = cohort.patients[cohort.part == 0][0]
    before = len(one._features[1])
    cohort.part[cohort.patients == gone] = -1
    one.renew_consent()
    samples = samples_of(one)
    assert gone not in samples.patients[one._features[1]]
    assert len(one._features[1]) == len(one._features[2]) == before - (samples.patients == gone).sum()


def test_arms_without_noise_train_on_studies(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = agent(data, plan=PLAN)
    seen = spied(monkeypatch, client.agent.training, "train_epochs")
    update = update_of(one.train(non_private()))
    ((_, images, _, _, rows),) = seen
    assert isinstance(images, StudyImages)
    assert len(rows) == (samples_of(one).part == 0).sum()
    assert update.update.any()


def test_counts_are_of_patients_by_the_scores_of_their_studies(data: Path) -> None:
    one = agent(data, plan=PLAN)
    answer = one.evaluate(evaluate_task())
    assert isinstance(answer, SiteEvaluation), answer
    samples = samples_of(one)
    rows = np.flatnonzero(samples.part == 2)
    logits = score(network(), samples.images, samples.modality, rows)
    expected = Counts.of(*per_patient(logits, samples.labels[rows], samples.patients[rows]))
    assert np.array_equal(answer.histograms[0, 0], expected.positives)
    assert np.array_equal(answer.histograms[0, 1], expected.negatives)
    assert answer.histograms.sum() == np.isfinite(samples.labels[rows]).sum()


def test_a_rehearsal_times_whole_studies(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.wire import DescribeTask

    seen = spied(monkeypatch, client.agent.tasks, "train_epochs")
    answer = agent(data, plan=PLAN).describe(DescribeTask(run="r", rehearse=True))
    assert isinstance(answer, SiteReadiness), answer
    ((_, images, *_),) = seen
    assert isinstance(images, StudyImages)
    assert images.rows.shape == (2 * PLAN.training.batch_size, SLICES)
    assert (images.rows >= 0).all()


def test_attacks_are_on_studies(data: Path) -> None:
    one = agent(data, plan=PLAN)
    cohort, samples = one.cohort(), samples_of(one)
    learnt = network()
    rows = labelled_rows(samples, "train")
    training = PLAN.training.model_copy(update={"local_epochs": 10, "learning_rate": 3e-3})
    train_epochs(learnt, samples.images, samples.modality, samples.labels, rows, training=training, seed=0)
    flat = np.concatenate([tensor.numpy().ravel() for tensor in learnt.state_dict().values()])
    losses = patient_losses(cohort, PLAN.model, [BASE, flat])
    assert losses.members.shape == (2, len(set(samples.patients[rows])))
    assert losses.members[1].mean() < losses.members[0].mean()
    step = first_step(cohort, with_noise(PLAN))
    assert step.gradients.shape == (len(set(samples.patients[rows])), HEAD.stop - HEAD.start)


def test_a_public_set_is_measured_by_studies() -> None:
    slices = public_set(PLAN.public_set, 32)
    samples = public_samples(slices, PLAN.model)
    assert isinstance(samples.images, StudyImages)
    assert len(samples.images) == len(set(slices.patients)) < len(slices.images)
    assert public_samples(slices, tiny_plan().model).images is slices.images


def test_a_run_of_studies_trains_every_arm_and_scores_it(consortium: Consortium, tmp_path: Path) -> None:
    plan = tiny_plan(
        arms=["public", "local", "federated", "federated_dp", "pooled"],
        model=MODEL,
        training={"rounds": 1},
    )
    folder = consortium.conduct(plan, tmp_path / "run")
    assert folder.evaluation["status"] == "completed"
    scored = {
        arm
        for arm, sites in folder.evaluation["metrics"].items()
        if any(row["auroc"] is not None for rows in sites.values() for row in rows.values())
    }
    assert scored == set(plan.arms)
