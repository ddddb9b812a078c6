"""Read a CSV or Excel file as rows of cells; problems are reported without the content of a cell.

CSV in UTF-8, UTF-16, GB 18030 or Windows-1252, separated by commas, semicolons or tabs, or an .xlsx workbook.
A workbook is opened within limits and for its values only: nothing in it is computed or followed, and a cell
that holds a formula is a problem, not a value.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any

from common.artifacts import NAMES
from common.errors import DataError

MAX_BYTES = 64 << 20
MAX_UNPACKED_BYTES = 256 << 20  # of all members of a workbook together
MAX_MEMBERS = 20_000  # a workbook of ours holds one picture a row
MAX_TEXT_BYTES = 256 << 10  # of one cell or tag: Excel holds 32 767 characters
MAX_TAGS = 8 << 20  # of all pages: two million cells
MAX_OTHER_TAGS = 200_000  # of styles, names and the like, each of which becomes an object
MAX_ROWS = 1 << 20  # what Excel holds
MAX_CELLS = 20 << 20  # a hostile row may claim 16 384 cells each
MAX_CHARACTERS = MAX_BYTES  # of all cells: those of a workbook may all point at one long text
MAX_LINES = 4 << 20  # of a CSV: an empty one takes 64 bytes of memory
# of what is read as a stream, or not at all
_OF_CELLS = ("xl/worksheets/", "xl/sharedStrings", "xl/drawings/")
_LONG_TEXT = re.compile(rb"[^<]{%d}" % MAX_TEXT_BYTES)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # in no text that a person typed
_EXACT = 1e15  # Excel keeps 15 digits: a longer number is not what was typed


class Spoilt(Enum):
    """A cell that a spreadsheet turned into something that is no longer the text or number that was typed."""

    date = "text; the spreadsheet made a date of it: format the column as text and type it again"
    formula = "a value, not a formula: copy the column and paste it as values"
    error = "a value, not an error of the spreadsheet"


class NumberText(str):
    """The text of a cell that a workbook holds as a number or a truth value: leading zeros and digits beyond
    the fifteenth are lost, so that it is no identifier.
    """


Cell = str | Spoilt
Grid = list[list[Cell]]


@dataclass(frozen=True, kw_only=True)
class SheetProblem:
    """One thing to correct. `expected` is ours: no cell, path or name of the sheet is in it."""

    sheet: int  # 1, or the place of the file among several
    row: int  # as a spreadsheet shows it; the header is row 1
    column: int | None  # 1 = A; None: the whole row
    title: str  # our name of the column, "" where it has none
    code: str
    expected: str

    def __str__(self) -> str:
        place = f"row {self.row}"
        if self.column is not None:
            place += f", column {letters(self.column)}" + (f" ({self.title})" if self.title else "")
        return f"{place}: expected {self.expected}"

    def public(self) -> dict[str, Any]:
        column = None if self.column is None else letters(self.column)
        return {
            "sheet": self.sheet,
            "row": self.row,
            "column": column,
            "title": self.title,
            "code": self.code,
            "expected": self.expected,
        }


class SheetProblems(DataError):
    """Everything that is wrong with a sheet or several; code and message are those of the first."""

    def __init__(self, problems: Iterable[SheetProblem], paths: Sequence[Path]) -> None:
        self.problems = tuple(
            sorted(problems, key=lambda problem: (problem.sheet, problem.row, problem.column or MAX_CELLS))
        )
        first, more = self.problems[0], len(self.problems) - 1
        super().__init__(
            f"{paths[first.sheet - 1]}: {first}"
            + (f"; and {more} more problem{'s' if more > 1 else ''}" if more else ""),
            code=first.code,
            hint=_hint(first.code, more),
        )


def _hint(code: str, more: int) -> str:
    if code == "unknown-artifact":
        return f"artifacts: {', '.join(NAMES)}; fedqc data labels SITE lists every problem"
    return (
        "fedqc data labels SITE lists every problem"
        if more
        else "correct the sheet; docs/labels.md says what it may hold"
    )


@dataclass(kw_only=True)
class Found:
    """The problems of one sheet, as they are found; of one cell only the first."""

    sheet: int = 1
    problems: list[SheetProblem] = field(default_factory=list)
    _cells: set[tuple[int, int]] = field(default_factory=set)

    def add(self, row: int, column: int | None, *, code: str, expected: str, title: str = "") -> None:
        if column is not None:
            if (row, column) in self._cells:
                return
            self._cells.add((row, column))
        self.problems.append(
            SheetProblem(sheet=self.sheet, row=row, column=column, title=title, code=code, expected=expected)
        )


def letters(column: int) -> str:
    """The name of a column in a spreadsheet: 1 is A, 27 is AA."""
    name = ""
    while column:
        column, place = divmod(column - 1, 26)
        name = chr(ord("A") + place) + name
    return name


def read_grid(path: Path, found: Found) -> Grid:
    """The cells of a sheet, row by row, stripped of surrounding blanks; of a workbook the first page.

    Raises:
        DataError: `labels-missing` (cannot be read), `bad-label` (too large, not text, not a workbook). A row
            that is no CSV is a problem in `found`, and the last row read.
    """
    content = _content_of(path)
    if is_workbook(content):
        return next(iter(_pages_of(content, path).values()))
    return _csv_of(content, path, found)


def other_readings(path: Path) -> list[Grid]:
    """The cells of a CSV in every further encoding that its bytes may be in; see `_encodings`. Usually none.

    Problems are those of the first reading: separators and digits are the same in all.

    Raises: as `read_grid`.
    """
    content = _content_of(path)
    if is_workbook(content):
        return []
    return [_csv_of(content, path, Found(), encoding) for encoding in _encodings(content, path)[1:]]


def read_pages(path: Path) -> dict[str, Grid] | None:
    """Every page of an .xlsx workbook by its name; None where the file is not a workbook.

    Raises: as `read_grid`.
    """
    content = _content_of(path)
    return _pages_of(content, path) if is_workbook(content) else None


def is_workbook(content: bytes) -> bool:
    return content.startswith(b"PK\x03\x04")


def _pages_of(content: bytes, path: Path) -> dict[str, Grid]:
    """The pages of a workbook. The limits are checked before anything is parsed: sizes on the archive's
    directory, texts and tags on the bytes of each member.

    `zipfile` never gives more of a member than its directory entry declares, so that the sum of the declared
    sizes bounds what is read.
    Raises:
        DataError: `bad-label`.
    """
    from openpyxl import load_workbook  # 0.2 s that reading a CSV should not cost

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
                raise _not_a_sheet(
                    path, f"unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB or {MAX_MEMBERS} members"
                )
            tags = 0
            for member in members:
                if member.filename.lower().endswith((".xml", ".rels")):
                    is_of_cells = member.filename.startswith(_OF_CELLS)
                    with archive.open(member) as text:
                        tags += _check_xml(text, MAX_TAGS - tags if is_of_cells else MAX_OTHER_TAGS, path)
        # data_only would give the last result of a formula, and nothing, which is "not assessed", where none
        # is stored.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl's warnings quote cells
            workbook = load_workbook(
                io.BytesIO(content), read_only=True, data_only=False, keep_links=False, keep_vba=False
            )
            try:
                left = Counter(cells=MAX_CELLS, characters=MAX_CHARACTERS)
                return {page.title: list(_rows_of(page, left, path)) for page in workbook.worksheets} or {
                    "": []
                }
            finally:
                workbook.close()
    except DataError:
        raise
    except Exception as error:  # openpyxl lets anything through that a damaged file provokes
        raise _not_a_sheet(path, f"cannot be opened as a workbook ({type(error).__name__})") from None


def _check_xml(text: IO[bytes], most_tags: int, path: Path) -> int:
    """The number of tags of a member, which is read piece by piece and parsed by nobody yet.

    Raises:
        DataError: `bad-label`: it declares an entity, which may stand for gigabytes and no workbook needs, or
            holds too many tags or too long a text.
    """
    tags, run, end = 0, 0, b""
    while piece := text.read(1 << 20):
        # NUL: UTF-16, where the word would not be found
        if b"<!DOCTYPE" in end + piece or b"\0" in piece:
            raise _not_a_sheet(path, "declares XML entities")
        first, last = piece.find(b"<"), piece.rfind(b"<")
        before = run + (len(piece) if first < 0 else first)
        if before > MAX_TEXT_BYTES or _LONG_TEXT.search(piece):
            raise _not_a_sheet(path, f"holds a cell of more than {MAX_TEXT_BYTES >> 10} KiB")
        tags += piece.count(b"<")
        if tags > most_tags:
            raise _not_a_sheet(path, f"holds more than {MAX_TAGS} tags: too many cells, or too many styles")
        run, end = before if first < 0 else len(piece) - last, piece[-16:]
    return tags


def _rows_of(page: Any, left: Counter[str], path: Path) -> Iterator[list[Cell]]:
    page.reset_dimensions()  # what the file claims about its size may be wrong
    for number, cells in enumerate(page.iter_rows(), start=1):
        left["cells"] -= len(cells) + 1
        left["characters"] -= sum(len(cell.value) for cell in cells if isinstance(cell.value, str))
        if number > MAX_ROWS or min(left.values()) < 0:
            raise _too_much(path, MAX_ROWS)
        row = [_cell_of(cell) for cell in cells]
        while row and row[-1] == "":
            row.pop()
        yield row


def _cell_of(cell: Any) -> Cell:
    """What was typed, as text. Excel writes 1 as 1.0 in some columns, and a long number with an exponent."""
    value, kind = cell.value, getattr(cell, "data_type", "n")
    if value is None:
        return ""
    if kind == "f":
        return Spoilt.formula
    if kind == "e":
        return Spoilt.error
    if isinstance(value, bool):
        return NumberText(value)
    if isinstance(value, (int, float)):
        if abs(value) >= _EXACT:
            return NumberText(f"{value:e}")
        return NumberText(int(value) if value == int(value) else repr(value))
    return value.strip() if isinstance(value, str) else Spoilt.date


def _csv_of(content: bytes, path: Path, found: Found, encoding: str | None = None) -> Grid:
    text = content.decode(encoding or _encodings(content, path)[0])
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)  # the first of them where none occurs
    lines = text.count("\n") + text.count("\r") - text.count("\r\n")
    if lines > MAX_LINES or lines + text.count(delimiter) > MAX_CELLS:
        raise _too_much(path, MAX_LINES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: Grid = []
    try:
        rows.extend([cell.strip() for cell in cells] for cells in reader)
    except csv.Error:
        expected = "a row of CSV; a quotation mark is not closed, or stands in the wrong place"
        found.add(len(rows) + 1, None, code="bad-label", expected=expected)
    return rows


def _content_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _not_a_sheet(path, f"is larger than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the labels: {error.strerror}",
            code="labels-missing",
            hint="site.yaml: labels = the CSV or .xlsx sheet",
        ) from error


def _encodings(content: bytes, path: Path) -> list[str]:
    """The encodings in which a file may be text, the likeliest first.

    Only UTF-8 and UTF-16 can be recognised. Other bytes may be GB 18030, as Chinese spreadsheets write, and
    Windows-1252, as western ones do: the reading that names more of the images is the right one.

    Raises:
        DataError: none fits (code `bad-label`).
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        candidates = [["utf-16"]]
    elif b"\0" in content:  # without a mark; also an old .xls and other files that are no text
        candidates = [["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]]
    else:
        candidates = [["utf-8-sig"], ["gb18030", "cp1252"], ["latin-1"]]
    for group in candidates:
        if fitting := [encoding for encoding in group if _is_text(content, encoding)]:
            return fitting
    raise _not_a_sheet(path, "is not text in UTF-8, UTF-16, GB 18030 or Windows-1252, nor an .xlsx workbook")


def _is_text(content: bytes, encoding: str) -> bool:
    try:
        return _CONTROL.search(content.decode(encoding)) is None
    except UnicodeDecodeError:
        return False


def _too_much(path: Path, rows: int) -> DataError:
    most = f"{rows} rows, {MAX_CELLS} cells or {MAX_CHARACTERS} characters in all cells"
    return _not_a_sheet(path, f"holds more than {most}")


def _not_a_sheet(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: the label sheet {found}", code="bad-label", hint="save it as .xlsx, or as CSV UTF-8"
    )
