"""Format numbers for the page: three decimals, a real minus sign, and no zero for what was not measured."""

from __future__ import annotations

Number = float | None


def score(value: float) -> str:
    return f"{value:.3f}"


def cut(value: float) -> str:
    """An end of a score's interval, inside [0, 1]: Wald's may stick out."""
    return f"{min(max(value, 0.0), 1.0):.3f}"


def sticks_out(low: Number, high: Number) -> bool:
    return (low is not None and low < 0) or (high is not None and high > 1)


def signed(value: float) -> str:
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text in ("+0.000", "−0.000") and value == 0 else text


def plain(value: float) -> str:
    return f"{value:g}"
