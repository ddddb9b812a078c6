"""Split images that tile many slices: Siemens MOSAIC and United Imaging VFRAME (EPI).

A mosaic is taken apart only where its header states the number of slices and the tiles fill the matrix
exactly. The count is a private element; its block is found by the name of its creator, as PS3.5 7.8.1 has it.

References: NiBabel, "Siemens CSA headers" (the SV10 layout) and "Siemens mosaics" (the square grid, left to
    right, then down);
checked by eye on Siemens Trio (35 and 36 tiles of 36) and uMR 770 (20 of 4 x 5).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.dicom.elements import Elements, elements_of, items_of, numbers, positive, text, value_of

MOSAIC_TYPES = frozenset({"MOSAIC", "VFRAME"})
"""Values of ImageType that say so."""
_BLOCKS = range(0x10, 0x20)
_SIEMENS_COUNT = (0x0019, "SIEMENS MR HEADER", 0x0A)
_SIEMENS_CSA = (0x0029, "SIEMENS CSA HEADER", 0x10)
_UIH_COUNT = (0x0065, "Image Private Header", 0x50)
_UIH_TILES = (0x0065, "Image Private Header", 0x51)
MAX_TILES = 1024


def private_tags(element: tuple[int, str, int]) -> tuple[int, ...]:
    """Every tag that a private element, and the name of its creator, may have (PS3.5 7.8.1).

    Args:
        element: group, name of the creator, element within the creator's block.
    """
    group, _, low = element
    return tuple(tag for block in _BLOCKS for tag in (group << 16 | block, group << 16 | block << 8 | low))


PRIVATE_TAGS: tuple[int, ...] = tuple(
    tag for element in (_SIEMENS_COUNT, _SIEMENS_CSA, _UIH_COUNT, _UIH_TILES) for tag in private_tags(element)
)
"""What a header must be read with for the functions below."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The tiles of a mosaic, counted left to right, then down; those after `count` are empty."""

    count: int
    across: int
    rows: int  # of one tile
    columns: int

    def tile(self, image: np.ndarray, number: int) -> np.ndarray:
        """Tile `number`, counted from 0, of an image of shape (rows of the mosaic, columns of the mosaic)."""
        down, right = divmod(number, self.across)
        return image[
            down * self.rows : (down + 1) * self.rows, right * self.columns : (right + 1) * self.columns
        ]


def grid_of(elements: Elements, rows: int, columns: int) -> Grid | None:
    """How the mosaic is cut, None where the header does not state a number of slices whose grid divides rows
    x columns.

    Siemens uses a square grid of ceil(sqrt(count)), United Imaging as many rows of that width as it needs.
    """
    siemens = private_count(elements, _SIEMENS_COUNT) or _csa_count(_private(elements, _SIEMENS_CSA))
    count = siemens or private_count(elements, _UIH_COUNT)
    if not count or not 1 <= count <= MAX_TILES:
        return None
    across = math.isqrt(count - 1) + 1
    down = across if siemens else -(-count // across)
    if rows % down or columns % across:
        return None
    return Grid(count=count, across=across, rows=rows // down, columns=columns // across)


def tile_positions_mm(elements: Elements, grid: Grid, first_mm: float | None) -> list[float | None]:
    """Position of each tile along the slice normal.

    As United Imaging states for each tile; else from the first, in steps of the spacing between slices. The
    corner that a Siemens header gives is that of the whole mosaic: it lies in the plane of the first slice.
    The sign of the steps is not known: the order holds.
    """
    stated = _tile_items(elements)
    axes = numbers(elements, "ImageOrientationPatient", 6)
    if len(stated) == grid.count and axes:
        corners = [numbers(elements_of(item), "ImagePositionPatient", 3) for item in stated]
        normal = np.cross(axes[:3], axes[3:])
        return [None if corner is None else float(np.dot(normal, corner)) for corner in corners]
    step = positive(elements, "SpacingBetweenSlices")
    return [
        None if first_mm is None or step is None else first_mm + number * step for number in range(grid.count)
    ]


def _tag_of(elements: Elements, wanted: tuple[int, str, int]) -> int | None:
    group, creator, element = wanted
    for block in _BLOCKS:
        tag = group << 16 | block << 8 | element
        if tag in elements and text(elements, group << 16 | block) == creator:
            return tag
    return None


def _private(elements: Elements, wanted: tuple[int, str, int]) -> object:
    tag = _tag_of(elements, wanted)
    return None if tag is None else value_of(elements, tag)


def _tile_items(elements: Elements) -> Sequence[Any]:
    tag = _tag_of(elements, _UIH_TILES)
    return () if tag is None else items_of(elements, tag)


def private_count(elements: Elements, wanted: tuple[int, str, int]) -> int | None:
    """The number in a private element, which may be binary, text, or bytes of unknown VR; else None."""
    value = _private(elements, wanted)
    if isinstance(value, bytes):
        digits = value.strip(b" \0")
        value = (
            int(digits) if digits.isdigit() else int.from_bytes(value, "little") if len(value) == 2 else None
        )
    try:
        return int(value) if value is not None else None  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None


def _csa_count(header: object) -> int | None:
    """NumberOfImagesInMosaic of a Siemens CSA image header, for files that lack the element of the same
    name.
    """
    if not isinstance(header, bytes) or header[:4] != b"SV10":
        return None
    try:
        (names,) = struct.unpack_from("<I", header, 8)
        at = 16
        for _ in range(min(names, 1024)):
            name, items = header[at : at + 64].split(b"\0")[0], struct.unpack_from("<i", header, at + 76)[0]
            at += 84
            for _ in range(min(items, 1024)):
                length = struct.unpack_from("<i", header, at + 4)[0]
                value = header[at + 16 : at + 16 + length].strip(b" \0")
                if name == b"NumberOfImagesInMosaic" and value:
                    return int(value)
                at += 16 + (length + 3 & ~3)
                if length < 0 or at > len(header):
                    return None
    except (struct.error, ValueError):
        return None
    return None
