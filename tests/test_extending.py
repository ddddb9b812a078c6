"""Adding a model, a loss, a strategy, a simulator or an artifact takes what docs/extending.md says: its code
runs.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import ARTIFACTS, Artifact
from common.errors import PlanError
from common.losses import LOSSES
from common.models import MODELS, build
from common.physics import SIMULATORS
from common.physics.acquisition import Acquisition, frame_of
from server.strategies import STRATEGIES, strategy_named
from server.strategies.fedavg import fedavg
from tests.helpers.command_line import ROOT
from tests.helpers.consortium import Consortium, tiny_plan


def example(registry: str, folder: Path) -> tuple[str, Any]:
    """Name and entry of a page's example, imported from a module of its own."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = {
        match[1]: (match[2], match[3])
        for match in re.finditer(r"```python\n# (\w+): (\w+)\n(.*?)```", page, re.DOTALL)
    }
    name, code = blocks[registry]
    path = folder / f"added_{name}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return name, module.entry


def checkpoint(consortium: Consortium, out: Path, **changes: Any) -> bytes:
    """The last checkpoint of a tiny run."""
    plan = tiny_plan(**changes)
    folder = consortium.conduct(plan, out)
    assert folder.evaluation["status"] == "completed"
    return folder.arm("federated").checkpoint_path(plan.training.rounds).read_bytes()


def test_a_model(consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, entry = example("MODELS", tmp_path)
    monkeypatch.setitem(MODELS, name, entry)
    checkpoint(consortium, tmp_path / "run", model={"name": name, "initial": "random"})


def test_a_loss(consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, entry = example("LOSSES", tmp_path)
    monkeypatch.setitem(LOSSES, name, entry)
    checkpoint(consortium, tmp_path / "run", training={"rounds": 1, "loss": name})


def test_a_strategy_and_its_state_survives_an_interruption(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, entry = example("STRATEGIES", tmp_path)
    monkeypatch.setitem(STRATEGIES, name, entry)
    training = {"rounds": 3, "strategy": name}
    mean = checkpoint(consortium, tmp_path / "mean", training={"rounds": 3})
    whole = checkpoint(consortium, tmp_path / "whole", training=training)
    assert whole != mean
    cut = Consortium(data=consortium.data, stop_at=8)  # in round 3
    with pytest.raises(KeyboardInterrupt):
        cut.conduct(tiny_plan(training=training), tmp_path / "cut")
    assert checkpoint(consortium, tmp_path / "cut", training=training) == whole


def test_the_mean_stores_no_state(consortium: Consortium, tmp_path: Path) -> None:
    checkpoint(consortium, tmp_path / "run", training={"rounds": 1})
    assert not list((tmp_path / "run").rglob("state-*"))
    assert fedavg.state_to_checkpoint(fedavg.initial_state(3)) == {}


def test_an_unknown_strategy_is_refused_before_a_site_is_asked(
    consortium: Consortium, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="'median' is unknown") as caught:
        consortium.conduct(tiny_plan(training={"strategy": "median"}), tmp_path / "run")
    assert caught.value.code == "unknown-strategy"
    assert "fedavg" in caught.value.hint
    assert consortium.asked == []


def test_a_strategy_with_vectors_that_are_not_carried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from common.wire import Crossing

    monkeypatch.setitem(
        STRATEGIES, "scaffold", dataclasses.replace(fedavg, extra_up={"control": Crossing.DP})
    )
    with pytest.raises(PlanError, match=r"common/wire\.py"):
        strategy_named("scaffold")


def test_a_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, entry = example("SIMULATORS", tmp_path)
    monkeypatch.setitem(SIMULATORS, name, entry)
    simulator, image = SIMULATORS[name], torch.ones(16, 16)
    acquisition = Acquisition(rows=16, columns=16, frame=frame_of(image, "MR"))
    for severity, changed in ((0.0, 0), (0.5, 16)):
        params = simulator.draw(severity, torch.Generator().manual_seed(1), acquisition)
        result, mask = simulator.apply(image, params)
        assert result.shape == mask.shape == image.shape
        assert int(mask.sum()) == changed


def test_an_artifact(tmp_path: Path) -> None:
    name, entry = example("ARTIFACTS", tmp_path)
    assert isinstance(entry, Artifact)
    assert entry.name == name not in [artifact.name for artifact in ARTIFACTS]
    names = (*[artifact.name for artifact in ARTIFACTS], entry.name)
    model = build("small_cnn", labels=names)
    assert model(torch.zeros(1, 2, 32, 32)).shape == (1, len(names))
    assert np.isfinite(model(torch.zeros(1, 2, 32, 32)).detach().numpy()).all()
