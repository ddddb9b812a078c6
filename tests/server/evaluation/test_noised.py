"""AUROC through noise: unbiased where it can be seen, an honest interval, and silence where it cannot."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from common.artifacts import DEFAULT_LABELS
from common.counts import Counts, hanley_mcneil
from server.evaluation.estimates import SiteScores, Study, report_numbers, site_metrics
from server.evaluation.noised import (
    NOT_ESTIMABLE,
    NOT_ESTIMABLE_HERE,
    NoisedCounts,
    covariance,
    sampling_deviations,
)

POSITIVES = np.array([1, 2, 5, 10, 20, 40, 60, 62]) / 200
NEGATIVES = POSITIVES[::-1]
RANKS = 0.5 * (1 + np.sign(np.arange(8)[:, None] - np.arange(8)[None, :]))
TRUE = float(POSITIVES @ RANKS @ NEGATIVES)


def hospitals(count: int, *, positives: int, negatives: int, deviation: float, seed: int = 1) -> NoisedCounts:
    """As many hospitals as rows, each with one artifact."""
    rng = np.random.default_rng(seed)
    noise = (
        np.rint(rng.normal(0, deviation, (2, count, 8))).astype(int)
        if deviation
        else np.zeros((2, count, 8), int)
    )
    return NoisedCounts(
        positives=rng.multinomial(positives, POSITIVES, count) + noise[0],
        negatives=rng.multinomial(negatives, NEGATIVES, count) + noise[1],
        deviation=deviation,
    )


def test_without_noise_it_is_the_auroc_of_the_counts() -> None:
    noised = hospitals(5, positives=40, negatives=90, deviation=0.0)
    exact = Counts(positives=noised.positives, negatives=noised.negatives)
    assert noised.auroc() == pytest.approx(exact.auroc())
    expected = [hanley_mcneil(value, 40, 90) for value in exact.auroc()]
    assert noised.auroc_variance() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("positives", "negatives", "deviation"), [(50, 150, 1.5), (50, 150, 5), (200, 600, 15)]
)
def test_the_interval_holds_the_true_value_as_often_as_it_says(
    positives: int, negatives: int, deviation: float
) -> None:
    found = hospitals(400, positives=positives, negatives=negatives, deviation=deviation)
    low, high = found.interval()
    known = np.isfinite(low)
    assert known.mean() > 0.85
    assert ((low <= TRUE) & (high >= TRUE))[known].mean() > 0.92
    assert (found.auroc()[known] >= low[known]).all()
    assert (found.auroc()[known] <= high[known]).all()


def test_noise_widens_the_interval() -> None:
    widths = [
        np.nanmean(
            np.subtract(*hospitals(100, positives=100, negatives=300, deviation=deviation).interval()[::-1])
        )
        for deviation in (0.0, 3.0, 9.0)
    ]
    assert widths == sorted(widths)
    assert widths[2] > 2 * widths[0]


def test_no_patients_give_no_auroc_however_the_noise_falls() -> None:
    """The control: noise alone looks like a score in few of 2000 empty hospitals, and not like a good one."""
    empty = hospitals(2000, positives=0, negatives=0, deviation=5.0)
    low, _ = empty.interval()
    assert np.isfinite(empty.auroc()).mean() < 0.01
    assert not (low > 0.5).sum() > 2


def test_one_class_gives_none_and_numbers_of_patients_are_never_below_zero() -> None:
    found = hospitals(200, positives=0, negatives=500, deviation=4.0)
    assert np.isfinite(found.auroc()).mean() < 0.1
    assert found.n_pos.min() == 0
    assert (found.positives.sum(axis=1) < 0).any()
    assert found.n_deviation == pytest.approx(4.0 * math.sqrt(8))


def test_numbers_of_patients_have_names_of_their_own_and_a_missing_score_its_reason() -> None:
    seen = hospitals(5, positives=100, negatives=300, deviation=2.0)
    hidden = hospitals(5, positives=2, negatives=3, deviation=30.0)
    for row in site_metrics(seen).values():
        assert (row["n_pos"], row["n_neg"]) == (None, None)
        assert row["n_pos_estimate"] == pytest.approx(100, abs=30)
        assert "reason" not in row
    for row in site_metrics(hidden).values():
        assert math.isnan(row["auroc"])
        assert row["reason"] == NOT_ESTIMABLE


def test_a_mean_over_exact_and_noised_sites_adds_their_variances() -> None:
    noised = hospitals(5, positives=100, negatives=300, deviation=2.0)
    exact = Counts(
        positives=np.tile(np.eye(480, dtype=int)[300] * 20, (5, 1)),
        negatives=np.tile(np.eye(480, dtype=int)[200] * 20, (5, 1)),
    )
    study = Study(
        sites={
            "a": SiteScores(
                counts={"public": noised},
                covariance=covariance([noised]),
                sampling=sampling_deviations([noised]),
                scoring={"mode": "dp"},
            ),
            "b": SiteScores(counts={"public": exact}, covariance=np.diag(np.full(5, 1e-4))),
        },
        training=["a", "b"],
        held_out=[],
        models=["public"],
    )
    home = study.estimate("public", "home")
    assert home.value == pytest.approx((noised.auroc().mean() + 1) / 2)
    noise, patients = noised.noise_variance().sum() / 25, noised.sampling_deviation().mean() ** 2
    variance = (noise + patients + 1e-4 / 5) / 4
    assert home.standard_error == pytest.approx(math.sqrt(variance))
    found = report_numbers(study, ["public"])
    assert {site: one["mode"] for site, one in found["scoring"].items()} == {"a": "dp", "b": "synthetic"}
    assert found["counts"]["a"]["public"]["metal"]["positives"] == noised.positives[0].tolist()


def same_patients(models: int = 2) -> Study:
    """Every artifact and every model has the same patients and nearly the same scores: all AUROCs rise and
    fall together.
    """
    one = hospitals(1, positives=60, negatives=140, deviation=0.01)
    counts = NoisedCounts(
        positives=np.tile(one.positives, (len(DEFAULT_LABELS), 1)),
        negatives=np.tile(one.negatives, (len(DEFAULT_LABELS), 1)),
        deviation=0.01,
    )
    names = ["public", "federated"][:models]
    every = dict.fromkeys(names, counts)
    scores = SiteScores(
        counts=every,
        covariance=covariance(list(every.values())),
        sampling=sampling_deviations(list(every.values())),
        scoring={"mode": "dp"},
    )
    return Study(sites={"a": scores}, training=[], held_out=["a"], models=names)


def test_a_mean_over_artifacts_is_as_uncertain_as_one_where_all_have_the_same_patients() -> None:
    """Taken as independent, its variance would be a number-of-artifacts-th of that."""
    study = same_patients()
    single = float(study.sites["a"].counts["public"].sampling_deviation()[0])
    assert study.estimate("public", "unseen").standard_error == pytest.approx(single, rel=1e-3)
    matrix = np.array(report_numbers(study, ["public"])["covariance"]["a"]["matrix"])
    block = matrix[: len(DEFAULT_LABELS), : len(DEFAULT_LABELS)]
    assert math.sqrt(block.mean()) == pytest.approx(single, rel=1e-3)


def test_a_difference_of_models_has_the_variance_of_the_worst_correlation() -> None:
    study = same_patients()
    single = float(study.sites["a"].counts["public"].sampling_deviation()[0])
    difference = study.difference("federated", "public", "unseen")
    assert difference.value == pytest.approx(0, abs=1e-12)
    assert difference.standard_error == pytest.approx(2 * single, rel=1e-3)


def test_what_was_not_to_be_expected_is_not_given_whatever_the_counts_say() -> None:
    seen = hospitals(5, positives=100, negatives=300, deviation=2.0)
    hidden = dataclasses.replace(seen, expected=False)
    assert np.isfinite(seen.auroc()).all()
    for values in (hidden.auroc(), *hidden.interval(), hidden.auroc_variance()):
        assert np.isnan(values).all()
    for row in site_metrics(hidden).values():
        assert (row["auroc"], row["reason"]) == (pytest.approx(math.nan, nan_ok=True), NOT_ESTIMABLE_HERE)
        assert row["n_pos_estimate"] > 0
