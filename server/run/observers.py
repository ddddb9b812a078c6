"""Events of a run and their observers: progress on stderr, `live.json` for `fedqc run watch`, notices."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.progress_bar import ProgressLine
from server.run_folder import write_json

LIVE = "live.json"


@dataclass(frozen=True, kw_only=True)
class RunBegan:
    run: str
    training: tuple[str, ...]  # names of sites
    held_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StageBegan:
    """The rounds of one arm at one group of sites begin, or continue."""

    stage: str  # name of the model that is trained: an arm, or arm/site
    sites: tuple[str, ...]
    rounds: int
    rounds_done: int  # by an earlier attempt


@dataclass(frozen=True, kw_only=True)
class SiteAnswered:
    stage: str
    round: int
    rounds: int
    site: str


@dataclass(frozen=True, kw_only=True)
class RoundClosed:
    stage: str
    round: int
    rounds: int
    record: dict[str, Any]  # the line of rounds.jsonl


@dataclass(frozen=True, kw_only=True)
class StageEndedEarly:
    """A stage ended before its last round, and the run goes on."""

    reason: str
    rounds_left: int


@dataclass(frozen=True, kw_only=True)
class ScoresTurnedAway:
    """A site's scores are none that its patients could give; the run goes on without them."""

    code: str
    reason: str  # one line, names the site


@dataclass(frozen=True, kw_only=True)
class EvaluationBegan:
    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    status: str
    models: int
    sites: int  # that were scored


Event = (
    RunBegan
    | StageBegan
    | SiteAnswered
    | RoundClosed
    | StageEndedEarly
    | EvaluationBegan
    | ScoresTurnedAway
    | RunFinished
)
Observer = Callable[[Event], None]


def compose(*observers: Observer) -> Observer:
    """One observer that passes each event to all of `observers`, in order."""

    def observe(event: Event) -> None:
        for observer in observers:
            observer(event)

    return observe


class Progress:
    """Report on stderr, in plain lines, what is done and about how long the rest will take.

    Args:
        total: units of work in all; a unit is one round of one group of sites, or the evaluation.
    """

    def __init__(self, total: int) -> None:
        self._line = ProgressLine(total)

    def __call__(self, event: Event) -> None:
        match event:
            case RunBegan(run=run, training=training, held_out=held_out):
                held = ", ".join(held_out) or "none"
                self._line.say(f"run {run}: {len(training)} training sites, held out: {held}")
            case StageBegan(rounds_done=done):
                self._line.skip(done)
            case SiteAnswered(stage=stage, round=number, rounds=rounds, site=site):
                self._line.note(f"{stage}: round {number} of {rounds}, {site} answered")
            case RoundClosed(stage=stage, round=number, rounds=rounds, record=record):
                sites = f"{len(record['answered'])} of {len(record['invited'])} sites"
                auroc = record["public"]["auroc"]
                self._line.advance(f"{stage}: round {number} of {rounds}, {sites}, public AUROC {auroc:.3f}")
            case StageEndedEarly(reason=reason, rounds_left=left):
                self._line.say(reason)
                self._line.skip(left)
            case ScoresTurnedAway(code=code, reason=reason):
                self._line.say(f"[{code}] {reason}")
            case RunFinished(models=models, sites=scored):
                self._line.advance(f"evaluation of {models} models at {scored} sites")


EMPTY: dict[str, Any] = {
    "stage": "start",
    "round": 0,
    "rounds": 0,
    "waiting": [],
    "done": 0,
    "units": 0,
    "claims": {},
}


class Live:
    """Write what the run is doing now to `live.json` of its folder. Public numbers only.

    Args:
        folder: of the run.
        units: rounds of all groups of sites, and one for the evaluation.
    """

    def __init__(self, folder: Path, *, units: int) -> None:
        self._path = folder / LIVE
        self._started = time.time()
        self._waiting: set[str] = set()
        self._state: dict[str, Any] = EMPTY | {"units": units}

    def __call__(self, event: Event) -> None:
        match event:
            case StageBegan(stage=stage, sites=sites, rounds=rounds, rounds_done=done):
                self._waiting = set(sites)
                self._update(stage=stage, round=done + 1, rounds=rounds, done=done)
            case SiteAnswered(stage=stage, round=number, site=site):
                self._waiting.discard(site)
                self._update(stage=stage, round=number)
            case RoundClosed(stage=stage, round=number, rounds=rounds, record=record):
                self._waiting.update(record["invited"])
                self._waiting.difference_update(record["refused"])
                self._update(
                    stage=stage,
                    round=min(number + 1, rounds),
                    done=1,
                    public=record["public"],
                    claims=record["claims"],
                )
            case StageEndedEarly(rounds_left=left):
                self._update(done=left)
            case EvaluationBegan(sites=sites):
                self._waiting = set(sites)
                self._update(stage="evaluation")
            case RunFinished(status=status):
                self._waiting = set()
                self._update(stage=status, done=1)

    def _update(self, *, done: int = 0, **changes: Any) -> None:
        """Write what changed; `done` more units are finished."""
        now = time.time()
        self._state |= changes | {
            "waiting": sorted(self._waiting),
            "done": self._state["done"] + done,
            "at": now,
            "seconds": round(now - self._started, 1),
        }
        write_json(self._path, self._state)


def read_live(folder: Path) -> dict[str, Any]:
    """The last state that a run wrote, with empty values for what it has not written yet."""
    empty = EMPTY | {"seconds": 0.0, "at": 0.0}
    try:
        return empty | json.loads((folder / LIVE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty


class Notices:
    """Notify the coordinator, once a stage and site, of a site that gave no valid answer or refused.

    Args:
        notify: called with (event, site, code); event is "silence" or "refusal".
    """

    def __init__(self, notify: Callable[[str, str, str], None]) -> None:
        self._notify = notify
        self._notified: set[str] = set()

    def __call__(self, event: Event) -> None:
        match event:
            case StageBegan():
                self._notified.clear()
            case RoundClosed(record=record):
                refusals = {site: refusal["code"] for site, refusal in record["refused"].items()}
                for kind, codes in (("silence", record["failed"]), ("refusal", refusals)):
                    for site, code in codes.items():
                        if site not in self._notified:
                            self._notified.add(site)
                            self._notify(kind, site, code)
