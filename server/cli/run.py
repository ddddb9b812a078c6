"""`fedqc run`: check, start, watch, stop and resume runs of a federation; resume simulations."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from common.cli import INTERRUPTED, Format, FormatOption, show
from common.errors import ConfigError, NetworkError, RunError
from common.plan import RunPlan, read_plan
from common.privacy import epsilon_text
from common.processes import usable_cores
from common.progress_bar import progress_shown, say
from common.terminal import print, table_row
from server.cli.federation import FederationOption, open_federation

if TYPE_CHECKING:
    from server.federation.registry import Federation
    from server.run.tune import Tuning
    from server.run.verbs import State, Verb

run = typer.Typer(add_completion=False, no_args_is_help=True)

PARTIAL = 6
INTERRUPTED_RUN = "interrupted"
CONNECTION = "fedqc"
POLL_S = 1.0
SPEAK_S = 8.0
"""A wait says so this often at least."""
STOP_S = 30.0
"""How long a ServerApp may take to notice that its run was stopped: it asks the SuperLink now and then."""
MAX_NAME_BYTES = 192
"""Of a run's name: files are named after it, and 255 is the most that a file system takes."""
_NEW_NAME = re.compile(r"\w[\w.-]{0,63}")
RunArgument = Annotated[str, typer.Argument(help="Name of a run of the federation, or its folder.")]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, help="Seconds to wait for all sites to be connected.")
]


@run.callback()
def _run_group() -> None:
    """Rehearse, start and follow runs."""


@run.command()
def check(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    federation: FederationOption = None,
    wait_s: WaitOption = 30,
    format: FormatOption = Format.text,
) -> int:
    """Ask every site whether it would take part in PLAN, and for how many rounds. Nothing is trained."""
    from server.run.control_files import Order, read_outcome
    from server.run.rehearsal import check_table

    opened, run_plan = open_federation(federation), _read_known_plan(plan, may_evaluate=True)[0]
    name = f"check-{secrets.token_hex(4)}"
    submit(opened, run_plan, name, Order(mode="check", wait_s=wait_s))
    answers = _await(opened, name, lambda: read_outcome(opened.folder, name, "check"), limit_s=wait_s + 120)
    print(json.dumps(answers, ensure_ascii=False) if format is Format.json else check_table(answers))
    if not answers["enough"] or not answers["scored"]:
        return 4
    return PARTIAL if answers["missing"] or answers["unscored"] else 0


@run.command()
def tune(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    sites: Annotated[
        int | None, typer.Option(min=1, help="Sites that will train. Default: privacy.expected_sites.")
    ] = None,
    patients: Annotated[
        int | None,
        typer.Option(min=1, help="Nominal patients of each. Default: privacy.expected_patients."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the plan with the chosen settings and its noise here.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: one for each core. The choice is the same for any."),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Choose the settings of PLAN's private arms on public rehearsal hospitals. No site is asked."""
    from common.files import write_bytes
    from server.run.tune import resolved, tuning_table, with_auto
    from server.run_folder import plan_text

    asked = with_auto(read_plan(plan), sites=sites, patients=patients)
    with progress_shown() as progress:
        signed, found = resolved(asked, jobs=jobs or usable_cores(), progress=progress)
    assert found is not None
    if out is not None:
        write_bytes(out, plan_text(signed).encode())
        say(f"{out}: the plan with these settings")
    print(json.dumps(found.to_json()) if format is Format.json else tuning_table(found))


@run.command()
def start(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    federation: FederationOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run folder. Default: the plan's name and the time.")
    ] = None,
    accept_missing: Annotated[
        bool, typer.Option("--accept-missing", help="Start without sites that are away or refuse.")
    ] = False,
    wait_s: WaitOption = 60,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when the run has started; `fedqc run watch` follows it.")
    ] = False,
    format: FormatOption = Format.text,
) -> int:
    """Check PLAN once more and run it. Ctrl-C stops watching, not the run."""
    from server.run.control_files import Order

    opened = open_federation(federation)
    if name is not None and not (_NEW_NAME.fullmatch(name) and len(name.encode()) <= MAX_NAME_BYTES):
        raise ConfigError(
            f"--name {name[:70]!r}: not a name for a run",
            code="bad-argument",
            hint="at most 64 letters, digits, hyphens, dots and underscores, a letter or digit first",
        )
    run_plan, tuning = _read_known_plan(plan)
    chosen = name or f"{run_plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _admit("start", opened, chosen)
    order = Order(accept_missing=accept_missing, wait_s=wait_s, tuning=tuning.to_json() if tuning else None)
    submit(opened, run_plan, chosen, order)
    with run_goes_on(chosen):
        return follow_start(opened, chosen, wait_s=wait_s, detach=detach, format=format)


@run.command()
def resume(
    run: Annotated[
        str, typer.Argument(help="Run folder of a simulation, or name of a run of the federation.")
    ],
    federation: FederationOption = None,
    data: Annotated[
        Path | None, typer.Option(help="Simulation only: folder of the sites, if they have moved.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Simulation only: sites that train side by side. Default: one for each core."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Simulation only: as `fedqc simulate`.")] = "auto",
    accept_missing: Annotated[
        bool, typer.Option("--accept-missing", help="Continue without sites that are away or refuse.")
    ] = False,
    accept_changed_data: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data",
            help="Simulation only: continue although images, labels or split of a site changed.",
        ),
    ] = False,
    wait_s: WaitOption = 60,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the run has continued.")] = False,
    format: FormatOption = Format.text,
) -> int:
    """Continue a run from its last finished round. The weights are the same as without the interruption."""
    from server.run_folder import RunFolder

    folder = known_folder(federation, run)
    in_federation = (folder.parent.parent / "federation.yaml").exists()
    if data is None and in_federation and not _lacks_models(folder):
        _admit("resume", open_federation(folder.parent.parent), folder.name)
    found = RunFolder.open(folder)
    if data is not None or found.simulation or not in_federation:
        from server.simulation.simulate import resume_simulation

        return resume_simulation(
            found, data, jobs, format, device=device, accept_changed_data=accept_changed_data
        )
    if accept_changed_data:
        raise ConfigError(
            "--accept-changed-data is for simulations",
            code="bad-argument",
            hint="a hospital accepts its own change: fedqc site approve PLAN --changed-data RUN",
        )
    from common.files import sweep
    from server.federation.services import flower
    from server.run.control_files import Order
    from server.run.released import evaluation_plan_refused

    opened = open_federation(folder.parent.parent)
    if found.plan.evaluate is not None:
        raise evaluation_plan_refused(folder.name)
    sweep(*(path for path in (folder, *folder.rglob("*")) if path.is_dir()))
    _await_superlink(opened, wait_s)
    with suppress(RunError):  # it has ended there too, or was never heard of
        # else nodes wait for the rest of what was being sent
        flower(opened, "stop", _flower_id(opened, folder.name), CONNECTION)
    submit(opened, found.plan, folder.name, Order(accept_missing=accept_missing, wait_s=wait_s))
    # else `watch` would take how it ended before for how it ended now
    found.update_manifest(status="running")
    with run_goes_on(folder.name):
        return follow_start(opened, folder.name, wait_s=wait_s, detach=detach, format=format)


@run.command("list")
def list_runs(federation: FederationOption = None, format: FormatOption = Format.text) -> None:
    """List the federation's runs, newest first: state, round, sites."""
    opened = open_federation(federation)
    states = [
        _state(opened, path)
        for path in sorted(opened.runs.glob("*/plan.yaml"), key=lambda path: -path.stat().st_mtime)
    ]
    if format is Format.json:
        print(json.dumps(states, ensure_ascii=False))
        return
    widths = (34, 12, 28, -6)
    print(table_row(("run", "state", "stage", "sites"), widths))
    for state in states:
        where = (
            f"{state['stage']} {state['round']}/{state['rounds']}" if state["status"] == "running" else "-"
        )
        print(table_row((state["run"], state["status"], where, str(state["sites"])), widths))


@run.command()
def watch(run: RunArgument, federation: FederationOption = None, format: FormatOption = Format.text) -> int:
    """Follow a run: sites, round, score on the public set, epsilon, time left.

    Ctrl-C ends the watching, not the run.
    """
    folder = known_folder(federation, run)
    opened = open_federation(folder.parent.parent)
    with run_goes_on(folder.name):
        if run_state(opened, folder.name) == "ordered":
            return follow_start(opened, folder.name, wait_s=600, detach=False, format=format)
        _admit("watch", opened, folder.name)
        return follow(opened, folder.name, format)


@run.command()
def stop(run: RunArgument, federation: FederationOption = None, format: FormatOption = Format.text) -> None:
    """Stop a run. Sites finish their present task; `fedqc run resume` continues the run."""
    from server.federation.services import flower
    from server.run.control_files import forget_outcomes, is_being_run
    from server.run_folder import RunFolder

    folder = known_folder(federation, run)
    opened = open_federation(folder.parent.parent)
    _admit("stop", opened, folder.name)
    say(f"{folder.name}: stopping; sites finish their present task")
    try:
        flower(opened, "stop", _flower_id(opened, folder.name), CONNECTION)
    except RunError:
        if is_being_run(opened.folder, folder.name):
            raise  # else it ended meanwhile, and Flower knows that already
    until = time.monotonic() + STOP_S
    while is_being_run(opened.folder, folder.name) and time.monotonic() < until:
        time.sleep(0.1)
    forget_outcomes(opened.folder, folder.name, ("failure",))  # that it was ended is none
    # else it ended before it began; the ServerApp was ended, and can no longer say so itself
    if (folder / "plan.yaml").is_file():
        RunFolder.open(folder).update_manifest(status="stopped")
    else:
        _flower_file(opened, folder.name).unlink(missing_ok=True)  # as if it had not been ordered
    text = f"{folder.name}: stopped; fedqc run resume {folder.name} continues it"
    show(format, {"run": folder.name, "status": "stopped"}, text)


def _read_known_plan(path: Path, *, may_evaluate: bool = False) -> tuple[RunPlan, Tuning | None]:
    """Read a plan file, and write into it what will be signed: settings that it leaves to `auto`, and the
    noise of its releases.

    Returns:
        the plan, and how its settings were chosen; None where it states them.
    Raises:
        PlanError: the plan does not validate, its strategy is unknown to this coordinator, it has an arm
            that exists in simulations only, or `auto` finds no settings.
        ConfigError: no noise makes the plan cost its epsilon; it is that of an evaluation, and these are not
            permitted here (`evaluation-plan`).
    """
    from server.run.conduct import check_controls
    from server.run.released import evaluation_plan_refused
    from server.run.tune import resolved
    from server.strategies import strategy_named

    plan = read_plan(path)
    if plan.evaluate is not None and not may_evaluate:
        raise evaluation_plan_refused(str(path))
    check_controls(plan)
    strategy_named(plan.training.strategy)
    with progress_shown() as progress:
        return resolved(plan, jobs=usable_cores(), progress=progress)


def run_state(federation: Federation, name: str) -> State:
    """The state of a run of the federation, as `server.run.verbs` names it."""
    from server.run.control_files import is_being_run, read_outcome

    plan_file = run_folder_named(federation, name) / "plan.yaml"
    if plan_file.is_file():
        return cast("State", _state(federation, plan_file)["status"])
    if is_being_run(federation.folder, name):
        return "ordered"
    was_ordered = _flower_file(federation, name).is_file()
    is_waiting = was_ordered and read_outcome(federation.folder, name, "failure") is None
    return "ordered" if is_waiting else "unknown"


def _admit(verb: Verb, federation: Federation, name: str) -> None:
    from server.run.verbs import admit

    admit(verb, run_state(federation, name), name)


def _lacks_models(folder: Path) -> bool:
    """Whether a finished run is of a version that did not note what it released: resuming it does."""
    from server.run_folder import RunFolder

    manifest = RunFolder.open(folder).manifest if (folder / "plan.yaml").is_file() else {}
    return manifest.get("status") == "completed" and "models" not in manifest


def _await_superlink(federation: Federation, wait_s: float) -> None:
    """Wait for a SuperLink that is being restarted.

    Raises:
        NetworkError: it does not answer within `wait_s` (code `no-superlink`).
    """
    from server.federation.services import superlink_answers

    until, told = time.monotonic() + wait_s, False
    while not superlink_answers(federation):
        if time.monotonic() >= until:
            hint = "fedqc federation start"
            raise NetworkError(
                f"the SuperLink does not answer, in {wait_s:g} s", code="no-superlink", hint=hint
            )
        if not told:
            say(f"waiting for the SuperLink, for at most {wait_s:g} s")
        told = True
        time.sleep(POLL_S)


def run_folder_named(federation: Federation, name: str) -> Path:
    """Raises ConfigError (code `bad-argument`) unless a run may have this name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise ConfigError(f"--name {name!r}: must be a plain name", code="bad-argument")
    return federation.runs / name


def known_folder(federation: Path | None, run: str) -> Path:
    """A run's folder by its path, or by its name in the federation."""
    if (Path(run) / "plan.yaml").is_file():
        return Path(run).absolute()
    if federation is None and "FEDQC_FEDERATION" not in os.environ and not Path("federation.yaml").is_file():
        raise ConfigError(
            f"{run}: not a run folder", code="no-such-run", hint="name its folder, or give --federation"
        )
    return run_folder_named(open_federation(federation), run)


def submit(federation: Federation, plan: RunPlan, name: str, order: Any) -> str:
    """Hand a run to the SuperLink; gives Flower's id of it."""
    from common.files import write_bytes
    from server.federation.services import flower
    from server.run.control_files import forget_outcomes, write_order
    from server.run_folder import write_json

    _await_superlink(federation, order.wait_s)
    say(f"{name}: handing over the plan")
    forget_outcomes(federation.folder, name)
    write_order(federation.folder, name, order)
    values = {"plan": plan.canonical_json(), "run-dir": str(federation.runs / name)}
    config = federation.state / "orders" / f"{name}.toml"
    write_bytes(config, "".join(f"{key} = {toml_string(text)}\n" for key, text in values.items()).encode())
    said = flower(federation, "run", str(federation.bundle), CONNECTION, "--run-config", str(config))
    flower_id = str(said["run-id"])
    say(f"{name}: handed to the SuperLink, which starts its ServerApp; then the sites are asked")
    write_json(_flower_file(federation, name), {"run-id": flower_id})
    return flower_id


def print_now(line: str) -> None:
    """Print a line of data without waiting for more."""
    print(line, flush=True)


def toml_string(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flower_file(federation: Federation, name: str) -> Path:
    return federation.state / "orders" / f"{name}.flower.json"


def _flower_id(federation: Federation, name: str) -> str:
    try:
        return str(json.loads(_flower_file(federation, name).read_text(encoding="utf-8"))["run-id"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{name}: was never started here", code="no-such-run", hint="fedqc run list"
        ) from None


def _await(federation: Federation, name: str, look: Any, *, limit_s: float) -> Any:
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

    check = _await(
        federation, name, lambda: read_outcome(federation.folder, name, "check"), limit_s=wait_s + 120
    )
    say(check_table(check))
    plan_file = federation.runs / name / "plan.yaml"
    _await(federation, name, lambda: plan_file.is_file() or None, limit_s=600)
    if detach:
        started = json.dumps({"run": name, "status": "running"})
        tell(started if format is Format.json else f"{name}: started; fedqc run watch {name}")
        return 0
    return follow(federation, name, format, tell=tell)


def _state(federation: Federation, plan_file: Path) -> dict[str, Any]:
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


def follow(
    federation: Federation, name: str, format: Format, *, tell: Callable[[str], None] = print_now
) -> int:
    """Print what changes until the run has ended. Everything is read from files: a broken connection loses
    nothing.
    """
    plan_file = federation.runs / name / "plan.yaml"
    last = ""
    while True:
        _raise_failure(federation, name)
        state = _state(federation, plan_file)
        line = json.dumps(state, ensure_ascii=False) if format is Format.json else watch_line(state)
        key = json.dumps([state[part] for part in ("status", "stage", "round", "waiting", "done")])
        if key != last and state["units"]:
            tell(line)
            last = key
        if state["status"] == INTERRUPTED_RUN:
            hint = f"fedqc run resume {name} continues from the last finished round"
            raise RunError(f"{name}: its ServerApp ended without a report", code="run-interrupted", hint=hint)
        if state["status"] not in ("running", "failed"):
            if state["status"] != "stopped" and format is Format.text:
                say(f"report: fedqc report {shlex.quote(str(plan_file.parent))}")
                say(f"model: {plan_file.parent / 'model.safetensors'}")
            return PARTIAL if state["status"] == "partial" else 0
        time.sleep(POLL_S)


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
