"""Simulate a grid of plans, each with several seeds, and put the results into one table.

    OUT/  sweep.json  cells/<setting>-<seed>/
          results.json  table.md  table.csv  plot.png  [roc.png]  report.html

A cell is an ordinary run folder: it can be reported, verified and compared as any other. Cells are run one
after the other, the sites of each side by side, so that both cores of a small machine are used and no two
runs work on one site at a time. What was finished is not run again; what was interrupted goes on from its
last finished round. Of a finished cell the checkpoints and answers of its rounds are removed, which would
fill a disk: to verify it, run its plan.yaml again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from common.cli import Format
from common.errors import ConfigError, PlanError
from common.files import locked
from common.names import SITE_NAME
from common.plan import RunPlan, changed_values, parse_plan, plan_values
from common.progress_bar import progress_shown, say
from common.strict import StrictModel, describe_validation
from common.terminal import print
from server.evaluation.tables import PARTIAL
from server.run_folder import EVALUATION, PLAN, RunFolder, write_json

if TYPE_CHECKING:
    from server.evaluation.sweep_table import Setting

SWEEP, CELLS, LOCK = "sweep.json", "cells", ".lock"
MAX_CELLS = 100
"""Cells that are run without being asked for by `--max-cells`."""


class SweepFile(StrictModel):
    """A sweep as its YAML file says it.

    `grid` maps dotted plan keys to lists of values, or to mappings of labels to values; a value may itself be
    a mapping, which then sets several keys together.
    """

    name: str = Field(pattern=SITE_NAME)
    question: str = ""
    plan: str  # file of the base plan, relative to that of the sweep
    # dotted plan keys that differ from the base plan in every cell
    set: dict[str, Any] = Field(default={})
    grid: dict[str, list[Any] | dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One plan of a sweep with one seed."""

    setting: int  # position in the grid, the last key fastest
    labels: Mapping[str, str]  # dotted plan key -> how its value is called
    plan: RunPlan

    @property
    def folder(self) -> str:
        words = re.sub(r"[^a-z0-9.]+", "-", " ".join(self.labels.values()).lower()).strip("-.")[:60]
        return f"{self.setting:03d}-{words}-seed-{self.plan.seed}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    name: str
    question: str
    cells: tuple[Cell, ...]  # by setting, then by seed

    def sha256(self) -> str:
        """Of all plans, in their order, and of what their settings are called."""
        lines = [json.dumps([cell.labels, cell.plan.sha256()]) for cell in self.cells]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_sweep(values: object) -> bool:
    """Whether a decoded file is a sweep, and not a plan."""
    return isinstance(values, dict) and "grid" in values


def parse_sweep(
    values: object, path: Path, *, changes: Mapping[str, Any] | None = None, max_cells: int = MAX_CELLS
) -> Sweep:
    """Validate a decoded sweep and every plan of it.

    Args:
        path: its file.
        changes: dotted plan keys with values that replace those of the base plan and of `set`.
        max_cells: the most cells that may be run.
    Raises:
        PlanError: a key is unknown or has a wrong value, in the sweep or in a plan of it; the grid has no
            values (`bad-sweep`); more cells than `max_cells` (`too-many-cells`).
    """
    try:
        found = SweepFile.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise PlanError(
            f"{path}: {describe_validation(error)}",
            code="bad-sweep",
            hint=f"keys: {', '.join(SweepFile.model_fields)}",
        ) from None
    except (TypeError, ValueError) as error:
        raise PlanError(f"{path}: {error}", code="bad-sweep") from None
    _check_grid(found, path, changes or {})
    axes = {key: _labelled(options) for key, options in found.grid.items()}
    count = len(found.seeds)
    for options in axes.values():
        count *= len(options)
    if count > max_cells:
        raise PlanError(
            f"{path}: {count} runs, at most {max_cells} are done unasked",
            code="too-many-cells",
            hint=f"shorten the lists of grid, or --max-cells {count}",
        )
    base_path = path.parent / found.plan
    base = changed_values(plan_values(base_path), found.set | dict(changes or {}), where=str(base_path))
    cells = []
    for setting, chosen in enumerate(itertools.product(*(options.items() for options in axes.values()))):
        labels = {key: label for key, (label, _) in zip(axes, chosen, strict=True)}
        own = {key: value for key, (_, value) in zip(axes, chosen, strict=True)}
        where = f"{path}: {', '.join(f'{key} = {label}' for key, label in labels.items())}"
        for seed in found.seeds:
            plan = parse_plan(changed_values(base, own | {"seed": seed}, where=where), where=where)
            cells.append(Cell(setting=setting, labels=labels, plan=plan))
    return Sweep(name=found.name, question=found.question, cells=tuple(cells))


def _check_grid(found: SweepFile, path: Path, changes: Mapping[str, Any]) -> None:
    for key, options in found.grid.items():
        if not options:
            raise PlanError(
                f"{path}: grid.{key} has no values",
                code="bad-sweep",
                hint="give a list, or a mapping of labels to values",
            )
        if key in changes:
            raise PlanError(
                f"--set {key}: the grid gives its values", code="bad-sweep", hint="set another key"
            )
    if "seed" in found.grid or "seed" in found.set or "seed" in changes:
        raise PlanError(f"{path}: seed is no key of a grid", code="bad-sweep", hint="seeds: [1, 2, 3]")
    if len(set(found.seeds)) < len(found.seeds):
        raise PlanError(f"{path}: seeds names one twice", code="bad-sweep")


def _labelled(options: list[Any] | dict[str, Any]) -> dict[str, Any]:
    """Label -> value; a value that is named twice counts once."""
    return options if isinstance(options, dict) else {_words(value): value for value in options}


def _words(value: object) -> str:
    match value:
        case bool():
            return "on" if value else "off"
        case int() | float():
            return f"{value:g}"
        case dict():
            return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items()) or "none"
        case list():
            return "+".join(map(_words, value)) or "none"
        case _:
            return "none" if value is None else str(value)


def run_sweep(
    sweep: Sweep,
    data: Path,
    out: Path,
    jobs: int,
    format: Format,
    *,
    device: str = "cpu",
    accept_quarantine: bool = False,
) -> int:
    """Run the cells of a sweep that are not finished, write table and figures, and print the table.

    Args:
        data, jobs, device, accept_quarantine: as `simulated`, for every cell.
        out: the folder of the sweep; that of an interrupted one is continued.
    Returns:
        exit status: 6 where a cell is partial.
    Raises:
        FedqcError: `other-sweep` (`out` belongs to another), `run-exists` (to something else),
            `sweep-running`; or as `simulated`.
    """
    from server.evaluation.sweep_table import results_table, write_results
    from server.run_folder import without_nan
    from server.simulation.simulate import find_sites

    find_sites(data)
    with cells_run(
        sweep,
        data,
        out,
        jobs,
        device=device,
        accept_quarantine=accept_quarantine,
        resolve=functools.partial(resolved_plan, jobs=jobs),
    ):
        results = write_results(out, sweep.name, sweep.question, _settings(sweep, out))
    if format is Format.json:
        print(json.dumps(without_nan(results | {"sweep_folder": str(out)}), ensure_ascii=False))
    else:
        print(results_table(results))
        print(f"\nsweep folder: {out}")
    return PARTIAL if results["partial"] else 0


Resolve = Callable[[RunPlan], tuple[RunPlan, dict[str, Any] | None]]
"""A plan as it is run, its settings chosen and its noise stated, and how they were chosen."""


@contextmanager
def cells_run(
    sweep: Sweep,
    data: Path,
    out: Path,
    jobs: int,
    *,
    device: str,
    accept_quarantine: bool,
    resolve: Resolve,
) -> Iterator[None]:
    """Run the cells that are not finished; the body, in which no other process works on `out`, sums up.

    Args:
        data, out, jobs, device, accept_quarantine: as `run_sweep`.
        resolve: called with the plan of each cell that is begun.
    Raises:
        FedqcError: as `run_sweep`.
    """
    _claim(sweep, out)
    with locked(out / LOCK, busy=lambda: _running(out)):
        for path in (out / CELLS).glob(".*"):  # folders that were begun, and never had a plan
            shutil.rmtree(path)
        for number, cell in enumerate(sweep.cells, start=1):
            folder = out / CELLS / cell.folder
            if not (folder / EVALUATION).is_file():
                say(f"run {number} of {len(sweep.cells)}: {cell.folder}")
                _run_cell(
                    cell,
                    data,
                    folder,
                    jobs,
                    device=device,
                    accept_quarantine=accept_quarantine,
                    resolve=resolve,
                )
            _forget_rounds(folder)
        yield


def resolved_plan(plan: RunPlan, *, jobs: int) -> tuple[RunPlan, dict[str, Any] | None]:
    """A plan with its settings chosen and its noise stated, and how they were chosen; with a progress bar.

    Args:
        jobs: as `server.run.tune.tune`.
    Raises:
        FedqcError: as `server.run.tune.resolved`.
    """
    from server.run.tune import resolved

    with progress_shown() as progress:
        found, tuning = resolved(plan, jobs=jobs, progress=progress)
    return found, tuning.to_json() if tuning else None


def _run_cell(
    cell: Cell,
    data: Path,
    path: Path,
    jobs: int,
    *,
    device: str,
    accept_quarantine: bool,
    resolve: Resolve,
) -> None:
    from server.run.conduct import cpu_seconds
    from server.simulation.simulate import continued, simulated

    before = cpu_seconds()
    if (path / PLAN).is_file():
        continued(RunFolder.open(path), data, jobs, device=device, cpu_before=before)
        return
    plan, tuning = resolve(cell.plan)
    simulated(
        plan,
        data,
        path,
        jobs,
        device=device,
        accept_quarantine=accept_quarantine,
        tuning=tuning,
        cpu_before=before,
    )


def _forget_rounds(folder: Path) -> None:
    for path in (*folder.rglob("checkpoints"), *folder.rglob("answers/round-*")):
        shutil.rmtree(path)


def _claim(sweep: Sweep, out: Path) -> None:
    """Make `out` the folder of this sweep, unless it is."""
    try:
        known = json.loads((out / SWEEP).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        known = None
    except (OSError, ValueError, KeyError, TypeError):
        known = ""
    if known is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists and is not the folder of a sweep", code="run-exists", hint="choose another --out"
        )
    if known is not None and known != sweep.sha256():
        raise ConfigError(
            f"{out}: belongs to another sweep, or to another version of this one",
            code="other-sweep",
            hint="choose another --out; the same file and the same --set continue a sweep",
        )
    if known is None:
        try:
            write_json(
                out / SWEEP,
                {
                    "name": sweep.name,
                    "sha256": sweep.sha256(),
                    "cells": {
                        cell.folder: {**cell.labels, "seed": cell.plan.seed, "plan": cell.plan.sha256()}
                        for cell in sweep.cells
                    },
                },
            )
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written ({error.strerror})", code="not-writable") from None


def _running(out: Path) -> ConfigError:
    return ConfigError(
        f"{out}: another process runs this sweep", code="sweep-running", hint="wait until it has ended"
    )


def _settings(sweep: Sweep, out: Path) -> Sequence[Setting]:
    from server.evaluation.sweep_table import Setting

    last = Counter(key.rpartition(".")[2] for key in sweep.cells[0].labels)
    found = []
    for number, cells in itertools.groupby(sweep.cells, key=lambda cell: cell.setting):
        of_setting = list(cells)
        labels = {
            key if last[short] > 1 else short: label
            for key, label in of_setting[0].labels.items()
            for short in [key.rpartition(".")[2]]
        }
        runs = [RunFolder.open(out / CELLS / cell.folder) for cell in of_setting]
        found.append(Setting(number=number, labels=labels, runs=runs))
    return found
