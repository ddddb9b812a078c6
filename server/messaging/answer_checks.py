"""Validate answers before aggregation. An invalid answer drops its site from the round; the run continues."""

from __future__ import annotations

import numpy as np

from common.artifacts import NAMES
from common.counts import BINS
from common.errors import ConfigError, RunError
from common.privacy import GaussianSteps, rdp_epsilon
from common.weights import LIMIT, decode_steps, dequantize_int8
from common.wire import EvaluateTask, SiteDescription, SiteEvaluation, SiteUpdate, TrainTask

MAX_COUNT = 2**31
"""Patients in one bin: no hospital has more, and sums of more could overflow."""


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
    if codec != "plain":
        steps = dequantize_int8(steps, size) if codec == "int8" else decode_steps(steps, size)
    if steps.shape != (size,):
        raise RunError(
            f"{site.site}: the update has shape {steps.shape}, expected ({size},)", code="bad-update"
        )
    if steps.max(initial=0) > LIMIT or steps.min(initial=0) < -LIMIT:
        raise RunError(f"{site.site}: the update leaves the public grid", code="bad-update")
    return steps


def check_evaluation(answer: SiteEvaluation, task: EvaluateTask, site: SiteDescription) -> None:
    """Refuse an evaluation that is not the answer to `task` from `site`, or that no patients could give.

    Raises:
        RunError: code `bad-evaluation`, saying which claim does not hold.
    """
    cells = len(task.models) * len(NAMES)
    claims = {
        "site": (answer.site, site.site),
        "run": (answer.run, task.run),
        "models": (answer.models, task.models),
        "histograms": (answer.histograms.shape, (len(task.models), 2, len(NAMES), BINS)),
        "covariance": (answer.covariance.shape, (cells, cells)),
        "kinds": ((str(answer.histograms.dtype), str(answer.covariance.dtype)), ("int64", "float64")),
    }
    for claim, (value, expected) in claims.items():
        if value != expected:
            raise RunError(f"{site.site}: {claim} is {value!r}, expected {expected!r}", code="bad-evaluation")
    if answer.histograms.min() < 0 or answer.histograms.max() > MAX_COUNT:
        raise RunError(f"{site.site}: counts that no patients give", code="bad-evaluation")


def _check_guarantee(answer: SiteUpdate) -> None:
    """A private update says what it guarantees, in numbers that can be accounted for."""
    epsilon, delta, noise = answer.epsilon, answer.delta, answer.noise_multiplier
    try:
        if epsilon is None or delta is None or noise <= 0 or not 0 < epsilon < np.inf:
            raise RunError(
                f"{answer.site}: a private update without its epsilon, delta and noise", code="bad-update"
            )
        rdp_epsilon([GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=1)], delta)
    except ConfigError as error:
        raise RunError(f"{answer.site}: {error}", code="bad-update") from None
