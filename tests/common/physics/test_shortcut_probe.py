"""The shortcut probe: nothing but the artifact may tell a simulated image from an untouched one.

Half of some clean images go through every simulator of their modality at severity zero. A linear model that
sees the mean, the standard deviation, the share of high frequencies and traces of rounding must not tell
which half. A control that was resampled is told at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from client.dicom.dicom import read_headers, read_slices
from client.dicom.sources import find_files, open_source
from common.artifacts import DEFAULT_LABELS, Modality
from common.physics import SIMULATORS
from common.physics.acquisition import acquire
from common.physics.appearance import SITE_APPEARANCES
from common.physics.phantom import draw_patients
from common.preprocess import normalize_image, pad_to_square, resample, to_stored
from tests.helpers.dicom_files import REAL, needs_real_data

IMAGES = 80


def phantoms(modality: Modality) -> list[np.ndarray]:
    """Clean slices in stored units, as a DICOM file would hold them."""
    clean = replace(SITE_APPEARANCES[0], matrix=96, prevalence=dict.fromkeys(DEFAULT_LABELS, 0.0))
    patients = draw_patients(clean, 3 * IMAGES, seed=5)
    return [np.rint(slices[0].image) for slices in patients if slices[0].modality == modality][:IMAGES]


def real_slices(modality: Modality) -> list[np.ndarray]:
    """Every few slices of all folders of a modality, at most 128 pixels wide, in stored units."""
    assert REAL is not None
    found = []
    for folder in sorted(Path(REAL).glob(f"site_{modality.lower()}_*")):
        images = []
        for source in find_files(folder):
            with open_source(source) as (stream, size):
                read_headers(stream, size)
                images += [
                    pad_to_square(image, fill=float(image.min())) for _, image in read_slices(stream, size)
                ]
        found += images[:: max(1, len(images) // 24)]
    return [np.rint(resample(image, min(128, image.shape[0]))) for image in found]


def null_path(image: Tensor, modality: Modality, seed: int) -> Tensor:
    acquisition = acquire(image, modality, pixel_spacing_mm=3.0)
    for simulator in SIMULATORS.values():
        if simulator.modality == modality:
            image, _ = simulator.apply(
                image, simulator.draw(0.0, torch.Generator().manual_seed(seed), acquisition)
            )
    return image


def resampled(image: Tensor, modality: Modality, seed: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(image[None, None], 3, stride=1, padding=1)[0, 0]


def features(image: np.ndarray, modality: Modality) -> list[float]:
    """Of the image as it would be written, and of what the model's cache would hold."""
    written = np.rint(image)
    stored = to_stored(normalize_image(written.astype(np.float32), modality, 64), modality).astype(np.float64)
    spectrum = np.abs(np.fft.fft2(written)) ** 2
    side = image.shape[0]
    high = spectrum[side // 4 : -side // 4, side // 4 : -side // 4].sum() / spectrum.sum()
    repeated = np.unique(written).size / written.size  # levels that are used
    odd = [float((values % 2).mean()) for values in (written, stored)]
    return [written.mean(), written.std(), float(np.log(high)), repeated, stored.mean(), stored.std(), *odd]


def probe(
    images: list[np.ndarray], modality: Modality, path: Callable[[Tensor, Modality, int], Tensor]
) -> float:
    """Cross-validated AUROC of the linear model."""
    rows, touched = [], []
    for number, image in enumerate(images):
        through = number % 2 == 1
        picture = (
            path(torch.from_numpy(image.astype(np.float32)), modality, number).numpy()
            if through
            else image.astype(np.float32)
        )
        rows.append(features(picture, modality))
        touched.append(through)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, np.array(rows), touched, cv=folds, method="decision_function")
    return float(roc_auc_score(touched, scores))


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_null_path_leaves_no_trace_on_phantoms(modality: Modality) -> None:
    images = phantoms(modality)
    assert probe(images, modality, null_path) < 0.5 + 2 * 0.29 / np.sqrt(len(images) / 4)
    assert probe(images, modality, resampled) > 0.9


@needs_real_data
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_null_path_leaves_no_trace_on_real_slices(modality: Modality) -> None:
    images = real_slices(modality)
    assert probe(images, modality, null_path) < 0.5 + 2 * 0.29 / np.sqrt(len(images) / 4)
    assert probe(images, modality, resampled) > 0.75
