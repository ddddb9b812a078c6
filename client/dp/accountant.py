"""Our history in the form of Opacus' accountants, for readers who know those and for the cross-check in the
tests.

Opacus' accountants trust their input and know neither unit nor delta: they report, they never gate.
"""

from __future__ import annotations

from collections.abc import Sequence

from opacus.accountants import IAccountant, create_accountant

from common.errors import ConfigError
from common.privacy import GaussianSteps, merge


def opacus_history(history: Sequence[GaussianSteps]) -> list[tuple[float, float, int]]:
    """(noise multiplier, sample rate, steps) of each mechanism."""
    return [(entry.noise_multiplier, entry.sample_rate, entry.steps) for entry in merge(history)]


def opacus_accountant(history: Sequence[GaussianSteps], mechanism: str = "rdp") -> IAccountant:
    """An Opacus accountant ("rdp" or "prv") that has seen `history`.

    Raises:
        ConfigError: the history is empty or holds a step without noise, on which Opacus fails or answers 0;
            or "gdp" is asked for, which is optimistic.
    """
    if mechanism not in ("rdp", "prv"):
        raise ConfigError(
            f"accountant {mechanism!r} is not offered", code="bad-privacy-parameters", hint="known: rdp, prv"
        )
    if not history or not all(entry.is_private for entry in history):
        raise ConfigError(
            "an Opacus accountant needs a history, every step of it with noise", code="bad-privacy-parameters"
        )
    accountant = create_accountant(mechanism=mechanism)
    accountant.history = opacus_history(history)
    return accountant
