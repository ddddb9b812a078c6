"""An opt-out list opts out whom it names, however it was saved, or is refused; it never passes unread."""

from __future__ import annotations

import codecs
from dataclasses import replace
from pathlib import Path

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data.inclusion import read_admission
from client.data.opt_outs import read_opt_outs
from client.dicom.index import SliceRecord, pseudonym
from client.dicom.patients import forms_of
from common.errors import ConfigError
from tests.helpers.slice_record import RECORD

KEY = bytes(range(32))
LISTED = ("001230", "AbC-7", "病人5")
OTHER = "SECRET-9"


def record(patient_id: str, encoding: str = "utf-8", charset: str = "") -> SliceRecord:
    raw = patient_id.encode(encoding).decode("latin-1")
    exact, near = forms_of(raw, charset, KEY)
    return replace(
        RECORD,
        patient=pseudonym(f"PatientID:{raw}", KEY),
        patient_origin="id",
        patient_forms=exact,
        patient_near=near,
    )


def opted_out(folder: Path, content: bytes, *records: SliceRecord) -> list[bool]:
    (folder / "out.csv").write_bytes(content)
    (folder / "cohort.yaml").write_text("opt_out_file: out.csv\n")
    admission = read_admission(folder, KEY)
    assert not admission.has_opted_out(record(OTHER)), "a patient who is not on the list"
    return [admission.has_opted_out(one) for one in records]


PLAIN = "\n".join(LISTED)
HEADED = "\r\n".join(
    ["PatientID;Date;Note", *(f"{one};2024-01-0{n};by phone" for n, one in enumerate(LISTED))]
)
LISTS = {
    "one a line": PLAIN,
    "header": "PatientID\n" + PLAIN,
    "a heading of our own": "Withdrawn patients\n" + PLAIN,
    "Chinese header": "患者编号\n" + PLAIN,
    "semicolons": HEADED,
    "commas": HEADED.replace(";", ","),
    "tabs": HEADED.replace(";", "\t"),
    "ID in the last column": "\n".join(["No,Name,MRN", *(f"{n},X Y,{one}" for n, one in enumerate(LISTED))]),
    "unknown title": "\n".join(["Fallnr.;Datum", *(f"{one};01.02.2024" for one in LISTED)]),
    "no title": "\n".join(f"{one};01.02.2024" for one in LISTED[:1] + LISTED[1:]),
    "sep=": "sep=;\n" + HEADED,
    "CR": PLAIN.replace("\n", "\r"),
    "blank lines and spaces": "\n\n  " + PLAIN.replace("\n", "  \n\n\t") + "\n \n",
    "quotes": "\n".join(f'"{one}"' for one in LISTED),
    "Excel text": "\n".join(f'="{one}"' for one in LISTED),
    "Excel text in CSV": "PatientID,Date\n" + "\n".join(f'"=""{one}""",2024-01-01' for one in LISTED),
    "an apostrophe": "\n".join(f"'{one}" for one in LISTED),
    "comments": "# opted out, 2024\n" + "\n".join(f"{one}  # by phone, 3; May" for one in LISTED),
    "words behind": "\n".join(f"{one} (withdrew 2024)" for one in LISTED),
    "another case": PLAIN.swapcase(),
    "full width": "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in PLAIN),
    "no-break and ideographic space": "\n".join(f"　{one}\N{NO-BREAK SPACE}" for one in LISTED),
    "trailing separators": "\n".join(f"{one};;" for one in LISTED),
    "names first": "\n".join(["Last^First,PatientID", *(f"Doe^J,{one}" for one in LISTED)]),
    "bullets": "\n".join(f"• {one}" for one in LISTED),
    "hyphens, as in YAML": "\n".join(f"- {one}" for one in LISTED),
    "numbers before": "\n".join(f"{n}. {one}" for n, one in enumerate(LISTED, start=1)),
    "full-width separators": "\n".join(f"{one}；退出，电话" for one in LISTED),
    "line separators": "\N{LINE SEPARATOR}".join(LISTED),
    "a title above": "Withdrawn patients\nPatientID\n" + PLAIN,
    "a title above columns": "Withdrawn patients;\n;\n" + HEADED,
    "an MRN beside it": "\n".join(["MRN,Patient ID", *(f"M{n},{one}" for n, one in enumerate(LISTED))]),
    "an ID of rows": "\n".join(["ID,MRN", *(f"{n},{one}" for n, one in enumerate(LISTED))]),
    "a comment in quotes": "PatientID,Note\n" + "\n".join(f'{one},"phone # 3"' for one in LISTED),
    "two on a line": f"{LISTED[0]} {LISTED[1]}\n{LISTED[2]} / X9\nX10",
    "written as fractions": "\n".join(["PatientID", *LISTED[1:], "001230.0"]),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "be with mark"]
)
def test_whoever_is_listed_is_opted_out(tmp_path: Path, name: str, encoding: str) -> None:
    text = LISTS[name]
    content = (
        codecs.BOM_UTF16_BE + text.encode("utf-16-be")
        if encoding == "be with mark"
        else text.encode(encoding)
    )
    headers = [*map(record, LISTED), record("病人5", "gb18030"), record("病人5", "gb18030", "GB18030")]
    assert opted_out(tmp_path, content, *headers) == [True] * 5
    assert read_admission(tmp_path, KEY).listed in (3, 4)  # a heading may be counted


@pytest.mark.parametrize("header", [" 001230 ", "００１２３０", "001230\0"])
def test_the_header_may_be_the_one_that_is_written_otherwise(tmp_path: Path, header: str) -> None:
    assert opted_out(tmp_path, b"001230\n", record(header)) == [True]


def test_latin_and_declared_character_sets(tmp_path: Path) -> None:
    cyrillic = record("Ж-17", "iso8859-5", "ISO_IR 144")
    assert opted_out(tmp_path, "Müller-7\nЖ-17".encode(), record("MÜLLER-7", "latin-1"), cyrillic) == [
        True,
        True,
    ]
    assert opted_out(tmp_path, "Müller-7\nA1".encode("cp1252"), record("Müller-7", "latin-1")) == [True]


@pytest.mark.parametrize("sheet", ["text", "numbers"])
def test_a_workbook(tmp_path: Path, sheet: str) -> None:
    book = openpyxl.Workbook()
    page = book.worksheets[0]
    page.append(["Name", "Patient ID"])
    page.append(["X Y", "001230" if sheet == "text" else 81230])
    book.save(tmp_path / "out.csv")  # whatever its name says
    header = record("001230" if sheet == "text" else "81230")
    assert opted_out(tmp_path, (tmp_path / "out.csv").read_bytes(), header) == [True]


def test_a_number_with_separators_of_thousands_is_the_number(tmp_path: Path) -> None:
    assert opted_out(tmp_path, b'PatientID\n"81,230"\n"1,230,411"\n', record("81230"), record("1230411")) == [
        True,
        True,
    ]


def test_the_first_column_that_is_certain_counts_and_the_others_do_too(tmp_path: Path) -> None:
    content = b"Subject;MRN;PatientID\nS1;M1;001230\n;M2;\n"
    known = [record(one) for one in ("001230", "S1", "M1", "M2")]
    assert opted_out(tmp_path, content, *known) == [True] * 4
    assert read_admission(tmp_path, KEY).listed == 2


def test_lost_zeros_and_another_issuer_are_near_and_not_the_same(tmp_path: Path) -> None:
    near = [record(one) for one in ("001230", "1230^^^CLINIC", "12-30", "1230.0"[:4] + "^^^B&1.2&ISO")]
    assert opted_out(tmp_path, b"01230\n", *near) == [False] * 4
    admission = read_admission(tmp_path, KEY)
    assert [admission.is_near(one) for one in near] == [True] * 4
    assert not admission.is_near(record("1231"))


REFUSED = {
    "no text": b"\x93NUMPY\x01\0v\0{'descr': '<f8'}",
    "an old workbook": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "a damaged workbook": b"PK\x03\x04" + bytes(60),
    "half of UTF-16": codecs.BOM_UTF16_LE + "001230".encode("utf-16-le")[:-1],
    "a wrong byte": b"001230\n\xff\xff\xff\n",
    "a sentence": b"001230\nthe patient of Monday\n",
    "a row without ID": b"PatientID;Date\n001230;2024-01-01\n;2024-01-02\n",
    "two columns of IDs": b"a;b\n1;001230\n2;001231\n",
    "a number that a spreadsheet shortened": b"PatientID\n1.23E+11\n",
    "only punctuation": b"001230\n---\n",
    "names": b"Name\nDoe^Jane\nRoe^Rick\n",
    "names without a title": b"Doe^Jane\nRoe^Rick\n",
    "a column of names": b"Name\nDoe\nRoe\n",
    "a word among numbers": b"PatientID,Date\n001230,2024-01-01\nTotal,1\n",
    "markup": b"<table><tr><td>001230</td></tr></table>",
    "a zero byte": b"001\x00230\n",
    "a quotation mark that is not closed": b'PatientID,Note\n001230,"by phone\nX1,a\nX2,b\n',
    "a cell of several lines": b'PatientID,Note\n001230,"by\nphone"\nX1,a\n',
    "too long": b"001230\n" + b"9" * 65,
    "a replacement character": "PatientID\n00\N{REPLACEMENT CHARACTER}1230".encode(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_and_names_nobody(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opted_out(tmp_path, REFUSED[name])
    assert (caught.value.code, caught.value.exit_status) == ("bad-opt-out", 2)
    assert "1230" not in caught.value.message + caught.value.hint


def test_a_truth_value_is_no_id(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.worksheets[0].append(["PatientID"])
    book.worksheets[0].append([True])
    book.save(tmp_path / "out.xlsx")
    with pytest.raises(ConfigError) as caught:
        read_opt_outs(tmp_path / "out.xlsx")
    assert caught.value.code == "bad-opt-out"


def test_a_workbook_with_a_second_list_or_a_spoilt_cell_is_refused(tmp_path: Path) -> None:
    for spoil in ("second", "formula"):
        book = openpyxl.Workbook()
        book.worksheets[0].append(["PatientID"])
        book.worksheets[0].append(["001230"])
        if spoil == "second":
            book.create_sheet().append(["001231"])
        else:
            book.worksheets[0].append(["=A2"])
        book.save(tmp_path / "out.csv")
        with pytest.raises(ConfigError, match="opt-out list"):
            opted_out(tmp_path, (tmp_path / "out.csv").read_bytes())


@pytest.mark.parametrize("text", ["opt_out_file:\n", 'opt_out_file: ""\n', "opt_out: ['the two of May']\n"])
def test_a_list_that_is_meant_and_not_given_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "cohort.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_admission(tmp_path, KEY)
    assert caught.value.code == "bad-cohort"
    assert "May" not in caught.value.message


def test_an_empty_list_lists_nobody(tmp_path: Path) -> None:
    assert opted_out(tmp_path, b"PatientID;Date\n", record("001230")) == [False]
    assert read_admission(tmp_path, KEY).listed == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_list_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any").write_bytes(content)
    entries, code = [], "bad-opt-out"
    try:
        entries = read_opt_outs(tmp_path / "any")
    except ConfigError as error:
        code = error.code
    assert code == "bad-opt-out"
    assert all(entry and entry[0].strip() for entry in entries)
