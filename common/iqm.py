"""Image-quality metrics of a slice: what a cheap baseline sees in place of the image.

They are computed from the slice as the networks see it, CT in the wide window (and, where fine structure in
tissue is told, in the soft-tissue window), MR as it is scaled, so that a comparison with a network compares
methods and not resolutions or windows. Where a source has another
definition for whole volumes, or needs tissue maps, what is computed here is said beside the name. Skewed
ratios are logarithms. A metric that a slice does not define (no air, a constant slice) is 0.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import fft, ndimage

from common.artifacts import MODALITIES
from common.preprocess import SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU, from_stored, window

METRICS = (
    # of the body: what is, smoothed over 3 x 3, brighter than half of Otsu's threshold; holes filled
    "body_mean",
    "body_kurtosis",
    "body_p05",
    "body_p95",
    "saturated",  # share of the body at or above 0.95: metal, or fat near a coil
    "snr",  # mean over standard deviation, log (MRIQC: Esteban et al., PLOS ONE 12:e0184661, 2017)
    "cjv",  # joint variation of the two classes in the body that Otsu finds (Ganzetti et al. 2016), log
    "inhomogeneity",  # variation of the body, smoothed over a quarter of the slice (in place of MRIQC's INU)
    "local_noise",  # median SD of 5 x 5 pixels within the body (Christianson et al., AJR 205:W93, 2015)
    "local_noise_p95",  # its 95th percentile: high beside streaks
    "streak_energy",  # power of what differs from their mean: strongest of 12 directions over the median, log
    # of the air: what lies three pixels or more outside of the body
    "air_mean",
    "air_sd",
    "snrd",  # Dietrich et al., JMRI 26:375 (2007), by the Rayleigh distribution of air, log
    "fber",  # foreground-background energy ratio (Shehzad et al. 2015), log
    "ghost_ratio",  # signal of air half a field of view from the body, over that of the body; the larger axis
    "signal_ghosting",  # percent signal ghosting of the ACR's phantom test, of all air beside the body
    # of the whole slice
    "noise",  # Immerkaer, CVIU 64:300 (1996)
    "efc",  # entropy focus criterion (Atkinson et al., IEEE TMI 16:903, 1997), 1: all pixels alike
    "gradient_entropy",  # McGee et al., JMRI 11:174 (2000), 1: all gradients alike
    "sharpness",  # variance of the Laplacian over that of the slice (Pech-Pacheco et al., ICPR 2000), log
    "fwhm",  # of the smoothness in pixels, from neighbours (Forman et al., MRM 33:636, 1995)
    "high_frequency",  # share of the power beyond half of the highest frequency, log
)
"""In the order of `metrics`."""

_TINY = 1e-6


def slice_metrics(stored: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """The metrics of cached slices.

    Args:
        stored: int16 (n, S, S) of `common.preprocess.to_stored`.
        modality: (n,), positions in `MODALITIES`.
    Returns:
        float64 (n, len(METRICS)), finite.
    """
    found = np.zeros((len(stored), len(METRICS)))
    for row, image, which in zip(found, stored, modality, strict=True):
        values = from_stored(image, MODALITIES[int(which)])
        if MODALITIES[int(which)] == "CT":
            soft, wide = (window(values, *edges) for edges in (SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU))
            row[:] = metrics(wide, tissue=soft)
        else:
            row[:] = metrics(values)
    return found


def metrics(image: np.ndarray, *, tissue: np.ndarray | None = None) -> np.ndarray:
    """The metrics of one slice, float64 (len(METRICS),), finite whatever the slice.

    Args:
        image: (S, S), about 0..1; what is below 0 or not finite counts as 0.
        tissue: the same slice in a window of soft tissue; None: the same.
    """
    x, fine = (
        np.maximum(np.nan_to_num(np.asarray(one, np.float64), nan=0.0, posinf=0.0, neginf=0.0), 0.0)
        for one in (image, image if tissue is None else tissue)
    )
    body = ndimage.binary_fill_holes(ndimage.uniform_filter(x, 3) > otsu(x) / 2)
    air = ~ndimage.binary_dilation(body, iterations=3)
    found = _of_body(x, fine, body) | _of_air(x, body, air) | _of_slice(x)
    return np.nan_to_num([found[name] for name in METRICS], nan=0.0, posinf=0.0, neginf=0.0)


def otsu(values: np.ndarray) -> float:
    """The threshold between two classes of values that lie farthest apart, among 127; of equal values theirs.

    Reference: Otsu, IEEE Trans SMC 9:62 (1979).
    """
    low, high = float(values.min(initial=np.inf)), float(values.max(initial=-np.inf))
    if not high > low:
        return high
    step = (high - low) / 128
    counts = np.bincount(np.minimum((values.ravel() - low) / step, 127).astype(int), minlength=128)
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * np.arange(128))
    above = values.size - below  # the lowest and the highest bin hold a value each, so that no class is empty
    apart = below * above * np.square(sums[:-1] / below - (sums[-1] - sums[:-1]) / above)
    best = np.flatnonzero(apart == apart.max())  # several where no value lies between the classes
    return low + step * (1 + float(best.mean()))


def _of_body(x: np.ndarray, fine: np.ndarray, body: np.ndarray) -> dict[str, float]:
    inside = x[body]
    if inside.size < 2:
        return dict.fromkeys(METRICS[: METRICS.index("air_mean")], 0.0)
    mean, deviation = float(inside.mean()), float(inside.std())
    centred = inside - mean
    upper = inside > otsu(inside)
    apart = abs(_mean(inside[upper]) - _mean(inside[~upper]))
    spread = float(inside[upper].std() if upper.any() else 0.0) + float(inside[~upper].std())
    smooth = [ndimage.uniform_filter(one, len(x) // 4)[body] for one in (x * body, body.astype(float))]
    field = smooth[0] / np.maximum(smooth[1], _TINY)
    core = ndimage.binary_erosion(body, iterations=3)
    core = core if core.any() else body
    around = ndimage.uniform_filter(fine, 5)
    local = np.sqrt(np.maximum(ndimage.uniform_filter(fine * fine, 5) - around * around, 0.0))[core]
    return {
        "body_mean": mean,
        "body_kurtosis": math.log1p(float((centred**4).mean()) / max(deviation**4, _TINY**2)),
        "body_p05": float(np.percentile(inside, 5)),
        "body_p95": float(np.percentile(inside, 95)),
        "saturated": float((inside >= 0.95).mean()),
        "snr": _log(mean, deviation),
        "cjv": _log(spread, apart),
        "inhomogeneity": float(field.std()) / max(float(field.mean()), _TINY),
        "local_noise": float(np.median(local)),
        "local_noise_p95": float(np.percentile(local, 95)),
        "streak_energy": _streaks((fine - around) * core),
    }


def _of_air(x: np.ndarray, body: np.ndarray, air: np.ndarray) -> dict[str, float]:
    names = METRICS[METRICS.index("air_mean") : METRICS.index("noise")]
    outside, inside = x[air], x[body]
    if outside.size < 2 or not inside.any():
        return dict.fromkeys(names, 0.0)
    mean, signal = float(outside.mean()), float(inside.mean())
    ghosts = []
    for axis in (0, 1):
        where = air & np.roll(body, len(x) // 2, axis)
        ghosts.append(abs(_mean(x[where]) - _mean(x[air & ~where])) if where.any() else 0.0)
    rows, columns = body.any(axis=1, keepdims=True), body.any(axis=0, keepdims=True)
    above, beside = _mean(x[air & columns & ~rows]), _mean(x[air & rows & ~columns])
    deviation = float(outside.std())
    return {
        "air_mean": mean,
        "air_sd": deviation,
        "snrd": _log(signal * math.sqrt(2 / (4 - math.pi)), deviation),
        "fber": _log(float(np.square(inside).mean()), float(np.square(outside).mean())),
        "ghost_ratio": max(ghosts) / signal,
        "signal_ghosting": abs(above - beside) / (2 * signal),
    }


def _of_slice(x: np.ndarray) -> dict[str, float]:
    side, variance = len(x), float(x.var())
    names = METRICS[METRICS.index("noise") :]
    if not variance > _TINY**2:
        return dict.fromkeys(names, 0.0)
    along, across = ndimage.sobel(x, 0), ndimage.sobel(x, 1)
    laplacian = ndimage.laplace(x)
    second = ndimage.correlate1d(ndimage.correlate1d(x, [1, -2, 1], 0), [1, -2, 1], 1)
    correlations = [1 - float(np.square(np.diff(x, axis=axis)).mean()) / (2 * variance) for axis in (0, 1)]
    widths = [math.sqrt(-2 * math.log(2) / math.log(min(max(r, 0.01), 1 - _TINY))) for r in correlations]
    power = np.square(np.abs(fft.rfft2(x - x.mean())))
    frequency = np.hypot(fft.fftfreq(side)[:, None], fft.rfftfreq(side)[None])
    return {
        "noise": math.sqrt(math.pi / 2) / 6 * float(np.abs(second[1:-1, 1:-1]).mean()),
        "efc": _entropy(x, of_energy=True),
        "gradient_entropy": _entropy(np.hypot(along, across), of_energy=False),
        "sharpness": _log(float(laplacian.var()), variance),
        "fwhm": float(np.mean(widths)),
        "high_frequency": _log(float(power[frequency > 0.25].sum()), float(power.sum())),
    }


def _entropy(values: np.ndarray, *, of_energy: bool) -> float:
    """-sum p ln p over that of equal values, with p of each value over the root of the energy, or over the
    sum.
    """
    total = math.sqrt(float(np.square(values).sum())) if of_energy else float(values.sum())
    shares = values[values > 0] / max(total, _TINY)
    equal = 1 / math.sqrt(values.size) if of_energy else 1 / values.size
    return float((shares * np.log(shares)).sum()) / (values.size * equal * math.log(equal))


def _streaks(detail: np.ndarray) -> float:
    """How much of the power runs in one direction: 0 where all directions have the same."""
    power = np.square(np.abs(fft.rfft2(detail)))
    along, across = fft.fftfreq(len(detail))[:, None], fft.rfftfreq(len(detail))[None]
    sector = np.minimum(((np.arctan2(along, across) / math.pi + 0.5) * 12).astype(int), 11)
    disc = np.hypot(along, across) <= 0.5  # of no direction more than of another
    sums = np.bincount(sector[disc], power[disc], 12) / np.bincount(sector[disc], minlength=12)
    return _log(float(sums.max()), float(np.median(sums)))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _log(value: float, over: float) -> float:
    """ln(value / over), both moved from 0 by `_TINY`."""
    return math.log((value + _TINY) / (over + _TINY))
