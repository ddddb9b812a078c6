"""Let answers about patients leave at multiples of a fixed time: how long the work took then tells little."""

from __future__ import annotations

import math
import threading
import time

from common.arms import is_private
from common.signing import Statement


def is_on_grid(asked: Statement) -> bool:
    """Whether the answer to a task is held back: private training and every evaluation, refusals included."""
    return asked.kind == "EvaluateTask" or (asked.kind == "TrainTask" and is_private(asked.arm))


def left_s(elapsed_s: float, grid_s: float) -> float:
    """Seconds until the first multiple of `grid_s` after `elapsed_s`; 0 where there is no grid."""
    return max(0.0, math.ceil(elapsed_s / grid_s) * grid_s - elapsed_s) if grid_s > 0 else 0.0


def wait_for_grid(began: float, grid_s: float, cancelled: threading.Event) -> None:
    """Return at the first multiple of `grid_s` after `began` (on the monotonic clock), or when the caller has
    gone.
    """
    left = left_s(time.monotonic() - began, grid_s)
    if left:
        cancelled.wait(left)
