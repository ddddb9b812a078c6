"""Claims about the CT chain, metal and beam hardening."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.physics import SIMULATORS, beam_hardening, ct, metal
from common.physics.acquisition import acquire

SIZE = 96


def pelvis(size: int = SIZE) -> torch.Tensor:
    """Soft tissue with two dense bones left and right."""
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None], axis[None, :]
    image = torch.full((size, size), -1000.0)
    image[(y / 0.6) ** 2 + (x / 0.9) ** 2 < 1] = 40.0
    for centre in (-0.5, 0.5):
        image[(y / 0.16) ** 2 + ((x - centre) / 0.16) ** 2 < 1] = 1000.0
    return image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def between(image: torch.Tensor) -> float:
    """Mean HU in the middle of the band that joins the two bones, relative to tissue above and below it."""
    middle = SIZE // 2
    band = image[middle - 3 : middle + 3, middle - 8 : middle + 8].mean()
    beside = torch.cat(
        [
            image[middle - 22 : middle - 16, middle - 8 : middle + 8],
            image[middle + 16 : middle + 22, middle - 8 : middle + 8],
        ]
    )
    return float(band - beside.mean())


def two_rods(radius_px: float, material: str = "titanium") -> metal.Metal:
    rods = tuple(
        metal.Rod(y=48.0, x=x, semi_major_px=radius_px, semi_minor_px=radius_px, angle_rad=0.0)
        for x in (30.0, 66.0)
    )
    return metal.Metal(
        severity=0.5,
        kind="rods",
        rods=rods,
        material=material,
        photons=1e8,
        least_depth_hu=0.0,
        pixel_spacing_mm=3.0,
        noise_seed=1,
    )


@pytest.mark.parametrize("name", ["metal", "beam_hardening"])
@pytest.mark.parametrize("shape", [(96, 96), (80, 96), (256, 256)])
def test_zero_severity_is_clean_within_1_hu(name: str, shape: tuple[int, int]) -> None:
    image = pelvis(shape[1])[: shape[0]]
    params = SIMULATORS[name].draw(0.0, generator(), acquire(image, "CT", pixel_spacing_mm=3.0))
    changed, mask = SIMULATORS[name].apply(image, params)
    assert changed.shape == image.shape
    assert float((changed - image).abs().max()) < 1
    assert not bool(mask.any())


def test_zero_gain_is_clean_even_without_the_shortcut_of_apply() -> None:
    image = pelvis()[None]
    acquisition = acquire(image[0], "CT", pixel_spacing_mm=3.0)
    paths = ct.project(image, 0.3)
    none = [metal.draw(0.0, generator(), acquisition)]
    streaks = metal.scale(ct.reconstruct(metal.sinogram_error(paths, none), paths), image, none)
    soft = [beam_hardening.draw(0.0, generator(), acquisition)]
    bands = beam_hardening.scale(
        ct.reconstruct(beam_hardening.sinogram_error(paths, soft), paths), image, soft
    )
    assert float((streaks + bands).abs().max()) < 1
    assert torch.equal(metal.paint(image, none), image)


def test_projection_of_a_disc_is_its_chord_and_fbp_returns_it() -> None:
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    disc = ((axis[:, None] ** 2 + axis[None, :] ** 2) < 30**2).float()
    image = -1000 + 1000 * disc
    paths = ct.project(image[None], pixel_cm=0.2)
    chord = 2 * torch.sqrt((30**2 - axis**2).clamp(min=0)) * 0.2
    assert float((paths.water[0].mean(0) - chord).abs().max()) < 0.35
    back = ct.reconstruct(paths.water, paths)[0]
    inside = (axis[:, None] ** 2 + axis[None, :] ** 2) < 25**2
    assert float(back[inside].mean()) == pytest.approx(1000, rel=0.01)


def test_rod_chords_agree_with_the_projected_pixels() -> None:
    scanner = ct.projector(SIZE)
    rod = metal.Rod(y=40.0, x=60.0, semi_major_px=12.0, semi_minor_px=6.0, angle_rad=0.5)
    fine = (torch.arange(SIZE * 8) + 0.5) / 8 - 0.5
    y, x = fine[:, None] - rod.y, fine[None, :] - rod.x
    u, v = x * math.cos(0.5) + y * math.sin(0.5), y * math.cos(0.5) - x * math.sin(0.5)
    cover = torch.nn.functional.avg_pool2d((((u / 12) ** 2 + (v / 6) ** 2) < 1)[None].float(), 8)[0]
    projected = ct.integrals(cover[None], 1.0)[0]
    assert float((metal._chords(scanner, [(rod,)])[0] - projected).abs().mean()) < 0.05


@pytest.mark.parametrize("size", [96, 128, 192])
def test_projection_and_back_projection_are_transposes(size: int) -> None:
    scanner = ct.projector(size)
    image = torch.randn(size * size, 1, generator=generator(1))
    sinogram = torch.randn(scanner.views * size, 1, generator=generator(2))
    one = ((scanner.forward @ image).double() * sinogram).sum()
    other = (image.double() * (scanner.back @ sinogram)).sum()
    scale = (scanner.forward @ image).norm() * sinogram.norm()
    assert abs(float(one - other)) < 1e-4 * max(abs(float(one)), 1e-2 * float(scale))
    assert abs(float(one)) > 1e-4 * float(scale)


def test_a_projector_is_built_without_a_loop_over_views_and_kept() -> None:
    """Operations on tensors are counted, not seconds: as many for a large matrix as for a small one."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.operations += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (16, 32):
        Count.operations = 0
        with Count():
            ct.projector.__wrapped__(size)
        counts.append(Count.operations)
    assert counts[0] == counts[1] < 150
    assert ct.projector(SIZE) is ct.projector(SIZE)
    assert ct.projector.cache_info().maxsize == 2  # 190 MiB each at the working size


def test_water_alone_is_corrected_exactly() -> None:
    water = torch.linspace(0, 40, 50)
    assert torch.allclose(ct.water_equivalent(ct.transmission(water, torch.zeros(50))), water, atol=0.05)


def test_attenuation_falls_with_energy_and_the_spectrum_has_twelve_bins() -> None:
    assert ct.spectrum().numel() == len(ct.ENERGIES_KEV) == 12
    assert sum(ct.SPECTRUM) == pytest.approx(1)
    for values in ct.attenuation().values():
        assert bool((values.diff() < 0).all())


@pytest.mark.parametrize(
    ("material", "kev", "per_cm"),
    [
        ("water", 60.0, 0.2059),
        ("bone", 60.0, 1.92 * 0.3148),
        ("titanium", 60.0, 4.43 * (0.90 * 0.7661 + 0.06 * 0.2778 + 0.04 * 0.8593)),
        ("steel", 100.0, 7.99 * 0.3865),
        ("cobalt_chrome", 100.0, 8.30 * 0.4129),
    ],
)
def test_attenuation_is_that_of_nist(material: str, kev: float, per_cm: float) -> None:
    """NISTIR 5632, tables 3 and 4; alloys by the mixture rule."""
    logs = np.log(ct.attenuation()[material].numpy())
    assert math.exp(np.interp(math.log(kev), np.log(ct.ENERGIES_KEV), logs)) == pytest.approx(
        per_cm, rel=0.02
    )


def test_the_band_between_rods_darkens_with_their_radius() -> None:
    image = pelvis().clamp(max=40)
    depths = [between(metal.apply(image, two_rods(radius))[0]) for radius in (0.0, 1.0, 2.0, 3.0, 4.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == pytest.approx(0, abs=1)
    assert depths[-1] < -20


def test_the_band_between_rods_darkens_with_atomic_number_and_density() -> None:
    image = pelvis().clamp(max=40)
    for radius in (1.5, 2.0, 3.0):
        titanium, steel, cobalt = (
            between(metal.apply(image, two_rods(radius, name))[0]) for name in ct.METALS
        )
        assert steel < titanium
        assert cobalt < titanium
        assert abs(cobalt - steel) < 0.35 * abs(steel)


def test_the_band_between_rods_darkens_with_the_density_of_the_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pelvis().clamp(max=40)
    depths = []
    try:
        for density in (2.0, 3.0, 4.43):
            monkeypatch.setitem(ct._DENSITY, "titanium", density)
            for cached in (ct.attenuation, ct.mean_attenuation, ct._rates):
                cached.cache_clear()
            depths.append(between(metal.apply(image, two_rods(3.0))[0]))
    finally:
        monkeypatch.undo()
        for cached in (ct.attenuation, ct.mean_attenuation, ct._rates):
            cached.cache_clear()
    assert depths == sorted(depths, reverse=True)


def soft_change(image: torch.Tensor, params: metal.Metal) -> float:
    """Mean absolute change of soft tissue, HU."""
    tissue = ct.soft_tissue(image[None])[0]
    return float((metal.apply(image, params)[0] - image)[tissue].abs().mean())


@pytest.mark.parametrize("kind", metal.KINDS)
def test_every_kind_of_implant_shows_more_with_severity(kind: str) -> None:
    image = pelvis().clamp(max=40)
    spacing = 1.9 if kind == "fillings" else 3.0
    acquisition = acquire(image, "CT", pixel_spacing_mm=spacing)
    seeds = [seed for seed in range(60) if metal.draw(1.0, generator(seed), acquisition).kind == kind][:2]
    assert len(seeds) == 2
    for seed in seeds:
        drawn = [metal.draw(severity, generator(seed), acquisition) for severity in (0.25, 0.5, 0.75, 1.0)]
        assert (
            len({(one.kind, one.material, tuple((rod.y, rod.x) for rod in one.rods)) for one in drawn}) == 1
        )
        changes = [soft_change(image, one) for one in drawn]
        assert changes == sorted(changes)
        assert changes[0] > 2


def test_a_dense_implant_blooms() -> None:
    image = torch.zeros(1, SIZE, SIZE)
    painted = [metal.paint(image, [two_rods(2.0, name)]) / metal.PAINT_HU for name in ct.METALS]
    areas = [float(one.sum()) for one in painted]
    assert areas == sorted(areas)
    assert 2 * math.pi * 2**2 < areas[0] < areas[1] < 2 * math.pi * 3**2
    assert all(float(one.max()) == 1 for one in painted)


def test_fewer_photons_make_noisier_streaks() -> None:
    image = pelvis().clamp(max=40)
    exact = metal.apply(image, two_rods(3.0, "steel"))[0]
    noise = [
        float((metal.apply(image, replace(two_rods(3.0, "steel"), photons=photons))[0] - exact).std())
        for photons in (1e6, 1e5, 1e4)
    ]
    assert noise == sorted(noise)


def test_the_band_between_bones_darkens_with_severity() -> None:
    image = pelvis()
    acquisition = acquire(image, "CT", pixel_spacing_mm=3.0)
    depths = [
        between(beam_hardening.apply(image, beam_hardening.draw(severity, generator(5), acquisition))[0])
        for severity in (0.0, 0.3, 0.6, 1.0)
    ]
    assert depths == sorted(depths, reverse=True)
    assert depths[1] < -15


def test_a_slice_without_bone_stays_clean_of_hardening() -> None:
    image = pelvis().clamp(max=40)
    params = replace(
        beam_hardening.draw(1.0, generator(), acquire(image, "CT", pixel_spacing_mm=3.0)), water_error=0.0
    )
    changed, _ = beam_hardening.apply(image, params)
    assert float((changed - image).abs().max()) < 15


@pytest.mark.parametrize("name", ["metal", "beam_hardening"])
def test_an_artifact_of_severity_0_4_is_visible(name: str) -> None:
    image = pelvis()
    for seed in range(4):
        params = SIMULATORS[name].draw(0.4, generator(seed), acquire(image, "CT", pixel_spacing_mm=3.0))
        changed, mask = SIMULATORS[name].apply(image, params)
        assert bool(torch.isfinite(changed).all())
        assert int(mask.sum()) > 100
        assert float(changed.min()) >= -1024
        assert float(changed.max()) <= 3071


@pytest.mark.parametrize("name", ["metal", "beam_hardening"])
def test_parameters_are_reproducible_and_apply_draws_nothing(name: str) -> None:
    image = pelvis()
    acquisition = acquire(image, "CT", pixel_spacing_mm=3.0)
    first, again, other = (SIMULATORS[name].draw(0.7, generator(seed), acquisition) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert torch.equal(SIMULATORS[name].apply(image, first)[0], SIMULATORS[name].apply(image, first)[0])


@pytest.mark.parametrize("name", ["metal", "beam_hardening"])
def test_a_batch_is_its_slices(name: str) -> None:
    images = torch.stack([pelvis(), pelvis().clamp(max=40), pelvis().flip(0) + 5])
    acquisition = acquire(images[0], "CT", pixel_spacing_mm=3.0)
    params = [
        SIMULATORS[name].draw(severity, generator(seed), acquisition)
        for seed, severity in enumerate((0.4, 0.0, 0.9))
    ]
    changed, mask = SIMULATORS[name].apply(images, params)
    for image, one, together, where in zip(images, params, changed, mask, strict=True):
        alone, alone_where = SIMULATORS[name].apply(image, one)
        assert torch.allclose(alone, together, atol=0.05)
        assert int((alone_where != where).sum()) <= 4


def test_large_slices_show_the_metal_where_it_was_drawn() -> None:
    image = pelvis(256).clamp(max=40)
    params = metal.draw(0.8, generator(2), acquire(image, "CT", pixel_spacing_mm=1.2))
    changed, mask = metal.apply(image, params)
    for rod in params.rods:
        assert float(changed[round(rod.y), round(rod.x)]) > 2500
    assert bool(mask.any())
