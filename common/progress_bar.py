"""Show the progress of long work on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.terminal import print

STAGES = {"headers": "reading headers", "slices": "decoding slices", "verify": "verifying the cache"}
SPEAK_S = 8.0
"""A wait says so this often at least."""
_ERASE_LINE = "\r\033[K"
QUIET_S = 1.0  # shorter work prints nothing

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how many items of it are done, and how many there are."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def say(text: str) -> None:
    """Print a progress message on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def speaking(text: str, say: Callable[[str], None] = say) -> Iterator[None]:
    """Say what is waited for: at once, and every `SPEAK_S` seconds again until the wait is over."""
    began, over = time.monotonic(), threading.Event()

    def repeat() -> None:
        while not over.wait(SPEAK_S):
            say(f"{text}  ({time.monotonic() - began:.0f} s)")

    say(text)
    speaker = threading.Thread(target=repeat, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


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
    printed_at: dict[str, float] = {}

    def show(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(stage, now)
        waited = now - printed_at.setdefault(stage, now)
        if 0 < done < total and waited >= SPEAK_S:
            printed_at[stage] = now
            say(
                f"{STAGES.get(stage, stage)}: {done} of {total}, "
                f"{duration((now - start) / done * (total - done))} left"
            )
        elif done == total and now - start >= QUIET_S:
            say(f"{STAGES.get(stage, stage)}: {total} of {total} in {duration(now - start)}")

    return show


class ProgressLine:
    """Counts units of work and prints on stderr how many are done and how long the rest may take.

    Args:
        total: units of work in all.
        quiet: print nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total, self._done, self._quiet = total, 0, quiet
        self._started = time.monotonic()
        self._skipped = 0

    def say(self, text: str) -> None:
        """Print a line; on a terminal it replaces the last note."""
        if not self._quiet:
            sys.stderr.write(_ERASE_LINE if sys.stderr.isatty() else "")
            say(text)

    def note(self, text: str) -> None:
        """Show what happens now, on one line that the next replaces; on a terminal only."""
        if not self._quiet and sys.stderr.isatty():
            sys.stderr.write(_ERASE_LINE)
            print(text, end="", file=sys.stderr, flush=True)

    def skip(self, units: int) -> None:
        """Units that an earlier attempt did; they are not used to estimate the time left."""
        self._skipped += units

    def advance(self, text: str, units: int = 1) -> None:
        """Count finished units and print `text` with the time left."""
        self._done += units
        left = self._total - self._skipped - self._done
        elapsed = time.monotonic() - self._started
        rest = f", about {duration(elapsed / self._done * left)} left" if left > 0 else ""
        self.say(f"[{self._done + self._skipped}/{self._total}] {text}{rest}")


def duration(seconds: float) -> str:
    """A time span as people read it: `38 s`, `1 min 05 s`, `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
