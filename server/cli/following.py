"""Hand a run of a federation to the SuperLink, and follow it by the files that its ServerApp writes."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.cli import INTERRUPTED, Format
from common.errors import ConfigError, NetworkError, RunError, denied_by_machine
from common.plan import RunPlan
from common.privacy import epsilon_text
from common.progress_bar import SPEAK_S, ProgressLine, duration, say, speaking
from common.terminal import print

if TYPE_CHECKING:
    from server.federation.registry import Federation
    from server.run.control_files import Order
    from server.run.verbs import State
    from server.run_folder import RunFolder

PARTIAL = 6
INTERRUPTED_RUN = "interrupted"
CONNECTION = "fedqc"
POLL_S = 1.0
MAX_NAME_BYTES = 192
"""Of a run's name: files are named after it, and 255 is the most that a file system takes."""


def run_state(federation: Federation, name: str) -> State:
    """The state of a run of the federation, as `server.run.verbs` names it."""
    from server.run.control_files import is_being_run, read_outcome

    plan_file = run_folder_named(federation, name) / "plan.yaml"
    if plan_file.is_file():
        return cast("State", state_of(federation, plan_file)["status"])
    if is_being_run(federation.folder, name):
        return "ordered"
    was_ordered = flower_file(federation, name).is_file()
    is_waiting = was_ordered and read_outcome(federation.folder, name, "failure") is None
    return "ordered" if is_waiting else "unknown"


def state_of(federation: Federation, plan_file: Path) -> dict[str, Any]:
    """What is known of a run from its folder."""
    from server.run.control_files import is_being_run, read_outcome
    from server.run.observers import read_live
    from server.run_folder import RunFolder

    folder = RunFolder.open(plan_file.parent)
    name = folder.path.name
    began = read_outcome(federation.folder, name, "check") is not None
    # looked at between the two: what a ServerApp writes, it writes while it lives
    is_alive = is_being_run(federation.folder, name)
    live, manifest, failure = (
        read_live(folder.path),
        folder.manifest,
        read_outcome(federation.folder, name, "failure"),
    )
    status = "failed" if failure else manifest["status"]
    if status == "running" and began and not is_alive:
        status = INTERRUPTED_RUN
    return {
        "run": name,
        "status": status,
        "failure": failure,
        "sites": len(manifest["sites"]),
        **{
            key: live[key]
            for key in ("stage", "round", "rounds", "waiting", "done", "units", "seconds", "at", "claims")
        },
        "public": live.get("public"),
    }


def run_folder_named(federation: Federation, name: str) -> Path:
    """Raises ConfigError (code `bad-argument`) unless a run may have this name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise ConfigError(f"--name {name!r}: must be a plain name", code="bad-argument")
    return federation.runs / name


def flower_file(federation: Federation, name: str) -> Path:
    return federation.state / "orders" / f"{name}.flower.json"


def flower_id(federation: Federation, name: str) -> str:
    try:
        return str(json.loads(flower_file(federation, name).read_text(encoding="utf-8"))["run-id"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{name}: was never started here", code="no-such-run", hint="fedqc run list"
        ) from None


def print_now(line: str) -> None:
    """Print a line of data without waiting for more."""
    print(line, flush=True)


def toml_string(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def await_superlink(federation: Federation, wait_s: float) -> None:
    """Wait for a SuperLink that is being restarted.

    Raises:
        NetworkError: it does not answer within `wait_s` (code `no-superlink`).
    """
    from server.federation.services import superlink_answers

    until = time.monotonic() + wait_s
    if superlink_answers(federation):
        return
    with speaking(f"waiting for the SuperLink, for at most {wait_s:g} s"):
        while time.monotonic() < until:
            time.sleep(POLL_S)
            if superlink_answers(federation):
                return
    hint = "fedqc federation start"
    raise NetworkError(f"the SuperLink does not answer, in {wait_s:g} s", code="no-superlink", hint=hint)


def submit(federation: Federation, plan: RunPlan, name: str, order: Order) -> str:
    """Hand a run to the SuperLink; gives Flower's id of it.

    Raises:
        NetworkError: it does not answer. RunError: as `_raise_unwritable`.
    """
    from common.files import write_bytes
    from server.federation.services import flower
    from server.run.control_files import forget_outcomes, write_order
    from server.run_folder import write_json

    for line in federation.enrolments_to_renew():
        say(line)
    await_superlink(federation, order.wait_s)
    _raise_unwritable(federation, name)
    forget_outcomes(federation.folder, name)
    write_order(federation.folder, name, order)
    values = {"plan": plan.canonical_json(), "run-dir": str(federation.runs / name)}
    config = federation.state / "orders" / f"{name}.toml"
    write_bytes(config, "".join(f"{key} = {toml_string(text)}\n" for key, text in values.items()).encode())
    with speaking(f"{name}: handing over the plan"):
        said = flower(federation, "run", str(federation.bundle), CONNECTION, "--run-config", str(config))
    flower_id = str(said["run-id"])
    say(f"{name}: handed to the SuperLink, which starts its ServerApp; then the sites are asked")
    write_json(flower_file(federation, name), {"run-id": flower_id})
    return flower_id


def continue_run(federation: Federation, found: RunFolder, order: Order) -> None:
    """Hand an ended run of a federation to the SuperLink again.

    Raises:
        NetworkError, RunError: as `submit`.
    """
    from common.files import sweep
    from server.federation.services import flower

    folder = found.path
    sweep(*(path for path in (folder, *folder.rglob("*")) if path.is_dir()))
    await_superlink(federation, order.wait_s)
    with suppress(RunError), speaking(f"{folder.name}: ending what is left of it at the SuperLink"):
        # it has ended there too, or was never heard of
        # else nodes wait for the rest of what was being sent
        flower(federation, "stop", flower_id(federation, folder.name), CONNECTION)
    submit(federation, found.plan, folder.name, order)
    # else `watch` would take how it ended before for how it ended now
    found.update_manifest(status="running")


def await_outcome(federation: Federation, name: str, look: Any, *, limit_s: float) -> Any:
    """What `look` finds, once it finds something; or the failure that the ServerApp wrote down."""
    from server.run.control_files import read_outcome

    began = spoke = time.monotonic()
    told = ""
    while time.monotonic() < began + limit_s:
        found = look()
        if found is not None:
            return found
        _raise_failure(federation, name)
        now = time.monotonic()
        asking = (read_outcome(federation.folder, name, "asking") or {}).get("text", "")
        if asking not in ("", told) or now - spoke >= SPEAK_S:
            spoke, told = now, asking or told
            _raise_unwritable(federation, name)
            say(f"{told or 'waiting for the ServerApp'}  ({now - began:.0f} s)")
        time.sleep(0.2)
    raise NetworkError(
        f"{name}: no answer within {limit_s:g} s",
        code="no-answer",
        hint="fedqc federation sites; state/superexec.log",
    )


def _raise_failure(federation: Federation, name: str) -> None:
    from common import errors
    from server.run.control_files import read_outcome

    failure = read_outcome(federation.folder, name, "failure")
    if failure is None:
        return
    kinds = {
        kind.exit_status: kind
        for kind in (errors.InternalError, errors.RunError, errors.ConfigError, errors.NetworkError)
    }
    if failure["exit_status"] == errors.RefusedError.exit_status:
        raise errors.RefusedError(failure["message"], code=failure["code"], hint=failure["hint"])
    raise kinds.get(failure["exit_status"], errors.RunError)(
        failure["message"], code=failure["code"], hint=failure["hint"]
    )


def _raise_unwritable(federation: Federation, name: str) -> None:
    """Raises RunError (`disk-full`, `not-writable`): nothing more can be written into the folder of a run, or
    into the federation's where there is none yet. Then the ServerApp can neither work nor say so.
    """
    run = federation.runs / name
    folder = run if run.is_dir() else federation.folder
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        denied = denied_by_machine(error)
        if denied is not None:
            hint = (
                f"{denied.hint}; fedqc run resume {name} continues the run" if folder == run else denied.hint
            )
            raise RunError(f"{folder}: {denied.message}", code=denied.code, hint=hint) from None


@contextmanager
def run_goes_on(name: str) -> Iterator[None]:
    """A signal ends the watching, not the run: say so, and leave with the status of the signal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        say(
            f"{name}: no longer watched; the run continues; fedqc run watch {name} follows it, "
            f"fedqc run stop {name} ends it"
        )
        raise SystemExit(INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else stopped.code) from None


def follow_start(
    federation: Federation,
    name: str,
    *,
    wait_s: float,
    detach: bool,
    format: Format = Format.text,
    tell: Callable[[str], None] = print_now,
) -> int:
    """Show the rehearsal of a run that was submitted, and follow it to its end.

    Args:
        tell: prints a line about the run.
    Returns:
        exit status.
    Raises:
        FedqcError: what the run ended by.
    """
    from server.run.control_files import read_outcome
    from server.run.rehearsal import check_table

    check = await_outcome(
        federation, name, lambda: read_outcome(federation.folder, name, "check"), limit_s=wait_s + 120
    )
    say(check_table(check))
    plan_file = federation.runs / name / "plan.yaml"
    await_outcome(federation, name, lambda: plan_file.is_file() or None, limit_s=600)
    if detach:
        started = json.dumps({"run": name, "status": "running"})
        tell(started if format is Format.json else f"{name}: started; fedqc run watch {name}")
        return 0
    return follow(federation, name, format, tell=tell)


def follow(
    federation: Federation, name: str, format: Format, *, tell: Callable[[str], None] = print_now
) -> int:
    """Print what changes until the run has ended; on a terminal, also how long nothing has.

    Everything is read from files: a broken connection loses nothing.
    """
    plan_file = federation.runs / name / "plan.yaml"
    last, changed = "", time.monotonic()
    waiting = ProgressLine(0, quiet=format is Format.json)
    try:
        while True:
            _raise_failure(federation, name)
            state = state_of(federation, plan_file)
            line = json.dumps(state, ensure_ascii=False) if format is Format.json else watch_line(state)
            key = json.dumps([state[part] for part in ("status", "stage", "round", "waiting", "done")])
            if key != last and state["units"]:
                waiting.note("")
                tell(line)
                last, changed = key, time.monotonic()
            elif (quiet_s := time.monotonic() - changed) >= SPEAK_S:
                waiting.note(f"{duration(quiet_s)} without news; the run goes on")
            if state["status"] == INTERRUPTED_RUN:
                _raise_unwritable(federation, name)  # it could not report that
                hint = f"fedqc run resume {name} continues from the last finished round"
                raise RunError(
                    f"{name}: its ServerApp ended without a report", code="run-interrupted", hint=hint
                )
            if state["status"] not in ("running", "failed"):
                if state["status"] != "stopped" and format is Format.text:
                    say(f"report: fedqc report {shlex.quote(str(plan_file.parent))}")
                    say(f"model: {plan_file.parent / 'model.safetensors'}")
                return PARTIAL if state["status"] == "partial" else 0
            time.sleep(POLL_S)
    finally:
        waiting.note("")


def watch_line(state: dict[str, Any]) -> str:
    """One line of `run watch`."""
    parts = [
        f"{state['done']}/{state['units']}",
        state["status"] if state["status"] != "running" else state["stage"],
    ]
    if state["rounds"] and state["status"] == "running":
        parts.append(f"round {state['round']} of {state['rounds']}")
    if state["waiting"]:
        parts.append(f"waiting for {', '.join(state['waiting'])}")
    public = state["public"] or {}
    if public.get("auroc") is not None:
        parts.append(f"public AUROC {public['auroc']:.3f}")
    epsilons = [claim["epsilon"] for claim in state["claims"].values()]
    if epsilons:
        units = sorted({claim.get("unit", "patient") for claim in state["claims"].values()})
        parts.append(f"epsilon {epsilon_text(max(epsilons))} per {' or '.join(units)} for the whole run")
    if 0 < state["done"] < state["units"]:
        left = state["seconds"] / state["done"] * (state["units"] - state["done"])
        parts.append(f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
    return "  ".join(parts)
