"""Talk on stderr while long work runs: plain lines, with the time left where it can be known."""

from __future__ import annotations

import sys
import time


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
            print(f"{clear}{text}", file=sys.stderr, flush=True)

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
