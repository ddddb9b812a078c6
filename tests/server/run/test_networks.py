"""A plan chooses its network and its loss, with their arguments, and is refused before a site is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, PlanError
from common.model_file import load_model
from common.models import build
from common.weights import manifest_of
from server.run.conduct import check_names
from tests.helpers.consortium import Consortium, tiny_plan


@pytest.mark.parametrize(
    ("model", "training"),
    [
        pytest.param(
            {"name": "cnn_2d"},
            {"loss": "focal", "loss_args": {"gamma": 1}, "class_weights": {"motion": 2}},
            id="cnn_2d",
        ),
        pytest.param(
            {"name": "ama_resnet", "args": {"patch": "conv", "pyramid": False}},
            {"loss": "batch_dice"},
            id="ama_resnet",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_trains_the_network_and_the_loss_of_its_plan(
    model: dict[str, Any], training: dict[str, Any], consortium: Consortium, tmp_path: Path
) -> None:
    plan = tiny_plan(
        arms=["public", "federated"],
        model={"initial": "random", **model},
        training={"rounds": 1, **training},
    )
    folder = consortium.conduct(plan, tmp_path / "run")
    assert folder.evaluation["status"] == "completed"
    manifest = manifest_of(build(plan.model.name, plan.model.args).state_dict())
    assert load_model(folder.path / "model.safetensors", manifest).size == manifest.size


@pytest.mark.parametrize("arm", ["federated_dp", "local_dp", "federated_clipped"])
def test_a_loss_that_mixes_patients_is_refused_beside_a_private_arm_or_its_control(arm: str) -> None:
    asked = tiny_plan(arms=["federated", arm], training={"loss": "batch_dice"})
    with pytest.raises(ConfigError) as caught:
        check_names(asked)
    assert caught.value.code == "loss-not-private"
    check_names(tiny_plan(arms=["federated"], training={"loss": "batch_dice"}))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": {"name": "ama_resnet", "initial": "random", "args": {"depth": 3}}}, "bad-model-args"),
        ({"model": {"args": {"width": 1}}}, "bad-model-args"),
        ({"training": {"loss": "focal", "loss_args": {"beta": 3}}}, "bad-loss-args"),
        ({"training": {"loss": "dice", "class_weights": {"motion": 3}}}, "bad-loss-args"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_a_site_is_asked(
    changes: dict[str, Any], code: str, consortium: Consortium, tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as caught:
        consortium.conduct(tiny_plan(**changes), tmp_path / "run")
    assert caught.value.code == code
    assert consortium.asked == []
