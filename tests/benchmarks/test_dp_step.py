"""The benchmark of a private step compares sides that compute the same gradients. No claim about speed is
tested.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORK = {"patients": 2, "slices": 2, "side_px": 32, "steps": 1}


@pytest.fixture
def dp_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("dp_step_benchmark", BENCHMARKS / "dp_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_side_computes_the_same_gradients_and_has_a_cost(dp_step: ModuleType) -> None:
    found = {name: dp_step.measure_side(name, WORK) for name in dp_step.SIDES}
    for name, one in found.items():
        assert one["length"] == pytest.approx(found["plain"]["length"], rel=1e-4), name
        assert one["cpu_s"] > 0


def test_the_table_shows_every_side_and_whether_the_aims_were_met(dp_step: ModuleType) -> None:
    """One real process, for the wiring; the costs of the others are given."""
    sums: dict[str, float] = {}
    cost = dp_step.once("plain", WORK, sums, 0)
    costs = {name: [cost] for name in dp_step.SIDES}
    dp_step.interleave = lambda sides, repetitions, say: costs
    result = dp_step.measure_all(WORK, 1)
    assert set(json.loads(dp_step.to_json(result))["ratios"]) == {"patient_loop", "opacus", "ghost"}
    page = dp_step.table(result)
    assert all(f"| {name} |" in page for name in result["ratios"])
    assert "cpu ≤ 1.15: met, memory ≤ 0.5: missed" in page


def test_a_side_with_other_gradients_gives_no_ratio(dp_step: ModuleType) -> None:
    with pytest.raises(dp_step.BenchmarkError, match="gradients of length"):
        dp_step.once("patient_loop", WORK, {"plain": 1.0}, 0)
