"""What a private arm trains follows from plan and arm."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from common.arms import ARMS
from common.errors import RunError
from common.models import MODELS, build
from common.plan import RunPlan, parse_plan
from common.trainable import private_part, trainable_names, trained_part
from common.weights import Manifest, manifest_of, outside, part_size


def plan_of(trainable: str | None = None) -> RunPlan:
    privacy = {} if trainable is None else {"trainable": trainable}
    return parse_plan({"name": "p", "arms": ["federated_dp"], "privacy": privacy})


def test_the_defaults_are_not_written_into_a_plan() -> None:
    """Plans of earlier versions keep their hash."""
    assert plan_of().sha256() == plan_of("head").sha256() != plan_of("norms").sha256()
    assert "engine" not in plan_of().canonical_json()
    engines = {"name": "p", "privacy": {"engine": "patient_loop"}}
    assert '"engine":"patient_loop"' in parse_plan(engines).canonical_json()


@pytest.mark.parametrize("name", MODELS)
def test_head_is_part_of_norms_and_norms_of_all(name: str) -> None:
    network = build(name)
    head, norms, everything = (set(trainable_names(network, one)) for one in ("head", "norms", "all"))
    assert {"head.weight", "head.bias"} == head < norms < everything
    assert everything == {name for name, _ in network.named_parameters()}
    affine = {id(module.weight) for module in network.modules() if isinstance(module, nn.GroupNorm)}
    assert {one for one in norms if id(network.get_parameter(one)) in affine}
    assert not {one for one in norms - head if network.get_parameter(one).ndim != 1}


def test_only_private_arms_their_controls_and_frozen_arms_train_a_part() -> None:
    manifest = manifest_of(build("small_cnn").state_dict())
    for arm, kind in ARMS.items():
        found = trained_part(plan_of("norms"), arm)
        assert (part_size(found) < manifest.size) == (kind.private or kind.control or kind.frozen)


def test_the_head_is_a_slice_as_before_and_norms_are_positions() -> None:
    manifest = manifest_of(build("small_cnn").state_dict())
    assert private_part(plan_of()) == manifest.part("head.")
    assert private_part(plan_of("all")) == slice(0, manifest.size)
    norms = private_part(plan_of("norms"))
    assert isinstance(norms, np.ndarray)
    assert (np.diff(norms) > 0).all()
    assert sorted([*norms, *outside(norms, manifest.size)]) == list(range(manifest.size))


def test_places_of_tensors_in_a_flat_array() -> None:
    manifest = Manifest(names=("a", "b", "c"), shapes=((2,), (3, 1), (2,)))
    assert manifest.places({"a", "b"}) == slice(0, 5)
    assert manifest.places({"a", "c"}).tolist() == [0, 1, 5, 6]
    assert part_size(manifest.places({"a", "c"})) == 4
    assert outside(manifest.places({"b"}), 7).tolist() == [0, 1, 5, 6]
    with pytest.raises(RunError, match="no tensor `d`"):
        manifest.places({"a", "d"})
