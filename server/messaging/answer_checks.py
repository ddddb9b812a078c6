"""Validate answers before aggregation. An invalid answer drops its site from the round; the run continues."""

from __future__ import annotations

import numpy as np

from common.any_artifact import combined
from common.arms import is_baseline
from common.counts import BINS, DISCLOSED_BINS, NOISED_BINS, Counts, noise_deviation
from common.errors import ConfigError, RunError
from common.names import MAX_PATIENTS
from common.plan import RunPlan
from common.pricing import EVALUATION, charges, plan_epsilon
from common.privacy import GaussianSteps, epsilon_of, rdp_epsilon
from common.subgroups import LEVELS
from common.weights import LIMIT, decode_steps, dequantize_int8, int8_variance
from common.wire import EvaluateTask, SiteDescription, SiteEvaluation, SiteUpdate, TrainTask

MAX_COUNT = 2**31
"""Patients in one bin: no hospital has more, and sums of more could overflow."""
CLOSE = 1e-6
"""Relative difference of two numbers that were computed alike on two machines."""
MAX_DEVIATIONS = 12.0
"""Noise beyond so many standard deviations is none: a chance below 1e-32 a count."""


def check_update(
    answer: SiteUpdate,
    task: TrainTask,
    base_sha256: str,
    site: SiteDescription,
    size: int,
    plan: RunPlan,
) -> np.ndarray:
    """The update in whole steps, int32 (size,); refused unless it is the answer to `task` from `site`.

    Args:
        size: number of trainable parameters.
        plan: its codec's frame declares a size, which is compared before anything is allocated; its price at
            the answer's noise is what a private answer must state.
    Raises:
        RunError: code `bad-update`, saying which claim does not hold.
    """
    codec = plan.federation.codec
    claims = {
        "site": (answer.site, site.site),
        "run": (answer.run, task.run),
        "arm": (answer.arm, task.arm),
        "round": (answer.round, task.round),
        "base": (answer.base_sha256, base_sha256),
        "weight": (answer.weight, site.nominal_patients),
        "private": (answer.private, task.private),
        "dtype": (str(answer.update.dtype), "int32" if codec == "plain" else "uint8"),
    }
    if task.private:
        _check_price(answer, plan, code="bad-update")
    else:
        _check_no_claim(answer, code="bad-update")
    for claim, (value, expected) in claims.items():
        if value != expected:
            raise RunError(f"{site.site}: {claim} is {value!r}, expected {expected!r}", code="bad-update")
    steps = answer.update
    added = int8_variance(steps, size) if codec == "int8" else 0.0
    if answer.added_variance != added:  # it follows from the frame: another number could say anything
        raise RunError(
            f"{site.site}: added_variance is {answer.added_variance!r}, expected {added!r}", code="bad-update"
        )
    if codec != "plain":
        steps = dequantize_int8(steps, size) if codec == "int8" else decode_steps(steps, size)
    if steps.shape != (size,):
        raise RunError(
            f"{site.site}: the update has shape {steps.shape}, expected ({size},)", code="bad-update"
        )
    if steps.max(initial=0) > LIMIT or steps.min(initial=0) < -LIMIT:
        raise RunError(f"{site.site}: the update leaves the public grid", code="bad-update")
    return steps


def check_evaluation(
    answer: SiteEvaluation,
    task: EvaluateTask,
    site: SiteDescription,
    plan: RunPlan,
) -> None:
    """Refuse an evaluation that is not the answer to `task` from `site`, or that no patients could give.

    Of exact sums: every model has the numbers of patients of every other, and the covariance is one of these
    histograms, with their variances and no negative eigenvalue. Of sums with noise: the noise is the plan's,
    and the guarantee is what that noise gives.

    Raises:
        RunError: code `bad-evaluation`, saying which claim does not hold.
    """
    noise_multiplier = plan.privacy.evaluation_noise_multiplier
    models, artifacts = len(task.models), len(plan.model.labels)
    cells = models * artifacts
    modes = ("dp", "disclosed") if site.kind == "hospital" else ("synthetic",)
    claims: dict[str, tuple[object, object]] = {
        "site": (answer.site, site.site),
        "run": (answer.run, task.run),
        "models": (answer.models, task.models),
        "mode": (answer.mode, answer.mode if answer.mode in modes else " or ".join(modes)),
    }
    if answer.mode == "dp":
        claims |= {
            "noise": (answer.noise_multiplier, noise_multiplier),
            "noised": (answer.noised.shape, (models, 2, artifacts, NOISED_BINS)),
            "kind": (str(answer.noised.dtype), "int64"),
        }
    else:
        claims |= {
            "histograms": (answer.histograms.shape, (models, 2, artifacts, BINS)),
            "covariance": (answer.covariance.shape, (cells, cells)),
            "kinds": ((str(answer.histograms.dtype), str(answer.covariance.dtype)), ("int64", "float64")),
        }
        if answer.subgroups.size:
            shape = (models, 2, artifacts, len(LEVELS), DISCLOSED_BINS)
            claims |= {
                "subgroups": (answer.subgroups.shape, shape),
                "their kind": (str(answer.subgroups.dtype), "int32"),
            }
        if answer.any_histograms.size:
            networks = sum(not is_baseline(model) for model in task.models)
            shape_of_any = (networks, 2, BINS) if len(combined(plan.model.labels)) else (0, 2, 0)
            claims |= {
                "any artifact": (answer.any_histograms.shape, shape_of_any),
                "its kind": (str(answer.any_histograms.dtype), "int64"),
            }
    for claim, (value, expected) in claims.items():
        if value != expected:
            raise RunError(f"{site.site}: {claim} is {value!r}, expected {expected!r}", code="bad-evaluation")
    counts, beyond = answer.histograms, 0.0
    if answer.mode == "dp":
        _check_price(answer, plan, code="bad-evaluation")
        counts, beyond = (
            answer.noised,
            MAX_DEVIATIONS * noise_deviation(answer.noise_multiplier, models, artifacts),
        )
    else:
        _check_no_claim(answer, code="bad-evaluation")
    if counts.min() < -beyond or counts.max() > MAX_COUNT + beyond:
        raise RunError(f"{site.site}: counts that no patients give", code="bad-evaluation")
    if answer.mode == "dp":
        return
    if (
        wrong := _wrong_sums(answer.histograms, answer.covariance)
        or _wrong_any(answer)
        or _wrong_subgroups(answer)
    ):
        raise RunError(f"{site.site}: {wrong}", code="bad-evaluation")


def _wrong_sums(histograms: np.ndarray, covariance: np.ndarray) -> str:
    """What exact sums cannot be; "" where nothing is wrong.

    Args:
        histograms: int64 (K, 2, A, BINS), not below zero.
        covariance: float64 (K*A, K*A), see `common.counts.auroc_covariance`.
    """
    numbers = histograms.sum(axis=-1)
    if (numbers != numbers[:1]).any():
        return "the numbers of patients differ between models"
    if numbers.sum(axis=1).max(initial=0) > MAX_PATIENTS:
        return "counts of more patients than a site has"
    variances = np.concatenate(
        [Counts(positives=one[0], negatives=one[1]).auroc_variance() for one in histograms]
    )
    known = np.isfinite(variances)
    if (np.isfinite(covariance) != np.outer(known, known)).any() or np.isinf(covariance).any():
        return "the covariance is not a number where it should be, or is one where it cannot be"
    within, variances = covariance[np.ix_(known, known)], variances[known]
    if not np.allclose(np.diag(within), variances, rtol=CLOSE, atol=0):
        return "the covariance has other variances than the histograms"
    deviations = np.sqrt(variances)
    correlation = within / np.outer(deviations, deviations)
    if not np.allclose(correlation, correlation.T, rtol=0, atol=CLOSE):
        return "the covariance is not symmetric"
    if len(correlation) and np.linalg.eigvalsh(correlation).min() < -CLOSE * len(correlation):
        return "the covariance is not positive semidefinite"
    return ""


def _wrong_any(answer: SiteEvaluation) -> str:
    """What the counts of patients with any artifact cannot be beside those of each; "" where all is well."""
    found = answer.any_histograms
    if not found.size:
        return ""
    if found.min() < 0 or found.max() > MAX_COUNT:
        return "counts of any artifact that no patients give"
    numbers = found.sum(axis=-1)
    if (numbers != numbers[:1]).any() or numbers[0].sum() > MAX_PATIENTS:
        return "the numbers of patients with any artifact differ between models, or are too many"
    # a hospital may count an artifact of few patients as not assessed, and them here all the same
    most = answer.histograms[0].sum(axis=(1, 2))
    if answer.mode == "synthetic" and (numbers[0] > most).any():
        return "more patients with or without any artifact than with or without each of them"
    return ""


def _wrong_subgroups(answer: SiteEvaluation) -> str:
    """What counts by subgroup cannot be beside those of all patients; "" where all is well."""
    found = answer.subgroups
    if not found.size:
        return ""
    numbers = found.sum(axis=-1, dtype=np.int64)
    if found.min() < 0 or (numbers != numbers[:1]).any():
        return "the numbers of patients in subgroups differ between models, or are below zero"
    if (numbers[0] > answer.histograms[0].sum(axis=-1)[..., None]).any():
        return "more patients in a subgroup than in all"
    return ""


def _check_no_claim(answer: SiteUpdate | SiteEvaluation, *, code: str) -> None:
    """An answer without noise claims no guarantee: none would hold, and a report would state it."""
    if answer.epsilon is not None or answer.delta is not None or answer.noise_multiplier != 0:
        raise RunError(f"{answer.site}: an answer without noise claims an epsilon, delta or noise", code=code)


def _check_price(answer: SiteUpdate | SiteEvaluation, plan: RunPlan, *, code: str) -> None:
    """A noised answer says what it guarantees, and that follows from the plan and its noise."""
    epsilon, delta, noise = answer.epsilon, answer.delta, answer.noise_multiplier
    try:
        if epsilon is None or delta is None or noise <= 0 or not 0 < epsilon < np.inf:
            raise RunError(f"{answer.site}: a noised answer without its epsilon, delta and noise", code=code)
        rdp_epsilon([GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=1)], delta)
    except ConfigError as error:
        raise RunError(f"{answer.site}: {error}", code=code) from None
    expected = (
        plan_epsilon(plan, noise=noise)
        if isinstance(answer, SiteUpdate)
        else epsilon_of([charges(plan)[EVALUATION]], plan.privacy.delta)
    )
    if not np.allclose((epsilon, delta), (expected, plan.privacy.delta), rtol=CLOSE, atol=0):
        raise RunError(
            f"{answer.site}: epsilon {epsilon!r} at delta {delta!r}, but plan and noise give {expected!r} at "
            f"{plan.privacy.delta!r}",
            code=code,
        )
