"""Maps point to what a network looks at, and a page draws only those that passed their test."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from client.predict import explanation
from client.predict.explanation import all_but, grad_cam, middle, occlusion, statement
from client.predict.model import START, Model, find_model
from client.predict.page import LINE_RGB, render
from client.predict.predict import predict
from common.artifacts import INDEX, NAMES
from common.preprocess import to_channels
from tests.helpers.predicted import ALARMS, write

SPOT = (slice(72, 88), slice(24, 40))


class SeesTheSpot(nn.Module):
    """Its logit of metal is the mean brightness of one place, on maps of 16 x 16 places."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.AvgPool2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.coarse(x[:, 1:2])
        logits = torch.zeros(len(x), len(NAMES))
        logits[:, INDEX["metal"]] = 10 * maps[:, 0, 9:11, 3:5].mean((1, 2))
        return logits


@pytest.fixture
def slice_with_spot() -> np.ndarray:
    image = np.full((128, 128), 40, np.int16)
    image[SPOT] = 1500
    return image


def test_maps_are_largest_where_the_network_looks(slice_with_spot: np.ndarray) -> None:
    network = SeesTheSpot()

    def score(slices: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(to_channels(slices, codes))).numpy()

    for found in (
        occlusion(score, slice_with_spot, "CT", INDEX["metal"]),
        all_but(score, slice_with_spot, "CT", INDEX["metal"]),
    ):
        assert found.shape == (128, 128)
        assert found.min() >= 0
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert SPOT[0].start <= row < SPOT[0].stop
        assert SPOT[1].start <= column < SPOT[1].stop
        assert found[:32].max() < 0.2 * found.max()
    assert all_but(score, slice_with_spot, "CT", INDEX["beam_hardening"]).max() == 0


def test_grad_cam_weighs_the_maps_of_a_layer(slice_with_spot: np.ndarray) -> None:
    found = grad_cam(SeesTheSpot(), slice_with_spot, "CT", INDEX["metal"])
    inside = np.zeros(found.shape, bool)
    inside[SPOT] = True
    assert found[inside].mean() > found[:32].mean() > 0


def test_the_control_knows_the_body_only() -> None:
    image = np.full((64, 64), -1000, np.int16)
    image[30:50, 10:30] = 40
    row, column = np.unravel_index(middle(image, "CT").argmax(), image.shape)
    assert (abs(row - 39.5) <= 1, abs(column - 19.5) <= 1) == (True, True)


def test_the_statement_is_of_the_shipped_start_and_metal_passed() -> None:
    found = statement()
    start = find_model(START, None)
    assert (found.network, found.model_sha256) == (start.name, start.sha256)
    assert found.artifacts["metal"].passed
    for name, one in found.artifacts.items():
        if one.passed:
            assert one.pointing[0] > one.control_pointing, name
            assert one.iou[0] > one.control_iou, name


def yellow(page: str) -> dict[str, bool]:
    """Caption -> whether a line is drawn on its picture."""
    found = {}
    for source, caption in re.findall(r'src="data:image/png;base64,([^"]*)".*?<figcaption>(.*?)<', page):
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB"))
        found[caption] = bool((pixels == LINE_RGB).all(axis=2).any())
    return found


def test_a_line_is_drawn_only_where_such_maps_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        write(tmp_path / f"ct{number}.dcm", number + 1)
        write(tmp_path / f"mr{number}.dcm", number + 11, modality="MR")
    model: Model = find_model(START, None)
    metal = statement().artifacts["metal"]
    stated = statement().model_copy(
        update={"artifacts": {"metal": metal, "motion": metal.model_copy(update={"passed": False})}}
    )
    monkeypatch.setattr(explanation, "statement", lambda: stated)
    monkeypatch.setattr(
        explanation, "all_but", lambda score, stored, *how: np.eye(len(stored), dtype=np.float32)
    )
    page = render(predict(tmp_path, model, ALARMS, explain=True), "en")
    drawn = yellow(page)
    assert len(drawn) == 10
    for caption, line in drawn.items():
        assert line is ("metal" in caption), caption
        assert line is ("yellow" in caption)
    assert f"{metal.pointing[0]:.0%}" in page
    monkeypatch.setattr(explanation, "statement", lambda: stated.model_copy(update={"network": "resnet18"}))
    assert all(one.where is None for one in predict(tmp_path, model, ALARMS, explain=True).pictures)
    assert not any(yellow(render(predict(tmp_path, model, ALARMS), "en")).values())
