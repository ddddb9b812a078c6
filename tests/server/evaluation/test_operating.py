"""Operating points and calibration from histograms: by hand, against scikit-learn, and what bins hide."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix

from common.counts import BINS, DISCLOSED_BINS, NOISED_BINS, Counts, count_between, quantile_edges
from server.evaluation import operating
from server.evaluation.noised import NoisedCounts
from server.evaluation.operating import Scored

PUBLIC = 4000


def drawn(patients: int, seed: int, *, shift: float = 0.0, prevalence: float = 0.3) -> tuple:
    """Logits, calibrated with slope 1 and offset 0 where the shift is 0, and labels, (patients, 1)."""
    rng = np.random.default_rng(seed)
    offset = np.log(prevalence / (1 - prevalence))
    scores = rng.normal(offset, 2.0, (patients, 1))
    labels = (rng.random((patients, 1)) < 1 / (1 + np.exp(-scores))).astype(float)
    return scores + shift, labels


PUBLIC_SCORES, PUBLIC_LABELS = drawn(PUBLIC, 1)
EDGES = quantile_edges(PUBLIC_SCORES)
PUBLIC_COUNTS = Counts.of(PUBLIC_SCORES, PUBLIC_LABELS, EDGES)


def at_site(bins: int, **how: float) -> tuple[operating.Performance, np.ndarray, np.ndarray]:
    scores, labels = drawn(3000, 2, **how)
    point = operating.point_of(PUBLIC_COUNTS, 0, EDGES[0], bins)
    counts = Counts.of(scores, labels, EDGES, bins=bins)
    return operating.performance(counts, 0, point), scores[:, 0], labels[:, 0]


@pytest.mark.parametrize("bins", [BINS, DISCLOSED_BINS])
def test_the_confusion_matrix_is_that_of_the_printed_threshold(bins: int) -> None:
    found, scores, labels = at_site(bins)
    assert found.point is not None
    tn, fp, fn, tp = confusion_matrix(labels, scores >= found.point.threshold).ravel()
    assert (found.tp, found.fn, found.fp, found.tn) == (tp, fn, fp, tn)
    assert found.accuracy == pytest.approx((tp + tn) / 3000)
    assert found.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found.precision is not None
    assert found.precision.value == pytest.approx(tp / (tp + fp))
    assert found.alarms == pytest.approx(100 * (tp + fp) / 3000)
    assert found.balanced_accuracy == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)


@pytest.mark.parametrize("bins", [BINS, DISCLOSED_BINS, NOISED_BINS])
def test_the_point_is_chosen_on_public_patients_at_an_edge_of_the_sites_bins(bins: int) -> None:
    point = operating.point_of(PUBLIC_COUNTS, 0, EDGES[0], bins)
    assert point is not None
    assert point.place % (BINS // bins) == 0
    called = point.threshold <= PUBLIC_SCORES
    assert point.sensitivity == called[PUBLIC_LABELS == 1].mean() >= 0.8
    assert point.specificity == 1 - called[PUBLIC_LABELS == 0].mean()
    assert (point.slope, point.offset) == pytest.approx((1, 0), abs=0.15)


def test_a_site_moves_no_threshold() -> None:
    """The same public patients, another site: the same point."""
    there, _, _ = at_site(BINS, shift=3.0)
    here, _, _ = at_site(BINS)
    assert there.point is not None
    assert here.point is not None
    assert there.point.threshold == here.point.threshold
    assert there.sensitivity is not None
    assert here.sensitivity is not None
    assert there.sensitivity.value > here.sensitivity.value


def test_predictive_value_and_alarms_at_a_stated_prevalence_are_bayes() -> None:
    found, _, _ = at_site(BINS)
    assert found.sensitivity is not None
    assert found.specificity is not None
    at = found.at(0.05)
    assert at is not None
    called = 0.05 * found.sensitivity.value + 0.95 * (1 - found.specificity.value)
    assert at == (pytest.approx(0.05 * found.sensitivity.value / called), pytest.approx(100 * called))
    own = found.at(found.positives / found.n)
    assert own is not None
    assert found.precision is not None
    assert own[0] == pytest.approx(found.precision.value)


def test_scores_of_fine_bins_are_those_of_scikit_learn() -> None:
    found, scores, labels = at_site(BINS)
    assert found.point is not None
    assert found.average_precision == pytest.approx(average_precision_score(labels, scores), abs=0.002)
    logits = found.point.slope * scores + found.point.offset
    probabilities = 1 / (1 + np.exp(-logits))
    assert found.calibration is not None
    assert found.calibration.brier == pytest.approx(brier_score_loss(labels, probabilities), abs=0.001)
    exact = LogisticRegression(C=1e9).fit(logits[:, None], labels)
    assert found.calibration.slope.value == pytest.approx(exact.coef_[0, 0], abs=0.02)
    assert found.calibration.slope.low < 1 < found.calibration.slope.high
    assert abs(found.calibration.intercept) < 0.15
    assert found.calibration.ece < 0.04


def test_scores_shifted_at_a_site_show_in_the_intercept() -> None:
    found, _, _ = at_site(BINS, shift=1.0)
    assert found.point is not None
    assert found.calibration is not None
    assert found.calibration.intercept == pytest.approx(-found.point.slope, abs=0.15)
    assert found.calibration.ece > 0.08


@pytest.mark.parametrize(("shift", "off"), [(0.0, 0.06), (1.0, 0.08)])
def test_what_twenty_bins_do_to_calibration_is_bounded(shift: float, off: float) -> None:
    fine, coarse = (
        at_site(BINS, shift=shift)[0].calibration,
        at_site(DISCLOSED_BINS, shift=shift)[0].calibration,
    )
    assert fine is not None
    assert coarse is not None
    assert abs(coarse.slope.value - fine.slope.value) < off
    assert abs(coarse.brier - fine.brier) < 0.005
    assert abs(coarse.ece - fine.ece) < 0.02
    assert abs(coarse.intercept - fine.intercept) < off


def test_reliability_groups_hold_everybody_once_and_are_about_equal() -> None:
    found, _, _ = at_site(BINS)
    assert found.calibration is not None
    sizes = [group.n for group in found.calibration.groups]
    assert sum(sizes) == 3000
    assert len(sizes) == operating.GROUPS
    assert max(sizes) < 1.3 * min(sizes)


def test_few_patients_have_no_calibration_and_no_class_no_rate() -> None:
    point = operating.point_of(PUBLIC_COUNTS, 0, EDGES[0])
    scores, labels = drawn(25, 3)
    labels[:] = 0
    labels[:9] = 1
    found = operating.performance(Counts.of(scores, labels, EDGES), 0, point)
    assert found.calibration is None
    assert found.tp is not None
    one = operating.performance(Counts.of(scores, np.zeros_like(labels), EDGES), 0, point)
    assert (one.sensitivity, one.reason, one.f1, one.average_precision) == (None, "one_class", None, None)
    none = operating.performance(Counts.empty(1), 0, point)
    assert (none.reason, none.tp, none.accuracy) == ("n0", None, None)


def test_without_public_patients_there_is_no_point() -> None:
    few = Counts.of(PUBLIC_SCORES[:10], PUBLIC_LABELS[:10], EDGES)
    assert min(few.n_pos[0], few.n_neg[0]) < operating.LEAST_PUBLIC
    assert operating.point_of(few, 0, EDGES[0]) is None
    found = operating.performance(PUBLIC_COUNTS, 0, None)
    assert (found.reason, found.tp) == ("no_point", None)
    assert found.average_precision is not None


def test_crowded_coarse_bins_are_marked() -> None:
    assert not at_site(DISCLOSED_BINS)[0].is_crowded
    assert at_site(DISCLOSED_BINS, shift=6.0)[0].is_crowded
    assert not at_site(BINS, shift=6.0)[0].is_crowded


def test_net_benefit_is_that_of_the_confusion_matrix() -> None:
    found, scores, labels = at_site(BINS)
    point = found.point
    assert point is not None
    counts = Counts.of(scores[:, None], labels[:, None], EDGES)
    thresholds = np.array([0.1, 0.3, 0.6])
    scored = Scored.of(counts.positives[0], counts.negatives[0], point)
    curve = operating.decision_curve([scored], thresholds)
    probabilities = 1 / (1 + np.exp(-(point.slope * scores + point.offset)))
    for value, at in zip(curve, thresholds, strict=True):
        called = probabilities >= at
        expected = ((called & (labels == 1)).sum() - (called & (labels == 0)).sum() * at / (1 - at)) / 3000
        assert value == pytest.approx(expected, abs=0.004)
    nobody = operating.net_benefit_of_all(0.3, np.array([0.3]))
    assert nobody == pytest.approx(0, abs=1e-12)


def test_noised_rates_hold_their_truth_and_what_noise_hides_is_not_said() -> None:
    scores, labels = drawn(2000, 5)
    point = operating.point_of(PUBLIC_COUNTS, 0, EDGES[0], NOISED_BINS)
    assert point is not None
    clean, truth = count_between(scores, labels, EDGES), scores[labels == 1] >= point.threshold
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(200):
        noised = clean + np.rint(rng.normal(0, 20, clean.shape)).astype(np.int64)
        found = operating.noised_performance(
            NoisedCounts(positives=noised[0], negatives=noised[1], deviation=20.0), 0, point
        )
        assert found.sensitivity is not None
        held += found.sensitivity.low <= truth.mean() <= found.sensitivity.high
        assert (found.tp, found.calibration, found.accuracy, found.f1) == (None,) * 4
    assert held >= 186  # noise and a binomial's spread: wider than what varies here
    few = NoisedCounts(positives=clean[0] // 50, negatives=clean[1] // 50, deviation=20.0)
    hidden = operating.noised_performance(few, 0, point)
    assert (hidden.sensitivity, hidden.specificity, hidden.reason) == (None, None, "noise")


def test_intervals_of_shares_are_wilsons() -> None:
    found = operating.wilson(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert operating.wilson(0, 10).low == 0
    assert operating.wilson(10, 10).high == 1
