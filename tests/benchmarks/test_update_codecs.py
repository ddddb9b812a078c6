"""The benchmark of the codecs compares the same work, and notices a broken promise. No claim about speed is
tested.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def codecs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # by path: Python has a `codecs` too
    spec = importlib.util.spec_from_file_location("codecs_benchmark", BENCHMARKS / "update_codecs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_array_is_measured_with_every_codec_that_it_can_travel_by(codecs: ModuleType) -> None:
    result = codecs.measure_all(20_000, 1)
    assert {name: set(case["share"]) for name, case in result["cases"].items()} == {
        "trained": {"plain", "lossless", "int8"},
        "noised": {"plain", "lossless", "int8"},
        "head": {"plain", "lossless", "int8"},
        "model": {"plain", "lossless"},
    }
    for case in result["cases"].values():
        assert set(case["ratios"]) == set(case["share"])
        assert case["share"]["lossless"] <= (case["aim"] or 0.9)
        assert all(ratio.median == 1 for ratio in case["ratios"]["plain"].values())
    assert json.loads(importlib.import_module("measuring").to_json(result))["benchmark"] == "update_codecs"
    page = codecs.table(result)
    assert page.count("met") == 3
    assert "missed" not in page


def test_a_codec_that_loses_a_bit_gives_no_ratio(codecs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(5000, dtype=np.int32)
    codecs.check("honest", values)
    monkeypatch.setattr(codecs, "decode_steps", lambda frame, size: np.roll(values, 1))
    with pytest.raises(codecs.BenchmarkError, match="other bits"):
        codecs.check("forgetful", values)


def test_a_variance_that_is_not_the_errors_gives_no_ratio(
    codecs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.weights import quantize_int8

    def boastful(steps: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, float]:
        frame, variance = quantize_int8(steps, generator)
        return frame, variance / 2

    monkeypatch.setattr(codecs, "quantize_int8", boastful)
    with pytest.raises(codecs.BenchmarkError, match="variance"):
        codecs.check("boastful", np.random.default_rng(0).integers(-9000, 9000, 5000).astype(np.int32))
