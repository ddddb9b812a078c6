"""Claims about motion, susceptibility and chemical shift."""

from __future__ import annotations

import json
import math

import pytest
import torch

from common.errors import ImagingError
from common.physics import (
    SIMULATORS,
    chemical_shift,
    ghosting,
    kspace,
    motion,
    record,
    replay,
    rician_noise,
    susceptibility,
)
from common.physics.acquisition import Acquisition, acquire

MR = [name for name, simulator in SIMULATORS.items() if simulator.modality == "MR"]


def brain(rows: int = 128, columns: int = 128) -> torch.Tensor:
    """A head: bright fat ring, dark skull, brain with a ventricle; edges softened as a scanner would."""
    y = torch.linspace(-1, 1, rows)[:, None]
    x = torch.linspace(-1, 1, columns)[None, :]
    level = torch.sqrt((y / 0.85) ** 2 + (x / 0.7) ** 2)
    image = torch.zeros(rows, columns)
    for radius, value in ((1.0, 1.0), (0.92, 0.05), (0.84, 0.6), (0.3, 0.2)):
        image = torch.where(level < radius, torch.tensor(value), image)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    return torch.nn.functional.conv2d(image[None, None], kernel[None, None], padding=1)[0, 0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MR)
@pytest.mark.parametrize("phase_encoding", ["ROW", "COL"])
@pytest.mark.parametrize("shape", [(128, 128), (160, 120)])
def test_zero_severity_is_the_identity(name: str, phase_encoding: str, shape: tuple[int, int]) -> None:
    image = brain(*shape)
    simulator = SIMULATORS[name]
    params = simulator.draw(0.0, generator(), acquire(image, "MR", phase_encoding=phase_encoding))
    changed, mask = simulator.apply(image, params)
    assert changed.shape == image.shape
    assert float((changed - image).abs().max()) < 1e-5 * float(image.max())
    assert not bool(mask.any())


@pytest.mark.parametrize("name", [name for name in MR if SIMULATORS[name].label])
def test_an_artifact_of_severity_0_4_is_visible_and_finite(name: str) -> None:
    image = brain()
    for seed in range(5):
        params = SIMULATORS[name].draw(0.4, generator(seed), acquire(image, "MR"))
        changed, mask = SIMULATORS[name].apply(image, params)
        assert bool(torch.isfinite(changed).all())
        assert float(changed.min()) >= 0
        assert int(mask.sum()) >= 12


@pytest.mark.parametrize("name", MR)
def test_parameters_are_reproducible_and_apply_draws_nothing(name: str) -> None:
    image = brain()
    acquisition = acquire(image, "MR")
    first, again, other = (SIMULATORS[name].draw(0.7, generator(seed), acquisition) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    torch.manual_seed(1)
    one, _ = SIMULATORS[name].apply(image, first)
    torch.manual_seed(2)
    two, _ = SIMULATORS[name].apply(image, first)
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", MR)
def test_a_batch_equals_its_slices_even_with_mixed_directions(name: str) -> None:
    image = brain()
    each = [
        SIMULATORS[name].draw(0.8, generator(seed), acquire(image, "MR", phase_encoding=word))
        for seed, word in ((1, "ROW"), (2, "COL"))
    ]
    batch, _ = SIMULATORS[name].apply(torch.stack([image, image]), each)
    for together, params in zip(batch, each, strict=True):
        alone, _ = SIMULATORS[name].apply(image, params)
        assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["motion", "ghosting", "susceptibility", "chemical_shift"])
def test_an_unknown_phase_encoding_is_refused(name: str) -> None:
    image = brain()
    params = SIMULATORS[name].draw(0.5, generator(), acquire(image, "MR", phase_encoding="OTHER"))
    with pytest.raises(ImagingError, match="phase encoding"):
        SIMULATORS[name].apply(image, params)


@pytest.mark.parametrize(("field_tesla", "bandwidth"), [(1.5, 65.0), (1.5, 130.0), (3.0, 150.0)])
@pytest.mark.parametrize("phase_encoding", ["ROW", "COL"])
def test_fat_moves_by_3_5_ppm_along_readout(
    field_tesla: float, bandwidth: float, phase_encoding: str
) -> None:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    fat = torch.exp(-((y - 60) ** 2 + (x - 60) ** 2) / 50)
    params = chemical_shift.ChemicalShift(
        severity=1.0,
        phase_encoding=phase_encoding,
        field_tesla=field_tesla,
        bandwidth_hz_per_px=bandwidth,
        direction=1,
    )
    shifted, _ = chemical_shift.apply(fat, params, fat=torch.ones_like(fat))
    correlation = torch.fft.ifft2(torch.fft.fft2(shifted) * torch.fft.fft2(fat).conj()).real
    axis = 0 if phase_encoding == "ROW" else 1  # readout is the other direction
    profile = torch.roll(correlation.amax(1 - axis), 64)
    peak = int(profile.argmax())
    before, here, after = profile[peak - 1 : peak + 2].tolist()
    measured = peak - 64 + 0.5 * (before - after) / (before - 2 * here + after)
    expected = 3.5e-6 * 42.577e6 * field_tesla / bandwidth
    assert measured == pytest.approx(expected, abs=0.05)
    assert float(correlation.amax(axis).argmax()) == 0  # nothing moves along phase encoding


def test_fat_is_found_under_the_skin_and_not_in_the_brain() -> None:
    image = brain()
    share = chemical_shift.fat_share(image[None])[0]
    y = torch.linspace(-1, 1, 128)
    level = torch.sqrt((y[:, None] / 0.85) ** 2 + (y[None, :] / 0.7) ** 2)
    assert float(share[(level > 0.94) & (level < 0.98)].mean()) > 0.9
    assert float(share[level < 0.85].max()) == 0


def enhancing(*, centre: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A brain with a tumour nearly as bright as fat, `centre` half-axes from the middle, and where it is."""
    y, x = torch.arange(128)[:, None] - 64.0, torch.arange(128)[None, :] - 64.0 - centre * 0.7 * 64
    tumour = torch.sqrt(y**2 + x**2) < 14
    inside = torch.sqrt((y / 54.4) ** 2 + (x + centre * 44.8) ** 2 / 44.8**2) < 0.98
    return torch.where(tumour & inside, torch.tensor(0.8), brain()), tumour & inside


@pytest.mark.parametrize("centre", [0.3, 0.55, 0.75])
def test_an_enhancing_tumour_is_not_taken_for_fat(centre: float) -> None:
    """In the brain, at the skull, and through the skull into the scalp."""
    image, tumour = enhancing(centre=centre)
    share, without = chemical_shift.fat_share(torch.stack([image, brain()]))
    assert float(share[tumour].sum()) == 0
    assert float(share.sum()) > 0.75 * float(without.sum())  # the fat beside it is still found


def test_displacement_conserves_intensity() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64)
    image[:, :, 20:44] = torch.rand(3, 64, 24)
    edges = 6 * torch.sin(torch.linspace(0, 9, 65)).expand(3, 64, 65) * torch.rand(3, 64, 1)
    moved = susceptibility.displace(image, edges)
    assert torch.allclose(moved.sum(-1), image.sum(-1), rtol=1e-4)
    assert float((moved - image).abs().max()) > 0.1
    assert torch.allclose(
        susceptibility.displace(image, torch.full((3, 64, 65), 2.0)), image.roll(2, -1), atol=1e-5
    )


def test_the_field_is_a_dipole_and_falls_with_the_cube_of_distance() -> None:
    params = susceptibility.Susceptibility(
        severity=1.0,
        phase_encoding="COL",
        spheres=(susceptibility.Sphere(y=32.0, x=32.0, depth_px=0.0, radius_px=2.0),),
        dchi_ppm=185.0,
        field_tesla=1.5,
        field_axis="row",
        echo_time_ms=0.0,
        bandwidth_hz_per_px=200.0,
        slice_px=3.0,
    )
    along = susceptibility.field_hz(params, torch.tensor([32.0, 32.0]), torch.tensor([36.0, 40.0]), 0.0)
    across = susceptibility.field_hz(params, torch.tensor([36.0]), torch.tensor([32.0]), 0.0)
    expected = kspace.GYROMAGNETIC_HZ_PER_T * 1.5 * 185e-6 / 3 * (2 / 4) ** 3 * 2
    assert float(along[0]) == pytest.approx(expected, rel=1e-4)
    assert float(along[0] / along[1]) == pytest.approx(8.0, rel=1e-3)
    assert float(across[0] / along[0]) == pytest.approx(-0.5, rel=1e-3)


def test_outside_the_disturbed_zone_a_spin_echo_keeps_its_signal() -> None:
    params = susceptibility.Susceptibility(
        severity=0.5,
        phase_encoding="COL",
        spheres=(susceptibility.Sphere(y=64.0, x=64.0, depth_px=0.0, radius_px=1.0),),
        dchi_ppm=185.0,
        field_tesla=1.5,
        field_axis="slice",
        echo_time_ms=0.0,
        bandwidth_hz_per_px=200.0,
        slice_px=3.0,
    )
    image = torch.ones(128, 128)
    changed, mask = susceptibility.apply(image, params)
    rows_away = torch.cat([changed[:50], changed[80:]])
    assert float(rows_away.sum()) == pytest.approx(rows_away.numel(), rel=1e-3)
    assert float(changed[64, 64]) < 0.3
    assert 0 < int(mask.sum()) < 600


def test_more_severe_motion_changes_more() -> None:
    image = brain()
    acquisition = acquire(image, "MR")

    def change(severity: float) -> float:
        moved = [
            motion.apply(image, motion.draw(severity, generator(seed), acquisition))[0] for seed in range(8)
        ]
        return sum(float((one - image).square().mean()) for one in moved)

    values = [change(severity) for severity in (0.0, 0.3, 0.6, 1.0)]
    assert values == sorted(values)
    assert values[1] > 100 * values[0]


@pytest.mark.parametrize("period", [4.0, 8.0])
@pytest.mark.parametrize("phase_encoding", ["ROW", "COL"])
def test_ghosts_lie_a_matrix_by_period_apart_along_phase_encoding(period: float, phase_encoding: str) -> None:
    image = torch.zeros(128, 128)
    image[62:66, 40:88] = 1.0
    if phase_encoding == "ROW":
        image = image.T
    params = ghosting.Ghosting(
        severity=1.0,
        phase_encoding=phase_encoding,
        amplitude_px=1.0,
        period_lines=period,
        phase=0.3,
        wander=0.0,
        part="all",
    )
    moved, _ = ghosting.apply(image, params)
    if phase_encoding == "ROW":
        moved = moved.T
    along_phase = moved[:, 50:78].mean(1)
    spacing = round(128 / period)
    found = along_phase.clone()
    found[64 - spacing // 2 : 64 + spacing // 2] = 0  # the object itself
    assert abs(abs(int(found.argmax()) - 63.5) - spacing) <= 2.5
    assert float(moved[:, :38].max()) < 0.02  # nothing leaves along readout


def test_what_does_not_move_stays_as_it_was() -> None:
    image = brain()
    params = ghosting.Ghosting(
        severity=1.0,
        phase_encoding="COL",
        amplitude_px=4.0,
        period_lines=6.0,
        phase=0.0,
        wander=0.3,
        part="vessel",
        place=(64.0, 80.0),
        reach_px=4.0,
    )
    changed, mask = ghosting.apply(image, params)
    difference = (changed - image).abs()
    assert float(difference[:, :72].max()) < 1e-4  # columns without the vessel
    assert float(difference[:, 78:83].max()) > 0.05
    assert not bool(mask[:, :72].any())


def test_the_second_kind_outlines_borders_and_leaves_pure_tissue() -> None:
    image = brain()
    acquisition = acquire(image, "MR")
    opposed = chemical_shift.draw_second_kind(1.0, generator(), acquisition)
    fat = chemical_shift.fat_share(image[None])[0]
    changed, mask = chemical_shift.apply(image, opposed)
    ratio = changed / image.clamp(min=1e-6)
    near = torch.nn.functional.avg_pool2d(fat[None, None], 3, stride=1, padding=1)[0, 0]
    assert float(ratio[(near == 0) & (image > 0.1)].min()) > 0.999
    assert float(ratio[(near > 0.4) & (near < 0.6)].max()) < 0.5
    rows = mask.nonzero()[:, 0]
    columns = mask.nonzero()[:, 1]
    sides = (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max()))
    assert [sides[0] < 20, sides[1] > 108, sides[2] < 30, sides[3] > 98] == [True] * 4


def test_fat_is_not_found_in_a_brain_whose_cortex_is_the_outline() -> None:
    y, x = torch.linspace(-1, 1, 128)[:, None], torch.linspace(-1, 1, 128)[None, :]
    level = torch.sqrt((y / 0.8) ** 2 + (x / 0.65) ** 2)
    image = (level < 1) * (0.6 + 0.2 * torch.sin(9 * y) * torch.cos(8 * x))  # fat-suppressed EPI
    assert float(chemical_shift.fat_share(image[None]).sum()) == 0


def test_in_epi_what_is_left_of_the_scalp_lies_along_phase_encoding() -> None:
    image = 0.0 * brain()
    image[64, 64] = 1.0
    for word, axis in (("COL", 0), ("ROW", 1)):
        acquisition = Acquisition(
            rows=128,
            columns=128,
            frame=acquire(brain(), "MR").frame,
            phase_encoding=word,
            sequence="EPI",
            field_tesla=3.0,
        )
        params = chemical_shift.draw(1.0, generator(2), acquisition)
        changed, _ = chemical_shift.apply(image + 1e-3 + brain(), params)
        difference = changed - brain() - image - 1e-3
        centre = (difference.sum(1 - axis) * torch.arange(128)).sum() / difference.sum()
        assert 7 * 0.5 <= abs(params.shift_px) <= 34 * 0.5
        assert (float(centre) - 63.5) * params.shift_px > 0


@pytest.mark.parametrize("sequence", ["SE", "EPI"])
@pytest.mark.parametrize("phase_encoding", ["ROW", "COL"])
def test_epi_is_distorted_along_phase_encoding_and_a_spin_echo_along_readout(
    sequence: str, phase_encoding: str
) -> None:
    image = torch.zeros(96, 96)
    image[40:56, 40:56] = 1.0
    params = susceptibility.Susceptibility(
        severity=1.0,
        phase_encoding=phase_encoding,
        sequence=sequence,
        spheres=(susceptibility.Sphere(y=48.0, x=48.0, depth_px=6.0, radius_px=2.0),),
        dchi_ppm=185.0,
        field_tesla=3.0,
        field_axis="slice",
        echo_time_ms=0.0,
        bandwidth_hz_per_px=20.0,
        slice_px=3.0,
    )
    changed, _ = susceptibility.apply(image, params)
    along_columns = (phase_encoding == "COL") == (sequence == "EPI")
    leak = changed[:38].sum() + changed[58:].sum(), changed[:, :38].sum() + changed[:, 58:].sum()
    assert float(leak[0 if along_columns else 1]) > 0.5
    assert float(leak[1 if along_columns else 0]) == 0


def test_a_gradient_echo_loses_signal_that_a_spin_echo_keeps() -> None:
    image = brain()
    spheres = (susceptibility.Sphere(y=64.0, x=64.0, depth_px=0.0, radius_px=1.5),)

    def total(echo_time_ms: float) -> float:
        params = susceptibility.Susceptibility(
            severity=1.0,
            phase_encoding="COL",
            spheres=spheres,
            dchi_ppm=185.0,
            field_tesla=1.5,
            field_axis="slice",
            echo_time_ms=echo_time_ms,
            bandwidth_hz_per_px=200.0,
            slice_px=5.0,
        )
        return float(susceptibility.apply(image, params)[0].sum())

    kept = [total(milliseconds) for milliseconds in (0.0, 5.0, 10.0, 20.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[1]


def test_noise_has_a_rayleigh_background() -> None:
    image = torch.zeros(128, 128)
    image[:64] = 1.0
    noisy, _ = rician_noise.apply(image, rician_noise.RicianNoise(severity=0.5, sigma=0.05, noise_seed=3))
    background = noisy[70:]
    assert float(background.mean()) == pytest.approx(0.05 * math.sqrt(math.pi / 2), rel=0.02)
    assert float(background.std()) == pytest.approx(0.05 * math.sqrt(2 - math.pi / 2), rel=0.03)


@pytest.mark.parametrize("name", SIMULATORS)
def test_a_row_of_a_manifest_replays_the_image(name: str) -> None:
    simulator = SIMULATORS[name]
    image = brain() if simulator.modality == "MR" else brain() * 1000 - 1000
    params = simulator.draw(0.7, generator(5), acquire(image, simulator.modality, pixel_spacing_mm=2.0))
    again = replay(name, json.loads(json.dumps(record(params))))
    assert again == params
    assert torch.equal(simulator.apply(image, again)[0], simulator.apply(image, params)[0])


@pytest.mark.parametrize("name", SIMULATORS)
def test_the_same_stream_at_another_severity_draws_the_same_scene(name: str) -> None:
    """What an artifact does rises with severity when nothing else is drawn anew."""
    simulator = SIMULATORS[name]
    image = brain() if simulator.modality == "MR" else brain() * 1200 - 1000
    acquisition = acquire(image, simulator.modality, pixel_spacing_mm=2.0)
    changes = []
    for severity in (0.0, 0.35, 0.7, 1.0):
        each = [
            simulator.apply(image, simulator.draw(severity, generator(seed), acquisition))[0]
            for seed in range(6)
        ]
        changes.append(sum(float((one - image).abs().mean()) for one in each))
    assert changes == sorted(changes)


def test_pixel_quantities_scale_with_the_matrix() -> None:
    small = acquire(brain(128, 128), "MR")
    large = acquire(brain(256, 256), "MR")
    assert isinstance(small, Acquisition)
    ratio = (
        chemical_shift.draw(0.5, generator(), large).shift_px
        / chemical_shift.draw(0.5, generator(), small).shift_px
    )
    assert math.isclose(ratio, 2.0, rel_tol=1e-6)


def test_two_kinds_of_chemical_shift_in_one_call_are_refused() -> None:
    image = brain()
    acquisition = acquire(image, "MR")
    each = [
        chemical_shift.draw(0.5, generator(), acquisition),
        chemical_shift.draw_second_kind(0.5, generator(), acquisition),
    ]
    with pytest.raises(ImagingError, match="one kind"):
        chemical_shift.apply(torch.stack([image, image]), each)
