"""Work in progress at a site: its public steps are reported, and it ends when its caller has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import RunError


class NoAnswer(Exception):
    """A hospital's work failed for a reason that may lie in its data: to the coordinator the agent is away.

    A refusal would tell a failure of the data from a machine that is switched off.
    """


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work in progress: who is notified of its public steps, and whether its answer is still awaited."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def ticker(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback for loops: reports each new step number once, and ends the loop by a RunError (code
        `cancelled`) when the caller has gone.
        """
        reported = -1

        def tick(done: int) -> None:
            nonlocal reported
            if self.cancelled.is_set():
                raise RunError("the caller no longer waits for this answer", code="cancelled")
            if done != reported:
                reported = done
                self.progress(stage, done, total)

        return tick
