from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from common.errors import ConfigError
from common.privacy import (
    GaussianSteps,
    filter_admits,
    merge,
    noise_multiplier_for,
    pld_epsilon,
    rdp_epsilon,
)


def gaussian(noise_multiplier: float, sample_rate: float, steps: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


# (noise multiplier, sample rate, steps), delta, RDP as Opacus computes it, PLD as dp-accounting computes it
REFERENCE = [
    (gaussian(1.0, 0.064, 800), 1e-5, 14.056, 12.902),
    (gaussian(1.0, 0.0625, 800), 1e-5, 13.676, 12.550),
    (gaussian(1.0, 0.064, 800), 500**-1.1, 10.769, 9.517),
    (gaussian(1.5, 0.0625, 800), 1e-5, 6.872, 6.321),
    (gaussian(2.0, 0.0625, 800), 1e-5, 4.582, 4.214),
    (gaussian(4.0, 0.0625, 800), 1e-5, 1.957, 1.795),
    (gaussian(0.8, 0.0625, 800), 1e-5, 21.809, 19.958),
    (gaussian(1.0, 0.01, 1000), 1e-5, 2.101, 1.828),
    (gaussian(1.1, 256 / 60000, 14040), 1e-5, 2.594, 2.380),
    (gaussian(1.0, 1, 1), 1e-5, 4.729, 4.377),
    (gaussian(5.0, 1, 50), 1e-5, 7.077, 6.573),
    (gaussian(2.0, 0.0625, 16), 1e-5, 0.694, 0.593),
    (gaussian(2.0, 0.0625, 160), 1e-5, 1.961, 1.777),
]


@pytest.mark.parametrize(("steps", "delta", "rdp", "pld"), REFERENCE)
def test_epsilon_agrees_with_the_reference_table(
    steps: GaussianSteps, delta: float, rdp: float, pld: float
) -> None:
    assert rdp_epsilon([steps], delta) == pytest.approx(rdp, abs=0.01)
    assert pld_epsilon([steps], delta) == pytest.approx(pld, abs=0.01)
    assert pld_epsilon([steps], delta) <= rdp_epsilon([steps], delta)


def test_a_change_of_noise_is_composed_not_added() -> None:
    history = [gaussian(2.0, 0.0625, 400), gaussian(1.5, 0.0625, 400)]
    assert rdp_epsilon(history, 1e-5) == pytest.approx(5.829, abs=0.01)
    assert pld_epsilon(history, 1e-5) == pytest.approx(5.356, abs=0.01)
    assert rdp_epsilon(history, 1e-5) < rdp_epsilon(history[:1], 1e-5) + rdp_epsilon(history[1:], 1e-5)


def test_one_full_step_agrees_with_the_closed_form_of_the_gaussian_mechanism() -> None:
    """Balle and Wang 2018: delta(epsilon) = Phi(1/(2s) - epsilon s) - exp(epsilon) Phi(-1/(2s) - epsilon
    s).
    """
    for noise in (0.7, 1.0, 3.0):

        def excess(epsilon: float, noise: float = noise) -> float:
            middle = 1 / (2 * noise)
            return (
                norm.cdf(middle - epsilon * noise)
                - math.exp(epsilon) * norm.cdf(-middle - epsilon * noise)
                - 1e-5
            )

        exact = brentq(excess, 1e-6, 60)
        full = [gaussian(noise, 1.0, 1)]
        assert exact <= pld_epsilon(full, 1e-5) <= exact + 1e-3
        assert exact <= rdp_epsilon(full, 1e-5) <= 1.3 * exact


def test_the_divergence_agrees_with_an_adaptive_integral_and_with_dp_accounting() -> None:
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    from common.privacy import ORDERS, _divergence

    for noise, rate in [(0.3, 0.02), (0.8, 0.5), (1.0, 0.064), (3.0, 0.001), (20.0, 0.9)]:
        ours = dict(zip(ORDERS, _divergence(noise, rate), strict=True))
        for order in (1.1, 1.5, 2.6, 7.3):

            def integrand(x: float, order: float = order, noise: float = noise, rate: float = rate) -> float:
                ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
                return math.exp(norm.logpdf(x, scale=noise) + order * ratio)

            edges = np.arange(-13 * noise, order + 14 * noise, noise)
            moment = sum(quad(integrand, low, low + noise, epsabs=1e-16, epsrel=1e-12)[0] for low in edges)
            assert ours[order] == pytest.approx(math.log(moment) / (order - 1), rel=1e-6, abs=1e-10)
        for order in (2.0, 3.0, 16.0, 63.0, 256.0):
            theirs = RdpAccountant(orders=[order])
            theirs.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
            assert ours[order] == pytest.approx(float(theirs._rdp[0]), rel=1e-9, abs=1e-10)


@given(
    noise=st.floats(0.3, 30),
    rate=st.floats(1e-3, 1),
    steps=st.integers(1, 2000),
    delta=st.sampled_from([1e-4, 1e-5, 1e-6]),
)
@settings(max_examples=30, deadline=None)
def test_more_noise_fewer_patients_fewer_steps_cost_no_more(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    cost = rdp_epsilon([gaussian(noise, rate, steps)], delta)
    assert rdp_epsilon([gaussian(noise * 1.1, rate, steps)], delta) <= cost
    assert rdp_epsilon([gaussian(noise, rate * 0.9, steps)], delta) <= cost
    assert rdp_epsilon([gaussian(noise, rate, steps + 1)], delta) >= cost
    assert rdp_epsilon([gaussian(noise, rate, steps)], delta / 10) >= cost


def test_blocks_of_a_schedule_cost_what_the_schedule_costs() -> None:
    assert rdp_epsilon([gaussian(1.0, 0.05, 10)] * 20, 1e-5) == rdp_epsilon([gaussian(1.0, 0.05, 200)], 1e-5)
    assert rdp_epsilon([gaussian(1.0, 0.05, 200)], 1e-5) == pytest.approx(5.368, abs=0.01)
    assert merge([gaussian(1, 1, 2), gaussian(2, 1, 1), gaussian(1.0, 1.0, 3)]) == [
        gaussian(1, 1, 5),
        gaussian(2, 1, 1),
    ]


def test_no_noise_costs_infinity_and_nothing_costs_nothing() -> None:
    without = [gaussian(1.0, 0.1, 10), gaussian(0.0, 1.0, 1)]
    assert rdp_epsilon(without, 1e-5) == math.inf
    assert pld_epsilon(without, 1e-5) == math.inf
    assert rdp_epsilon([], 1e-5) == pld_epsilon([], 1e-5) == 0.0
    assert not filter_admits([], gaussian(0.0, 1.0, 1), epsilon=1e6, delta=1e-5)


def test_a_huge_epsilon_is_reported_not_computed_for_minutes() -> None:
    assert 400 < pld_epsilon([gaussian(0.1, 0.5, 10)], 1e-5) <= rdp_epsilon([gaussian(0.1, 0.5, 10)], 1e-5)


@pytest.mark.parametrize("noise", [-1.0, 1e-4, math.nan, math.inf, "1", True, None])
def test_a_noise_multiplier_out_of_range_is_refused(noise: object) -> None:
    with pytest.raises(ConfigError, match="noise_multiplier"):
        gaussian(noise, 0.1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan, math.inf, "0.1"])
def test_a_sample_rate_out_of_range_is_refused(rate: object) -> None:
    with pytest.raises(ConfigError, match="sample_rate"):
        gaussian(1.0, rate, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -5, 1.5, True, 10**9, math.nan])
def test_a_count_of_steps_out_of_range_is_refused(steps: object) -> None:
    with pytest.raises(ConfigError, match="steps"):
        gaussian(1.0, 0.1, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf, "1e-5"])
def test_a_delta_out_of_range_is_refused(delta: object) -> None:
    for function in (rdp_epsilon, pld_epsilon):
        with pytest.raises(ConfigError, match="delta"):
            function([gaussian(1.0, 0.1, 1)], delta)  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        noise_multiplier_for(epsilon, 1e-5, 0.1, 10)
    with pytest.raises(ConfigError, match="epsilon"):
        filter_admits([], gaussian(1.0, 0.1, 1), epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize(("rate", "steps"), [(0.064, 800), (0.256, 200), (1.0, 50), (0.032, 1550), (1.0, 1)])
@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_a_calibrated_plan_passes_the_gate_and_wastes_nothing(
    epsilon: float, rate: float, steps: int
) -> None:
    noise = noise_multiplier_for(epsilon, 1e-5, rate, steps)
    planned = gaussian(noise, rate, steps)
    assert rdp_epsilon([planned], 1e-5) <= epsilon
    assert filter_admits([], planned, epsilon=epsilon, delta=1e-5)
    assert rdp_epsilon([gaussian(noise - 0.001, rate, steps)], 1e-5) > epsilon
    assert noise == round(noise, 3)


def test_calibration_agrees_with_the_reference_table() -> None:
    assert noise_multiplier_for(8, 1e-5, 0.064, 800) == pytest.approx(1.38, abs=0.01)
    assert noise_multiplier_for(3, 1e-5, 0.064, 800) == pytest.approx(2.86, abs=0.01)
    assert noise_multiplier_for(8, 1e-5, 1.0, 50) == pytest.approx(4.51, abs=0.01)


def test_an_unreachable_epsilon_is_an_error_not_a_loop() -> None:
    with pytest.raises(ConfigError, match="reachable"):
        noise_multiplier_for(1e-9, 1e-5, 1.0, 1_000_000)


def test_the_filter_never_lets_the_whole_exceed_the_budget() -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        history: list[GaussianSteps] = []
        for _ in range(60):
            planned = gaussian(
                float(generator.uniform(0.5, 6)),
                float(generator.choice([0.01, 0.1, 0.5, 1.0])),
                int(generator.integers(1, 40)),
            )
            if filter_admits(history, planned, epsilon=8.0, delta=1e-5):
                history.append(planned)
        assert 0 < rdp_epsilon(history, 1e-5) <= 8.0


def test_the_filter_wastes_little_of_the_budget_on_repeated_runs() -> None:
    one = gaussian(3.0, 0.1, 20)
    history = []  # type: ignore[var-annotated]
    while filter_admits(history, one, epsilon=8.0, delta=1e-5):
        history.append(one)
    assert rdp_epsilon(history, 1e-5) > 7.9


def test_importing_the_accountant_is_cheap() -> None:
    heavy = "{'torch', 'opacus', 'dp_accounting', 'scipy', 'numpy', 'client'}"
    code = f"import sys, common.privacy; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
