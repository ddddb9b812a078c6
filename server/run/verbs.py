"""What each verb of `fedqc run` answers in each state of a run. docs/deploy.md shows the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from common.errors import ConfigError, FedqcError, RunError

State = Literal["unknown", "ordered", "running", "interrupted", "stopped", "failed", "partial", "completed"]
STATES: tuple[State, ...] = get_args(State)
"""unknown: nobody ordered it here; ordered: handed to the SuperLink, not begun; interrupted: its ServerApp
was killed; the others stand in the run's manifest.
"""
Verb = Literal["start", "resume", "stop", "watch"]
VERBS: tuple[Verb, ...] = get_args(Verb)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An answer that is an error."""

    code: str
    problem: str
    hint: str
    error: type[FedqcError] = ConfigError  # its exit status


_EXISTS = Refused(
    code="run-exists",
    problem="there is a run of this name",
    hint="fedqc run resume {run} continues it; or --name",
)
_UNKNOWN = Refused(code="no-such-run", problem="was never started here", hint="fedqc run list")
_RUNNING = Refused(
    code="run-running",
    problem="is running",
    hint="fedqc run watch {run} follows it, fedqc run stop {run} ends it",
)
_FINISHED = Refused(
    code="run-finished",
    problem="has finished",
    hint="fedqc report shows it; another run of the plan: fedqc run start PLAN",
)
_ENDED = Refused(
    code="run-not-running", problem="is not running: {state}", hint="fedqc run list shows the runs"
)
_GOES_ON = "continues after its last finished round"
_ENDS = "ends it; resume continues"


def _everywhere(answer: Refused, **others: str | Refused) -> dict[State, str | Refused]:
    return {state: others.get(state, answer) for state in STATES}


ANSWERS: dict[Verb, dict[State, str | Refused]] = {
    "start": _everywhere(_EXISTS, unknown="begins", ordered=_RUNNING),
    "resume": {
        "unknown": _UNKNOWN,
        "ordered": _RUNNING,
        "running": _RUNNING,
        "interrupted": _GOES_ON,
        "stopped": _GOES_ON,
        "failed": _GOES_ON,
        "partial": "asks again the sites that refused, or gave no score",
        "completed": _FINISHED,
    },
    "stop": _everywhere(_ENDED, unknown=_UNKNOWN, ordered=_ENDS, running=_ENDS, interrupted=_ENDS),
    "watch": {
        "unknown": _UNKNOWN,
        "ordered": "waits for its beginning",
        "running": "follows it",
        "interrupted": Refused(
            code="run-interrupted",
            problem="its ServerApp ended without a report",
            hint="fedqc run resume {run} continues from the last finished round",
            error=RunError,  # the run failed; the command is right
        ),
        "stopped": "shows its end",
        "failed": "shows its failure, and exits with its status",
        "partial": "shows its end; exit status 6",
        "completed": "shows its end",
    },
}


def admit(verb: Verb, state: State, run: str) -> None:
    """Permit a verb in a state.

    Raises:
        FedqcError: the class and the code that `ANSWERS` gives.
    """
    answer = ANSWERS[verb][state]
    if isinstance(answer, Refused):
        raise answer.error(
            f"{run}: {answer.problem.format(state=state)}",
            code=answer.code,
            hint=answer.hint.format(run=run),
        )


def table() -> str:
    """The table as Markdown."""
    lines = ["| a run that is | " + " | ".join(f"`run {verb}`" for verb in VERBS) + " |"]
    lines.append("|---" * (len(VERBS) + 1) + "|")
    for state in STATES:
        answers = (ANSWERS[verb][state] for verb in VERBS)
        cells = [f"`{one.code}`" if isinstance(one, Refused) else one for one in answers]
        lines.append(f"| {state} | {' | '.join(cells)} |")
    return "\n".join(lines)
