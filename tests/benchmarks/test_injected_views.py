"""The benchmark of injected views trains as a site does, and its control fails. No figure is tested."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from common.artifacts import DEFAULT_LABELS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDTH = 8


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("injected_views")


def rows_of(views: ModuleType, people: int, seed: int, *, pairs: bool) -> Any:
    """A person untouched and with each artifact, which moves one feature."""
    rng = np.random.default_rng(seed)
    features, labels, owners = [], [], []
    for person in range(people):
        base = 0.3 * rng.standard_normal(WIDTH)
        for place, output in enumerate([None, *views.OUTPUTS]):
            x, y = base + 0.1 * rng.standard_normal(WIDTH), np.full(len(DEFAULT_LABELS), np.nan, np.float32)
            if output is not None:
                x[output] += 1.0
            if pairs and output is not None:
                y[output] = 1.0
            else:
                y[views.OUTPUTS] = [float(one == output) for one in views.OUTPUTS]
            features.append(x.astype(np.float32))
            labels.append(y)
            owners.append(person if pairs else 10 * person + place)
    weights = np.tile([1 / 2, 1 / 6, 1 / 6, 1 / 6], people)
    return views.Rows(
        features=np.stack(features), labels=np.stack(labels), owners=np.array(owners), weights=weights
    )


def test_pairs_teach_and_permuted_labels_do_not(views: ModuleType) -> None:
    head = np.zeros((len(DEFAULT_LABELS), WIDTH), np.float32), np.zeros(len(DEFAULT_LABELS), np.float32)
    sites = [rows_of(views, 20, seed, pairs=True) for seed in (1, 2)]
    test = rows_of(views, 20, 3, pairs=False)
    learned = views.macro(views.trained(head, sites, 4, 20, 0.0), test)
    permuted = views.macro(views.trained(head, [views._permuted(site) for site in sites], 4, 20, 0.0), test)
    assert learned > 0.95
    assert permuted < 0.8
    assert views.macro(head, test) == 0.5


def test_every_figure_has_its_place_in_the_page(views: ModuleType) -> None:
    found = {
        "public": 0.8,
        "public_interval": [0.7, 0.9],
        "gains": [
            {
                "people": 25,
                "sites": 2,
                "views": 4,
                "without_noise": 0.9,
                "noise": 0.85,
                "spread": 0.01,
                "left_out": 0,
            }
        ],
        "probe": {"statistics": 0.5, "features": 0.5, "bound": 0.6},
        "permuted": 0.5,
        "environment": {"date": "2026-01-01", "machine": "Linux", "versions": {"fedqc": "0"}},
    }
    assert "| 25 | 4 | 0.900 | 0.850 ± 0.010 | +0.050 |" in views.table(found)
    page = (BENCHMARKS.parent / "docs" / "physics.md").read_text(encoding="utf-8")
    assert "<!-- injected_views -->" in page
    assert "<!-- /injected_views -->" in page
