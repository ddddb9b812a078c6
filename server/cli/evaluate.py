"""The coordinator's and the evaluator's commands, and the simulation of a whole consortium."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import Format, FormatOption
from common.plan import read_plan
from server.simulation.simulate import _simulate, idle_threads

if TYPE_CHECKING:
    pass

simulate = typer.Typer(add_completion=False)
report = typer.Typer(add_completion=False)
compare = typer.Typer(add_completion=False)


ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; by default what is idle. The same number gives the same bits."),
]


@simulate.command()
def simulate_command(
    plan: Annotated[Path, typer.Argument(help="Plan file, for example configs/plans/demo.yaml.")],
    data: Annotated[Path, typer.Option(help="Folder whose subfolders with a site.yaml are the sites.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="Instead of the plan's seed.")
    ] = None,
    threads: ThreadsOption = None,
    accept_quarantine: Annotated[
        bool, typer.Option("--accept-quarantine", help="Go on although many files cannot be read.")
    ] = False,
    format: FormatOption = Format.text,
) -> int:
    """Run a plan on all sites under DATA, in one process, and write the run folder OUT."""
    from server.run_folder import refuse_existing

    wanted = read_plan(plan)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    refuse_existing(out)
    return _simulate(
        wanted, data, out, threads or idle_threads(), format, accept_quarantine=accept_quarantine
    )


@report.command()
def report_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
) -> None:
    """Write RUN/report.html: one page, offline, every number of it in evaluation.json."""
    from server.evaluation.report.page import write_report
    from server.run_folder import RunFolder

    print(write_report(RunFolder.open(run)))


@compare.command()
def compare_command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Two or more run folders; of one plan with different seeds they are pooled."),
    ],
    format: FormatOption = Format.text,
) -> None:
    """Differences of arms over several runs, paired over test patients and seeds where the runs allow it."""
    from server.evaluation.compare import compare_runs, compare_table
    from server.run_folder import RunFolder, without_nan

    result = compare_runs([RunFolder.open(run) for run in runs])
    print(
        json.dumps(without_nan(result), ensure_ascii=False)
        if format is Format.json
        else compare_table(result)
    )
