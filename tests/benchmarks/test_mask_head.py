"""The benchmark of masks knows where an artifact is, and measures overlap by hand. No figure is tested."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import DEFAULT_LABELS, INDEX
from common.models import fresh
from common.models.small_cnn import SmallCNN
from common.physics.appearance import PUBLIC_APPEARANCES
from common.physics.phantom import draw_patient
from common.public_slices import Slices

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MOTION, VOID = INDEX["motion"], INDEX["susceptibility"]


@pytest.fixture
def mask_head(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("mask_head")


def squares(mask_head: ModuleType, count: int, size: int = 32) -> Any:
    """MR slices of which every other one has a bright square, in one of four corners: the void's place."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 1500, (count, size, size)).astype(np.int16)
    labels = np.full((count, len(DEFAULT_LABELS)), np.nan, np.float32)
    masks = np.full((count, len(DEFAULT_LABELS), size // 8, size // 8), np.nan, np.float32)
    labels[:, VOID] = np.arange(count) % 2
    masks[:, VOID] = 0
    for row in range(1, count, 2):
        y, x = (size // 2 * int(one) for one in rng.integers(0, 2, 2))
        images[row, y : y + size // 2, x : x + size // 2] = 6000
        masks[row, VOID, y // 8 : (y + size // 2) // 8, x // 8 : (x + size // 2) // 8] = 1
    slices = Slices(
        images=images, modality=np.ones(count, np.int8), labels=labels, patients=np.arange(count) // 2
    )
    return mask_head.Masked(slices=slices, masks=masks)


def test_without_an_artifact_a_phantom_is_the_same_but_for_it() -> None:
    """The same seeds with prevalence 0: slices that do not show it keep every bit."""
    differ = dict.fromkeys(DEFAULT_LABELS, 0)
    for patient in range(12):
        appearance = PUBLIC_APPEARANCES[patient % len(PUBLIC_APPEARANCES)]
        shown = draw_patient(appearance, patient, 5)
        for name in differ.keys() & shown[0].labels.keys():
            chances = {**appearance.prevalence, name: 0.0}
            without = draw_patient(replace(appearance, prevalence=chances), patient, 5)
            for one, other in zip(shown, without, strict=True):
                assert other.labels == {**one.labels, name: 0}
                is_same = np.array_equal(one.image, other.image)
                assert is_same == (one.labels[name] == 0)
                differ[name] += not is_same
    assert min(differ.values()) > 0


def test_masks_show_where_it_is_and_only_what_can_occur(mask_head: ModuleType) -> None:
    data = mask_head.draw_masked(PUBLIC_APPEARANCES, 12, 5, 64)
    assert data.masks.shape == (len(data.slices.images), len(DEFAULT_LABELS), 8, 8)
    labels = data.slices.labels
    assert np.array_equal(np.isnan(data.masks).all((2, 3)), np.isnan(labels))
    assert not data.masks[labels == 0].any()
    present = data.masks[labels == 1]
    assert present.any((1, 2)).mean() > 0.8
    assert set(np.unique(present)) == {0, 1}
    areas = {one: np.nanmean(data.masks[labels[:, one] == 1, one]) for one in (MOTION, VOID)}
    assert areas[VOID] < areas[MOTION]  # a void is local, a moved head is not


def test_dice_of_masks_is_of_each_slice_alone_and_by_hand(mask_head: ModuleType) -> None:
    masks = torch.full((2, 3, 2, 2), torch.nan)
    masks[:, 0], masks[:, 1] = 0.0, torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    logits = torch.zeros(2, 3, 2, 2)
    # p = 1/2 everywhere: absent 1 - 1 / (1 + 1), present 1 - (2 * 1 + 1) / (1 + 2 + 1); the third can't occur
    assert mask_head.mask_dice(logits, masks).tolist() == pytest.approx([(0.5 + 0.25) / 2] * 2)
    logits[0, :, 0] = 9.0
    losses = mask_head.mask_dice(logits, masks)
    assert losses[1] == pytest.approx(0.375)
    assert losses[0] != losses[1]
    logits[:, 2] = 50.0
    assert torch.equal(mask_head.mask_dice(logits, masks), losses)
    assert mask_head.mask_dice(logits, torch.full_like(masks, torch.nan)).tolist() == [0, 0]


def test_grad_cam_of_a_logit_of_one_channel_is_that_channel(mask_head: ModuleType) -> None:
    torch.manual_seed(0)
    network = SmallCNN(len(DEFAULT_LABELS)).eval()
    data = squares(mask_head, 4, 64)
    channel, width = 5, 64 + 64
    with torch.no_grad():
        network.neck.weight.zero_()
        network.head.weight.zero_()
        network.neck.weight[0, width + channel] = 1  # the mean over places of a channel of stage 4
        network.head.weight[MOTION, 0] = 2
        network.head.weight[VOID, 0] = -1
        (x,) = mask_head._all(data.slices)
        early, late = network.maps(x)
    found = mask_head.grad_cam(network, data.slices)
    expected = mask_head.enlarged(late[:, [channel]], early)[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True)
    np.testing.assert_allclose(found["stage 4"][:, MOTION], expected, atol=1e-5)
    assert not found["stage 4"][:, VOID].any()  # the channel speaks against it
    assert found["stage 3"][:, MOTION].any()


def test_overlap_and_area_under_the_curve_by_hand(mask_head: ModuleType) -> None:
    marked = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]], bool)
    truth = np.array([[[1, 0], [1, 0]], [[0, 1], [0, 0]]], bool)
    iou, dice = mask_head.overlap(marked, truth)
    assert iou.tolist() == pytest.approx([1 / 3, 0])
    assert dice.tolist() == pytest.approx([1 / 2, 0])
    scores = np.array([[0.1], [0.4], [0.4], [0.8], [0.9]])
    labels = np.array([[0], [0], [1], [1], [np.nan]], np.float32)
    assert mask_head.aurocs(scores, labels).tolist() == [3.5 / 4]


def test_a_map_is_cut_where_the_phantoms_for_choosing_say(mask_head: ModuleType) -> None:
    data = squares(mask_head, 8)
    truth = np.nan_to_num(data.masks)
    faint, wrong = 0.1 + 0.25 * truth, 1 - truth
    found = mask_head.best_threshold(faint[:, VOID], data, VOID)
    assert found[0] == 1
    assert 0.1 < found[1] <= 0.35
    others = squares(mask_head, 8)
    others.masks[:, [one for one in range(len(DEFAULT_LABELS)) if one != VOID]] = 0
    others.masks[::2, [one for one in range(len(DEFAULT_LABELS)) if one != VOID]] = 1
    others.slices.labels[:] = np.arange(8)[:, None] % 2
    located = mask_head.localized([wrong, faint], [wrong, faint], others, others)["susceptibility"]
    assert located["iou"].tolist() == [1] * 4
    assert located["absent"] == 0
    assert located["owners"].tolist() == [0, 1, 2, 3]


def test_a_network_learns_where_it_is(mask_head: ModuleType) -> None:
    data, network = squares(mask_head, 48), fresh("small_cnn", 0)
    torch.manual_seed(0)
    beside = mask_head.MaskHead(len(DEFAULT_LABELS))

    def found() -> float:
        return float(
            mask_head.best_threshold(mask_head.predicted(network, beside, data.slices)[:, VOID], data, VOID)[
                0
            ]
        )

    before = found()
    mask_head.train(network, beside, data, epochs=8, rate=3e-3, seed=0)
    assert found() > max(0.7, before + 0.2)


def test_a_head_learns_beside_a_network_that_stays_as_it_is(mask_head: ModuleType) -> None:
    data, network, beside = squares(mask_head, 48), fresh("small_cnn", 0), mask_head.fresh_head(0)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    mask_head.train_beside(network, beside, data, epochs=20, rate=3e-3, seed=0)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    shown = mask_head.predicted(network, beside, data.slices)[:, VOID]
    assert mask_head.best_threshold(shown, data, VOID)[0] > 0.7


@pytest.mark.slow
def test_every_kind_of_map_has_its_row(mask_head: ModuleType) -> None:
    """The whole of it on small slices, for the wiring."""
    found = mask_head.measure(mask_head.QUICK)
    kinds = {f"{kind}, {start} start" for kind in ("masks", "Grad-CAM") for start in ("random", "shipped")}
    assert set(found["places"]) == kinds | {
        "masks, shipped and frozen",
        "body",
        "mean mask",
        "Grad-CAM, shipped as it is",
    }
    for one in (*found["places"].values(), *found["gain"].values()):
        assert one["interval"][0] <= one.get("iou", one.get("macro")) <= one["interval"][1]
    found["environment"] = {"date": "2026-01-01", "machine": "Linux", "versions": {"fedqc": "0"}}
    table = mask_head.table(found)
    assert all(f"| {kind} | {found['places'][kind]['iou']:.3f} [" in table for kind in found["places"])
    assert f"| random | {found['auroc']['random, plain']['macro']:.3f} |" in table


def test_the_page_has_the_tables(mask_head: ModuleType) -> None:
    page = (BENCHMARKS.parent / "docs" / "networks.md").read_text(encoding="utf-8")
    part = page[page.index("<!-- mask_head -->") : page.index("<!-- /mask_head -->")]
    assert "masks, random start" in part
    assert "Grad-CAM, shipped as it is" in part
    work = mask_head.Work()
    assert f"{work.patients['trained']} phantom patients" in part
    assert f"{work.seeds} seeds" in part
