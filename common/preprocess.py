"""Convert a slice in physical units to what the cache stores, and that to what the model sees.

decode (float32) → `normalize_image`: pad to a square, resample, scale → `to_stored` (int16, the cache) →
`to_channels` (float32, the model). A change that alters a stored value must raise `PREPROCESS_VERSION`; every
cache is then rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from common.artifacts import MODALITIES, Modality
from common.errors import DataError

PREPROCESS_VERSION = 1
DEFAULT_SIZE = 128
CHANNELS = 2

CT_RANGE_HU = (-1024.0, 3071.0)  # 12 bits: air to metal; brighter is clipped
SOFT_TISSUE_WINDOW_HU = (-160.0, 240.0)  # channel 0 of CT
WIDE_WINDOW_HU = (-1000.0, 2000.0)  # channel 1 of CT: metal, its streaks and the air around
MR_PERCENTILES = (1.0, 99.5)  # low of the whole slice, high of what is not background
MR_BACKGROUND = 0.05  # background: below this part of the way from the low percentile to the 99.9th
MR_CLIP = 1.5  # scaled MR lies in 0..MR_CLIP; 1 is the high percentile
MR_STEPS = 4096.0  # stored steps per unit of scaled MR


def normalize_image(image: np.ndarray, modality: Modality, size: int) -> np.ndarray:
    """One slice ready for `to_stored`: float32 (size, size); HU within `CT_RANGE_HU`, or MR within
    0..`MR_CLIP`.

    CT is clipped before it is resampled, so that a metal voxel weighs what the range allows. MR is scaled
    after, so that one hot voxel does not decide the scale.
    """
    if modality == "CT":
        return resample(pad_to_square(clip_ct(image), fill=CT_RANGE_HU[0]), size)
    return robust_scale_mr(resample(pad_to_square(image, fill=float(image.min())), size))


def clip_ct(image: np.ndarray) -> np.ndarray:
    """Hounsfield units clipped to `CT_RANGE_HU`, float32, same shape."""
    return np.clip(image, *CT_RANGE_HU, dtype=np.float32)


def robust_scale_mr(image: np.ndarray) -> np.ndarray:
    """MR signal without its arbitrary unit: float32, same shape, in 0..`MR_CLIP`.

    0 is the 1st percentile of the slice, 1 the 99.5th percentile of the pixels above the background. The
    result does not change when the signal is multiplied or shifted; a constant slice becomes 0. Depends on
    this slice only.
    """
    low, top = np.percentile(image, (MR_PERCENTILES[0], 99.9))
    foreground = image[image > low + MR_BACKGROUND * (top - low)]
    high = np.percentile(foreground, MR_PERCENTILES[1]) if foreground.size else low
    if not high > low:
        return np.zeros(image.shape, np.float32)
    return np.clip((image - np.float32(low)) * np.float32(1.0 / (high - low)), 0.0, MR_CLIP, dtype=np.float32)


def pad_to_square(image: np.ndarray, *, fill: float) -> np.ndarray:
    """The image in the middle of a square as large as its longer side. Nothing is cropped and the aspect is
    kept.
    """
    rows, columns = image.shape
    if rows == columns:
        return image
    side = max(rows, columns)
    square = np.full((side, side), fill, image.dtype)
    top, left = (side - rows) // 2, (side - columns) // 2
    square[top : top + rows, left : left + columns] = image
    return square


def resample(image: np.ndarray, size: int) -> np.ndarray:
    """A square image at another size: float32 (size, size). Smaller by area average (anti-aliased), larger by
    linear interpolation.

    Separable, `W @ image @ W.T`, with cached weights; whole-number reductions average blocks. The mean is
    kept when reducing.
    """
    side = image.shape[0]
    if image.shape != (side, side) or size < 1:
        raise DataError(
            f"cannot resample shape {image.shape} to {size}; expected a square image and a size of at least 1"
        )
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    if side == size:
        return pixels
    if side % size == 0:
        factor = side // size
        columns = pixels.reshape(side, size, factor)
        narrow = columns[:, :, 0].copy()
        for step in range(1, factor):
            narrow += columns[:, :, step]
        return np.asarray(
            narrow.reshape(size, factor, size).sum(axis=1) * np.float32(1.0 / factor**2), dtype=np.float32
        )
    weights = _weights(side, size)
    return weights @ pixels @ weights.T


@lru_cache(maxsize=64)
def _weights(side: int, size: int) -> np.ndarray:
    """float32 (size, side), rows sum to 1: overlap of each new pixel with the old ones, or linear between old
    pixel centres.
    """
    if size < side:
        edges = np.arange(size + 1) * (side / size)
        start, stop = edges[:-1, None], edges[1:, None]
        old = np.arange(side)[None]
        weights = np.clip(np.minimum(stop, old + 1) - np.maximum(start, old), 0, None) * (size / side)
    else:
        centres = np.clip((np.arange(size) + 0.5) * (side / size) - 0.5, 0, side - 1)
        weights = np.clip(1 - np.abs(centres[:, None] - np.arange(side)[None]), 0, None)
    weights = weights.astype(np.float32)
    weights.setflags(write=False)
    return weights


def to_stored(image: np.ndarray, modality: Modality) -> np.ndarray:
    """What the cache keeps, int16, same shape: CT in whole HU, scaled MR times `MR_STEPS`."""
    if modality == "CT":
        return np.rint(np.clip(image, *CT_RANGE_HU)).astype(np.int16)
    return np.rint(np.clip(image, 0.0, MR_CLIP) * MR_STEPS).astype(np.int16)


def from_stored(stored: np.ndarray, modality: Modality) -> np.ndarray:
    """The inverse of `to_stored` to within half a step: float32, same shape."""
    image = stored.astype(np.float32)
    return image if modality == "CT" else image * np.float32(1.0 / MR_STEPS)


Transform = Callable[[np.ndarray], np.ndarray]
"""From real images (n, S, S) to their half spectra (n, S, S // 2 + 1)."""


def to_channels(stored: np.ndarray, modality: np.ndarray, *, rfft2: Transform | None = None) -> np.ndarray:
    """Cached slices as model input.

    Args:
        stored: int16, shape (n, S, S), of `to_stored`; or float32 (n, metrics) of `common.measures.scaled`,
            which a network sees as they are.
        modality: shape (n,), positions in `MODALITIES`.
        rfft2: see `k_space_channel`.
    Returns:
        float32 (n, 2, S, S). CT: soft-tissue window, wide window, each 0..1; the second tells the first,
        which is how `small_cnn_two_stems` knows CT. MR: the scaled image, 0..`MR_CLIP`, and its k-space:
        log(1 + |FFT|), zero frequency in the middle, over its largest value, 0..1.
    """
    if stored.ndim == 2:
        return np.ascontiguousarray(stored, np.float32)
    n, side, _ = stored.shape
    out = np.empty((n, CHANNELS, side, side), np.float32)
    is_ct = np.asarray(modality) == MODALITIES.index("CT")
    if is_ct.any():
        hu = stored[is_ct].astype(np.float32)
        out[is_ct, 0] = window(hu, *SOFT_TISSUE_WINDOW_HU)
        out[is_ct, 1] = window(hu, *WIDE_WINDOW_HU)
    if not is_ct.all():
        scaled = from_stored(stored[~is_ct], "MR")
        out[~is_ct, 0] = scaled
        out[~is_ct, 1] = k_space_channel(scaled, rfft2)
    return out


def window(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at `low` and below, 1 at `high` and above, same shape."""
    return np.clip((hu - np.float32(low)) * np.float32(1.0 / (high - low)), 0.0, 1.0)


def k_space_channel(images: np.ndarray, rfft2: Transform | None = None) -> np.ndarray:
    """log(1 + |FFT|), centred, each image over its own largest value; float32 (n, S, S). A black image gives
    zeros.

    A real image has a symmetric spectrum, |F(-k)| = |F(k)|: half of it is computed and the other half looked
    up.

    Args:
        rfft2: NumPy's, which rounds otherwise and is slower on many images, where it is not worth the import
            of SciPy's; None: SciPy's.
    """
    if rfft2 is None:
        from scipy import fft  # a quarter of a second, which every process that only decodes would pay, too

        rfft2 = fft.rfft2
    n, side, _ = images.shape
    half = np.abs(rfft2(images.astype(np.float32, copy=False)))
    np.log1p(half, out=half)
    peak = half.reshape(n, -1).max(axis=1)
    half *= np.divide(1.0, peak, out=np.zeros_like(peak), where=peak > 0)[:, None, None]
    return np.take(half.reshape(n, -1), _mirror(side), axis=1).reshape(n, side, side)


@lru_cache(maxsize=16)
def _mirror(side: int) -> np.ndarray:
    """For each place of the centred full spectrum, its place in the flattened half spectrum of `rfft2`."""
    frequency = np.fft.fftshift(np.arange(side))  # which frequency stands at each centred position
    rows, columns = frequency[:, None], frequency[None]
    mirrored = columns > side // 2
    index = np.where(
        mirrored, (-rows) % side * (side // 2 + 1) + (-columns) % side, rows * (side // 2 + 1) + columns
    )
    index = index.ravel()
    index.setflags(write=False)
    return index
