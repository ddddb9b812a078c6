"""Who is one patient: IDs in every spelling, placeholders, fallbacks, and IDs that an operator joins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from client.dicom.index import SliceRecord, pseudonym
from client.dicom.patients import (
    AS_WRITTEN,
    NEW_SITE_JOIN,
    PatientRule,
    alike,
    is_placeholder,
    named_by,
    of_several_people,
    readings,
    under_key,
    without_id,
)
from tests.helpers.slice_record import RECORD

KEY = bytes(range(32))


def header(patient_id: str = "", encoding: str = "utf-8", **more: Any) -> dict[str, Any]:
    raw = patient_id.encode(encoding).decode("latin-1").strip(" \0\t\r\n")
    values = {
        "patient_id": raw,
        "patient_key": f"PatientID:{raw}" if raw else "StudyInstanceUID:1.2.3",
        "patient_name": "",
        "charset": "",
        "birth_date": "",
        "sex": "",
        "issuer": "",
        "study_uid": "1.2.3",
        "series_uid": "1.2.3.4",
    }
    return values | more


def record(
    patient_id: str = "", encoding: str = "utf-8", rule: PatientRule = AS_WRITTEN, **more: Any
) -> SliceRecord:
    read = header(patient_id, encoding, **more)
    return replace(RECORD, patient=pseudonym(named_by(read, rule)[1], KEY), **under_key(read, KEY, rule))


def test_without_a_rule_every_patient_keeps_the_pseudonym(  # of sites made before there were rules
) -> None:
    for patient_id in ("P1", "00100", "abc1", "病人7", "UNKNOWN", ""):
        read = header(patient_id)
        assert named_by(read, AS_WRITTEN)[1] == read["patient_key"]


SAME = {
    "zeros": ("00100", "100"),
    "case": ("ABC1", "abc1"),
    "width": ("ABC１", "ABC1"),
    "spaces": ("AB C1", "ABC1"),
    "issuer": ("100^^^CLINIC", "100^^^OTHER"),
}


@pytest.mark.parametrize("difference", SAME)
def test_ids_that_differ_in_writing_are_listed_and_joined_when_the_operator_says_so(difference: str) -> None:
    first, second = SAME[difference]
    assert alike([record(first), record(second), record("X-9")]) == [
        tuple(sorted({record(first).patient, record(second).patient}))
    ]
    rule = PatientRule(join=(difference,))
    assert record(first, rule=rule).patient == record(second, rule=rule).patient
    assert not alike([record(first, rule=rule), record(second, rule=rule)])
    others = PatientRule(join=tuple(set(SAME) - {difference}))
    assert record(first, rule=others).patient != record(second, rule=others).patient


def test_one_id_in_two_character_sets() -> None:
    spellings = [
        ("utf-8", ""),
        ("utf-8", "ISO_IR 192"),
        ("gb18030", "GB18030"),
        ("gb18030", ""),
        ("gb18030", "ISO_IR 100"),  # as it is often declared
    ]
    plain = [record("张三-7", encoding, charset=charset) for encoding, charset in spellings]
    assert len({one.patient for one in plain}) == 2
    assert len(alike(plain)) == 1
    rule = PatientRule(join=("charset",))
    joined = {
        record("张三-7", encoding, rule=rule, charset=charset).patient for encoding, charset in spellings
    }
    assert joined == {plain[0].patient}, "the one in UTF-8 keeps its pseudonym"


def test_other_people_are_not_alike() -> None:
    ids = ("100", "1001", "010-1", "A100", "张三-7", "张四-7", "张丙-7", "ZHANG-7")
    assert not alike([record(one) for one in ids])
    assert not alike([record(one, "gb18030") for one in ("张三-7", "张四-7", "张丙-7")])
    rule = PatientRule(join=("zeros", *NEW_SITE_JOIN, "issuer"))
    assert len({record(one, rule=rule).patient for one in ids}) == len(ids)


def test_three_spellings_are_one_group() -> None:
    assert [len(group) for group in alike([record(one) for one in ("0012^^^A", "12", "１２")])] == [3]


@pytest.mark.parametrize(
    "text", ["ANONYMOUS", "anonymous", "Anonymous Patient", "0000", "0", "UNKNOWN", "unk", "N/A", "-", "...",
             "XXXX", "***", "99999", "ＵＮＫＮＯＷＮ", "匿名", "NONE", "de-identified", " null "],
)  # fmt: skip
def test_a_placeholder_names_nobody(text: str) -> None:
    assert is_placeholder(text)
    assert record(text).patient_origin == "placeholder"
    assert without_id([record(text)], AS_WRITTEN) == 1


@pytest.mark.parametrize("text", ["P0", "10", "007", "ANON-0017", "X1", "TEST-12", "99", "A", "病人7", "Z9"])
def test_a_pseudonym_is_no_placeholder(text: str) -> None:
    assert not is_placeholder(text)


def test_name_and_birth_date_stand_for_an_id() -> None:
    rule = PatientRule(fallback="name-and-birth-date")
    person = {"patient_name": "Li^Wei", "birth_date": "19700301"}
    spelt = ["Li^Wei", "LI^WEI", "li wei", "Ｌｉ^Wei ", "Li^Wei=李^伟"]
    assert len({record(rule=rule, **person | {"patient_name": name}).patient for name in spelt}) == 1
    assert record(rule=rule, **person).patient_origin == "person"
    other = record(rule=rule, **person | {"birth_date": "19700302"})
    assert other.patient != record(rule=rule, **person).patient
    assert record("UNKNOWN", rule=rule, **person).patient == record(rule=rule, **person).patient
    for lacking in (
        {"patient_name": ""},
        {"birth_date": ""},
        {"patient_name": "ANONYMOUS"},
        {"birth_date": "19000101"},
    ):
        one = record(rule=rule, **person | lacking)
        assert without_id([one], rule) == 1, lacking
    assert rule.unit == "patient"


def test_the_study_stands_for_an_id_and_is_the_unit() -> None:
    rule = PatientRule(fallback="study")
    one = record(rule=rule)
    assert (one.patient, one.patient_origin) == (record().patient, "study")  # as before there were rules
    assert record("UNKNOWN", rule=rule).patient == one.patient
    assert without_id([one], rule) == 0
    assert rule.unit == "study"
    no_study = record(rule=rule, study_uid="", patient_key="SeriesInstanceUID:1.2.3.4")
    assert without_id([no_study], rule) == 1, "the series would be a weaker unit than the stated one"


def test_two_people_under_one_id_are_seen_by_birth_date_or_sex() -> None:
    first = record("P1", birth_date="19700301", sex="M")
    assert not of_several_people([first, record("P1", birth_date="19700301"), record("P1", sex="M")])
    assert of_several_people([first, record("P1", birth_date="19700302")]) == {first.patient}
    assert of_several_people([first, record("P1", sex="F")]) == {first.patient}
    assert not of_several_people([first, record("P1", birth_date="19000101", sex="O")])


def test_what_the_cache_keeps_of_a_patient_is_keyed() -> None:
    kept = str(under_key(header("MARKER-4711", birth_date="19700301", sex="M"), KEY, AS_WRITTEN))
    for secret in ("MARKER", "4711", "1970", "'M'"):
        assert secret not in kept


def test_iso_2022_is_read_as_declared() -> None:
    assert readings("\x1b$)A\x0e" + "ID", "ISO 2022 IR 58")
    japanese = "\x1b$B;3ED\x1b(B1"
    assert readings(japanese, "\\ISO 2022 IR 87")[0] == "山田1"


@pytest.mark.parametrize(
    "charset", ["X\x1b[2J\x1b]0;x\x07", "iso-ir-1\nfedqc: error", "ISO 2022 IR 13\\\x1b[8m"]
)
def test_a_character_set_that_nobody_knows_is_not_quoted(
    charset: str, recwarn: pytest.WarningsRecorder
) -> None:
    assert readings("M\xfcller", charset)
    assert not recwarn.list
