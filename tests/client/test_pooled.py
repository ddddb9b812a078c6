"""Several simulated sites as one: the pooled baseline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from client.agent.tasks import Agent
from client.pooled import PooledSites, pooled_sites
from common.artifacts import DEFAULT_LABELS
from common.model_file import load_model
from common.models import build
from common.plan import Model
from common.weights import manifest_of, resolve_initial
from common.wire import DescribeTask, Refusal, SiteDescription, SiteUpdate, TrainTask
from tests.helpers.consortium import TRAINING, settle, tiny_plan

A, B, _ = TRAINING
PLAN = tiny_plan(name="pooled", arms=["pooled"])
BASE = load_model(
    resolve_initial(Model().initial, None), manifest_of(build("small_cnn").state_dict()), DEFAULT_LABELS
)


def pooled(data: Path) -> PooledSites:
    return PooledSites([Agent(data / name / "site.yaml", PLAN) for name in (A, B)], PLAN)


def task(**changes: Any) -> TrainTask:
    return TrainTask(**({"run": "r", "arm": "pooled", "round": 1, "private": False, "base": BASE} | changes))


def test_it_names_its_members_and_adds_their_weights(data: Path) -> None:
    described = pooled(data).answer(DescribeTask().to_bytes())
    assert isinstance(described, SiteDescription)
    assert (described.site, described.members, described.nominal_patients) == ("pooled", (A, B), 100)
    update = pooled(data).answer(task().to_bytes())
    assert isinstance(update, SiteUpdate)
    assert (update.site, update.weight) == ("pooled", 100)
    alone = Agent(data / A / "site.yaml", PLAN).train(task())
    assert isinstance(alone, SiteUpdate)
    assert not np.array_equal(update.update, alone.update)


def test_it_is_never_private(data: Path) -> None:
    refusal = pooled(data).answer(task(private=True).to_bytes())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "bad-message"


def test_one_member_that_refuses_stops_it(data: Path) -> None:
    settle(data / B, kind="hospital")
    refusal = pooled(data).answer(task().to_bytes())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "non-private-not-permitted"


def test_a_task_that_it_does_not_know_is_refused(data: Path) -> None:
    refusal = pooled(data).answer(b"no task")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "bad-message"


def test_it_is_kept_between_messages(data: Path) -> None:
    paths = os.pathsep.join(str(data / name / "site.yaml") for name in (A, B))
    assert pooled_sites(paths, PLAN) is pooled_sites(paths, tiny_plan(name="pooled", arms=["pooled"]))
