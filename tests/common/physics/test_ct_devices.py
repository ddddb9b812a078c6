"""The CT chain runs where its images are."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from common.physics import beam_hardening, ct, ct_motion, low_dose, metal, photon_starvation, ring
from common.physics.acquisition import acquire
from tests.second_device import ELSEWHERE, MixedDevicesError, Watch

MODULES = {
    "metal": metal,
    "beam_hardening": beam_hardening,
    "photon_starvation": photon_starvation,
    "low_dose": low_dose,
    "ring": ring,
    "ct_motion": ct_motion,
}


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


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [64, 208])
def test_a_simulator_stays_on_the_device_of_its_images(name: str, size: int, second_device: torch.device) -> None:
    images = body(size)
    acquisition = acquire(images[0], "CT", pixel_spacing_mm=3.0)
    params = [MODULES[name].draw(0.6, torch.Generator().manual_seed(seed), acquisition) for seed in (1, 2)]
    here = MODULES[name].apply(images, params)
    there = MODULES[name].apply(images.to(second_device), params)
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
    assert torch.allclose(ct.reconstruct(here.water, here), ct.reconstruct(there.water, there).cpu(), atol=0.2)
    for module in MODULES.values():
        _agrees(module, images)


def _agrees(module: ModuleType, images: torch.Tensor) -> None:
    params = module.draw(0.6, torch.Generator().manual_seed(1), acquire(images[0], "CT", pixel_spacing_mm=3.0))
    difference = (module.apply(images, params)[0] - module.apply(images.cuda(), params)[0].cpu()).abs()
    assert float(difference.median()) < 0.05
    assert float(difference.max()) < 5
