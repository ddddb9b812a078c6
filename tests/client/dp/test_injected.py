"""Views change the mean of a patient and nothing of the guarantee: one clip a patient, all else the same."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from client.dp import dp_sgd
from client.dp.coins import Coins
from client.dp.dp_sgd import PrivateSteps, head_gradients, train_private_head
from client.dp.engines import ENGINES
from client.dp.injected import InjectedRows
from client.dp.release import grid_of
from common.errors import ConfigError
from common.losses import masked_bce

WIDTH, OUTPUTS = 6, 3


def steps(**changes: Any) -> PrivateSteps:
    values: dict[str, Any] = {
        "steps": 1,
        "learning_rate": 1.0,
        "clip_norm": 0.5,
        "noise_multiplier": 1.0,
        "sample_rate": 1.0,
        "nominal_patients": 64,
        "max_slices_per_patient": 2,
    }
    return PrivateSteps(**values | changes)


def site(patients: int = 4, *, read: int = 3, views: int = 6, scale: float = 30.0) -> dict[str, np.ndarray]:
    """Per patient `read` slices, then `views` rows that are views."""
    generator = np.random.default_rng(4)
    owner = np.concatenate([np.repeat(np.arange(patients), read), np.repeat(np.arange(patients), views)])
    weights = np.concatenate([np.zeros(patients * read), np.tile(np.full(views, 1 / views), patients)])
    return {
        "features": (scale * generator.standard_normal((len(owner), WIDTH))).astype(np.float32),
        "labels": generator.integers(0, 2, (len(owner), OUTPUTS)).astype(np.float32),
        "patients": owner,
        "weights": weights,
    }


def total(found: dict[str, np.ndarray], kept: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The integer sum that a step would release."""
    seen: list[np.ndarray] = []

    def release(sum_: np.ndarray, *_: object) -> np.ndarray:
        seen.append(sum_.copy())
        return sum_

    monkeypatch.setattr(dp_sgd, "release", release)
    train_private_head(
        np.zeros((OUTPUTS, WIDTH), np.float32),
        np.zeros(OUTPUTS, np.float32),
        found["features"][kept],
        found["labels"][kept],
        found["patients"][kept],
        steps(max_slices_per_patient=3),
        injected=InjectedRows(weights=found["weights"][kept], share=0.5, views=2),
    )
    return seen[0]


def test_a_patient_with_views_moves_the_sum_by_the_clip_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    found = site()
    everyone = total(found, np.ones(len(found["patients"]), bool), monkeypatch)
    most = Fraction(0.5 / grid_of(0.5, OUTPUTS * WIDTH + OUTPUTS)) ** 2
    for number in range(4):
        rest = total(found, found["patients"] != number, monkeypatch)
        own = total(found, found["patients"] == number, monkeypatch)
        gone = everyone - rest
        assert (gone == own).all(), "nobody else's steps change, in any bit"
        length = sum(int(step) ** 2 for step in gone)
        assert 0.98 * most < length <= most, "far above the clip, clipped once"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mean_is_that_of_the_documented_weights(engine: str) -> None:
    found = site(1, scale=1.0)
    injected = InjectedRows(weights=found["weights"], share=0.25, views=3)
    rows = injected.draw(np.arange(9), 2, Coins())
    assert sorted(rows[2:]) == list(range(3, 9)), "all views, and two of three read slices"
    weights = injected.mean_weights(rows)
    assert weights == pytest.approx([0.375, 0.375, *[0.25 / 6] * 6])
    x, y = torch.as_tensor(found["features"]), torch.as_tensor(found["labels"])
    parameters = np.random.default_rng(1).standard_normal(OUTPUTS * WIDTH + OUTPUTS)
    (made,) = head_gradients(
        parameters,
        (OUTPUTS, WIDTH),
        x,
        y,
        [rows],
        max_slices=injected.max_rows(2),
        weights=[weights],
        engine=engine,
    )
    head = torch.nn.Linear(WIDTH, OUTPUTS)
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(parameters[:-OUTPUTS].reshape(OUTPUTS, WIDTH)))
        head.bias.copy_(torch.as_tensor(parameters[-OUTPUTS:]))
    loss = (masked_bce(head(x[rows]), y[rows]) * torch.as_tensor(weights, dtype=torch.float32)).sum()
    expected = torch.cat([one.flatten() for one in torch.autograd.grad(loss, [head.weight, head.bias])])
    assert made[0] == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("read", "views"), [(3, 0), (0, 6)])
def test_what_a_patient_has_only_of_one_kind_weighs_one(read: int, views: int) -> None:
    weights = np.concatenate([np.zeros(read), np.full(views, 1 / 6)])
    injected = InjectedRows(weights=weights, share=0.25, views=4)
    assert injected.mean_weights(np.arange(read + views)) == pytest.approx(1 / (read + views))


def test_no_more_rows_than_the_public_number() -> None:
    weights = np.concatenate([np.zeros(20), np.full(40, 1 / 40)])
    injected = InjectedRows(weights=weights, share=0.5, views=3)
    rows = injected.draw(np.arange(60), 4, Coins())
    assert len(rows) == injected.max_rows(4) == 16
    assert injected.mean_weights(rows).sum() == pytest.approx(1)


@pytest.mark.parametrize(("share", "views"), [(0.0, 4), (1.5, 4), (float("nan"), 4), (0.5, 0)])
def test_numbers_out_of_range_are_refused(share: float, views: int) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        InjectedRows(weights=np.zeros(1), share=share, views=views)
