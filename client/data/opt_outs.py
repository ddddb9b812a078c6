"""Read a list of patients who opted out, as hospitals save it.

    text        UTF-8, UTF-16 with or without a byte order mark, or GB 18030; one ID a line
    CSV         comma, semicolon, tab or | between the columns; a header that names the column of the IDs
    workbook    .xlsx, first sheet, likewise

A comment begins with # at the start of a line or after a space. Quotation marks, bullets, and the ="001230"
with which spreadsheets keep zeros, are taken off. Where a line may be understood in two ways (an ID with a
space in it, or two IDs), both count: to leave out one patient too many harms nobody. Whatever cannot be read
as a list of IDs is refused, with the number of the line and without its text: a patient who opted out must
not be used because a list was not understood.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from client.labels.spreadsheet import Cell, NumberText, is_workbook, read_pages
from common.errors import ConfigError, DataError

MAX_LIST_BYTES = 16 << 20
MAX_ID_CHARACTERS = 64  # of an LO, PS3.5 6.2
_HINT = "one PatientID a line, or a CSV or .xlsx file with a column PatientID; docs/data.md"
_ID_TITLES = frozenset(
    """
    patientid patid pid id mrn patient patientidentifier patientnumber patientno patientnr patientnummer
    patientenid patientennummer patidentifier medicalrecordnumber medicalrecordno recordnumber hospitalnumber
    hospitalno hospitalid unitnumber caseid caseno subject subjectid participantid idpatient idpaciente nhc
    ipp dicompatientid 00100020 患者id 患者编号 患者号 患者标识 病人id 病人编号 病人号 病历号 病案号 住院号
    门诊号 登记号 就诊卡号 影像号 患者番号 환자번호
    pseudonym pseudonymid patientpseudonym pseudonyme pseudoid anonymid anonymizedid deidentifiedid
    studysubjectid identifiantpatient numeropatient iddopaciente idpatiënt
    """.split()  # noqa: SIM905
)
_VAGUE = frozenset({"id", "patient", "subject"})
_OTHER_TITLES = frozenset(
    """
    date name comment reason remark remarks note notes optout optedout optoutdate datum bemerkung grund 日期
    姓名 备注 原因 序号 no nr number row
    """.split()  # noqa: SIM905
)
_DATE = re.compile(r"\d{4}[-/.年]\d{1,2}[-/.月]\d{1,2}日?.*|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}.*")
_EXPONENT = re.compile(r"\d([.,]\d+E\+?|E\+)\d+", re.IGNORECASE)  # a spreadsheet's, of a long number
_COMMENT = re.compile(r"(^|\s)#.*$", re.DOTALL)
_DELIMITERS = "\t;,|"
_WIDE_DELIMITERS = str.maketrans("；，、｜", ";;;;")  # in no ID
_NUMBERING = re.compile(r"^\d{1,4}[.)]\s+(?=\S)")
_THOUSANDS = re.compile(r"\d{1,3}([,.' ]\d{3})+")
_FRACTION = re.compile(r"(\d+)[.,]0+")  # a number that a program wrote as one with a fraction
_NO_ID = frozenset('<>{}"%')  # of markup and programs, in no ID
_MAX_TITLE_ROWS = 10
_MIN_ZEROS_OF_UTF16 = 0.3  # the share of zero bytes at every second place


def read_opt_outs(path: Path) -> list[tuple[str, ...]]:
    """The entries of an opt-out list, in its order: of each the ID, and other texts that it may be, where the
    character set is not certain or a comment may follow the ID.

    Raises:
        ConfigError: `bad-cohort` (cannot be read), `bad-opt-out` (cannot be decoded, or a line holds no ID).
    """
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise _refused(path, f"larger than {MAX_LIST_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}", code="bad-cohort") from None
    if is_workbook(content):
        return _entries(_of_workbook(path), path)
    text, is_certain = _decoded(content, path)
    entries = _entries(_rows_of(text, path), path)
    if is_certain:
        return entries
    return [(*entry, *(one.encode("gb18030").decode("latin-1") for one in entry)) for entry in entries]


def is_patient_id(text: str) -> bool:
    """Whether a text may be a PatientID: at most 64 characters on one line, with a letter or a digit. Several
    words without a digit are a sentence, and a name in the form of DICOM is no ID.
    """
    plain = text.strip()
    return (
        0 < len(plain) <= MAX_ID_CHARACTERS
        and all(unicodedata.category(letter) not in ("Cc", "Cs", "Co", "Cn") for letter in plain)
        and any(letter.isalnum() for letter in plain)
        and "�" not in plain
        and _NO_ID.isdisjoint(plain)
        and (any(letter.isdigit() for letter in plain) or "^" not in plain)  # Last^First is a name
        and (len(plain.split()) == 1 or any(letter.isdigit() for letter in plain))
        and not _EXPONENT.fullmatch(plain)
    )


def _decoded(content: bytes, path: Path) -> tuple[str, bool]:
    """The text, and whether its character set is certain: GB 18030 may also be a Latin one."""
    encoding = next(
        (
            name
            for mark, name in (
                (b"\xff\xfe\0\0", "utf-32"),
                (b"\0\0\xfe\xff", "utf-32"),
                (b"\xff\xfe", "utf-16"),
                (b"\xfe\xff", "utf-16"),
                (b"\xef\xbb\xbf", "utf-8-sig"),
            )
            if content.startswith(mark)
        ),
        "",
    )
    if not encoding and b"\0" in content:  # digits in UTF-16 are half zeros
        odd, even = content[1::2].count(0), content[::2].count(0)
        if content.isascii() and max(odd, even) < _MIN_ZEROS_OF_UTF16 * len(content) / 2:
            raise _refused(path, "is no text")
        encoding = "utf-16-le" if odd > even else "utf-16-be"
    is_certain = True
    try:
        text = content.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        if encoding:
            raise _refused(path, "is not the text that its first bytes say") from None
        try:
            text, is_certain = content.decode("gb18030"), False
        except UnicodeDecodeError:
            raise _refused(path, "is neither UTF-8, UTF-16 nor GB 18030 text nor an .xlsx workbook") from None
    strange = "\t\r\n\f\x1a"
    if any((letter < " " and letter not in strange) or letter == "�" for letter in text):
        raise _refused(path, "is no text")
    return text, is_certain


def _rows_of(text: str, path: Path) -> list[list[str]]:
    plain = text.replace("\x1a", "").replace("\f", "").translate(_WIDE_DELIMITERS)
    lines = re.split(r"\r\n|[\r\n\x85\u2028\u2029]", plain)
    kept = [_COMMENT.sub("", line) for line in lines]
    if kept and re.fullmatch(r"\s*\"?sep=.\"?\s*", kept[0], re.IGNORECASE):
        kept[0] = ""
    filled = [line.strip() for line in kept if line.strip()]
    delimiter = next((one for one in _DELIMITERS if filled and one in filled[0]), "")
    if not delimiter:
        delimiter = next((one for one in _DELIMITERS if any(one in line for line in filled)), "")
    if not delimiter:
        return [[line] for line in kept]
    return [
        _cells_of(line, plain, delimiter, number, path)
        for number, (line, plain) in enumerate(zip(lines, kept, strict=True), start=1)
    ]


def _cells_of(line: str, without_comment: str, delimiter: str, number: int, path: Path) -> list[str]:
    """One line of CSV. A quotation mark that is not closed would hide the lines that follow: it is refused,
    and so is a cell of several lines.
    """
    for text in dict.fromkeys((without_comment, line)):  # what looks like a comment may stand in quotes
        try:
            return next(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
    raise _refused(
        path, f"is no CSV that can be read: line {number}, quotation marks or a cell of several lines"
    )


def _of_workbook(path: Path) -> list[list[str]]:
    try:
        filled = [grid for grid in (read_pages(path) or {}).values() if any(any(row) for row in grid)]
    except DataError as error:
        raise _refused(path, f"is no workbook that can be read [{error.code}]") from None
    if len(filled) > 1:
        raise _refused(path, "has several sheets that are not empty")
    # a date or a formula in place of an ID is refused below; in another column it does not matter
    return [["\0" if _is_spoilt(cell) else str(cell) for cell in row] for grid in filled for row in grid]


def _is_spoilt(cell: Cell) -> bool:
    """Whether a cell is a date, a formula, an error or a truth value."""
    return not isinstance(cell, str) or (isinstance(cell, NumberText) and not _holds_digit(cell))


def _entries(rows: Sequence[Sequence[str]], path: Path) -> list[tuple[str, ...]]:
    table = [(number, _cells(row)) for number, row in enumerate(rows, start=1)]
    table = [(number, cells) for number, cells in table if cells]
    if not table:
        return []
    heading = next((place for place, (_, cells) in enumerate(table) if _id_columns(cells)), len(table))
    above = [cell for _, cells in table[:heading] for cell in cells]
    if heading < min(len(table), _MAX_TITLE_ROWS) and not any(map(_holds_digit, above)):
        columns = _id_columns(table[heading][1])
        table = table[heading + 1 :]
    elif max(len(cells) for _, cells in table) == 1:
        columns, first = [0], table[0][1][0]
        if _title(first) in _OTHER_TITLES and len(table) > 1:
            raise _refused(path, "has one column, whose title is not that of an ID")
        if not _holds_digit(first) and (
            any(_holds_digit(cells[0]) for _, cells in table) or not is_patient_id(first)
        ):
            table = table[1:]  # a heading
    else:
        table, column = _without_header(table, path)
        columns = [column]
    with_digits = any(
        _holds_digit(cells[place]) for _, cells in table for place in columns if place < len(cells)
    )
    found: list[tuple[str, ...]] = []
    for number, cells in table:
        named = [cells[column] for column in columns if column < len(cells) and cells[column]]
        ids = [cell for cell in named if is_patient_id(cell)]
        if not ids or (with_digits and not any(map(_holds_digit, ids))):  # a name or a word among numbers
            raise _refused(path, f"line {number} holds no PatientID")
        found.append(tuple(dict.fromkeys(text for cell in ids for text in _meanings(cell))))
    return found


def _id_columns(cells: Sequence[str]) -> list[int]:
    """The columns whose titles are those of an ID, the most certain first. A column "ID" beside another one
    of these numbers the rows.
    """
    titles = [_title(cell) for cell in cells]
    named = [place for place, title in enumerate(titles) if title in _ID_TITLES]
    certain = [place for place in named if titles[place] != "id"]
    return sorted(
        certain or named, key=lambda place: (not titles[place].endswith("patientid"), titles[place] in _VAGUE)
    )


def _meanings(cell: str) -> list[str]:
    """The texts that an ID on a list may stand for, the likeliest first: as it stands, without bullet or
    number before it, each of its words with a digit, and a number without what a spreadsheet adds.
    """
    plain = _NUMBERING.sub("", cell).lstrip("-+*•·‣▪●○◦–—→>= ").strip() or cell
    texts = [plain, cell]
    words = plain.split()
    if len(words) > 1:  # a comment, or another ID, may stand behind the ID
        texts += [word.strip("/,;:()[]") for word in words if _holds_digit(word)]
    if _THOUSANDS.fullmatch(plain):
        texts.append(re.sub(r"\D", "", plain))
    if whole := _FRACTION.fullmatch(plain):
        texts.append(whole[1])
    return [text for text in texts if is_patient_id(text)] or [cell]


def _without_header(
    table: list[tuple[int, list[str]]], path: Path
) -> tuple[list[tuple[int, list[str]]], int]:
    """The rows and the column of the IDs where no title names it: the only column that may hold IDs."""
    if not any(map(_holds_digit, table[0][1])) and len(table) > 1:
        table = table[1:]
    width = max(len(cells) for _, cells in table)
    columns = [[cells[place] if place < len(cells) else "" for _, cells in table] for place in range(width)]
    may_be = [
        place
        for place, column in enumerate(columns)
        if all(is_patient_id(cell) and len(cell.split()) == 1 for cell in column)
        and any(letter.isdigit() for letter in "".join(column))
        and not all(_DATE.fullmatch(cell) for cell in column)
    ]
    if len(may_be) != 1:
        raise _refused(path, "has several columns, and no title says which holds the PatientIDs")
    return table, may_be[0]


def _holds_digit(cell: str) -> bool:
    return any(letter.isdigit() for letter in cell)


def _title(cell: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFKC", cell).casefold() if letter.isalnum())


def _cells(row: Sequence[str]) -> list[str]:
    """The cells of a row, without empty ones at its end."""
    cells = [_cleaned(cell) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _cleaned(cell: str) -> str:
    """A cell without comment, quotation marks and what a spreadsheet puts around it."""
    plain = _COMMENT.sub("", cell.replace("﻿", "")).strip()
    plain = re.sub(r'^="?(.*?)"?$', r"\1", plain) if plain.startswith("=") else plain
    for opening, closing in ('""', "''", "“”", "‘’", "„“", "«»", "＂＂"):
        if len(plain) > 1 and plain.startswith(opening) and plain.endswith(closing):
            plain = plain[1:-1].strip()
    return plain.lstrip("'’").strip()


def _refused(path: Path, problem: str) -> ConfigError:
    return ConfigError(f"{path}: the opt-out list {problem}", code="bad-opt-out", hint=_HINT)
