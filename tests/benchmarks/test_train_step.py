"""The benchmark of a training step measures the product's loop on every side. No claim about speed is
tested.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from common.devices import device

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORK = {"patients": 2, "epochs": 1, "seeds": 2, "model_patients": 8, "model_epochs": 1}


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("train_step_benchmark", BENCHMARKS / "train_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("has_amx", [False, True])
def test_every_side_has_a_cost_and_a_model(
    has_amx: bool, train_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "processor_has_amx", lambda: has_amx)
    result = train_step.measure_all(("small_cnn",), WORK, 1)
    ratios = result["networks"]["small_cnn"]["ratios"]
    assert [side for side in ratios if side.startswith("cpu")] == [f"cpu {side}" for side in train_step.SIDES]
    ratio = ratios["cpu bf16"]
    assert 0 < ratio.min == ratio.max
    for found in result["models"]["others"].values():
        assert found["low"] <= found["difference"] <= found["high"]
        assert found["difference"] == pytest.approx(found["auroc"] - result["models"]["fp32"])
    assert device().type == "cpu"
    page = train_step.table(result)
    met = ratio.median <= train_step.AIM
    said = f"aim of 0.65 {'met' if met else 'missed'}" if has_amx else "the aim does not apply"
    assert said in page
    assert "No GPU was at hand." in page or result["gpu"]


def test_what_compiling_costs_is_set_against_what_a_step_saves(train_step: ModuleType) -> None:
    ratio = train_step.ratio
    one = {
        "ratios": {"cpu compiled": ratio([0.5], [1.0]), "cpu compiled, channels last": ratio([1.0], [1.0])},
        "own_cpu_s": 2.0,
        "steps": 4,
        "compiling_cpu_s": {"compiled": 50.0, "compiled, channels last": 60.0},
    }
    (said, _) = train_step._compiling({"small_cnn": one})
    assert "`small_cnn`, compiled: 50 CPU-s, won back after 200 steps" in said
    assert "channels last: 60 CPU-s, never won back" in said
