"""How far the noise of a private arm carries a model: known from plan and nominal number of patients, before
anything is charged.
"""

from __future__ import annotations

import math

from common.plan import RunPlan
from common.pricing import training_steps

SIGMAS = 8.0
"""A Gaussian value lies beyond this many deviations with probability 1.2e-15, so that none of the values of a
run does.
"""


def update_deviation(plan: RunPlan, nominal_patients: int) -> float:
    """Standard deviation, in weight units, of the noise in one weight of a site's update of one round.

    learning_rate * noise_multiplier * clip_norm / (sample_rate * nominal_patients) * sqrt(steps), see
    `client.dp.dp_sgd.train_private_head`.
    """
    privacy, steps = plan.privacy, training_steps(plan, 1)
    one = privacy.learning_rate * steps.noise_multiplier * privacy.clip_norm
    return one / (privacy.sample_rate * nominal_patients) * math.sqrt(steps.steps)


def update_excursion(plan: RunPlan, nominal_patients: int) -> float:
    """How far the noise alone carries one weight in a site's update of one round: `SIGMAS` deviations."""
    return SIGMAS * update_deviation(plan, nominal_patients)
