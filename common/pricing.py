"""Price a plan: the noise of each release about one patient, so that all of them together cost its epsilon.

The coordinator writes the noise multipliers into the plan (`with_noise`) before it signs it; a hospital
prices the signed text (`charges`, `plan_epsilon`) and trusts no number of the coordinator's beside it. A plan
of an earlier version has no noise multipliers: its private arm then has that of the earlier version, by which
an interrupted run was charged.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from common.arms import ARMS
from common.errors import PlanError
from common.plan import RunPlan
from common.privacy import (
    MAX_NOISE_MULTIPLIER,
    SMALLEST_NOISE_MULTIPLIER,
    GaussianSteps,
    epsilon_of,
    gdp_max_mu,
    noise_multiplier_for,
    rdp_epsilon,
)

EVALUATION = "evaluation"


def with_noise(plan: RunPlan) -> RunPlan:
    """The plan with the noise multipliers of its private arms and its evaluation, where it states none.

    The evaluation gets `privacy.evaluation_share` of mu^2, everything where no arm is private; the private
    arms share the rest evenly. A function of the plan alone: coordinator and hospital get the same text.

    Raises:
        PlanError: its settings are still to be chosen (code `settings-open`).
        ConfigError: no noise multiplier makes the plan cost its epsilon.
    """
    privacy, arms = plan.privacy, _private_arms(plan)
    share = privacy.evaluation_share if arms else math.ceil(privacy.evaluation_share)
    found: dict[str, float] = {}
    if privacy.evaluation_noise_multiplier is None and share > 0:
        needed = 1 / (math.sqrt(share) * gdp_max_mu(privacy.epsilon, privacy.delta))
        noise = min(max(math.ceil(needed * 1000) / 1000, SMALLEST_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)
        found["evaluation_noise_multiplier"] = noise
    plan = _with_privacy(plan, found)
    if privacy.settings == "auto":
        raise PlanError(
            "privacy.settings = auto: the coordinator chooses the settings before it signs the plan",
            code="settings-open",
            hint="fedqc run tune PLAN --out FILE writes the plan with them",
        )
    if arms and privacy.noise_multiplier is None:
        steps = (
            (1 if privacy.alternatives else len(arms)) * plan.private_steps_per_round * plan.training.rounds
        )
        scored = _evaluation(plan)
        noise = noise_multiplier_for(
            privacy.epsilon,
            privacy.delta,
            privacy.sample_rate,
            steps,
            besides=[scored] if scored else [],
        )
        plan = _with_privacy(plan, {"noise_multiplier": noise})
    return plan


def training_steps(plan: RunPlan, rounds: int | None = None) -> GaussianSteps:
    """What one private arm does to one patient over `rounds`, by default all of the plan's."""
    return GaussianSteps(
        noise_multiplier=_noise(plan),
        sample_rate=plan.privacy.sample_rate,
        steps=plan.private_steps_per_round * (plan.training.rounds if rounds is None else rounds),
    )


def charges(plan: RunPlan, *, trains: bool = True, noise: float | None = None) -> dict[str, GaussianSteps]:
    """Everything a plan asks of one patient of a hospital: private arm or `EVALUATION` -> its noisy sums.

    Args:
        trains: False for a held-out site, which is only scored.
        noise: the noise multiplier of the private arms where it is not the plan's: a request that was
            reserved before keeps the noise of its reservation.
    """
    found = {arm: training_steps(plan) for arm in _private_arms(plan) if trains}
    if noise is not None:
        found = {arm: replace(steps, noise_multiplier=noise) for arm, steps in found.items()}
    if scored := _evaluation(plan):
        found[EVALUATION] = scored
    return found


def plan_epsilon(plan: RunPlan, *, trains: bool = True, noise: float | None = None) -> float:
    """Epsilon at the plan's delta of everything it asks of one patient; 0 where it asks for no noisy sum.

    Args:
        trains, noise: as `charges`.
    """
    return epsilon_of(schedule(plan, trains=trains, noise=noise), plan.privacy.delta)


def schedule(plan: RunPlan, *, trains: bool = True, noise: float | None = None) -> list[GaussianSteps]:
    """The noisy sums behind a plan's epsilon: all of them; of alternatives, one arm and the evaluation.

    Args:
        trains, noise: as `charges`.
    """
    found = charges(plan, trains=trains, noise=noise)
    if plan.privacy.alternatives:
        arms = [arm for arm in found if arm != EVALUATION]
        found = {arm: steps for arm, steps in found.items() if arm not in arms[1:]}
    return list(found.values())


def _private_arms(plan: RunPlan) -> list[str]:
    return [arm for arm in plan.arms if ARMS[arm].private]


def _evaluation(plan: RunPlan) -> GaussianSteps | None:
    noise = plan.privacy.evaluation_noise_multiplier
    return None if noise is None else GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=1)


@functools.lru_cache(maxsize=64)
def _noise(plan: RunPlan) -> float:
    """The noise multiplier of a private arm."""
    privacy = plan.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    steps = plan.private_steps_per_round * plan.training.rounds
    return noise_multiplier_for(privacy.epsilon, privacy.delta, privacy.sample_rate, steps, cost=rdp_epsilon)


def _with_privacy(plan: RunPlan, values: dict[str, float]) -> RunPlan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=values)}) if values else plan
