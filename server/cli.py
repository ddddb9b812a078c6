"""The coordinator's and the evaluator's commands, and the simulation of a whole consortium."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import Format, FormatOption, confirmed
from common.errors import ConfigError, DataError
from common.plan import RunPlan, read_plan

if TYPE_CHECKING:
    from server.runs import RunFolder

simulate = typer.Typer(add_completion=False)
report = typer.Typer(add_completion=False)
compare = typer.Typer(add_completion=False)

PARTIAL = 6


ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; by default what is idle. The same number gives the same bits.")
]


@simulate.command()
def simulate_command(
    plan: Annotated[Path, typer.Argument(help="Plan file, for example configs/plans/demo.yaml.")],
    data: Annotated[Path, typer.Option(help="Folder whose subfolders with a site.yaml are the sites.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Instead of the plan's seed.")] = None,
    threads: ThreadsOption = None,
    accept_quarantine: Annotated[bool, typer.Option("--accept-quarantine", help="Go on although many files cannot be read.")] = False,
    format: FormatOption = Format.text,
) -> int:
    """Run a plan on all sites under DATA, in one process, and write the run folder OUT."""
    from server.runs import refuse_existing

    wanted = read_plan(plan)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    refuse_existing(out)
    return _simulate(wanted, data, out, threads or idle_threads(), format, accept_quarantine=accept_quarantine)


def resume_simulation(folder: RunFolder, data: Path | None, threads: int | None, format: Format) -> int:
    """Go on with a simulation.

    Raises:
        ConfigError: nobody says where its data lie (code `no-data`).
    """
    simulation = folder.simulation
    if data is None and not simulation:
        raise ConfigError(f"{folder.path}: does not say where its data lie", code="no-data", hint="--data DIR")
    return _simulate(folder.plan, data or Path(simulation["data"]), folder.path, threads or folder.manifest["threads"], format)


def _simulate(plan: RunPlan, data: Path, out: Path, threads: int, format: Format, *, accept_quarantine: bool = False) -> int:
    from common.learning import set_threads
    from common.local_grid import LocalGrid
    from server.app import check_sites, conduct
    from server.progress import Progress

    set_threads(threads)
    site_yamls = find_sites(data)
    read_site, prepare = _load("client.cohort:read_site"), _load("client.agent:prepare")
    names = {path: read_site(path)[0].name for path in site_yamls}
    check_sites(plan, list(names.values()))
    talk = Progress(0)
    for path in site_yamls:
        try:
            cohort = prepare(path, plan, accept_quarantine=accept_quarantine)
        except DataError as refusal:
            if refusal.code != "too-many-quarantined" or not confirmed(refusal):
                raise
            cohort = prepare(path, plan, accept_quarantine=True)
        talk.say(f"{cohort.site.name}: {cohort.report.summary()}")
    nodes = {number: {"site-config": str(path)} for number, path in enumerate(site_yamls, start=1)}
    if "pooled" in plan.arms:
        training = [str(path) for path in site_yamls if names[path] not in plan.held_out]
        nodes[len(nodes) + 1] = {"site-config": os.pathsep.join(training)}
    config = {"plan": plan.canonical_json(), "run-dir": str(out.absolute())}
    grid = LocalGrid(_load("client.app:app"), nodes, config)
    folder = conduct(grid, plan, out, simulation={"data": str(data.absolute())})
    evaluation = folder.evaluation
    if format is Format.json:
        print(json.dumps(summary(evaluation, folder.path), ensure_ascii=False))
    else:
        print(table(evaluation))
        print(f"\nrun folder: {folder.path}")
    return PARTIAL if evaluation["status"] == "partial" else 0


def _load(reference: str) -> Any:
    """An object by "module:name". Simulation plays both sides, and is the only place where the server names the client."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def idle_threads() -> int:
    """How many cores seem free, 1 to 4: waiting for a busy core costs several times the work itself."""
    return max(1, min(4, (os.cpu_count() or 1) - round(os.getloadavg()[0])))


def find_sites(data: Path) -> list[Path]:
    """The site.yaml of each direct subfolder that has one, absolute, sorted by folder name.

    Raises:
        ConfigError: no such folder, or no sites in it.
    """
    if not data.is_dir():
        raise ConfigError(f"--data {data}: no such folder", code="no-such-folder", hint="fedqc data phantom DIR makes one")
    found = sorted(path.absolute() for path in data.glob("*/site.yaml"))
    if not found:
        raise ConfigError(
            f"--data {data}: none of its subfolders holds a site.yaml", code="no-sites", hint="fedqc data phantom DIR makes some"
        )
    return found


def summary(evaluation: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `simulate --format json` promises."""
    keys = ("status", "rounds", "sites", "metrics", "matrix", "headline", "privacy", "cpu_seconds")
    return {"run": str(folder)} | {key: evaluation[key] for key in keys}


def table(evaluation: dict[str, Any]) -> str:
    """The headline for a terminal: arms by place, macro AUROC with its 95 % interval."""
    training = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    places = ["home", "elsewhere", "unseen", *training]
    lines = [f"{'macro AUROC':14s}" + "".join(f"{place:>18s}" for place in places)]
    for arm in evaluation["arms"]:
        scores = evaluation["scores"].get(arm)
        if scores is None:
            lines.append(f"{arm:14s}" + f"{'refused':>18s}")
            continue
        lines.append(f"{arm:14s}" + "".join(f"{_cell(scores[place]):>18s}" for place in places))
    for contrast in evaluation["contrasts"]:
        if contrast["where"] in ("home", "elsewhere", "unseen") and contrast["value"] is not None:
            sign = f"{contrast['arm']} - {contrast['other']}, {contrast['where']}"
            lines.append(f"{sign:40s} {contrast['value']:+.3f} [{_number(contrast['low'])}, {_number(contrast['high'])}]")
    for site, claim in evaluation["privacy"].items():
        if claim["refused"]:
            lines.append(f"{site}: private arm refused [{claim['refused']['code']}]: {claim['refused']['reason']}")
        else:
            lines.append(f"{site}: epsilon {claim['epsilon']:.2f}, delta {claim['delta']:g}, per {claim['unit']}, {claim['adjacency']}")
    if not evaluation["private_arms"]:
        lines.append("This run is NOT PRIVATE.")
    lines += [f"partial: {line}" for line in evaluation["incomplete"]]
    return "\n".join(lines)


def _cell(score: dict[str, float | None]) -> str:
    if score["value"] is None:
        return "n = 0"
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ±{(score['high'] or 0) - score['value']:.3f}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"


@report.command()
def report_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
) -> None:
    """Write RUN/report.html: one page, offline, every number of it in evaluation.json."""
    from server.report.page import write_report
    from server.runs import RunFolder

    print(write_report(RunFolder.open(run)))


@compare.command()
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders; of one plan with different seeds they are pooled.")],
    format: FormatOption = Format.text,
) -> None:
    """Differences of arms over several runs, paired over test patients and seeds where the runs allow it."""
    from server.compare import compare_runs, compare_table
    from server.runs import RunFolder, without_nan

    result = compare_runs([RunFolder.open(run) for run in runs])
    print(json.dumps(without_nan(result), ensure_ascii=False) if format is Format.json else compare_table(result))
