"""Forward models of artifacts and phantoms to show them on. numpy and torch only; no files, no DICOM.

Each artifact is a file with `draw(severity, generator, acquisition) -> params` and `apply(image, params) -> (image, mask)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.physics import beam_hardening, chemical_shift, metal, motion, susceptibility


@dataclass(frozen=True, kw_only=True)
class Simulator:
    """`draw(severity, generator, acquisition)` gives parameters; `apply(image, params)` gives the image and where it changed.

    `image` is HU (CT) or magnitude (MR), (rows, columns) or (slices, rows, columns); severity is 0 (identity) to 1 (severe).
    """

    draw: Callable[..., Any]
    apply: Callable[..., tuple[Tensor, Tensor]]


SIMULATORS: dict[str, Simulator] = {
    "metal": Simulator(draw=metal.draw, apply=metal.apply),
    "beam_hardening": Simulator(draw=beam_hardening.draw, apply=beam_hardening.apply),
    "motion": Simulator(draw=motion.draw, apply=motion.apply),
    "susceptibility": Simulator(draw=susceptibility.draw, apply=susceptibility.apply),
    "chemical_shift": Simulator(draw=chemical_shift.draw, apply=chemical_shift.apply),
}
