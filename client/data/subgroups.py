"""Which patients are in which subgroup, by the headers of their slices and the severities of the label sheet.

A header says one word of `common.subgroups`, or nothing. A patient is in a level that all of the patient's
slices that say anything agree on. Sex stands in the index as a keyed digest, which is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from client.data.cohort import Cohort
from client.dicom.index import SliceRecord
from client.dicom.patients import words_of_sex
from client.dicom.vendors import vendor
from common.subgroups import LEVELS, PLACE, SEVERITY, SUBGROUPS

_BODY: dict[str, tuple[str, ...]] = {  # a word of BodyPartExamined, upper case, begins with one of these
    "spine": ("SPINE", "CSPINE", "TSPINE", "LSPINE", "CTSPINE", "LSSPINE", "SSPINE", "SACRUM", "COCCYX"),
    "head": ("HEAD", "BRAIN", "SKULL", "SELLA", "ORBIT", "SINUS", "FACE", "IAC", "JAW", "EAR"),
    "neck": ("NECK", "THYROID", "LARYNX", "CAROTID"),
    "chest": ("CHEST", "THORAX", "LUNG", "HEART", "BREAST", "CARDIAC"),
    "abdomen": ("ABD", "LIVER", "KIDNEY", "PANCREAS", "SPLEEN", "ADRENAL", "COLON"),
    "pelvis": ("PELVIS", "PROSTATE", "BLADDER", "UTERUS", "RECTUM", "HIP"),
    "limb": (
        "KNEE",
        "SHOULDER",
        "ELBOW",
        "WRIST",
        "HAND",
        "ANKLE",
        "FOOT",
        "LEG",
        "ARM",
        "EXTR",
        "FEMUR",
    ),
}
_VENDORS = {
    "Siemens": "siemens",
    "GE": "ge",
    "Philips": "philips",
    "Canon": "canon",
    "United Imaging": "united_imaging",
}


def _vendor(record: SliceRecord) -> str | None:
    if not record.manufacturer.strip():
        return None
    return _VENDORS.get(vendor(record.manufacturer) or "", "other")


def _field_strength(record: SliceRecord) -> str | None:
    if record.modality != "MR" or record.field_strength_t is None:
        return None
    near = {"1.5_t": abs(record.field_strength_t - 1.5), "3_t": abs(record.field_strength_t - 3)}
    return next((level for level, distance in near.items() if distance <= 0.2), "other")


def _tube_voltage(record: SliceRecord) -> str | None:
    if record.modality != "CT" or record.kvp is None:
        return None
    return SUBGROUPS["tube_voltage"][int(np.searchsorted([90, 110, 130], record.kvp))]


def _body_part(record: SliceRecord) -> str | None:
    words = re.findall(r"[A-Z]+", record.body_part.upper())
    if not words:
        return None
    found = (name for name, starts in _BODY.items() if any(word.startswith(starts) for word in words))
    return next(found, "other")


def _age(record: SliceRecord) -> str | None:
    if record.age_years is None:
        return None
    return SUBGROUPS["age"][int(np.searchsorted([20, 40, 60, 80], record.age_years, side="right"))]


def subgroups_of(cohort: Cohort, rows: np.ndarray, key: bytes) -> np.ndarray:
    """Who is in which level, bool (P, A, levels), one row a patient of `rows`, by number.

    A patient with an artifact is in the level of its highest severity; one without is in all of these.

    Args:
        rows: slices of the cohort.
        key: of the site.
    """
    sexes = words_of_sex(key)
    says: dict[str, Callable[[SliceRecord], str | None]] = {
        "vendor": _vendor,
        "field_strength": _field_strength,
        "tube_voltage": _tube_voltage,
        "body_part": _body_part,
        "sex": lambda record: sexes.get(record.sex),
        "age": _age,
    }
    ids, where = np.unique(cohort.patients[rows], return_inverse=True)
    member = np.zeros((len(ids), len(LEVELS)), bool)
    for patient, row in zip(where, rows, strict=True):
        for subgroup, of in says.items():
            if (level := of(cohort.records[row])) is not None:
                member[patient, PLACE[subgroup, level]] = True
    for subgroup, levels in SUBGROUPS.items():
        own = [PLACE[subgroup, level] for level in levels]
        member[np.ix_(member[:, own].sum(axis=1) > 1, own)] = False
    found = np.repeat(member[:, None], cohort.labels.shape[1], axis=1)
    severity = np.full(found.shape[:2], -np.inf)
    np.maximum.at(severity, where, np.where(cohort.labels[rows] == 1, cohort.severities[rows], -np.inf))
    absent = np.ones(found.shape[:2], bool)
    np.logical_and.at(absent, where, cohort.labels[rows] != 1)
    grades = SUBGROUPS[SEVERITY]
    grade = np.minimum(np.floor(severity * len(grades)), len(grades) - 1)
    for number, level in enumerate(grades):
        found[..., PLACE[SEVERITY, level]] = absent | (grade == number)
    return found
