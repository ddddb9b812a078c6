from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from client.dp.coins import Coins
from tests.helpers.coins import Planted

KEY = bytes(range(32))


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    """Block i is AES of the number i, here from the mode without counter."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    blocks = b"".join(number.to_bytes(16, "big") for number in range(3))
    expected = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor().update(blocks)
    coins = Coins(KEY)
    assert coins.words(1).tobytes() + coins.words(5).tobytes() == expected


def test_no_two_streams_are_alike_and_none_repeats_itself() -> None:
    assert len({Coins().words(2).tobytes() for _ in range(100)}) == 100
    words = Coins().words(100_000)
    assert len(np.unique(words)) == words.size


def test_the_key_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dp.coins.os.urandom", lambda count: KEY[:count])
    np.testing.assert_array_equal(Coins().words(4), Coins(KEY).words(4))
    with pytest.raises(ValueError, match="key"):
        Coins(b"short")


def test_every_bit_of_a_word_is_fair() -> None:
    words = Coins(KEY).words(50_000)
    ones = [int(np.count_nonzero(words >> np.uint64(bit) & np.uint64(1))) for bit in range(64)]
    assert min(binomtest(count, words.size).pvalue for count in ones) > 1e-5


@pytest.mark.parametrize("probability", [0.5, 0.1, 1 / 3, 1e-9, 2.0**-70, 1 - 2.0**-53, 5e-324])
def test_a_coin_is_true_exactly_where_a_uniform_number_is_below_the_probability(probability: float) -> None:
    """Words just below, at, and above the probability, with the words that decide a tie."""
    exact = Fraction(probability)
    digits = []  # of the probability, to the base 2^64
    rest = exact
    while rest:
        rest *= 2**64
        digits.append(int(rest))
        rest -= int(rest)
    for place, digit in enumerate(digits):
        if digit > 0:
            assert Planted([*digits[:place], digit - 1]).bernoulli(1, probability)[0]
        if digit < 2**64 - 1:
            assert not Planted([*digits[:place], digit + 1]).bernoulli(1, probability)[0]
    # a uniform number that begins as the probability does is not below it
    assert not Planted(digits).bernoulli(1, probability)[0]


def test_a_certain_coin_draws_nothing() -> None:
    assert Planted([]).bernoulli(5, 1.0).all()
    assert not Planted([]).bernoulli(5, 0.0).any()
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            Coins(KEY).bernoulli(1, wrong)


@pytest.mark.parametrize("probability", [0.001, 0.3, 0.98])
def test_coins_are_as_frequent_as_promised_and_independent(probability: float) -> None:
    heads = Coins(KEY).bernoulli(200_000, probability)
    assert binomtest(int(heads.sum()), heads.size, probability).pvalue > 1e-4
    both = int((heads[1:] & heads[:-1]).sum())
    assert binomtest(both, heads.size - 1, probability**2).pvalue > 1e-4


def test_every_ordered_choice_is_equally_likely() -> None:
    coins = Coins(KEY)
    values = np.array([3, 5, 7, 9])
    seen = dict.fromkeys(itertools.permutations(values.tolist(), 2), 0)
    for _ in range(6000):
        seen[tuple(coins.choose(values, 2).tolist())] += 1
    assert chisquare(list(seen.values())).pvalue > 1e-4


def test_a_choice_with_equal_words_is_drawn_again() -> None:
    planted = Planted([4, 4, 9, 3, 2, 1])
    assert planted.choose(np.array([10, 20, 30]), 2).tolist() == [30, 20]
    assert planted.left == 0
