"""Random coins that nobody can predict: who takes part in a step, which slices, and the bits of the noise.

The promise of `Coins`: the stream is AES-256 in counter mode under a key of the operating system that is
never stored, logged or returned, so that whoever lacks the key cannot tell it from independent fair coins.
Every number below is made from those coins *exactly*: no probability is rounded to a float of a generator.
Make one `Coins` for each training and let it go.
"""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
WORD_BITS = 64


class Coins:
    """A stream of fair coins from a cryptographic generator.

    Args:
        key: None takes 32 bytes of the operating system. A key that someone could know voids the guarantee;
            pass one only in tests.
    Reference: NIST SP 800-38A, counter mode; FIPS 197, AES.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(KEY_BYTES) if key is None else key
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next `count` words of 64 fair coins, uint64, shape (count,)."""
        return np.frombuffer(self._stream.update(bytes(count * WORD_BITS // 8)), dtype="<u8")

    def bernoulli(self, count: int, probability: float | Fraction) -> np.ndarray:
        """`count` independent coins that are true with exactly `probability`, bool, shape (count,).

        A coin compares a uniform real number with the float as the fraction it is: 64 bits at first, more
        where they equal those of the fraction. 0 and 1 draw nothing.
        """
        exact = Fraction(probability)
        if not 0 <= exact <= 1:
            raise ValueError(f"{probability!r} is no probability")
        if exact in (0, 1):
            return np.full(count, exact == 1)
        scaled = exact * 2**WORD_BITS
        whole = int(scaled)
        words = self.words(count)
        heads = words < np.uint64(whole)
        for tie in np.flatnonzero(words == np.uint64(whole)):
            heads[tie] = self.bernoulli(1, scaled - whole)[0]
        return heads

    def choose(self, values: np.ndarray, count: int) -> np.ndarray:
        """`count` of `values` without replacement, in random order; every order of every subset is equally
        likely.

        Each value gets a word, and the smallest words win. If two words are equal, all are drawn again, so
        that the order is exactly uniform.
        """
        while True:
            words = self.words(len(values))
            order = np.argsort(words)
            ranked = words[order]
            if np.all(ranked[1:] > ranked[:-1]):
                return values[order[:count]]
