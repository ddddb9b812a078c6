"""`fedqc simulate`, `report`, `compare`, `verify RUN`, `verify --table`: simulate a consortium, evaluate and
recompute runs, check published tables.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from common.cli import Format, FormatOption
from common.errors import ConfigError
from common.plan import changed_values, parse_plan, plan_values
from common.processes import usable_cores
from common.progress_bar import progress_shown
from common.strict import strict_yaml
from common.terminal import print
from server.run_folder import RunFolder, intact, without_nan
from server.simulation.simulate import refuse_early, run_simulation

simulate = typer.Typer(add_completion=False)
report = typer.Typer(add_completion=False)
compare = typer.Typer(add_completion=False)


JobsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sites that train side by side, and processes in which `privacy.settings: auto` tries settings. "
        "Default: one for each core. The results are the same for any.",
    ),
]

DeviceOption = Annotated[
    str,
    typer.Option(
        help="Where sites compute: cpu, cuda, cuda:N; auto: the GPUs, else the CPU. site.yaml is not asked."
    ),
]


@simulate.command()
def simulate_command(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN|SWEEP",
            help="Plan file, for example configs/plans/demo.yaml; or a sweep, a grid of plans and seeds, for "
            "example configs/sweeps/networks.yaml.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder with one subfolder per site, each with a site.yaml.")],
    out: Annotated[
        Path, typer.Option(help="Run folder to create; of a sweep, its folder, new or to be continued.")
    ],
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Replaces the plan's seed.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replaces a key of the plan, or of all plans of a sweep, such as training.rounds=3. "
            "Repeatable.",
        ),
    ] = None,
    max_cells: Annotated[int, typer.Option(min=1, help="Sweep only: the most runs to be done.")] = 100,
    leave_one_site_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-site-out",
            help="Run PLAN once for each site, which is held out, and once with none, and say what to expect "
            "at the next hospital.",
        ),
    ] = False,
    jobs: JobsOption = None,
    device: DeviceOption = "auto",
    accept_quarantine: Annotated[
        bool, typer.Option("--accept-quarantine", help="Continue although many files cannot be read.")
    ] = False,
    format: FormatOption = Format.text,
) -> int:
    """Run PLAN on all sites under DATA on this machine, and write the run folder OUT.

    Of a SWEEP, and with --leave-one-site-out, run all plans, each into a run folder below OUT, and write one
    table. The same command continues what was interrupted.
    """
    from server.run.released import evaluation_plan_refused
    from server.run.tune import resolved
    from server.simulation.sweep import is_sweep, parse_sweep, run_sweep

    values, replaced = plan_values(plan), _changes(changes or [])
    if leave_one_site_out and is_sweep(values):
        raise ConfigError(f"--leave-one-site-out: {plan} is a sweep", code="bad-argument", hint="name a plan")
    if is_sweep(values):
        if seed is not None:
            raise ConfigError(
                f"--seed {seed}: a sweep has its own seeds", code="bad-argument", hint=f"{plan}: seeds"
            )
        return run_sweep(
            parse_sweep(values, plan, changes=replaced, max_cells=max_cells),
            data,
            out,
            jobs or usable_cores(),
            format,
            device=device,
            accept_quarantine=accept_quarantine,
        )
    if replaced:
        values = changed_values(values, replaced, where=str(plan))
    run_plan = parse_plan(values, where=str(plan))
    if run_plan.evaluate is not None:
        raise evaluation_plan_refused(str(plan))
    if leave_one_site_out or run_plan.leave_one_site_out:
        from server.simulation.leave_one_site_out import run_leave_one_site_out

        return run_leave_one_site_out(
            run_plan if seed is None else run_plan.model_copy(update={"seed": seed}),
            data,
            out,
            jobs or usable_cores(),
            format,
            device=device,
            accept_quarantine=accept_quarantine,
        )
    refuse_early(run_plan, data, out, device)
    with progress_shown() as progress:
        run_plan, tuning = resolved(run_plan, jobs=jobs or usable_cores(), progress=progress)
    if seed is not None:
        run_plan = run_plan.model_copy(update={"seed": seed})
    return run_simulation(
        run_plan,
        data,
        out,
        jobs or usable_cores(),
        format,
        device=device,
        accept_quarantine=accept_quarantine,
        tuning=tuning.to_json() if tuning else None,
    )


def _changes(words: list[str]) -> dict[str, Any]:
    """Dotted plan key -> value, of `KEY=VALUE` with the value as YAML.

    Raises:
        ConfigError: no `=`, or no YAML (code `bad-argument`).
    """
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        try:
            if not key or not equals:
                raise ConfigError("no KEY=VALUE")
            found[key] = strict_yaml(text)
        except (ConfigError, yaml.YAMLError):
            raise ConfigError(
                f"--set {word}: not KEY=VALUE with the value as YAML",
                code="bad-argument",
                hint="for example --set training.rounds=3",
            ) from None
    return found


class ReportFormat(StrEnum):
    """How a report is given: the page, or text on standard output."""

    text = "text"
    md = "md"
    json = "json"
    csv = "csv"


@report.command()
def report_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    format: Annotated[
        ReportFormat,
        typer.Option(
            "--format",
            help="text: write RUN/report.html. md, json, csv: print instead; csv is for verify --table.",
        ),
    ] = ReportFormat.text,
    language: Annotated[str, typer.Option("--lang", help="Language of the report: en or zh.")] = "en",
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write every figure there, as SVG and PNG.")
    ] = None,
    mlflow: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also export the run into this local MLflow store: fedqc[mlflow]."),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Print the tables of a paper instead: scores by artifact, rescans, seconds.",
        ),
    ] = False,
    rescans: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="X/N X/N", help="With --paper: rescans of scans, before and after."),
    ] = None,
    seconds: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --paper: CSV file of reader (human or machine) and seconds, a line a case.",
        ),
    ] = None,
) -> None:
    """Write RUN/report.html, one page that needs no network. All its numbers are in evaluation.json, or
    follow from the counts in it.

    How `auto` chose the settings of private arms is in tuning.json.
    """
    from server.evaluation.report.figure_files import write_figures
    from server.evaluation.report.page import write_report

    if (rescans or seconds) and not paper:
        raise ConfigError(
            "--rescans and --seconds belong to --paper", code="bad-argument", hint="add --paper"
        )
    folder = RunFolder.open(run)
    with intact(run):
        if paper:
            print(_paper(folder, format, language, rescans, seconds), end="")
        elif format is not ReportFormat.text:
            print(_exported(folder, format, language), end="")
        else:
            print(write_report(folder, language))
        if figures is not None:
            written = write_figures(folder.evaluation, figures, language)
            print(f"{figures}: {len(written)} files", file=sys.stderr)
        if mlflow is not None:
            from server.evaluation.mlflow_export import export_run

            print(f"{mlflow}: MLflow run {export_run(folder, mlflow)}", file=sys.stderr)


def _exported(folder: RunFolder, format: ReportFormat, language: str) -> str:
    from server.evaluation.participation import participation_of
    from server.evaluation.report.export import reading_of, report_csv, report_json, report_markdown

    reading, trainable = reading_of(folder.evaluation, language), folder.plan.privacy.trainable
    if format is ReportFormat.csv:
        return report_csv(reading)
    participation = participation_of(folder)
    if format is ReportFormat.md:
        return report_markdown(reading, participation, trainable=trainable, cohorts=folder.cohorts)
    found = report_json(reading, participation, trainable=trainable, cohorts=folder.cohorts)
    return json.dumps(without_nan(found), ensure_ascii=False) + "\n"


def _paper(
    folder: RunFolder,
    format: ReportFormat,
    language: str,
    rescans: tuple[str, str] | None,
    seconds: Path | None,
) -> str:
    """The tables of a paper as text.

    Raises:
        ConfigError: `--rescans` or `--seconds` is wrong (code `bad-argument`).
    """
    from server.evaluation.report import paper
    from server.evaluation.report.export import reading_of
    from server.evaluation.tables import aligned

    tables = [paper.scores_table(reading_of(folder.evaluation, language))]
    tables += [paper.rescans_table(*rescans)] if rescans else []
    tables += [paper.seconds_table(seconds)] if seconds else []
    if format is ReportFormat.csv:
        return paper.as_csv(tables)
    if format is ReportFormat.json:
        return json.dumps([row for table in tables for row in table], ensure_ascii=False) + "\n"
    if format is ReportFormat.md:
        return "\n".join(paper.as_markdown(table) for table in tables if table)
    shown = []
    for table in tables:
        cells = [[paper.without_control(text) for text in row.values()] for row in table]
        shown.append("\n".join(aligned(list(table[0]), cells)) + "\n" if table else "no operating point\n")
    return "\n".join(shown)


def verify_run(run: Path, format: Format) -> int:
    """Recompute a run folder from the answers that its sites signed (`fedqc verify RUN`).

    Returns:
        the exit status: 1 where something does not hold.
    """
    from server.run.recompute import recompute

    with intact(run):
        findings = recompute(RunFolder.open(run))
    if format is Format.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    else:
        words = {True: "ok", False: "FAIL", None: "-"}
        for finding in findings:
            print(f"{words[finding.holds]:5s} {finding.check:28s} {finding.detail}".rstrip())
    return 1 if any(finding.holds is False for finding in findings) else 0


def verify_table(path: Path, format: Format) -> int:
    """Check a published table of scores (`fedqc verify --table FILE`).

    Returns:
        the exit status: 1 where something does not hold.
    """
    from server.evaluation.table_check import check_table, findings_table, read_table

    findings = check_table(read_table(path))
    if format is Format.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    else:
        print(findings_table(findings))
    return 1 if any(finding.holds is False for finding in findings) else 0


@compare.command()
def compare_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more run folders. Runs of one plan with different seeds are pooled; of one plan "
            "with different sites held out, they say what to expect at the next hospital."
        ),
    ],
    format: FormatOption = Format.text,
) -> None:
    """Compare arms over several runs, paired over test patients, seeds and hospitals where the runs allow
    it.
    """
    from server.evaluation.compare import compare_runs, compare_table
    from server.evaluation.leave_one_out import compare_hospitals, family_of, hospitals_table

    folders = [RunFolder.open(run) for run in runs]
    with intact(*runs):
        family = family_of(folders)
        result = compare_runs(folders) if family is None else compare_hospitals(family)
    if format is Format.json:
        print(json.dumps(without_nan(result), ensure_ascii=False))
    else:
        print(compare_table(result) if family is None else hospitals_table(result))
