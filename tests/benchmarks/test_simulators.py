"""The benchmark of the simulators knows every simulator, and says what is missing. No claim about speed is
tested.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from common.physics import SIMULATORS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def simulators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # the benchmark sets them
    return importlib.import_module("simulators")


def test_every_simulator_is_measured(simulators: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def rival_of(name: str) -> tuple[str, object] | None:
        return None if name == "susceptibility" else ("copy", torch.clone)

    monkeypatch.setattr(simulators, "rival_of", rival_of)
    monkeypatch.setattr(simulators, "check_scanners", lambda: 0.0)
    monkeypatch.setattr(simulators, "ENOUGH_S", 0.0)
    monkeypatch.setattr(simulators, "BATCH", 2)
    monkeypatch.setattr(simulators.ct, "WORKING_SIZE", 32)
    result = simulators.measure_all(1, 1)
    assert set(result["cases"]) == set(SIMULATORS)
    assert result["cases"]["susceptibility"]["rival"] is None
    assert json.loads(importlib.import_module("measuring").to_json(result))["benchmark"] == "simulators"
    page = simulators.table(result)
    assert all(f"| {name} |" in page for name in SIMULATORS)
    assert "4 hospitals of 340 patients" in page


@pytest.mark.parametrize(("module", "simulator"), [("torchio", "motion"), ("skimage.transform", "metal")])
def test_a_missing_package_is_named(
    simulators: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str, simulator: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(simulators.BenchmarkError, match=r"pip install -e '\.\[bench\]'"):
        simulators.rival_of(simulator)


def test_a_scanner_that_returns_something_else_gives_no_ratio(
    simulators: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulators, "_optional", lambda name: None)
    monkeypatch.setattr(simulators, "scan_like_skimage", lambda transform, image: (image + 50).numpy())
    with pytest.raises(simulators.BenchmarkError, match="comes back"):
        simulators.check_scanners()


@pytest.fixture
def simulators_gpu(simulators: ModuleType) -> ModuleType:
    return importlib.import_module("simulators_gpu")


def test_every_simulator_is_measured_on_a_device(
    simulators: ModuleType, simulators_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulators, "ENOUGH_S", 0.0)
    monkeypatch.setattr(simulators, "BATCH", 2)
    monkeypatch.setattr(simulators_gpu, "BATCH", 2)
    monkeypatch.setattr(simulators_gpu, "LARGE_BATCH", 3)
    result = simulators_gpu.measure_all(torch.device("cpu"), 1)
    assert set(result["cases"]) == set(SIMULATORS)
    assert all(case["differs"] == {"median": 0.0, "largest": 0.0} for case in result["cases"].values())
    page = simulators_gpu.table(result)
    assert all(f"| {name} |" in page for name in SIMULATORS)


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_device_that_gives_other_images_gives_no_ratio(simulators_gpu: ModuleType, wrong: float) -> None:
    with pytest.raises(simulators_gpu.BenchmarkError, match="differ"):
        simulators_gpu.difference(torch.zeros(2, 4, 4), torch.full((2, 4, 4), wrong), "metal")


def test_without_a_gpu_the_benchmark_says_so(
    simulators_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["simulators_gpu.py"])
    assert simulators_gpu.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
