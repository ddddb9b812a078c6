"""Simulate a plan once for each site, which is held out, and once with none: what of the next hospital?

    OUT/  sweep.json  cells/<number>-<site>-seed-<seed>/  results.json  table.txt

The member plans differ from the study's in `held_out` alone, and settings that it leaves to `auto` are chosen
once for all. A site is scored on its test patients only, because its others train in the sister runs. Runs,
their order and what is continued are those of a sweep.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Format
from common.leave_one_out import check_sites, price_text
from common.plan import RunPlan
from common.progress_bar import say
from server.run_folder import EVALUATION, RunFolder
from server.simulation.sweep import CELLS, Cell, Sweep, cells_run, resolved_plan


def member_plans(study: RunPlan, sites: Sequence[str]) -> list[RunPlan]:
    """The plans of a study: each site held out once, in the order given, then none.

    Raises:
        PlanError: as `check_sites`.
    """
    check_sites(sites, study.federation.quorum)
    own = {"leave_one_site_out": (), "held_out_patients": "test"}
    return [
        study.model_copy(update=own | {"held_out": held_out})
        for held_out in (*((site,) for site in sites), ())
    ]


def run_leave_one_site_out(
    study: RunPlan,
    data: Path,
    out: Path,
    jobs: int,
    format: Format,
    *,
    device: str = "cpu",
    accept_quarantine: bool = False,
) -> int:
    """Run the members of a study that are not finished, check that no site trained where it was held out, and
    print what they say of the next hospital.

    Args:
        study: its `held_out` is replaced.
        data, jobs, device, accept_quarantine: as `simulated`, for every member.
        out: the folder of the study; that of an interrupted one is continued.
    Returns:
        exit status: 6 where a member is partial.
    Raises:
        FedqcError: `too-few-sites`; `held-out-trained`; or as `run_sweep`.
    """
    from server.evaluation.study_results import show_results, write_results
    from server.simulation.local_grid import named
    from server.simulation.simulate import find_sites

    read_site = named("client.site.config:read_site")
    sites = [read_site(path)[0].name for path in find_sites(data)]
    plans = member_plans(study, sites)
    labels = [plan.held_out[0] if plan.held_out else "none" for plan in plans]
    cells = tuple(
        Cell(setting=number, labels={"held_out": label}, plan=plan)
        for number, (plan, label) in enumerate(zip(plans, labels, strict=True))
    )
    sweep = Sweep(name=study.name, question=study.question, cells=cells)

    @functools.cache
    def settled() -> tuple[RunPlan, dict[str, Any] | None]:
        found, tuning = resolved_plan(plans[-1], jobs=jobs)
        members = [found.model_copy(update={"held_out": plan.held_out}) for plan in plans]
        say(price_text(members, sites))
        return found, tuning

    def resolve(plan: RunPlan) -> tuple[RunPlan, dict[str, Any] | None]:
        found, tuning = settled()
        return found.model_copy(update={"held_out": plan.held_out}), tuning

    if not all((out / CELLS / cell.folder / EVALUATION).is_file() for cell in cells):
        settled()
    with cells_run(
        sweep, data, out, jobs, device=device, accept_quarantine=accept_quarantine, resolve=resolve
    ):
        results = write_results(out, [RunFolder.open(out / CELLS / cell.folder) for cell in cells])
    return show_results(results, out, format)
