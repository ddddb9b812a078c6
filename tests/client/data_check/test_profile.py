"""A profile counts patients, knows no free text, and moves when the data do and not otherwise."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data_check import vocabulary
from client.data_check.profile import (
    ALARMING,
    Acquisition,
    Move,
    Profile,
    keep_profile,
    moves,
    profile_path,
    read_profile,
)
from client.dicom.index import SliceRecord
from common.errors import DataError
from tests.helpers.slice_record import RECORD

KEY = bytes(range(32))
CT = replace(
    RECORD,
    modality="CT",
    kvp=120.0,
    kernel="B30f",
    sequence="",
    field_strength_t=None,
    slice_thickness_mm=5.0,
)


def cohort(
    base: SliceRecord, patients: int, *, seed: int = 0, prefix: str = "p", shift: float = 0.0, **changes: Any
) -> Acquisition:
    draw = np.random.default_rng(seed)
    records = [replace(base, patient=f"{prefix}{number}", **changes) for number in range(patients)]
    measures = [[*draw.normal((shift, 400, 1), (50, 40, 0.1)).tolist(), "0" * 16] for _ in records]
    return Acquisition(records, measures, KEY)


def judged(trained: Acquisition, now: Acquisition) -> dict[str, Move]:
    before = trained.profile()
    return {move.field: move for move in moves(before, now.profile(like=before))}


def test_a_patient_counts_once() -> None:
    records = [
        CT,
        *(replace(CT, patient="q", manufacturer="Philips") for _ in range(9)),
        replace(CT, patient="q"),
    ]
    profile = Acquisition(records, [[0.0, 1.0, 1.0, "0" * 16]] * 11, KEY).profile()
    assert profile.modalities["CT"].patients == 2
    assert profile.modalities["CT"].words["vendor"] == {
        "Siemens": pytest.approx(1.1),
        "Philips": pytest.approx(0.9),
    }
    assert set(profile.modalities["CT"].words) == {"vendor", "model", "kvp", "kernel"}


def test_the_same_data_are_steady() -> None:
    found = judged(cohort(CT, 80), cohort(CT, 80))
    assert {move.verdict for move in found.values()} == {"steady"}
    assert all(move.psi == 0 and move.shifted == 0 for move in found.values())


@pytest.mark.parametrize("seed", range(1, 9))
@pytest.mark.parametrize("patients", [5, 30, 300])
def test_other_patients_of_the_same_kind_are_no_alarm(seed: int, patients: int) -> None:
    found = judged(cohort(CT, 100), cohort(CT, patients, seed=seed))
    assert not [move for move in found.values() if move.verdict == "alarming"]


def test_what_moved_is_named_and_by_how_much() -> None:
    now = cohort(
        CT, 60, seed=3, shift=150.0, kvp=80.0, manufacturer="Neusoft Medical", slice_thickness_mm=1.0
    )
    found = judged(cohort(CT, 100), now)
    alarming = {field for field, move in found.items() if move.verdict == "alarming"}
    assert alarming == {"kvp", "vendor", "mean", "slice_thickness_mm"}
    assert (found["kvp"].before, found["kvp"].now, found["kvp"].shifted) == ("120 100%", "80 100%", 1.0)
    assert found["kvp"].new == (("80", 1.0),)
    assert found["slice_thickness_mm"].now.startswith("1 (")
    assert found["kernel"].verdict == "steady"


def test_psi_by_hand() -> None:
    """100 patients at 120 kV; then 60 there and 40 at 80. Half a patient is added to each bin."""
    records = [replace(CT, patient=f"n{number}", kvp=120.0 if number < 60 else 80.0) for number in range(100)]
    move = judged(cohort(CT, 100), Acquisition(records, [[0.0, 1.0, 1.0, "0" * 16]] * 100, KEY))["kvp"]
    old, new = (100.5 / 101, 0.5 / 101), (60.5 / 101, 40.5 / 101)
    assert move.psi == pytest.approx(sum((q - p) * math.log(q / p) for p, q in zip(old, new, strict=True)))
    assert move.shifted == pytest.approx(0.4)
    assert (move.verdict, move.psi > ALARMING) == ("alarming", True)


def test_a_few_patients_are_not_enough_for_an_alarm() -> None:
    assert judged(cohort(CT, 100), cohort(CT, 1, kvp=80.0))["kvp"].psi > ALARMING
    records = [replace(CT, patient=f"n{number}", kvp=140.0 if number % 2 else 120.0) for number in range(100)]
    mixed = Acquisition(records, [[0.0, 1.0, 1.0, "0" * 16]] * 100, KEY)
    assert judged(mixed, cohort(CT, 2, kvp=120.0))["kvp"].verdict == "steady"
    assert judged(mixed, cohort(CT, 50, kvp=120.0))["kvp"].verdict == "alarming"


def test_another_modality_is_seen() -> None:
    found = judged(cohort(CT, 50), cohort(RECORD, 50))
    assert found["modality"].verdict == "alarming"
    assert set(found) == {"modality"}


def test_headers_that_say_nothing_are_counted_and_not_lost() -> None:
    found = judged(cohort(CT, 50), cohort(CT, 50, kvp=None, slice_thickness_mm=None))
    assert found["kvp"].now == "not stated 100%"
    assert found["slice_thickness_mm"].verdict == "alarming"


def test_a_profile_comes_back_from_the_disk(tmp_path: Path) -> None:
    profile = cohort(RECORD, 30, echo_time_ms=None).profile()
    path = profile_path(tmp_path, "ab")
    keep_profile(path, profile, ["b", "a", "a"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again, patients = read_profile(path)
    assert patients == {"a", "b"}
    assert {move.verdict for move in moves(again, profile)} == {"steady"}
    before = path.stat().st_mtime_ns
    keep_profile(path, profile, ["a", "b"])
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: [],
        lambda value: value | {"format": 0},
        lambda value: value | {"patients": None},
        lambda value: (
            value | {"profile": {"patients": 1, "modalities": {"XX": value["profile"]["modalities"]["CT"]}}}
        ),
        lambda value: json.loads(json.dumps(value).replace('"kvp"', '"kv"')),
        lambda value: json.loads(json.dumps(value).replace('"Siemens"', '"\\u001b[2J"')),
        lambda value: json.loads(json.dumps(value).replace('"weights": [', '"weights": [7, ')),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "profile.json"
    keep_profile(path, cohort(CT, 3).profile(), [])
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(DataError) as caught:
        read_profile(path)
    assert caught.value.code == "bad-profile"
    assert caught.value.hint


def test_a_profile_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_profile(tmp_path / "profile.json")
    assert caught.value.code == "no-profile"


# words


@pytest.mark.parametrize(
    ("find", "text", "expected"),
    [
        (vocabulary.vendor, "SIEMENS", "Siemens"),
        (vocabulary.vendor, "Siemens Healthineers", "Siemens"),
        (vocabulary.vendor, "GE MEDICAL SYSTEMS", "GE"),
        (vocabulary.vendor, "GE", "GE"),
        (vocabulary.vendor, "Gerhard", None),
        (vocabulary.vendor, "Philips and Neusoft", "Neusoft"),
        (vocabulary.vendor, "", None),
        (vocabulary.model, "Biograph40_mCT 4R", "Biograph40"),
        (vocabulary.model, "uMR 770", "uMR 770"),
        (vocabulary.model, "TrioTim of Dr Wang", "TrioTim"),
        (vocabulary.model, "Wang", None),
        (vocabulary.kernel, "Br38f\\3", "Br38"),
        (vocabulary.kernel, "STANDARD", "STANDARD"),
        (vocabulary.kernel, "Standard Wang", None),
        (vocabulary.sequence, "GR\\IR SK\\SP\\MP\\OSP tfl3d1_35", "GR/IR SK/SP/MP/OSP"),
        (vocabulary.sequence, "WANG", None),
    ],
)
def test_words(find: Any, text: str, expected: str | None) -> None:
    assert find(text) == expected


def test_unknown_texts_stay_apart_and_unreadable() -> None:
    said = {vocabulary.said("model", replace(RECORD, model=text), KEY) for text in ("Wang", "Li", "Wang")}
    assert len(said) == 2
    assert all(len(word) == len("other-") + 4 and word.startswith("other-") for word in said)
    assert vocabulary.said("model", replace(RECORD, model=""), KEY) == "not stated"
    assert vocabulary.said("model", replace(RECORD, model="Wang"), bytes(32)) not in said


def test_a_profile_of_nobody() -> None:
    nobody = Acquisition([], [], KEY).profile()
    assert nobody == Profile(modalities={}, patients=0)
