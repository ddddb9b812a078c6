"""`benchmarks/severity.py`: figures by hand; a second head changes nothing where no severity is known."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import DEFAULT_LABELS, INDEX
from common.losses import masked_bce
from common.model_file import load_model
from common.models import build
from common.weights import manifest_of, resolve_initial


@pytest.fixture
def severity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("severity")


def graded(severity: ModuleType, truth: np.ndarray) -> Any:
    """Motion of these severities, two slices a person."""
    severities = np.full((len(truth), len(DEFAULT_LABELS)), np.nan, np.float32)
    severities[:, INDEX["motion"]] = truth
    return severity.Graded(
        images=np.zeros((len(truth), 8, 8), np.int16),
        modality=np.ones(len(truth), np.int8),
        labels=np.ones((len(truth), len(DEFAULT_LABELS)), np.float32),
        severities=severities,
        groups=np.full(len(truth), "a"),
        unit=np.arange(len(truth)) // 2,
    )


def test_figures_are_of_slices_that_show_it_and_the_constant_ranks_nothing(severity: ModuleType) -> None:
    truth = np.linspace(0.1, 0.9, 8)
    answers = {
        way: np.tile(values[:, None], len(DEFAULT_LABELS))
        for way, values in {
            "constant": np.full(8, 0.5),
            "logit": truth + 0.1,
            "head": truth[::-1],
        }.items()
    }
    (row,) = severity.figures(answers, graded(severity, truth), 40)
    assert (row["artifact"], row["slices"], row["people"]) == ("motion", 8, 4)
    ways = row["ways"]
    assert ways["constant"]["error"] == pytest.approx(np.abs(truth - 0.5).mean())
    assert ways["constant"]["rank"] == 0
    assert (ways["logit"]["error"], ways["logit"]["rank"]) == (pytest.approx(0.1), pytest.approx(1))
    assert ways["head"]["rank"] == pytest.approx(-1)
    assert ways["head"]["more_than_logit"] == pytest.approx(ways["head"]["error"] - 0.1)
    low, high = ways["logit"]["more_interval"]
    assert low == high == 0


def test_the_linear_map_finds_a_linear_law(severity: ModuleType) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(5, 3, (2000, 4))
    y = 0.5 + x @ np.array([0.02, -0.01, 0, 0])
    mean, deviation, weights, offset = severity.ridge(x, y)
    assert ((x - mean) / deviation) @ weights + offset == pytest.approx(y, abs=0.01)


def test_what_a_network_sees_is_what_it_says(severity: ModuleType) -> None:
    network = build("small_cnn").eval()
    data = graded(severity, np.linspace(0, 1, 4))
    data = severity.Graded(
        **vars(data) | {"images": np.random.default_rng(1).integers(0, 4000, (4, 32, 32)).astype(np.int16)}
    )
    made = severity.seen(network, data)
    expected = severity.score(network, data.images, data.modality, np.arange(4))
    assert made.logits == pytest.approx(expected, abs=1e-5)
    assert made.of(np.array([2])).features.shape == (1, made.features.shape[1])


def test_a_second_head_begins_with_the_same_scores_and_an_unknown_severity_costs_nothing(
    severity: ModuleType,
) -> None:
    network = build("small_cnn")
    flat = load_model(
        resolve_initial(severity.SHIPPED, None), manifest_of(network.state_dict()), DEFAULT_LABELS
    )
    one, two = (severity.network_of(flat, severity=more) for more in (False, True))
    x = torch.rand(3, 2, 32, 32)
    logits = two(x)
    assert logits.shape == (3, 2 * len(DEFAULT_LABELS))
    assert torch.allclose(logits[:, : len(DEFAULT_LABELS)], one(x), atol=1e-5)
    labels = torch.tensor(np.random.default_rng(2).integers(0, 2, (3, len(DEFAULT_LABELS)))).float()
    unknown = torch.full_like(labels, torch.nan)
    both = masked_bce(logits, torch.cat([labels, unknown], 1))
    assert both.tolist() == pytest.approx(masked_bce(one(x), labels).tolist(), abs=1e-5)
    (gradient,) = torch.autograd.grad(both.sum(), two.head.weight, retain_graph=True)
    assert (gradient[len(DEFAULT_LABELS) :] == 0).all()
    known = masked_bce(logits, torch.cat([labels, 0.7 * labels + torch.where(labels > 0, 0.0, torch.nan)], 1))
    (gradient,) = torch.autograd.grad(known.sum(), two.head.weight)
    assert (gradient[len(DEFAULT_LABELS) :] != 0).any()
