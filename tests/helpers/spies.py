"""What a function is called with, while it does what it does."""

from __future__ import annotations

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
