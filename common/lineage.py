"""What a model was trained on: written into its file, and sent with the tasks of a private arm.

A private arm promises nothing about patients whose images shaped its starting weights without noise. So a
model says which kinds of data it and its ancestors saw, and whether patients of hospitals among them were
protected; a hospital refuses a private arm on any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self

import safetensors
from pydantic import Field, ValidationError

from common.errors import ConfigError
from common.names import ONE_LINE, SiteKind
from common.strict import StrictModel

KEY = "lineage"
"""Of the metadata of a safetensors file."""
MAX_ANCESTORS = 100
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Lineage(StrictModel):
    """The origin of a model."""

    made_by: str = Field(min_length=1, max_length=300, pattern=ONE_LINE)
    # of all data that it and its ancestors were trained on
    kinds: tuple[SiteKind, ...]
    # whether hospitals' patients among them were protected by noise, in every step: a private arm may start
    private: bool
    # digests of the weights that it was trained from, nearest first
    ancestors: tuple[_Digest, ...] = Field(default=(), max_length=MAX_ANCESTORS)

    def child(self, made_by: str, *, weights: str, kinds: Iterable[SiteKind], private: bool) -> Lineage:
        """The lineage of a model that was trained from this one.

        Args:
            weights: digest of this model's weights.
            kinds: of the data that it was trained on.
            private: whether that training was.
        """
        kinds = set(kinds)
        return Lineage(
            made_by=made_by,
            kinds=tuple(sorted({*self.kinds, *kinds})),
            private=self.private and (private or "hospital" not in kinds),
            ancestors=(weights, *self.ancestors)[:MAX_ANCESTORS],
        )

    def text(self) -> str:
        """One line of JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None where a text is no lineage."""
        try:
            return cls.model_validate_json(text)
        except (ValidationError, ValueError, RecursionError):
            return None


NO_DATA = Lineage(made_by="random numbers", kinds=(), private=True)
"""Of weights drawn from a seed."""
PACKAGED = Lineage(made_by="fedqc", kinds=("synthetic",), private=True)
"""Of the weights that fedqc brings and whose file states none: trained on phantoms
(common/models/small_cnn_phantoms.md)."""


def read_lineage(path: Path) -> Lineage | None:
    """The lineage that a model file states; None where it states none.

    Raises:
        ConfigError: the file is no safetensors file (code `wrong-model`).
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: not a model file ({error})", code="wrong-model") from None
    return Lineage.parse(str(metadata.get(KEY, "")))


def lineage_of_plan(initial: str, path: Path | None) -> Lineage | None:
    """The lineage of a plan's starting weights, as the coordinator knows it; None where it is unknown.

    Args:
        initial: `model.initial`.
        path: the file that it means; None for `random`.
    """
    if path is None:
        return NO_DATA
    stated = read_lineage(path)
    return stated or PACKAGED if initial.startswith("package:") else stated
