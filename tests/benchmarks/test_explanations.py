"""What the benchmarks of `fedqc predict` compute; no figure is tested."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_map_is_measured_against_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    explanations = importlib.import_module("explanations")
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = True
    found = np.zeros((4, 4))
    found[0, 0], found[3, 3] = 2, 1
    assert explanations.against(found, mask) == (1.0, pytest.approx(1 / 3))
    found[3, 3] = 3
    assert explanations.against(found, mask)[0] == 0.0


def test_intervals_are_over_people_not_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    explanations = importlib.import_module("explanations")
    values = np.array([1.0] * 90 + [0.0])
    people = np.array(["a"] * 90 + ["b"])
    mean, low, high = explanations.bootstrap(values, people, np.random.default_rng(0))
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_ratios_are_of_the_same_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    inference = importlib.import_module("inference")
    found = {
        "eager fp32, 1 slice": [1.0, 10.0],
        "eager fp32, 200 slices": [1.0, 1.0],
        "ONNX Runtime, 1 slice": [0.5, 5.0],
        "ONNX Runtime, 200 slices": [0.5, 0.5],
        "decode": [0.25, 0.25],
        "page": [0.25, 0.25],
        "start, torch": [4.0, 4.0],
        "start, export": [1.0, 2.0],
    }
    table = inference.table_of(found)
    assert "| ONNX Runtime, 1 slice | 2.750 | 0.50 (0.50–0.50) |" in table
    assert "| start, export | 1.500 | 0.38 (0.25–0.50) |" in table
    assert "200 slices | 1.000 | aim: .8 |" in table
