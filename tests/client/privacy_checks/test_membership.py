"""The membership attack finds a model that learnt its patients by heart, and nobody where there is nobody."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from client.privacy_checks.guessing import auc, right_guesses, share_found, share_found_interval
from client.privacy_checks.membership import PatientLosses, membership, membership_scores, patient_losses
from client.privacy_checks.own_patients import labelled_rows, own_patients
from common.learning import train_epochs
from common.models import build
from common.plan import Model, Training
from common.weights import flatten, manifest_of, unflatten
from tests.helpers.consortium import TRAINING, tiny_plan
from tests.helpers.site_agent import BASE


def row(losses: PatientLosses, place: int) -> PatientLosses:
    return PatientLosses(members=losses.members[place][None], others=losses.others[place][None])


def learnt_by_heart(data: Path, name: str) -> PatientLosses:
    """The losses of the public model, and of one that trained on the site's few patients for long."""
    cohort = own_patients(data / name, tiny_plan())
    model = build("small_cnn")
    model.load_state_dict(unflatten(BASE, manifest_of(model.state_dict())))
    train_epochs(
        model,
        cohort.images,
        cohort.modality,
        cohort.labels,
        labelled_rows(cohort, "train"),
        training=Training(local_epochs=20, learning_rate=3e-3),
        seed=0,
    )
    return patient_losses(cohort, Model(), [BASE, flatten(model.state_dict())])


@pytest.fixture(scope="module")
def memory(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> PatientLosses:
    data = Path(shutil.copytree(tiny_consortium, tmp_path_factory.mktemp("memory") / "data"))
    parts = [learnt_by_heart(data, name) for name in TRAINING]
    return PatientLosses(
        members=np.concatenate([part.members for part in parts], axis=1),
        others=np.concatenate([part.others for part in parts], axis=1),
    )


def test_patients_whom_a_model_learnt_by_heart_are_told_from_others(memory: PatientLosses) -> None:
    found = membership(row(memory, 0), row(memory, 1))
    assert found.auc > 0.7
    assert found.auc_interval[0] > 0.5
    assert found.auc_of_loss > 0.8
    assert found.found > 0.1
    assert found.members + found.others == memory.members.shape[1] + memory.others.shape[1]


def test_the_public_model_tells_nobody(memory: PatientLosses) -> None:
    found = membership(row(memory, 0), row(memory, 0))
    assert found.auc == 0.5
    assert found.found == 0


def test_shuffled_membership_gives_one_half_inside_its_interval(memory: PatientLosses) -> None:
    generator = np.random.default_rng(5)
    members = memory.members.shape[1]
    everyone = np.concatenate([memory.members, memory.others], axis=1)
    found = []
    for _ in range(200):
        dealt = everyone[:, generator.permutation(everyone.shape[1])]
        losses = PatientLosses(members=dealt[:, :members], others=dealt[:, members:])
        inside, outside = membership_scores(row(losses, 0), row(losses, 1))
        found.append(auc(inside[:, None], outside[:, None]))
    covered = [one.interval()[0] <= 0.5 <= one.interval()[1] for one in found]
    assert np.mean([one.value for one in found]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(covered) > 0.88


def test_a_site_without_test_patients_has_no_figure() -> None:
    nobody = PatientLosses(members=np.ones((1, 4)), others=np.zeros((1, 0)))
    found = membership(nobody, nobody)
    assert math.isnan(found.auc)
    assert math.isnan(found.found)


# the estimates, by hand


def test_area_by_hand() -> None:
    inside, outside = np.array([[3.0], [1.0], [2.0]]), np.array([[0.0], [2.0]])
    assert auc(inside, outside).value == pytest.approx((2 + 1 + 1.5) / 6)  # of pairs won; a tie is half
    assert auc(inside, inside).value == 0.5
    assert auc(inside + 9, outside) == (1.0, 0.0)


def test_the_error_of_the_area_is_that_of_its_spread() -> None:
    generator = np.random.default_rng(0)
    drawn = [auc(generator.normal(1, 1, (60, 1)), generator.normal(0, 1, (40, 1))) for _ in range(400)]
    assert np.std([one.value for one in drawn]) == pytest.approx(
        np.mean([one.error for one in drawn]), rel=0.15
    )


def test_columns_that_are_one_attack_do_not_lower_the_error() -> None:
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(1, 1, (60, 1)), generator.normal(0, 1, (40, 1))
    one, many = auc(inside, outside), auc(np.repeat(inside, 9, axis=1), np.repeat(outside, 9, axis=1))
    assert many == pytest.approx(one)


def test_right_guesses_by_hand() -> None:
    inside, outside = np.array([[1.0], [2.0], [-1.0], [0.5]]), np.array([[-1.0], [0.0], [3.0], [-2.0]])
    assert right_guesses(inside, outside).value == 0.75


def test_who_is_found_at_one_per_cent() -> None:
    outside = np.arange(200.0)  # two of them may be above: the limit is 197
    inside = np.array([196.5, 197.0, 197.5, 500.0])
    assert share_found(inside, outside) == 0.5
    assert share_found(inside, outside[:50] * 10) == 0.25  # none may be above 490
    low, high = share_found_interval(inside, outside)
    assert low <= 0.5 <= high
