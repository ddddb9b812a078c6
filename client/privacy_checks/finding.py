"""What a check reports, and the plan that it checks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from common.plan import RunPlan
from common.pricing import with_noise


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of `fedqc verify --privacy`."""

    check: str
    holds: bool | None  # None: not checked, `measured` says why
    measured: str
    expected: str


@dataclass(kw_only=True)
class Scene:
    """A plan, priced, and a folder for what the checks write; `close` removes it."""

    plan: RunPlan
    folder: Path = field(default_factory=lambda: Path(mkdtemp(prefix="fedqc-privacy-")))
    kept: dict[str, object] = field(default_factory=dict)  # what one check measured and another reads

    def __post_init__(self) -> None:
        self.plan = with_noise(self.plan)

    @property
    def noise_multiplier(self) -> float:
        """Of the plan's private training."""
        assert self.plan.privacy.noise_multiplier is not None
        return self.plan.privacy.noise_multiplier

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
