"""Simulators of artifacts, and phantoms to apply them to. numpy and torch only; no files, no DICOM.

Each artifact is a file with `draw(severity, generator, acquisition) -> params` and `apply(image, params) ->
(image, mask)`. Parameters are drawn apart from applied, hold the seed of what noise they need, and are all
that `apply` needs: a recorded row replays its image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from common.artifacts import Modality
from common.physics import (
    beam_hardening,
    bias_field,
    chemical_shift,
    ct_motion,
    ghosting,
    gibbs,
    low_dose,
    metal,
    motion,
    photon_starvation,
    rician_noise,
    ring,
    susceptibility,
)
from common.physics.acquisition import Acquisition, uniform


@dataclass(frozen=True, kw_only=True)
class Simulator:
    """`draw(severity, generator, acquisition)` gives parameters; `apply(image, params)` gives the image and
    where it changed.

    `image` is HU (CT) or magnitude (MR), (rows, columns) or (slices, rows, columns); severity is 0 (identity)
    to 1 (severe).
    """

    modality: Modality
    label: str | None
    """The artifact of the vocabulary that it shows; None: a nuisance of appearance."""
    params: type
    draw: Callable[[float, torch.Generator, Acquisition], Any]
    apply: Callable[..., tuple[Tensor, Tensor]]


SIMULATORS: dict[str, Simulator] = {
    "metal": Simulator(modality="CT", label="metal", params=metal.Metal, draw=metal.draw, apply=metal.apply),
    "beam_hardening": Simulator(
        modality="CT",
        label="beam_hardening",
        params=beam_hardening.BeamHardening,
        draw=beam_hardening.draw,
        apply=beam_hardening.apply,
    ),
    "photon_starvation": Simulator(
        modality="CT",
        label=None,
        params=photon_starvation.PhotonStarvation,
        draw=photon_starvation.draw,
        apply=photon_starvation.apply,
    ),
    "low_dose": Simulator(
        modality="CT", label=None, params=low_dose.LowDose, draw=low_dose.draw, apply=low_dose.apply
    ),
    "ring": Simulator(modality="CT", label=None, params=ring.Ring, draw=ring.draw, apply=ring.apply),
    "ct_motion": Simulator(
        modality="CT",
        label="ct_motion",
        params=ct_motion.CtMotion,
        draw=ct_motion.draw,
        apply=ct_motion.apply,
    ),
    "motion": Simulator(
        modality="MR", label="motion", params=motion.Motion, draw=motion.draw, apply=motion.apply
    ),
    "ghosting": Simulator(
        modality="MR", label="motion", params=ghosting.Ghosting, draw=ghosting.draw, apply=ghosting.apply
    ),
    "susceptibility": Simulator(
        modality="MR",
        label="susceptibility",
        params=susceptibility.Susceptibility,
        draw=susceptibility.draw,
        apply=susceptibility.apply,
    ),
    "chemical_shift": Simulator(
        modality="MR",
        label="chemical_shift",
        params=chemical_shift.ChemicalShift,
        draw=chemical_shift.draw,
        apply=chemical_shift.apply,
    ),
    "chemical_shift_2": Simulator(
        modality="MR",
        label="chemical_shift",
        params=chemical_shift.ChemicalShift,
        draw=chemical_shift.draw_second_kind,
        apply=chemical_shift.apply,
    ),
    "gibbs": Simulator(modality="MR", label=None, params=gibbs.Gibbs, draw=gibbs.draw, apply=gibbs.apply),
    "bias_field": Simulator(
        modality="MR", label=None, params=bias_field.BiasField, draw=bias_field.draw, apply=bias_field.apply
    ),
    "rician_noise": Simulator(
        modality="MR",
        label=None,
        params=rician_noise.RicianNoise,
        draw=rician_noise.draw,
        apply=rician_noise.apply,
    ),
}

# opposed phase is chosen by who sets the echo time, and is no fault of the image
SHOWN_BY: dict[str, tuple[tuple[str, float], ...]] = {
    "metal": (("metal", 1.0),),
    "beam_hardening": (("beam_hardening", 1.0),),
    "motion": (("motion", 0.7), ("ghosting", 0.3)),
    "susceptibility": (("susceptibility", 1.0),),
    "chemical_shift": (("chemical_shift", 1.0),),
    "ct_motion": (("ct_motion", 1.0),),
}
"""Label -> the simulators that show it, and how often each is taken."""


def choose(label: str, generator: torch.Generator) -> str:
    """A simulator for a label, by the chances of `SHOWN_BY`. Always draws one number."""
    place = uniform(generator, 0, 1)
    for name, chance in SHOWN_BY[label]:
        place -= chance
        if place < 0:
            return name
    return SHOWN_BY[label][-1][0]


def record(params: Any) -> dict[str, Any]:
    """Parameters as a row of a manifest: plain numbers, words and lists."""
    return asdict(params)


def replay(name: str, row: dict[str, Any]) -> Any:
    """The parameters of simulator `name` from a row; `record`'s inverse.

    Raises:
        KeyError: no such simulator. pydantic.ValidationError: the row is not of its parameters.
    """
    return TypeAdapter(SIMULATORS[name].params).validate_python(row)
