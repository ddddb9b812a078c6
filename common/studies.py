"""Samples of several slices: the slices of a series in their order, as one study; a slice and its neighbours.

A network of studies (`model.name: study`) looks at a public number of slices. Of a longer series it sees the
middles of so many equal parts, of a shorter one all, and nan in the places that are left. The label of a
study is the maximum over the slices of its series that were assessed, as that of a patient is
(`common.counts.patient_labels`).

The series of a study can be fused (`model.args.fusion`): by their features in the network, where a sample is
a study of several series; or by the decisions about them, where each series is a sample and a patient is
scored.

With `model.args.neighbours` a sample is still one slice, seen together with the one before and the one after
it in its series (2.5-D); at an end of the series, and where nothing is known of one, it is its own neighbour.
The label is the slice's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.counts import patient_labels
from common.plan import Model
from common.preprocess import to_channels
from common.series import Series


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyImages:
    """Slices in memory or in a cache, and which of them each study has. Selecting studies copies no slice."""

    slices: np.ndarray  # int16 (n, side, side)
    modality: np.ndarray  # int8 (n,), of the slices
    rows: np.ndarray  # int64 (studies, S): positions among the slices in their order; then -1, no slice
    # a sample is one image: a slice and its neighbours, (itself, before, after), whose channels follow one
    # another, and which are augmented alike
    is_stacked: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def channels(self, chosen: np.ndarray, see: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Studies as a network of studies takes them, (len(chosen), S, 2, side, side), nan: no slice;
        stacked (len(chosen), 2 * S, side, side).

        Args:
            chosen: positions of studies.
            see: positions of slices (m,) -> their channels (m, 2, side, side).
        """
        rows = self.rows[chosen]
        there = torch.from_numpy(rows >= 0)
        found = see(rows[rows >= 0])
        if self.is_stacked:
            return found.reshape(len(chosen), -1, *found.shape[2:])
        studies = found.new_full((*rows.shape, *found.shape[1:]), torch.nan)
        studies[there.to(found.device)] = found
        return studies


Images = np.ndarray | StudyImages
"""Of samples: int16 slices (n, side, side), or several for each."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a network takes one at a time, n slices or studies, in the same order."""

    images: Images
    modality: np.ndarray  # int8 (n,), position in MODALITIES
    labels: np.ndarray  # float32 (n, A), nan where not assessed
    patients: np.ndarray  # int64 (n,)
    first: np.ndarray  # int64 (n,), a slice of each: what holds for a whole patient is to be looked up there
    study: np.ndarray  # int64 (n,), whose decisions `fusion` makes one
    fusion: str | None = None  # of `DECISION_FUSIONS`; None: each sample is a decision


def samples_of(
    model: Model,
    images: np.ndarray,
    modality: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    series: Callable[[], Series],
) -> Samples:
    """Slices as the samples of a plan's network: the slices, alone or with their neighbours, or their
    studies, ordered by the first slice.

    Args:
        images, modality, labels, patients: of n slices, as in `Samples`.
        series: called where they matter.
    """
    length = model.study_slices
    if length is None:
        alone: Images = images
        if model.neighbours:
            found = series()
            rows = with_neighbours(found.series, found.order)
            alone = StudyImages(slices=images, modality=modality, rows=rows, is_stacked=True)
        each = np.arange(len(images))
        return Samples(
            images=alone, modality=modality, labels=labels, patients=patients, first=each, study=each
        )
    found = series()
    first, number = _numbered(found.series)
    order = found.order[np.argsort(number[found.order], kind="stable")]
    parts = np.split(order, np.cumsum(np.bincount(number, minlength=len(first)))[:-1])
    places = [chosen_slices(part, length) for part in parts if len(part)]
    rows = np.array(places, np.int64).reshape(-1, length)
    if model.study_series is not None:
        of_series = _numbered(found.study[first])[1]
        first, number = _numbered(found.study)
        rows = _side_by_side(rows, of_series, model.study_series)
    return Samples(
        images=StudyImages(slices=images, modality=modality, rows=rows),
        modality=modality[first],
        labels=patient_labels(labels, number).astype(np.float32),
        patients=patients[first],
        first=first,
        study=found.study[first],
        fusion=model.decision_fusion,
    )


def _side_by_side(rows: np.ndarray, study: np.ndarray, count: int) -> np.ndarray:
    """The places of `count` series of each study, one series after the other, (studies, count * S).

    Args:
        rows: (series, S). study: (series,), of each, 0 to studies - 1.
    """
    padded = np.concatenate([rows, np.full((1, rows.shape[1]), -1, np.int64)])  # the last one: no series
    own = [np.flatnonzero(study == one) for one in range(int(study.max(initial=-1)) + 1)]
    chosen = np.array([chosen_slices(one, count) for one in own], np.int64).reshape(-1, count)
    return padded[chosen].reshape(len(own), count * rows.shape[1])


def _numbered(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first slice of each, ascending, and the number of each slice's: so that who comes before whom does
    not depend on the names.
    """
    _, first, number = np.unique(names, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.sort(first), rank[number.reshape(-1)]


class Assessed(Protocol):
    """Slices or samples of patients."""

    @property
    def labels(self) -> np.ndarray:
        """(n, A), nan where not assessed."""

    @property
    def patients(self) -> np.ndarray:
        """(n,)."""


def decisions(
    logits: np.ndarray, samples: Assessed, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `common.counts.per_patient` makes the scores of patients from: logits, labels and patients of the
    samples `rows` or, where the plan fuses decisions, of their studies.

    Args:
        logits: (len(rows), A).
    """
    labels, patients = samples.labels[rows], samples.patients[rows]
    if not isinstance(samples, Samples) or samples.fusion is None:
        return logits, labels, patients
    _, first, study = np.unique(samples.study[rows], return_index=True, return_inverse=True)
    study = study.reshape(-1)
    fused = fused_decisions(logits, ~np.isnan(labels), study, samples.fusion)
    return fused, patient_labels(labels, study), patients[first]


def fused_decisions(logits: np.ndarray, counts: np.ndarray, study: np.ndarray, fusion: str) -> np.ndarray:
    """One decision a study, float64 (studies, A).

    `mean`: the logit of the mean of the probabilities p of its series; `noisy_or`: of 1 - prod(1 - p), the
    probability that some series shows the artifact if they err independently.

    Args:
        logits: (n, A). counts: bool (n, A), which take part; a study where none does gets 0.
        study: (n,), 0 to studies - 1.
    """
    values = logits.astype(np.float64)
    log_present, log_absent = -np.logaddexp(0, -values), -np.logaddexp(0, values)
    sums = np.zeros((3, int(study.max(initial=-1)) + 1, logits.shape[1]))
    terms = [log_absent, np.exp(log_present), np.exp(log_absent)]
    for total, term in zip(sums, terms, strict=True):
        np.add.at(total, study, np.where(counts, term, 0.0))
    some = np.zeros(sums.shape[1:], bool)
    np.logical_or.at(some, study, counts)
    all_absent, present, absent = sums
    tiny = np.finfo(np.float64).tiny
    if fusion == "mean":
        found = np.log(np.maximum(present, tiny)) - np.log(np.maximum(absent, tiny))
    else:  # ln((1 - q) / q) of q = exp(all_absent), which may be too small for a number
        found = np.log(np.maximum(-np.expm1(all_absent), tiny)) - all_absent
    return np.where(some, found, 0.0)


def chosen_slices(slices: np.ndarray, length: int) -> np.ndarray:
    """`length` of the slices of a series, in their order: all and then -1, or the middles of `length` equal
    parts.
    """
    if len(slices) <= length:
        return np.concatenate([slices, np.full(length - len(slices), -1, np.int64)])
    return slices[(2 * np.arange(length) + 1) * len(slices) // (2 * length)]


def with_neighbours(series: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Each slice, the one before and the one after it in its series, itself at an end: int64 (n, 3).

    Args:
        series, order: as `samples_of` gets them.
    """
    own = order[np.argsort(series[order], kind="stable")]
    is_next = series[own[1:]] == series[own[:-1]]
    rows = np.tile(np.arange(len(series))[:, None], (1, 3))
    rows[own[1:][is_next], 1] = own[:-1][is_next]
    rows[own[:-1][is_next], 2] = own[1:][is_next]
    return rows


def series_of_patients(patients: np.ndarray, modality: np.ndarray) -> Series:
    """For `samples_of`, where nothing tells series apart: a patient's slices of one modality, as they are
    ordered.
    """
    study = studies_of_patients(patients, modality)
    return Series(study, np.arange(len(patients)), study)


def studies_of_patients(patients: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """A number for each patient and modality, int64 (n,)."""
    _, study = np.unique(np.column_stack([patients, modality]), axis=0, return_inverse=True)
    return study.reshape(-1).astype(np.int64)


def sample_channels(images: Images, modality: np.ndarray, rows: np.ndarray) -> Tensor:
    """What a network sees of the samples `rows`, float32 (len(rows), ...), on the CPU."""
    if isinstance(images, StudyImages):
        return images.channels(rows, lambda own: sample_channels(images.slices, images.modality, own))
    return torch.from_numpy(to_channels(images[rows], modality[rows]))


def concatenated(images: list[tuple[Images, np.ndarray]]) -> Images:
    """The samples at the positions of each, side by side; of one kind throughout."""
    slices: list[np.ndarray] = []
    modality: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    done = 0
    for one, chosen in images:
        if not isinstance(one, StudyImages):
            slices.append(one[chosen])
            continue
        used, place = np.unique(one.rows[chosen], return_inverse=True)
        is_padded = int(len(used) > 0 and used[0] < 0)
        place = place.reshape(one.rows[chosen].shape) - is_padded
        rows.append(np.where(place < 0, -1, place + done))
        slices.append(one.slices[used[is_padded:]])
        modality.append(one.modality[used[is_padded:]])
        done += len(used) - is_padded
    if not rows:
        return np.concatenate(slices)
    return StudyImages(
        slices=np.concatenate(slices),
        modality=np.concatenate(modality),
        rows=np.concatenate(rows),
        is_stacked=any(isinstance(one, StudyImages) and one.is_stacked for one, _ in images),
    )
