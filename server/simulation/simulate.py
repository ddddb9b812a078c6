"""TODO."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Format, confirmed
from common.errors import ConfigError, DataError
from common.plan import RunPlan
from server.evaluation.tables import PARTIAL, summary, table

if TYPE_CHECKING:
    from server.run_folder import RunFolder


def resume_simulation(folder: RunFolder, data: Path | None, threads: int | None, format: Format) -> int:
    """Go on with a simulation.

    Raises:
        ConfigError: nobody says where its data lie (code `no-data`).
    """
    simulation = folder.simulation
    if data is None and not simulation:
        raise ConfigError(
            f"{folder.path}: does not say where its data lie", code="no-data", hint="--data DIR"
        )
    return _simulate(
        folder.plan,
        data or Path(simulation["data"]),
        folder.path,
        threads or folder.manifest["threads"],
        format,
    )


def _simulate(
    plan: RunPlan, data: Path, out: Path, threads: int, format: Format, *, accept_quarantine: bool = False
) -> int:
    from common.learning import set_threads
    from server.run.conduct import check_sites, conduct
    from server.run.progress import Progress
    from server.simulation.local_grid import LocalGrid

    set_threads(threads)
    site_yamls = find_sites(data)
    read_site, prepare = _load("client.site.config:read_site"), _load("client.agent.tasks:prepare")
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
    """An object by "module:name". Simulation plays both sides, and is the only place where the server names
    the client.
    """
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
        raise ConfigError(
            f"--data {data}: no such folder", code="no-such-folder", hint="fedqc data phantom DIR makes one"
        )
    found = sorted(path.absolute() for path in data.glob("*/site.yaml"))
    if not found:
        raise ConfigError(
            f"--data {data}: none of its subfolders holds a site.yaml",
            code="no-sites",
            hint="fedqc data phantom DIR makes some",
        )
    return found
