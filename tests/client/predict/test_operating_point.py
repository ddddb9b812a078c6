"""Thresholds and calibration: hand-computed, found where their origin can be told, kept by the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.data.cohort import load_cohort
from client.dicom.index import PARTS
from client.predict import operating_point
from client.predict.model import START, Model, find_model
from client.predict.operating_point import operating_points, point_of, points_of
from client.predict.predict import Finding
from client.simulation.phantom_sites import write_site
from common.artifacts import DEFAULT_LABELS, MODALITIES
from common.counts import patient_labels
from common.operating_point import LEAST_FOUND
from common.physics.appearance import SITE_APPEARANCES
from common.public_slices import Slices


@pytest.fixture(scope="module")
def model() -> Model:
    return find_model(START, None)


def test_the_threshold_is_youdens_among_those_that_find_enough() -> None:
    scores = np.array([1.0, 2, 3, 4, 5, 0, 0.5, 1.5, 9])
    labels = np.array([1.0, 1, 1, 1, 1, 0, 0, 0, np.nan])
    point = point_of(scores, labels, "site")
    assert point is not None
    assert (point.threshold, point.sensitivity, point.specificity) == (1.75, 0.8, 1.0)
    assert (point.positives, point.negatives, point.origin) == (5, 3, "site")


def test_few_findings_are_not_bought_for_few_alarms() -> None:
    """Without the bound the best sum would be at 5: one of four found, no alarm."""
    scores = np.array([0.0, 0, 0, 10, 1, 2, 3])
    point = point_of(scores, np.array([1.0, 1, 1, 1, 0, 0, 0]), "site")
    assert point is not None
    assert point.sensitivity >= LEAST_FOUND
    assert point.threshold == 0.0
    assert point.specificity == 0.0


@pytest.mark.parametrize("labels", [[1.0, 1, np.nan], [0.0, 0, 0], [np.nan] * 3])
def test_one_class_gives_no_threshold(labels: list[float]) -> None:
    assert point_of(np.arange(3.0), np.array(labels), "site") is None


def test_scores_that_say_the_contrary_give_no_probability() -> None:
    point = point_of(np.array([0.0, 1, 5, 6]), np.array([1.0, 1, 0, 0]), "site")
    assert point is not None
    assert point.slope == 0
    assert point.probability(3.0) is None


def test_a_threshold_that_raises_too_many_alarms_decides_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = slices(40, model.size)
    present = labelled.labels[:, DEFAULT_LABELS.index("motion")]
    for share, decides in ((0.0, True), (0.3, False)):
        logits = np.zeros((40, len(model.labels)), np.float32)
        logits[:, DEFAULT_LABELS.index("motion")] = np.where(present == 1, 1, 0)
        logits[: int(40 * share), DEFAULT_LABELS.index("motion")] = 1
        monkeypatch.setattr(operating_point, "score", lambda *how, logits=logits: logits)
        found = points_of(model, labelled, "site")
        assert found.patients["motion"].decides is decides
        assert found.images["motion"].decides is decides
        assert Finding(artifact="motion", logit=9.0, point=found.images["motion"]).positive is (
            True if decides else None
        )


def slices(patients: int, size: int) -> Slices:
    """MR noise; motion is in every second patient, metal in two."""
    rng = np.random.default_rng(5)
    labels = np.full((patients, len(find_model(START, None).labels)), np.nan, np.float32)
    labels[:, DEFAULT_LABELS.index("motion")] = np.arange(patients) % 2
    labels[:, DEFAULT_LABELS.index("susceptibility")] = np.arange(patients) < 2
    return Slices(
        images=rng.integers(0, 4096, (patients, size, size)).astype(np.int16),
        modality=np.full(patients, MODALITIES.index("MR"), np.int8),
        labels=labels,
        patients=np.arange(patients),
    )


def test_points_are_found_once_a_model_and_kept_privately(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(patients: int, seed: int, size: int, *how: object) -> Slices:
        drawn.append(size)
        return slices(24, size)

    monkeypatch.setattr(operating_point, "draw", draw)
    cache = tmp_path / "points"
    first = operating_points(model, cache=cache)
    assert list(first.patients) == ["motion"], "two patients with susceptibility decide nothing"
    assert first.origins == {"phantoms": ("motion",)}
    assert operating_points(model, cache=cache) == first
    assert drawn == [model.size]
    (kept,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o600)
    kept.write_text("{")
    assert operating_points(model, cache=cache) == first
    assert len(drawn) == 2, "what was kept and is damaged is found again"


def test_a_sites_own_patients_come_first(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operating_point, "draw", lambda patients, seed, size, *how: slices(24, size))
    mine = slices(40, model.size)
    monkeypatch.setattr(operating_point, "_labelled", lambda site, model: (mine, "index"))
    found = operating_points(model, site=tmp_path, cache=tmp_path / "points")
    assert found.origins == {"site": ("motion",)}
    assert found.patients["motion"].positives == 20
    monkeypatch.setattr(operating_point, "_labelled", lambda site, model: None)
    assert operating_points(model, site=tmp_path, cache=tmp_path / "points").origins == {
        "phantoms": ("motion",)
    }


def test_a_sites_thresholds_come_from_its_labelled_training_patients_and_no_others(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: files, labels, split and cache of a site."""
    monkeypatch.setattr(operating_point, "draw", lambda patients, seed, size, *how: slices(24, size))
    monkeypatch.setattr(operating_point, "LEAST_PATIENTS", 2)
    site = tmp_path / "site"
    write_site(site, "site", SITE_APPEARANCES[0], patients=24, seed=3)
    unprepared = operating_points(model, site=site, cache=tmp_path / "points")
    assert set(unprepared.origins) == {"phantoms"}, "its images are not decoded for this"
    cohort = load_cohort(site / "site.yaml", size=model.size)
    found = operating_points(model, site=site, cache=tmp_path / "points")
    assert found.origins["site"]
    trains = cohort.part == PARTS.index("train")
    assert 0 < trains.sum() < len(trains)
    labels = patient_labels(cohort.labels[trains], cohort.patients[trains])
    for name in found.origins["site"]:
        own, point = labels[:, DEFAULT_LABELS.index(name)], found.patients[name]
        assert (point.positives, point.negatives) == ((own == 1).sum(), (own == 0).sum())
