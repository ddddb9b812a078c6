"""What is not the answer to the question is refused, and says which claim does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.artifacts import NAMES
from common.counts import BINS, NOISED_BINS
from common.errors import RunError
from common.weights import LIMIT, encode_steps, int8_variance, quantize_int8
from common.wire import EvaluateTask, SiteEvaluation
from server.messaging.answer_checks import check_evaluation, check_update
from tests.helpers.answers import BASE_SHA256, SITE, SIZE, task, update


@pytest.mark.parametrize("private", [False, True])
def test_an_honest_update_passes(private: bool) -> None:
    check_update(update(private), task(private), BASE_SHA256, SITE, SIZE)


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
        check_update(update(**changes), task(), BASE_SHA256, SITE, SIZE)
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
    assert check_update(honest, task(True), BASE_SHA256, SITE, SIZE, codec).shape == (SIZE,)
    for value in (wrong, np.nextafter(added, 1.0)):
        forged = honest.model_copy(update={"added_variance": float(value)})
        with pytest.raises(RunError, match="added_variance") as caught:
            check_update(forged, task(True), BASE_SHA256, SITE, SIZE, codec)
        assert caught.value.code == "bad-update"


@pytest.mark.parametrize(
    "missing", [{"epsilon": None}, {"delta": None}, {"noise_multiplier": 0.0}, {"noise_multiplier": -1.0}]
)
def test_a_private_update_says_what_it_guarantees(missing: dict[str, Any]) -> None:
    with pytest.raises(RunError) as caught:
        check_update(update(True, **missing), task(True), BASE_SHA256, SITE, SIZE)
    assert caught.value.code == "bad-update"


def test_a_non_private_update_does_not_answer_a_private_task() -> None:
    with pytest.raises(RunError):
        check_update(update(True, private=False), task(True), BASE_SHA256, SITE, SIZE)


NOISE, MODELS = 2.0, ("public", "federated_dp")
QUESTION = EvaluateTask(run="r", models=MODELS, everyone=False, weights=np.zeros((2, 1), np.float32))


def noised(**changes: Any) -> SiteEvaluation:
    counts = np.random.default_rng(2).integers(-30, 30, (2, 2, len(NAMES), NOISED_BINS))
    values: dict[str, Any] = {
        "site": SITE.site,
        "run": "r",
        "models": MODELS,
        "mode": "dp",
        "noise_multiplier": NOISE,
        "epsilon": 1.0,
        "delta": 1e-5,
        "noised": counts,
    }
    return SiteEvaluation(**values | changes)


def disclosed(**changes: Any) -> SiteEvaluation:
    values: dict[str, Any] = {
        "site": SITE.site,
        "run": "r",
        "models": MODELS,
        "mode": "disclosed",
        "histograms": np.zeros((2, 2, len(NAMES), BINS), np.int64),
        "covariance": np.zeros((2 * len(NAMES),) * 2),
    }
    return SiteEvaluation(**values | changes)


def test_noised_counts_below_zero_pass() -> None:
    assert noised().noised.min() < 0
    check_evaluation(noised(), QUESTION, SITE, NOISE)
    check_evaluation(disclosed(), QUESTION, SITE, NOISE)
    check_evaluation(disclosed(), QUESTION, SITE)


BOUND = 12 * NOISE * np.sqrt(2 * len(NAMES))


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
        (noised(models=MODELS[::-1]), "models"),
        (disclosed(mode="synthetic"), "mode"),
        (disclosed(histograms=np.zeros((0, 2, 0, 0), np.int64)), "histograms"),
    ],
)
def test_an_evaluation_that_is_not_the_answer_is_refused(answer: SiteEvaluation, claim: str) -> None:
    with pytest.raises(RunError, match=claim) as caught:
        check_evaluation(answer, QUESTION, SITE, NOISE)
    assert caught.value.code == "bad-evaluation"


def test_noise_that_the_plan_did_not_ask_for_is_refused() -> None:
    with pytest.raises(RunError):
        check_evaluation(noised(), QUESTION, SITE, None)
    public = SITE.model_copy(update={"kind": "public"})
    for answer in (noised(), disclosed()):
        with pytest.raises(RunError, match="synthetic"):
            check_evaluation(answer, QUESTION, public, NOISE)
