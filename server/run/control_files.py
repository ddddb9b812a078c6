"""Files in the federation's folder through which `fedqc run` and the ServerApp exchange orders and outcomes.

The ServerApp gets two keys from Flower (plan and run-dir). What else a coordinator decided stands in
`state/orders/<run>.json`; what the rehearsal found, and why a run ended early, come back beside it. The run
folder itself is made once the run really begins.

A ServerApp that is killed writes nothing any more. So it holds the lock `<run>.lock` while it lives, which
the kernel lets go of for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from common.errors import ConfigError, FedqcError
from common.files import is_locked, locked
from common.strict import StrictModel, describe_validation
from server.run_folder import write_json

Outcome = Literal["check", "failure", "asking"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
"""What the rehearsal found; why the run ended early; who was asked and answered so far."""


class Order(StrictModel):
    """How a run was started."""

    mode: Literal["check", "train"] = "train"
    accept_missing: bool = False
    wait_s: float = Field(default=60, ge=0, le=1e5)  # for nodes to connect
    tuning: dict[str, Any] | None = None  # how the plan's settings were chosen, for a new run folder
    # of an evaluation by itself: the folder of the run that released the models, and who is asked
    source: str | None = None
    sites: tuple[str, ...] = ()


def order_path(federation: Path, run: str) -> Path:
    return federation / "state" / "orders" / f"{run}.json"


def write_order(federation: Path, run: str, order: Order) -> None:
    write_json(order_path(federation, run), order.model_dump(mode="json"))


def read_order(federation: Path, run: str) -> Order:
    """Raises ConfigError (code `no-order`): the run was not started by `fedqc run`."""
    path = order_path(federation, run)
    try:
        return Order.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation(error)}", code="no-order") from None
    except OSError:
        raise ConfigError(
            f"{path}: no such order",
            code="no-order",
            hint="start runs of a federation with `fedqc run start`",
        ) from None


def write_outcome(federation: Path, run: str, kind: Outcome, content: dict[str, Any]) -> None:
    write_json(order_path(federation, run).with_suffix(f".{kind}.json"), content)


def read_outcome(federation: Path, run: str, kind: Outcome) -> dict[str, Any] | None:
    """None where there is none (yet)."""
    try:
        found = json.loads(order_path(federation, run).with_suffix(f".{kind}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def forget_outcomes(federation: Path, run: str, kinds: Sequence[str] = OUTCOMES) -> None:
    for kind in kinds:
        order_path(federation, run).with_suffix(f".{kind}.json").unlink(missing_ok=True)


@contextmanager
def being_run(federation: Path, run: str) -> Iterator[None]:
    """One ServerApp at a time has a run.

    Raises:
        ConfigError: another has it (code `run-running`).
    """
    with locked(_lock_path(federation, run), busy=lambda: run_running(run)):
        yield


def is_being_run(federation: Path, run: str) -> bool:
    """Whether a ServerApp has this run, and lives."""
    return is_locked(_lock_path(federation, run))


def run_running(run: str) -> ConfigError:
    hint = f"fedqc run watch {run} follows it, fedqc run stop {run} ends it"
    return ConfigError(f"{run}: is running", code="run-running", hint=hint)


def _lock_path(federation: Path, run: str) -> Path:
    return order_path(federation, run).with_suffix(".lock")


def failure_of(error: FedqcError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "exit_status": error.exit_status,
    }
