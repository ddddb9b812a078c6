"""Combine integer updates: the weighted mean, exact in any order of arrival."""

from __future__ import annotations

import numpy as np

from common.weights import advance, mean_steps


class FederatedMean:
    """The mean of FedAvg (McMahan et al., AISTATS 2017) over integer updates, with public integer weights.

    The running sum is exact, so the result is the same bits whatever the order of arrival, and memory is one
    model however many sites answer.
    """

    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, np.int64)
        self._weight = 0

    def add(self, update: np.ndarray, weight: int) -> None:
        """Add int32 `update`, shape (size,), counted `weight` times (the site's public nominal number of
        patients).
        """
        np.add(self._total, np.multiply(update, np.int64(weight), dtype=np.int64), out=self._total)
        self._weight += weight

    def steps(self) -> np.ndarray:
        """The weighted mean in whole grid steps, int32 (size,): what a site that holds the base needs to
        follow.
        """
        return mean_steps(self._total, self._weight)

    def result(self, base: np.ndarray) -> np.ndarray:
        """`base`, float32 (size,), moved by the weighted mean of the updates."""
        return advance(base, self.steps())
