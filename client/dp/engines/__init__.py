"""Engines by name: each gives the gradient of every patient, one row a patient, to be clipped, summed and
noised by `client.dp.dp_sgd`. They differ in cost and in nothing that a guarantee rests on.

To add one: a file here, a line in `ENGINES`, the name in `common.plan.Privacy.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import nn

from client.dp.engines.examples import Examples
from client.dp.engines.opacus import hooked_gradients
from client.dp.engines.patient_loop import looped_gradients
from common.losses import PerSampleLoss

DEFAULT_ENGINE = "opacus"


class Engine(Protocol):
    """The gradient of each patient's mean loss, some patients at a time, in the order of `slices`.

    A row is a function of that patient's slices and of public numbers alone, bit for bit: whoever else takes
    part in the step.

    Args:
        network: its parameters that require a gradient are those that are trained.
        slices: the rows of each sampled patient, in any order, `max_slices` at most, at least one.
        max_slices, rows_per_batch: public; with them batches have the same shape whoever is in them.
        weights: of each patient's rows in the mean, beside `slices`, a patient's sum to 1; None: all the
            same.
        loss: one number a slice.
    Returns:
        floats, shapes (patients, trained parameters), in the order of `network.parameters()`. Private, and
        not clipped.
    Raises:
        ConfigError: `uncovered-parameter`, a trained parameter has no gradient of its own for every patient;
            `bad-loss`.
    """

    def __call__(
        self,
        network: nn.Module,
        examples: Examples,
        slices: list[np.ndarray],
        *,
        max_slices: int,
        rows_per_batch: int,
        weights: list[np.ndarray] | None = None,
        loss: PerSampleLoss,
    ) -> Iterator[np.ndarray]: ...


ENGINES: dict[str, Engine] = {
    "opacus": hooked_gradients,
    "patient_loop": looped_gradients,
}
