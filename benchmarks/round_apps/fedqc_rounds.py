"""A ServerApp that runs only fedqc's rounds, on a model of any layers.

Half of benchmarks/deployment_round.py. Questions, signatures, codec, gate, average, checkpoint and records
are the project's own; only the scoring of each round's model on the public set is left out, as it is of the
network, not of the deployment.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.arms import FEDERATED
from common.counts import Counts
from common.plan import parse_plan
from common.weights import Manifest
from server.federation.registry import Federation, site_keys
from server.messaging.requests import describe_sites
from server.messaging.signatures import Seal
from server.public_model.public_set import PublicBins
from server.run.observers import Event, RoundClosed
from server.run.rounds import RunContext, Stage, run_rounds
from server.run_folder import ArmFolder
from server.strategies import strategy_named

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    plan = parse_plan(json.loads(str(config["plan"])))
    federation = Federation.open(Path(str(config["federation"])))
    seal = Seal(plan_sha256=plan.sha256(), key=federation.signing_key(), sites=site_keys(federation))
    layers = json.loads(str(config["layers"]))
    manifest = Manifest(
        names=tuple(name for name, _ in layers), shapes=tuple(tuple(shape) for _, shape in layers)
    )
    initial = (0.02 * np.random.default_rng(0).standard_normal(manifest.size)).astype(np.float32)

    def note(number: int, record: dict[str, Any]) -> None:
        if record.get("failed") or record.get("refused"):
            raise RuntimeError(f"round {number}: {record}")
        with open(str(config["marks"]), "a", encoding="utf-8") as file:
            file.write(json.dumps({"round": number, "at": time.time(), "bytes": record.get("bytes")}) + "\n")

    def observe(event: Event) -> None:
        if isinstance(event, RoundClosed):
            note(event.round, event.record)

    sites = describe_sites(grid, seal, expected=len(seal.sites), deadline_s=60)
    note(0, {})
    context_of_run = RunContext(
        grid=grid,
        seal=seal,
        plan=plan,
        run="deployment-round",
        manifest=manifest,
        initial=initial,
        strategy=strategy_named(plan.training.strategy),
        score_public=lambda flat: {},
        public_bins=lambda flat: PublicBins(
            edges=np.zeros((0, 0), np.float32),
            counts=Counts.empty(),
            any_edges=np.zeros(0, np.float32),
            any_counts=Counts.empty(0),
        ),
        observe=observe,
    )
    folder = ArmFolder(path=Path(str(config["run-dir"])))
    run_rounds(context_of_run, Stage(arm=FEDERATED, name=FEDERATED, sites=sites, folder=folder))
