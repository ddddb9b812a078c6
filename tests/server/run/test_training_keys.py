"""Optimizer, schedule, sampler and augmentation of a plan reach the hospitals, and the run is recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.run.recompute import recompute
from server.run_folder import RunFolder
from tests.helpers.consortium import Consortium, tiny_plan

KEYS: dict[str, Any] = {
    "rounds": 2,
    "optimizer": "sgd",
    "optimizer_args": {"momentum": 0.9},
    "schedule": "step",
    "decay_rounds": 1,
    "sampler": "balanced",
    "augment": ["flip", "rotation", "shift"],
    "dropout": 0.2,
    "precision": "bf16",
    "memory_format": "channels_last",
}


def run_with(consortium: Consortium, path: Path, **changes: Any) -> RunFolder:
    plan = tiny_plan(arms=["public", "federated", "pooled"], training=KEYS | changes)
    found: RunFolder = consortium.conduct(plan, path)
    return found


def digests(run: RunFolder) -> list[str]:
    """Of the models of all arms after each round."""
    return [record["model_sha256"] for arm in ("federated", "pooled") for record in run.arm(arm).rounds()]


@pytest.fixture
def run(consortium: Consortium, tmp_path: Path) -> RunFolder:
    return run_with(consortium, tmp_path / "run")


def test_a_run_with_every_key_is_repeated_and_recomputed(
    run: RunFolder, consortium: Consortium, tmp_path: Path
) -> None:
    assert digests(run_with(consortium, tmp_path / "again")) == digests(run)
    assert run.evaluation["status"] == "completed"
    assert not [finding for finding in recompute(run) if finding.holds is False]


@pytest.mark.parametrize(
    "changes",
    [{"optimizer_args": {}}, {"sampler": "uniform"}, {"augment": ["flip"]}, {"decay_factor": 0.5}],
    ids=str,
)
def test_each_key_changes_what_the_sites_train(
    changes: dict[str, Any], run: RunFolder, consortium: Consortium, tmp_path: Path
) -> None:
    other, first = digests(run_with(consortium, tmp_path / "other", **changes)), digests(run)
    assert len(other) == len(first) == 4
    assert [one == two for one, two in zip(first, other, strict=True)] == (
        [True, False, True, False] if "decay_factor" in changes else [False] * 4
    )
