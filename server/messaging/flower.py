"""What the coordinator's other modules need of Flower: the type of a grid, and its failures as our errors."""

from __future__ import annotations

import flwr.serverapp
import httpx
from flwr.supercore.run import RunNotRunningException

from common.errors import FedqcError, InternalError, RunError, denied_by_machine

Grid = flwr.serverapp.Grid

FAILURES: tuple[type[BaseException], ...] = (Exception, RunNotRunningException)
"""What ends a run. Flower's own is no subclass of Exception."""


def as_fedqc_error(error: BaseException, run: str) -> FedqcError:
    """The error to report to the coordinator for an exception that ended `run`.

    Returns:
        `error` itself if it is ours; `disk-full` and the like if this machine denied a file; `run-ended` if
        the SuperLink ended the run; `no-superlink` if it cannot be reached; else an InternalError that names
        the type only, as texts of others may hold paths.
    """
    if isinstance(error, FedqcError):
        return error
    if denied := denied_by_machine(error):
        hint = f"{denied.hint}; fedqc run resume {run} continues the run"
        return RunError(denied.message, code=denied.code, hint=hint)
    if isinstance(error, RunNotRunningException):
        return RunError(
            "the SuperLink ended the run: it was stopped, or sent no heartbeat for a minute",
            code="run-ended",
            hint=f"fedqc run resume {run} continues it",
        )
    if isinstance(error, httpx.TransportError):
        return RunError(
            "the SuperLink cannot be reached",
            code="no-superlink",
            hint=(
                "it was stopped, or its certificate has expired (fedqc federation renew); then fedqc run "
                f"resume {run} continues the run"
            ),
        )
    return InternalError(type(error).__name__, hint="the ServerApp's log has more")
