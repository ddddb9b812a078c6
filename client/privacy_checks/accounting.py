"""Check the accountant against formulas and a library that it does not share code with."""

from __future__ import annotations

import math

from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from scipy.stats import norm

from client.privacy_checks.finding import Finding, Scene
from common.pricing import charges, plan_epsilon


def accountant(scene: Scene) -> Finding:
    """The plan's epsilon is not below what a second accountant finds for the same releases."""
    delta, claimed = scene.plan.privacy.delta, plan_epsilon(scene.plan)
    asked = list(charges(scene.plan).values())
    if all(one.sample_rate == 1 for one in asked):
        mu = math.sqrt(sum(one.steps / one.noise_multiplier**2 for one in asked))
        # of a Gaussian mechanism: Balle and Wang 2018 (arXiv 1805.06530), Theorem 8
        tails = norm.logcdf(mu / 2 - claimed / mu), claimed + norm.logcdf(-mu / 2 - claimed / mu)
        found = math.exp(tails[0]) - math.exp(tails[1])
        holds = found <= delta * (1 + 1e-9)
        measured = f"ε {claimed:.4f}: δ is {found:.3g} by the closed form"
        expected = f"at most {delta:g}"
    else:
        second = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
        for one in asked:
            step = dp_event.GaussianDpEvent(one.noise_multiplier)
            second.compose(dp_event.PoissonSampledDpEvent(one.sample_rate, step), one.steps)
        found = float(second.get_epsilon(delta))
        holds = claimed >= 0.98 * found
        measured = f"ε {claimed:.4f}; {found:.4f} by privacy loss distributions"
        expected = "the former not below the latter"
    if not claimed <= scene.plan.privacy.epsilon * (1 + 1e-9) and scene.plan.privacy.noise_multiplier is None:
        holds, measured = False, f"ε {claimed:.4f}, the plan asks for {scene.plan.privacy.epsilon:g}"
    return Finding(check="accountant", holds=holds, measured=measured, expected=expected)
