"""The tables of patient scores and coarse bins say what they claim to, on fewer patients."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_only_the_score_of_the_product_or_less_is_blind_to_length(monkeypatch: pytest.MonkeyPatch) -> None:
    patient_scores = benchmark("patient_scores", monkeypatch)
    found = patient_scores.measure_all(3000)
    at = {case: place for place, case in enumerate(found["cases"])}
    for case in ("40 / 20", "60 / 10", "10 / 3"):
        assert found["scores"]["expected 3"][at[case]] == pytest.approx(0.5, abs=0.025)
        assert found["scores"]["maximum"][at[case]] > 0.57
    seen = found["scores"]["expected 3"][at["4 of 20"]]
    assert found["scores"]["mean"][at["4 of 20"]] < seen - 0.05 < found["scores"]["maximum"][at["4 of 20"]]
    assert "| expected 3 |" in patient_scores.table(found)


def test_what_coarse_bins_lose_is_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse_bins = benchmark("coarse_bins", monkeypatch)
    found = coarse_bins.measure_all(60_000)
    assert len(found["rows"]) == 3 * 3 * len(coarse_bins.SHIFTS)
    for row in found["rows"]:
        assert row["bias"] == pytest.approx(row["computed"], abs=0.004)
        if row["bins"] == 480:
            assert abs(row["bias"]) < 0.002
    worst = min(found["rows"], key=lambda row: row["bias"])
    assert (worst["bins"], worst["shift"], worst["crowded"]) == (8, 2.0, True)
    assert "(" in coarse_bins.table(found)
