"""Simulate a plan once for each site, which is held out, and once with none: what of the next hospital?

    OUT/  sweep.json  cells/<number>-<site>-seed-<seed>/  results.json  table.txt

The member plans differ from the study's in `held_out` alone, and settings that it leaves to `auto` are chosen
once for all. A site is scored on its test patients only, because its others train in the sister runs. Runs,
their order and what is continued are those of a sweep.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Format
from common.errors import PlanError, RunError
from common.files import write_bytes
from common.plan import RunPlan
from common.privacy import epsilon_text
from common.progress_bar import say
from common.terminal import print
from server.evaluation.tables import PARTIAL
from server.run_folder import EVALUATION, RunFolder, write_json
from server.simulation.sweep import CELLS, Cell, Sweep, cells_run, resolved_plan

RESULTS, TABLE, MIN_SITES = "results.json", "table.txt", 3
"""Files of the result; fewer sites leave none to federate with."""


def member_plans(study: RunPlan, sites: Sequence[str]) -> list[RunPlan]:
    """The plans of a study: each site held out once, in the order given, then none.

    Raises:
        PlanError: fewer than three sites, or fewer would train than the quorum (`too-few-sites`).
    """
    if len(sites) < MIN_SITES or len(sites) - 1 < study.federation.quorum:
        raise PlanError(
            f"{len(sites)} sites: with one left out, {len(sites) - 1} would train",
            code="too-few-sites",
            hint=f"at least {max(MIN_SITES, study.federation.quorum + 1)} sites, or lower federation.quorum",
        )
    return [
        study.model_copy(update={"held_out": held_out, "held_out_patients": "test"})
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
    from server.evaluation.leave_one_out import (
        compare_hospitals,
        family_of,
        hospitals_table,
        together_epsilon,
    )
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
        epsilon = together_epsilon(members, sites)
        say(
            f"{len(plans)} runs: {len(sites)} sites, each left out once, and none. "
            + (
                "No arm is private."
                if epsilon is None
                else f"A run asks epsilon {epsilon_text(found.privacy.epsilon)} of a patient; all together "
                f"{epsilon_text(epsilon)}, delta {found.privacy.delta:g}"
            )
        )
        return found, tuning

    def resolve(plan: RunPlan) -> tuple[RunPlan, dict[str, Any] | None]:
        found, tuning = settled()
        return found.model_copy(update={"held_out": plan.held_out}), tuning

    if not all((out / CELLS / cell.folder / EVALUATION).is_file() for cell in cells):
        settled()
    with cells_run(
        sweep, data, out, jobs, device=device, accept_quarantine=accept_quarantine, resolve=resolve
    ):
        family = family_of([RunFolder.open(out / CELLS / cell.folder) for cell in cells])
        assert family is not None  # its plans differ in held_out alone
        results = compare_hospitals(family)
        _check_exclusion(results)
        write_json(out / RESULTS, results)
        write_bytes(out / TABLE, (hospitals_table(results) + "\n").encode())
    if format is Format.json:
        print(json.dumps(results | {"study_folder": str(out)}, ensure_ascii=False))
    else:
        print(hospitals_table(results))
        print(f"\nstudy folder: {out}")
    return PARTIAL if any(run["status"] == "partial" for run in results["runs"]) else 0


def _check_exclusion(results: dict[str, Any]) -> None:
    """Raises RunError (`held-out-trained`) where the records of a run name a held-out site as a trainer."""
    for member in results["members"]:
        if trained := sorted({*member["held_out"]} & {*member["trained"]}):
            raise RunError(
                f"{member['run']}: {trained[0]} was held out, and trained",
                code="held-out-trained",
                hint="the run folder was changed by hand: remove it, and run the study again",
            )
