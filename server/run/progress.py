"""Talk on stderr while long work runs: plain lines, with the time left where it can be known."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from server.run_folder import write_json

LIVE = "live.json"


class Progress:
    """Counts units of work and says what is done and how long the rest may take.

    Args:
        total: units of work in all; a unit is one round of one group of sites.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total, self._done, self._quiet = total, 0, quiet
        self._started = time.monotonic()
        self._skipped = 0

    def say(self, text: str) -> None:
        if not self._quiet:
            clear = "\r\033[K" if sys.stderr.isatty() else ""
            # one write: Ctrl-C cannot part a line from its end
            print(f"{clear}{text}\n", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What is happening right now, on one line that the next replaces; on a terminal only."""
        if not self._quiet and sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def skip(self, units: int) -> None:
        """Units that an earlier attempt did; they say nothing of this machine's speed today."""
        self._skipped += units

    def advance(self, text: str, units: int = 1) -> None:
        self._done += units
        left = self._total - self._skipped - self._done
        elapsed = time.monotonic() - self._started
        rest = f", about {_duration(elapsed / self._done * left)} left" if left > 0 else ""
        self.say(f"[{self._done + self._skipped}/{self._total}] {text}{rest}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Live:
    """What a run is doing now, in `live.json` of its folder, for `fedqc run watch`. Public numbers only.

    Args:
        folder: of the run; None writes nothing (a simulation talks on its own terminal).
        units: rounds of all groups of sites, and one for the evaluation.
    """

    def __init__(self, folder: Path | None, *, units: int) -> None:
        self._path = folder / LIVE if folder else None
        self._started = time.time()
        self._state: dict[str, Any] = {
            "units": units,
            "done": 0,
            "stage": "start",
            "round": 0,
            "rounds": 0,
            "waiting": [],
            "claims": {},
        }

    def update(self, *, done: int = 0, **changes: Any) -> None:
        """Note what changed; `done` units were finished."""
        now = time.time()
        self._state |= changes | {
            "done": self._state["done"] + done,
            "at": now,
            "seconds": round(now - self._started, 1),
        }
        if self._path:
            write_json(self._path, self._state)


def read_live(folder: Path) -> dict[str, Any]:
    """The last note of a run, with empty values for what it does not say (yet)."""
    empty = {
        "stage": "start",
        "round": 0,
        "rounds": 0,
        "waiting": [],
        "done": 0,
        "units": 0,
        "seconds": 0.0,
        "at": 0.0,
        "claims": {},
    }
    try:
        return empty | json.loads((folder / LIVE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty
