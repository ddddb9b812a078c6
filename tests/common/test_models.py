"""Every network keeps to one slice, changes nothing in place, and is the network that it is named after."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.artifacts import DEFAULT_LABELS, MODALITIES
from common.device_slices import channels_of
from common.errors import ConfigError, PlanError
from common.model_file import load_model, save_model
from common.models import MODELS, as_classifier, build, fresh
from common.models.small_cnn_two_stems import is_ct
from common.physics.appearance import PUBLIC_APPEARANCES
from common.physics.phantom import draw_patients
from common.plan import parse_plan
from common.preprocess import normalize_image, to_channels, to_stored
from common.weights import digest, flatten, manifest_of, unflatten

PUBLISHED = {
    # million parameters without the head of the publication, for three input channels
    "resnet18": 11.177,
    "resnet50": 23.508,
    "resnet50_attention": 23.508 + 2.533,  # CBAM (Woo et al., 2018, table 4): 28.09 against 25.56 with heads
    "se_resnet18": 11.177 + 0.087,  # gates of Hu et al., here with biases
    "vgg16": 14.715,  # its convolutions
    "vgg19": 20.024,
    "densenet121": 6.954,
    "efficientnet_b0": 4.008,
    "csp": 4.17,  # backbone of YOLOv5s
    "unet_encoder": 18.84,
}
DIGESTS = {
    "small_cnn": "06b98fdd6d2f6c88",
    "small_cnn_two_stems": "fb2456f78c8dc852",
    "resnet18": "cea0209f91d2751c",
    "resnet50": "8cd5d2b115116014",
    "resnet50_attention": "9a9b59a9ac78d5ee",
    "ama_resnet": "4c2cc5d02321079c",
    "cnn_2d": "2ce3b1ee55549413",
    "vgg16": "6adbb30de5561dee",
    "vgg19": "4dce4594ddcbff48",
    "se_resnet18": "cc3b8aef33fe3f57",
    "densenet121": "69e8674f720df8bb",
    "unet_encoder": "927789e736243672",
    "csp": "9912c7f9d684dfc3",
    "efficientnet_b0": "47673a9d72b4b010",
    "study": "66e5dff06ea0d065",
}
"""Of the names and shapes of the tensors: models that were trained must load again."""


@pytest.mark.parametrize("name", MODELS)
def test_a_network_keeps_to_one_slice_and_changes_nothing_in_place(name: str) -> None:
    network = build(name)
    for place, module in network.named_modules():
        assert not isinstance(module, nn.modules.batchnorm._NormBase), place
        assert not isinstance(module, nn.modules.dropout._DropoutNd), place
        assert not getattr(module, "inplace", False), place
    assert not list(network.buffers())
    assert type(as_classifier(network).head) is nn.Linear
    assert as_classifier(network).head.out_features == len(DEFAULT_LABELS)
    # without GroupNorm layers on a single channel, which would leave nothing of it
    groups = [one for one in network.modules() if isinstance(one, nn.GroupNorm)]
    assert groups
    assert min(one.num_channels // one.num_groups for one in groups) >= 2


@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_takes_slices_of_any_size_and_its_head_is_linear(name: str, side: int) -> None:
    network = fresh(name, 0).train()
    x = torch.rand(3, 2, side, side, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    with torch.no_grad():
        logits, features = network(x), as_classifier(network).features(x)
        assert torch.equal(as_classifier(network).head(features), logits)
        assert torch.equal(network.eval()(x), logits)
    assert torch.equal(x, before)
    assert logits.shape == (3, len(DEFAULT_LABELS))
    assert logits.isfinite().all()
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_is_as_large_as_published(name: str) -> None:
    """Up to the stem, which has two input channels for three: under 0.1 %; GroupNorm has as many parameters
    as BatchNorm.
    """
    network = build(name)
    size = sum(one.numel() for key, one in network.named_parameters() if not key.startswith("head."))
    assert size / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_of_a_network_keep_their_names_and_shapes(name: str) -> None:
    state = build(name).state_dict()
    told = ";".join(f"{key}{tuple(tensor.shape)}" for key, tensor in state.items())
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == DIGESTS[name]


def test_the_weights_of_the_default_network_are_those_of_its_seed() -> None:
    assert digest(flatten(fresh("small_cnn", 7).state_dict()))[:16] == "e183677c0cf991da"


def test_a_slice_tells_its_modality_by_its_own_channels() -> None:
    """Of phantoms with any artifact, and of what leaves least to tell: air, water, a metal ball, noise."""
    rng = np.random.default_rng(0)
    stored, modality = [], []
    for appearance in PUBLIC_APPEARANCES[:2]:
        for slices in draw_patients(appearance, 6, seed=3):
            for one in slices:
                stored.append(to_stored(normalize_image(one.image, one.modality, 64), one.modality))
                modality.append(MODALITIES.index(one.modality))
    for hu in (np.full((64, 64), -1024), np.zeros((64, 64)), rng.normal(40, 900, (64, 64))):
        stored.append(to_stored(hu, "CT"))
        modality.append(0)
    dot = np.zeros((64, 64))
    dot[30, 31] = 1
    for signal in (dot, rng.random((64, 64)), np.pad(np.ones((20, 20)), 22)):
        stored.append(to_stored(normalize_image(signal, "MR", 64), "MR"))
        modality.append(1)
    codes = np.array(modality, np.int8)
    assert 5 < codes.sum() < len(codes) - 5
    for channels in (
        torch.from_numpy(to_channels(np.stack(stored), codes)),
        channels_of(torch.from_numpy(np.stack(stored)), torch.from_numpy(codes)),
    ):
        for x in (channels, channels.double()):
            assert torch.equal(is_ct(x), torch.from_numpy(codes == MODALITIES.index("CT")))
    assert is_ct(torch.zeros(1, 2, 64, 64)).all()  # black: no signal, no spectrum


def test_each_modality_has_its_stem_and_the_rest_is_shared() -> None:
    network = fresh("small_cnn_two_stems", 0)
    hu = np.random.default_rng(0).integers(-200, 300, (1, 32, 32)).astype(np.int16)
    slices = np.concatenate([hu, np.abs(hu)])
    x = torch.from_numpy(to_channels(slices, np.array([0, 1], np.int8)))
    with torch.no_grad():
        before = network(x)
        network.get_parameter("stem.ct.weight").zero_()
        without_ct = network(x)
        network.get_parameter("stem.mr.weight").zero_()
        without_both = network(x)
    assert torch.equal(without_ct[1], before[1])
    assert not torch.equal(without_ct[0], before[0])
    assert not torch.equal(without_both[1], before[1])
    own = {name for name, _ in network.named_parameters()} - {
        name for name, _ in fresh("small_cnn", 0).named_parameters()
    }
    assert own == {"stem.ct.weight", "stem.mr.weight"}


@pytest.mark.parametrize(
    ("name", "args", "said", "known"),
    [
        ("ama_resnet", {"depth": 4}, "model.args.depth is unknown to ama_resnet", "patch, se, pyramid"),
        ("ama_resnet", {"se": 1}, "model.args.se = 1: must be true or false", "patch, se, pyramid"),
        ("ama_resnet", {"patch": "fold"}, "one of unshuffle, conv, none", "patch, se, pyramid"),
        ("resnet18", {"artifacts": 7}, "model.args.artifacts is unknown to resnet18", "known: neighbours"),
        ("small_cnn", {"width": 9}, "model.args.width is unknown to small_cnn", "known: neighbours"),
        ("study", {"slices": 5}, "model.args.slices = 5: must be one of 2, 4, 8, 16, 32", "slices"),
        ("study", {"fusion": "sum"}, "one of none, mean, noisy_or, mean_features, max_features", "series"),
        ("study", {"neighbours": True}, "model.args.neighbours is unknown to study", "slices"),
        ("study", {"slice_network": "study"}, "model.args.slice_network = 'study' is unknown", "resnet18"),
    ],
)
def test_arguments_that_a_network_does_not_take_are_refused_in_one_line(
    name: str, args: dict[str, Any], said: str, known: str
) -> None:
    with pytest.raises(PlanError) as caught:
        build(name, args)
    assert caught.value.code == "bad-model-args"
    assert said in caught.value.message
    assert known in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("name", MODELS)
def test_no_argument_sets_a_size(name: str) -> None:
    """A hospital builds what a plan names: words and truth values choose among networks of this room."""
    import inspect
    from typing import Literal, get_origin

    parameters = inspect.signature(MODELS[name], eval_str=True).parameters
    assert next(iter(parameters)) == "artifacts"
    for parameter in list(parameters.values())[1:]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        if parameter.name != "slice_network":  # a name of this dictionary
            assert parameter.annotation is bool or get_origin(parameter.annotation) is Literal


def test_arguments_are_part_of_the_hash_where_there_are_some() -> None:
    bare = {"name": "ama_resnet", "initial": "random"}
    given: list[dict[str, Any]] = [{}, {"args": {}}]
    given += [{"args": {"se": True, "patch": "conv"}}, {"args": {"se": 1, "patch": "conv"}}]
    plans = [parse_plan({"name": "x", "model": {**bare, **more}}) for more in given]
    assert plans[0] == plans[1]
    assert '"args"' not in plans[1].canonical_json()
    assert len({plan.sha256() for plan in plans}) == len({hash(plan) for plan in plans}) == 3
    assert plans[2] != plans[3]
    assert parse_plan(plans[2].model_dump(mode="json")) == plans[2]


@pytest.mark.parametrize("args", [{"A": 1}, {"a": [1]}, {"a": None}, {"a": float("nan")}, {"a": "x" * 65}, 3])
def test_arguments_are_a_small_mapping_of_words_and_numbers(args: Any) -> None:
    with pytest.raises(PlanError, match=r"model\.args"):
        parse_plan({"name": "x", "model": {"args": args}})


SLICE_NETWORKS = [name for name in MODELS if name != "study"]


@pytest.mark.parametrize("name", SLICE_NETWORKS)
def test_every_network_of_slices_takes_neighbours_and_begins_without_them(name: str, tmp_path: Path) -> None:
    """Six channels, the slice's own first; weights of the network without neighbours are a start, from which
    these count for nothing until they are trained.
    """
    alone, both = fresh(name, 0).eval(), fresh(name, 1, {"neighbours": True}).eval()
    before, after = manifest_of(alone.state_dict()), manifest_of(both.state_dict())
    assert before.names == after.names
    generator = torch.Generator().manual_seed(1)
    x, beside = torch.rand(2, 6, 32, 32, generator=generator), torch.rand(2, 4, 32, 32, generator=generator)
    other = torch.cat([x[:, :2], beside], 1)
    with torch.no_grad():
        assert not torch.equal(both(x), both(other))
        save_model(tmp_path / "alone", flatten(alone.state_dict()), before, {})
        both.load_state_dict(unflatten(load_model(tmp_path / "alone", after), after))
        torch.testing.assert_close(both(x), alone(x[:, :2]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(both(other), both(x), rtol=0, atol=0)
    save_model(tmp_path / "both", flatten(both.state_dict()), after, {})
    with pytest.raises(ConfigError, match=r"is not what model\.name describes"):
        load_model(tmp_path / "both", before)
