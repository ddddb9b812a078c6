"""Claims about what changes how a CT slice looks without being an artifact that we grade: noise, rings,
movement.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from common.physics import beam_hardening, ct, ct_motion, low_dose, metal, photon_starvation, ring
from common.physics.acquisition import acquire

SIZE = 96
NUISANCES = {
    "photon_starvation": photon_starvation,
    "low_dose": low_dose,
    "ring": ring,
    "ct_motion": ct_motion,
}
ALL = {**NUISANCES, "metal": metal, "beam_hardening": beam_hardening}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shoulders(size: int = SIZE) -> torch.Tensor:
    """A wide body with a dense bone at either side."""
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None], axis[None, :]
    image = torch.full((size, size), -1000.0)
    image[(y / 0.45) ** 2 + (x / 0.95) ** 2 < 1] = 40.0
    for centre in (-0.6, 0.6):
        image[(y / 0.15) ** 2 + ((x - centre) / 0.15) ** 2 < 1] = 800.0
    return image


def drawn(name: str, severity: float, seed: int = 3, image: torch.Tensor | None = None) -> Any:
    image = shoulders() if image is None else image
    return ALL[name].draw(severity, generator(seed), acquire(image, "CT", pixel_spacing_mm=4.0))


def change(module: ModuleType, image: torch.Tensor, params: Any) -> torch.Tensor:
    changed: torch.Tensor = module.apply(image, params)[0]
    return changed - image


@pytest.mark.parametrize("name", NUISANCES)
@pytest.mark.parametrize("shape", [(96, 96), (80, 96), (256, 256)])
def test_zero_severity_is_clean_within_1_hu(name: str, shape: tuple[int, int]) -> None:
    image = shoulders(shape[1])[: shape[0]]
    changed, mask = NUISANCES[name].apply(image, drawn(name, 0.0, image=image))
    assert changed.shape == image.shape
    assert float((changed - image).abs().max()) < 1
    assert not bool(mask.any())


@pytest.mark.parametrize("name", ["ring", "ct_motion"])
def test_nothing_drawn_at_severity_zero_changes_anything_even_without_the_shortcut(name: str) -> None:
    params = replace(drawn(name, 0.0), severity=1.0)
    assert float(change(NUISANCES[name], shoulders(), params).abs().max()) < 1


@pytest.mark.parametrize("name", NUISANCES)
def test_the_change_grows_with_severity(name: str) -> None:
    sizes = [
        float(change(NUISANCES[name], shoulders(), drawn(name, severity)).square().mean())
        for severity in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert sizes == sorted(sizes)
    assert sizes[1] > 0


@pytest.mark.parametrize("name", NUISANCES)
def test_parameters_are_reproducible_and_apply_draws_nothing(name: str) -> None:
    first, again, other = (drawn(name, 0.7, seed) for seed in (3, 3, 4))
    assert first == again != other
    state = torch.random.get_rng_state()
    assert torch.equal(
        NUISANCES[name].apply(shoulders(), first)[0], NUISANCES[name].apply(shoulders(), first)[0]
    )
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", NUISANCES)
def test_a_batch_is_its_slices(name: str) -> None:
    images = torch.stack([shoulders(), shoulders().flip(0) + 7, shoulders()])
    params = [drawn(name, severity, seed) for seed, severity in enumerate((0.4, 0.0, 0.9))]
    changed, _ = NUISANCES[name].apply(images, params)
    for image, one, together in zip(images, params, changed, strict=True):
        assert torch.allclose(NUISANCES[name].apply(image, one)[0], together, atol=0.05)


@pytest.mark.parametrize("name", ALL)
def test_parameters_survive_json(name: str) -> None:
    params = drawn(name, 0.6)
    back = json.loads(json.dumps(asdict(params), allow_nan=False))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in back.items()}
    if name == "metal":
        values["rods"] = tuple(metal.Rod(**rod) for rod in values["rods"])
    assert type(params)(**values) == params


@pytest.mark.parametrize("name", ["low_dose", "photon_starvation"])
def test_noise_grows_as_photons_fall(name: str) -> None:
    params = drawn(name, 0.5)
    noise = [
        float(change(NUISANCES[name], shoulders(), replace(params, photons=photons)).std())
        for photons in (1e7, 1e6, 1e5, 1e4)
    ]
    assert noise == sorted(noise)
    assert noise[-1] > 2 * noise[0]


def test_counted_quanta_have_the_mean_and_the_variance_of_poisson_and_electronic_noise() -> None:
    noise = torch.randn(400_000, generator=generator())
    photons, transmitted = torch.tensor(1e5), torch.full((400_000,), 0.01)
    seen = ct.counted(transmitted, photons, noise)
    exact = ct.water_equivalent(transmitted[:1])
    slope = float(ct.water_equivalent(transmitted[:1] * 1.01) - exact) / 0.01
    assert float(seen.mean()) == pytest.approx(float(exact), abs=0.02)
    assert float(seen.std()) == pytest.approx(abs(slope) * (1000 + 25) ** 0.5 / 1000, rel=0.03)


def test_starved_streaks_run_along_the_longest_paths() -> None:
    """Left to right: the change varies faster from row to row than along a row."""
    added = change(photon_starvation, shoulders(), replace(drawn("photon_starvation", 0.6), photons=1e5))[
        36:60, 24:72
    ]
    across, along = added.diff(dim=0).square().mean(), added.diff(dim=1).square().mean()
    assert float(across) > 4 * float(along)


def test_low_dose_noise_is_correlated() -> None:
    added = change(low_dose, shoulders(), drawn("low_dose", 0.5))[36:60, 24:72]
    beside = float((added[:, 1:] * added[:, :-1]).mean() / added.square().mean())
    assert beside > 0.25


def test_a_wide_body_gets_more_photons() -> None:
    image = shoulders()
    slim, wide = (
        low_dose.draw(0.5, generator(), acquire(image, "CT", pixel_spacing_mm=spacing))
        for spacing in (3.0, 5.0)
    )
    assert wide.photons > 2 * slim.photons


def test_rings_are_round_about_the_isocentre() -> None:
    image = torch.zeros(SIZE, SIZE)
    params = ring.Ring(severity=1.0, radii_px=(12.0, 25.5), gain_errors=(0.03, -0.02), pixel_spacing_mm=2.0)
    added = change(ring, image, params)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    radius = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    for quarter in range(1, 4):
        turned = added.rot90(quarter)
        assert float((turned - added)[radius < 40].abs().max()) < 0.1 * float(added.abs().max())
    on = {place: added[(radius - place).abs() < 0.35] for place in (12.0, 25.5)}
    # too many counts look like too little attenuation
    assert float(on[12.0].mean()) < 0 < float(on[25.5].mean())
    for values in on.values():
        assert float(values.std()) < 0.35 * abs(float(values.mean()))


def test_a_ring_does_not_depend_on_the_object() -> None:
    params = drawn("ring", 0.8)
    in_air = change(ring, torch.full((SIZE, SIZE), 0.0), params)
    in_body = change(ring, shoulders().clamp(min=-500), params)
    assert torch.allclose(in_air, in_body, atol=0.01)


def test_movement_doubles_contours_and_its_energy_grows_with_its_size() -> None:
    image = shoulders()
    still = ct_motion.CtMotion(
        severity=0.5,
        angle_deg=0.0,
        shift_y_px=0.0,
        shift_x_px=0.0,
        start=0.5,
        duration=0.03,
        pixel_spacing_mm=4.0,
    )
    for field, sizes in (("shift_y_px", (0.0, 1.0, 2.0, 4.0, 8.0)), ("angle_deg", (0.0, 1.0, 2.0, 4.0))):
        energies = [
            float(change(ct_motion, image, replace(still, **{field: size})).square().mean()) for size in sizes
        ]
        assert energies == sorted(energies)
        assert energies[0] < 1e-3
    moved, _ = ct_motion.apply(image, replace(still, shift_y_px=8.0))
    top, shifted = (
        int(rows[0])
        for rows in ((image[:, 48] > -500).nonzero()[:, 0], (image.roll(8, 0)[:, 48] > -500).nonzero()[:, 0])
    )
    steps = moved[:, 48].diff().abs()
    assert shifted - top == 8
    for edge in (top - 1, shifted - 1):  # either contour is there, at part of its height
        assert 120 < float(steps[edge - 1 : edge + 2].sum()) < 1000


def test_a_movement_after_the_last_view_is_not_seen() -> None:
    params = replace(drawn("ct_motion", 1.0), start=1.2, duration=0.02)
    assert float(change(ct_motion, shoulders(), params).abs().max()) < 1
