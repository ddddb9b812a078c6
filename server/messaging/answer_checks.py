"""Validate answers before aggregation. An invalid answer drops its site from the round; the run continues."""

from __future__ import annotations

import numpy as np

from common.artifacts import NAMES
from common.counts import BINS, NOISED_BINS, noise_deviation
from common.errors import ConfigError, RunError
from common.privacy import GaussianSteps, rdp_epsilon
from common.weights import LIMIT, decode_steps, dequantize_int8, int8_variance
from common.wire import EvaluateTask, SiteDescription, SiteEvaluation, SiteUpdate, TrainTask

MAX_COUNT = 2**31
"""Patients in one bin: no hospital has more, and sums of more could overflow."""
MAX_DEVIATIONS = 12.0
"""Noise beyond so many standard deviations is none: a chance below 1e-32 a count."""


def check_update(
    answer: SiteUpdate,
    task: TrainTask,
    base_sha256: str,
    site: SiteDescription,
    size: int,
    codec: str = "plain",
) -> np.ndarray:
    """The update in whole steps, int32 (size,); refused unless it is the answer to `task` from `site`.

    Args:
        size: number of trainable parameters.
        codec: of the plan; a frame declares its size, which is compared before anything is allocated.
    Raises:
        RunError: code `bad-update`, saying which claim does not hold.
    """
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
        _check_guarantee(answer)
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
    noise_multiplier: float | None = None,
) -> None:
    """Refuse an evaluation that is not the answer to `task` from `site`, or that no patients could give.

    Args:
        noise_multiplier: of the plan's evaluation.
    Raises:
        RunError: code `bad-evaluation`, saying which claim does not hold.
    """
    models, cells = len(task.models), len(task.models) * len(NAMES)
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
            "noised": (answer.noised.shape, (models, 2, len(NAMES), NOISED_BINS)),
            "kind": (str(answer.noised.dtype), "int64"),
        }
    else:
        claims |= {
            "histograms": (answer.histograms.shape, (models, 2, len(NAMES), BINS)),
            "covariance": (answer.covariance.shape, (cells, cells)),
            "kinds": ((str(answer.histograms.dtype), str(answer.covariance.dtype)), ("int64", "float64")),
        }
    for claim, (value, expected) in claims.items():
        if value != expected:
            raise RunError(f"{site.site}: {claim} is {value!r}, expected {expected!r}", code="bad-evaluation")
    counts, beyond = answer.histograms, 0.0
    if answer.mode == "dp":
        _check_price(answer.site, answer.epsilon, answer.delta, answer.noise_multiplier)
        counts, beyond = answer.noised, MAX_DEVIATIONS * noise_deviation(answer.noise_multiplier, models)
    if counts.min() < -beyond or counts.max() > MAX_COUNT + beyond:
        raise RunError(f"{site.site}: counts that no patients give", code="bad-evaluation")


def _check_guarantee(answer: SiteUpdate) -> None:
    """A private update says what it guarantees, in numbers that can be accounted for."""
    _check_price(answer.site, answer.epsilon, answer.delta, answer.noise_multiplier, code="bad-update")


def _check_price(
    site: str, epsilon: float | None, delta: float | None, noise: float, *, code: str = "bad-evaluation"
) -> None:
    try:
        if epsilon is None or delta is None or noise <= 0 or not 0 < epsilon < np.inf:
            raise RunError(f"{site}: a noised answer without its epsilon, delta and noise", code=code)
        rdp_epsilon([GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=1)], delta)
    except ConfigError as error:
        raise RunError(f"{site}: {error}", code=code) from None
