"""`fedqc evaluate`: score models that a run released, as a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import Format, FormatOption
from common.errors import ConfigError
from common.plan import RunPlan
from common.processes import usable_cores
from common.progress_bar import say
from server.cli.evaluate import DeviceOption, JobsOption
from server.cli.federation import FederationOption, open_federation
from server.cli.following import follow_start, run_folder_named, run_goes_on, submit
from server.cli.run import WaitOption

if TYPE_CHECKING:
    from server.federation.registry import Federation
    from server.run.conduct import Released
    from server.run_folder import RunFolder

evaluate = typer.Typer(add_completion=False)


@evaluate.command()
def evaluate_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL|RUN",
            help="A model file of a run; or a run, by its folder or its name in the federation, whose arms "
            "are compared.",
        ),
    ],
    sites: Annotated[
        list[str] | None,
        typer.Option(
            help="Sites to ask, repeatable or with commas. Default: all that did not train the models."
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Only the models of this arm. Repeatable. Fewer models have less noise."),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Price to a patient of a hospital scored with noise. Default: epsilon of the run's plan."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Simulation: folder with one subfolder per site.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Simulation: run folder to create, or to ask again in.")
    ] = None,
    federation: FederationOption = None,
    name: Annotated[
        str | None, typer.Option(help="Federation: name of the run folder. Default: that of the question.")
    ] = None,
    write_plan: Annotated[
        Path | None,
        typer.Option(
            "--write-plan", help="Write the plan, for hospitals to approve, to this file, and ask nobody."
        ),
    ] = None,
    accept_missing: Annotated[
        bool,
        typer.Option("--accept-missing", help="Federation: score without sites that refuse."),
    ] = False,
    wait_s: WaitOption = 60,
    jobs: JobsOption = None,
    device: DeviceOption = "auto",
    accept_quarantine: Annotated[
        bool, typer.Option("--accept-quarantine", help="Continue although many files cannot be read.")
    ] = False,
    format: FormatOption = Format.text,
) -> int:
    """Score models that a run released, at sites that did not train them or on test patients of those that
    did. Nothing is trained.

    The price of noise is shown first. A site that was asked the same before gives its stored answer.
    """
    from common.files import write_bytes
    from server.run.released import evaluation_plan, price_text, released_models, run_of
    from server.run_folder import plan_text
    from server.simulation.simulate import shown

    opened = None if data is not None else open_federation(federation)
    run, named = run_of(_found(model, opened), [opened.runs] if opened else [])
    released = released_models(run, [*named, *(arm or [])])
    plan = evaluation_plan(run, released, epsilon=epsilon)
    names = [one for words in sites or [] for one in words.split(",") if one]
    asked = _asked(plan, names, _enrolled(opened) if opened else _under(data))
    say(price_text(plan, asked))
    if write_plan is not None:
        write_bytes(write_plan, plan_text(plan).encode())
        say(f"{write_plan}: what hospitals approve (fedqc site approve); nobody was asked")
        return 0
    if opened is not None:
        done = _deployed(opened, plan, run, asked, name, accept_missing=accept_missing, wait_s=wait_s)
    else:
        assert data is not None
        done = _simulated(
            plan,
            released,
            asked,
            data,
            out,
            jobs=jobs or usable_cores(),
            device=device,
            accept_quarantine=accept_quarantine,
        )
    return shown(done, format)


def _found(model: Path, federation: Federation | None) -> Path:
    """A model or a run by its path, or a run by its name in the federation."""
    if federation is None or model.exists() or model.name != str(model):
        return model
    return run_folder_named(federation, model.name)


def _enrolled(federation: Federation) -> list[str]:
    return [site.site for site in federation.sites() if site.may_take_part()]


def _under(data: Path | None) -> list[str]:
    from server.simulation.local_grid import named
    from server.simulation.simulate import find_sites

    assert data is not None
    return [named("client.site.config:read_site")(path)[0].name for path in find_sites(data)]


def _asked(plan: RunPlan, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The sites that are asked: those named, or all known ones that did not train the models.

    Raises:
        ConfigError: a name is unknown (`unknown-site`), or all known ones trained them (`no-sites`).
    """
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--sites {name}: no such site",
                code="unknown-site",
                hint=f"known: {', '.join(known) or 'none'}",
            )
    found = sorted(set(names)) or sorted(name for name in known if not plan.trained_at(name))
    if not found:
        raise ConfigError(
            "every known site trained these models",
            code="no-sites",
            hint="--sites NAME scores them on test patients of one that did",
        )
    return found


def _and_earlier(folder: Path, plan: RunPlan, asked: Sequence[str]) -> list[str]:
    """The sites that are asked, with those that were asked before in this folder: these give their stored
    answers again.

    Raises:
        ConfigError: the folder belongs to another plan (code `other-plan`).
    """
    from server.run_folder import PLAN, RunFolder

    if not (folder / PLAN).is_file():
        return list(asked)
    before = RunFolder.open(folder)
    if before.plan.sha256() != plan.sha256():
        raise ConfigError(
            f"{folder}: belongs to another plan", code="other-plan", hint="choose another run folder"
        )
    return sorted({*asked, *(site["site"] for site in before.manifest["sites"])})


def _simulated(
    plan: RunPlan,
    released: Released,
    asked: Sequence[str],
    data: Path,
    out: Path | None,
    *,
    jobs: int,
    device: str,
    accept_quarantine: bool,
) -> RunFolder:
    from server.run_folder import PLAN, refuse_existing
    from server.simulation.simulate import simulated

    if out is None:
        raise ConfigError("--data without --out", code="bad-argument", hint="--out DIR is the run folder")
    if not (out / PLAN).is_file():
        refuse_existing(out)
    asked = _and_earlier(out, plan, asked)
    return simulated(
        plan,
        data,
        out,
        jobs,
        device=device,
        accept_quarantine=accept_quarantine,
        released=released,
        asked=asked,
    )


def _deployed(
    federation: Federation,
    plan: RunPlan,
    run: RunFolder,
    asked: Sequence[str],
    name: str | None,
    *,
    accept_missing: bool,
    wait_s: float,
) -> RunFolder:
    from server.run.conduct import run_name
    from server.run.control_files import Order, is_being_run, run_running
    from server.run_folder import PLAN, RunFolder

    chosen = name or run_name(plan)
    folder = run_folder_named(federation, chosen)
    asked = _and_earlier(folder, plan, asked)
    if is_being_run(federation.folder, chosen):
        raise run_running(chosen)
    order = Order(accept_missing=accept_missing, wait_s=wait_s, source=str(run.path), sites=tuple(asked))
    submit(federation, plan, chosen, order)
    if (folder / PLAN).is_file():  # else it would look finished
        RunFolder.open(folder).update_manifest(status="running")
    with run_goes_on(chosen):
        follow_start(federation, chosen, wait_s=wait_s, detach=False, tell=say)
    return RunFolder.open(folder)
