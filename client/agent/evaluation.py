"""Score models on a site's patients: only sums leave."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from client.data.cohort import Cohort
from common.artifacts import NAMES
from common.counts import BINS, Counts, auroc_covariance, per_patient
from common.learning import score
from common.models import build
from common.weights import manifest_of, unflatten


def evaluate(
    cohort: Cohort,
    model_name: str,
    weights: np.ndarray,
    *,
    everyone: bool,
    minimum_cell: int = 0,
    tick: Callable[[int], None] = lambda models: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Patient-level histograms and AUROC covariance of several models on the same patients.

    Args:
        weights: float32 (K, parameters).
        everyone: score all patients of a site that never trained, else its test patients.
        minimum_cell: artifacts with fewer patients of either class are treated as not assessed, so that no
            small count leaves.
        tick: called before each model with the number already scored; what it raises ends the scoring.
    Returns:
        int64 (K, 2, A, BINS) with positives first, and float64 (K*A, K*A).
    """
    rows = np.flatnonzero(cohort.part >= 0 if everyone else cohort.part == 2)
    model = build(model_name)
    manifest = manifest_of(model.state_dict())
    histograms = np.zeros((len(weights), 2, len(NAMES), BINS), np.int64)
    if not len(rows):
        return histograms, np.full((len(weights) * len(NAMES),) * 2, np.nan)
    scores, truth = [], np.zeros(0)
    for k, flat in enumerate(weights):
        tick(k)
        model.load_state_dict(unflatten(flat, manifest))
        logits, truth = per_patient(
            score(model, cohort.images, cohort.modality, rows), cohort.labels[rows], cohort.patients[rows]
        )
        small = np.minimum((truth == 1).sum(0), (truth == 0).sum(0)) < minimum_cell
        truth = np.where(small, np.nan, truth)
        counts = Counts.of(logits, truth)
        histograms[k] = counts.positives, counts.negatives
        scores.append(logits)
    return histograms, auroc_covariance(scores, truth)
