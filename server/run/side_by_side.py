"""Run the stages of a run: in turn, or in a simulation side by side where none depends on another."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import ParamSpec, TypeVar

from common.arms import POOLED
from server.run.rounds import RunContext, Stage, StageResult, run_rounds

P = ParamSpec("P")
R = TypeVar("R")
STAGES_PER_JOB = 2
"""So that the processes have work while one stage waits for its slowest site. Each holds a few models."""


def run_stages(
    context: RunContext, stages: Sequence[Stage], *, jobs: int = 1
) -> Iterator[tuple[Stage, Callable[[], StageResult]]]:
    """Each stage, in order, and what gives its result or raises, as `run_rounds`.

    Args:
        jobs: with 1, each stage is run when its result is asked for; else several are run at once. Where a
            site is a hospital they are not: its ledger tells them apart by their order.
    """
    if jobs == 1 or any(site.description.kind == "hospital" for stage in stages for site in stage.sites):
        for stage in stages:
            yield stage, functools.partial(run_rounds, context, stage)
        return
    alone = threading.Lock()  # one model is measured at a time, on one network
    context = replace(
        context,
        observe=_one_at_a_time(alone, context.observe),
        score_public=_one_at_a_time(alone, context.score_public),
    )
    pool = ThreadPoolExecutor(STAGES_PER_JOB * jobs, "stage")
    begun: dict[str, Future[StageResult]] = {}
    order = sorted(stages, key=_rank)
    for number, stage in enumerate(order):
        before = [begun[other.name] for other in order[:number] if _must_follow(stage, other)]
        begun[stage.name] = pool.submit(_run_after, before, context, stage)
    try:
        for stage in stages:
            yield stage, begun[stage.name].result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run_after(before: Sequence[Future[StageResult]], context: RunContext, stage: Stage) -> StageResult:
    for other in before:
        other.exception()
    return run_rounds(context, stage)


def _rank(stage: Stage) -> int:
    """The longest first: those whose rounds wait for several sites would otherwise end with idle processes.
    Stages that share a budget keep their order.
    """
    if stage.arm == POOLED:
        return 0
    return 1 if len(stage.sites) > 1 and not stage.kind.private else 2


def _must_follow(stage: Stage, other: Stage) -> bool:
    """Whether what one spends at a site may decide what the other is answered there: they share a budget."""
    names = {site.name for site in other.sites}
    return stage.kind.private and other.kind.private and any(site.name in names for site in stage.sites)


def _one_at_a_time(alone: threading.Lock, work: Callable[P, R]) -> Callable[P, R]:
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with alone:
            return work(*args, **kwargs)

    return locked
