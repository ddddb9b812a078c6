"""Carry out an order of `fedqc run`: rehearse the plan, train it if asked, record the outcome."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from common.plan import RunPlan
from common.processes import keep_memory_private
from server.federation.notify import tell
from server.messaging.flower import FAILURES, Grid, as_fedqc_error
from server.messaging.requests import rehearse
from server.messaging.signatures import Seal
from server.run.conduct import Released, check_controls, check_names, conduct, initial_lineage, run_name
from server.run.control_files import Order, being_run, failure_of, read_order, write_outcome
from server.run.observers import Notices
from server.run.rehearsal import admit, rehearsed
from server.run.released import evaluation_plan_refused, released_models
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from server.federation.registry import Federation


def carry_out(grid: Grid, plan: RunPlan, path: Path) -> None:
    """Run `plan` into the run folder `path`.

    A run folder under a federation's folder is run by its order, with its keys. Elsewhere (`flwr run` on
    nodes without a federation) nothing is signed.

    Raises:
        FedqcError: the run failed; it can be resumed.
    """
    if not (path.parent.parent / "federation.yaml").is_file():
        conduct(grid, plan, path)
        return
    from server.federation.registry import Federation

    keep_memory_private()  # the coordinator's key will be in it
    federation = Federation.open(path.parent.parent)
    with being_run(federation.folder, path.name):
        serve_order(grid, plan, path, federation)


def serve_order(grid: Grid, plan: RunPlan, path: Path, federation: Federation) -> None:
    """Rehearse, and train unless the order asks for the rehearsal only.

    The result of the rehearsal, and the failure if there is one, are written where `fedqc run` reads them.

    Raises:
        FedqcError: the run failed; also what Flower and its transport raise.
    """
    from server.federation.ledger_heads import LedgerHeads
    from server.federation.registry import EnrolledKeys

    run = path.name

    def notify(event: str, site: str = "", detail: str = "") -> None:
        tell(federation.notify, event=event, run=run, site=site, detail=detail)

    order = read_order(federation.folder, run)
    try:
        check_names(plan)
        check_controls(plan)
        seal = Seal(
            plan_sha256=plan.sha256(),
            key=federation.signing_key(),
            sites=EnrolledKeys(federation),
            witness=LedgerHeads(federation),
        )
        known = initial_lineage(plan)
        lineage = known.text() if known else ""
        begun = str(RunFolder.open(path).manifest["run"]) if (path / "plan.yaml").exists() else ""
        if plan.evaluate is not None:
            begun = run_name(plan)
        ask = functools.partial(
            rehearse,
            grid,
            seal,
            deadline_s=order.wait_s,
            run=begun,
            lineage=lineage,
            say=lambda text: write_outcome(federation.folder, run, "asking", {"text": text}),
        )
        sites = order.sites or plan.leave_one_site_out
        answers = ask(expected=len(sites or seal.sites))
        if sites:  # of the others nothing is asked, and none of them is waited for if these are there
            if not set(sites) <= set(answers):
                answers = ask(expected=len(seal.sites))
            answers = {name: said for name, said in answers.items() if name in sites}
        check = rehearsed(plan, answers, list(sites or seal.sites))
        write_outcome(federation.folder, run, "check", check)
        if order.mode == "check":
            return
        admit(plan, check, accept_missing=order.accept_missing)
        folder = conduct(
            grid,
            plan,
            path,
            tuning=order.tuning,
            seal=seal,
            observers=(Notices(notify),),
            released=models_of(order, plan),
            asked=order.sites,
        )
    except FAILURES as error:
        failure = as_fedqc_error(error, run)
        write_outcome(federation.folder, run, "failure", failure_of(failure))
        notify("failed", detail=failure.code)
        raise
    notify(str(folder.manifest["status"]))


def models_of(order: Order, plan: RunPlan) -> Released | None:
    """The models that an evaluation scores, from the run that released them; None of any other run.

    Raises:
        ConfigError: the order names no run (`evaluation-plan`); or as `released_models`.
    """
    if plan.evaluate is None:
        return None
    if order.source is None:
        raise evaluation_plan_refused(plan.name)
    return released_models(RunFolder.open(Path(order.source)), [model.name for model in plan.evaluate.models])
