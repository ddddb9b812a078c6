"""The benchmark of the noise compares samplers of the same distribution. No claim about speed is tested."""

from __future__ import annotations

import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import chisquare

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("noise_benchmark", BENCHMARKS / "noise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_side_is_measured_and_the_table_shows_both_ratios(noise: ModuleType) -> None:
    result = json.loads(importlib.import_module("measuring").to_json(noise.measure_all(5_000, 100, 1)))
    assert set(result["cpu_s"]) == {"fedqc", "plain", "float"}
    assert set(result["ratios"]) == {"plain / fedqc", "fedqc / float"}
    page = noise.table(noise.measure_all(5_000, 100, 1))
    assert all(f"| {pair} |" in page for pair in result["ratios"])


def test_the_plain_sampler_draws_the_discrete_gaussian(noise: ModuleType) -> None:
    values = np.array([noise.discrete_gaussian(Fraction(2)) for _ in range(4000)])
    support = np.arange(-40, 41)
    weights = np.exp(-(support**2) / 8)
    expected = weights / weights.sum() * values.size
    kept = np.abs(support) <= 5
    observed = np.array([np.count_nonzero(values == value) for value in support[kept]])
    rest = values.size - observed.sum(), values.size - expected[kept].sum()
    assert chisquare([*observed, rest[0]], [*expected[kept], rest[1]]).pvalue > 1e-4


def test_a_side_with_the_wrong_deviation_gives_no_ratio(
    noise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise.once("float", 10_000, 1000.0, 0)
    slow = noise.SIDES["float"][1]
    monkeypatch.setitem(
        noise.SIDES, "float", (lambda count, deviation: noise.float_noise(count, 1.1 * deviation), slow)
    )
    with pytest.raises(noise.BenchmarkError, match="standard deviation"):
        noise.once("float", 10_000, 1000.0, 0)
