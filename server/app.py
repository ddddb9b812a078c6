"""The Flower door of the coordinator, and what a run is: plan, model, arms, evaluation, run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException

from common.errors import FedqcError, InternalError, PlanError, RunError
from common.plan import RunPlan, parse_plan
from server.federation.notify import tell
from server.messaging.requests import rehearse
from server.messaging.signatures import Seal
from server.run.conduct import conduct
from server.run.control_files import being_run, failure_of, read_order, write_outcome
from server.run.rehearsal import admit, rehearsed

if TYPE_CHECKING:
    from server.federation.registry import Federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    if not config.get("plan") or not config.get("run-dir"):
        raise PlanError(
            "the run config needs `plan` (canonical JSON) and `run-dir` (absolute path)",
            hint="see docs/architecture.md",
        )
    plan = parse_plan(json.loads(str(config["plan"])))
    path = Path(str(config["run-dir"]))
    if (path.parent.parent / "federation.yaml").is_file():
        from server.federation.registry import Federation

        federation = Federation.open(path.parent.parent)
        with being_run(federation.folder, path.name):
            _serve_order(grid, plan, path, federation)
    else:  # `flwr run` on nodes without a federation: nothing is signed
        conduct(grid, plan, path)


def _serve_order(grid: Grid, plan: RunPlan, path: Path, federation: Federation) -> None:
    """Rehearse, and train unless that was all that was wanted. How it ended is written down where `fedqc run`
    looks.
    """
    from server.federation.registry import EnrolledKeys

    order = read_order(federation.folder, path.name)
    seal = Seal(plan_sha256=plan.sha256(), key=federation.signing_key(), sites=EnrolledKeys(federation))

    def tell_of(event: str, site: str = "", detail: str = "") -> None:
        tell(federation.notify, event=event, run=path.name, site=site, detail=detail)

    try:
        check = rehearsed(
            plan, rehearse(grid, seal, expected=len(seal.sites), deadline_s=order.wait_s), list(seal.sites)
        )
        write_outcome(federation.folder, path.name, "check", check)
        if order.mode == "check":
            return
        admit(plan, check, accept_missing=order.accept_missing)
        folder = conduct(grid, plan, path, seal=seal, tell_of=tell_of)
    except (Exception, RunNotRunningException) as error:  # Flower's is no Exception
        failure = (
            error
            if isinstance(error, FedqcError)
            else InternalError(type(error).__name__, hint="the ServerApp's log has more")
        )
        if isinstance(error, RunNotRunningException):
            why = "it was stopped, or was not heard of for a minute"
            failure = RunError(
                f"the SuperLink ended the run: {why}",
                code="run-ended",
                hint=f"fedqc run resume {path.name} goes on",
            )
        if isinstance(error, httpx.TransportError):
            hint = (
                "it ended, or its certificate did (fedqc federation renew); then fedqc run resume "
                f"{path.name} goes on"
            )
            failure = RunError("the SuperLink cannot be reached", code="no-superlink", hint=hint)
        write_outcome(federation.folder, path.name, "failure", failure_of(failure))
        tell_of("failed", detail=failure.code)
        raise
    tell_of(str(folder.manifest["status"]))
