"""What a function is called with, while it does what it does."""

from __future__ import annotations

import time
from typing import Any

import pytest


def spied(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[tuple[Any, ...]]:
    """The positional arguments of every call of `where.name` from now on."""
    seen: list[tuple[Any, ...]] = []
    real = getattr(where, name)

    def spy(*args: Any, **more: Any) -> Any:
        seen.append(args)
        return real(*args, **more)

    monkeypatch.setattr(where, name, spy)
    return seen


def slow_until_spoken(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, result: Any = None
) -> list[str]:
    """Replace `where.name` by work that ends when the operator was told three times what is waited for, or
    after 10 s.

    Returns:
        what the operator was told.
    """
    told: list[str] = []

    def tell(text: str, **more: Any) -> None:
        told.append(text)

    def slow(*args: Any, **more: Any) -> Any:
        until = time.monotonic() + 10
        while len(told) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        return result

    monkeypatch.setattr("common.progress_bar.SPEAK_S", 0.02)
    monkeypatch.setattr("common.progress_bar.print", tell)
    monkeypatch.setattr(where, name, slow)
    return told
