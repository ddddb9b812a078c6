"""How a real slice was taken, and where the body lies in it."""

from __future__ import annotations

import re
from typing import Protocol

from torch import Tensor

from common.artifacts import Modality
from common.physics.acquisition import Acquisition, acquire, body_mask

CT_BODY_HU = -400.0
HARDENING_GAIN = 60.0
"""Of real CT slices. At 25 most chests show nothing at any severity; at 120 they resemble no scanner's
images: chosen by looking at slices of 31 people."""
MIN_BODY = 0.1
"""Share of a slice that must be body: the ends of a stack show little to judge."""


class SliceFacts(Protocol):
    """What artifacts depend on, as a header says it or the index keeps it: `SliceHeader`, `SliceRecord`."""

    @property
    def modality(self) -> Modality:
        """CT or MR."""

    @property
    def slice_thickness_mm(self) -> float | None:
        """(0018,0050)."""

    @property
    def phase_encoding(self) -> str | None:
        """ "ROW" or "COL"; MR."""

    @property
    def field_strength_t(self) -> float | None:
        """(0018,0087); MR."""

    @property
    def echo_time_ms(self) -> float | None:
        """(0018,0081); MR."""

    @property
    def sequence(self) -> str:
        """Scanning sequence, its variant and its name; MR."""

    @property
    def series_description(self) -> str:
        """ "" where it is not kept."""


def acquisition_of(image: Tensor, header: SliceFacts, spacing_mm: float) -> Acquisition:
    """How a real slice was taken, as far as its header says; elsewhere what is common."""
    fields: dict[str, float | str] = {
        "pixel_spacing_mm": spacing_mm,
        "slice_thickness_mm": header.slice_thickness_mm or 5.0,
    }
    if header.modality == "MR":
        fields["phase_encoding"] = header.phase_encoding or "COL"
        fields["field_tesla"] = header.field_strength_t or 1.5
        fields["echo_time_ms"] = header.echo_time_ms or 10.0
        fields["sequence"] = pulse_sequence(header)
        fields["spin_echo"] = is_spin_echo(header)
    else:
        fields["hardening_gain"] = HARDENING_GAIN
    return acquire(image, header.modality, **fields)


_DIFFUSION = r"(?<![a-z])(dwi|dti|diff|diffusion)(?![a-z])|\d+dir"


def _words(header: SliceFacts) -> str:
    return f"{header.sequence} {header.series_description}".lower()


def pulse_sequence(header: SliceFacts) -> str:
    """ "EPI", "GRE" or "SE". Diffusion and functional series are EPI, also where the scanning sequence
    (0018,0020) does not say so.
    """
    words = _words(header)
    if (
        re.search(rf"\bep\b|(?<![a-z])(epi|epfid|ep2d|bold|fmri)|{_DIFFUSION}", words)
        and "epigastr" not in words
    ):
        return "EPI"
    return "GRE" if re.search(r"\bgr\b|(?<![a-z])(gre|flash|spgr|tfl)", words) else "SE"


def is_spin_echo(header: SliceFacts) -> bool:
    """Whether a spin echo refocuses what is acquired."""
    return re.search(rf"\bse\b|{_DIFFUSION}", _words(header)) is not None


def body_of(image: Tensor, modality: Modality) -> Tensor:
    """Where the body lies in a slice in HU or of magnitude: bool, same shape."""
    return body_mask(image, threshold=CT_BODY_HU if modality == "CT" else None)
