"""Every number of evaluation.json follows from the counts and the covariances, by arithmetic one can do by
hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.artifacts import DEFAULT_LABELS
from common.counts import Counts, auroc_covariance
from server.evaluation.estimates import (
    COMPARISONS,
    SiteScores,
    Study,
    gaps,
    generalization_gap,
    headline,
    report_numbers,
    site_metrics,
    trained_at,
    worst_of,
)
from server.run_folder import without_nan

A = len(DEFAULT_LABELS)
METAL, MOTION = DEFAULT_LABELS.index("metal"), DEFAULT_LABELS.index("motion")


def counts_of(**artifacts: tuple[list[float], list[float]]) -> Counts:
    """Counts from the logits of positives and negatives of some artifacts."""
    rows = []
    for name, (positives, negatives) in artifacts.items():
        for value, label in [(value, 1.0) for value in positives] + [(value, 0.0) for value in negatives]:
            logits, labels = np.zeros(A), np.full(A, np.nan)
            logits[DEFAULT_LABELS.index(name)], labels[DEFAULT_LABELS.index(name)] = value, label
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
    assert without_nan(headline(LOCAL, ["local", "federated", "federated_dp"])) == {
        "local": {"home": 1.0, "elsewhere": 0.25, "unseen": 0.25, "worst": 1.0},
        "federated": {"home": 0.75, "elsewhere": None, "unseen": 1.0, "worst": 0.5},
        "federated_dp": None,
    }


def test_a_shared_model_has_no_score_at_hospitals_that_it_did_not_train_at() -> None:
    """It trained at all of them: its home score beat local models there by home advantage."""
    found = report_numbers(LOCAL, ["local", "federated"])
    assert np.isnan(found["scores"]["federated"]["elsewhere"]["value"])
    assert not [row for row in found["contrasts"] if row["where"] == "elsewhere"]
    assert np.isnan(LOCAL.difference("federated", "local", "elsewhere").value)


def test_models_that_trained_at_no_other_hospital_are_compared_elsewhere() -> None:
    models = ("local/a", "local/b", "local_dp/a", "local_dp/b", "public")
    study = study_of({site: dict.fromkeys(models, PERFECT) for site in "abd"})
    found = report_numbers(study, ["local", "local_dp", "public"])
    assert found["scores"]["public"]["elsewhere"]["value"] == 1.0
    pairs = {(row["arm"], row["other"]) for row in found["contrasts"] if row["where"] == "elsewhere"}
    assert pairs == {("local_dp", "local")}
    assert [trained_at("local/a", site, "ab") for site in "abd"] == [True, False, False]
    assert [trained_at("federated", site, "ab") for site in "abd"] == [True, True, False]
    assert not trained_at("public", "a", "ab")


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
    assert [row["where"] for row in found] == ["home", "unseen", "a", "b"]
    assert [row["family"] for row in found] == ["overall", "overall", "sites", "sites"]
    assert {arm for pair in COMPARISONS for arm in pair} == {
        "public",
        "local",
        "local_dp",
        "local_clipped",
        "local_frozen",
        "federated",
        "federated_dp",
        "federated_clipped",
        "federated_frozen",
        "pooled",
        "iqm_logistic",
        "iqm_forest",
    }
    assert next(row for row in found if row["where"] == "unseen")["value"] == 0.75


def scored(labels: np.ndarray, *logits: np.ndarray) -> SiteScores:
    """Exact scores of models `federated`, `public`, ... on the same patients."""
    models = ("federated", "public", "pooled")[: len(logits)]
    return SiteScores(
        counts={model: Counts.of(values, labels) for model, values in zip(models, logits, strict=True)},
        covariance=auroc_covariance(logits, labels),
    )


def site(seed: int, *, positives: int = 20, patients: int = 60, gain: float = 1.0) -> SiteScores:
    """Random scores of one model; `positives` patients with each artifact."""
    rng = np.random.default_rng(seed)
    labels = (np.argsort(rng.random((patients, A)), axis=0) < positives).astype(float)
    return scored(labels, labels * gain + rng.normal(0, 1, labels.shape))


def test_one_cell_with_one_positive_does_not_blank_the_headline() -> None:
    """Its variance is unknown, and made the interval of every mean that contains it unknown."""
    rng = np.random.default_rng(0)
    labels = (np.argsort(rng.random((60, A)), axis=0) < 20).astype(float)
    labels[:, METAL] = 0
    labels[7, METAL] = 1
    study = Study(
        sites={"a": scored(labels, labels + rng.normal(0, 1, labels.shape)), "b": site(1)},
        training=["a", "b"],
        held_out=[],
        models=["federated"],
    )
    found = study.estimate("federated", "home")
    assert np.isfinite([found.value, found.standard_error]).all()
    assert gaps(study) == [
        {"site": "a", "artifact": "metal", "reason": "one_patient", "n_pos": 1, "n_neg": 59}
    ]
    assert "metal" not in report_numbers(study, ["federated"])["averaged"]["a"]


def test_arms_are_compared_on_the_same_artifacts() -> None:
    """Noise hides an artifact of one model: the mean of the other must not have it either."""
    both = counts_of(metal=([1, 2], [-1, -2]), motion=([1, -1], [1, -1]))
    covariance = np.zeros((2 * A, 2 * A))
    covariance[A + METAL, A + METAL] = np.nan
    sites = {"a": SiteScores(counts={"federated": both, "public": both}, covariance=covariance)}
    study = Study(sites=sites, training=["a"], held_out=[], models=["federated", "public"])
    assert study.estimate("federated", "home").value == study.estimate("public", "home").value == 0.5
    assert study.difference("federated", "public", "home").value == 0.0


def test_the_worst_site_is_the_worst_on_the_artifacts_that_all_sites_have() -> None:
    """b is as good as a on metal; its motion, which a has not, made it the worst."""
    hard = counts_of(metal=([1, 2], [-1, -2]), motion=([1, -1], [1, -1]))
    study = study_of({"a": {"federated": PERFECT}, "b": {"federated": hard}, "d": {"federated": PERFECT}})
    found = worst_of(study, "federated")
    assert (found["value"], found["artifacts"], found["of"]) == (1.0, ["metal"], 2)
    common = report_numbers(study, ["federated"])["common"]
    assert common["artifacts"] == ["metal"]
    assert common["scores"]["federated"]["home"]["value"] == 1.0
    apart = study_of(
        {
            "a": {"federated": counts_of(motion=([1, 2], [0, 0]))},
            "b": {"federated": PERFECT},
            "d": {"federated": PERFECT},
        }
    )
    assert np.isnan(worst_of(apart, "federated")["value"])
    assert report_numbers(apart, ["federated"])["common"] == {"artifacts": [], "scores": {}}
    alike = study_of({"a": {"federated": PERFECT}, "d": {"federated": PERFECT}})
    assert report_numbers(alike, ["federated"])["common"] is None


def test_worst_stands_beside_what_equal_sites_would_show() -> None:
    sites = {f"site-{number}": site(number) for number in range(10)}
    study = Study(sites=sites, training=list(sites), held_out=[], models=["federated"])
    found = worst_of(study, "federated")
    scores = [study.estimate("federated", name) for name in sites]
    assert found["value"] == min(score.value for score in scores)
    mean_error = float(np.mean([score.standard_error for score in scores]))
    mean = float(np.mean([score.value for score in scores]))
    assert found["if_equal"] == pytest.approx(mean - 1.539 * mean_error, abs=0.01)


def test_the_interval_of_a_score_is_walds_on_the_logit_scale_and_an_auroc_of_1_moves_by_half_a_pair() -> None:
    labels = np.full((13, A), np.nan)
    labels[:, METAL] = np.arange(13) < 3
    study = Study(sites={"a": scored(labels, labels * 3)}, training=["a"], held_out=[], models=["federated"])
    found = study.estimate("federated", "a")
    centre = 1 - 0.5 / (3 * 10)
    logit = np.log(centre / (1 - centre))
    half = 1.959964 * found.standard_error / (centre * (1 - centre))
    assert found.standard_error > 0
    assert found.to_json() == pytest.approx(
        {
            "value": 1.0,
            "low": 1 / (1 + np.exp(half - logit)),
            "high": 1.0,
            "standard_error": found.standard_error,
            "logit": logit,
            "logit_standard_error": half / 1.959964,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("patients", [25, 200])
def test_intervals_of_few_patients_hold_the_truth_about_as_often_as_they_say(patients: int) -> None:
    """3 with the artifact, true AUROC 0.85, 400 draws: DeLong's variance and Wald's interval on the scale of
    AUROC hold it in 70 to 80 %. benchmarks/interval_coverage.py has other numbers.
    """
    rng, hits, wald = np.random.default_rng(3), 0, 0
    labels = np.full((patients, A), np.nan)
    labels[:, METAL] = np.arange(patients) < 3
    for _ in range(400):
        logits = rng.normal(0, 1, labels.shape) + 1.4657 * (labels == 1)
        study = Study(sites={"a": scored(labels, logits)}, training=["a"], held_out=[], models=["federated"])
        score = study.estimate("federated", "a")
        found = score.to_json()
        hits += found["low"] <= 0.85 <= found["high"]
        delong = study.sites["a"].covariance[METAL, METAL] ** 0.5
        wald += abs(score.value - 0.85) <= 1.96 * delong
    assert hits >= 0.93 * 400
    assert wald < 0.9 * 400


def test_exchanged_labels_are_found_and_chance_is_not() -> None:
    honest = {f"site-{number}": site(number, gain=0.0) for number in range(40)}
    swapped = site(99, gain=-2.0)
    training = [*honest, "swapped"]
    study = Study(sites=honest | {"swapped": swapped}, training=training, held_out=[], models=["federated"])
    found = report_numbers(study, ["federated"])
    assert {row["site"] for row in found["below_chance"]} == {"swapped"}
    assert len(found["below_chance"]) == A
    assert found["looks"]["below_chance"] == 41 * A
    assert all(row["auroc"] < 0.5 and row["p"] < row["p_holm"] < 0.05 for row in found["below_chance"])


def test_differences_carry_holms_correction_of_their_family() -> None:
    study, _, _ = paired(0)
    found = report_numbers(study, ["federated", "public"])
    tested = {
        family: [row for row in found["contrasts"] if row["family"] == family and np.isfinite(row["p"])]
        for family in ("overall", "sites")
    }
    assert {family: len(rows) for family, rows in tested.items()} == {"overall": 1, "sites": 1}
    assert found["looks"] | {"below_chance": 0} == {"overall": 1, "sites": 1, "below_chance": 0}
    assert all(row["p"] == row["p_holm"] for rows in tested.values() for row in rows)
    several = {f"s{number}": paired(number)[0].sites["a"] for number in range(5)}
    many = Study(sites=several, training=list(several), held_out=[], models=study.models)
    rows = [
        row for row in report_numbers(many, ["federated", "public"])["contrasts"] if row["family"] == "sites"
    ]
    assert min(row["p_holm"] for row in rows) == pytest.approx(min(1, 5 * min(row["p"] for row in rows)))


def test_work_grows_with_models_times_sites_and_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 sites took 270,848 AUROCs for 256 that were needed."""
    calls = []
    real = Counts.auroc

    def counted(self: Counts) -> np.ndarray:
        calls.append(1)
        return real(self)

    monkeypatch.setattr(Counts, "auroc", counted)
    sites = {f"site-{number}": site(number, patients=10, positives=4) for number in range(24)}
    study = Study(sites=sites, training=list(sites), held_out=[], models=["federated"])
    report_numbers(study, ["federated"])
    assert len(calls) <= 3 * 24


def random_counts(models: list[str], seed: int, skill: float, patients: int = 60) -> SiteScores:
    rng = np.random.default_rng(seed)
    labels = np.full((patients, A), np.nan)
    labels[:, [METAL, MOTION]] = rng.random((patients, 2)) < 0.4
    logits = [np.nan_to_num(labels) * skill + rng.normal(size=labels.shape) for _ in models]
    return SiteScores(
        counts={model: Counts.of(scores, labels) for model, scores in zip(models, logits, strict=True)},
        covariance=auroc_covariance(logits, labels),
    )


def test_the_gap_is_unseen_less_home_with_the_variance_of_independent_patients() -> None:
    sites = {site: random_counts(["federated"], seed, 1.5) for seed, site in enumerate("abd")}
    study = Study(sites=sites, training=["a", "b"], held_out=["d"], models=["federated"])
    gap = generalization_gap(study, ["federated", "local"])["federated"]
    home, unseen = study.estimate("federated", "home"), study.estimate("federated", "unseen")
    assert gap["value"] == pytest.approx(unseen.value - home.value)
    assert gap["standard_error"] ** 2 == pytest.approx(home.standard_error**2 + unseen.standard_error**2)
    assert gap["artifacts"] == ["metal", "motion"]
    assert (gap["held_out"], np.isnan(gap["next_low"])) == (1, True)


def test_the_gap_is_over_the_artifacts_of_all_places() -> None:
    """`d` has no metal: its score on motion is not compared with a mean over both."""
    motion = counts_of(motion=([1, 2], [-1, -2]))
    both = counts_of(metal=([1, -1], [1, -1]), motion=([1, 2], [-1, -2]))
    study = study_of({"a": {"federated": both}, "b": {"federated": both}, "d": {"federated": motion}})
    gap = generalization_gap(study, ["federated"])["federated"]
    assert (gap["artifacts"], gap["value"], gap["home"]) == (["motion"], 0.0, 1.0)
    nothing = study_of({"a": {"federated": PERFECT}, "d": {"federated": motion}})
    assert generalization_gap(nothing, ["federated"]) == {}


def test_three_held_out_hospitals_give_a_prediction_interval() -> None:
    """By hand: mean -+ t(2; .975) s sqrt(1 + 1/3) of the logits."""
    held_out = ("d", "e", "f")
    sites = {site: random_counts(["federated"], seed, 1.0) for seed, site in enumerate(("a", *held_out))}
    study = Study(sites=sites, training=["a"], held_out=held_out, models=["federated"])
    gap = generalization_gap(study, ["federated"])["federated"]
    values = np.array([study.estimate("federated", site).value for site in held_out])
    logits = np.log(values / (1 - values))
    half = 4.302653 * logits.std(ddof=1) * np.sqrt(4 / 3)
    low, high = (1 / (1 + np.exp(-(logits.mean() + sign * half))) for sign in (-1, 1))
    assert (gap["next_low"], gap["next_high"]) == pytest.approx((low, high), abs=1e-6)
    assert gap["held_out"] == 3


def test_a_run_without_held_out_sites_has_no_gap() -> None:
    assert generalization_gap(study_of({"a": {"federated": PERFECT}}, held_out=()), ["federated"]) == {}
