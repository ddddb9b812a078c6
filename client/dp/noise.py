"""Add the noise of the Gaussian mechanism, from fresh randomness.

Randomness: NumPy's Philox with a 128-bit key from `os.urandom`, a new key per step, never stored, logged or
    returned. Philox is not a
proven cryptographic generator; the key is what an adversary lacks.

Floating point: a sum of floats plus a float from a generator can betray the sum in its last bits (Mironov
2012). The noise is drawn and added in float64, then the released sum is rounded to a public grid of 2^-20 of
the noise's standard deviation, a power of two. This hides the low bits. It is a mitigation, not a proof.
"""

from __future__ import annotations

import math
import os

import numpy as np

from common.errors import ConfigError

GRID_BITS = 20


def fresh_generator() -> np.random.Generator:
    """A generator nobody can reproduce: Philox with a key from the operating system. Make one per step and
    let it go.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(os.urandom(16), "little")))


def noise_grid(noise_multiplier: float, clip_norm: float) -> float:
    """The spacing of the grid on which a noised sum is released: a power of two, from public numbers only."""
    return math.ldexp(1.0, math.floor(math.log2(noise_multiplier * clip_norm)) - GRID_BITS)


def add_noise(
    total: np.ndarray,
    *,
    noise_multiplier: float,
    clip_norm: float,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """`total` plus Gaussian noise of standard deviation noise_multiplier * clip_norm in each coordinate, on
    the public grid.

    The promise: if one patient moves `total` by at most `clip_norm` in L2, the result is one step of the
    Gaussian mechanism with that noise multiplier, per patient, add/remove. `total` must be a sum, not yet
    divided by anything.

    Args:
        total: shape (n,).
        noise_multiplier: 0 adds nothing and rounds nothing: not private.
        generator: None uses `fresh_generator()`; anything else only in tests and in runs marked not private.
    Returns:
        float64, shape (n,).
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ConfigError(
            f"noise_multiplier = {noise_multiplier!r} must be finite and at least 0",
            code="bad-privacy-parameters",
        )
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ConfigError(
            f"clip_norm = {clip_norm!r} must be finite and above 0", code="bad-privacy-parameters"
        )
    total = np.asarray(total, dtype=np.float64)
    if noise_multiplier == 0:
        return total.copy()
    generator = fresh_generator() if generator is None else generator
    noised = total + noise_multiplier * clip_norm * generator.standard_normal(total.shape)
    grid = noise_grid(noise_multiplier, clip_norm)
    return np.round(noised / grid) * grid
