"""Sample the patients of a step (Poisson sampling), and the slices of a patient.

The promise: each patient is in the step with probability `sample_rate`, exactly, independently of every other
patient and of every other step. That is what amplification by subsampling is accounted for; a shuffled or
fixed-size batch is not this and costs more than its epsilon says. The unit is the patient, so one patient's
slices come together or not at all.
"""

from __future__ import annotations

import numpy as np

from client.dp.coins import Coins
from common.errors import ConfigError


def sample_patients(num_patients: int, sample_rate: float, coins: Coins) -> np.ndarray:
    """The positions of the patients that take part in one step, ascending; may be empty, which is still a
    step.

    Args:
        num_patients: how many there are. Private: it never enters a divisor, only the number of coins.
        sample_rate: public. 1 takes everyone and draws nothing, the plain Gaussian mechanism.
        coins: of this training. Coins that someone could reproduce void the amplification.
    Raises:
        ConfigError: `bad-privacy-parameters`, the rate is no probability above 0.
    """
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"sample_rate = {sample_rate!r} must be above 0 and at most 1", code="bad-privacy-parameters"
        )
    return np.flatnonzero(coins.bernoulli(num_patients, sample_rate))


def draw_slices(rows: np.ndarray, most: int, coins: Coins) -> np.ndarray:
    """At most `most` of a patient's rows, without replacement. A function of this patient's rows and fresh
    coins only.
    """
    return rows if len(rows) <= most else coins.choose(rows, most)


def rows_by_patient(patients: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """`rows` of each patient, in the order of patients; [] where there is none.

    Args:
        patients: shape (slices,), whose slice each is; numbers or names.
        rows: which of them, shape (n,).
    """
    if not len(rows):
        return []
    _, owner = np.unique(patients[rows], return_inverse=True)
    order = np.argsort(owner, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(owner[order])) + 1)
