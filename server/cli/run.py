"""`fedqc run`: check, start, watch, stop and resume runs of a federation; resume simulations."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import Format, FormatOption, show
from common.errors import ConfigError, RunError
from common.leave_one_out import members_of, price_text
from common.plan import RunPlan, read_plan
from common.processes import usable_cores, wait_for
from common.progress_bar import progress_shown, say, speaking
from common.terminal import print, table_row
from server.cli.federation import FederationOption, open_federation
from server.cli.following import (
    CONNECTION,
    MAX_NAME_BYTES,
    PARTIAL,
    await_outcome,
    continue_run,
    flower_file,
    flower_id,
    follow,
    follow_start,
    run_folder_named,
    run_goes_on,
    run_state,
    state_of,
    submit,
)
from server.cli.leave_one_site_out import is_study, present_run, resume_study, start_study, study_in

if TYPE_CHECKING:
    from server.federation.registry import Federation
    from server.run.tune import Tuning
    from server.run.verbs import Verb

run = typer.Typer(add_completion=False, no_args_is_help=True)

STOP_S = 30.0
"""How long a ServerApp may take to notice that its run was stopped: it asks the SuperLink now and then."""
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
    if run_plan.leave_one_site_out:
        say(price_text(members_of(run_plan), run_plan.leave_one_site_out))
    name = f"check-{secrets.token_hex(4)}"
    submit(opened, run_plan, name, Order(mode="check", wait_s=wait_s))
    answers = await_outcome(
        opened, name, lambda: read_outcome(opened.folder, name, "check"), limit_s=wait_s + 120
    )
    print(json.dumps(answers, ensure_ascii=False) if format is Format.json else check_table(answers))
    if not answers["enough"] or not answers["scored"]:
        return 4
    return PARTIAL if answers["missing"] or answers["unscored"] else 0


@run.command()
def tune(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    sites: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Sites that will train. Default: privacy.expected_sites."),
    ] = None,
    patients: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, help="Nominal patients of each. Default: privacy.expected_patients."),
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
    leave_one_site_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-site-out",
            help="Run PLAN once with all sites and once without each, and say what to expect at the next "
            "hospital.",
        ),
    ] = False,
    write_plan: Annotated[
        Path | None,
        typer.Option(
            "--write-plan",
            help="Write the plan that is signed, for hospitals to approve, to this file, and ask nobody.",
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> int:
    """Check PLAN once more and run it. Ctrl-C stops watching, not the run."""
    from common.files import write_bytes
    from server.run.control_files import Order
    from server.run_folder import plan_text

    opened = open_federation(federation)
    if name is not None and not (_NEW_NAME.fullmatch(name) and len(name.encode()) <= MAX_NAME_BYTES):
        raise ConfigError(
            f"--name {name[:70]!r}: not a name for a run",
            code="bad-argument",
            hint="at most 64 letters, digits, hyphens, dots and underscores, a letter or digit first",
        )
    run_plan, tuning = _read_known_plan(plan)
    chosen = name or f"{run_plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    order = Order(accept_missing=accept_missing, wait_s=wait_s, tuning=tuning.to_json() if tuning else None)
    of_study = leave_one_site_out or bool(run_plan.leave_one_site_out)
    if of_study:
        _refuse_of_study(accept_missing=accept_missing, detach=detach)
        run_plan = study_in(opened, run_plan)
    if write_plan is not None:
        write_bytes(write_plan, plan_text(run_plan).encode())
        say(f"{write_plan}: what hospitals approve (fedqc site approve); nobody was asked")
        return 0
    if of_study:
        return start_study(opened, run_plan, chosen, order, format)
    _admit("start", opened, chosen)
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
    """Continue a run, or a study of --leave-one-site-out, from its last finished round. The weights are the
    same as without the interruption.
    """
    from server.run.control_files import Order
    from server.run_folder import RunFolder

    folder = known_folder(federation, run)
    if is_study(folder):
        _refuse_of_study(accept_missing=accept_missing, detach=detach)
        order = Order(wait_s=wait_s)
        return resume_study(open_federation(folder.parent.parent), folder.name, order, format)
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
    from server.run.released import evaluation_plan_refused

    opened = open_federation(folder.parent.parent)
    if found.plan.evaluate is not None:
        raise evaluation_plan_refused(folder.name)
    continue_run(opened, found, Order(accept_missing=accept_missing, wait_s=wait_s))
    with run_goes_on(folder.name):
        return follow_start(opened, folder.name, wait_s=wait_s, detach=detach, format=format)


def _refuse_of_study(*, accept_missing: bool, detach: bool) -> None:
    """Raises ConfigError (`bad-argument`): an option that the runs of a study cannot have."""
    if accept_missing:
        raise ConfigError(
            "--accept-missing: the same sites take part in every run of a study",
            code="bad-argument",
            hint="name the sites in the plan: leave_one_site_out",
        )
    if detach:
        raise ConfigError(
            "--detach: this command begins the runs of a study, one after another",
            code="bad-argument",
            hint="leave it running; fedqc run resume continues a study",
        )


@run.command("list")
def list_runs(federation: FederationOption = None, format: FormatOption = Format.text) -> None:
    """List the federation's runs, newest first: state, round, sites."""
    opened = open_federation(federation)
    states = [
        state_of(opened, path)
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
    folder = _present(opened, folder)
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
    folder = _present(opened, folder)
    _admit("stop", opened, folder.name)
    with speaking(f"{folder.name}: stopping; sites finish their present task"):
        try:
            flower(opened, "stop", flower_id(opened, folder.name), CONNECTION)
        except RunError:
            if is_being_run(opened.folder, folder.name):
                raise  # else it ended meanwhile, and Flower knows that already
        wait_for(lambda: not is_being_run(opened.folder, folder.name), STOP_S)
    forget_outcomes(opened.folder, folder.name, ("failure",))  # that it was ended is none
    # else it ended before it began; the ServerApp was ended, and can no longer say so itself
    if (folder / "plan.yaml").is_file():
        RunFolder.open(folder).update_manifest(status="stopped")
    else:
        flower_file(opened, folder.name).unlink(missing_ok=True)  # as if it had not been ordered
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


def _admit(verb: Verb, federation: Federation, name: str) -> None:
    from server.run.verbs import admit

    admit(verb, run_state(federation, name), name)


def _lacks_models(folder: Path) -> bool:
    """Whether a finished run is of a version that did not note what it released: resuming it does."""
    from server.run_folder import RunFolder

    manifest = RunFolder.open(folder).manifest if (folder / "plan.yaml").is_file() else {}
    return manifest.get("status") == "completed" and "models" not in manifest


def known_folder(federation: Path | None, run: str) -> Path:
    """A run's folder by its path, or by its name in the federation."""
    if (Path(run) / "plan.yaml").is_file():
        return Path(run).absolute()
    if federation is None and "FEDQC_FEDERATION" not in os.environ and not Path("federation.yaml").is_file():
        raise ConfigError(
            f"{run}: not a run folder", code="no-such-run", hint="name its folder, or give --federation"
        )
    return run_folder_named(open_federation(federation), run)


def _present(federation: Federation, folder: Path) -> Path:
    """The folder of a run; of a study that of its run at work."""
    return run_folder_named(federation, present_run(federation, folder.name))
