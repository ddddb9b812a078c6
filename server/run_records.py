"""The content of manifest.json and rounds.jsonl, as far as fedqc reads it, and how it is checked when it is
read. Keys that a run of an earlier version lacks are not missed here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from common.errors import ConfigError
from common.names import SITE_NAME, SiteKind
from common.strict import describe_validation, hidden_text

DAMAGED = "damaged-run"
_STRICT = with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
_Count = Annotated[int, Field(ge=0, le=10**9)]


@_STRICT
class _Site(TypedDict):
    site: Annotated[str, Field(pattern=SITE_NAME)]
    kind: SiteKind
    role: Literal["training", "held_out"]
    nominal_patients: Annotated[int, Field(ge=1, le=10**9)]


@_STRICT
class _Manifest(TypedDict, total=False):
    run: str
    status: str
    plan_sha256: str
    initial_sha256: str | None
    seed: int
    threads: Annotated[int, Field(ge=1, le=1024)]
    versions: dict[str, str]
    sites: list[_Site]
    keys: dict[str, str]
    models: dict[str, str]


@_STRICT
class _Refused(TypedDict):
    code: str


@_STRICT
class _Scores(TypedDict, total=False):
    loss: float | None
    auroc: float | None


@_STRICT
class _Round(TypedDict):
    round: Annotated[int, Field(ge=1, le=10**6)]
    invited: NotRequired[list[str]]
    answered: NotRequired[list[str]]
    refused: NotRequired[dict[str, _Refused]]
    failed: NotRequired[dict[str, str]]
    claims: NotRequired[dict[str, dict[str, Any]]]
    weights: NotRequired[dict[str, _Count]]
    added_variance: NotRequired[dict[str, float]]
    model_sha256: NotRequired[str]
    public: NotRequired[_Scores]


_MANIFEST: TypeAdapter[_Manifest] = TypeAdapter(_Manifest)
_ROUND: TypeAdapter[_Round] = TypeAdapter(_Round)


def checked_manifest(values: object, where: str) -> dict[str, Any]:
    """The same values, once they are what manifest.json holds.

    Raises:
        ConfigError: a value is wrong (code `damaged-run`). One line.
    """
    return _checked(_MANIFEST, values, where)


def checked_round(values: object, where: str) -> dict[str, Any]:
    """The same values, once they are a line of rounds.jsonl; raises as `checked_manifest`."""
    return _checked(_ROUND, values, where)


def damaged(what: str) -> ConfigError:
    """The error for a file of a run folder that is not as fedqc wrote it."""
    return ConfigError(
        what, code=DAMAGED, hint="restore the run folder as fedqc wrote it; fedqc verify RUN checks a run"
    )


def _checked(adapter: TypeAdapter[Any], values: object, where: str) -> dict[str, Any]:
    try:
        adapter.validate_python(values)
    except ValidationError as error:
        raise damaged(f"{where}: {describe_validation(error)}") from None
    if hidden := hidden_text(values):
        raise damaged(f"{where}: {hidden}")
    assert isinstance(values, dict)
    return values
