"""Each metric says what it is named for, on anatomy, and every slice has finite ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from scipy import ndimage

from common.iqm import METRICS, metrics, otsu, slice_metrics
from common.physics import SIMULATORS
from common.physics.acquisition import acquire
from common.physics.appearance import SITE_APPEARANCES
from common.physics.phantom import draw_patients
from common.preprocess import normalize_image, to_stored
from tests.helpers.dicom_files import REAL, needs_real_data

CT, MR = "CT", "MR"


def stored(image: np.ndarray, modality: str) -> np.ndarray:
    return to_stored(normalize_image(image, modality, 128), modality)


def named(row: np.ndarray) -> dict[str, float]:
    return dict(zip(METRICS, row, strict=True))


def metrics_of(slices: np.ndarray, modality: str) -> dict[str, float]:
    return named(slice_metrics(slices[None], np.array([(CT, MR).index(modality)]))[0])


def phantom(modality: str) -> np.ndarray:
    """A slice without artifact, as it is acquired."""
    return next(
        item.image
        for slices in draw_patients(SITE_APPEARANCES[0], 30, 5)
        for item in slices
        if item.modality == modality and not any(value == 1 for value in item.labels.values())
    )


def real(folder: str) -> tuple[np.ndarray, str]:
    """A file in the middle of a folder of real images."""
    files = sorted(path for path in (Path(str(REAL)) / folder).rglob("*") if path.is_file())
    read = (pydicom.dcmread(path, force=True) for path in files[len(files) // 2 :])
    found = next(one for one in read if "PixelData" in one)
    image = found.pixel_array.astype(np.float32)
    image = image * float(found.get("RescaleSlope", 1)) + float(found.get("RescaleIntercept", 0))
    return image, CT if "_ct_" in folder else MR


ANATOMY = [
    "phantom CT",
    "phantom MR",
    *(
        pytest.param(name, marks=needs_real_data)
        for name in ("site_ct_ge_lightspeed_qiicr", "site_mr_ge_signa_uthscsa", "site_mr_siemens_trio_usc")
    ),
]


def anatomy(name: str) -> tuple[np.ndarray, str]:
    return (phantom(name[-2:]), name[-2:]) if name.startswith("phantom") else real(name)


@pytest.mark.parametrize("name", ANATOMY)
def test_noise_raises_what_is_named_noise_and_lowers_the_ratios_to_it(name: str) -> None:
    image, modality = anatomy(name)
    clean = stored(image, modality)
    noise = np.random.default_rng(0).normal(0, 150, clean.shape)  # HU, or of 4096 steps
    before = metrics_of(clean, modality)
    middle, after = (metrics_of((clean + share * noise).astype(np.int16), modality) for share in (0.5, 1.0))
    for metric in ("noise", "local_noise"):
        assert before[metric] < middle[metric] < after[metric], metric
    assert after["snr"] < before["snr"]
    assert after["snrd"] < before["snrd"]
    assert after["air_sd"] > before["air_sd"]


@pytest.mark.parametrize("name", ANATOMY)
def test_blur_lowers_sharpness_and_widens_the_smoothness(name: str) -> None:
    image, modality = anatomy(name)
    clean = stored(image, modality)
    found = [ndimage.gaussian_filter(clean.astype(float), width) for width in (0, 0.7, 1.5)]
    rows = [metrics_of(one.astype(np.int16), modality) for one in found]
    for metric in ("sharpness", "high_frequency"):
        assert rows[0][metric] > rows[1][metric] > rows[2][metric], metric
    assert rows[0]["fwhm"] < rows[1]["fwhm"] < rows[2]["fwhm"]


def with_artifact(image: np.ndarray, modality: str, simulator: str, seed: int) -> np.ndarray:
    slices, physics = torch.from_numpy(np.ascontiguousarray(image, np.float32)), SIMULATORS[simulator]
    params = physics.draw(1.0, torch.Generator().manual_seed(seed), acquire(slices, modality))
    return physics.apply(slices, params)[0].numpy()


@pytest.mark.parametrize(
    "name", ["phantom MR", pytest.param("site_mr_ge_signa_uthscsa", marks=needs_real_data)]
)
@pytest.mark.parametrize("simulator", ["motion", "ghosting"])
def test_motion_puts_ghosts_into_the_air(name: str, simulator: str) -> None:
    image, modality = anatomy(name)
    before = metrics_of(stored(image, modality), modality)
    moved = [
        metrics_of(stored(with_artifact(image, modality, simulator, seed), modality), modality)
        for seed in range(3)
    ]
    after = {metric: float(np.median([one[metric] for one in moved])) for metric in METRICS}
    assert after["ghost_ratio"] > 1.5 * before["ghost_ratio"]
    assert after["air_mean"] > before["air_mean"]
    assert after["fber"] < before["fber"]
    assert after["gradient_entropy"] > before["gradient_entropy"]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_ghost_of_half_a_field_of_view_is_measured_along_either_axis(axis: int) -> None:
    rows, columns = np.mgrid[:128, :128] - 64.0
    clean = (np.hypot(rows, columns) < 25).astype(float)
    ghost = 0.1 * np.roll(clean, 64, axis)
    found = [named(metrics(one)) for one in (clean, clean + ghost)]
    assert [round(one["ghost_ratio"], 2) for one in found] == [0.0, 0.1]
    assert found[1]["signal_ghosting"] > found[0]["signal_ghosting"] == 0.0


@needs_real_data
def test_other_artifacts_move_the_metrics_made_for_them() -> None:
    brain, _ = real("site_mr_ge_signa_uthscsa")
    shaded = metrics_of(stored(with_artifact(brain, MR, "bias_field", 1), MR), MR)
    assert shaded["inhomogeneity"] > 1.5 * metrics_of(stored(brain, MR), MR)["inhomogeneity"]
    body, _ = real("site_ct_ge_lightspeed_qiicr")
    before, metal = metrics_of(stored(body, CT), CT), with_artifact(body, CT, "metal", 1)
    after = metrics_of(stored(metal, CT), CT)
    for metric in ("saturated", "local_noise_p95", "streak_energy"):
        assert after[metric] > before[metric], metric


def test_streaks_have_a_direction_and_noise_has_none() -> None:
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:128, :128] - 64.0
    body = 0.4 * (np.hypot(rows, columns) < 50)
    noisy = body + 0.05 * rng.standard_normal(body.shape) * (body > 0)
    streaked = noisy + 0.05 * np.sin(2.0 * (0.9 * rows + 0.4 * columns)) * (body > 0)
    noise, streaks = (named(metrics(one))["streak_energy"] for one in (noisy, streaked))
    assert noise < 0.3
    assert streaks > 1.0


def test_a_threshold_lies_between_two_classes() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0, 1, 900), rng.normal(10, 1, 300)])
    assert 3 < otsu(values) < 7
    assert otsu(np.full(5, 2.0)) == 2.0


def odd_slices() -> list[np.ndarray]:
    one = np.zeros((32, 32))
    one[16, 16] = 1.0
    return [
        np.zeros((32, 32)),
        np.ones((64, 64)),
        np.full((32, 32), np.nan),
        np.where(np.eye(32) > 0, np.inf, 0.5),
        one,
        np.eye(33),
        -np.eye(32),
        np.random.default_rng(0).random((32, 32)) * 1e-7,
        np.random.default_rng(0).random((32, 32)) * 1e9,
    ]


@pytest.mark.parametrize("number", range(len(odd_slices())))
def test_every_slice_has_finite_metrics(number: int) -> None:
    found = metrics(odd_slices()[number])
    assert found.shape == (len(METRICS),)
    assert np.isfinite(found).all()


def test_extreme_stored_values_have_finite_metrics() -> None:
    info = np.iinfo(np.int16)
    slices = np.stack([np.full((32, 32), value, np.int16) for value in (info.min, 0, info.max)])
    for modality in (0, 1):
        assert np.isfinite(slice_metrics(slices, np.full(3, modality))).all()
    assert slice_metrics(slices[:0], np.zeros(0, int)).shape == (0, len(METRICS))


@needs_real_data
def test_real_folders_have_finite_metrics_that_tell_slices_apart() -> None:
    found = []
    for folder in sorted(Path(str(REAL)).glob("site_*")):
        image, modality = real(folder.name)
        for one in image if image.ndim == 3 else [image]:
            found.append(slice_metrics(stored(one, modality)[None], np.array([(CT, MR).index(modality)]))[0])
    values = np.stack(found)
    assert len(values) >= 9
    assert np.isfinite(values).all()
    assert (values.std(axis=0) > 0).all()
