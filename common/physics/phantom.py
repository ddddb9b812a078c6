"""Invented patients with known artifacts: anatomy, then physics, then the hospital's appearance.

Order of one slice: anatomy -> artifacts (severity zero for negatives, through the same code) -> kernel, bias,
noise for all alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from common.artifacts import DEFAULT_LABELS, Modality, can_occur
from common.errors import ConfigError
from common.physics import (
    SIMULATORS,
    anatomy,
    beam_hardening,
    chemical_shift,
    choose,
    ct,
    ct_motion,
    kspace,
    metal,
    susceptibility,
)
from common.physics.acquisition import Acquisition, frame_of, integer, uniform
from common.physics.appearance import PUBLIC_APPEARANCES, SITE_APPEARANCES, Appearance
from common.physics.threads import one_thread

__all__ = ["PUBLIC_APPEARANCES", "SITE_APPEARANCES", "Appearance", "PhantomSlice", "draw_patients"]

Params = TypeVar("Params")

SLICE_POSITIVE = 0.85
"""Chance that a slice of a positive patient shows the artifact; at least one always does."""
SERIES_POSITIVE = 0.5
"""Chance that one of several series of a positive patient shows it; at least one always does."""


@dataclass(frozen=True, kw_only=True)
class PhantomSlice:
    patient: int
    """0..patients - 1."""
    position: int
    """Slice position within the series."""
    modality: Modality
    image: np.ndarray
    """float32 (rows, columns): HU for CT, non-negative arbitrary units for MR."""
    pixel_spacing_mm: float
    phase_encoding: str | None
    """DICOM (0018,1312), "ROW" or "COL"; None for CT."""
    labels: dict[str, int]
    """Artifact -> 0 or 1, only those that can occur in this modality. Not `quality`: nobody has rated
    a phantom, and a rating is no function of what was simulated.
    """
    severities: dict[str, float]
    """Artifact -> 0..1, only where the label is 1."""
    series: int = 0
    """Number of the series within the patient."""


def draw_patients(
    appearance: Appearance, patients: int, seed: int, *, series: int = 1
) -> Iterator[list[PhantomSlice]]:
    """The 2-3 slices of each patient of one hospital, in one series or in several of the same anatomy.

    Deterministic in (appearance, seed) on one machine; patient i does not depend on `patients`. Patients are
    CT or MR by the hospital's share. Each artifact of the modality is drawn independently with the hospital's
    prevalence.
    Args:
        patients: how many.
        seed: any non-negative integer.
        series: of each patient, taken one after the other, with artifacts and noise of their own: an artifact
            may be in some and not in others.
    Raises:
        ConfigError: a prevalence is missing.
    """
    missing = [name for name in DEFAULT_LABELS if name not in appearance.prevalence]
    if missing:
        raise ConfigError(
            f"appearance {appearance.name!r} has no prevalence for {', '.join(missing)}",
            code="bad-appearance",
        )
    for patient in range(patients):
        of_series = (_draw_series(appearance, patient, seed, number, series) for number in range(series))
        yield [item for slices in of_series for item in slices]


@one_thread()
def draw_patient(appearance: Appearance, patient: int, seed: int) -> list[PhantomSlice]:
    """The slices of one patient; see `draw_patients`."""
    return _draw_series(appearance, patient, seed, 0, 1)


@one_thread()
def _draw_series(appearance: Appearance, patient: int, seed: int, number: int, of: int) -> list[PhantomSlice]:
    """The slices of series `number` of a patient who has `of`."""
    identity = [seed, patient, zlib.crc32(appearance.name.encode())]
    who, body, *_ = _generators(identity)
    _, _, look, physics, extra = _generators(identity + [number] * (number > 0))
    modality: Modality = "CT" if uniform(who, 0, 1) < appearance.ct_share else "MR"
    slices = integer(who, 2, 3)
    severities = _draw_severities(appearance, modality, slices, who)
    if modality == "CT":
        severities["ct_motion"] = _draw_ct_motion(appearance, slices, identity)
    for values in severities.values():
        always = integer(who, 0, of - 1)
        shown = [uniform(who, 0, 1) < SERIES_POSITIVE or one == always for one in range(of)]
        if not shown[number]:
            values[:] = [0.0] * slices
    if modality == "CT":
        (moved, *_) = _generators([*identity, number, _CT_MOTION])
        images, spacing = _ct_slices(appearance, severities, body, look, physics, extra, moved)
    else:
        images, spacing = _mr_slices(appearance, severities, body, look, physics, extra)
    return [
        PhantomSlice(
            patient=patient,
            position=position,
            modality=modality,
            image=images[position].numpy().copy(),
            pixel_spacing_mm=spacing,
            phase_encoding=appearance.phase_encoding if modality == "MR" else None,
            labels={name: int(values[position] > 0) for name, values in severities.items()},
            severities={
                name: values[position] for name, values in severities.items() if values[position] > 0
            },
            series=number,
        )
        for position in range(slices)
    ]


_CT_MOTION = zlib.crc32(b"ct_motion")
"""Movement in CT has random numbers of its own: it came later, and what was drawn before stays as it is."""


def _draw_ct_motion(appearance: Appearance, slices: int, identity: list[int]) -> list[float]:
    """Severity of patient movement in each slice of a CT; zero where absent, as in all of an appearance that
    has no prevalence of it. A nuisance of that name adds to it.
    """
    chance = appearance.prevalence.get("ct_motion", 0.0)
    (drawn, *_), (low, high) = _generators([*identity, _CT_MOTION]), appearance.severity_range
    return _severities_of(chance, slices, low, high, drawn) if chance > 0 else [0.0] * slices


def _generators(identity: list[int]) -> list[torch.Generator]:
    """Five streams of random numbers of whom `identity` names."""
    states = np.random.SeedSequence(identity).generate_state(5, np.uint64)
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def _draw_severities(
    appearance: Appearance, modality: str, slices: int, generator: torch.Generator
) -> dict[str, list[float]]:
    """Artifact -> severity of each slice; zero where absent. The same count of numbers is drawn whatever the
    outcome.
    """
    severities: dict[str, list[float]] = {}
    low, high = appearance.severity_range
    for name in DEFAULT_LABELS:
        if can_occur(name, modality):
            severities[name] = _severities_of(appearance.prevalence[name], slices, low, high, generator)
    return severities


def _severities_of(
    chance: float, slices: int, low: float, high: float, generator: torch.Generator
) -> list[float]:
    """Severity of one artifact in each slice of a patient."""
    present = uniform(generator, 0, 1) < chance
    strength = uniform(generator, low, high)
    always = integer(generator, 0, slices - 1)
    values = []
    for position in range(slices):
        shown = uniform(generator, 0, 1) < SLICE_POSITIVE or position == always
        value = min(max(strength + uniform(generator, -0.06, 0.06), low), high)
        values.append(value if present and shown else 0.0)
    return values


def _same_draw(
    draw: Callable[[float, torch.Generator, Acquisition], Params],
    severities: list[float],
    generator: torch.Generator,
    acquisition: Acquisition,
) -> list[Params]:
    """Parameters of each slice from one stream of random numbers: the implant of a patient stays in its
    place.
    """
    seed = integer(generator, 0, 2**31 - 1)
    return [draw(severity, torch.Generator().manual_seed(seed), acquisition) for severity in severities]


def _oriented(images: list[Tensor], appearance: Appearance, generator: torch.Generator) -> list[Tensor]:
    """The slices mirrored, upside down or on their side, as files of other planes and positions are."""
    upside_down, mirrored, on_side = (uniform(generator, 0, 1) < chance for chance in appearance.oriented)
    axes = [axis for axis, turned in ((-2, upside_down), (-1, mirrored)) if turned]
    turned_images = [image.flip(axes) for image in images] if axes else images
    return [image.transpose(-2, -1) for image in turned_images] if on_side else turned_images


def _with_nuisances(
    image: Tensor,
    modality: Modality,
    appearance: Appearance,
    generator: torch.Generator,
    acquisition: Acquisition,
    severities: dict[str, list[float]],
) -> Tensor:
    """The slices with what `appearance.nuisances` adds; the same in all slices of a patient. One that the
    vocabulary names is noted in `severities`.
    """
    for name, chance in appearance.nuisances.items():
        simulator = SIMULATORS[name]
        if simulator.modality == modality and uniform(generator, 0, 1) < chance:
            severity = uniform(generator, 0.1, 0.7)
            image, _ = simulator.apply(
                image, _same_draw(simulator.draw, [severity] * len(image), generator, acquisition)
            )
            if name in severities:
                severities[name] = [max(severity, one) for one in severities[name]]
    return image


def _choice(words: tuple[str, ...], generator: torch.Generator) -> str:
    return words[integer(generator, 0, len(words) - 1)]


def _ct_slices(
    appearance: Appearance,
    severities: dict[str, list[float]],
    body: torch.Generator,
    look: torch.Generator,
    physics: torch.Generator,
    extra: torch.Generator,
    moved: torch.Generator,
) -> tuple[Tensor, float]:
    """HU (slices, matrix, matrix) and pixel spacing in mm."""
    slices, size = len(severities["metal"]), appearance.matrix
    kind = _choice(appearance.ct_bodies, body)
    zoom = uniform(body, *appearance.ct_zoom)
    scene = anatomy.Scene(size, slices, body, zoom)
    clean = anatomy.CT_BODIES[kind](scene, scene.chance(appearance.enhanced))
    if appearance.detail_hu[1] > 0:
        clean = clean + uniform(body, *appearance.detail_hu) * scene.detail().clamp(-3, 3) * (clean > -300)
    clean = anatomy.add_dense_spots(scene, clean, integer(body, 0, appearance.dense_spots))
    (clean,) = _oriented([clean], appearance, extra)
    frame = frame_of(clean[0], "CT")
    if appearance.table:
        clean = anatomy.add_table(scene, clean)
    spacing = anatomy.FIELD_OF_VIEW_MM[kind] / size

    acquisition = Acquisition(rows=size, columns=size, frame=frame, pixel_spacing_mm=spacing)
    implants = _same_draw(metal.draw, severities["metal"], physics, acquisition)
    implants = [replace(one, noise_seed=integer(physics, 0, 2**31 - 1)) for one in implants]
    hardening = _same_draw(beam_hardening.draw, severities["beam_hardening"], physics, acquisition)
    paths = ct.project(clean, spacing / 10)
    errors = torch.cat(
        [metal.sinogram_error(paths, implants), beam_hardening.sinogram_error(paths, hardening)]
    )
    streaks, bands = ct.reconstruct(errors, paths).chunk(2)
    image = clean + metal.scale(streaks, clean, implants) + beam_hardening.scale(bands, clean, hardening)
    image = metal.paint(image, implants)
    if any(movement := severities["ct_motion"]):
        image, _ = ct_motion.apply(image, [ct_motion.draw(one, moved, acquisition) for one in movement])
    image = _with_nuisances(image, "CT", appearance, extra, acquisition, severities)
    return _scan_ct(appearance, image, clean, look), spacing


def _scan_ct(appearance: Appearance, image: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Kernel, shading and noise of a CT scanner.

    Noise has the spectrum of filtered back-projection, |k| times the kernel, and is stronger deep inside the
    body.
    """
    slices, size, _ = image.shape
    kernel = uniform(generator, *appearance.kernel)
    noise_hu = uniform(generator, *appearance.ct_noise_hu)
    shading = uniform(generator, *appearance.shading_hu)
    radius = _radius(size)
    response = (
        torch.exp(2.2 * kernel * radius)
        if kernel < 0
        else 1 + 1.6 * kernel * radius * torch.exp(-((radius - 0.5) ** 2) / 0.1)
    )
    ramp = radius * torch.exp(-2.5 * radius**2) * response
    ramp = ramp / ramp.square().mean().sqrt()
    white = torch.randn(slices, size, size, generator=generator)
    grain, shade_y, shade_x = (
        torch.fft.ifft2(torch.fft.fft2(white) * ramp).real,
        *torch.randn(2, generator=generator),
    )
    inside = (clean > -500).float()
    axis = torch.linspace(-1, 1, size)
    bowl = 1 - 0.6 * (axis[:, None] ** 2 + axis[None, :] ** 2)
    slope = shade_y * axis[:, None] + shade_x * axis[None, :]
    filtered = torch.fft.ifft2(torch.fft.fft2(image) * response).real
    out = (
        filtered
        + noise_hu * grain * bowl.clamp(min=0.35)
        + shading * inside * (0.6 * slope - 0.8 * (bowl - 0.6))
    )
    return out.clamp(*ct.HU_RANGE)


def _radius(size: int) -> Tensor:
    """Distance from the k-space centre in FFT order: 1 at the edge of an axis."""
    frequency = torch.fft.fftfreq(size) * 2
    return torch.sqrt(frequency[:, None] ** 2 + frequency[None, :] ** 2)


def _mr_slices(
    appearance: Appearance,
    severities: dict[str, list[float]],
    body: torch.Generator,
    look: torch.Generator,
    physics: torch.Generator,
    extra: torch.Generator,
) -> tuple[Tensor, float]:
    """Magnitude (slices, matrix, matrix) and pixel spacing in mm."""
    slices, size = len(severities["motion"]), appearance.matrix
    kind = _choice(appearance.mr_bodies, body)
    scene = anatomy.Scene(size, slices, body, uniform(body, *appearance.mr_zoom))
    contrast = _choice(appearance.mr_contrasts, body)
    made = anatomy.MR_BODIES[kind](scene, contrast)
    if appearance.detail[1] > 0:
        made = replace(
            made,
            signal=made.signal * torch.exp(uniform(body, *appearance.detail) * scene.detail().clamp(-3, 3)),
        )
    outline = uniform(body, *appearance.outline)
    signal, fat_signal = _soften(made.signal), _soften(made.signal * made.fat)
    fat = fat_signal / signal.clamp(min=1e-3)
    clean, fat = _oriented([signal * (1 - outline * (1 - (1 - 2 * fat).abs())), fat], appearance, extra)
    spacing = anatomy.FIELD_OF_VIEW_MM[kind] / size

    acquisition = Acquisition(
        rows=size,
        columns=size,
        frame=frame_of(clean[0], "MR"),
        pixel_spacing_mm=spacing,
        phase_encoding=appearance.phase_encoding,
        sequence="EPI" if contrast in anatomy.FAT_SUPPRESSED else _choice(appearance.sequences, physics),
        spin_echo=contrast == "DWI",
        field_tesla=appearance.field_tesla,
        echo_time_ms=appearance.echo_time_ms,
        bandwidth_hz_per_px=appearance.bandwidth_hz_per_px,
    )
    shifts = _same_draw(chemical_shift.draw, severities["chemical_shift"], physics, acquisition)
    fields = _same_draw(susceptibility.draw, severities["susceptibility"], physics, acquisition)
    mover = SIMULATORS[choose("motion", physics)]
    moves = [mover.draw(severity, physics, acquisition) for severity in severities["motion"]]
    image, _ = chemical_shift.apply(clean, shifts, fat=fat)
    image, _ = susceptibility.apply(image, fields)
    image, _ = mover.apply(image, moves)
    image = _with_nuisances(image, "MR", appearance, extra, acquisition, severities)
    return _scan_mr(appearance, image, clean, look), spacing


def _soften(images: Tensor) -> Tensor:
    """The slices with edges a scanner could resolve: what is left at the highest frequency is a fifth, so
    sub-pixel shifts do not ring.
    """
    for axis in (-1, -2):
        images = 0.6 * images + 0.2 * (images.roll(1, axis) + images.roll(-1, axis))
    return images


def _scan_mr(appearance: Appearance, image: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma, coil sensitivity, k-space filter and Rician noise of an MR scanner, scaled to its stored units.

    Intensities are relative to the 99th percentile of `clean`, so that bright pile-up does not dim the rest.
    """
    slices, size, _ = image.shape
    flat = clean.reshape(slices, -1)
    top = flat.kthvalue(int(0.99 * flat.shape[1]), dim=-1).values[:, None, None]
    signal = (image / top).clamp(min=0) ** uniform(generator, *appearance.gamma)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    terms = torch.stack([y, x, x * y, x * x - 0.33, y * y - 0.33])
    log_bias = torch.einsum("t,tyx->yx", torch.randn(5, generator=generator), terms)
    log_bias = log_bias * (uniform(generator, *appearance.bias) / log_bias.std())
    noise = uniform(generator, *appearance.noise_percent) / 100
    noisy = torch.complex(
        signal * torch.exp(log_bias) + noise * torch.randn(slices, size, size, generator=generator),
        noise * torch.randn(slices, size, size, generator=generator),
    )
    frequency = kspace.frequencies(size).abs() * 2
    damping = torch.exp(-uniform(generator, *appearance.rolloff) * frequency**2)
    keep = uniform(generator, *appearance.truncation)
    window = damping * ((keep - frequency) * size / 4 + 1).clamp(0, 1)
    filtered = kspace.to_image(kspace.to_kspace(noisy) * (window[:, None] * window[None, :]))
    return filtered.abs() * appearance.mr_scale
