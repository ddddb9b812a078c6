"""What to do about an artifact, in English and Chinese, from `remedies.yaml`.

A next step can harm: repeating a CT scan does not cure metal or beam hardening and adds dose. So whether
repetition can cure an artifact is a field of its own, and every remedy names its sources.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import Field

from common.strict import StrictModel, strict_yaml


class Remedy(StrictModel):
    """Steps against one artifact, the first one first."""

    repeat: bool | None  # whether acquiring again unchanged can cure it; null: it depends on the reason
    en: tuple[str, ...] = Field(min_length=1)
    zh: tuple[str, ...] = Field(min_length=1)
    sources: tuple[str, ...] = Field(min_length=1)

    def steps(self, language: str) -> tuple[str, ...]:
        """In English or, for `zh`, in Chinese."""
        return self.zh if language == "zh" else self.en


@functools.cache
def remedies() -> dict[str, Remedy]:
    """Artifact -> remedy."""
    found = strict_yaml(Path(__file__).with_name("remedies.yaml").read_bytes())
    return {
        name: Remedy.model_validate(
            value | {key: tuple(value[key]) for key in ("en", "zh", "sources") if key in value}
        )
        for name, value in found.items()
    }
