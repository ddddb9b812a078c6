"""Phantoms as preprocessed slices with labels and severities: the coordinator's default public set, and what
`fedqc predict` finds its thresholds on where a site has no labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.artifacts import MODALITIES, NAMES
from common.physics.appearance import Appearance
from common.physics.phantom import draw_patients
from common.preprocess import normalize_image, to_stored
from common.public_slices import Slices


def draw(appearances: Sequence[Appearance], patients: int, seed: int, size: int) -> Slices:
    """`patients` phantoms, spread over the appearances, preprocessed to `size` pixels."""
    images, modality, labels, severities, owners = [], [], [], [], []
    for number, appearance in enumerate(appearances):
        share = len(range(number, patients, len(appearances)))
        for slices in draw_patients(appearance, share, seed + number):
            for item in slices:
                images.append(to_stored(normalize_image(item.image, item.modality, size), item.modality))
                modality.append(MODALITIES.index(item.modality))
                labels.append(_row(item.labels))
                severities.append(_row(item.severities))
                owners.append(item.patient * len(appearances) + number)
    return Slices(
        images=np.stack(images),
        modality=np.array(modality, np.int8),
        labels=np.stack(labels),
        patients=np.array(owners, np.int64),
        severities=np.stack(severities),
    )


def _row(values: Mapping[str, float]) -> np.ndarray:
    """One value an artifact, float32 (A,); nan where there is none."""
    return np.array([values.get(name, np.nan) for name in NAMES], np.float32)
