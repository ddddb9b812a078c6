"""Sample the patients of a step (Poisson sampling).

The promise: each patient is in the step with probability `sample_rate`, independently of every other patient
and of every other step. That is what amplification by subsampling is accounted for; a shuffled or fixed-size
batch is not this and costs more than its epsilon says. The unit is the patient, so one patient's slices come
together or not at all.
"""

from __future__ import annotations

import numpy as np

from client.dp.noise import fresh_generator
from common.errors import ConfigError


def sample_patients(
    num_patients: int, sample_rate: float, generator: np.random.Generator | None = None
) -> np.ndarray:
    """The positions of the patients that take part in one step, ascending; may be empty, which is still a
    step.

    Args:
        num_patients: how many there are. Private: it never enters a divisor, only the number of coins.
        sample_rate: public. 1 takes everyone and draws nothing, the plain Gaussian mechanism.
        generator: None draws from a new generator keyed by the operating system, for this step only. A
            generator that someone could reproduce voids the amplification; pass one only in tests and in runs
            marked not private.
    """
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"sample_rate = {sample_rate!r} must be above 0 and at most 1", code="bad-privacy-parameters"
        )
    if sample_rate == 1:
        return np.arange(num_patients)
    generator = fresh_generator() if generator is None else generator
    return np.flatnonzero(generator.random(num_patients) < sample_rate)
