"""The rule of an operating point, and Platt's calibration: found alike at a site and at the coordinator, each
on patients whose labels it knows.
"""

from __future__ import annotations

import numpy as np

LEAST_FOUND = 0.8
"""Of the positives, so many are found at an operating point."""


def youden(sensitivity: np.ndarray, specificity: np.ndarray) -> int:
    """The place of the operating point: of the thresholds that find at least `LEAST_FOUND` of the positives,
    the one with the largest sensitivity plus specificity; of equal ones the last.

    Args:
        sensitivity, specificity: (thresholds,) at rising thresholds; the first finds every positive.
    Reference: Youden, Cancer 3:32, 1950.
    """
    allowed = np.flatnonzero(sensitivity >= LEAST_FOUND - 1e-12)
    return int(allowed[len(allowed) - 1 - int(np.argmax((sensitivity + specificity)[allowed][::-1]))])


def platt(values: np.ndarray, present: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the probability 1 / (1 + exp(-(slope * value + offset))) that maximise the
    likelihood of Platt's targets; slope 0 where larger scores do not make presence likelier, which no
    probability can be made of.

    Args:
        values: (n,) logits. present: bool (n,).
    Reference: Platt 1999, with the targets and Newton's method of Lin, Lin and Weng, Mach Learn 68:267, 2007.
    """
    n_pos, n_neg = int(present.sum()), int((~present).sum())
    target = np.where(present, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
    scale = float(values.std()) or 1.0
    start = float(np.log((n_pos + 1) / (n_neg + 1)))
    slope, offset = logistic_fit(values / scale, target, start=(0.0, start))
    return (slope / scale, offset) if slope > 0 else (0.0, 0.0)


def logistic_fit(
    values: np.ndarray,
    target: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    start: tuple[float, float] = (0.0, 0.0),
) -> tuple[float, float]:
    """Slope and offset of the logistic regression of `target` on `values`, by Newton's method with halving.

    Args:
        values: (n,). target: (n,), in 0..1. weights: (n,), how often each counts; None: once.
        start: slope and offset to begin from.
    """
    often = np.ones(len(values)) if weights is None else weights
    design = np.column_stack([values, np.ones(len(values))])
    beta = np.array(start, float)

    def loss(at: np.ndarray) -> float:
        z = design @ at
        return float(often @ (np.logaddexp(0, z) - target * z))

    now = loss(beta)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ beta, -500, 500)))
        gradient = design.T @ (often * (p - target))
        hessian = (design * (often * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while length > 1e-6 and loss(beta - length * step) > now:
            length /= 2
        beta = beta - length * step
        before, now = now, loss(beta)
        if before - now < 1e-10 * max(1.0, abs(now)):
            break
    return float(beta[0]), float(beta[1])
