from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import chi2, kstest

from client.dp import release as module
from client.dp.clipping import clipped
from client.dp.coins import Coins
from client.dp.release import (
    LARGEST_MILLS_RATIO,
    MAX_DEVIATION,
    MAX_TOTAL,
    NDTRI_ERROR,
    clipped_integer_sum,
    grid_of,
    noise_deviation,
    release,
    rounded_gaussian,
    to_grid_steps,
)
from common.errors import ConfigError
from tests.helpers.coins import Planted

KEY = bytes(range(32))
DIGITS = 80
SIGN = 1 << 63

ADVERSARIAL = st.sampled_from(
    [0.0, -0.0, 5e-324, -2.2e-308, 1e-300, 1e300, -1.7e308, math.inf, -math.inf, math.nan]
)
VALUES = st.floats(-10, 10) | st.floats(-10, 10, width=32) | ADVERSARIAL


# --- the bound of one patient, in integers


def squares(steps: np.ndarray) -> int:
    """The sum of squares in whole numbers of any size."""
    return sum(int(step) ** 2 for step in steps.ravel())


@given(
    rows=st.lists(st.lists(VALUES, min_size=5, max_size=5), min_size=1, max_size=4),
    clip_norm=st.floats(1e-290, 1e290) | st.floats(0.01, 10),
    steps_per_clip=st.integers(5, 30),
    single=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_one_patient_is_at_most_the_clip_in_whole_numbers(
    rows: list[list[float]], clip_norm: float, steps_per_clip: int, single: bool
) -> None:
    grid = math.ldexp(1.0, math.frexp(clip_norm)[1] - steps_per_clip)
    with np.errstate(over="ignore"):
        vectors = np.array(rows).astype(np.float32 if single else np.float64)
    steps = to_grid_steps(vectors, clip_norm, grid)
    assert steps.dtype == np.int64
    for row, own in zip(vectors, steps, strict=True):
        assert squares(own) <= Fraction(clip_norm / grid) ** 2
        assert not own[np.abs(row.astype(np.float64)) < grid].any()
        assert np.all(own * np.nan_to_num(np.sign(row)) >= 0)
        # whoever else is there
        np.testing.assert_array_equal(to_grid_steps(row[None], clip_norm, grid)[0], own)


@given(
    size=st.integers(5, 5000),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-40, 40),
    steps_per_clip=st.integers(5, 30),
    spread=st.sampled_from([0.0, 1.0, 12.0]),
)
@settings(max_examples=150, deadline=None)
def test_vectors_of_any_size_are_at_most_the_clip_and_lose_little(
    size: int, seed: int, exponent: int, steps_per_clip: int, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((3, size)) * np.exp(spread * generator.standard_normal((3, size)))
    clip_norm = math.ldexp(generator.uniform(0.5, 1), exponent)
    grid = math.ldexp(1.0, exponent - steps_per_clip)
    steps = to_grid_steps(vectors * clip_norm, clip_norm, grid)
    for vector, own in zip(vectors, steps, strict=True):
        assert squares(own) <= Fraction(clip_norm / grid) ** 2
        exact = vector * min(1.0, 1.0 / float(np.linalg.norm(vector))) * clip_norm
        # truncation takes less than a step; where the integers were too long, another
        assert np.abs(own * grid - exact).max() < 2.001 * grid


def test_a_vector_that_rounding_makes_too_long_is_shortened_again() -> None:
    """9^2 + 40^2 = 41^2. The clip lies just below 41 steps, and floats round the clipped vector up to 9 and
    40 steps.
    """
    clip_norm = 64 * math.nextafter(41.0, 0)
    vectors = np.array([[9e3, 40e3], [0.3, 64.0], [-9e5, 40e5]])
    assert np.trunc(clipped(vectors, clip_norm) / 64).tolist() == [[9, 40], [0, 1], [-9, 40]]
    assert to_grid_steps(vectors, clip_norm, 64.0).tolist() == [[8, 39], [0, 1], [-8, 39]]
    assert to_grid_steps(vectors, 64 * 41.0, 64.0).tolist() == [[9, 40], [0, 1], [-9, 40]]


@pytest.mark.slow
def test_eleven_million_values_are_at_most_the_clip() -> None:
    size, clip_norm = 11_700_000, 0.7
    grid = grid_of(clip_norm, size)
    generator = np.random.default_rng(0)
    for vector in (
        generator.standard_normal((1, size), dtype=np.float32),
        np.full((1, size), 1e300),
        np.full((1, size), clip_norm / math.sqrt(size)),
    ):
        steps = to_grid_steps(vector, clip_norm, grid)[0]
        # squares of steps below 2^23 add up exactly in blocks, and the blocks in whole numbers of any size
        total = sum(int(np.square(part).sum()) for part in np.array_split(steps, 100))
        assert np.abs(steps).max() < 2**23
        bound = Fraction(clip_norm / grid) ** 2
        assert bound * Fraction(995, 1000) < total <= bound


@pytest.mark.parametrize("size", [1, 5, 245, 240_725, 11_700_000])
@pytest.mark.parametrize("clip_norm", [0.7, 1.0, 1e-200, 3e200, 2.0**-40])
def test_the_grid_is_the_largest_power_of_two_that_fits(size: int, clip_norm: float) -> None:
    grid = grid_of(clip_norm, size)
    assert math.frexp(grid)[0] == 0.5
    assert (
        (Fraction(grid) * 1024) ** 2 * size <= Fraction(clip_norm) ** 2 < (Fraction(grid) * 2048) ** 2 * size
    )


def test_a_clip_or_grid_that_has_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        grid_of(1e-306, 5)
    for clip_norm, grid in ((1.0, 0.3), (1.0, 2.0**-32), (1.0, 0.0), (1.0, -0.5), (math.nan, 1.0)):
        with pytest.raises(ConfigError, match="no power of two"):
            to_grid_steps(np.zeros((1, 3)), clip_norm, grid)


@given(
    rows=st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=8),
    gone=st.integers(0, 7),
    clip_norm=st.floats(0.01, 100),
    height=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_removing_a_patient_removes_its_own_steps_and_nothing_else(
    rows: list[list[float]], gone: int, clip_norm: float, height: int
) -> None:
    vectors = np.array(rows)
    gone %= len(rows)
    grid = grid_of(clip_norm, 3)
    chunks = [vectors[start : start + height] for start in range(0, len(vectors), height)]
    total = clipped_integer_sum(chunks, 3, clip_norm, grid)
    left = clipped_integer_sum([np.delete(vectors, gone, axis=0)], 3, clip_norm, grid)
    own = to_grid_steps(vectors[gone : gone + 1], clip_norm, grid)[0]
    np.testing.assert_array_equal(total - left, own)
    assert squares(total - left) <= Fraction(clip_norm / grid) ** 2


def test_no_row_depends_on_its_company_or_its_place_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).standard_normal((37, 613)).astype(np.float32)
    grid = grid_of(0.5, 613)
    alone = np.concatenate([to_grid_steps(row[None].copy(), 0.5, grid) for row in vectors])
    np.testing.assert_array_equal(to_grid_steps(vectors, 0.5, grid), alone)
    np.testing.assert_array_equal(to_grid_steps(np.asfortranarray(vectors), 0.5, grid), alone)
    for start in (1, 2, 3, 5, 30):
        np.testing.assert_array_equal(to_grid_steps(vectors[start:], 0.5, grid), alone[start:])
    monkeypatch.setattr("client.dp.clipping.VALUES_PER_BLOCK", 5 * 613)
    np.testing.assert_array_equal(clipped_integer_sum([vectors], 613, 0.5, grid), alone.sum(axis=0))


# --- the deviation


@given(noise=st.floats(0.1, 1e3), squared=st.integers(1, 10**9) | st.fractions(Fraction(1, 9), 10**12))
@settings(max_examples=300, deadline=None)
def test_the_deviation_is_never_rounded_down(noise: float, squared: int | Fraction) -> None:
    deviation = noise_deviation(noise, squared)
    exact = Fraction(noise) ** 2 * squared
    assert exact <= Fraction(deviation) ** 2 <= exact * (1 + Fraction(1, 2**49))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_a_deviation_that_promises_nothing_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="grid steps"):
        rounded_gaussian(3, wrong, Coins(KEY))
    with pytest.raises(ConfigError, match="grid steps"):
        release(np.zeros(3, dtype=np.int64), wrong, Coins(KEY))


# --- the sampler against a slow reference that shares no code with it


def boundary(whole: int, deviation: float) -> mpmath.mpf:
    """The probability that |X| is beyond whole + 1/2, to 80 digits; with ncdf, not with erfc."""
    with mpmath.workdps(DIGITS):
        return 2 * mpmath.ncdf(-(mpmath.mpf(whole) + mpmath.mpf("0.5")) / mpmath.mpf(deviation))


def disagreements(words: np.ndarray, values: np.ndarray, deviation: float) -> int:
    """How many values are wrong: all of a word's interval must lie between the boundaries of the value."""
    wrong = 0
    with mpmath.workdps(40):
        for word, value in zip(words.tolist(), values.tolist(), strict=True):
            low = mpmath.ldexp(word % SIGN, -63)
            high = low + mpmath.ldexp(1, -63)
            least = mpmath.erfc((abs(value) + mpmath.mpf("0.5")) / (deviation * mpmath.sqrt(2)))
            most = mpmath.erfc(max(abs(value) - mpmath.mpf("0.5"), 0) / (deviation * mpmath.sqrt(2)))
            fits = low >= least and high <= most and (value == 0 or (value < 0) == (word >= SIGN))
            wrong += not fits
    return wrong


def check_against_the_reference(draws: int, deviation: float) -> None:
    # no draw of this key needs more coins at these deviations, which the next line proves: the word after the
    # last is the next one of the stream
    coins = Coins(KEY)
    values = rounded_gaussian(draws, deviation, coins)
    words = Coins(KEY).words(draws + 1)
    assert coins.words(1) == words[-1:]
    assert disagreements(words[:-1], values, deviation) == 0


@pytest.mark.parametrize("deviation", [0.3, 7.1, 1e4 / 3, 1.7e6])
def test_every_value_is_the_one_that_the_reference_allows(deviation: float) -> None:
    check_against_the_reference(500, deviation)


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [0.3, 7.1, 1.7e6])
def test_every_one_of_many_values_is_the_one_that_the_reference_allows(deviation: float) -> None:
    check_against_the_reference(60_000, deviation)


def cell_pvalue(draws: int, deviation: float, draw: Callable[[int], np.ndarray]) -> float:
    """Pearson's chi-square of `draws` values against the exact probabilities of about 60 cells."""
    width = max(1, round(deviation / 8))
    edges = np.arange(-30, 31) * width  # cell i + 1 holds edges[i] <= value < edges[i + 1]
    counts = np.zeros(len(edges) + 1)
    for start in range(0, draws, 1_000_000):
        values = draw(min(1_000_000, draws - start))
        counts += np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(counts))
    with mpmath.workdps(30):
        below = [0, *(mpmath.ncdf((int(edge) - mpmath.mpf("0.5")) / deviation) for edge in edges), 1]
        expected = np.array([float(b - a) * draws for a, b in pairwise(below)])
    kept = expected >= 10
    assert counts[~kept].sum() <= 10 * (expected[~kept].sum() + 1)
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    return float(chi2.sf(statistic, kept.sum() - 1))


@pytest.mark.parametrize("deviation", [0.2, 0.9, 5.0, 31.4, 2.3e6])
def test_values_are_as_frequent_as_the_exact_probabilities(deviation: float) -> None:
    coins = Coins(KEY)
    assert cell_pvalue(100_000, deviation, lambda count: rounded_gaussian(count, deviation, coins)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [0.2, 5.0, 31.4, 2.3e6])
def test_ten_million_values_are_as_frequent_as_the_exact_probabilities(deviation: float) -> None:
    coins = Coins(KEY)
    assert cell_pvalue(10_000_000, deviation, lambda count: rounded_gaussian(count, deviation, coins)) > 1e-4


def test_the_frequency_check_finds_a_sampler_that_is_slightly_wrong() -> None:
    coins = Coins(KEY)
    wrong: dict[str, Callable[[int], np.ndarray]] = {
        "too wide by a fiftieth": lambda count: rounded_gaussian(count, 5.1, coins),
        "towards zero": lambda count: np.trunc(np.random.default_rng(0).standard_normal(count) * 5),
        "down": lambda count: np.floor(np.random.default_rng(0).standard_normal(count) * 5),
    }
    for what, draw in wrong.items():
        assert cell_pvalue(100_000, 5.0, draw) < 1e-4, what


# --- planted words: half-integers, tails, ends


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the draws that were decided at higher precision."""
    calls: list[int] = []
    original = module._refined

    def spy(*arguments: Any) -> int:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "_refined", spy)
    return lambda: len(calls)


def digits_of(probability: mpmath.mpf, count: int) -> list[int]:
    """The first 63 bits of a probability, then `count` words of 64 bits."""
    with mpmath.workdps(DIGITS):
        whole = int(mpmath.floor(mpmath.ldexp(probability, 63 + 64 * count)))
    words: list[int] = []
    for _ in range(count):
        whole, word = divmod(whole, 2**64)
        words.insert(0, word)
    return [whole, *words]


@pytest.mark.parametrize("deviation", [0.37, 2.5, 1e3 / 7, 1.9e6, 2.0**40])
@pytest.mark.parametrize("deviations", [0.0, 0.01, 0.7, 2.0, 5.9, 7.5])
@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize("sign", [0, SIGN])
def test_at_a_half_integer_the_last_word_decides(
    deviation: float, deviations: float, more: int, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coins begin as the probability of whole + 1/2 does; the last word goes one below or one above."""
    whole = int(deviations * deviation)
    first, *others = digits_of(boundary(whole, deviation), more)
    asked = counted(monkeypatch)
    for turn, expected in ((-1, whole + 1), (1, whole)):
        coins = Planted([first | sign, *others[:-1], others[-1] + turn])
        value = rounded_gaussian(1, deviation, coins)[0]
        assert value == (-expected if sign else expected)
        assert coins.left == 0
    assert asked() == 2


@pytest.mark.parametrize("deviation", [0.37, 2.5, 1.9e6])
@pytest.mark.parametrize("tail", [0, 1, 2, 1000, 2**30])
@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1])
def test_the_far_tail_is_decided_by_more_coins(
    deviation: float, tail: int, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counted(monkeypatch)
    further = [word, 12345, *Coins(KEY).words(3).tolist()]
    value = abs(int(rounded_gaussian(1, deviation, Planted([tail, *further]))[0]))
    assert asked() == 1
    bits = 63 + 64 * len(further)
    number = tail
    for each in further:
        number = (number << 64) | each
    with mpmath.workdps(150):
        uniform = mpmath.ldexp(number, -bits)
        assert uniform > mpmath.erfc((value + mpmath.mpf("0.5")) / (deviation * mpmath.sqrt(2)))
        if value:
            assert uniform <= mpmath.erfc((value - mpmath.mpf("0.5")) / (deviation * mpmath.sqrt(2)))


@pytest.mark.parametrize("sign", [0, SIGN])
def test_the_smallest_values(sign: int) -> None:
    """All ones: |X| is as good as 0."""
    for deviation in (0.3, 1e6):
        assert rounded_gaussian(1, deviation, Planted([(SIGN - 1) | sign]))[0] == 0


def test_float_and_refined_values_agree_where_floats_are_sure() -> None:
    deviation = 1.7e6
    words = Coins(KEY).words(40)
    values = rounded_gaussian(40, deviation, Planted(words.tolist()))
    for word, value in zip(words.tolist(), values.tolist(), strict=True):
        for guess in (abs(value), abs(value) + 1, abs(value) - 1, 0, abs(value) + 1000):
            assert module._refined(word % SIGN, guess, deviation, Planted([])) == abs(value)


def measured_error(probabilities: np.ndarray) -> float:
    """The largest relative error of ndtri, by a Newton step at 40 digits from its result."""
    largest = 0.0
    with mpmath.workdps(40):
        for probability, x in zip(probabilities.tolist(), ndtri(probabilities).tolist(), strict=True):
            residual = (mpmath.ncdf(x) - mpmath.mpf(probability)) / mpmath.npdf(x)
            largest = max(largest, float(abs(residual / x)) if x else float(abs(residual)))
    return largest


def probabilities(count: int) -> np.ndarray:
    """Between the tail beyond 6 deviations and 1/2: even in the value and in its logarithm, and at the places
    where the implementation changes its formula.
    """
    generator = np.random.default_rng(0)
    joints = np.exp(-2.0) * np.array([1 - 2e-16, 1, 1 + 2e-16, 0.999, 1.001])
    return np.concatenate(
        [
            generator.uniform(0, 0.5, count // 3),
            0.5 * np.exp(generator.uniform(np.log(1e-9), 0, count // 3)),
            0.5 - 0.5 * np.exp(generator.uniform(np.log(1e-15), 0, count // 3)),
            joints,
            [0.5 - 2.0**-54, 9.9e-10],
        ]
    )


def test_ndtri_is_as_exact_as_the_sampler_assumes() -> None:
    """A fourth of the bound is what remains for the product with the deviation and for other processors."""
    assert measured_error(probabilities(1500)) < NDTRI_ERROR / 4


@pytest.mark.slow
def test_ndtri_is_as_exact_as_the_sampler_assumes_at_many_places() -> None:
    assert measured_error(probabilities(60_000)) < NDTRI_ERROR / 4


def test_the_mills_ratio_of_the_half_line_is_as_bounded_as_assumed() -> None:
    for x in np.linspace(0, 6, 200).tolist():
        assert mpmath.ncdf(-x) / mpmath.npdf(x) * (1 + 3e-10) < LARGEST_MILLS_RATIO


# --- independence, and the release


def test_values_of_one_draw_of_two_draws_and_of_two_keys_are_independent() -> None:
    deviation, size = 1e5, 200_000
    coins = Coins(KEY)
    first, second = rounded_gaussian(size, deviation, coins), rounded_gaussian(size, deviation, coins)
    other = rounded_gaussian(size, deviation, Coins())
    again = rounded_gaussian(size, deviation, Coins(KEY))
    np.testing.assert_array_equal(first, again)
    bound = 5 / math.sqrt(size)
    for one, two in ((first, second), (first, other), (first[1:], first[:-1]), (first[::2], first[1::2])):
        assert abs(np.corrcoef(one, two)[0, 1]) < bound
        assert abs(np.corrcoef(np.abs(one), np.abs(two))[0, 1]) < bound


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounded_gaussian(1000, 1e4, Coins(KEY))
    monkeypatch.setattr("client.dp.release.VALUES_PER_BLOCK", 7)
    np.testing.assert_array_equal(rounded_gaussian(1000, 1e4, Coins(KEY)), whole)


def test_a_release_is_the_total_and_the_noise() -> None:
    total = np.array([0, 5, -(2**40), 2**61, -(2**62)], dtype=np.int64)
    released = release(total, 1e6, Coins(KEY))
    assert released.dtype == np.int64
    np.testing.assert_array_equal(released - total, rounded_gaussian(5, 1e6, Coins(KEY)))
    assert kstest(release(np.zeros(20_000, dtype=np.int64), 1e6, Coins()) / 1e6, "norm").pvalue > 1e-4


def test_counts_take_the_same_noise() -> None:
    """An integer query of sensitivity sqrt(10), grid 1."""
    deviation = noise_deviation(2.0, 10)
    counts = release(np.full(100_000, 40, dtype=np.int64), deviation, Coins(KEY))
    assert counts.std() == pytest.approx(math.sqrt(deviation**2 + 1 / 12), rel=0.01)
    assert counts.mean() == pytest.approx(40, abs=5 * deviation / math.sqrt(counts.size))


def test_what_is_no_sum_of_integers_or_leaves_no_room_is_a_defect() -> None:
    for total in (np.zeros(3), np.array([MAX_TOTAL + 1])):
        with pytest.raises(AssertionError):
            release(total, 1.0, Coins(KEY))
    with pytest.raises(AssertionError, match="patients"):
        clipped_integer_sum([np.zeros((2**33, 0))], 0, 1.0, 2.0**-31)
    assert MAX_TOTAL + 4096 * MAX_DEVIATION <= 2**63
