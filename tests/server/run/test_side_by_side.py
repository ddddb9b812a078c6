"""Stages are run at once only where none can change what another is answered."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import RunError
from common.wire import SiteDescription
from server.messaging.requests import Site
from server.run import side_by_side
from server.run.rounds import RunContext, Stage, StageResult
from server.run.side_by_side import run_stages
from server.run_folder import ArmFolder


def site(name: str, node: int, kind: str = "synthetic", members: tuple[str, ...] = ()) -> Site:
    described = SiteDescription(site=name, kind=kind, nominal_patients=50, version="1", members=members)
    return Site(node=node, description=described)


def stage(arm: str, *sites: Site) -> Stage:
    name = arm if len(sites) > 1 or sites[0].description.members else f"{arm}/{sites[0].name}"
    return Stage(arm=arm, name=name, sites=sites, folder=ArmFolder(path=Path("nowhere")))


class Runs:
    """Stands in for `run_rounds`: notes when each stage ran. The folders and sites are not touched."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.spans: dict[str, tuple[float, float]] = {}
        self.fails: dict[str, BaseException] = {}
        self._seconds = seconds

    def __call__(self, context: RunContext, of: Stage) -> StageResult:
        began = time.monotonic()
        context.observe(of.name)  # type: ignore[arg-type]
        time.sleep(self._seconds)
        self.spans[of.name] = began, time.monotonic()
        if of.name in self.fails:
            raise self.fails[of.name]
        return StageResult(weights=np.zeros(len(self.spans), np.float32))

    def overlap(self, first: str, second: str) -> bool:
        (a, b), (c, d) = self.spans[first], self.spans[second]
        return a < d and c < b


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    monkeypatch.setattr(side_by_side, "run_rounds", stand_in)
    return stand_in


def context(observe: Any = lambda event: None) -> RunContext:
    values: dict[str, Any] = dict.fromkeys(
        ("grid", "seal", "plan", "run", "manifest", "initial", "strategy", "public_bins")
    )
    return RunContext(**values, score_public=lambda flat: {}, observe=observe)


def done(context: RunContext, stages: list[Stage], jobs: int) -> list[str]:
    found = []
    for one, result in run_stages(context, stages, jobs=jobs):
        result()
        found.append(one.name)
    return found


A, B = site("a", 1), site("b", 2)
POOLED = site("pooled", 3, members=("a", "b"))
STAGES = [
    stage("local", A),
    stage("local", B),
    stage("local_dp", A),
    stage("local_dp", B),
    stage("federated", A, B),
    stage("federated_dp", A, B),
    stage("pooled", POOLED),
]
NAMES = [one.name for one in STAGES]


def test_results_come_in_the_order_of_the_plan(runs: Runs) -> None:
    assert done(context(), STAGES, jobs=4) == NAMES
    assert runs.overlap("pooled", "local/a")  # begun first, although it is the last of the plan
    assert runs.overlap("federated", "local/a")


def test_what_shares_a_budget_keeps_its_order(runs: Runs) -> None:
    done(context(), STAGES, jobs=8)
    assert runs.overlap("local_dp/a", "local_dp/b")
    for own in ("local_dp/a", "local_dp/b"):
        assert runs.spans[own][1] <= runs.spans["federated_dp"][0]


def test_hospitals_are_never_asked_by_two_stages(runs: Runs) -> None:
    hospital = site("a", 1, kind="hospital")
    stages = [stage("local", hospital), stage("local", B), stage("federated", hospital, B)]
    assert done(context(), stages, jobs=8) == [one.name for one in stages]
    spans = sorted(runs.spans.values())
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_events_come_one_at_a_time(runs: Runs) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def observe(event: object) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1

    done(context(observe), STAGES, jobs=8)
    assert most == 1


def test_a_failure_comes_in_its_place_and_nothing_more_is_begun(runs: Runs) -> None:
    runs.fails["local/a"] = RunError("gone", code="no-quorum")
    many = [stage("local", site(f"s{number}", number)) for number in range(40)]
    stages = [*STAGES[:2], *many]
    with pytest.raises(RunError):
        done(context(), stages, jobs=2)
    time.sleep(0.5)
    assert len(runs.spans) < 20
    for number, result in enumerate(run_stages(context(), stages, jobs=2)):
        if number == 0:
            with pytest.raises(RunError):
                result[1]()
        else:
            assert result[1]().weights.size  # the caller goes on where it may


def test_one_job_runs_a_stage_when_its_result_is_asked_for(runs: Runs) -> None:
    stages = run_stages(context(), STAGES, jobs=1)
    first, result = next(stages)
    assert not runs.spans
    result()
    assert list(runs.spans) == [first.name]
