"""Define names and bounds that coordinator and hospital share before the first message."""

from __future__ import annotations

from typing import Literal, get_args

SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,31}$"
"""Pattern of a site's, plan's or federation's name."""

SiteKind = Literal["hospital", "public", "synthetic"]
"""What the images of a site are: of patients, openly published, or generated."""
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)

Unit = Literal["patient", "study"]
"""The unit of privacy at a site: whose contribution is bounded, and hidden by the noise."""

EvaluationMode = Literal["dp", "disclosed", "synthetic"]
"""How a site's patients are scored: with noise and charged; exactly, outside the guarantee; or exactly,
because they are no patients of a hospital.
"""

MAX_PATIENTS = 10_000_000
"""Of one site: 800 such sites at the largest update still sum within 64 bits."""

DEVICE_CHOICE = r"^(auto|cpu|cuda(:\d{1,2})?)$"
"""Pattern of where a site computes: `auto` is the first GPU, else the CPU (common/devices.py)."""
