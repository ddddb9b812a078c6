"""Format numbers for the page: three decimals, a real minus sign, and no zero for what was not measured."""

from __future__ import annotations

Number = float | None


def score(value: float) -> str:
    return f"{value:.3f}"


def signed(value: float) -> str:
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text in ("+0.000", "−0.000") and value == 0 else text


def plain(value: float) -> str:
    return f"{value:g}"
