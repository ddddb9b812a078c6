"""Read site.yaml, the operator's description of a site, and keep the site's own key."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from client.dicom.patients import AS_WRITTEN, PatientRule
from client.labels.reader_agreement import Rule
from common.artifacts import NAMES, parse_name
from common.errors import ConfigError
from common.files import write_new
from common.names import DEVICE_CHOICE, MAX_PATIENTS, SITE_NAME, SiteKind
from common.plan import Split
from common.strict import StrictModel, describe_all, describe_yaml, read_yaml

NO_SHEET = "none"
"""`labels` of a site without a label sheet: it trains where a plan injects artifacts, and is never scored."""


_PathText = Annotated[str, Field(min_length=1, max_length=4096)]


class Declaration(StrictModel):
    """An operator's word that images are no hospital's patients. It holds for one folder of images."""

    by: str = Field(min_length=1, max_length=200)
    at: str = Field(min_length=1, max_length=40)
    why: str = Field(min_length=1, max_length=500)
    images: _PathText


class SiteConfig(StrictModel):
    """site.yaml. Paths are relative to its folder, or absolute. It never leaves the hospital."""

    name: str = Field(pattern=SITE_NAME)
    kind: SiteKind
    # stands in each row of the ledger; all cohorts of an installation share one budget
    cohort: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    # a budget of its own for this cohort: patients of the installation's other cohorts are left out of it
    cohort_disjoint: bool = False
    images: _PathText = "images"
    # a table of image-quality metrics, a row a scan, in place of images: client/data/measured.py
    measures: _PathText | None = None
    labels: _PathText = "labels.csv"  # the sheet; `none`: there is none
    consensus: Rule = "agree"  # how several readers become one label: client/labels/reader_agreement.py
    # artifacts that this site's readers assessed; None: not declared. A site that assessed none never trains
    assessed: tuple[str, ...] | None = None
    split: Split | None = None  # shares of patients, kept from the first run on: client/site/split.py
    # public bucket, chosen by the operator: never computed from the data
    nominal_patients: int = Field(ge=1, le=MAX_PATIENTS)
    state: _PathText = "state"
    stand_in: str | None = (
        None  # where "patients" are not persons: one plain sentence that says what they are
    )
    policy: str | None = None
    # needed where the kind is not hospital and fedqc did not generate the images: `fedqc site declare`
    declared_not_hospital: Declaration | None = None
    # where its agent computes: auto (the first GPU, else the CPU), cpu, cuda, cuda:N; common/devices.py
    device: str = Field(default="auto", pattern=DEVICE_CHOICE)
    patients: PatientRule = AS_WRITTEN  # who is one patient, and who is one without a PatientID

    @field_validator("assessed", mode="before")
    @classmethod
    def _are_artifacts(cls, names: object) -> object:
        """Known artifacts by their names here, in one order."""
        if names is None:
            return None
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a list of artifacts: {', '.join(NAMES)}; [] if none was assessed")
        try:
            known = [parse_name(name) for name in names]
        except ConfigError as error:
            raise ValueError(error.message) from None
        if len(set(known)) < len(known):
            raise ValueError("names an artifact twice")
        return tuple(name for name in NAMES if name in known)

    @model_validator(mode="after")
    def _assessed_on_a_sheet(self) -> SiteConfig:
        if not self.has_sheet and self.assessed:
            raise ValueError(f"labels: {NO_SHEET}, and assessed names {', '.join(self.assessed)}")
        return self

    @property
    def has_sheet(self) -> bool:
        """Whether the site has a label sheet."""
        return self.labels != NO_SHEET

    @property
    def assesses(self) -> bool:
        """Whether readers of this site assessed an artifact, as far as it declares."""
        return self.has_sheet and self.assessed != ()


def read_site(path: Path) -> tuple[SiteConfig, Path]:
    """Read site.yaml, or the site.yaml of a folder.

    Returns:
        the configuration and the folder that its paths are relative to.
    Raises:
        ConfigError: the message names the field, the value and what is allowed.
    """
    path = path / "site.yaml" if path.is_dir() else path
    try:
        value = read_yaml(path)
    except OSError as error:
        hint = "a site is a folder with a site.yaml"
        raise ConfigError(f"{path}: cannot read: {error.strerror}", code="no-such-site", hint=hint) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {describe_yaml(error)}", code="bad-site") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: expected fields such as 'name: site-a'", code="bad-site", hint="see configs/sites"
        )
    try:
        return SiteConfig.model_validate(value), path.parent
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {describe_all(error)}",
            code="bad-site",
            hint=f"fields: {', '.join(SiteConfig.model_fields)}",
        ) from None


def site_key(state: Path) -> bytes:
    """The site's secret, 32 bytes: `site.key` in the state folder, created on first use, readable by its
    owner only.

    Pseudonyms and the split depend on it: a new key gives a new split.

    Raises:
        ConfigError: the file is not a key, or cannot be read or written.
    """
    path = state / "site.key"
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():  # of two processes, the first wins and both read its key
            write_new(path, secrets.token_hex(32).encode() + b"\n")
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read or create the site key: {error.strerror}",
            code="bad-site-key",
            hint="the state folder must be writable",
        ) from error
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            f"{path}: not a site key; expected 64 hexadecimal digits",
            code="bad-site-key",
            hint="restore it from a backup",
        )
    return key


BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def next_bucket(patients: int) -> tuple[int, int] | None:
    """How many more patients reach the next bucket, and that bucket; None above the largest. Local: it is
    computed from the data.
    """
    above = next((bucket for bucket in BUCKETS if bucket > patients), None)
    return None if above is None else (above - patients, above)


OFF_BUCKET = 2.5
"""The widest step between two buckets."""


def right_bucket(nominal_patients: int, patients: int) -> int | None:
    """The bucket that `patients` training patients belong in, where the nominal number is off by more than
    `OFF_BUCKET`; else None. Local: it is computed from the data.

    A site weighs its nominal number in the mean, and divides its noised sums by it: a number that is too
    large outweighs the other sites and learns nothing, one that is too small learns in leaps.
    """
    if nominal_patients / OFF_BUCKET <= patients <= nominal_patients * OFF_BUCKET:
        return None
    return nominal_bucket(patients)


def nominal_bucket(patients: float) -> int:
    """The largest public bucket that is not above `patients`."""
    return max((bucket for bucket in BUCKETS if bucket <= patients), default=1)
