"""A folder with good sites and a good plan, for a test to spoil."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.cli import main
from tests.helpers.consortium import SITES, write_plan

A = SITES[0]


def run(words: list[object]) -> object:
    """The command line in this process; its exit status."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return caught.value.code


@dataclass
class Room:
    """A folder with good sites, a good plan and no run, for a test to spoil."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "run"

    def site(self, name: str = A) -> Path:
        return self.data / name

    def ask(self, **changes: Any) -> None:
        write_plan(self.plan, **changes)
