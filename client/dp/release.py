"""The release of a sum over patients: bounded in integers, covered by exactly drawn Gaussian noise.

The promise of `release`: if one patient moves the integer vector `total` by at most S in L2, the result is
post-processing of the Gaussian mechanism with noise of standard deviation `deviation` on `total`, per
patient, add/remove. Nothing in it is "up to rounding":

- A patient's vector becomes whole steps of a public grid, truncated towards zero; that its squares sum to at
  most (clip_norm / grid)^2 is checked in integers (`to_grid_steps`), and the sum of integers is exact.
- The noise is floor(X + 1/2) with X ~ N(0, deviation^2) a *real* number: the floats only say which integer
  where their error bound allows no other, and else more coins and higher precision decide. Since `total` is
  whole, total + floor(X + 1/2) = floor(total + X + 1/2) is a function of the Gaussian mechanism's output.
- `noise_deviation` never rounds down.

So the attack on the last bits of float noise (Mironov 2012) has nothing to attack. How long a draw takes is
not hidden: the few values that more coins decide take milliseconds longer.

An integer query (counts of an evaluation) uses `release` directly, with grid 1.

References: Mironov 2012, "On significance of the least significant bits for differential privacy"; Canonne,
Kamath, Steinke 2020 (arXiv 2004.00010) for the discrete alternative.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from fractions import Fraction

import mpmath
import numpy as np
from scipy.special import ndtri

from client.dp.clipping import clipped, row_blocks
from client.dp.coins import WORD_BITS, Coins
from common.errors import ConfigError

STEPS_PER_CLIP = 1024
"""The grid has at least so many steps, times the root of the vector's size, in the clip: truncation then
shortens a vector by a 1024th of the clip at most.
"""
MAX_STEPS_PER_CLIP = 2**31  # so that the squares of a patient sum to less than 2^63
MAX_TOTAL = 2**62
MAX_DEVIATION = 2.0**50  # noise of more than 2^62 steps is 4096 deviations away

TAIL_BITS = WORD_BITS - 1
SURE_DEVIATIONS = 6.0  # beyond, 63 bits of a tail probability leave an interval that is no longer narrow
NDTRI_ERROR = 2.0**-45
"""Bound on the relative error of scipy.special.ndtri (Cephes) between 0 and -6, and of the product with
the deviation. Cephes documents a peak of 7.2e-16; this is 39 times as much, and a test measures it.
"""
LARGEST_MILLS_RATIO = 1.26  # of the normal distribution: sqrt(pi / 2) and what the width of an interval adds
VALUES_PER_BLOCK = 1 << 17  # of noise, so that intermediate arrays stay in the processor's cache
GUARD_BITS = 64


def grid_of(clip_norm: float, size: int) -> float:
    """The public grid for vectors of `size` values: the largest power of two that is at most
    clip_norm / (1024 sqrt(size)).

    Raises:
        ConfigError: `bad-privacy-parameters`, the clip is so small that floats have no such grid.
    """
    bound = Fraction(clip_norm) ** 2 / (STEPS_PER_CLIP**2 * size)
    exponent = math.frexp(clip_norm)[1]
    while Fraction(4) ** exponent > bound:
        exponent -= 1
    grid = math.ldexp(1.0, exponent)
    if grid < sys.float_info.min:
        raise ConfigError(
            f"clip_norm = {clip_norm!r} is too small for {size} values", code="bad-privacy-parameters"
        )
    return grid


def to_grid_steps(per_patient: np.ndarray, clip_norm: float, grid: float) -> np.ndarray:
    """Each patient's vector in whole grid steps, with L2 norm at most clip_norm / grid, exactly.

    A vector that is not finite is zero. Any other is clipped in float64 and truncated towards zero, and then
    shortened by a step in every coordinate until the integers satisfy the bound. Each row is a function of
    that row alone, bit for bit.

    Args:
        per_patient: floats, shape (patients, n).
        clip_norm: L2 bound of one patient.
        grid: a power of two, public.
    Returns:
        int64, shape (patients, n).
    """
    if math.frexp(grid)[0] != 0.5 or not 0 < clip_norm / grid <= MAX_STEPS_PER_CLIP:
        raise ConfigError(
            f"grid = {grid!r} is no power of two that fits clip_norm = {clip_norm!r}",
            code="bad-privacy-parameters",
        )
    scaled = clipped(per_patient, clip_norm)
    scaled /= grid
    steps = scaled.astype(np.int64)  # truncates towards zero
    # exact in int64: rounding lengthened the vector by less than a millionth, so the squares are below 2^63
    most = int(Fraction(clip_norm / grid) ** 2)
    too_long = np.flatnonzero(np.square(steps).sum(axis=1) > most)
    while too_long.size:
        steps[too_long] -= np.sign(steps[too_long])
        too_long = too_long[np.square(steps[too_long]).sum(axis=1) > most]
    return steps


def clipped_integer_sum(chunks: Iterable[np.ndarray], size: int, clip_norm: float, grid: float) -> np.ndarray:
    """The sum over patients of `to_grid_steps`, a chunk at a time.

    Adding or removing one patient moves it by that patient's own steps and nothing else.

    Args:
        chunks: floats, shapes (patients, size).
    Returns:
        int64, shape (size,). Private: to be released only by `release`.
    """
    total = np.zeros(size, dtype=np.int64)
    patients = 0
    for chunk in chunks:
        patients += len(chunk)
        assert patients * clip_norm / grid <= MAX_TOTAL, "more patients than 64 bits can add up"
        for block in row_blocks(chunk):
            total += to_grid_steps(block, clip_norm, grid).sum(axis=0)
    return total


def noise_deviation(noise_multiplier: float, squared_sensitivity: Fraction | int) -> float:
    """The standard deviation of the noise in steps: noise_multiplier times the L2 sensitivity, rounded up.

    Args:
        squared_sensitivity: the square of how far one patient moves the integer vector in L2, in steps:
            (clip_norm / grid)^2, or, for counts, a whole number. Exact, since the root need not be a float.
    Raises:
        ConfigError: `bad-privacy-parameters`, the result is not above 0 or too large for int64.
    """
    exact = Fraction(noise_multiplier) ** 2 * squared_sensitivity
    deviation = noise_multiplier * math.sqrt(squared_sensitivity)
    while Fraction(deviation) ** 2 < exact:
        deviation = math.nextafter(deviation, math.inf)
    return _checked_deviation(deviation)


def release(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
    """`total` plus exactly drawn, rounded Gaussian noise: what may leave.

    Args:
        total: int64, shape (n,): a sum over patients, not yet divided by anything.
        deviation: standard deviation of the noise in steps, from `noise_deviation`.
        coins: of this training or evaluation, shared with nothing that someone else can see.
    Returns:
        int64, shape (n,), in steps.
    """
    assert total.dtype == np.int64
    assert np.all(np.abs(total) <= MAX_TOTAL), "no room for the noise in 64 bits"
    return total + rounded_gaussian(total.size, deviation, coins)


def rounded_gaussian(size: int, deviation: float, coins: Coins) -> np.ndarray:
    """`size` independent draws of floor(X + 1/2), X ~ N(0, deviation^2), exact; int64, shape (size,).

    Each takes a word of coins: a sign, and 63 bits of U, the probability that |X| is larger than it is. A
    draw takes more words only where 63 bits do not determine the integer.

    Raises:
        ConfigError: `bad-privacy-parameters`, the deviation is not above 0 or too large for int64.
    """
    _checked_deviation(deviation)
    values = np.empty(size, dtype=np.int64)
    for start in range(0, size, VALUES_PER_BLOCK):
        block = values[start : start + VALUES_PER_BLOCK]
        block[:] = _gaussian_block(block.size, deviation, coins)
    return values


def _gaussian_block(size: int, deviation: float, coins: Coins) -> np.ndarray:
    words = coins.words(size)
    tails = words & np.uint64(2**TAIL_BITS - 1)
    # U lies in [tail, tail + 1) 2^-63; x is |X| at the middle, in deviations, and the half-line has half the
    # probability of the line
    middle = tails.astype(np.float64) + 0.5
    x = np.abs(ndtri(middle * 2.0 ** -(TAIL_BITS + 1)))
    # how far |X| can be: ndtri itself, then half the interval and the rounding of `middle`, both relative to
    # U, times U / density, which is at most the Mills ratio at 0
    error = deviation * (NDTRI_ERROR * x + LARGEST_MILLS_RATIO * (0.5 / middle + 2.0**-52))
    x *= deviation
    nearest = np.rint(x)
    undecided = (0.5 - np.abs(x - nearest) <= error) | (x > SURE_DEVIATIONS * deviation)
    values = nearest.astype(np.int64)
    for place in np.flatnonzero(undecided):
        values[place] = _refined(int(tails[place]), int(values[place]), deviation, coins)
    np.negative(values, out=values, where=words >= np.uint64(2**TAIL_BITS))
    return values


def _refined(tail: int, guess: int, deviation: float, coins: Coins) -> int:
    """|X| rounded to a whole number, from U in [tail, tail + 1) 2^-63, further coins as needed, and mpmath.

    |X| is beyond m + 1/2 if and only if U is below erfc((m + 1/2) / (deviation sqrt(2))); a search from
    `guess` finds the m where the answer changes. Each comparison draws coins until it is decided.
    """
    context = mpmath.MPContext()
    bits = TAIL_BITS

    def is_beyond(whole: int) -> bool:
        nonlocal tail, bits
        while whole >= 0:
            context.prec = bits + GUARD_BITS
            boundary = context.erfc((whole + context.mpf(0.5)) / (deviation * context.sqrt(2)))
            slack = context.ldexp(boundary, -bits - GUARD_BITS // 2)  # half the guard bits for its error
            if context.ldexp(tail + 1, -bits) <= boundary - slack:
                return True
            if context.ldexp(tail, -bits) >= boundary + slack:
                return False
            tail = (tail << WORD_BITS) | int(coins.words(1)[0])
            bits += WORD_BITS
        return True

    low, high, stride = guess - 1, guess, 1
    while is_beyond(high):
        low, high, stride = high, high + stride, 2 * stride
    stride = 1
    while not is_beyond(low):
        low, high, stride = low - stride, low, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_beyond(middle) else (low, middle)
    return high


def _checked_deviation(deviation: float) -> float:
    if not 0 < deviation <= MAX_DEVIATION:
        raise ConfigError(
            f"noise of {deviation!r} grid steps: must be above 0 and at most {MAX_DEVIATION:g}",
            code="bad-privacy-parameters",
        )
    return deviation
