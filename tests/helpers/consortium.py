"""A tiny consortium of generated hospitals, and a grid to run plans on it in this process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Error, Message

from client.site.config import read_site
from client.site.site_ledger import init_ledger
from common.arms import ARMS
from common.plan import RunPlan, parse_plan

SITES, PATIENTS, SIZE = ("hospital-a", "hospital-b", "hospital-c", "hospital-d"), 14, 32
TRAINING, HELD_OUT = SITES[:3], SITES[3]


def tiny_values(**changes: Any) -> dict[str, Any]:
    """The values of a plan for the tiny consortium, as YAML would give them."""
    return {
        "name": "tiny",
        "seed": 3,
        "arms": ["federated"],
        "held_out": [HELD_OUT],
        "image_size": SIZE,
        "split": {"train": 0.6, "test": 0.4},
        "training": {"rounds": 2},
        "public_set": {"patients": 10},
        "federation": {"codec": "plain", "patience_s": 0.0}
        | changes.pop("federation", {}),  # tests look into updates, and wait for nobody
    } | changes


def tiny_plan(**changes: Any) -> RunPlan:
    return parse_plan(tiny_values(**changes))


def write_plan(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(tiny_values(**changes)), encoding="utf-8")
    return path


def settle(site: Path, policy: Mapping[str, object] | None = None, **fields: object) -> None:
    """What an operator does with an editor: change fields of site.yaml, write a policy.yaml. A hospital gets
    its ledger, as by `site init`.
    """
    path = site / "site.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | fields
    if policy is not None:
        (site / "policy.yaml").write_text(yaml.safe_dump(dict(policy)), encoding="utf-8")
        values["policy"] = "policy.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    if values["kind"] != "hospital":
        return
    if not (site / "cohort.yaml").exists():
        (site / "cohort.yaml").write_text("ethics_approval: 2026-17\nconsent_basis: broad consent\n")
    init_ledger(*read_site(site))


def node_configs(data: Path, names: Sequence[str] = SITES) -> dict[int, dict[str, str]]:
    return {
        number: {"site-config": str(data / name / "site.yaml")} for number, name in enumerate(names, start=1)
    }


Tamper = Callable[[Message, Message], Message | None]


@dataclass(kw_only=True)
class Consortium:
    """A folder of sites and what may go wrong between them and the coordinator while a plan runs.

    `lost` names sites that stop answering once training begins; `tamper(question, answer)` may give another
    answer; `stop_at` interrupts the run, as Ctrl-C would, when that many training answers have been asked
    for.
    """

    data: Path
    names: tuple[str, ...] = SITES
    lost: set[str] = field(default_factory=set)
    tamper: Tamper | None = None
    stop_at: int | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)  # (site or "pooled", type of message)

    def conduct(self, plan: RunPlan, out: Path) -> Any:
        from server.run.conduct import conduct

        return conduct(self.grid(plan, out), plan, out, simulation={"data": str(self.data)})

    def grid(self, plan: RunPlan, out: Path) -> Any:
        from client.pooled import app
        from server.simulation.local_grid import NODE_UNAVAILABLE, LocalGrid

        nodes = node_configs(self.data, self.names)
        names = dict(enumerate(self.names, start=1))
        members = os.pathsep.join(
            nodes[number]["site-config"] for number, name in names.items() if name not in plan.held_out
        )
        if any(ARMS[arm].baseline for arm in plan.arms):
            nodes = {number: config | {"baseline-sites": members} for number, config in nodes.items()}
        if "pooled" in plan.arms:
            names[len(nodes) + 1] = "pooled"
            nodes[len(nodes) + 1] = {"pooled-sites": members}
        consortium = self

        def answering(message: Message, context: Any) -> Message:
            site, kind = names[context.node_id], message.metadata.message_type
            consortium.asked.append((site, kind))
            if kind == "train" and consortium.stop_at == sum(kind == "train" for _, kind in consortium.asked):
                raise KeyboardInterrupt
            if site in consortium.lost and kind != "query.describe":
                return Message(Error(NODE_UNAVAILABLE, "Node unavailable"), reply_to=message)
            answer = app(message, context)
            return (consortium.tamper and consortium.tamper(message, answer)) or answer

        return LocalGrid(answering, nodes, {"plan": plan.canonical_json(), "run-dir": str(out)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A whole run of all arms through the console script. Read only."""

    data: Path
    plan: Path
    out: Path
    said: subprocess.CompletedProcess[str]
