"""The benchmark of levers switches off one thing at a time, and compares networks on the same slices. No
figure is tested.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from client.dicom.dicom import SliceHeader
from client.simulation.domain_randomization import MR_SCALE, randomized
from client.simulation.real_slices import RealSlice
from common.artifacts import DEFAULT_LABELS, INDEX
from common.model_file import load_model
from common.models import build
from common.plan import read_plan
from common.weights import manifest_of, resolve_initial
from tests.helpers.injected import SIDE, mr_slice

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEEDS = range(24)


@pytest.fixture
def levers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torch.set_num_threads(1)
    return importlib.import_module("randomization_levers")


def slices_of(people: int) -> list[RealSlice]:
    fields: dict[str, Any] = dict.fromkeys(SliceHeader.__dataclass_fields__)
    fields |= {"modality": "MR", "sequence": "SE", "series_description": "", "phase_encoding": "COL"}
    return [
        RealSlice(
            name=f"person {number}",
            header=SliceHeader(**fields),
            image=mr_slice(number, number).astype(np.float32),
            spacing_mm=2.0,
        )
        for number in range(people)
    ]


def looks(levers: ModuleType, off: tuple[str, ...]) -> list[torch.Tensor]:
    image = torch.from_numpy(slices_of(1)[0].image)
    with levers.without(off):
        return [randomized(image, "MR", 2.0, seed)[0] for seed in SEEDS]


def test_every_lever_changes_some_look_and_comes_back(levers: ModuleType) -> None:
    before = looks(levers, ())
    for lever in levers.LEVERS:
        changed = [not torch.equal(a, b) for a, b in zip(before, looks(levers, (lever,)), strict=True)]
        assert any(changed), lever
    assert all(torch.equal(a, b) for a, b in zip(before, looks(levers, ()), strict=True))


def test_without_all_levers_a_look_is_the_slice_scaled(levers: ModuleType) -> None:
    image = torch.from_numpy(slices_of(1)[0].image)
    assert image.shape == (SIDE, SIDE)
    low, high = (float(torch.quantile(image.flatten(), share)) for share in (0.01, 0.995))
    expected = ((image - low) / (high - low)).clamp(0, 1.5) * MR_SCALE
    for look in looks(levers, tuple(levers.LEVERS)):
        torch.testing.assert_close(look, expected)


def test_a_lever_left_out_changes_no_other_draw(levers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn last: the generator is then where it is with all levers."""
    places: list[torch.Tensor] = []
    noisy = levers.domain_randomization._noisy

    def spy(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        places.append(generator.get_state())
        made: torch.Tensor = noisy(image, generator)
        return made

    monkeypatch.setattr(levers.domain_randomization, "_noisy", spy)
    looks(levers, ())
    expected = list(places)
    assert len(expected) > len(SEEDS) / 2
    for lever in levers.LEVERS:
        places.clear()
        looks(levers, (lever,))
        assert len(places) == len(expected), lever
        assert all(torch.equal(a, b) for a, b in zip(places, expected, strict=True)), lever


def test_views_take_turns_and_repeat_themselves(levers: ModuleType) -> None:
    made = levers.views_of("g", slices_of(2), 6, seed=1, off=())
    assert made.images.shape == (6, 128, 128)
    assert set(made.modality.tolist()) == {1}
    again = levers.views_of("g", slices_of(2), 6, seed=1, off=())
    assert np.array_equal(made.images, again.images)
    other = levers.views_of("g", slices_of(2), 6, seed=2, off=())
    assert not np.array_equal(made.images, other.images)


def tiny_test(levers: ModuleType) -> Any:
    count = 24
    return levers.TestSet(
        images=np.random.default_rng(3).integers(0, 4096, (count, 128, 128)).astype(np.int16),
        modality="MR",
        unit=np.arange(count) % 8,
        artifact=np.array(["", "motion", "motion"] * 8),
        band=np.array([-1, 0, 1] * 8),
        not_shown={},
        people=8,
        slices=8,
    )


def test_what_a_lever_gave_is_the_difference_on_the_same_slices(levers: ModuleType) -> None:
    test = tiny_test(levers)
    perfect, useless = (np.zeros((24, len(INDEX)), np.float32) for _ in range(2))
    perfect[:, INDEX["motion"]] = test.band >= 0
    seed = {name: {"one": useless} for name in (levers.REFERENCE, "noise", "self-distillation")}
    seed[levers.REFERENCE] = {"one": perfect}
    rows = {row["arm"]: row["visible"] for row in levers.compared({"one": test}, [seed, seed], 20)}
    assert rows[levers.REFERENCE]["auroc"] == 1
    assert rows["noise"]["auroc"] == 0.5
    assert rows["noise"]["gave"] == rows["noise"]["low"] == 0.5
    assert rows["noise"]["decided"]
    assert rows["self-distillation"]["gave"] == -0.5
    assert not rows[levers.REFERENCE]["decided"]
    mixed = [seed, seed | {levers.REFERENCE: {"one": useless}, "noise": {"one": perfect}}]
    rows = {row["arm"]: row["visible"] for row in levers.compared({"one": test}, mixed, 20)}
    assert rows["noise"]["runs"] == [0.5, -0.5]
    assert not rows["noise"]["decided"]


def test_half_of_a_distilled_target_is_the_label(levers: ModuleType) -> None:
    labels = np.full((2, len(DEFAULT_LABELS)), np.nan, np.float32)
    labels[:, INDEX["motion"]] = [0, 1]
    images = np.random.default_rng(1).integers(0, 4096, (2, 128, 128)).astype(np.int16)
    part = levers.Stored(images, np.ones(2, np.int8), labels)
    targets = levers.distilled(build("small_cnn"), part).labels
    assert 0 < targets[0, INDEX["motion"]] < 0.5 < targets[1, INDEX["motion"]] < 1
    assert np.isnan(targets[:, INDEX["metal"]]).all()


def test_networks_are_trained_without_the_scanners_that_they_are_scored_on(
    levers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(levers.PLAN)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 1})})
    start = load_model(
        resolve_initial(plan.model.initial, plan.model.sha256),
        manifest_of(build("small_cnn").state_dict()),
    )
    seen: list[tuple[tuple[str, ...], bool]] = []
    made: dict[int, str] = {}

    def views(group: str, slices: Any, count: int, *, seed: int, off: Any) -> Any:
        part = levers.Stored(np.zeros((2, 128, 128), np.int16), np.ones(2, np.int8), np.zeros((2, 5)))
        made[id(part.images)] = group
        return part

    def trained(one: Any, flat: np.ndarray, parts: list[Any]) -> Any:
        seen.append((tuple(made[id(part.images)] for part in parts), bool(one.training.augment)))
        return levers.network_of(one, flat)

    monkeypatch.setattr(levers, "views_of", views)
    monkeypatch.setattr(levers, "trained", trained)
    tests = {"one": tiny_test(levers), "two": tiny_test(levers)}
    found = levers.measure(
        plan,
        start,
        {"one": [], "two": [], "three": []},
        tests,
        folds=(("one",), ("two",)),
        views=2,
        runs=3,
        draws=5,
    )
    trains = sum(arm.trains for arm in levers.ARMS.values())
    assert [parts for parts, _ in seen] == [
        pair for pair in (("two", "three"), ("one", "three"), ("two", "three")) for _ in range(trains)
    ]
    assert sum(not augments for _, augments in seen) == 3
    assert [run["seed"] for run in found["runs"]] == [1, 1, 2]
    text = levers.table(found)
    assert all(name in text for name in levers.ARMS)


def test_the_table_has_its_place(levers: ModuleType) -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text("utf-8")
    assert re.search(r"<!-- randomization_levers -->.*<!-- /randomization_levers -->", page, re.DOTALL)
