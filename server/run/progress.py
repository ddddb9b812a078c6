"""Talk on stderr while long work runs: plain lines, with the time left where it can be known."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from common.progress_bar import ProgressLine
from server.run_folder import write_json

LIVE = "live.json"


Progress = ProgressLine  # a unit is one round of one group of sites


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
