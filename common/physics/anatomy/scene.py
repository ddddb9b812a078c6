"""The warped grid that the slices of one invented patient are drawn on, and what to draw with: ellipses,
stars, segments, textures.

Edges are anti-aliased. Coordinates: y down and x right, -1..1 across the field of view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from common.physics.acquisition import uniform

SLICE_STEP = 0.35
"""How far textures turn from one slice to the next, radians: neighbours correlate with cos(0.35) = 0.94."""


@lru_cache(maxsize=32)
def _spline(size: int, cells: int) -> Tensor:
    """Cubic B-spline interpolation from `cells` + 3 coarse points to `size` pixels, (size, cells + 3), rows
    scaled to unit variance.
    """
    place = (torch.arange(size, dtype=torch.float32) + 0.5) * cells / size
    distance = (place[:, None] - torch.arange(-1, cells + 2, dtype=torch.float32)[None, :]).abs()
    inner = (4 - 6 * distance**2 + 3 * distance**3) / 6
    outer = (2 - distance).clamp(min=0) ** 3 / 6
    weights = torch.where(distance < 1, inner, outer)
    return weights / weights.square().sum(1, keepdim=True).sqrt()


class Scene:
    """The grid of one patient's slices, warped, and the generator that draws from it."""

    def __init__(self, size: int, slices: int, generator: torch.Generator, zoom: float) -> None:
        self.size, self.slices, self.generator = size, slices, generator
        self.place = torch.arange(slices, dtype=torch.float32)[:, None, None]
        axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
        angle = uniform(generator, -0.16, 0.16)
        flat_y = axis[:, None] - uniform(generator, -0.05, 0.05)
        flat_x = axis[None, :] - uniform(generator, -0.05, 0.05)
        y = (flat_y * math.cos(angle) + flat_x * math.sin(angle)) / zoom
        x = (flat_x * math.cos(angle) - flat_y * math.sin(angle)) / zoom
        self.stiff = y.expand(slices, -1, -1), x.expand(slices, -1, -1)
        self.y = y + 0.02 * self.texture(4)
        self.x = x + 0.02 * self.texture(4)
        self.pixels_per_unit = zoom * size / 2

    def shrink(self, factor: float) -> None:
        """Make everything drawn from now on smaller."""
        self.y, self.x = self.y / factor, self.x / factor
        self.pixels_per_unit *= factor

    def stiffen(self) -> None:
        """Draw on the grid without its warp from now on: for a made object; undoes `shrink` and `mirror`, so
        call it first.
        """
        self.y, self.x = self.stiff

    def mirror(self) -> None:
        """Swap left and right of everything drawn from now on."""
        self.x = -self.x

    def number(self, low: float, high: float, drift: float = 0.06) -> Tensor:
        """One value a slice, (slices, 1, 1): uniform for the patient, drifting by a share of its range from
        slice to slice.
        """
        start, slope = torch.rand(2, generator=self.generator).tolist()
        return low + (high - low) * (start + drift * (slope - 0.5) * 2 * self.place)

    def chance(self, probability: float) -> bool:
        return uniform(self.generator, 0, 1) < probability

    def texture(self, cells: int) -> Tensor:
        """Band-limited noise of unit variance, about `cells` blobs across, (slices, size, size); neighbours
        are alike.
        """
        spline = _spline(self.size, cells)
        here, there = torch.randn(2, cells + 3, cells + 3, generator=self.generator)
        turn = SLICE_STEP * self.place
        return spline @ (torch.cos(turn) * here + torch.sin(turn) * there) @ spline.T

    def detail(self) -> Tensor:
        """Texture at all scales with lines among it, as tissue has it, unit variance or a little less,
        (slices, size, size).
        """
        blobs = sum((self.texture(cells) for cells in (6, 12, 24, 48)), torch.zeros(())) / 2
        for _ in range(int(uniform(self.generator, 0, 4))):  # vessels, sulci, septa: bright or dark
            cells = int(uniform(self.generator, 6, 26))
            line = ((0.16 - self.texture(cells).abs()) / 0.16).clamp(min=0)
            blobs = blobs + uniform(self.generator, -3, 3) * line * (self.texture(5) > 0)
        return blobs

    def level(
        self,
        y: Tensor | float,
        x: Tensor | float,
        height: Tensor | float,
        width: Tensor | float,
        angle: float = 0.0,
    ) -> Tensor:
        """1 on the ellipse with these half-axes, 0 in its centre; (slices, size, size)."""
        dy, dx = self.y - y, self.x - x
        if angle:
            dy, dx = dy * math.cos(angle) + dx * math.sin(angle), dx * math.cos(angle) - dy * math.sin(angle)
        return torch.sqrt((dy / height) ** 2 + (dx / width) ** 2)

    def cover(self, level: Tensor, radius: Tensor | float, at: Tensor | float = 1.0) -> Tensor:
        """Pixel coverage 0..1 of the region level < at, for an object of smallest half-axis `radius`."""
        return ((at - level) * (radius * self.pixels_per_unit) + 0.5).clamp(0, 1)

    def ellipse(
        self,
        y: Tensor | float,
        x: Tensor | float,
        height: Tensor | float,
        width: Tensor | float,
        angle: float = 0.0,
    ) -> Tensor:
        """Pixel coverage of an ellipse, anti-aliased."""
        smallest = torch.minimum(torch.as_tensor(height), torch.as_tensor(width))
        return self.cover(self.level(y, x, height, width, angle), smallest)

    def spot(self, reach_y: float, reach_x: float, low: float, high: float) -> Tensor:
        """Coverage of a randomly placed ellipse within a central box."""
        height, width = self.number(low, high), self.number(low, high)
        return self.ellipse(
            self.number(-reach_y, reach_y),
            self.number(-reach_x, reach_x),
            height,
            width,
            uniform(self.generator, 0, 3.1),
        )

    def star(
        self,
        y: Tensor | float,
        x: Tensor | float,
        radii: Sequence[float],
        scale: Tensor | float = 1.0,
        jitter: float = 0.05,
    ) -> Tensor:
        """1 on a smooth closed outline around (y, x), 0 in its centre; (slices, size, size).

        Args:
            radii: distance from the centre, clockwise from the right in equal steps; the outline rounds them
                off.
            scale: factor on all of them.
            jitter: standard deviation of each relative to its size; neighbouring slices are alike.
        """
        count = len(radii)
        here, there = torch.randn(2, count, generator=self.generator)
        turn = SLICE_STEP * self.place[:, :, 0]
        knots = torch.tensor(radii) * (1 + jitter * (torch.cos(turn) * here + torch.sin(turn) * there))
        dy, dx = self.y - y, self.x - x
        angle = torch.atan2(dy, dx) * (count / (2 * math.pi)) + count
        first = angle.floor()
        part = angle - first
        index = first.long().reshape(self.slices, -1)
        weights = (
            (1 - part) ** 3 / 6,
            (4 - 6 * part**2 + 3 * part**3) / 6,
            (1 + 3 * part + 3 * part**2 - 3 * part**3) / 6,
            part**3 / 6,
        )
        radius = torch.zeros_like(dx)
        for step, weight in enumerate(weights):
            radius += weight * knots.gather(1, (index + step - 1) % count).reshape(radius.shape)
        return torch.sqrt(dy**2 + dx**2) / (radius * scale)

    def segment(
        self,
        y0: Tensor | float,
        x0: Tensor | float,
        y1: Tensor | float,
        x1: Tensor | float,
        radius: Tensor | float,
    ) -> Tensor:
        """Distance outside of a rounded bar from (y0, x0) to (y1, x1), negative inside; (slices, size,
        size).
        """
        along_y, along_x = y1 - y0, x1 - x0
        length = along_y**2 + along_x**2
        share = (((self.y - y0) * along_y + (self.x - x0) * along_x) / (length + 1e-9)).clamp(0, 1)
        return (
            torch.sqrt((self.y - y0 - share * along_y) ** 2 + (self.x - x0 - share * along_x) ** 2) - radius
        )

    def solid(self, distance: Tensor, fade: float = 0.0) -> Tensor:
        """Pixel coverage of distance < 0, anti-aliased or fading over `fade`."""
        return (0.5 - distance / max(fade, 1 / self.pixels_per_unit)).clamp(0, 1)

    def lines(self, cells: int, width: float) -> Tensor:
        """Coverage of winding lines, as of septa or vessels, between about `cells` blobs; `width` is relative
        to the blobs.
        """
        return ((width - self.texture(cells).abs()) * 6 + 0.5 * width).clamp(0, 1)


def union(*distances: Tensor, softness: float = 0.03) -> Tensor:
    """Distance outside of all these shapes together, their joints rounded by about `softness`."""
    joined = -distances[0] / softness
    for distance in distances[1:]:
        joined = torch.logaddexp(joined, -distance / softness)
    return -softness * joined
