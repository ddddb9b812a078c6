"""Any artifact: who has one, who is left out, and a score that no single output decides by its scale."""

from __future__ import annotations

import numpy as np
import pytest

from common.any_artifact import any_label, any_score, combined, possible
from common.artifacts import DEFAULT_LABELS, MODALITIES, NAMES
from common.counts import auroc, quantile_edges

CT, MR = (MODALITIES.index(name) for name in ("CT", "MR"))


def test_the_verdict_is_no_artifact_and_one_artifact_needs_no_row() -> None:
    assert [NAMES[place] for place in combined(NAMES)] == [name for name in NAMES if name != "quality"]
    assert len(combined(("metal",))) == len(combined(("metal", "quality"))) == 0


def test_what_could_be_follows_from_the_modalities_of_a_patient() -> None:
    patients, modality = np.array([7, 3, 3, 9]), np.array([CT, MR, CT, MR])
    assert possible(patients, modality, ("metal", "motion")).tolist() == [
        [True, True],
        [True, False],
        [False, True],
    ]


def test_a_patient_counts_only_where_all_that_could_be_was_assessed() -> None:
    nan = np.nan
    truth = np.array([[1, 0, nan], [0, 0, nan], [nan, 1, nan], [nan, 0, nan], [nan, nan, nan], [0, 0, 1]])
    could = np.array([[True, True, False]] * 4 + [[False] * 3, [True, True, True]])
    assert np.array_equal(any_label(truth, could), [1, 0, nan, nan, nan, 1], equal_nan=True)


def drawn(rng: np.random.Generator, patients: int, skill: float) -> tuple[np.ndarray, np.ndarray]:
    truth = (rng.random((patients, 3)) < 0.15).astype(float)
    return rng.normal(skill * truth), truth


def test_the_scale_of_one_output_changes_nothing() -> None:
    """An increasing linear change of an output, and of its public scores with it."""
    rng = np.random.default_rng(1)
    (scores, truth), public = drawn(rng, 400, 2.0), drawn(rng, 4000, 2.0)[0]
    could = np.ones(truth.shape, bool)
    found = any_score(scores, could, quantile_edges(public))
    scale, offset = np.array([1.0, 30.0, 0.2]), np.array([0.0, 50.0, -3.0])
    moved = any_score(scores * scale + offset, could, quantile_edges(public * scale + offset))
    assert np.allclose(found, moved, atol=1e-3)
    label = any_label(truth, could)[:, None]
    highest = [(scores * by).max(axis=1)[:, None] for by in (1.0, scale)]
    plain, spoiled = (float(auroc(one, label)[0]) for one in highest)
    kept = float(auroc(moved[:, None], label)[0])
    assert spoiled < plain - 0.05, "the control: the highest logit is decided by the widest output"
    assert kept > plain - 0.01


def test_more_artifacts_that_could_be_are_no_higher_score_by_chance() -> None:
    """A scanner of the modality with more artifacts is not told from the other by scores without signal."""
    rng = np.random.default_rng(2)
    edges = quantile_edges(rng.normal(0, 1, (40_000, 6)))
    scores, is_six = rng.normal(0, 1, (20_000, 6)), rng.random(20_000) < 0.5
    could = np.ones(scores.shape, bool)
    could[~is_six, 2:] = False
    found = any_score(scores, could, edges)
    neutral = float(auroc(found[:, None], is_six[:, None].astype(float))[0])
    higher = found + np.log(could.sum(axis=1))
    assert abs(neutral - 0.5) < 0.02
    assert float(auroc(higher[:, None], is_six[:, None].astype(float))[0]) > 0.7, "the control: no correction"


def test_it_rises_with_every_score_and_goes_on_beyond_the_public_ones() -> None:
    rng = np.random.default_rng(3)
    edges, could = quantile_edges(rng.normal(0, 2, (500, 2))), np.ones((1, 2), bool)
    one = [float(any_score(np.array([[value, -1.0]]), could, edges)[0]) for value in np.linspace(0, 90, 400)]
    assert (np.diff(one) > 0).all()
    assert np.isfinite(any_score(np.array([[-1e4, -1e4]]), could, np.zeros(edges.shape))).all()


@pytest.mark.parametrize("patients", [0, 3])
def test_nobody_and_nothing_that_could_be_have_no_score(patients: int) -> None:
    scores, could = np.zeros((patients, 2)), np.zeros((patients, 2), bool)
    assert np.isnan(any_score(scores, could, quantile_edges(np.zeros((0, 2))))).all()
    assert possible(np.zeros(patients, int), np.zeros(patients, int), DEFAULT_LABELS).shape[1] == 5
