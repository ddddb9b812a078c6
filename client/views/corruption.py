"""Add the artifacts of a modality to clean slices of one patient, and measure how much they changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.views.acquisition import body_of
from common.artifacts import DEFAULT_LABELS, Modality, can_occur
from common.physics import SIMULATORS, choose, ct, record
from common.physics.acquisition import Acquisition
from common.physics.threads import one_thread

DRAWS = 5
# as they arise: metal is painted last, motion blurs all
ORDER = (
    "beam_hardening",
    "metal",
    "chemical_shift",
    "susceptibility",
    "motion",
    "ct_motion",
)
"""Every artifact that is simulated."""
UNEVEN_HU = 40.0  # an even change of all soft tissue is no artifact
MOVEMENTS = ("motion", "ct_motion")
"""They differ from slice to slice of a patient."""
MIN_CHANGED = {
    "metal": 0.20,
    "beam_hardening": 0.2,
    "motion": 0.15,
    "ct_motion": 0.06,
    "susceptibility": 0.03,
    "chemical_shift": 0.05,
}
"""What `changed_share` must reach in every slice for a label; chosen by looking at sheets."""


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """Slices with their artifacts, and what was drawn for each."""

    images: list[np.ndarray]
    masks: list[np.ndarray]  # bool: where any artifact changed the slice
    simulators: dict[str, str]  # named artifact → the simulator that shows it
    params: list[dict[str, dict[str, Any]]]  # of each slice: named artifact → `record`
    # of each named artifact, the smallest share of the body's pixels that it changed in a slice
    changed: dict[str, float]


@one_thread()
def corrupt(
    images: Sequence[np.ndarray],
    modality: Modality,
    severities: dict[str, float],
    acquisitions: Sequence[Acquisition],
    generator: torch.Generator,
    *,
    artifacts: Collection[str] = DEFAULT_LABELS,
) -> Corrupted:
    """Every artifact of the modality in turn, at severity zero where `severities` does not name it.

    Args:
        images: slices of one patient, each (rows, columns), HU or magnitude. All slices show one draw: the
            implant, field or bandwidth stays as it is, placed relative to the body in each slice; only
            movement differs from slice to slice.
        severities: of each named artifact, the same in all slices.
        acquisitions: how each slice was taken.
        artifacts: those that pass at severity zero if they are not named; the same for all versions that are
            compared.
    """
    changed: dict[str, float] = {}
    slices = [torch.from_numpy(image) for image in images]
    bodies = [body_of(image, modality) for image in slices]
    masks = [torch.zeros_like(body) for body in bodies]
    params: list[dict[str, dict[str, Any]]] = [{} for _ in slices]
    chosen: dict[str, str] = {}
    for name in simulated(modality, {*artifacts, *severities}):
        shown_by, severity = choose(name, generator), severities.get(name, 0.0)
        simulator = SIMULATORS[shown_by]
        start = int(torch.randint(0, 2**31 - 1, (), generator=generator))
        results: list[Tensor] = []
        for number, (image, body, acquisition) in enumerate(zip(slices, bodies, acquisitions, strict=True)):
            own = torch.Generator().manual_seed(start + number if name in MOVEMENTS else start)
            drawn = simulator.draw(severity, own, acquisition)
            result, mask = simulator.apply(image, drawn)
            results.append(result)
            if severity > 0:
                chosen[name] = shown_by
                params[number][name] = record(drawn)
                masks[number] |= mask
                changed[name] = min(
                    changed.get(name, 1.0), changed_share(image, result, mask & body, modality)
                )
        slices = results
    return Corrupted(
        images=[image.numpy() for image in slices],
        masks=[mask.numpy() for mask in masks],
        simulators=chosen,
        params=params,
        changed=changed,
    )


def changed_share(before: Tensor, after: Tensor, mask: Tensor, modality: Modality) -> float:
    """How much of a slice an artifact changed visibly.

    MR: the masked share of the body. CT: the masked share of soft tissue whose change differs from that
        tissue's median by `UNEVEN_HU`.
    Args:
        mask: the simulator's map of changed pixels, within the body.
    """
    if modality == "MR":
        return float(mask.sum()) / max(1, int(body_of(before, modality).sum()))
    tissue = ct.soft_tissue(before[None])[0]
    change = (after - before)[tissue]
    if not change.numel():
        return 0.0
    return float((((change - change.median()).abs() > UNEVEN_HU) & mask[tissue]).float().mean())


def shows(made: Corrupted, artifacts: Iterable[str]) -> bool:
    """Whether each of these artifacts changed every slice enough for a label."""
    return all(made.changed[name] >= MIN_CHANGED[name] for name in artifacts)


def simulated(modality: Modality, artifacts: Collection[str] = DEFAULT_LABELS) -> list[str]:
    """Those of `artifacts` that can be simulated in a modality, in `ORDER`."""
    return [name for name in ORDER if name in artifacts and can_occur(name, modality)]
