"""Samples of several slices: the slices of a series in their order, as one study; a slice and its neighbours.

A network of studies (`model.name: study`) looks at a public number of slices. Of a longer series it sees the
middles of so many equal parts, of a shorter one all, and nan in the places that are left. The label of a
study is the maximum over the slices of its series that were assessed, as that of a patient is.

With `model.args.neighbours` a sample is still one slice, seen together with the one before and the one after
it in its series (2.5-D); at an end of the series, and where nothing is known of one, it is its own neighbour.
The label is the slice's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.counts import per_patient
from common.plan import Model
from common.preprocess import to_channels


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


def samples_of(
    model: Model,
    images: np.ndarray,
    modality: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    series: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> Samples:
    """Slices as the samples of a plan's network: the slices, alone or with their neighbours, or their
    studies, ordered by the first slice.

    Args:
        images, modality, labels, patients: of n slices, as in `Samples`.
        series: called where they matter; gives the series of each slice, int64 (n,), of which none has two
            patients or modalities, and the slices sorted by their place in it, int64 (n,).
    """
    length = model.study_slices
    if length is None:
        alone: Images = images
        if model.neighbours:
            rows_of = with_neighbours(*series())
            alone = StudyImages(slices=images, modality=modality, rows=rows_of, is_stacked=True)
        return Samples(
            images=alone,
            modality=modality,
            labels=labels,
            patients=patients,
            first=np.arange(len(images)),
        )
    numbers, order = series()
    # studies by their first slice, so that who comes before whom does not depend on the names of series
    _, first, study = np.unique(numbers, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    study, first = rank[study], np.sort(first)
    order = order[np.argsort(study[order], kind="stable")]
    parts = np.split(order, np.cumsum(np.bincount(study, minlength=len(first)))[:-1])
    rows = [chosen_slices(part, length) for part in parts if len(part)]
    return Samples(
        images=StudyImages(
            slices=images,
            modality=modality,
            rows=np.stack(rows) if rows else np.zeros((0, length), np.int64),
        ),
        modality=modality[first],
        labels=per_patient(labels, labels, study)[1].astype(np.float32),
        patients=patients[first],
        first=first,
    )


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


def series_of_patients(patients: np.ndarray, modality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For `samples_of`, where nothing tells series apart: a patient's slices of one modality, as they are
    ordered.
    """
    _, series = np.unique(np.column_stack([patients, modality]), axis=0, return_inverse=True)
    return series.reshape(-1).astype(np.int64), np.arange(len(patients))


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
