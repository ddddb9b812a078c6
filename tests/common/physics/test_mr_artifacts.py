"""Claims about motion, susceptibility and chemical shift."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import ImagingError
from common.physics import SIMULATORS, chemical_shift, kspace, motion, susceptibility
from common.physics.acquisition import Acquisition, acquire


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


@pytest.mark.parametrize("name", ["motion", "susceptibility", "chemical_shift"])
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


@pytest.mark.parametrize("name", ["motion", "susceptibility", "chemical_shift"])
def test_an_artifact_of_severity_0_4_is_visible_and_finite(name: str) -> None:
    image = brain()
    for seed in range(5):
        params = SIMULATORS[name].draw(0.4, generator(seed), acquire(image, "MR"))
        changed, mask = SIMULATORS[name].apply(image, params)
        assert bool(torch.isfinite(changed).all())
        assert float(changed.min()) >= 0
        assert int(mask.sum()) >= 12


@pytest.mark.parametrize("name", ["motion", "susceptibility", "chemical_shift"])
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


@pytest.mark.parametrize("name", ["motion", "susceptibility", "chemical_shift"])
def test_a_batch_equals_its_slices_even_with_mixed_directions(name: str) -> None:
    image = brain()
    each = [
        SIMULATORS[name].draw(0.8, generator(seed), acquire(image, "MR", phase_encoding=word)) for seed, word in ((1, "ROW"), (2, "COL"))
    ]
    batch, _ = SIMULATORS[name].apply(torch.stack([image, image]), each)
    for together, params in zip(batch, each, strict=True):
        alone, _ = SIMULATORS[name].apply(image, params)
        assert torch.allclose(together, alone, atol=1e-5)


def test_an_unknown_phase_encoding_is_refused() -> None:
    image = brain()
    params = SIMULATORS["motion"].draw(0.5, generator(), acquire(image, "MR", phase_encoding="OTHER"))
    with pytest.raises(ImagingError, match="phase encoding"):
        motion.apply(image, params)


@pytest.mark.parametrize(("field_tesla", "bandwidth"), [(1.5, 65.0), (1.5, 130.0), (3.0, 150.0)])
@pytest.mark.parametrize("phase_encoding", ["ROW", "COL"])
def test_fat_moves_by_3_5_ppm_along_readout(field_tesla: float, bandwidth: float, phase_encoding: str) -> None:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    fat = torch.exp(-((y - 60) ** 2 + (x - 60) ** 2) / 50)
    params = chemical_shift.ChemicalShift(
        severity=1.0, phase_encoding=phase_encoding, field_tesla=field_tesla, bandwidth_hz_per_px=bandwidth, direction=1
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


def test_displacement_conserves_intensity() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64)
    image[:, :, 20:44] = torch.rand(3, 64, 24)
    edges = 6 * torch.sin(torch.linspace(0, 9, 65)).expand(3, 64, 65) * torch.rand(3, 64, 1)
    moved = susceptibility.displace(image, edges)
    assert torch.allclose(moved.sum(-1), image.sum(-1), rtol=1e-4)
    assert float((moved - image).abs().max()) > 0.1
    assert torch.allclose(susceptibility.displace(image, torch.full((3, 64, 65), 2.0)), image.roll(2, -1), atol=1e-5)


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
        moved = [motion.apply(image, motion.draw(severity, generator(seed), acquisition))[0] for seed in range(8)]
        return sum(float((one - image).square().mean()) for one in moved)

    values = [change(severity) for severity in (0.0, 0.3, 0.6, 1.0)]
    assert values == sorted(values)
    assert values[1] > 100 * values[0]


def test_breathing_ghosts_lie_a_matrix_by_period_apart_along_phase_encoding() -> None:
    image = torch.zeros(128, 128)
    image[60:68, 40:88] = 1.0
    params = motion.Motion(
        severity=1.0,
        phase_encoding="COL",
        boundaries=(63,),
        angles_deg=(0.0, 0.0),
        phase_shifts_px=(0.0, 0.0),
        readout_shifts_px=(0.0, 0.0),
        breath_px=3.0,
        breath_period_lines=4.0,
        breath_phase=0.0,
    )
    moved, _ = motion.apply(image, params)
    along_phase = moved[:, 50:78].mean(1)
    assert float(along_phase[28:36].max()) > 3 * float(along_phase[8:16].max())  # 64 - 128 / 4 = 32
    assert float(moved[:, :38].max()) < 0.02  # nothing leaves along readout


def test_moved_energy_is_a_share_and_grows_towards_the_centre_of_kspace() -> None:
    image = brain()

    def energy(first_moved_line: int) -> float:
        return motion.moved_energy(
            image,
            motion.Motion(
                severity=0.5,
                phase_encoding="COL",
                boundaries=(first_moved_line,),
                angles_deg=(0.0, 3.0),
                phase_shifts_px=(0.0, 2.0),
                readout_shifts_px=(0.0, 0.0),
                breath_px=0.0,
                breath_period_lines=8.0,
                breath_phase=0.0,
            ),
        )

    shares = [energy(line) for line in (120, 90, 66)]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[2] < 1


def test_pixel_quantities_scale_with_the_matrix() -> None:
    small = acquire(brain(128, 128), "MR")
    large = acquire(brain(256, 256), "MR")
    assert isinstance(small, Acquisition)
    ratio = chemical_shift.draw(0.5, generator(), large).shift_px / chemical_shift.draw(0.5, generator(), small).shift_px
    assert math.isclose(ratio, 2.0, rel_tol=1e-6)
