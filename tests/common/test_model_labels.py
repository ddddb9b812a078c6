"""A plan names the outputs of its models; files of models with other outputs are read by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.artifacts import DEFAULT_LABELS, NAMES
from common.errors import ConfigError, PlanError
from common.losses import loss_named
from common.model_file import described, labels_said, load_model, save_model, unlearned_labels
from common.models import build, network_of
from common.plan import parse_plan
from common.weights import flatten, manifest_of, resolve_initial, unflatten

SEVEN = {"labels": list(NAMES)}


def plan_with(labels: Any, **more: Any) -> Any:
    return parse_plan({"name": "x", "model": {"labels": labels}, **more})


PLAN_BEFORE = "cfc5e639db5497de"


def test_a_plan_that_names_no_outputs_keeps_its_hash_and_network() -> None:
    bare = parse_plan({"name": "x"})
    assert plan_with(list(DEFAULT_LABELS)) == bare
    assert "labels" not in bare.canonical_json()
    # of the version before outputs had names
    assert bare.sha256()[:16] == PLAN_BEFORE
    wide = plan_with(list(NAMES))
    assert wide.sha256() != bare.sha256()
    assert parse_plan(wide.model_dump(mode="json")) == wide
    assert network_of(wide.model)(torch.zeros(1, 2, 32, 32)).shape == (1, len(NAMES))


@pytest.mark.parametrize("labels", [[], ["metl"], ["motion", "metal"], ["metal", "metal"]])
def test_outputs_are_named_once_in_the_order_of_the_vocabulary(labels: list[str]) -> None:
    with pytest.raises(PlanError, match="labels"):
        plan_with(labels)


def test_weights_of_an_output_that_the_plan_does_not_train_are_refused() -> None:
    weights = {"class_weights": {"ct_motion": 2.0}}
    with pytest.raises(PlanError, match=r"ct_motion.* is not among model\.labels"):
        parse_plan({"name": "x", "training": weights})
    plan = plan_with(["metal", "ct_motion"], training=weights)
    logits, labels = torch.tensor([[0.0, 0.5]]), torch.tensor([[0.0, 1.0]])
    heavy = loss_named("bce", {}, plan.training.class_weights, labels=plan.model.labels)(logits, labels)
    expected = (np.log(2) + 2 * np.log1p(np.exp(-0.5))) / 2
    assert heavy.item() == pytest.approx(expected, rel=1e-5)


def test_a_file_of_five_outputs_starts_a_network_of_seven_at_zero_for_the_others() -> None:
    path = resolve_initial("package:small_cnn_phantoms.safetensors", None)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    five, seven = build("small_cnn"), build("small_cnn", labels=NAMES)
    old, new = manifest_of(five.state_dict()), manifest_of(seven.state_dict())
    flat = load_model(path, new, NAMES)
    five.load_state_dict(unflatten(load_model(path, old, DEFAULT_LABELS), old))
    seven.load_state_dict(unflatten(flat, new))
    x = torch.rand(3, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(seven.eval()(x)[:, :5], five.eval()(x))
        assert not seven(x)[:, 5:].any()
    assert unlearned_labels(flat, new, NAMES) == ("quality", "ct_motion")
    assert unlearned_labels(load_model(path, old), old, DEFAULT_LABELS) == ()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    with pytest.raises(ConfigError, match="head"):
        load_model(path, new)  # as a file of this very network


def test_outputs_are_found_by_name_in_a_file_that_says_which_it_has(tmp_path: Path) -> None:
    labels = ("metal", "quality", "ct_motion")
    network = build("small_cnn", labels=labels)
    manifest = manifest_of(network.state_dict())
    save_model(tmp_path / "m", flatten(network.state_dict()), manifest, labels_said(labels))
    wanted = ("beam_hardening", "ct_motion")
    smaller = manifest_of(build("small_cnn", labels=wanted).state_dict())
    state = unflatten(load_model(tmp_path / "m", smaller, wanted), smaller)
    assert torch.equal(state["head.weight"][1], network.state_dict()["head.weight"][2])
    assert not state["head.weight"][0].any()
    save_model(tmp_path / "later", flatten(network.state_dict()), manifest, {"labels": '["metal", "zipper"]'})
    with pytest.raises(ConfigError, match="outputs are not known"):
        load_model(tmp_path / "later", smaller, wanted)


def test_a_model_file_names_its_outputs_where_they_are_not_the_default() -> None:
    assert "labels" not in described(parse_plan({"name": "x"}), "federated")
    assert described(plan_with(["quality"]), "federated")["labels"] == '["quality"]'
