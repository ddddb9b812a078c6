"""Coins that a test chooses."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from client.dp.coins import Coins


class Planted(Coins):
    """Gives the words it was made of, and no others.

    Raises:
        AssertionError: more words are asked for than there are.
    """

    def __init__(self, words: Iterable[int]) -> None:
        self._planted = list(words)

    @property
    def left(self) -> int:
        """How many words nobody has asked for."""
        return len(self._planted)

    def words(self, count: int) -> np.ndarray:
        """The next `count` words."""
        assert count <= len(self._planted), "a draw asks for more coins than were planted"
        drawn, self._planted = self._planted[:count], self._planted[count:]
        return np.array(drawn, dtype=np.uint64)
