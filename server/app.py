"""The coordinator's ServerApp: decode the run config and carry out the run."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import PlanError
from common.plan import parse_plan
from server.run.order import carry_out

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan of the run config.

    Raises:
        PlanError: the run config lacks a key, or the plan does not validate.
        FedqcError: the run failed; it can be resumed.
    """
    config = context.run_config
    if not config.get("plan") or not config.get("run-dir"):
        raise PlanError(
            "the run config needs `plan` (canonical JSON) and `run-dir` (absolute path)",
            hint="see docs/architecture.md",
        )
    plan = parse_plan(json.loads(str(config["plan"])))
    carry_out(grid, plan, Path(str(config["run-dir"])))
