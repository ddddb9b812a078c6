"""Whether a patient has any artifact, and one score for that from a model's scores of each.

A patient counts as *with* where one of the artifacts is present, as *without* where all are absent, and both
only where every artifact that can occur in a modality of the patient's was assessed. Others are left out,
those with an artifact too: to leave out only the others would make artifacts seem more frequent. The verdict
`quality` is no artifact; fewer than two artifacts need no such row.

Scores of two outputs cannot be compared: one may spread ten times as far as the other. So each is first put
on a public scale: its quantile q among the scores of the coordinator's public images, as -ln(-ln q). Of n
independent scores of public images this is a standard Gumbel variable each, and the highest of them less
ln(n) is one again: a patient of MR, in which more artifacts can occur, has no higher score by chance than one
of CT. The patient's score is that highest one; it orders patients as the smallest of n p-values does (Tippett
1931). An increasing linear change of an output, and with it of its public scores, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.artifacts import MODALITIES, applies_to
from common.counts import QUANTILES

ANY = "any_artifact"
"""Where the name of an artifact stands, in files and tables."""
VERDICTS = ("quality",)
"""Outputs that are ratings of the whole scan."""

_SCALE = -np.log(-np.log(np.arange(1, QUANTILES) / QUANTILES))
"""Of the public quantiles 1/40 ... 39/40."""


def combined(labels: Sequence[str]) -> np.ndarray:
    """The places of the outputs that make up any artifact, int64; none where they are fewer than two."""
    found = np.array([place for place, name in enumerate(labels) if name not in VERDICTS], np.int64)
    return found if len(found) > 1 else found[:0]


def possible(patients: np.ndarray, modality: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Whether each artifact can occur in a modality that a patient has an image of, bool (P, A), one row a
    patient, by number.

    Args:
        patients, modality: (n,) of images, modality as a place in MODALITIES.
    """
    ids, where = np.unique(patients, return_inverse=True)
    found = np.zeros((len(ids), len(labels)), bool)
    np.logical_or.at(found, where, np.array([applies_to(name, labels) for name in MODALITIES])[modality])
    return found


def any_label(truth: np.ndarray, could: np.ndarray) -> np.ndarray:
    """1 with, 0 without, nan left out, (P,).

    Args:
        truth: (P, A) of `common.counts.per_patient`, nan where not assessed.
        could: bool (P, A) of `possible`, of the same artifacts.
    """
    is_whole = could.any(axis=1) & ~(could & np.isnan(truth)).any(axis=1)
    return np.where(is_whole, (could & (truth == 1)).any(axis=1), np.nan)


def any_score(scores: np.ndarray, could: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The highest score of a patient on the public scale, less ln of how many artifacts could be, (P,); nan
    where none could, or one of them has no score.

    Between two public quantiles the scale is linear, beyond the outer ones it goes on at its mean slope.

    Args:
        scores: (P, A). could: bool (P, A).
        edges: (A, common.counts.EDGES) of `common.counts.quantile_edges`.
    """
    scaled = np.full(scores.shape, -np.inf)
    for column, (values, own) in enumerate(zip(scores.T, edges.astype(np.float64), strict=True)):
        reach = own[-1] - own[0]
        slope = (_SCALE[-1] - _SCALE[0]) / reach if reach > 0 else 1.0
        beyond = values - np.clip(values, own[0], own[-1])
        scaled[:, column] = np.interp(values, own, _SCALE) + slope * beyond
    scaled[~could] = -np.inf
    number = could.sum(axis=1)
    found = scaled.max(axis=1, initial=-np.inf) - np.log(np.maximum(number, 1))
    return np.where(number > 0, found, np.nan)
