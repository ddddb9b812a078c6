"""Bind a run to the data that its first round used: images, labels and split, as keyed digests at the site.

A run that is resumed with other data is refused until the operator accepts the change. The coordinator learns
only that the site failed and, after an acceptance, the bare fact that data were changed.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError, RunError
from common.files import write_as_owner

RUNS = "runs"


@dataclass(frozen=True, kw_only=True)
class DataDigests:
    """What a run may depend on, as keyed digests. Local."""

    images: str  # the index version
    labels: Mapping[str, str]  # patient -> digest of the labels of its images
    split: Mapping[str, str]  # patient -> part


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What the site knows of a run's data: state/runs/*.json."""

    run: str
    plan_sha256: str
    since: str
    data: DataDigests
    refused: DataDigests | None = None  # other data that were met and not yet accepted
    changes: tuple[str, ...] = ()  # of `refused`: images, labels, split; or record, where it was lost
    accepted: tuple[dict[str, Any], ...] = ()  # when, by whom, which changes


def bind_data(
    state: Path,
    run: str,
    plan_sha256: str,
    data: DataDigests,
    *,
    opted_out: Collection[str] = (),
    took_part: bool = False,
) -> bool:
    """Keep the data of a run at its first use, and compare them at every later one.

    Args:
        opted_out: patients whose absence is no change.
        took_part: whether the ledger says that this site trained in the run. A record that is missing then
            was lost; without such a witness this is taken for the first use.
    Returns:
        whether the operator has accepted other data since the first round.
    Raises:
        DataError: the data have changed, or nobody knows any more what they were (code `data-changed`).
        RunError: the record of the first round cannot be written (code `not-writable`).
    """
    known = check_data(state, run, data, opted_out=opted_out)
    if known is None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        if took_part:
            lost = RunData(run=run, plan_sha256=plan_sha256, since=now, data=_UNKNOWN)
            _write(state, lost)
            raise _refused(state, lost, data, _LOST)
        try:
            _write(state, RunData(run=run, plan_sha256=plan_sha256, since=now, data=data))
        except ConfigError as error:  # as where the ledger meets a full disk: every first round writes here
            raise RunError(error.message, code=error.code, hint=error.hint) from error
    return known is not None and bool(known.accepted)


def check_data(
    state: Path, run: str, data: DataDigests, *, opted_out: Collection[str] = ()
) -> RunData | None:
    """Compare data with those of a run's first round; None where this site has taken no part in it.

    Raises:
        DataError: the data have changed (code `data-changed`).
    """
    known = _read(_path(state, run))
    if known is None:
        return None
    is_lost = known.data == _UNKNOWN
    changes = _LOST if is_lost else changes_between(known.data, data, opted_out=opted_out)
    if changes:
        raise _refused(state, known, data, changes)
    if known.refused is not None:
        _write(state, replace(known, refused=None, changes=()))
    return known


_UNKNOWN = DataDigests(images="", labels={}, split={})
_LOST = ("record",)
"""In place of what changed: nobody knows, because the record of the first round is gone."""


def _refused(state: Path, known: RunData, data: DataDigests, changes: tuple[str, ...]) -> DataError:
    """The refusal of other data, which the operator may accept from now on."""
    _write(state, replace(known, refused=data, changes=changes))
    run = known.run
    problem = f"the {' and '.join(changes)} of this site changed since the first round of run {run}"
    restore = "the data"
    if changes == _LOST:
        problem = f"the ledger holds run {run}, but the record of its data in state/{RUNS} is gone"
        restore = f"state/{RUNS} from the backup"
    return DataError(
        f"{problem} ({known.since})",
        code="data-changed",
        hint=f"restore {restore}, or accept the present data: fedqc site approve PLAN --changed-data {run}",
    )


def data_of_run(state: Path, run: str) -> DataDigests | None:
    """The data that a run is bound to; None where this site has taken no part in it.

    Raises:
        DataError: the record cannot be read (code `data-changed`).
    """
    known = _read(_path(state, run))
    return None if known is None else known.data


def changes_between(
    before: DataDigests, now: DataDigests, *, opted_out: Collection[str] = ()
) -> tuple[str, ...]:
    """Which of images, labels and split differ. A patient who opted out since is no difference."""
    gone = set(before.split) - set(now.split)
    changes = []
    if before.images != now.images or not gone <= set(opted_out) or set(now.split) - set(before.split):
        changes.append("images")
    for name in ("labels", "split"):
        then, here = getattr(before, name), getattr(now, name)
        if any(here[patient] != then[patient] for patient in here if patient in then):
            changes.append(name)
    return tuple(changes)


def accept_changed_data(state: Path, run: str, plan_sha256: str) -> tuple[str, ...]:
    """Accept the data that the last refusal met, and note when and by which user of this machine.

    Returns:
        what changed.
    Raises:
        ConfigError: `no-changed-data` (nothing was refused for this run and plan), `not-writable`.
    """
    known = _read(_path(state, run))
    if known is None or known.refused is None or known.plan_sha256 != plan_sha256:
        waiting = ", ".join(one.run for one in runs_refused(state)) or "none"
        raise ConfigError(
            f"run {run!r} of this plan was not refused for changed data",
            code="no-changed-data",
            hint=f"runs refused for changed data: {waiting}",
        )
    note = {
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "by": user_name(),
        "changes": list(known.changes),
    }
    _write(
        state,
        replace(known, data=known.refused, refused=None, changes=(), accepted=(*known.accepted, note)),
    )
    return known.changes


def runs_refused(state: Path) -> list[RunData]:
    """Runs that were refused because data changed, and whose change nobody has accepted."""
    known = (_read(path) for path in sorted((state / RUNS).glob("*.json")))
    return [one for one in known if one is not None and one.refused is not None]


def plan_of_run(state: Path, run: str) -> str:
    """The hash of the plan of a run that this site has begun; "" where it has not."""
    try:
        known = _read(_path(state, run))
    except DataError:
        return ""
    return "" if known is None else known.plan_sha256


def runs_of_plan(state: Path, plan_sha256: str) -> list[str]:
    """The runs of a plan that this site has begun, the oldest first; a record that cannot be read is none."""
    found = []
    for path in (state / RUNS).glob("*.json"):
        with suppress(DataError):
            known = _read(path)
            if known is not None and known.plan_sha256 == plan_sha256:
                found.append((known.since, known.run))
    return [run for _, run in sorted(found)]


def index_of_run(state: Path, run: str) -> str:
    """The index version that a run began with at this site; "" where it has not begun."""
    try:
        known = _read(_path(state, run))
    except DataError:
        return ""
    return "" if known is None else known.data.images


def user_name() -> str:
    """Who acts: under sudo the person, not root."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def _path(state: Path, run: str) -> Path:
    # the run's name comes from outside: no path is made of it
    return state / RUNS / f"{hashlib.sha256(run.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.json"


def _read(path: Path) -> RunData | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        refused = values.pop("refused")
        return RunData(
            **{name: values[name] for name in ("run", "plan_sha256", "since")},
            data=DataDigests(**values["data"]),
            refused=DataDigests(**refused) if refused else None,
            changes=tuple(values["changes"]),
            accepted=tuple(values["accepted"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: cannot be read: which data the run began with is unknown",
            code="data-changed",
            hint="run as the agent's user; restore the file from the backup",
        ) from None


def _write(state: Path, known: RunData) -> None:
    path = _path(state, known.run)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_as_owner(path, json.dumps(asdict(known)).encode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror})",
            code="not-writable",
            hint="run as the agent's user",
        ) from None
