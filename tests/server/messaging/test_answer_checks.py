"""What is not the answer to the question is refused, and says which claim does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from client.agent.evaluation import exact_sums
from common.artifacts import DEFAULT_LABELS
from common.counts import BINS, DISCLOSED_BINS, NOISED_BINS, quantile_edges
from common.errors import RunError
from common.plan import RunPlan
from common.pricing import EVALUATION, charges, plan_epsilon
from common.privacy import epsilon_of
from common.subgroups import LEVELS
from common.weights import LIMIT, encode_steps, int8_variance, quantize_int8
from common.wire import EvaluateTask, SiteEvaluation
from server.messaging.answer_checks import check_evaluation, check_update
from tests.helpers.answers import BASE_SHA256, PLAN, SITE, SIZE, task, update
from tests.helpers.consortium import tiny_plan


def plan_of(codec: str) -> RunPlan:
    return PLAN.model_copy(update={"federation": PLAN.federation.model_copy(update={"codec": codec})})


@pytest.mark.parametrize("private", [False, True])
def test_an_honest_update_passes(private: bool) -> None:
    check_update(update(private), task(private), BASE_SHA256, SITE, SIZE, PLAN)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"site": "hospital-b"}, "site"),
        ({"run": "other"}, "run"),
        ({"arm": "local"}, "arm"),
        ({"round": 2}, "round"),
        ({"base_sha256": "cd" * 32}, "base"),
        ({"weight": 5000}, "weight"),
        ({"private": True}, "private"),
        ({"added_variance": 0.25}, "added_variance"),
        ({"added_variance": float("nan")}, "added_variance"),
        ({"update": np.zeros(SIZE + 1, np.int32)}, "shape"),
        ({"update": np.zeros((1, SIZE), np.int32)}, "shape"),
        ({"update": np.zeros((), np.int32)}, "shape"),
        ({"update": np.zeros(SIZE, np.int64)}, "dtype"),
        ({"update": np.zeros(SIZE, np.float32)}, "dtype"),
        ({"update": np.zeros(SIZE, ">i4")}, "dtype"),
        ({"update": np.array([0, 0, 0, 0, LIMIT + 1], np.int32)}, "grid"),
        ({"update": np.array([0, 0, 0, 0, -LIMIT - 1], np.int32)}, "grid"),
        ({"update": np.array([0, 0, 0, 0, -(2**31)], np.int32)}, "grid"),
    ],
)
def test_a_claim_that_does_not_hold_is_named(changes: dict[str, Any], claim: str) -> None:
    with pytest.raises(RunError) as caught:
        check_update(update(**changes), task(), BASE_SHA256, SITE, SIZE, PLAN)
    assert caught.value.code == "bad-update"
    assert claim in caught.value.message
    assert caught.value.message.startswith("hospital-a: ")


@pytest.mark.parametrize("codec", ["int8", "lossless"])
@pytest.mark.parametrize("wrong", [0.25, 4711.0, -1.0, float("nan"), float("inf")])
def test_the_variance_of_the_rounding_is_that_of_the_frame_and_no_number_of_the_sites(
    codec: str, wrong: float
) -> None:
    """Else an exact count of patients could leave in it, outside the noise."""
    steps = np.arange(-2, 3, dtype=np.int32) * 100_000
    frame, added = encode_steps(steps), 0.0
    if codec == "int8":
        frame, _ = quantize_int8(steps, np.random.default_rng(1))
        added = int8_variance(frame, SIZE)
        assert added > 0
    honest = update(True, update=frame, added_variance=added)
    assert check_update(honest, task(True), BASE_SHA256, SITE, SIZE, plan_of(codec)).shape == (SIZE,)
    for value in (wrong, np.nextafter(added, 1.0)):
        forged = honest.model_copy(update={"added_variance": float(value)})
        with pytest.raises(RunError, match="added_variance") as caught:
            check_update(forged, task(True), BASE_SHA256, SITE, SIZE, plan_of(codec))
        assert caught.value.code == "bad-update"


@pytest.mark.parametrize(
    "missing",
    [
        {"epsilon": None},
        {"delta": None},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"epsilon": 0.1},
        {"epsilon": plan_epsilon(PLAN, noise=2.4)},
        {"noise_multiplier": 2.4},
        {"delta": 1e-6},
    ],
)
def test_a_private_update_says_what_it_guarantees(missing: dict[str, Any]) -> None:
    with pytest.raises(RunError) as caught:
        check_update(update(True, **missing), task(True), BASE_SHA256, SITE, SIZE, PLAN)
    assert caught.value.code == "bad-update"


def test_a_non_private_update_does_not_answer_a_private_task() -> None:
    with pytest.raises(RunError):
        check_update(update(True, private=False), task(True), BASE_SHA256, SITE, SIZE, PLAN)


NOISE, MODELS = 2.0, ("public", "federated_dp")
QUESTION = EvaluateTask(run="r", models=MODELS, everyone=False, weights=np.zeros((2, 1), np.float32))
SCORING = tiny_plan(arms=["federated_dp"], privacy={"evaluation_noise_multiplier": NOISE})
PUBLIC = SITE.model_copy(update={"kind": "public"})


def noised(**changes: Any) -> SiteEvaluation:
    counts = np.random.default_rng(2).integers(-30, 30, (2, 2, len(DEFAULT_LABELS), NOISED_BINS))
    values: dict[str, Any] = {
        "site": SITE.site,
        "run": "r",
        "models": MODELS,
        "mode": "dp",
        "noise_multiplier": NOISE,
        "epsilon": epsilon_of([charges(SCORING)[EVALUATION]], SCORING.privacy.delta),
        "delta": SCORING.privacy.delta,
        "noised": counts,
    }
    return SiteEvaluation(**values | changes)


def sums(patients: int = 80, *, coarse: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """What a site sends of two models; one artifact is in one patient only, another in nobody."""
    rng = np.random.default_rng(4)
    truth = (rng.random((patients, len(DEFAULT_LABELS))) < 0.4).astype(float)
    truth[:, 1], truth[:, 2] = 0, np.arange(patients) == 0
    scores = [rng.normal(truth * strength) for strength in (0.5, 2.0)]
    return exact_sums(scores, truth, np.stack([quantile_edges(one) for one in scores]), coarse=coarse)


def disclosed(**changes: Any) -> SiteEvaluation:
    histograms, covariance = sums()
    values: dict[str, Any] = {
        "site": SITE.site,
        "run": "r",
        "models": MODELS,
        "mode": "disclosed",
        "histograms": histograms,
        "covariance": covariance,
    }
    return SiteEvaluation(**values | changes)


def test_honest_sums_pass() -> None:
    assert noised().noised.min() < 0
    for patients in (0, 1, 3, 80, 400):
        for mode, site in (("disclosed", SITE), ("synthetic", PUBLIC)):
            histograms, covariance = sums(patients, coarse=mode == "disclosed")
            answer = disclosed(mode=mode, histograms=histograms, covariance=covariance)
            check_evaluation(answer, QUESTION, site, SCORING)
    check_evaluation(noised(), QUESTION, SITE, SCORING)
    check_evaluation(disclosed(), QUESTION, SITE, tiny_plan())


def moved(at: tuple[int, int], amount: float) -> np.ndarray:
    covariance = disclosed().covariance.copy()
    covariance[at] += amount
    return covariance


def scaled(by: float) -> np.ndarray:
    """The variances as they are, and every covariance `by` times what it is."""
    covariance = disclosed().covariance * by
    np.fill_diagonal(covariance, np.diag(disclosed().covariance))
    return covariance


def one_more() -> np.ndarray:
    histograms = disclosed().histograms.copy()
    histograms[1, 0, 0, BINS // 2 // DISCLOSED_BINS] += 1
    return histograms


KNOWN, UNKNOWN = 0, 1
"""Cells of the covariance: of an artifact in some patients, of one in none."""


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        (
            {"covariance": -1000 * np.eye(2 * len(DEFAULT_LABELS))},
            "not a number where it should be|is one where",
        ),
        ({"covariance": np.where(np.isnan(sums()[1]), np.nan, -1000 * np.eye(10))}, "other variances"),
        ({"covariance": np.zeros((10, 10))}, "is one where it cannot be"),
        ({"covariance": np.full((10, 10), np.nan)}, "not a number where it should be"),
        ({"covariance": moved((KNOWN, KNOWN), np.inf)}, "not a number"),
        ({"covariance": moved((KNOWN, KNOWN), 1e-6)}, "other variances"),
        ({"covariance": moved((UNKNOWN, KNOWN), 1.0) * np.nan}, "not a number"),
        ({"covariance": moved((3, 5), 1e-4)}, "not symmetric"),
        ({"covariance": scaled(60.0)}, "not positive semidefinite"),
        ({"histograms": one_more()}, "differ between models"),
        ({"histograms": disclosed().histograms * 10**6}, "more patients than a site has"),
    ],
)
def test_sums_that_no_patients_give_are_refused(changes: dict[str, Any], claim: str) -> None:
    with pytest.raises(RunError, match=claim) as caught:
        check_evaluation(disclosed(**changes), QUESTION, SITE, SCORING)
    assert caught.value.code == "bad-evaluation"
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("hospital-a: ")


ANY = np.zeros((2, 2, BINS), np.int64)
ANY[:, 0, 250], ANY[:, 1, 230] = 30, 40


def test_counts_of_any_artifact_pass_where_the_plan_has_several() -> None:
    check_evaluation(disclosed(any_histograms=ANY), QUESTION, SITE, SCORING)
    check_evaluation(disclosed(any_histograms=ANY, mode="synthetic"), QUESTION, PUBLIC, SCORING)
    alone = tiny_plan(arms=["federated"], model={"labels": ["metal"]})
    histograms, covariance = sums()
    cut = {"histograms": histograms[:, :, :1], "covariance": covariance[::5, ::5]}
    check_evaluation(disclosed(**cut), QUESTION, SITE, alone)
    with pytest.raises(RunError, match="any artifact"):
        check_evaluation(disclosed(**cut, any_histograms=ANY), QUESTION, SITE, alone)


@pytest.mark.parametrize(
    ("sent", "claim"),
    [
        (ANY[:1], "any artifact"),
        (ANY[..., :-1], "any artifact"),
        (ANY.astype(np.float64), "kind"),
        (-ANY, "no patients give"),
        (ANY * 10**7, "no patients give|too many"),
        (np.stack([ANY[0], ANY[0] + (ANY[0] > 0)]), "differ between models"),
        (ANY * 10, "more patients with or without"),
    ],
)
def test_counts_of_any_artifact_that_no_patients_give_are_refused(sent: np.ndarray, claim: str) -> None:
    with pytest.raises(RunError, match=claim):
        check_evaluation(disclosed(any_histograms=sent, mode="synthetic"), QUESTION, PUBLIC, SCORING)


def by_subgroup(**changes: Any) -> SiteEvaluation:
    histograms, covariance = sums(coarse=False)
    found = np.zeros((2, 2, len(DEFAULT_LABELS), len(LEVELS), DISCLOSED_BINS), np.int32)
    found[:, 0, 0, :, 4], found[:, 1, 0, :, 3] = 5, 6
    values = {"histograms": histograms, "covariance": covariance, "subgroups": found}
    return disclosed(mode="synthetic", **values | changes)


def test_counts_by_subgroup_are_checked_beside_those_of_all() -> None:
    check_evaluation(by_subgroup(), QUESTION, PUBLIC, SCORING)
    sent = by_subgroup().subgroups
    one = sent.copy()
    one[1, 0, 0, 0, 0] += 1
    for wrong, claim in (
        (sent[..., :-1], "subgroups"),
        (sent[:, :, :, :-1], "subgroups"),
        (sent.astype(np.int64), "kind"),
        (-sent, "below zero"),
        (one, "differ between models"),
        (sent * 20, "more patients in a subgroup"),
    ):
        with pytest.raises(RunError, match=claim):
            check_evaluation(by_subgroup(subgroups=wrong), QUESTION, PUBLIC, SCORING)


BOUND = 12 * NOISE * np.sqrt(2 * len(DEFAULT_LABELS))


def with_count(value: float) -> np.ndarray:
    counts = noised().noised.copy()
    counts[0, 0, 0, 0] = int(value)
    return counts


@pytest.mark.parametrize(
    ("answer", "claim"),
    [
        (noised(noised=with_count(-BOUND - 2)), "counts"),
        (noised(noised=with_count(2**31 + BOUND + 2)), "counts"),
        (noised(noised=with_count(-(2**63))), "counts"),
        (noised(noised=noised().noised[:, :, :, :-1]), "noised"),
        (noised(noised=noised().noised.astype(np.float64)), "kind"),
        (noised(noised=np.zeros((0, 2, 0, 0), np.int64)), "noised"),
        (noised(noise_multiplier=1.0), "noise"),
        (noised(epsilon=None), "epsilon"),
        (noised(delta=None), "epsilon"),
        (noised(epsilon=float("inf")), "epsilon"),
        (noised(epsilon=0.01), "epsilon"),
        (noised(delta=1e-7), "epsilon"),
        (noised(models=MODELS[::-1]), "models"),
        (disclosed(mode="synthetic"), "mode"),
        (disclosed(histograms=np.zeros((0, 2, 0, 0), np.int64)), "histograms"),
    ],
)
def test_an_evaluation_that_is_not_the_answer_is_refused(answer: SiteEvaluation, claim: str) -> None:
    with pytest.raises(RunError, match=claim) as caught:
        check_evaluation(answer, QUESTION, SITE, SCORING)
    assert caught.value.code == "bad-evaluation"


def test_noise_that_the_plan_did_not_ask_for_is_refused() -> None:
    with pytest.raises(RunError):
        check_evaluation(noised(), QUESTION, SITE, tiny_plan())
    for answer in (noised(), disclosed()):
        with pytest.raises(RunError, match="synthetic"):
            check_evaluation(answer, QUESTION, PUBLIC, SCORING)
