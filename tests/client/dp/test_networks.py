"""Every network with both engines: the same gradients of each patient, and no bit of them from another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.dp.engines import ENGINES
from client.dp.engines.examples import Examples
from common.artifacts import DEFAULT_LABELS
from common.learning import keep_freed_memory
from common.losses import BATCH_LOSSES, LOSSES, PerSampleLoss, masked_bce
from common.models import MODELS, build, fresh
from common.models.blocks import ConvUnit
from common.preprocess import to_channels
from common.studies import StudyImages, sample_channels, with_neighbours
from common.trainable import trainable_names

SIDE = 64
COUNTS = (1, 3, 2)
"""Slices of three patients."""
ROWS = 4
"""A batch of the opacus engine: the first two patients share one."""
CHANGED, OTHERS = 1, [0, 2]
TOLERANCE = 1e-12
"""Of the longest gradient of a patient, or of 1, in double precision. In single precision one value may lie
so near the edge of a ReLU, or one maximum so near the next, that a batch of another size, or another machine,
decides it otherwise: up to 2 % of one patient's gradient. Either is that patient's own gradient.
"""

BIG = {
    "resnet18",
    "resnet50",
    "resnet50_attention",
    "vgg16",
    "vgg19",
    "unet_encoder",
    "densenet121",
    "se_resnet18",
}
NETWORKS = [pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in MODELS]
SMALLEST = ("small_cnn", "cnn_2d")

STUDY_SLICES = 3
POOLINGS = ("mean", "max", "attention", "gru")

SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("ama_resnet", {"patch": "conv"}),
    ("ama_resnet", {"patch": "none", "se": False}),
    ("ama_resnet", {"pyramid": False}),
    ("resnet50_attention", {"channels": False}),
    ("resnet50_attention", {"places": False}),
]


def examples_of(
    changed: int | None = None, side: int = SIDE, dtype: torch.dtype = torch.float32, studies: bool = False
) -> tuple[Examples, list[np.ndarray]]:
    """Images and labels of three patients, of whom one may be another; with `studies` each row is a study."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(
        sum(COUNTS), *((STUDY_SLICES,) if studies else ()), 2, side, side, generator=generator
    )
    labels = torch.randint(0, 2, (sum(COUNTS), len(DEFAULT_LABELS)), generator=generator).float()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = torch.nan
    slices = np.split(np.arange(sum(COUNTS)), np.cumsum(COUNTS)[:-1])
    if changed is not None:
        rows = slices[changed]
        images[rows] = 5 * torch.rand(images[rows].shape, generator=generator) - 2
        labels[rows] = 1 - labels[rows].nan_to_num(1)
    if studies:  # some have fewer slices
        images[0, 2:] = images[2, 1:] = torch.nan
    images, labels = images.to(dtype), labels.to(dtype)
    return Examples(inputs=lambda rows: images[rows], labels=labels), slices


def gradients(
    engine: str,
    network: nn.Module,
    *,
    loss: PerSampleLoss = masked_bce,
    changed: int | None = None,
    side: int = SIDE,
    studies: bool = False,
) -> np.ndarray:
    """(patients, trained parameters); with another patient in the place of `changed`."""
    keep_freed_memory()
    examples, slices = examples_of(changed, side, next(network.parameters()).dtype, studies)
    chunks = ENGINES[engine](
        network, examples, slices, max_slices=max(COUNTS), rows_per_batch=ROWS, loss=loss
    )
    return np.concatenate(list(chunks))


def network_of(name: str, trainable: str = "all", args: Mapping[str, Any] | None = None) -> nn.Module:
    network = fresh(name, 0, args or {}).train()
    trained = trainable_names(network, trainable)
    for each, parameter in network.named_parameters():
        parameter.requires_grad_(each in trained)
    return network


def assert_engines_agree(
    network: nn.Module, side: int = SIDE, studies: bool = False
) -> dict[str, np.ndarray]:
    """Per patient and in the sum, in double precision."""
    network = copy.deepcopy(network).double()
    found = {engine: gradients(engine, network, side=side, studies=studies) for engine in ENGINES}
    loop, hooks = found["patient_loop"], found["opacus"]
    tolerance = TOLERANCE * max(1.0, float(np.linalg.norm(loop, axis=1).max()))
    np.testing.assert_allclose(hooks, loop, rtol=0, atol=tolerance)
    np.testing.assert_allclose(hooks.sum(0), loop.sum(0), rtol=0, atol=tolerance)
    assert (np.linalg.norm(loop, axis=1) > 1e-3).all()
    return found


def strays(
    engine: str,
    network: nn.Module,
    loss: PerSampleLoss = masked_bce,
    changed: int = CHANGED,
    studies: bool = False,
) -> bool:
    """Whether another patient's gradient changes with one patient's slices and labels."""
    before, after = (
        gradients(engine, network, loss=loss, changed=one, studies=studies) for one in (None, changed)
    )
    return not np.array_equal(np.delete(before, changed, 0), np.delete(after, changed, 0))


@pytest.mark.parametrize("name", NETWORKS)
def test_engines_agree_and_a_patient_changes_no_bit_of_another(name: str) -> None:
    network = network_of(name)
    assert_engines_agree(network)
    before = {engine: gradients(engine, network) for engine in ENGINES}
    for engine in ENGINES:
        after = gradients(engine, network, changed=CHANGED)
        np.testing.assert_array_equal(after[OTHERS], before[engine][OTHERS])
        assert not np.array_equal(after[CHANGED], before[engine][CHANGED])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_modality_of_a_patient_decides_nothing_for_another(engine: str) -> None:
    """CT and MR in one batch: a patient trains the stem of their own modality, and nobody else's bits
    move when that patient comes with the other one.
    """
    network = network_of("small_cnn_two_stems")
    examples, slices = examples_of()
    stored = np.random.default_rng(0).integers(0, 2000, (sum(COUNTS), SIDE, SIDE)).astype(np.int16)

    def of(modality: list[int]) -> np.ndarray:
        codes = np.repeat(modality, COUNTS)
        mixed = Examples(
            inputs=lambda rows: torch.from_numpy(to_channels(stored[rows], codes[rows])),
            labels=examples.labels,
        )
        chunks = ENGINES[engine](
            network, mixed, slices, max_slices=max(COUNTS), rows_per_batch=ROWS, loss=masked_bce
        )
        return np.concatenate(list(chunks))

    ct, mr = 0, 1
    before, after = of([mr, ct, mr]), of([mr, mr, mr])
    np.testing.assert_array_equal(after[OTHERS], before[OTHERS])
    sizes = {name: one.numel() for name, one in network.named_parameters()}
    ends = dict(zip(sizes, np.cumsum([*sizes.values()]), strict=True))
    for stem, patients in (("stem.ct.weight", [CHANGED]), ("stem.mr.weight", OTHERS)):
        columns = slice(ends[stem] - sizes[stem], ends[stem])
        assert (np.abs(before[patients, columns]).max(1) > 0).all()
        assert not before[np.setdiff1d(range(len(COUNTS)), patients), columns].any()


@pytest.mark.parametrize("trainable", ["head", "norms"])
@pytest.mark.parametrize("name", NETWORKS)
def test_engines_agree_on_a_part_of_a_network(name: str, trainable: str) -> None:
    network = network_of(name, trainable)
    found = assert_engines_agree(network, side=32)
    assert found["opacus"].shape[1] == sum(
        network.get_parameter(one).numel() for one in trainable_names(network, trainable)
    )


@pytest.mark.parametrize("trainable", ["head", "norms", "all"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_engines_agree_on_studies_and_a_patient_changes_no_bit_of_another(
    pooling: str, trainable: str
) -> None:
    network = network_of("study", trainable, {"pooling": pooling})
    assert_engines_agree(network, side=32, studies=True)
    before = {engine: gradients(engine, network, side=32, studies=True) for engine in ENGINES}
    for engine in ENGINES:
        after = gradients(engine, network, changed=CHANGED, side=32, studies=True)
        np.testing.assert_array_equal(after[OTHERS], before[engine][OTHERS])
        assert not np.array_equal(after[CHANGED], before[engine][CHANGED])


@pytest.mark.parametrize("fusion", ["mean_features", "max_features"])
def test_engines_agree_on_series_of_studies_and_a_patient_changes_no_bit_of_another(fusion: str) -> None:
    """A series of two places and one of one, which some studies do not have."""
    network = network_of("study", "all", {"pooling": "attention", "fusion": fusion, "slices": 2})
    assert_engines_agree(network, side=32, studies=True)
    before = {engine: gradients(engine, network, side=32, studies=True) for engine in ENGINES}
    for engine in ENGINES:
        after = gradients(engine, network, changed=CHANGED, side=32, studies=True)
        np.testing.assert_array_equal(after[OTHERS], before[engine][OTHERS])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "args"), SWITCHES)
def test_engines_agree_with_parts_switched_off(name: str, args: dict[str, Any]) -> None:
    assert_engines_agree(network_of(name, args=args))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SMALLEST else [pytest.mark.slow]) for name in MODELS]
)
def test_no_network_with_any_loss_lets_a_patient_change_another(name: str, loss: str) -> None:
    network = network_of(name)
    for engine in ENGINES:
        assert not strays(engine, network, LOSSES[loss]), engine


def neighbours_of(changed: int | None, series: list[int]) -> tuple[Examples, list[np.ndarray]]:
    """The slices of three patients with their neighbours in `series`; with another patient in the place of
    `changed`.
    """
    examples, slices = examples_of(changed)
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 2000, (sum(COUNTS), SIDE, SIDE)).astype(np.int16)
    if changed is not None:
        stored[slices[changed]] //= 3
    images = StudyImages(
        slices=stored,
        modality=np.zeros(sum(COUNTS), np.int8),
        rows=with_neighbours(np.array(series), np.arange(sum(COUNTS))),
        is_stacked=True,
    )
    seen = Examples(
        inputs=lambda rows: sample_channels(images, images.modality, rows), labels=examples.labels
    )
    return seen, slices


def gradients_with_neighbours(engine: str, name: str, changed: int | None, series: list[int]) -> np.ndarray:
    network = network_of(name, args={"neighbours": True})
    examples, slices = neighbours_of(changed, series)
    chunks = ENGINES[engine](
        network, examples, slices, max_slices=max(COUNTS), rows_per_batch=ROWS, loss=masked_bce
    )
    return np.concatenate(list(chunks))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["small_cnn", "small_cnn_two_stems", "cnn_2d", "ama_resnet"])
def test_a_patient_changes_no_bit_of_another_beside_their_neighbours(name: str, engine: str) -> None:
    series = [0, 1, 1, 1, 2, 2]
    before, after = (gradients_with_neighbours(engine, name, one, series) for one in (None, CHANGED))
    np.testing.assert_array_equal(after[OTHERS], before[OTHERS])
    assert not np.array_equal(after[CHANGED], before[CHANGED])


# What the tests above must be able to see: each of these would void the guarantee.


def test_a_loss_over_the_batch_is_seen() -> None:
    """With the opacus engine, which computes some patients at once."""
    assert strays("opacus", network_of("cnn_2d"), BATCH_LOSSES["batch_dice"])


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(2, 8, 3, 4),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.Linear(8, len(DEFAULT_LABELS)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_statistic_of_the_batch_is_seen() -> None:
    """Opacus refuses BatchNorm for its running statistics; without them it computes, and wrongly."""
    assert strays("opacus", BatchStatistics())


class PatchesAsSamples(nn.Module):
    """Four quarters of a slice as four samples, their logits averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.head = ConvUnit(2, 8, 3, 2), nn.Linear(8, len(DEFAULT_LABELS))

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        quarters = x.unfold(2, half, half).unfold(3, half, half)  # (B, 2, 2, 2, half, half)
        patches = quarters.permute(0, 2, 3, 1, 4, 5).reshape(-1, 2, half, half)
        return self.head(self.unit(patches).mean((2, 3))).reshape(len(x), 4, -1).mean(1)


def test_patches_in_the_batch_are_seen() -> None:
    """Opacus takes each for a sample: a patient's row then holds patches of others."""
    network = PatchesAsSamples()
    assert strays("opacus", network, changed=0)
    loop, hooks = (gradients(engine, network) for engine in ("patient_loop", "opacus"))
    assert np.abs(loop - hooks).max() > 1e-3


class PooledOverStudies(nn.Module):
    """Shares of slices that add up to 1 over all studies of a batch, not over those of each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(48, 1)

    def forward(self, features: Tensor, is_slice: Tensor) -> Tensor:
        scores = self.weight(features).masked_fill(~is_slice[:, :, None], -torch.inf)
        return (scores.flatten().softmax(0).reshape(scores.shape) * features).sum(1)


class SlicesAsSamples(nn.Module):
    """The slices of all studies in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.head = ConvUnit(2, 8, 3, 2), nn.Linear(8, len(DEFAULT_LABELS))

    def forward(self, x: Tensor) -> Tensor:
        features = self.unit(x.nan_to_num().flatten(0, 1)).mean((2, 3))
        return self.head(features.reshape(len(x), STUDY_SLICES, -1).mean(1))


def test_neighbours_across_patients_are_seen() -> None:
    before, after = (
        gradients_with_neighbours("patient_loop", "cnn_2d", one, [0] * 6) for one in (None, CHANGED)
    )
    assert not np.array_equal(after[OTHERS], before[OTHERS])


def test_a_pooling_over_the_batch_is_seen() -> None:
    network = network_of("study")
    network.add_module("pooling", PooledOverStudies())
    assert strays("opacus", network, studies=True)


def test_slices_of_studies_in_the_batch_are_seen() -> None:
    """Opacus takes each for a sample: a patient's row then holds slices of others."""
    network = SlicesAsSamples()
    assert strays("opacus", network, changed=0, studies=True)
    loop, hooks = (gradients(engine, network, studies=True) for engine in ("patient_loop", "opacus"))
    assert np.abs(loop - hooks).max() > 1e-3


def test_arguments_change_the_network_that_the_engines_train() -> None:
    whole, bare = (build("ama_resnet", args) for args in ({}, {"pyramid": False}))
    assert whole.get_parameter("head.weight").shape[1] == 128
    assert bare.get_parameter("head.weight").shape[1] == 512
