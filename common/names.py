"""Define names and bounds that coordinator and hospital share before the first message."""

from __future__ import annotations

from typing import Literal, get_args

SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,31}$"
"""Pattern of a site's, plan's or federation's name."""

ONE_LINE = r"^[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}]*$"
"""Pattern (of pydantic) of text that others wrote: no control character, and none that hides or reorders."""
ONE_PARAGRAPH = ONE_LINE.removesuffix("$") + r"\n?$"
"""The same, with the line feed that YAML puts behind a block of text."""
MAX_WORDS = 1000
MAX_RUN = 200
"""Characters of a run's name as messages carry it; `fedqc run start` gives shorter ones."""

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
