"""Which patients are in which subgroup: words of a fixed list, by what all slices of a patient say."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client.data.subgroups import subgroups_of
from client.dicom.patients import keyed
from common.subgroups import LEVELS, PLACE, SUBGROUPS
from tests.helpers.slice_record import RECORD

KEY = b"k" * 32
NOTHING: dict[str, Any] = {"manufacturer": "", "field_strength_t": None, "kvp": None, "body_part": ""}
BLANK = replace(RECORD, patient="1", **NOTHING)
SECRET = "Zhang San's scanner"


def levels_of(*records: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """Of each patient of slices without artifact the levels, but for the severity."""
    made = tuple(replace(BLANK, **one) for one in records)
    n = len(made)
    cohort = SimpleNamespace(
        records=made,
        patients=np.array([int(one.patient) for one in made]),
        labels=np.zeros((n, 1), np.float32),
        severities=np.full((n, 1), np.nan, np.float32),
    )
    found = subgroups_of(cohort, np.arange(n), KEY)  # type: ignore[arg-type]
    return [
        [level for level, is_in in zip(LEVELS, row[0], strict=True) if is_in and level[0] != "severity"]
        for row in found
    ]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"manufacturer": "SIEMENS Healthineers"}, ("vendor", "siemens")),
        ({"manufacturer": "GE MEDICAL SYSTEMS"}, ("vendor", "ge")),
        ({"manufacturer": "UIH"}, ("vendor", "united_imaging")),
        ({"manufacturer": "Hitachi"}, ("vendor", "other")),
        ({"manufacturer": SECRET}, ("vendor", "other")),
        ({"modality": "MR", "field_strength_t": 1.494}, ("field_strength", "1.5_t")),
        ({"modality": "MR", "field_strength_t": 2.8936}, ("field_strength", "3_t")),
        ({"modality": "MR", "field_strength_t": 0.55}, ("field_strength", "other")),
        ({"modality": "CT", "kvp": 80.0}, ("tube_voltage", "to_90_kv")),
        ({"modality": "CT", "kvp": 120.0}, ("tube_voltage", "111_to_130_kv")),
        ({"modality": "CT", "kvp": 140.0}, ("tube_voltage", "over_130_kv")),
        ({"body_part": "BRAIN"}, ("body_part", "head")),
        ({"body_part": "L-SPINE"}, ("body_part", "spine")),
        ({"body_part": "CHEST_TO_PELVIS"}, ("body_part", "chest")),
        ({"body_part": SECRET}, ("body_part", "other")),
        ({"sex": keyed("sex", "F", KEY)}, ("sex", "female")),
        ({"sex": keyed("sex", "M", KEY)}, ("sex", "male")),
        ({"age_years": 19.9}, ("age", "under_20")),
        ({"age_years": 20.0}, ("age", "20_to_39")),
        ({"age_years": 93.0}, ("age", "80_and_over")),
    ],
)
def test_a_header_says_a_word_of_the_list(header: dict[str, Any], expected: tuple[str, str]) -> None:
    assert levels_of({"patient": "1", **header}) == [[expected]]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"manufacturer": " "},
        {"modality": "CT", "field_strength_t": 3.0},
        {"modality": "MR", "kvp": 120.0},
        {"sex": keyed("sex", "F", b"another site's key")},
    ],
)
def test_a_header_that_says_nothing_is_in_no_level(header: dict[str, Any]) -> None:
    assert levels_of({"patient": "1", **header}) == [[]]


def test_a_patient_whose_slices_contradict_one_another_is_in_no_level() -> None:
    siemens, ge = {"manufacturer": "SIEMENS"}, {"manufacturer": "GE"}
    one, two = {"patient": "1"}, {"patient": "2"}
    assert levels_of(one | siemens, two | siemens, one | ge, two) == [[], [("vendor", "siemens")]]


def test_a_severity_has_the_patients_of_its_own_and_all_without() -> None:
    nan = np.nan
    labels, severities = [1, 1, 1, 1, 0, 1, nan], [0.2, 0.5, 0.9, nan, nan, 1.0, nan]
    patients = ["1", "2", "3", "4", "5", "2", "6"]
    made = tuple(replace(BLANK, patient=one) for one in patients)
    cohort: Any = SimpleNamespace(
        records=made,
        patients=np.array([int(one) for one in patients]),
        labels=np.array(labels, np.float32)[:, None],
        severities=np.array(severities, np.float32)[:, None],
    )
    found = subgroups_of(cohort, np.arange(len(made)), KEY)[:, 0]
    own = {level: found[:, PLACE["severity", level]].tolist() for level in SUBGROUPS["severity"]}
    assert own == {  # of patient 2 the highest counts; 4 has no severity; 6 is not assessed, and not counted
        "mild": [True, False, False, False, True, True],
        "moderate": [False, False, False, False, True, True],
        "severe": [False, True, True, False, True, True],
    }
