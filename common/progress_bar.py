"""How far long work is, on stderr: a bar with the time left on a terminal, a plain line now and then
elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STAGES = {"headers": "reading headers", "slices": "decoding slices", "verify": "verifying the cache"}
SECONDS_BETWEEN_LINES = 10.0
QUIET_S = 1.0  # work that is done by then is not talked about

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of how many are done."""


def say(text: str) -> None:
    """Print a progress message on stderr, at once."""
    # one write: Ctrl-C cannot part a line from its end
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


@contextmanager
def progress_shown() -> Iterator[Progress]:
    """A callback for `load_or_build`; shows nothing of what takes less than a second."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        shown_at = 0.0

        def show(stage: str, done: int, total: int) -> None:
            nonlocal shown_at
            now = time.monotonic()
            if done < total and now - shown_at < 0.1:
                return
            shown_at = now
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _lines() -> Progress:
    began: dict[str, float] = {}
    told: dict[str, float] = {}

    def show(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(stage, now)
        waited = now - told.setdefault(stage, now)
        if 0 < done < total and waited >= SECONDS_BETWEEN_LINES:
            told[stage] = now
            say(
                f"{STAGES.get(stage, stage)}: {done} of {total}, "
                f"{_time_left((now - start) / done * (total - done))} left"
            )
        elif done == total and now - start >= QUIET_S:
            say(f"{STAGES.get(stage, stage)}: {total} of {total} in {_time_left(now - start)}")

    return show


def _time_left(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
