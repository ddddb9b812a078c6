"""Which slices belong together, and in which order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Series(NamedTuple):
    """Which slices belong together, and in which order."""

    series: np.ndarray  # int64 (n,), the series of each slice; none has two patients or modalities
    order: np.ndarray  # int64 (n,), the slices sorted by their place in it
    study: np.ndarray  # int64 (n,), the study of each slice; a series is in one
