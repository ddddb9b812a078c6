"""Metal artifacts: beam hardening, photon starvation and noise of the rays through an implant.

Forward model: ellipses of titanium, steel or cobalt-chrome with exact chord lengths; twelve energies; Poisson
and electronic noise on the rays that cross metal (noise of all other rays is the scanner's appearance, not an
artifact); water-only correction; FBP of the difference to the monochromatic sinogram; the metal itself is
drawn with the scanner's blur and clipped at the top of the CT number range, so that it blooms: the denser,
the wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import Acquisition, as_batch, integer, uniform

PAINT_HU = 3071.0
MAX_GAIN = 6.0
HEAD_WIDTH_MM = 220.0
"""A narrower body is a head (or a limb): it gets fillings and clips, not hips."""


@dataclass(frozen=True, kw_only=True)
class Rod:
    """The cross-section of an implant: centre and semi-axes in pixels, angle of the first axis in radians."""

    y: float
    x: float
    semi_major_px: float
    semi_minor_px: float
    angle_rad: float


@dataclass(frozen=True, kw_only=True)
class Metal:
    severity: float
    kind: str
    """One of `KINDS`."""
    rods: tuple[Rod, ...]
    material: str
    photons: float
    """Unattenuated quanta per ray."""
    least_depth_hu: float
    """Streaks are amplified (at most `MAX_GAIN` times) until the darkest 3 % of soft tissue lie so far below
    the rest; 0: pure physics.
    """
    pixel_spacing_mm: float
    noise_seed: int


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Metal:
    """A kind of implant that suits the width of the body, its material, places and sizes; 2.5e6 down to 3e5
    quanta a ray.

    Sizes grow with severity by the ranges of each kind; kind, material and places do not depend on it.
    """
    head = 2 * acquisition.frame.half_width * acquisition.pixel_spacing_mm < HEAD_WIDTH_MM
    kind = _pick(
        ("fillings", "fillings", "clips", "rods") if head else ("rods", "rods", "screws", "hip", "clips"),
        generator,
    )
    materials, place = KINDS[kind]
    material = _pick(materials, generator)
    scale = max(acquisition.rows, acquisition.columns) / 128
    return Metal(
        severity=severity,
        kind=kind,
        rods=place(severity, scale, material, generator, acquisition),
        material=material,
        photons=10 ** (6.4 - 0.9 * severity),
        least_depth_hu=160.0 * severity,
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
        noise_seed=integer(generator, 0, 2**31 - 1),
    )


Place = Callable[[float, float, str, torch.Generator, Acquisition], tuple[Rod, ...]]


def _radius_px(severity: float, low: float, high: float, scale: float) -> float:
    """From `low` to `high` pixels of matrix 128; nothing at severity zero."""
    return (low + (high - low) * severity) * scale if severity > 0 else 0.0


def _pick(words: Sequence[str], generator: torch.Generator) -> str:
    return words[integer(generator, 0, len(words) - 1)]


def _rods(
    severity: float, scale: float, material: str, generator: torch.Generator, acquisition: Acquisition
) -> tuple[Rod, ...]:
    """A pair facing each other, most often left and right: radius 0.8-2.6 px, 0.7 of that where the metal is
    denser.
    """
    radius = _radius_px(severity, 0.8, 2.6, scale) * (1.0 if material == "titanium" else 0.7)
    base = (
        uniform(generator, -0.35, 0.35)
        if uniform(generator, 0, 1) < 0.7
        else uniform(generator, 0, 2 * math.pi)
    )
    distance = uniform(generator, 0.25, 0.6)
    rods = []
    for side in (0, math.pi):
        y, x = acquisition.frame.at(
            distance + uniform(generator, -0.05, 0.05), base + side + uniform(generator, -0.15, 0.15)
        )
        size = radius * uniform(generator, 0.9, 1.15)
        stretch, angle = uniform(generator, 1.0, 1.3), uniform(generator, 0, math.pi)
        rods.append(Rod(y=y, x=x, semi_major_px=size * stretch, semi_minor_px=size, angle_rad=angle))
    return tuple(rods)


def _screws(
    severity: float, scale: float, material: str, generator: torch.Generator, acquisition: Acquisition
) -> tuple[Rod, ...]:
    """An elongated pair that converges towards the front, as in a vertebra: half as thick as rods, 4-7 times
    as long as thick.
    """
    thickness = _radius_px(severity, 0.4, 1.2, scale) * (1.0 if material == "titanium" else 0.7)
    distance, turn = uniform(generator, 0.14, 0.28), uniform(generator, 0.2, 0.6)
    tilt, stretch = uniform(generator, 0.3, 0.7), uniform(generator, 4, 7)
    rods = []
    for side in (-1, 1):
        y, x = acquisition.frame.at(distance, math.pi / 2 - side * (math.pi / 2 - turn))
        size = thickness * uniform(generator, 0.9, 1.1)
        angle = math.pi / 2 - side * (tilt + uniform(generator, -0.1, 0.1))
        rods.append(Rod(y=y, x=x, semi_major_px=size * stretch, semi_minor_px=size, angle_rad=angle))
    return tuple(rods)


def _clips(
    severity: float, scale: float, material: str, generator: torch.Generator, acquisition: Acquisition
) -> tuple[Rod, ...]:
    """Two to six tiny ones around a place, 3-12 px from it: radius 0.3-0.9 px."""
    radius = _radius_px(severity, 0.3, 0.9, scale) * (1.0 if material == "titanium" else 0.75)
    middle_y, middle_x = acquisition.frame.at(
        uniform(generator, 0.1, 0.6), uniform(generator, 0, 2 * math.pi)
    )
    rods = []
    count, base = integer(generator, 2, 6), uniform(generator, 0, 2 * math.pi)
    for number in range(count):
        away, turn = (
            uniform(generator, 3, 12) * scale,
            base + (number + uniform(generator, -0.3, 0.3)) * 2 * math.pi / count,
        )
        y, x = middle_y + away * math.sin(turn), middle_x + away * math.cos(turn)
        size = radius * uniform(generator, 0.8, 1.2)
        stretch, angle = uniform(generator, 1.2, 2.5), uniform(generator, 0, math.pi)
        rods.append(Rod(y=y, x=x, semi_major_px=size * stretch, semi_minor_px=size, angle_rad=angle))
    return tuple(rods)


def _fillings(
    severity: float, scale: float, material: str, generator: torch.Generator, acquisition: Acquisition
) -> tuple[Rod, ...]:
    """Two to five small dense ones on an arc that opens backwards, in the front (top) of the body: radius
    0.5-1.5 px.
    """
    radius = _radius_px(severity, 0.5, 1.5, scale)
    count, distance = integer(generator, 2, 5), uniform(generator, 0.5, 0.72)
    reach = uniform(generator, 0.5, 1.0)
    rods = []
    for number in range(count):
        turn = reach * (2 * number / (count - 1) - 1) + uniform(generator, -0.12, 0.12)
        y, x = acquisition.frame.at(distance * (1 - 0.1 * abs(turn)), -math.pi / 2 + turn)
        size = radius * uniform(generator, 0.75, 1.2)
        stretch = uniform(generator, 1.0, 1.5)
        rods.append(Rod(y=y, x=x, semi_major_px=size * stretch, semi_minor_px=size, angle_rad=turn))
    return tuple(rods)


def _hip(
    severity: float, scale: float, material: str, generator: torch.Generator, acquisition: Acquisition
) -> tuple[Rod, ...]:
    """One large one to the left or right: radius 1.8-6 px, 0.75 of that where the metal is denser."""
    radius = _radius_px(severity, 1.8, 6.0, scale) * (1.0 if material == "titanium" else 0.75)
    side = math.pi if uniform(generator, 0, 1) < 0.5 else 0.0
    y, x = acquisition.frame.at(uniform(generator, 0.45, 0.65), side + uniform(generator, -0.25, 0.25))
    stretch, angle = uniform(generator, 1.0, 1.25), uniform(generator, 0, math.pi)
    return (Rod(y=y, x=x, semi_major_px=radius * stretch, semi_minor_px=radius, angle_rad=angle),)


KINDS: dict[str, tuple[tuple[str, ...], Place]] = {
    "rods": (ct.METALS, _rods),
    "screws": (("titanium", "steel"), _screws),
    "clips": (("titanium", "steel"), _clips),
    "fillings": (("steel", "cobalt_chrome"), _fillings),
    "hip": (("cobalt_chrome", "titanium"), _hip),
}
"""Kind -> its materials and the function that places it."""


def apply(image: Tensor, params: Metal | Sequence[Metal]) -> tuple[Tensor, Tensor]:
    """Implant metal into slices.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """
    images, single = as_batch(image.float())
    each = [params] * images.shape[0] if isinstance(params, Metal) else list(params)
    size = max(images.shape[-2:])

    def difference_of(square: Tensor, pixel_cm: float) -> Tensor:
        paths = ct.project(square, pixel_cm)
        streaks = ct.reconstruct(sinogram_error(paths, each, size / square.shape[-1], _corner(images)), paths)
        return scale(streaks, square, each)

    streaks = ct.through_square(images, each[0].pixel_spacing_mm, difference_of)
    return ct.finish(images, paint(images + streaks, each), each, single=single)


def _corner(images: Tensor) -> tuple[int, int]:
    """Rows and columns of air that `ct.through_square` puts before the image."""
    rows, columns = images.shape[-2:]
    return (max(rows, columns) - rows) // 2, (max(rows, columns) - columns) // 2


def sinogram_error(
    paths: ct.Paths, params: Sequence[Metal], shrink: float = 1.0, corner: tuple[int, int] = (0, 0)
) -> Tensor:
    """What metal adds to the water-equivalent sinogram beyond its own best monochromatic projection, cm.

    The part proportional to the metal path reconstructs to the implant itself, which is painted, so the
    least-squares proportional part is taken off; the rest is what streaks.

    Args:
        paths: line integrals of the slices without metal.
        shrink: image pixels per projected pixel.
        corner: rows and columns of padding before the image.
    """
    length = _chords(paths.scanner, [one.rods for one in params], shrink, corner) * paths.pixel_cm
    noise = ct.normals([one.noise_seed for one in params], paths)
    photons = ct.column([one.photons for one in params], length).expand_as(length)
    added = torch.zeros_like(length)
    for material in sorted({one.material for one in params}):
        rays = (length > 0) & (ct.column([one.material == material for one in params], length) > 0)
        water, bone, metal = paths.water[rays], paths.bone[rays], length[rays]
        measured = ct.counted(ct.transmission(water, bone, metal, material), photons[rays], noise[rays])
        added[rays] = measured - ct.water_equivalent(ct.transmission(water, bone))
    share = (added * length).sum((-2, -1), keepdim=True) / length.square().sum((-2, -1), keepdim=True).clamp(
        min=1e-9
    )
    return added - share * length


def scale(difference: Tensor, images: Tensor, params: Sequence[Metal]) -> Tensor:
    """Amplify streaks that would be lost in a thin or airy slice to each slice's `least_depth_hu`."""
    scaled = []
    for change, tissue, one in zip(difference, ct.soft_tissue(images), params, strict=True):
        values = change[tissue]
        if values.numel() >= 50 and one.least_depth_hu > 0:
            change = change * (one.least_depth_hu / ct.depth_below_mean(values).clamp(min=1e-3)).clamp(
                1, MAX_GAIN
            )
        scaled.append(change)
    return torch.stack(scaled)


def _chords(
    scanner: ct.Projector,
    implants: Sequence[Sequence[Rod]],
    shrink: float = 1.0,
    corner: tuple[int, int] = (0, 0),
) -> Tensor:
    """Length of each ray inside each slice's ellipses, in projected pixels, averaged over the detector's
    width; (slices, views, detectors).

    Only the detectors in an ellipse's shadow are computed.
    """
    device = scanner.cosines.device
    total = torch.zeros(len(implants) * scanner.views * scanner.size).to(device)
    rods = [
        (number, rod) for number, several in enumerate(implants) for rod in several if rod.semi_minor_px > 0
    ]
    if not rods:
        return total.reshape(len(implants), scanner.views, scanner.size)
    centre = (scanner.size - 1) / 2
    values = [
        (
            (rod.y + corner[0] + 0.5) / shrink - 0.5 - centre,
            (rod.x + corner[1] + 0.5) / shrink - 0.5 - centre,
            rod.semi_major_px / shrink,
            rod.semi_minor_px / shrink,
            rod.angle_rad,
        )
        for _, rod in rods
    ]
    y, x, major, minor, angle = torch.tensor(values, dtype=torch.float32).to(device).T[:, :, None]
    along = scanner.cosines * torch.cos(angle) + scanner.sines * torch.sin(angle)
    radius = torch.sqrt((major * along) ** 2 + minor**2 * (1 - along**2))[..., None]
    middle = (x * scanner.cosines + y * scanner.sines + centre)[..., None]
    reach = math.ceil(max(value[2] for value in values)) + 1
    detector = middle.round() + torch.arange(-reach, reach + 1, dtype=torch.float32).to(device)
    chord = torch.zeros_like(detector)
    for part in (-0.333, 0.0, 0.333):
        chord += torch.sqrt((radius**2 - (detector - middle + part) ** 2).clamp(min=0))
    chord *= (2 / 3) * (major * minor)[..., None] / radius**2
    chord *= (detector >= 0) & (detector < scanner.size)
    first = torch.tensor([number * scanner.views for number, _ in rods]).to(device)[:, None, None]
    view = torch.arange(scanner.views).to(device)[:, None]
    ray = (first + view) * scanner.size + detector.long().clamp(0, scanner.size - 1)
    total.index_add_(0, ray.reshape(-1), chord.reshape(-1))
    return total.reshape(len(implants), scanner.views, scanner.size)


def paint(images: Tensor, params: Sequence[Metal]) -> Tensor:
    """The slices with their metal drawn in: blurred by 0.45 pixels of matrix 128, added, and clipped at
    `PAINT_HU`.
    """
    rows, columns = images.shape[-2:]
    y = torch.arange(rows, dtype=torch.float32).to(images.device)[:, None]
    x = torch.arange(columns, dtype=torch.float32).to(images.device)[None, :]
    blur = 0.45 * max(rows, columns) / 128
    painted = []
    for image, one in zip(images, params, strict=True):
        hu = 1000 * ct.mean_attenuation(one.material) / ct.mean_attenuation("water")
        for rod in one.rods:
            if rod.semi_minor_px <= 0:
                continue
            u = (x - rod.x) * math.cos(rod.angle_rad) + (y - rod.y) * math.sin(rod.angle_rad)
            v = (y - rod.y) * math.cos(rod.angle_rad) - (x - rod.x) * math.sin(rod.angle_rad)
            level = torch.sqrt((u / rod.semi_major_px) ** 2 + (v / rod.semi_minor_px) ** 2).clamp(min=1e-6)
            # distance to the rim along the line to the centre
            outside = torch.sqrt(u * u + v * v) * (1 - 1 / level)
            cover = torch.sigmoid(-1.702 * outside / blur) * min(1.0, rod.semi_minor_px / blur)
            cover = torch.where(outside < 4 * blur, cover, 0.0)
            image = torch.where(cover > 0, (image + hu * cover).clamp(max=PAINT_HU), image)
        painted.append(image)
    return torch.stack(painted)
