"""The benchmark of a training step measures the product's loop in both precisions. No claim about speed is
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
def test_both_precisions_have_a_cost_and_a_model(
    has_amx: bool, train_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "processor_has_amx", lambda: has_amx)
    result = train_step.measure_all(("small_cnn",), WORK, 1)
    ratio = result["networks"]["small_cnn"]["cpu bf16"]
    assert 0 < ratio.min == ratio.max
    found = result["models"]
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["difference"] == pytest.approx(found["bf16"] - found["fp32"])
    assert device().type == "cpu"
    page = train_step.table(result)
    met = ratio.median <= train_step.AIM
    said = f"aim of 0.65 {'met' if met else 'missed'}" if has_amx else "the aim does not apply"
    assert said in page
    assert "No GPU was at hand." in page or result["gpu"]
