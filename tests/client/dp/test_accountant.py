"""Our accountants agree with those of Opacus."""

from __future__ import annotations

import pytest
from opacus.accountants import IAccountant, create_accountant

from common.privacy import GaussianSteps, merge, pld_epsilon, rdp_epsilon


def gaussian(noise_multiplier: float, sample_rate: float, steps: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


def opacus_accountant(history: list[GaussianSteps], mechanism: str = "rdp") -> IAccountant:
    """An Opacus accountant ("rdp" or "prv") that has seen `history`."""
    accountant = create_accountant(mechanism=mechanism)
    accountant.history = [(one.noise_multiplier, one.sample_rate, one.steps) for one in merge(history)]
    return accountant


@pytest.mark.parametrize(
    "history",
    [
        [gaussian(1.0, 0.064, 800)],
        [gaussian(2.0, 0.0625, 400), gaussian(1.5, 0.0625, 400)],
        [gaussian(5.0, 1.0, 50), gaussian(10.0, 1.0, 1)],
    ],
)
def test_opacus_agrees_with_our_accountants(history: list[GaussianSteps]) -> None:
    assert opacus_accountant(history).get_epsilon(delta=1e-5) == pytest.approx(
        rdp_epsilon(history, 1e-5), abs=2e-3
    )
    if any(entry.sample_rate == 1 for entry in history):
        return  # Opacus' PRV divides by zero there
    prv = opacus_accountant(history, "prv").get_epsilon(delta=1e-5)
    assert pld_epsilon(history, 1e-5) == pytest.approx(prv, abs=0.012)
