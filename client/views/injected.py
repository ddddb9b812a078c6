"""Views of a site's own patients: their slices untouched, and with simulated artifacts, so that training
needs no label.

View 0 is untouched. Each further view shows one artifact of the modality, one after the other, of a severity
from the plan's range, in all slices of the patient. An artifact that changes too little is drawn again, and
after `DRAWS` attempts the view is left out. Only the pair teaches: for each artifact that one of the views
shows, that view counts as with it (1) and every other view of the patient as without (0), which also teaches
to tell artifacts apart. What else the slices may show is not known and stays blank. An artifact that the
sheet marks in one of the slices is not simulated on them: without it there would be no view.

Views follow from the patient's own slices, the site's key and the run. No other patient changes a bit of
them, and nobody without the key knows what was drawn. Slices are those of the cache: smaller than the
scanner's, MR already scaled. All views, view 0 as well, pass the same simulators, at severity zero where they
show nothing, and the same scaling, so that nothing but the artifact tells them apart.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from client.views.acquisition import MIN_BODY, SliceFacts, acquisition_of, body_of
from client.views.corruption import DRAWS, corrupt, shows, simulated
from common.artifacts import DEFAULT_LABELS, MODALITIES, Modality
from common.augmentation import augment_anatomy
from common.physics.acquisition import Acquisition, uniform
from common.plan import Inject
from common.preprocess import from_stored, robust_scale_mr, to_stored


class IndexedSlice(SliceFacts, Protocol):
    """What the index keeps of a slice: `SliceRecord`, `SliceHeader`."""

    @property
    def rows(self) -> int:
        """Of the image as the scanner made it."""

    @property
    def columns(self) -> int:
        """Likewise."""

    @property
    def pixel_spacing_mm(self) -> tuple[float, float] | None:
        """Between rows, between columns; of the same image."""


@dataclass(frozen=True, kw_only=True)
class ViewCoins:
    """The random numbers of one patient's views in one run: HMAC-SHA-256 of the site's key."""

    key: bytes  # the site's secret
    run: str
    patient: str  # as the site names the patient

    def generator(self, what: int | str) -> torch.Generator:
        """Those of a view, by its number, or of another choice, by its name."""
        words = json.dumps(["views", self.run, self.patient, what]).encode()
        digest = hmac.digest(self.key, words, hashlib.sha256)
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True, kw_only=True)
class PatientViews:
    """The views of one patient, m slices in all; none where the slices show too little of the body, or no
    artifact.
    """

    images: np.ndarray  # int16 (m, S, S), see common/preprocess.py
    modality: np.ndarray  # int8 (m,), position in MODALITIES
    labels: np.ndarray  # float32 (m, artifacts): 1, 0, or nan = not assessed
    # float64 (m,), sums to 1: every slice that was read weighs the same, in all its views alike
    weights: np.ndarray
    left_out: int  # views that showed too little; local


def views_of_patient(
    images: np.ndarray,
    records: Sequence[IndexedSlice],
    labels: np.ndarray,
    coins: ViewCoins,
    inject: Inject,
    *,
    artifacts: Sequence[str] = DEFAULT_LABELS,
    max_slices: int,
    augment: Sequence[str] = (),
) -> PatientViews:
    """The views of a patient, on at most `max_slices` slices that are drawn once.

    With `views` 1 there is no pair in one patient: a coin decides whether the slices stay untouched.

    Args:
        images: int16 (n, S, S), all slices of the patient as cached.
        records: what the index knows of each.
        labels: float32 (n, artifacts), those of the sheet; nan = not assessed.
        artifacts: what the columns of `labels` are; others are not simulated, nor is one without a simulator.
        augment: `training.augment` of the plan: how the anatomy is changed before an artifact is added, the
            same for all views of a modality, so that nothing but the artifact tells them apart.
    """
    size = images.shape[-1]
    chosen = _chosen(images, records, coins, max_slices)
    made: list[_View] = []
    left_out = 0
    for modality in MODALITIES:
        rows = [row for row in chosen if records[row].modality == modality]
        if not rows:
            continue
        marked = [name for place, name in enumerate(artifacts) if (labels[rows, place] == 1).any()]
        names = [name for name in simulated(modality, artifacts) if name not in marked]
        clean = [from_stored(image, modality) for image in np.asarray(images[rows])]
        if augment:
            clean = augment_anatomy(clean, modality, augment, coins.generator(f"anatomy {modality}"))
        own, failed = _views(clean, [records[row] for row in rows], modality, names, artifacts, coins, inject)
        left_out += failed
        made += own
    if not made:
        return PatientViews(
            images=np.zeros((0, size, size), np.int16),
            modality=np.zeros(0, np.int8),
            labels=np.zeros((0, len(artifacts)), np.float32),
            weights=np.zeros(0),
            left_out=left_out,
        )
    weights = np.concatenate([np.full(len(view.images), view.weight) for view in made])
    return PatientViews(
        images=np.concatenate([view.images for view in made]),
        modality=np.repeat([view.modality for view in made], [len(view.images) for view in made]).astype(
            np.int8
        ),
        labels=np.concatenate([np.tile(view.labels, (len(view.images), 1)) for view in made]),
        weights=weights / weights.sum(),
        left_out=left_out,
    )


@dataclass(frozen=True, kw_only=True)
class _View:
    """One version of a patient's slices of one modality."""

    images: np.ndarray
    modality: int
    labels: np.ndarray  # float32 (artifacts,)
    weight: float  # of a slice


def _chosen(
    images: np.ndarray, records: Sequence[IndexedSlice], coins: ViewCoins, max_slices: int
) -> list[int]:
    """At most `max_slices` drawn slices that show enough of the body, in their order."""
    chosen: list[int] = []
    for row in torch.randperm(len(records), generator=coins.generator("slices")).tolist():
        if len(chosen) == max_slices:
            break
        modality = records[row].modality
        body = body_of(torch.from_numpy(from_stored(np.asarray(images[row]), modality)), modality)
        if float(body.float().mean()) >= MIN_BODY:
            chosen.append(row)
    return sorted(chosen)


def _views(
    clean: list[np.ndarray],
    records: Sequence[IndexedSlice],
    modality: Modality,
    names: Sequence[str],
    artifacts: Sequence[str],
    coins: ViewCoins,
    inject: Inject,
) -> tuple[list[_View], int]:
    """The views of slices of one modality with each of `names`, view 0 first, and how many were left out."""
    if not names:
        return [], 0
    acquisitions = [_acquisition(*one) for one in zip(clean, records, strict=True)]
    first = int(torch.randint(len(names), (), generator=coins.generator(f"first {modality}")))
    shown: list[tuple[str, np.ndarray]] = []
    wanted = max(1, inject.views - 1)
    for view in range(1, wanted + 1):
        name = names[(first + view - 1) % len(names)]
        made = _with_artifact(clean, modality, name, artifacts, acquisitions, coins.generator(view), inject)
        if made is not None:
            shown.append((name, made))
    if not shown:
        return [], wanted
    at = MODALITIES.index(modality)
    injected = [name for name, _ in shown]
    weight = 1 / (1 + len(shown))
    pairs = [
        _View(images=images, modality=at, labels=_assessed(artifacts, injected, name), weight=weight)
        for name, images in shown
    ]
    untouched = _View(
        images=_version(clean, modality, {}, artifacts, acquisitions, coins.generator(0))[0],
        modality=at,
        labels=_assessed(artifacts, injected),
        weight=weight,
    )
    both = [untouched, *pairs]
    if inject.views == 1:
        both = [both[int(torch.randint(2, (), generator=coins.generator(f"one {modality}")))]]
    return both, wanted - len(shown)


def _acquisition(image: np.ndarray, record: IndexedSlice) -> Acquisition:
    """How a cached slice was taken; its pixels are larger than the scanner's."""
    spacing = (record.pixel_spacing_mm or (1.0, 1.0))[0] * max(record.rows, record.columns) / len(image)
    return acquisition_of(torch.from_numpy(image), record, spacing)


def _with_artifact(
    clean: list[np.ndarray],
    modality: Modality,
    name: str,
    artifacts: Sequence[str],
    acquisitions: Sequence[Acquisition],
    generator: torch.Generator,
    inject: Inject,
) -> np.ndarray | None:
    """The slices with one artifact, int16 (slices, S, S); None where they show too little of it."""
    for _ in range(DRAWS):
        severity = uniform(generator, *inject.severity)
        images, is_shown = _version(clean, modality, {name: severity}, artifacts, acquisitions, generator)
        if is_shown:
            return images
    return None


def _version(
    clean: list[np.ndarray],
    modality: Modality,
    severities: dict[str, float],
    artifacts: Sequence[str],
    acquisitions: Sequence[Acquisition],
    generator: torch.Generator,
) -> tuple[np.ndarray, bool]:
    """The slices as the cache would hold them, and whether they show what was asked for."""
    made = corrupt(clean, modality, severities, acquisitions, generator, artifacts=artifacts)
    is_shown = shows(made, severities) and all(np.isfinite(image).all() for image in made.images)
    scaled = [robust_scale_mr(image) if modality == "MR" else image for image in made.images]
    return np.stack([to_stored(np.nan_to_num(image), modality) for image in scaled]), is_shown


def _assessed(artifacts: Sequence[str], injected: Sequence[str], shown: str = "") -> np.ndarray:
    """Labels of a view: 1 for the artifact shown, 0 for others that were injected, nan for all others."""
    told = dict.fromkeys(injected, 0.0) | ({shown: 1.0} if shown else {})
    return np.array([told.get(name, np.nan) for name in artifacts], np.float32)
