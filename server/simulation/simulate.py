"""Simulate a consortium on one machine: find the sites, prepare their data, conduct the run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arms import ARMS
from common.cli import Format, confirmed
from common.errors import ConfigError, DataError
from common.plan import RunPlan
from common.processes import usable_cores
from common.terminal import print
from server.evaluation.tables import PARTIAL, summary, table

if TYPE_CHECKING:
    from server.run.conduct import Released
    from server.run_folder import RunFolder
    from server.simulation.local_grid import LocalGrid

CLIENT_APP = "client.pooled:app"
"""What answers for every node of a simulation, the pooled one included."""


def resume_simulation(
    folder: RunFolder,
    data: Path | None,
    jobs: int | None,
    format: Format,
    *,
    device: str = "cpu",
    accept_changed_data: bool = False,
) -> int:
    """Continue a simulation as `continued` does, and print the results.

    Returns:
        exit status.
    """
    return shown(
        continued(folder, data, jobs, device=device, accept_changed_data=accept_changed_data), format
    )


def continued(
    folder: RunFolder,
    data: Path | None,
    jobs: int | None,
    *,
    device: str = "cpu",
    accept_changed_data: bool = False,
    cpu_before: float = 0.0,
) -> RunFolder:
    """Continue a simulation from its last finished round.

    Args:
        data: where the sites lie now; None: where they lay before.
        jobs, device, cpu_before: as `simulated`; jobs None: one for each core.
        accept_changed_data: continue although the data of a site are others than in the first round.
    Raises:
        DataError: the data of a site changed (code `data-changed`).
        ConfigError: neither `data` nor the run folder names the sites (code `no-data`); the run is an
            evaluation by itself (`evaluation-plan`).
    """
    from server.run.released import evaluation_plan_refused

    simulation = folder.simulation
    if data is None and not simulation:
        raise ConfigError(
            f"{folder.path}: does not say where its data lie", code="no-data", hint="--data DIR"
        )
    if folder.plan.evaluate is not None:
        raise evaluation_plan_refused(str(folder.path))
    return simulated(
        folder.plan,
        data or Path(simulation["data"]),
        folder.path,
        jobs or usable_cores(),
        threads=int(folder.manifest["threads"]),
        device=device,
        run=str(folder.manifest["run"]),
        accept_changed_data=accept_changed_data,
        cpu_before=cpu_before,
    )


def run_simulation(
    plan: RunPlan,
    data: Path,
    out: Path,
    jobs: int,
    format: Format,
    *,
    device: str = "cpu",
    accept_quarantine: bool = False,
    tuning: dict[str, Any] | None = None,
) -> int:
    """Run `plan` as `simulated` does, and print the results.

    Returns:
        exit status.
    """
    return shown(
        simulated(
            plan,
            data,
            out,
            jobs,
            device=device,
            accept_quarantine=accept_quarantine,
            tuning=tuning,
        ),
        format,
    )


def simulated(
    plan: RunPlan,
    data: Path,
    out: Path,
    jobs: int,
    *,
    threads: int = 1,
    device: str = "cpu",
    accept_quarantine: bool = False,
    run: str = "",
    accept_changed_data: bool = False,
    tuning: dict[str, Any] | None = None,
    cpu_before: float = 0.0,
    released: Released | None = None,
    asked: Sequence[str] = (),
) -> RunFolder:
    """Run `plan` on the sites under `data` into the run folder `out`.

    Args:
        jobs: sites that train side by side, each in a process; the results are the same for any number.
        threads: of torch in each process; other than 1 for a run that an earlier version began with more.
        device: where every site computes, whatever its site.yaml says: `auto`, `cpu`, `cuda`, `cuda:N`.
        accept_quarantine: continue although many files cannot be read.
        run: name of the run that is resumed; "" for a new one.
        accept_changed_data: continue it although the data of a site changed.
        tuning: how the plan's settings were chosen, kept in the run folder.
        cpu_before: CPU seconds that this process had used for other runs.
        released, asked: of an evaluation by itself, as `conduct`; no other site is looked at.
    Raises:
        FedqcError: the plan, the data or the run failed.
    """
    from common.devices import describe, use_device
    from common.learning import set_threads
    from common.progress_bar import say
    from server.run.conduct import check_names, check_sites, conduct
    from server.run_folder import COHORTS, write_json
    from server.simulation.local_grid import named

    set_threads(threads)
    if (where := use_device(device)).type != "cpu":
        say(f"training runs on {describe(where)}")
    site_yamls = find_sites(data)
    read_site, prepare = named("client.site.config:read_site"), named("client.agent.tasks:prepare")
    table_of_cohort, tables = named("client.data_check.cohort_table:table_of_cohort"), {}
    names = {path: read_site(path)[0].name for path in site_yamls}
    check_names(plan)
    check_extra(plan)
    if plan.evaluate is None:
        check_sites(plan, list(names.values()))
    else:
        site_yamls = [path for path in site_yamls if names[path] in asked]
    for path in site_yamls:
        try:
            cohort = prepare(path, plan, accept_quarantine=accept_quarantine)
        except DataError as refusal:
            if refusal.code != "too-many-quarantined" or not confirmed(refusal):
                raise
            cohort = prepare(path, plan, accept_quarantine=True)
        name = cohort.site.name
        say(f"{name}: {cohort.report.summary()}")
        if table := table_of_cohort(cohort, everyone=plan.scores_everyone_at(name)):
            tables[name] = table
        if run:
            check_data = named("client.agent.tasks:check_run_data")
            if changes := check_data(cohort, run, plan, accept=accept_changed_data):
                say(f"{cohort.site.name}: other {' and '.join(changes)} than in the first round, accepted")
    nodes = node_configs(plan, site_yamls, names=[names[path] for path in site_yamls])
    config = {"plan": plan.canonical_json(), "run-dir": str(out.absolute())}
    load = loads(plan, nodes, names={str(path): name for path, name in names.items()})
    with _grid(plan, nodes, config, jobs=jobs, threads=threads, device=device, load=load) as grid:
        folder = conduct(
            grid,
            plan,
            out,
            simulation={"data": str(data.absolute())},
            tuning=tuning,
            jobs=jobs,
            others_cpu=lambda: grid.cpu_seconds() - cpu_before,
            released=released,
            asked=asked,
        )
    write_json(folder.path / COHORTS, tables)
    return folder


def check_extra(plan: RunPlan) -> None:
    """Raises ConfigError (code `missing-extra`): an arm is a baseline, and scikit-learn is not installed."""
    arms = [arm for arm in plan.arms if ARMS[arm].baseline]
    if arms and find_spec("sklearn") is None:
        raise ConfigError(
            f"arm `{arms[0]}` needs scikit-learn, which is not installed",
            code="missing-extra",
            hint="pip install 'fedqc[baseline]'; in a checkout: .venv/bin/pip install -e '.[baseline]'",
        )


def shown(folder: RunFolder, format: Format) -> int:
    """Print the results of a run.

    Returns:
        exit status.
    """
    evaluation = folder.evaluation
    if format is Format.json:
        print(json.dumps(summary(evaluation, folder.path), ensure_ascii=False))
    else:
        print(table(evaluation))
        print(f"\nrun folder: {folder.path}")
        print(f"model: {folder.path / 'model.safetensors'}")
        print(f"report: fedqc report {shlex.quote(str(folder.path))}")
    return PARTIAL if evaluation["status"] == "partial" else 0


def node_configs(
    plan: RunPlan, site_yamls: Sequence[Path], *, names: Sequence[str]
) -> dict[int, dict[str, str]]:
    """Node id -> node config: one node a site, and one that pools the training sites if an arm needs it.
    Where an arm is a baseline, each site's node names the training sites, whose baselines it scores.

    Args:
        names: of the sites, in the order of `site_yamls`.
    """
    nodes = {number: {"site-config": str(path)} for number, path in enumerate(site_yamls, start=1)}
    training = os.pathsep.join(
        str(path) for path, name in zip(site_yamls, names, strict=True) if name not in plan.held_out
    )
    if any(ARMS[arm].baseline for arm in plan.arms):
        nodes = {number: config | {"baseline-sites": training} for number, config in nodes.items()}
    if any(ARMS[arm].trainer == "pooled site" for arm in plan.arms):
        nodes[len(nodes) + 1] = {"pooled-sites": training}
    return nodes


def _grid(
    plan: RunPlan,
    nodes: Mapping[int, Mapping[str, str]],
    config: Mapping[str, str],
    *,
    jobs: int,
    threads: int,
    device: str,
    load: Mapping[int, float],
) -> LocalGrid:
    from server.simulation.local_grid import LocalGrid, named
    from server.simulation.parallel_grid import ParallelGrid

    if jobs == 1:
        return LocalGrid(named(CLIENT_APP), nodes, config)
    return ParallelGrid(
        CLIENT_APP,
        nodes,
        config,
        jobs=jobs,
        threads=threads,
        device=device,
        load=load,
        preload=["client.dp.dp_sgd"] if any(ARMS[arm].clips for arm in plan.arms) else [],
    )


def loads(
    plan: RunPlan, nodes: Mapping[int, Mapping[str, str]], *, names: Mapping[str, str]
) -> dict[int, float]:
    """About what each node has to train: arms of the whole network, times sites that it holds; nothing at a
    site that is held out, which would else take a process from one that has work.

    Args:
        names: site.yaml -> name of the site.
    """
    whole = [arm for arm in plan.arms if ARMS[arm].by_rounds and not ARMS[arm].clips]
    pooled = [arm for arm in whole if ARMS[arm].trainer == "pooled site"]
    found: dict[int, float] = {}
    for node, config in nodes.items():
        if "pooled-sites" in config:
            found[node] = len(pooled) * (config["pooled-sites"].count(os.pathsep) + 1)
        else:
            is_held_out = names[config["site-config"]] in plan.held_out
            found[node] = 0 if is_held_out else len(whole) - len(pooled)
    return found


def refuse_early(plan: RunPlan, data: Path, out: Path, device: str) -> None:
    """Raise now what `simulated` would raise of its arguments after `auto` has rehearsed for minutes.

    Raises:
        ConfigError: OUT is not free, there are no sites or not those that the plan names, or no such device.
    """
    from common.devices import device_of
    from server.run.conduct import check_names, check_sites
    from server.run_folder import refuse_existing
    from server.simulation.local_grid import named

    refuse_existing(out)
    device_of(device)
    check_names(plan)
    read_site = named("client.site.config:read_site")
    check_sites(plan, [read_site(path)[0].name for path in find_sites(data)])


def find_sites(data: Path) -> list[Path]:
    """The site.yaml of each direct subfolder that has one, absolute, sorted by folder name.

    Raises:
        ConfigError: no such folder, or no sites in it.
    """
    if not data.is_dir():
        raise ConfigError(
            f"--data {data}: no such folder", code="no-such-folder", hint="fedqc data phantom DIR makes one"
        )
    site_yamls = sorted(path.absolute() for path in data.glob("*/site.yaml"))
    if not site_yamls:
        raise ConfigError(
            f"--data {data}: none of its subfolders holds a site.yaml",
            code="no-sites",
            hint="fedqc data phantom DIR makes some",
        )
    return site_yamls
