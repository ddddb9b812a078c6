from __future__ import annotations

import pytest

from client.dp.accountant import opacus_accountant, opacus_history
from common.errors import ConfigError
from common.privacy import GaussianSteps, pld_epsilon, rdp_epsilon


def gaussian(noise_multiplier: float, sample_rate: float, steps: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


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


def test_steps_keep_counting_in_an_opacus_accountant() -> None:
    accountant = opacus_accountant([gaussian(2.0, 0.5, 3), gaussian(2.0, 0.5, 4)])
    accountant.step(noise_multiplier=2.0, sample_rate=0.5)
    assert accountant.history == opacus_history([gaussian(2.0, 0.5, 8)])


def test_what_opacus_would_answer_wrongly_is_not_asked() -> None:
    for history, mechanism in [
        ([], "rdp"),
        ([gaussian(0.0, 1.0, 1)], "rdp"),
        ([gaussian(1.0, 1.0, 1)], "gdp"),
    ]:
        with pytest.raises(ConfigError):
            opacus_accountant(history, mechanism)
