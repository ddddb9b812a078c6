"""The benchmark of the real start leaves out whole groups, and scores with networks that did not see them. No
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

from common.model_file import load_model
from common.models import build
from common.plan import RunPlan, read_plan
from common.weights import manifest_of, resolve_initial
from tests.helpers.injected import ct_slice, mr_slice

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GROUPS = ("site_mr_one", "site_mr_two", "mr_three_a")


@pytest.fixture
def real_start(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torch.set_num_threads(1)
    return importlib.import_module("real_start")


@pytest.fixture
def plan(real_start: ModuleType) -> RunPlan:
    plan = read_plan(real_start.PLAN)
    return plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 1})})


@pytest.fixture
def start(plan: RunPlan) -> np.ndarray:
    path = resolve_initial(plan.model.initial, plan.model.sha256)
    labels = plan.model.labels
    return load_model(path, manifest_of(build("small_cnn", labels=labels).state_dict()), labels)


def stored(real_start: ModuleType, count: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    labels = np.full((count, len(real_start.LABELS)), np.nan, np.float32)
    labels[:, real_start.LABELS.index("motion")] = rng.integers(0, 2, count)
    images = rng.integers(0, 4096, (count, real_start.SIZE, real_start.SIZE)).astype(np.int16)
    return real_start.Stored(images, np.ones(count, np.int8), labels)


def set_of(real_start: ModuleType, group: str, modality: str = "MR", negatives: int = 6) -> Any:
    from client.dicom.dicom import SliceHeader
    from client.simulation.real_slices import RealSlice

    fields: dict[str, Any] = dict.fromkeys(SliceHeader.__dataclass_fields__)
    fields |= {"modality": modality, "sequence": "SE", "series_description": "", "phase_encoding": "COL"}
    slices = [
        RealSlice(
            name=f"person {number}",
            header=SliceHeader(**fields),
            image=(mr_slice(number, number) if modality == "MR" else ct_slice(number)).astype(np.float32),
            spacing_mm=2.0,
        )
        for number in range(3)
    ]
    return real_start.test_set(group, slices, negatives=negatives, positives=4)


def test_the_test_set_has_every_artifact_in_both_bands_and_repeats_itself(real_start: ModuleType) -> None:
    made = set_of(real_start, "site_mr_one")
    for artifact in ("motion", "susceptibility", "chemical_shift"):
        for band in (0, 1):
            shown = int(((made.artifact == artifact) & (made.band == band)).sum())
            assert shown + made.not_shown.get((artifact, band), 0) == 4
    assert int((made.band == -1).sum()) == 6
    assert made.people == 3
    assert set(made.unit) == {0, 1, 2}
    assert np.array_equal(made.images, set_of(real_start, "site_mr_one").images)
    assert not np.array_equal(made.images[:6], set_of(real_start, "site_mr_two").images[:6])


def test_the_networks_say_what_the_plan_asks_for(real_start: ModuleType, plan: RunPlan) -> None:
    assert plan.model.labels == real_start.LABELS


def test_a_negative_that_moves_counts_against_every_artifact_of_ct_but_motion(real_start: ModuleType) -> None:
    made = set_of(real_start, "site_ct_one", "CT", negatives=24)
    moves = made.streaks == "ct_motion"
    assert moves.any()
    assert (made.band[moves] == -1).all()
    assert real_start.negatives_of(made, "metal")[moves].all()
    assert not real_start.negatives_of(made, "ct_motion")[moves].any()
    assert real_start.negatives_of(made, "ct_motion").sum() == 24 - moves.sum()
    # found by nothing else, it raises no false alarm; by the score of metal, one
    others = set_of(real_start, "site_ct_two", "CT")
    for artifact, share in (("ct_motion", 0.0), ("metal", moves.sum() / 24)):
        logits = {group: np.zeros((len(one.images), 6)) for group, one in (("a", made), ("site_b", others))}
        logits["a"][moves, real_start.LABELS.index(artifact)] = 9.0
        assert real_start.alarms({"a": made, "site_b": others}, logits)["a"] == pytest.approx(share)


def test_a_group_is_scored_by_networks_that_were_trained_without_it(
    real_start: ModuleType, plan: RunPlan, start: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = {group: set_of(real_start, group) for group in GROUPS}
    views = {group: stored(real_start, 8, seed) for seed, group in enumerate(GROUPS)}
    phantoms = stored(real_start, 8, 9)
    seen: list[list[int]] = []

    def spy(one: RunPlan, flat: np.ndarray, parts: list[Any]) -> Any:
        everything = [*views.values(), phantoms]
        seen.append([place for place, part in enumerate(everything) if any(part is one for one in parts)])
        return real_start.network_of(one, flat * np.float32(1 + len(seen) / 10))

    monkeypatch.setattr(real_start, "trained", spy)
    folds = (("site_mr_one", "mr_three_a"), ("site_mr_two",), ("mr_three_a",))
    found = real_start.measure(plan, start, tests, views, phantoms, folds=folds, draws=10)
    assert seen == [[1, 3], [0, 2, 3], [0, 1, 3]]
    lines = {(row["group"], row["left_out"]) for row in found["after"]}
    assert lines == {
        ("site_mr_one", "folder"),
        ("site_mr_two", "folder"),
        ("mr_three_a", "folder"),
        ("mr_three_a", "people"),
    }
    assert set(found["alarms"]["after"]) == set(GROUPS)
    assert all(0 <= share <= 1 for share in found["alarms"]["after"].values())
    text = real_start.table(found)
    assert "mr three a (other half known)" in text
    assert "MR macro, visible" in text


def test_training_learns_what_it_is_given_and_starts_from_the_phantoms(
    real_start: ModuleType, plan: RunPlan, start: np.ndarray
) -> None:
    nothing = real_start.network_of(plan, start)
    made = stored(real_start, 16, 1)
    network = real_start.trained(plan, start, [made])
    test = set_of(real_start, "site_mr_one")
    assert not np.array_equal(real_start.scores(network, test), real_start.scores(nothing, test))
    again = real_start.trained(plan, start, [made])
    assert np.array_equal(real_start.scores(network, test), real_start.scores(again, test))


def test_the_means_count_every_folder_once_and_leave_out_what_nothing_shows(real_start: ModuleType) -> None:
    def row(artifact: str, auroc: float, left_out: str = "folder", *, visible: bool = True) -> dict[str, Any]:
        return {"artifact": artifact, "auroc": auroc, "left_out": left_out, "visible": visible}

    rows = [
        row("motion", 0.8),
        row("motion", 1.0),
        row("motion", 0.1, "people"),
        row("motion", float("nan")),
        row("susceptibility", 0.6),
        row("chemical_shift", 0.9),
        row("metal", 0.7, visible=False),
    ]
    found = real_start.summary(rows)
    assert found["motion, visible"] == pytest.approx(0.9)
    assert found["MR macro, visible"] == pytest.approx(0.8)
    assert found["metal, mild"] == pytest.approx(0.7)
    assert found["worst folder, visible"] == pytest.approx(0.6)


def test_every_folder_is_left_out_and_the_table_has_its_place(real_start: ModuleType) -> None:
    left_out = [group for fold in real_start.FOLDS for group in fold]
    assert len(set(left_out)) == 13
    pages = BENCHMARKS.parent / "docs" / "performance.md", BENCHMARKS.parent / "server" / "public_model"
    for page in (pages[0], pages[1] / "card_real.md"):
        assert re.search(r"<!-- real_start -->.*<!-- /real_start -->", page.read_text("utf-8"), re.DOTALL)
