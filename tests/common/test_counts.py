"""Metrics from sums: exact, mergeable, hand-checked."""

from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from common.counts import (
    BINS,
    DISCLOSED_BINS,
    EDGES,
    NOISED_BINS,
    SLICES_OF_A_SCORE,
    Counts,
    auroc,
    auroc_covariance,
    coarse_bias,
    fine_edges,
    hanley_mcneil,
    patient_scores,
    per_patient,
    quantile_edges,
    to_bins,
)


def _random(patients: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (patients, 5)).astype(float)
    return rng.normal(labels, 1.0), np.where(rng.random((patients, 5)) < 0.1, np.nan, labels)


def test_auroc_of_a_hand_computed_example():
    logits = np.array([[0.1], [0.4], [0.35], [0.8]])
    labels = np.array([[0.0], [0.0], [1.0], [1.0]])
    assert Counts.of(logits, labels).auroc()[0] == pytest.approx(0.75)


def test_a_tie_counts_one_half():
    assert Counts.of(np.zeros((2, 1)), np.array([[0.0], [1.0]])).auroc()[0] == 0.5


def test_no_data_is_nan_and_never_zero():
    empty = Counts.empty()
    assert np.isnan(empty.auroc()).all()
    assert np.isnan(empty.interval()[0]).all()
    assert (empty.n_pos == 0).all()


@given(st.integers(0, 10_000))
def test_merge_is_exact_in_any_order(seed):
    logits, labels = _random(40, seed)
    cut = seed % 39 + 1
    first, second = Counts.of(logits[:cut], labels[:cut]), Counts.of(logits[cut:], labels[cut:])
    whole = Counts.of(logits, labels)
    for merged in (first.merge(second), second.merge(first)):
        assert np.array_equal(merged.positives, whole.positives)
        assert np.array_equal(merged.negatives, whole.negatives)


def test_counts_survive_json():
    counts = Counts.of(*_random(50, 1))
    again = Counts.from_json(counts.to_json())
    assert np.array_equal(again.positives, counts.positives)
    assert np.array_equal(again.negatives, counts.negatives)


def test_auroc_agrees_with_all_pairs():
    logits, labels = _random(80, 2)
    bins = to_bins(logits)
    for artifact, value in enumerate(Counts.of(logits, labels).auroc()):
        pos, neg = bins[labels[:, artifact] == 1, artifact], bins[labels[:, artifact] == 0, artifact]
        wins = (pos[:, None] > neg).sum() + 0.5 * (pos[:, None] == neg).sum()
        assert value == pytest.approx(wins / (len(pos) * len(neg)))


def test_variance_is_the_spread_over_repeated_cohorts():
    """DeLong's variance of one cohort, on average, is the variance of the AUROC between cohorts."""
    runs = [_random(60, seed) for seed in range(600)]
    values = np.array([Counts.of(*run).auroc() for run in runs])
    variances = np.array([Counts.of(*run).auroc_variance() for run in runs])
    assert np.mean(variances) == pytest.approx(np.mean(values.var(axis=0, ddof=1)), rel=0.1)


def test_perfect_separation_still_has_a_lower_bound():
    labels = np.array([[0.0]] * 12 + [[1.0]] * 12)
    low, high = Counts.of(10 * labels - 5, labels).interval()
    assert 0.7 < low[0] < 0.9
    assert high[0] == 1


def test_covariance_of_one_model_is_its_variance():
    logits, labels = _random(70, 3)
    covariance = auroc_covariance([logits], labels)
    assert np.diag(covariance) == pytest.approx(Counts.of(logits, labels).auroc_variance())


def test_a_perfect_score_is_not_certain():
    labels = np.array([[0.0]] * 6 + [[1.0]] * 4)
    covariance = auroc_covariance([10 * labels - 5], labels)
    assert covariance[0, 0] == pytest.approx(Counts.of(10 * labels - 5, labels).auroc_variance()[0])
    assert covariance[0, 0] > 0


def test_two_equal_models_differ_by_exactly_nothing():
    logits, labels = _random(70, 4)
    covariance = auroc_covariance([logits, logits.copy()], labels)
    contrast = np.concatenate([np.ones(5), -np.ones(5)])
    assert contrast @ covariance @ contrast == pytest.approx(0, abs=1e-12)


def test_of_few_slices_a_patient_has_the_maximum_over_those_assessed():
    logits = np.array([[1.0], [3.0], [2.0], [9.0]])
    labels = np.array([[0.0], [1.0], [0.0], [np.nan]])
    scores, truth = per_patient(logits, labels, np.array([5, 5, 8, 8]))
    assert scores.tolist() == [[3.0], [2.0]]
    assert truth.tolist() == [[1.0], [0.0]]


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=9))
def test_a_patient_has_the_mean_of_the_maxima_of_all_choices_of_slices(logits):
    column = np.array(logits)[:, None]
    score = patient_scores(column, np.zeros_like(column), np.zeros(len(column), int))
    drawn = combinations(logits, min(SLICES_OF_A_SCORE, len(logits)))
    assert score[0, 0] == pytest.approx(np.mean([max(one) for one in drawn]), abs=1e-9)


def _unlike_lengths(lengths, patients, seed=0):
    """Scores of patients with and without an artifact that no slice shows; slices of a patient are alike."""
    rng = np.random.default_rng(seed)
    numbers = np.repeat(lengths, patients)
    owners = np.repeat(np.arange(len(numbers)), numbers)
    logits = 0.5 * rng.normal(size=len(numbers))[owners] + rng.normal(size=len(owners))
    labels = np.repeat(np.repeat([1.0, 0.0], patients), numbers)
    return logits[:, None], labels[:, None], owners


@pytest.mark.parametrize("lengths", [(40, 20), (60, 10), (20, 40), (10, 3)])
def test_patients_with_more_slices_score_no_higher_where_there_is_nothing_to_see(lengths):
    """The maximum over slices gave .61, .77, .38 and .72."""
    scores, truth = per_patient(*_unlike_lengths(lengths, 4000))
    assert auroc(scores, truth)[0] == pytest.approx(0.5, abs=0.02)  # three deviations


def test_a_score_does_not_fall_where_a_slice_scores_higher():
    rng = np.random.default_rng(7)
    for number in (2, 5, 12):
        logits = rng.normal(size=(number, 1))
        higher = logits + np.eye(number)[rng.integers(number)][:, None]
        nobody, one = np.zeros_like(logits), np.zeros(number, int)
        assert patient_scores(higher, nobody, one) >= patient_scores(logits, nobody, one)


def _two_classes(patients, seed, auroc_is=0.8, prevalence=0.3):
    rng = np.random.default_rng(seed)
    labels = (rng.random((patients, 1)) < prevalence).astype(float)
    return rng.normal(labels * 2**0.5 * NormalDist().inv_cdf(auroc_is)), labels


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_exact_sites_have_the_auroc_of_all_pairs_whatever_the_scale_of_the_logits(scale, offset):
    """480 bins between -12 and 12 gave .60 for .80 at scale 10, .52 at .01."""
    public, _ = _two_classes(100, 1)
    scores, labels = _two_classes(3000, 2)
    counts = Counts.of(scale * (scores + offset), labels, quantile_edges(scale * public))
    expected = roc_auc_score(labels[:, 0], scores[:, 0])
    assert counts.auroc()[0] == pytest.approx(expected, abs=0.002)
    assert auroc(scale * (scores + offset), labels)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("shift", "most"), [(0.0, 0.002), (1.0, 0.002), (2.0, 0.006), (4.0, 0.02)])
def test_fine_bins_lose_more_where_scores_lie_far_off_the_public_ones(shift, most):
    """As docs/performance.md says: below .002 up to 1 SD off, with 60 public patients."""
    errors = []
    for seed in range(12):
        edges = quantile_edges(_two_classes(60, 2 * seed)[0])
        scores, labels = _two_classes(2000, 2 * seed + 1)
        found = Counts.of(scores + shift, labels, edges).auroc()[0]
        errors.append(found - roc_auc_score(labels[:, 0], scores[:, 0]))
    assert np.abs(errors).max() < most
    assert np.mean(errors) <= 0.0001, "ties draw towards one half, here downwards"


def test_delongs_variance_is_that_of_a_published_example():
    """109 CT images rated 1 to 5 (Hanley & McNeil, Radiology 143:29, 1982, table I): AUROC .8932 there;
    DeLong's standard error .0307 and interval .8330 to .9534 as Stata's manual prints them (roctab).
    """
    without, with_it = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    rating = (
        np.concatenate([np.repeat(np.arange(5), without), np.repeat(np.arange(5), with_it)])[:, None] - 2.0
    )
    labels = np.repeat([0.0, 1.0], [sum(without), sum(with_it)])[:, None]
    counts = Counts.of(rating, labels)
    error = counts.auroc_variance()[0] ** 0.5
    assert (counts.auroc()[0], error) == (pytest.approx(0.8932, abs=5e-5), pytest.approx(0.0307, abs=5e-5))
    reach = NormalDist().inv_cdf(0.975) * error
    assert counts.auroc()[0] - reach == pytest.approx(0.83295, abs=5e-5)
    assert counts.auroc()[0] + reach == pytest.approx(0.95339, abs=5e-5)
    assert auroc_covariance([rating], labels)[0, 0] ** 0.5 == pytest.approx(error)


def test_the_covariance_of_two_models_is_that_of_all_pairs():
    """DeLong's structural components, pair by pair."""
    rng = np.random.default_rng(12)
    labels = np.repeat([1.0, 0.0], [17, 31])[:, None]
    first = rng.normal(labels)
    second = 0.6 * first + rng.normal(0.5 * labels)
    v10, v01 = [], []
    for scores in (first, second):
        pairs = np.heaviside(scores[:17, 0, None] - scores[None, 17:, 0], 0.5)
        v10.append(pairs.mean(axis=1))
        v01.append(pairs.mean(axis=0))
    expected = np.cov(v10) / 17 + np.cov(v01) / 31
    edges = [quantile_edges(scores) for scores in (first, second)]
    assert auroc_covariance([first, second], labels, edges) == pytest.approx(expected, rel=0.01)


def test_coarse_bins_are_unions_of_fine_ones_between_public_quantiles():
    public, _ = _two_classes(500, 3)
    scores, labels = _two_classes(400, 4)
    edges = quantile_edges(public)
    assert edges.shape == (1, EDGES)
    fine = fine_edges(edges)
    assert (fine.shape, (np.diff(fine) >= 0).all()) == ((1, BINS - 1), True)
    for bins in (DISCLOSED_BINS, NOISED_BINS):
        coarse = np.searchsorted(edges[0, 40 // bins - 1 :: 40 // bins].astype(float), scores[:, 0], "right")
        assert np.array_equal(to_bins(scores, edges, bins=bins)[:, 0], coarse)
        shares = np.bincount(to_bins(public, edges, bins=bins)[:, 0]) / len(public)
        assert shares == pytest.approx(1 / bins, abs=0.01)
    used = np.flatnonzero(Counts.of(scores, labels, edges, bins=DISCLOSED_BINS).positives[0])
    assert (used % (BINS // DISCLOSED_BINS) == BINS // DISCLOSED_BINS // 2).all()


@given(st.lists(st.floats(-(2.0**13), 2.0**13, width=32), min_size=1, max_size=80))
def test_any_public_scores_give_rising_edges(scores):
    edges = quantile_edges(np.array(scores)[:, None])
    assert np.isfinite(edges).all()
    assert (np.diff(edges) >= 0).all()
    assert edges[0, -1] > edges[0, 0]
    assert (np.diff(fine_edges(edges)) >= 0).all()


@pytest.mark.parametrize("bins", [DISCLOSED_BINS, NOISED_BINS])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.7, 1.0, 1.5])
def test_the_bias_of_coarse_bins_is_known_at_any_shift(bins, shift, spread):
    public, _ = _two_classes(20_000, 5)
    scores, labels = _two_classes(200_000, 6, auroc_is=0.7)
    scores, edges = spread * scores + shift, quantile_edges(public)
    counts = Counts.of(scores, labels, edges, bins=bins)
    found = counts.bias()[0]
    assert found >= 0
    assert counts.auroc()[0] + found == pytest.approx(auroc(scores, labels)[0], abs=0.004)
    assert coarse_bias(*counts_of_bins(scores, labels, edges, bins)) == pytest.approx(found)
    low, high = counts.interval()
    assert low[0] < counts.auroc()[0] + found <= high[0]
    turned = Counts.of(scores, 1 - labels, edges, bins=bins)
    assert turned.bias()[0] == pytest.approx(-found, abs=1e-6)
    assert Counts.of(scores, labels, edges).bias()[0] == 0


def counts_of_bins(scores, labels, edges, bins):
    places = to_bins(scores, edges, bins=bins)[:, 0]
    return [np.bincount(places[labels[:, 0] == one], minlength=bins) for one in (1, 0)]


def test_much_of_a_class_in_one_coarse_bin_is_told():
    public, _ = _two_classes(2000, 8)
    scores, labels = _two_classes(2000, 9)
    edges = quantile_edges(public)
    assert not Counts.of(scores, labels, edges, bins=DISCLOSED_BINS).crowded()[0]
    assert Counts.of(scores + 2, labels, edges, bins=DISCLOSED_BINS).crowded()[0]
    assert not Counts.of(scores + 2, labels, edges).crowded()[0]


@pytest.mark.parametrize("bins", [BINS, DISCLOSED_BINS])
def test_the_covariance_is_of_the_bins_that_were_counted(bins):
    logits, labels = _random(90, 10)
    edges = quantile_edges(_random(40, 11)[0])
    covariance = auroc_covariance([logits, 3 * logits], labels, [edges, edges], bins=bins)
    for place, scores in enumerate((logits, 3 * logits)):
        found = Counts.of(scores, labels, edges, bins=bins).auroc_variance()
        assert np.diag(covariance)[5 * place : 5 * place + 5] == pytest.approx(found)


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_where_every_pair_is_alike_both_variances_are(sign):
    labels = np.array([[0.0]] * 6 + [[1.0]] * 4)
    scores = sign * (10 * labels - 5)
    variance = Counts.of(scores, labels).auroc_variance()[0]
    assert variance > 0
    assert auroc_covariance([scores], labels)[0, 0] == pytest.approx(variance)


def test_hanley_mcneil_value():
    assert hanley_mcneil(0.5, 10, 10) == pytest.approx((0.25 + 9 * (1 / 3 - 0.25) * 2) / 100)


def test_scores_beyond_the_range_are_kept_in_the_outer_bins():
    assert to_bins(np.array([-1e9, 1e9, np.nan])).tolist() == [0, BINS - 1, BINS // 2]


def test_interval_covers_the_truth_as_often_as_it_says():
    truth = 0.760  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    covered = []  # type: ignore[var-annotated]
    for seed in range(200):
        low, high = Counts.of(*_random(30, seed)).interval()
        covered.extend((low <= truth) & (truth <= high))
    assert 0.92 < np.mean(covered) < 0.985
