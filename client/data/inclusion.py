"""Read cohort.yaml: inclusion and exclusion criteria, opt-outs, and the approval to use the images.

The file never leaves the hospital.

    name: brain-mri
    ethics_approval: 2024-117
    consent_basis: broad consent, form 3
    include:                          # every line must fit; a slice whose header lacks the value does not
      modality: [MR]
      body_part: [BRAIN, HEAD]        # BodyPartExamined, case does not matter
      study_date: {first: 2019-01-01, last: 2024-12-31}
      age_years: {min: 18, max: 90}
      series_description: [T1, MPRAGE]   # one of these words occurs in it
    exclude:                          # a slice must fit none of them
      series_description: [LOC, SCREEN]
    lossy: exclude                    # or: use, images that were compressed with loss
    opt_out: ["0012345"]              # PatientIDs; or opt_out_file, see `opt_outs.py`
    opt_out_file: opted-out.txt

Whether a slice is admitted depends on its own header alone, never on another patient's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from client.data.opt_outs import is_patient_id, read_opt_outs
from client.dicom.cache import Slices
from client.dicom.index import SliceRecord, patient_pseudonyms
from client.dicom.patients import AS_WRITTEN, PatientRule, is_listed, near_forms, normalised
from client.site.policy import ETHICS_FIELDS
from common.artifacts import MODALITIES, Modality
from common.errors import ConfigError
from common.names import SiteKind
from common.strict import StrictModel, describe_all, strict_yaml

MAX_BYTES = 1 << 20
OLD_AGE_KEYS = {"least": "min", "most": "max"}
ADMISSION_CODES: dict[str, str] = {
    "opted-out": "the patient is on the opt-out list",
    "imported": "converted from a public collection by fedqc data import: no image of this hospital",
    "rule-modality": "another modality than the cohort's",
    "rule-body-part": "another body part than the cohort's, or none stated",
    "rule-date": "studied outside the cohort's dates, or on an unknown date",
    "rule-age": "outside the cohort's ages, or of unknown age",
    "rule-description": "a series that the cohort leaves out by its description",
}
_Words = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(strict=False)]

_Date = Annotated[date | None, Field(strict=False)]


class Dates(StrictModel):
    first: _Date = None
    last: _Date = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first and self.last and self.first > self.last:
            raise ValueError("first is after last")
        return self


class Ages(StrictModel):
    """Inclusive bounds in years. The keys were `least` and `most` once; these are still read."""

    min: float = Field(default=0.0, ge=0, le=150)
    max: float = Field(default=150.0, ge=0, le=150)

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        renamed = {old: new for old, new in OLD_AGE_KEYS.items() if new not in value}
        return {renamed.get(key, key): number for key, number in value.items()}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError("min is above max")
        return self


class Include(StrictModel):
    modality: Annotated[tuple[Modality, ...], Field(strict=False)] = MODALITIES
    body_part: _Words = ()
    study_date: Dates | None = None
    age_years: Ages | None = None
    series_description: _Words = ()


class Exclude(StrictModel):
    body_part: _Words = ()
    series_description: _Words = ()


class CohortRules(StrictModel):
    """The fields of cohort.yaml."""

    name: str = ""
    ethics_approval: str = ""
    consent_basis: str = ""
    include: Include = Include()
    exclude: Exclude = Exclude()
    lossy: Literal["exclude", "use"] = "exclude"
    opt_out: _Words = ()
    opt_out_file: Annotated[str, Field(min_length=1)] | None = None

    @property
    def ethics(self) -> dict[str, str]:
        """Reference of the ethics approval, and consent basis."""
        return {name: str(getattr(self, name)) for name in ETHICS_FIELDS}

    @field_validator("opt_out")
    @classmethod
    def _are_ids(cls, listed: tuple[str, ...]) -> tuple[str, ...]:
        if not all(is_patient_id(entry) for entry in listed):
            raise ValueError("an entry is no PatientID")
        return listed

    @field_validator("opt_out_file", mode="before")
    @classmethod
    def _names_a_file(cls, name: Any) -> Any:
        if name is None:  # the key without a value: a list was meant
            raise ValueError("names no file")
        return name


_FIELDS = (
    f"fields: {', '.join(CohortRules.model_fields)}; of include: {', '.join(Include.model_fields)}; "
    f"of exclude: {', '.join(Exclude.model_fields)}"
)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The inclusion rules and the opt-outs, as a function of one slice."""

    rules: CohortRules
    opted_out: frozenset[str]  # pseudonyms and normalised forms, see `patients.is_listed`
    near_opted_out: frozenset[str] = frozenset()  # forms that differ from these in writing
    listed: int = 0  # IDs on the list
    patients: PatientRule = AS_WRITTEN
    kind: SiteKind = "hospital"  # a hospital uses no imported image

    def has_opted_out(self, record: SliceRecord) -> bool:
        """Whether the patient of a slice is on the opt-out list."""
        return is_listed(record, self.opted_out)

    def is_near(self, record: SliceRecord) -> bool:
        """Whether the list holds an ID that differs from this patient's only in zeros, separators or
        issuer.
        """
        return not self.has_opted_out(record) and any(
            form in self.near_opted_out for form in record.patient_near
        )

    def opt_outs(self, slices: Slices) -> OptOuts:
        """The opt-out list against the patients of a folder."""
        records = slices.intake.records
        return OptOuts(
            listed=self.listed,
            found=len(slices.opted_out),
            near=len({record.patient for record in records if self.is_near(record)}),
            without_id=sum(record.patient_origin != "id" for record in records) if self.listed else 0,
        )

    def __call__(self, record: SliceRecord) -> str:
        """A code of `ADMISSION_CODES` by which the slice is left out, or ""."""
        include, exclude = self.rules.include, self.rules.exclude
        if self.has_opted_out(record):
            return "opted-out"
        if record.imported and self.kind == "hospital":
            return "imported"
        if record.modality not in include.modality:
            return "rule-modality"
        part = record.body_part.upper()
        if (include.body_part and part not in _upper(include.body_part)) or part in _upper(exclude.body_part):
            return "rule-body-part"
        if include.study_date and not _is_within(record.study_date, include.study_date):
            return "rule-date"
        ages = include.age_years
        if ages and (record.age_years is None or not ages.min <= record.age_years <= ages.max):
            return "rule-age"
        description = record.series_description.upper()
        included, excluded = _upper(include.series_description), _upper(exclude.series_description)
        if (included and not any(word in description for word in included)) or any(
            word in description for word in excluded
        ):
            return "rule-description"
        return "lossy" if record.lossy and self.rules.lossy == "exclude" else ""

    def kept_text(self, header: dict[str, Any]) -> dict[str, str]:
        """What the cache keeps of a header's description and date: as little as gives these rules the same
        answer.

        Returns:
            series_description: the words of the rules that occur in it, one a line. study_date: YYYYMMDD, the
            first day of the month that these rules treat alike.
        """
        description = str(header["series_description"]).upper()
        words = [word for word in self._description_words() if word in description]
        return {"series_description": "\n".join(words), "study_date": self._coarse(str(header["study_date"]))}

    def text_digest(self) -> str:
        """A digest of what `kept_text` depends on; "" where no rule names a word or a date."""
        dates = self.rules.include.study_date
        words, bounds = self._description_words(), dates.model_dump(mode="json") if dates else None
        if not (words or bounds):
            return ""
        return hashlib.sha256(json.dumps([words, bounds]).encode()).hexdigest()

    def _description_words(self) -> list[str]:
        rules = self.rules
        return sorted({*_upper(rules.include.series_description), *_upper(rules.exclude.series_description)})

    def _coarse(self, study_date: str) -> str:
        dates = self.rules.include.study_date
        first = study_date[:6] + "01"
        if not study_date or dates is None or _is_within(study_date, dates) == _is_within(first, dates):
            return first if study_date else ""
        day_after_last = dates.last + timedelta(days=1) if dates.last and dates.last < date.max else None
        bounds = (bound.isoformat().replace("-", "") for bound in (dates.first, day_after_last) if bound)
        same = (
            bound
            for bound in bounds
            if first < bound <= study_date and _is_within(bound, dates) == _is_within(study_date, dates)
        )
        return next(same, study_date)

    def digest(self) -> str:
        """A digest of the rules: equal digests admit the same slices.

        Age bounds are digested under their old keys, so that existing caches stay valid.
        """
        rules = self.rules.model_dump(mode="json", include={"include", "exclude"})
        if ages := rules["include"]["age_years"]:
            rules["include"]["age_years"] = {old: ages[new] for old, new in OLD_AGE_KEYS.items()}
        if self.rules.lossy != "exclude":  # the default is not digested, so that existing caches stay valid
            rules["lossy"] = self.rules.lossy
        if self.kind != "hospital":
            rules["imported"] = "use"
        return hashlib.sha256(
            json.dumps([rules, sorted(self.opted_out)], sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True, kw_only=True)
class OptOuts:
    """Counts of an opt-out list. Local."""

    listed: int  # IDs on the list
    found: int  # patients of the folder who are on it: their images are not used
    near: int  # patients in use whose ID differs from a listed one only in zeros, separators or issuer
    without_id: int  # slices in use that cannot be compared with the list


def read_admission(
    folder: Path, key: bytes, patients: PatientRule = AS_WRITTEN, *, kind: SiteKind = "hospital"
) -> Admission:
    """The rules of FOLDER/cohort.yaml; without the file, all patients are admitted.

    Args:
        patients: how the site names its patients.
        kind: of the site.
    Raises:
        ConfigError: `bad-cohort`, naming file, field and what is allowed; `bad-opt-out`, naming the line. No
            value of a list of patients.
    """
    rules = read_rules(folder)
    entries: list[tuple[str, ...]] = [(entry,) for entry in rules.opt_out]
    if rules.opt_out_file:
        entries += read_opt_outs(folder / rules.opt_out_file)
    names = [name.strip() for entry in entries for name in entry]
    return Admission(
        rules=rules,
        opted_out=frozenset(name for one in names for name in patient_pseudonyms(one, key, patients)),
        near_opted_out=frozenset(form for one in names for form in near_forms(one, key)),
        listed=len({normalised(entry[0]) for entry in entries}),
        patients=patients,
        kind=kind,
    )


def read_rules(folder: Path) -> CohortRules:
    """The fields of FOLDER/cohort.yaml; the opt-out file is not read.

    Raises:
        ConfigError: `bad-cohort`.
    """
    path = folder / "cohort.yaml"
    if not path.exists():
        return CohortRules()
    try:
        value = strict_yaml(_text(path), limit=MAX_BYTES)
        return CohortRules.model_validate(value or {})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}:"
        raise ConfigError(f"{path}:{line} not valid YAML", code="bad-cohort") from None
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {describe_all(error, values=False)}",
            code="bad-cohort",
            hint=_FIELDS,
        ) from None


def has_old_age_keys(folder: Path) -> bool:
    """Whether FOLDER/cohort.yaml, which must be valid, bounds the age by `least` or `most`."""
    path = folder / "cohort.yaml"
    if not path.exists():
        return False
    include = (strict_yaml(_text(path), limit=MAX_BYTES) or {}).get("include") or {}
    return bool((include.get("age_years") or {}).keys() & OLD_AGE_KEYS.keys())


def _text(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}", code="bad-cohort") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_BYTES} bytes",
            code="bad-cohort",
            hint="put a long list of patients into opt_out_file",
        )
    return content


def _upper(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word.upper() for word in words)


def _is_within(study_date: str, dates: Dates) -> bool:
    try:
        studied = date(int(study_date[:4]), int(study_date[4:6]), int(study_date[6:8]))
    except ValueError:
        return False
    return (dates.first is None or dates.first <= studied) and (dates.last is None or studied <= dates.last)
