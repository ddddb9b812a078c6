"""Every number of evaluation.json follows from the counts and the covariances, by arithmetic one can do by
hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.artifacts import NAMES
from common.counts import Counts, auroc_covariance
from server.evaluation.estimates import COMPARISONS, SiteScores, Study, headline, report_numbers, site_metrics

A = len(NAMES)
METAL, MOTION = NAMES.index("metal"), NAMES.index("motion")


def counts_of(**artifacts: tuple[list[float], list[float]]) -> Counts:
    """Counts from the logits of positives and negatives of some artifacts."""
    rows = []
    for name, (positives, negatives) in artifacts.items():
        for value, label in [(value, 1.0) for value in positives] + [(value, 0.0) for value in negatives]:
            logits, labels = np.zeros(A), np.full(A, np.nan)
            logits[NAMES.index(name)], labels[NAMES.index(name)] = value, label
            rows.append((logits, labels))
    if not rows:
        return Counts.empty()
    return Counts.of(np.stack([logits for logits, _ in rows]), np.stack([labels for _, labels in rows]))


PERFECT = counts_of(metal=([1, 2], [-1, -2]))
HALF = counts_of(metal=([1, -1], [1, -1]))
WRONG = counts_of(metal=([-1, -2], [1, 2]))
NOBODY = counts_of()


def study_of(cells: dict[str, dict[str, Counts]], held_out: tuple[str, ...] = ("d",)) -> Study:
    """A study from site -> model -> counts, without covariance."""
    models = list(next(iter(cells.values())))
    return Study(
        sites={
            site: SiteScores(counts=row, covariance=np.zeros((len(row) * A,) * 2))
            for site, row in cells.items()
        },
        training=[site for site in "abc" if site in cells],
        held_out=[site for site in held_out if site in cells],
        models=models,
    )


LOCAL = study_of(
    {
        "a": {"local/a": PERFECT, "local/b": HALF, "federated": PERFECT},
        "b": {"local/a": WRONG, "local/b": PERFECT, "federated": HALF},
        "d": {"local/a": HALF, "local/b": WRONG, "federated": PERFECT},
    }
)


def test_the_headline_by_hand() -> None:
    assert headline(LOCAL, ["local", "federated", "federated_dp"]) == {
        "local": {"home": 1.0, "elsewhere": 0.25, "unseen": 0.25, "worst": 1.0},
        "federated": {"home": 0.75, "elsewhere": 0.75, "unseen": 1.0, "worst": 0.5},
        "federated_dp": None,
    }


def test_a_site_without_both_classes_is_left_out_of_the_mean_and_is_not_zero() -> None:
    study = study_of({"a": {"federated": PERFECT}, "b": {"federated": NOBODY}, "d": {"federated": NOBODY}})
    (found,) = headline(study, ["federated"]).values()
    assert found is not None
    assert (found["home"], found["worst"]) == (1.0, 1.0)
    assert np.isnan(found["unseen"])


def test_a_score_is_the_mean_over_the_artifacts_that_have_one() -> None:
    both = counts_of(metal=([1, 2], [-1, -2]), motion=([1, -1], [1, -1]))
    study = study_of({"a": {"federated": both}, "d": {"federated": both}})
    assert study.estimate("federated", "a").value == 0.75


def test_a_mean_of_sites_is_not_the_score_of_all_patients_together() -> None:
    """Two sites that are each perfect on scales of their own pool to something else; sites are never
    pooled.
    """
    low, high = counts_of(metal=([-1], [-2])), counts_of(metal=([2], [1]))
    study = study_of({"a": {"federated": low}, "b": {"federated": high}, "d": {"federated": NOBODY}})
    assert study.estimate("federated", "home").value == 1.0
    assert low.merge(high).auroc()[METAL] == 0.75


def test_no_data_is_null_with_zero_patients() -> None:
    found = site_metrics(counts_of(metal=([1.0], [])))
    assert np.isnan([found["metal"]["auroc"], found["metal"]["low"], found["metal"]["high"]]).all()
    assert (found["metal"]["n_pos"], found["metal"]["n_neg"]) == (1, 0)
    assert (found["motion"]["n_pos"], found["motion"]["n_neg"]) == (0, 0)


def paired(seed: int, patients: int = 200) -> tuple[Study, list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (patients, A)).astype(float)
    shared = rng.normal(0, 1, labels.shape)
    logits = [labels + shared + rng.normal(0, 0.3, labels.shape) for _ in range(2)]
    scores = SiteScores(
        counts={
            name: Counts.of(values, labels)
            for name, values in zip(("federated", "public"), logits, strict=True)
        },
        covariance=auroc_covariance(logits, labels),
    )
    return (
        Study(sites={"a": scores}, training=["a"], held_out=[], models=["federated", "public"]),
        logits,
        labels,
    )


def test_a_paired_difference_is_narrower_than_two_scores() -> None:
    study, _, _ = paired(0)
    one, other, difference = (
        study.estimate("federated", "a"),
        study.estimate("public", "a"),
        study.difference("federated", "public", "a"),
    )
    assert difference.value == pytest.approx(one.value - other.value)
    assert difference.standard_error < 0.7 * np.hypot(one.standard_error, other.standard_error)


def test_a_model_does_not_differ_from_itself() -> None:
    study, _, _ = paired(1)
    difference = study.difference("federated", "federated", "a")
    assert (difference.value, difference.standard_error) == (0.0, 0.0)


def test_the_standard_error_is_that_of_a_bootstrap_over_patients() -> None:
    study, logits, labels = paired(2)
    rng = np.random.default_rng(3)
    values = []
    for _ in range(300):
        chosen = rng.integers(0, len(labels), len(labels))
        first, second = (Counts.of(values[chosen], labels[chosen]).auroc().mean() for values in logits)
        values.append(first - second)
    assert study.difference("federated", "public", "a").standard_error == pytest.approx(
        np.std(values), rel=0.25
    )


def test_sites_are_independent() -> None:
    first, _, _ = paired(4)
    second, _, _ = paired(5)
    both = Study(
        sites={"a": first.sites["a"], "b": second.sites["a"]},
        training=["a", "b"],
        held_out=[],
        models=first.models,
    )
    errors = [both.estimate("federated", site).standard_error for site in "ab"]
    assert both.estimate("federated", "home").standard_error == pytest.approx(np.hypot(*errors) / 2)  # type: ignore[call-overload]


def test_report_numbers_hold_the_sums_they_came_from() -> None:
    found: dict[str, Any] = report_numbers(LOCAL, ["local", "federated", "federated_dp"])
    assert set(found) >= {"counts", "covariance", "metrics", "matrix", "headline", "scores", "contrasts"}
    for site, row in found["counts"].items():
        for model, sparse in row.items():
            assert site_metrics(Counts.from_json(sparse))["metal"] == found["matrix"][model][site]["metal"]
    assert found["metrics"]["local"]["a"] == found["matrix"]["local/a"]["a"]
    assert set(found["metrics"]["federated"]) == {"a", "b", "d"}
    assert set(found["metrics"]["local"]) == {"a", "b"}
    assert "federated_dp" not in found["scores"]


def test_every_comparison_of_arms_that_exist_is_told_everywhere() -> None:
    found = report_numbers(LOCAL, ["local", "federated"])["contrasts"]
    assert {(row["arm"], row["other"]) for row in found} == {("federated", "local")}
    assert [row["where"] for row in found][:5] == ["home", "elsewhere", "unseen", "a", "b"]
    assert {arm for pair in COMPARISONS for arm in pair} == {
        "public",
        "local",
        "local_dp",
        "local_clipped",
        "federated",
        "federated_dp",
        "federated_clipped",
        "pooled",
    }
    assert next(row for row in found if row["where"] == "unseen")["value"] == 0.75
