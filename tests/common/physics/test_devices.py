"""Simulators run where their images are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from common.physics import SIMULATORS, ct
from common.physics.acquisition import acquire
from tests.helpers.second_device import ELSEWHERE, MixedDevicesError, Watch


def body(size: int) -> torch.Tensor:
    axis = torch.linspace(-1, 1, size)
    image = torch.where((axis[:, None] / 0.6) ** 2 + (axis[None, :] / 0.9) ** 2 < 1, 40.0, -1000.0)
    image[size // 2 - 3 : size // 2 + 3, size // 4 : size // 4 + 6] = 900.0
    return torch.stack([image, image.flip(-1)])


@pytest.fixture
def second_device() -> Iterator[torch.device]:
    """A device beside the CPU; what the physics cached for it is forgotten."""
    with Watch():
        yield ELSEWHERE
    for cached in (ct.projector, ct.spectrum, ct._rates, ct._water_table):
        cached.cache_clear()


def test_the_second_device_refuses_to_mix(second_device: torch.device) -> None:
    there = torch.arange(3.0).to(second_device)
    assert there.device == second_device
    assert float((there * torch.tensor([1.0, 2.0, 3.0], device=second_device)).sum()) == 8
    with pytest.raises(MixedDevicesError):
        there + torch.ones(3)


def images_for(modality: str, size: int) -> torch.Tensor:
    return body(size) if modality == "CT" else (body(size) + 1000).clamp(min=0)


CASES = [*((name, "GRE") for name in SIMULATORS), ("susceptibility", "EPI"), ("chemical_shift", "EPI")]


@pytest.mark.parametrize(("name", "sequence"), CASES)
@pytest.mark.parametrize("size", [64, pytest.param(208, marks=pytest.mark.slow)])
def test_a_simulator_stays_on_the_device_of_its_images(
    name: str, size: int, sequence: str, second_device: torch.device
) -> None:
    simulator = SIMULATORS[name]
    images = images_for(simulator.modality, size)
    acquisition = replace(acquire(images[0], simulator.modality, pixel_spacing_mm=3.0), sequence=sequence)
    params = [simulator.draw(0.6, torch.Generator().manual_seed(seed), acquisition) for seed in (1, 2)]
    here = simulator.apply(images, params)
    there = simulator.apply(images.to(second_device), params)
    for one, other in zip(here, there, strict=True):
        assert other.device == second_device
        assert torch.equal(one, other.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [96, 192])
def test_cpu_and_gpu_agree(size: int) -> None:
    images = body(size)
    here, there = ct.project(images, 0.3), ct.project(images.cuda(), 0.3)
    assert there.water.is_cuda
    assert torch.allclose(here.water, there.water.cpu(), atol=1e-3)
    assert torch.allclose(
        ct.reconstruct(here.water, here), ct.reconstruct(there.water, there).cpu(), atol=0.2
    )
    for simulator in SIMULATORS.values():
        images = images_for(simulator.modality, size)
        params = simulator.draw(
            0.6,
            torch.Generator().manual_seed(1),
            acquire(images[0], simulator.modality, pixel_spacing_mm=3.0),
        )
        difference = (
            simulator.apply(images, params)[0] - simulator.apply(images.cuda(), params)[0].cpu()
        ).abs()
        assert float(difference.median()) < 0.05
        assert float(difference.max()) < 5
