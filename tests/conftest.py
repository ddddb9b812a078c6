"""A tiny consortium of generated hospitals, and a grid to run plans on it in this process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}

from flwr.app import Error, Message
from hypothesis import settings

from common.plan import RunPlan, parse_plan

settings.register_profile("fedqc", deadline=None)  # other work on the machine is no finding
settings.load_profile("fedqc")

ROOT = Path(__file__).parents[1]
FEDQC = Path(sys.executable).with_name("fedqc")
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
    """What an operator does with an editor: change fields of site.yaml, write a policy.yaml."""
    path = site / "site.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | fields
    if policy is not None:
        (site / "policy.yaml").write_text(yaml.safe_dump(dict(policy)), encoding="utf-8")
        values["policy"] = "policy.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


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
        if "pooled" in plan.arms:
            members = [
                nodes[number]["site-config"] for number, name in names.items() if name not in plan.held_out
            ]
            names[len(nodes) + 1] = "pooled"
            nodes[len(nodes) + 1] = {"pooled-sites": os.pathsep.join(members)}
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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    from common.learning import set_threads

    set_threads(1)


@pytest.fixture(scope="session")
def tiny_consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four generated hospitals of 14 patients with warm caches. Read only: tests that write or spend take
    `consortium`.
    """
    from client.agent.tasks import prepare
    from client.simulation.phantom_sites import write_consortium

    data = tmp_path_factory.mktemp("tiny") / "data"
    write_consortium(data, sites=len(SITES), patients=PATIENTS, seed=7, say=lambda _: None)
    for name in SITES:
        # the public bucket is the operator's word: enough for a private arm
        settle(data / name, nominal_patients=50)
        prepare(data / name / "site.yaml", tiny_plan())
    return data


@pytest.fixture
def data(tiny_consortium: Path, tmp_path: Path) -> Path:
    """A copy of the tiny consortium, caches included, for a test that writes to it or spends its budget."""
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


@pytest.fixture
def consortium(data: Path) -> Consortium:
    return Consortium(data=data)


def fedqc(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    command = [str(FEDQC), *map(str, words)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A whole run of all arms through the console script. Read only."""

    data: Path
    plan: Path
    out: Path
    said: subprocess.CompletedProcess[str]


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit status, stdout and stderr of a command line, run in this process; its handling of signals is taken
    back.
    """
    from common.cli import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


def simulate_words(plan: Path, data: Path, out: Path, *more: object) -> list[object]:
    return ["simulate", plan, "--data", data, "--out", out, "--threads", 1, *more]


@pytest.fixture(scope="session")
def finished(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    data = Path(shutil.copytree(tiny_consortium, folder / "data"))
    plan = write_plan(folder / "tiny.yaml", arms=["public", "local", "federated", "federated_dp", "pooled"])
    said = fedqc(*simulate_words(plan, data, folder / "runs" / "tiny", "--format", "json"), cwd=folder)
    return Finished(data=data, plan=plan, out=folder / "runs" / "tiny", said=said)
