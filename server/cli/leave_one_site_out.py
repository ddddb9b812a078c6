"""`fedqc run start --leave-one-site-out`: the runs of a study, one after another, each in its run folder.

    runs/NAME/                study.yaml (what is signed and approved), results.json, table.txt
    runs/NAME-all/            the run that every site trains in
    runs/NAME-without-SITE/   a run that holds out SITE

The first rehearsal asks every site for the whole study, because a site answers for all runs that it approved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Format
from common.errors import ConfigError
from common.leave_one_out import members_of, price_text, study_plan
from common.plan import RunPlan, read_plan
from common.progress_bar import say
from server.cli.following import (
    MAX_NAME_BYTES,
    continue_run,
    follow,
    follow_start,
    run_folder_named,
    run_goes_on,
    run_state,
    submit,
)

if TYPE_CHECKING:
    from server.federation.registry import Federation
    from server.run.control_files import Order

STUDY, LOCK = "study.yaml", "study.lock"


def study_in(federation: Federation, plan: RunPlan) -> RunPlan:
    """The study of a plan: over the sites that it names itself, or all that may take part. Its price is said.

    Raises:
        PlanError: as `study_plan`.
    """
    known = [site.site for site in federation.sites() if site.may_take_part()]
    study = study_plan(plan, plan.leave_one_site_out or sorted(known))
    say(price_text(members_of(study), study.leave_one_site_out))
    return study


def start_study(federation: Federation, study: RunPlan, name: str, order: Order, format: Format) -> int:
    """Carry out the runs of a study that nobody has begun under this name.

    Args:
        study: with its noise.
    Returns:
        exit status: 6 where a run is partial.
    Raises:
        ConfigError: `run-exists`; a run's name would be too long (`bad-argument`).
        FedqcError: what a run ended by; `resume_study` goes on.
    """
    from common.files import write_bytes
    from server.run_folder import plan_text

    for run, _ in _runs(name, study):
        if len(run.encode()) > MAX_NAME_BYTES:
            raise ConfigError(f"{run[:70]!r}: too long for a run", code="bad-argument", hint="--name SHORTER")
        if run_state(federation, run) != "unknown":
            raise ConfigError(
                f"{run}: there is a run of this name",
                code="run-exists",
                hint=f"fedqc run resume {name} continues its study; or --name",
            )
    write_bytes(run_folder_named(federation, name) / STUDY, plan_text(study).encode())
    return _carry_out(federation, study, name, order, format)


def is_study(folder: Path) -> bool:
    return (folder / STUDY).is_file()


def resume_study(federation: Federation, name: str, order: Order, format: Format) -> int:
    """Continue a study after its last finished round: runs that ended early, then those not begun; as
    `start_study`.
    """
    study = read_plan(run_folder_named(federation, name) / STUDY)
    return _carry_out(federation, study, name, order, format, again=True)


def present_run(federation: Federation, name: str) -> str:
    """The run of a study that is at work: the last that was begun. A run that is no study is itself."""
    folder = run_folder_named(federation, name)
    if not is_study(folder):
        return name
    runs = [run for run, _ in _runs(name, read_plan(folder / STUDY))]
    return next((run for run in reversed(runs) if run_state(federation, run) != "unknown"), runs[0])


def _runs(name: str, study: RunPlan) -> Iterator[tuple[str, RunPlan]]:
    for plan in members_of(study):
        yield f"{name}-without-{plan.held_out[0]}" if plan.held_out else f"{name}-all", plan


def _carry_out(
    federation: Federation, study: RunPlan, name: str, order: Order, format: Format, *, again: bool = False
) -> int:
    """Carry out what is left of a study, and write its results.

    Args:
        again: ask the sites of a partial run again.
    """
    from common.files import locked
    from server.evaluation.study_results import show_results, write_results
    from server.run.control_files import run_running
    from server.run_folder import RunFolder

    runs, out = list(_runs(name, study)), run_folder_named(federation, name)
    with locked(out / LOCK, busy=lambda: run_running(name)):  # else two would begin one run
        for number, (run, plan) in enumerate(runs, start=1):
            if run_state(federation, run) == "completed":
                continue
            say(f"run {number} of {len(runs)}: {run}")
            try:
                _carry_out_run(federation, plan, run, order, again=again)
            except SystemExit:
                say(f"{name}: begins no further run; fedqc run resume {name} goes on after this one")
                raise
            if (state := run_state(federation, run)) not in ("completed", "partial"):
                say(f"{run}: {state}; fedqc run resume {name} continues the study")
                return 0
        results = write_results(out, [RunFolder.open(run_folder_named(federation, run)) for run, _ in runs])
    return show_results(results, out, format)


def _carry_out_run(federation: Federation, plan: RunPlan, run: str, order: Order, *, again: bool) -> None:
    """Begin a run, continue it, or follow it, to its end."""
    from server.run_folder import RunFolder

    with run_goes_on(run):
        match run_state(federation, run):
            case "unknown":
                submit(federation, plan, run, order)
            case "ordered":
                pass
            case "running":
                follow(federation, run, Format.text, tell=say)
                return
            case "partial" if not again:
                return
            case _:
                continue_run(federation, RunFolder.open(run_folder_named(federation, run)), order)
        follow_start(federation, run, wait_s=order.wait_s, detach=False, tell=say)
