"""What a detector says of an artifact rises with its severity: the shipped model on phantoms it never saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import common.models
from common.artifacts import DEFAULT_LABELS, INDEX, MODALITIES
from common.learning import score
from common.model_file import load_model
from common.models import build
from common.physics import SIMULATORS
from common.physics.acquisition import acquire
from common.physics.appearance import PUBLIC_APPEARANCES
from common.physics.phantom import draw_patients
from common.preprocess import normalize_image, to_stored
from common.weights import manifest_of, unflatten

SEVERITIES = (0.0, 0.3, 0.6, 1.0)
LABELLED = [
    name
    for name, simulator in SIMULATORS.items()
    if simulator.label in DEFAULT_LABELS and name != "chemical_shift_2"
]


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    network = build("small_cnn")
    manifest = manifest_of(network.state_dict())
    path = Path(common.models.__file__).parent / "small_cnn_phantoms.safetensors"
    network.load_state_dict(unflatten(load_model(path, manifest), manifest))
    return network  # type: ignore[return-value]


@pytest.fixture(scope="module")
def clean() -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {"CT": [], "MR": []}
    for number, appearance in enumerate(PUBLIC_APPEARANCES[:3]):
        nothing = replace(appearance, prevalence=dict.fromkeys(DEFAULT_LABELS, 0.0), nuisances={})
        for slices in draw_patients(nothing, 16, seed=900 + number):
            found[slices[0].modality].append(slices[0].image)
    return found


@pytest.mark.parametrize("name", LABELLED)
def test_the_score_rises_with_severity(
    name: str, model: torch.nn.Module, clean: dict[str, list[np.ndarray]]
) -> None:
    simulator = SIMULATORS[name]
    images = [torch.from_numpy(image) for image in clean[simulator.modality]]
    means = []
    for severity in SEVERITIES:
        stored = []
        for number, image in enumerate(images):
            generator = torch.Generator().manual_seed(number)
            acquisition = acquire(image, simulator.modality, pixel_spacing_mm=2.5)
            changed, _ = simulator.apply(image, simulator.draw(severity, generator, acquisition))
            stored.append(
                to_stored(normalize_image(changed.numpy(), simulator.modality, 128), simulator.modality)
            )
        code = np.full(len(stored), MODALITIES.index(simulator.modality), np.int8)
        logits = score(model, np.stack(stored), code, np.arange(len(stored)))
        assert simulator.label is not None
        means.append(float(torch.sigmoid(torch.from_numpy(logits[:, INDEX[simulator.label]])).mean()))
    # near 1 it cannot rise any more
    assert all(after > before - 0.01 for before, after in pairwise(means)), means
    assert means[-1] > means[0] + 0.3, means
