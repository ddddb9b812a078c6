"""The benchmark of gains without cost trains as the rehearsals do, and never chooses on the shift it scores.
No figure is tested.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from common.model_file import load_model
from common.models import build
from common.weights import manifest_of
from server.public_model.rehearsals import Rehearsal, rehearsals_of
from server.run import tune

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = ("contrast", "texture", "noise")


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(tune, "DRAWS", 2)
    return importlib.import_module("free_gains")


@pytest.fixture
def head(gains: ModuleType) -> np.ndarray:
    return tune.head_of(gains.MODEL, load_model(gains.START, manifest_of(build("small_cnn").state_dict())))


@pytest.fixture
def rehearsals(gains: ModuleType) -> dict[str, Rehearsal]:
    """Three shifts of thirty patients."""
    start = load_model(gains.START, manifest_of(build("small_cnn").state_dict()))
    found = rehearsals_of(gains.MODEL, start)
    return {shift: _first(found[shift], 30) for shift in FEW}


def _first(one: Rehearsal, patients: int) -> Rehearsal:
    kept = one.patient < patients
    return Rehearsal(
        features=one.features[kept],
        labels=one.labels[kept],
        patient=one.patient[kept],
        version=one.version[kept],
    )


def moments(gains: ModuleType, head: np.ndarray, one: Rehearsal) -> Any:
    return gains.moments_of(head, one.features, one.labels, one.patient)


def test_the_base_is_what_tune_rehearses(
    gains: ModuleType, head: np.ndarray, rehearsals: dict[str, Rehearsal]
) -> None:
    patients = tune.folds_of(rehearsals["noise"])[0].training
    setting = tune.Setting(clip_norm=0.1, learning_rate=30.0, steps_per_round=2, average_rounds=1)
    after = gains.trained(head, patients, setting, gains.How(), 0.01, 3)
    rehearsed = tune.rehearse_training(head, patients, setting, rounds=gains.ROUNDS, deviation=0.01, seed=3)
    np.testing.assert_allclose(after[1::2], rehearsed, atol=1e-6)
    np.testing.assert_allclose(
        gains.mean_of_rounds(head, after, 2), rehearsed[-gains.ROUNDS // 2 :].mean(axis=0), atol=1e-6
    )


def test_other_coordinates_are_the_same_head_and_change_the_noised_mean_as_stated(
    gains: ModuleType, head: np.ndarray, rehearsals: dict[str, Rehearsal]
) -> None:
    """Without clip and noise, a step in coordinates x T is a step of the gradient times T T'."""
    patients = tune.folds_of(rehearsals["noise"])[0].training
    centred = gains.coordinates(moments(gains, head, rehearsals["noise"]), 0.25)
    setting = tune.Setting(clip_norm=1e9, learning_rate=0.1, steps_per_round=1, average_rounds=1)
    before = gains.trained(head, patients, setting, gains.How(coordinates=centred), 0.0, 3)
    on_mean = gains.trained(head, patients, setting, gains.How(of_mean=centred @ centred.T), 0.0, 3)
    plain = gains.trained(head, patients, setting, gains.How(), 0.0, 3)
    np.testing.assert_allclose(before, on_mean, atol=1e-4)
    assert np.abs(before - plain).max() > 1e-3


def test_the_shift_that_is_scored_chooses_nothing(gains: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that shines on one shift alone is not chosen for that shift."""
    rng = np.random.default_rng(0)

    def scores(bench: Any, how: Any, finals: Any) -> list[tuple[str, dict[str, np.ndarray]]]:
        good = {shift: 0.02 + 1e-4 * rng.standard_normal((3, 2)) for shift in FEW}
        return [("good", good), ("shines", {shift: values * 0.1 for shift, values in good.items()} | shining)]

    shining = {"noise": np.full((3, 2), 0.5) + 1e-4 * rng.standard_normal((3, 2))}
    monkeypatch.setattr(gains.Bench, "scores", scores)
    bench = gains.Bench(np.zeros((5, 49), np.float32), {}, epsilon=2.0, views=False)
    bench.folds = dict.fromkeys(FEW)
    left = bench.left_out(gains.Gain())
    assert [name.rpartition(", ")[2] for name in left.chosen] == ["good", "good", "good"]
    assert left.gains == pytest.approx([0.02] * 3, abs=1e-3)


def test_every_gain_has_its_place_in_the_table(
    gains: ModuleType, head: np.ndarray, rehearsals: dict[str, Rehearsal]
) -> None:
    every = gains.gains_of(moments(gains, head, rehearsals["noise"]))
    bench = gains.Bench(head, rehearsals, epsilon=8.0, views=True, reaches=(4.0,))
    some = {name: every[name] for name in ("base", "last model", "cosine", "centred, before the clip")}
    found = {"ε 8, views": gains.compared(bench, some)}
    assert found["ε 8, views"]["base"]["difference"] == 0
    page = gains.table({"environment": gains.environment(), "found": found, "wide": {}, "kept": []})
    assert all(page.count(f"| {name} |") == 2 for name in some if name != "base")
    docs = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in docs for name in every)


def test_the_rule_asks_for_a_clear_gain_at_2_and_none_lost_elsewhere(gains: ModuleType) -> None:
    clear, lost = {"difference": 0.006, "better": 4}, {"difference": -0.001, "better": 2}
    even = {"difference": 0.0, "better": 2}
    assert gains.is_kept("x", {"ε 8": {"x": even}, "ε 2": {"x": clear}, "ε 1": {"x": even}})
    assert not gains.is_kept("x", {"ε 8": {"x": lost}, "ε 2": {"x": clear}, "ε 1": {"x": even}})
    assert not gains.is_kept("x", {"ε 2": {"x": clear | {"better": 3}}})
    assert not gains.is_kept("x", {"ε 8": {"x": clear}, "ε 2": {"x": even}, "ε 2, views": {"x": even}})
