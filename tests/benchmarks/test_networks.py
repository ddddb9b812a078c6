"""The table of networks has a row for each, and what it counts is what others counted. No claim about speed
is tested.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from common.models import MODELS, fresh

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("networks_benchmark", BENCHMARKS / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# by hand, 1 + the sum over layers of (kernel - 1) * the product of strides before, for the first two
@pytest.mark.parametrize(("name", "pixels"), [("small_cnn", 89), ("cnn_2d", 46), ("resnet18", 435)])
def test_how_far_a_network_sees(name: str, pixels: int, networks: ModuleType) -> None:
    assert networks.field_of_view(fresh(name, 0)) == pixels


@pytest.mark.slow
def test_a_network_has_its_facts_its_costs_and_its_row(networks: ModuleType) -> None:
    """One real process, for the wiring."""
    work = {"slices": 1, "repeats": 1}
    found = networks.measure_all(("small_cnn",), work, 1)
    one = found["networks"]["small_cnn"]
    assert one["parameters"] == 240725
    assert one["engine"] == "opacus"
    assert one["step"]["cpu"].median == one["scoring"]["memory"].median == 1
    assert one["step"]["own"]["cpu_s"] > one["scoring"]["own"]["cpu_s"] > 0
    assert "| `small_cnn` | 0.24 M | 0.08 | 89 |" in networks.table(found)


def test_the_page_has_a_row_for_every_network() -> None:
    page = (BENCHMARKS.parent / "docs" / "networks.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- networks -->") : page.index("<!-- /networks -->")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(MODELS)
