"""The mean of one patient where some rows are views that were simulated on the patient's own slices.

A row is a slice as it was read, with the sheet's label, or a view. Of the read slices a step draws at most
`max_slices_per_patient`; all views are used, as they are of as many slices. A patient's rows weigh 1
together: the views `share`, the read slices the rest, each slice the same. Without read slices the views
weigh 1, without views the slices do. All of this is a function of the patient's own rows, so that one clip of
the mean bounds the patient, as without views.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.dp.coins import Coins
from client.dp.sampler import draw_slices
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InjectedRows:
    """Which rows of a training are views, and what they weigh.

    Args:
        weights: float64 (n,): of a view its weight among the patient's views, above 0; 0: a slice as read.
        share: of a patient's mean that the views make where slices were read as well; above 0, at most 1.
        views: public; versions of one slice at most.
    Raises:
        ConfigError: `bad-privacy-parameters`, a public number is out of range.
    """

    weights: np.ndarray
    share: float
    views: int

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.views >= 1):
            raise ConfigError(
                f"share = {self.share!r}, views = {self.views!r}: out of range", code="bad-privacy-parameters"
            )

    def max_rows(self, max_slices: int) -> int:
        """Rows of one patient at most: public."""
        return max_slices * (self.views + 1)

    def draw(self, rows: np.ndarray, max_slices: int, coins: Coins) -> np.ndarray:
        """The rows of one patient that a step uses."""
        is_view = self.weights[rows] > 0
        views = draw_slices(rows[is_view], max_slices * self.views, coins)
        return np.concatenate([draw_slices(rows[~is_view], max_slices, coins), views])

    def mean_weights(self, rows: np.ndarray) -> np.ndarray:
        """What each of one patient's rows weighs in the mean, float64, as long as `rows`; sums to 1."""
        own = self.weights[rows]
        read = own == 0
        share = float(not read.any()) if read.all() or not read.any() else self.share
        of_read, of_views = (1 - share) / max(1, int(read.sum())), share / max(float(own.sum()), 1e-300)
        return np.where(read, of_read, of_views * own)
