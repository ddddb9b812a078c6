"""The table of the membership attack has a row for each arm, and its controls find nobody."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from server.run_folder import RunFolder
from tests.helpers.consortium import Finished

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("membership")


def test_every_arm_is_attacked_and_nobody_trained_the_public_model(
    bench: ModuleType, finished: Finished
) -> None:
    told = bench.attack_run(RunFolder.open(finished.out), finished.data)
    plain = ["public", "local", "federated", "federated_dp", "pooled"]
    assert [arm for arm in told if not arm.endswith(bench.SHUFFLED)] == plain
    assert [arm for arm in told if arm.endswith(bench.SHUFFLED)] == [
        f"{arm}{bench.SHUFFLED}" for arm in ("local", "federated", "pooled")
    ]
    assert told["public"].auc == 0.5
    assert len({(one.members, one.others) for one in told.values()}) == 1
    assert all(0 <= one.auc <= 1 for one in told.values())
    page = bench.table(told)
    assert all(f"| `{arm}` |" in page for arm in plain)
