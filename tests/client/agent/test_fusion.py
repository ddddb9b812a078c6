"""Series of a study become one sample or one decision, at a site and on the public set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import client.dp.dp_sgd
from client.data.studies import cohort_samples
from client.simulation.phantom_sites import write_consortium
from common.counts import Counts, per_patient
from common.learning import score
from common.models import build
from common.plan import RunPlan
from common.studies import StudyImages, decisions
from common.weights import manifest_of, unflatten
from common.wire import SiteEvaluation
from tests.helpers.consortium import settle, tiny_plan
from tests.helpers.site_agent import BASE, A, agent, evaluate_task, train_task, update_of
from tests.helpers.spies import spied

SERIES = 2


def plan_of(fusion: str) -> RunPlan:
    args = {"pooling": "max", "slices": 4, "fusion": fusion, "series": SERIES}
    return tiny_plan(name="fusion", arms=["federated_dp"], model={"name": "study", "args": args})


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "data"
    write_consortium(out, sites=2, patients=12, seed=5, say=lambda _: None, series=SERIES)
    settle(out / A, nominal_patients=100)
    return out


@pytest.mark.parametrize("fusion", ["none", "noisy_or", "max_features"])
def test_a_site_trains_and_is_scored_on_series_or_on_studies(
    fusion: str, several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(fusion)
    one = agent(Path(shutil.copytree(several, tmp_path / "data")), A, plan)
    trained = spied(monkeypatch, client.dp.dp_sgd, "train_private_head")
    assert update_of(one.train(train_task())).update.any()
    ((*_, patients, _),) = trained
    samples = cohort_samples(one.cohort(), plan.model)
    assert isinstance(samples.images, StudyImages)
    a_patient = 1 if fusion == "max_features" else SERIES
    assert samples.images.rows.shape == (12 * a_patient, 4 * SERIES // a_patient)
    assert set(np.bincount(patients)[np.unique(patients)]) == {a_patient}
    for rows, patient in zip(samples.images.rows, samples.patients, strict=True):
        assert set(one.cohort().patients[rows[rows >= 0]]) == {patient}

    answer = one.evaluate(evaluate_task())
    assert isinstance(answer, SiteEvaluation), answer
    network = build("study", plan.model.args)
    network.load_state_dict(unflatten(BASE, manifest_of(network.state_dict())))
    rows = np.flatnonzero(samples.part == 2)
    logits = score(network, samples.images, samples.modality, rows)
    fused = per_patient(*decisions(logits, samples, rows))
    assert np.array_equal(answer.histograms[0, 0], Counts.of(*fused).positives)
    assert answer.histograms.sum() == np.isfinite(fused[1]).sum()
    highest = per_patient(logits, samples.labels[rows], samples.patients[rows])
    assert np.array_equal(fused[1], highest[1], equal_nan=True)
    assert np.allclose(fused[0], highest[0], equal_nan=True) == (fusion != "noisy_or")
