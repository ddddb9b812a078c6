"""Read the hospital's label sheet: one row an image, series or study and reader; one column an artifact.

    file,reader,metal,beam_hardening,motion,susceptibility,chemical_shift,metal_severity,part
    ct/0001.dcm,A,1,0,,,,0.6,train

A cell is 1 (present; 是 and 有 are read as 1), 0 (absent; 否 and 无) or blank (not assessed, which is not the
same as absent). Columns may be in any order and carry Chinese names and synonyms: `COLUMNS` below,
`common/artifacts.py`. docs/labels.md tells the whole of it.

A row names every image that fits *all* of the keys it fills, and is as specific as the most specific of them:
frame, image, series, study. A key is looked up as it stands, then as the site's own pseudonym; only if no
image has either, other spellings of it are tried. A row that names images of two patients is a problem.

Of one reader's rows about an image the most specific that assessed an artifact counts. Readers are settled by
`client/labels/reader_agreement.py`.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from client.dicom.index import PARTS, Part, identifier
from client.labels.reader_agreement import Rule, settle
from client.labels.spreadsheet import (
    Cell,
    Found,
    Grid,
    NumberText,
    SheetProblem,
    SheetProblems,
    Spoilt,
    other_readings,
    read_grid,
)
from common.artifacts import INDEX, NAMES, parse_name
from common.errors import ConfigError, DataError

Column = tuple[str, str]
"""("present" | "severity", artifact), ("severity", "") for the one column of severity, or (one of `COLUMNS`,
"").
"""

COLUMNS: dict[str, tuple[str, ...]] = {  # compared without case, blanks, hyphens, underscores and dots
    "file": ("file", "path", "filename", "file_path", "文件", "路径", "文件名", "文件路径", "图像路径"),
    "frame": ("frame", "frame_number", "帧", "帧号"),
    "sop_uid": ("sop_uid", "SOPInstanceUID", "image_uid", "影像UID", "图像UID"),
    "series_uid": ("series_uid", "SeriesInstanceUID", "序列UID"),
    "study_uid": ("study_uid", "StudyInstanceUID", "检查UID"),
    "accession": ("accession", "accession_number", "检查号", "登记号"),
    "series": ("series", "series_number", "序列", "序列号"),
    "reader": ("reader", "rater", "阅片人", "阅片者", "医师", "医生"),
    "role": ("role", "角色", "级别"),
    "part": ("part", "划分", "数据划分"),
    "severity": ("severity", "严重程度"),
    "note": ("note", "notes", "comment", "备注", "说明"),  # read by people only
}
# the most specific first; series and frame only narrow these
_NAMING = (
    "file",
    "sop_uid",
    "series_uid",
    "study_uid",
    "accession",
)
_KEYS = (*_NAMING, "series", "frame")
_PRESENT = {
    "1": 1.0,
    "1.0": 1.0,
    "是": 1.0,
    "有": 1.0,
    "0": 0.0,
    "0.0": 0.0,
    "否": 0.0,
    "无": 0.0,
    "無": 0.0,
    "": math.nan,
}
_PANEL = {"panel": True, "arbiter": True, "仲裁": True, "专家": True, "专家组": True, "二级": True}
_ROLES = _PANEL | {"": False, "reader": False, "first": False, "初读": False, "一级": False}
_SEVERITY_SUFFIXES = ("_severity", " severity", "_严重程度", "严重程度")
_UID = re.compile(r"\d+(\.\d+)+")
# the site's pseudonym of a UID, as merged workbooks have it: no UID, which has dots
_OWN_NAME = re.compile(r"[0-9a-f]{16}")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_WHOLE = re.compile(r"(-?\d{1,10})(\.0+)?")
_EXPONENT = re.compile(r"-?\d+(\.\d+)?e\+?\d+", re.IGNORECASE)  # what a spreadsheet makes of a long number
_PSEUDONYM = re.compile(r"reader-[0-9a-f]{8}")
_ANSWER = "1, 0 or blank (是, 有, 否 and 无 are understood)"
_STUDY, _SERIES, _IMAGE, _FRAME = range(4)
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class ImageName:
    """How a sheet may name one usable slice. Identifiers stand as the image cache names them, where the
    site's key is given to match.
    """

    file: str  # relative to the images folder; the frames of a file share it
    sop_uid: str = ""
    series_uid: str = ""
    study_uid: str = ""
    accession: str = ""
    series_number: int | None = None
    frame: int = 1  # counts from 1
    patient: str = ""  # whose image it is; a row may name images of one patient only


@dataclass(frozen=True, kw_only=True)
class RowKey:
    """What a row names. Blank fields name nothing."""

    file: str = ""
    frame: int | None = None
    sop_uid: str = ""
    series_uid: str = ""
    study_uid: str = ""
    accession: str = ""
    series: int | None = None

    @property
    def level(self) -> int:
        if self.frame is not None:
            return _FRAME
        if self.file or self.sop_uid:
            return _IMAGE
        return _SERIES if self.series_uid or self.series is not None else _STUDY


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """One row. `present` is 1, 0 or nan (not assessed); `severity` is 0..1 or nan; both in the order of
    `NAMES`.
    """

    row: int  # as a spreadsheet shows it; the header is row 1
    key: RowKey
    reader: str  # pseudonym, "" where the sheet has no readers
    is_panel: bool
    present: tuple[float, ...]
    severity: tuple[float, ...]
    part: Part | None
    sheet: int = 1  # the place of its file, where several were read
    suspects: tuple[SheetProblem, ...] = ()  # keys in an unusual form: problems unless an image has them


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    path: Path
    rows: tuple[LabelRow, ...]  # in the order of the sheet
    artifacts: tuple[str, ...]  # those that have a column
    # the sheet in other encodings that its bytes may be in: `best_reading` chooses
    other_readings: tuple[LabelTable, ...] = ()

    @classmethod
    def empty(cls) -> LabelTable:
        """That of a site without a sheet."""
        return cls(path=Path(), rows=(), artifacts=())

    @property
    def readers(self) -> tuple[tuple[str, bool], ...]:
        """(pseudonym, is of the panel), first-level readers first, each in the order of the sheet."""
        return tuple(
            sorted(
                dict.fromkeys((row.reader, row.is_panel) for row in self.rows), key=lambda reader: reader[1]
            )
        )


@dataclass(frozen=True, kw_only=True)
class MatchedLabels:
    """Labels in the order of a list of images, every reader's answer behind them, and what did not fit. Row
    numbers are local.
    """

    present: np.ndarray  # float32 (images, artifacts): the consensus, nan = not assessed, or not settled
    severity: np.ndarray  # float32 (images, artifacts), nan = unknown
    parts: tuple[Part | None, ...]
    rows_without_image: tuple[int, ...]
    images_without_label: int
    # rows with an accession number from which that of another study differs by leading zeros only
    lost_zeros: tuple[int, ...]
    # rows that claim an artifact which none of their images can show; the claim is dropped
    wrong_modality: tuple[int, ...]
    rule: Rule
    readers: tuple[str, ...]  # pseudonyms; a reader who is also of the panel stands twice
    is_panel: np.ndarray  # bool (readers,)
    answers: np.ndarray  # float32 (readers, images, artifacts)
    sources: np.ndarray  # int32 (readers, images, artifacts): which row of the table, -1 where none answers
    disputed: np.ndarray  # bool (images, artifacts): readers differ, and nobody has decided
    incomplete: np.ndarray  # bool (images, artifacts): too few read it

    @property
    def fixed_images(self) -> int:
        """Images whose part the sheet fixes."""
        return sum(part is not None for part in self.parts)

    @property
    def split(self) -> str:
        """Who decides the part of a patient: `fixed list` (the sheet names one for every image), `keyed
        hash`, or both.
        """
        if not self.fixed_images:
            return "keyed hash"
        return "fixed list" if self.fixed_images == len(self.parts) else "fixed list and keyed hash"


def read_labels(path: Path, *, key: bytes | None = None) -> LabelTable:
    """Read and check the whole sheet.

    Args:
        key: the site's, from which readers' pseudonyms are made; without it readers are numbered, `reader-1`,
            in the order of the sheet.
    Raises:
        SheetProblems: all that is wrong, in one pass. Codes: `labels-missing` (no row, no column that names
            an image, no artifact column), `unknown-artifact` (a column nobody knows), `not-text` (a
            spreadsheet made a number or date of it), `bad-label` (any other cell, row or column),
            `duplicate-label` (one reader twice about one thing).
        DataError: `labels-missing` or `bad-label` where no sheet can be read at all.
    """
    table, problems = inspect_labels(path, key=key)
    if problems:
        raise SheetProblems(problems, [path])
    return table


def inspect_labels(
    path: Path, *, key: bytes | None = None, sheet: int = 1
) -> tuple[LabelTable, tuple[SheetProblem, ...]]:
    """The rows that can be understood, and all that is wrong with the sheet; a bad cell of a good row counts
    as blank.

    Raises:
        DataError: `labels-missing` or `bad-label` where no sheet can be read at all.
    """
    found = Found(sheet=sheet)
    table = table_of(read_grid(path, found), path, found, key=key)
    others = [table_of(grid, path, Found(sheet=sheet), key=key) for grid in other_readings(path)]
    return replace(table, other_readings=tuple(others)), tuple(found.problems)


def table_of(grid: Grid, path: Path, found: Found, *, key: bytes | None) -> LabelTable:
    """Understand the cells of a sheet; what cannot be understood goes to `found`."""
    columns = _columns(grid[0] if grid else [], found)
    artifacts = tuple(name for name in NAMES if ("present", name) in columns.values())
    has_reader, has_key = (
        ("reader", "") in columns.values(),
        any((kind, "") in columns.values() for kind in _NAMING),
    )
    name_of = _Readers(key)
    rows: list[LabelRow] = []
    first_of: dict[tuple[RowKey, str, bool], int] = {}
    untitled: set[int] = set()
    for number, line in enumerate(grid[1:], start=2):
        if not any(line):
            continue
        if len(line) > len(grid[0]) and any(line[len(grid[0]) :]):
            expected = "at most as many cells as the header; a separator inside a cell needs quotes"
            found.add(number, None, code="bad-label", expected=expected)
        for place, (cell, title) in enumerate(zip(line, grid[0], strict=False), start=1):
            if cell != "" and title == "" and place not in untitled:
                untitled.add(place)
                found.add(number, place, code="bad-label", expected="nothing in a column without a title")
        cells = {
            columns[place]: (place, cell) for place, cell in enumerate(line, start=1) if place in columns
        }
        present, severity = answers_of(cells, number, found)
        part = _choice(
            cells,
            "part",
            {"": None} | {name: name for name in PARTS},
            f"{', '.join(PARTS)} or blank",
            number,
            found,
        )
        is_panel = _choice(
            cells, "role", _ROLES, "reader or panel (一级, 二级, 仲裁), or blank", number, found
        )
        reader = text_of(cells, ("reader", ""), number, found)
        if has_reader and not reader:
            place = next(place for place, column in columns.items() if column == ("reader", ""))
            found.add(
                number,
                place,
                code="bad-label",
                title="reader",
                expected="who read it: a sheet with readers names one in every row",
            )
        suspects: list[SheetProblem] = []
        row_key = _key(cells, number, found, suspects) if has_key else None
        if row_key is None:
            continue
        row = LabelRow(
            row=number,
            key=row_key,
            reader=name_of(reader) if reader else "",
            is_panel=bool(is_panel),
            present=present,
            severity=severity,
            part=part,
            sheet=found.sheet,
            suspects=tuple(suspects),
        )
        first = first_of.setdefault((row_key, row.reader, row.is_panel), number)
        if first != number:
            found.add(
                number,
                None,
                code="duplicate-label",
                expected=f"one row a reader for one thing; row {first} is the other",
            )
            continue
        rows.append(row)
    if len(grid) and not any(any(line) for line in grid[1:]):
        found.add(2, None, code="labels-missing", expected="at least one row below the header")
    return LabelTable(path=path, rows=tuple(rows), artifacts=artifacts)


def answers_of(
    cells: dict[Column, tuple[int, Cell]], row: int, found: Found
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What a row says: `present` and `severity` in the order of `NAMES`."""
    present, severity = [math.nan] * len(NAMES), [math.nan] * len(NAMES)
    for kind, artifact in cells:
        if kind != "present":
            continue
        text = text_of(cells, (kind, artifact), row, found)
        if text not in _PRESENT:
            found.add(row, cells[kind, artifact][0], code="bad-label", title=artifact, expected=_ANSWER)
        present[INDEX[artifact]] = _PRESENT.get(text, math.nan)
    for kind, artifact in cells:
        if kind != "severity" or not (text := text_of(cells, (kind, artifact), row, found)):
            continue
        place, title = cells[kind, artifact][0], f"{artifact}_severity" if artifact else "severity"
        value = float(text) if re.fullmatch(r"\d*\.?\d+|\d+\.", text) else math.nan
        claimed = [name for name in ([artifact] if artifact else NAMES) if present[INDEX[name]] == 1]
        if not 0 <= value <= 1:
            found.add(row, place, code="bad-label", title=title, expected="a number from 0 to 1, or blank")
        elif value > 0 and not claimed:
            expected = f"blank or 0, because {artifact or 'no artifact'} is {'not ' if artifact else ''}1"
            found.add(row, place, code="bad-label", title=title, expected=expected)
        else:
            for name in claimed or [artifact] * bool(artifact):
                # an artifact's own column says more than the common one
                if artifact or math.isnan(severity[INDEX[name]]):
                    severity[INDEX[name]] = value
    return tuple(present), tuple(severity)


def text_of(cells: dict[Column, tuple[int, Cell]], column: Column, row: int, found: Found) -> str:
    """The text of a cell in plain width (１ becomes 1), "" where it is missing or spoilt; a spoilt one is a
    problem.
    """
    place, cell = cells.get(column, (0, ""))
    if isinstance(cell, Spoilt):
        found.add(
            row,
            place,
            code="not-text" if cell is Spoilt.date else "bad-label",
            title=_title(column),
            expected=cell.value,
        )
        return ""
    return unicodedata.normalize("NFKC", cell).strip()


def match_labels(
    table: LabelTable,
    images: Sequence[ImageName | str],
    may_occur: np.ndarray,
    rule: Rule = "agree",
    *,
    key: bytes | None = None,
) -> MatchedLabels:
    """Bring the labels into the order of `images`, and settle what readers say.

    Args:
        images: the usable slices; a plain string is a file.
        may_occur: bool (images, artifacts), whether the artifact can occur in the image's modality.
        rule: see `client/labels/reader_agreement.py`.
        key: the site's, under which `images` name UIDs and accession numbers (`index.identifier`); None: they
            are raw.
    Raises:
        SheetProblems: `duplicate-label` (rows with different keys name one image, by one reader), `leak` (two
            parts for one image), `ambiguous-key` (a row names images of two patients), `not-text` or
            `bad-label` (a key that no image has, in a form that a spreadsheet makes).
        DataError: `labels-match-nothing`.
    """
    matched, problems = inspect_match(table, images, may_occur, rule, key=key)
    if problems:
        raise SheetProblems(problems, [table.path])
    if table.rows and len(matched.rows_without_image) == len(table.rows):
        raise DataError(
            f"{table.path}: none of the {len(table.rows)} rows names one of the {len(images)} usable images",
            code="labels-match-nothing",
            hint=(
                "file = path relative to the images folder, with forward slashes, including the ending; "
                "or another key of docs/labels.md"
            ),
        )
    return matched


def inspect_match(
    table: LabelTable,
    images: Sequence[ImageName | str],
    may_occur: np.ndarray,
    rule: Rule = "agree",
    *,
    key: bytes | None = None,
) -> tuple[MatchedLabels, tuple[SheetProblem, ...]]:
    """As `match_labels`, but gives the problems beside what could be matched."""
    names = [ImageName(file=image) if isinstance(image, str) else image for image in images]
    directory = _Directory(names, key)
    table = _best_reading(table, directory)
    readers = table.readers
    is_panel = np.array([panel for _, panel in readers], bool)
    shape = (len(readers), len(names), len(NAMES))
    answers, severities = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    sources = np.full(shape, -1, np.int32)
    parts = np.full(len(names), -1, np.int8)
    part_rows = np.full(len(names), -1, np.int32)
    labelled = np.zeros(len(names), bool)
    owners: dict[tuple[int, int], np.ndarray] = {}
    lost: list[int] = []
    zeros: list[int] = []
    wrong: set[int] = set()
    found = {row.sheet: Found(sheet=row.sheet) for row in table.rows}
    reader_at = {reader: place for place, reader in enumerate(readers)}
    keeps_zeros = any(row.key.accession.startswith("0") for row in table.rows)
    # the more specific overwrites
    order = sorted(range(len(table.rows)), key=lambda place: table.rows[place].key.level)
    for place in order:
        row = table.rows[place]
        positions, is_ambiguous = directory.find(row.key)
        if not keeps_zeros and directory.has_lost_zeros(row.key, positions):
            zeros.append(row.row)
        if is_ambiguous:
            found[row.sheet].add(row.row, None, code="ambiguous-key", expected=_ONE_PATIENT)
            continue
        if not positions.size:
            found[row.sheet].problems += row.suspects
            lost.append(row.row)
            continue
        labelled[positions] = True
        reader = reader_at[row.reader, row.is_panel]
        owner = owners.setdefault((reader, row.key.level), np.full(len(names), -1, np.int32))
        if (taken := owner[positions].max()) >= 0:
            expected = f"one row a reader for one image; row {table.rows[taken].row} names it by another key"
            found[row.sheet].add(row.row, None, code="duplicate-label", expected=expected)
        owner[positions] = place
        if row.part is not None:
            part = PARTS.index(row.part)
            other = positions[(parts[positions] >= 0) & (parts[positions] != part)]
            if other.size:
                expected = (
                    f"the part of row {table.rows[part_rows[other[0]]].row}, which names the same image"
                )
                found[row.sheet].add(row.row, None, code="leak", expected=expected)
            parts[positions], part_rows[positions] = part, place
        can = may_occur[positions]
        for artifact in range(len(NAMES)):
            value = row.present[artifact]
            if math.isnan(value):
                continue
            shown = positions[can[:, artifact]]
            if value == 1 and not shown.size:
                wrong.add(row.row)
            answers[reader, shown, artifact] = value
            severities[reader, shown, artifact] = row.severity[artifact]
            sources[reader, shown, artifact] = place
    settled = settle(answers, severities, is_panel, rule)
    problems = [problem for one in found.values() for problem in one.problems]
    return MatchedLabels(
        present=settled.present,
        severity=settled.severity,
        parts=tuple(None if part < 0 else PARTS[part] for part in parts.tolist()),
        rows_without_image=tuple(sorted(lost)),
        lost_zeros=tuple(sorted(zeros)),
        images_without_label=int((~labelled).sum()),
        wrong_modality=tuple(sorted(wrong)),
        rule=rule,
        readers=tuple(name for name, _ in readers),
        is_panel=is_panel,
        answers=answers,
        sources=sources,
        disputed=settled.disputed,
        incomplete=settled.incomplete,
    ), tuple(problems)


def best_reading(table: LabelTable, images: Sequence[ImageName], *, key: bytes | None) -> LabelTable:
    """The sheet in the encoding in which most of its rows name an image."""
    return _best_reading(table, _Directory(images, key)) if table.other_readings else table


def _best_reading(table: LabelTable, directory: _Directory) -> LabelTable:
    if not table.other_readings:
        return table

    def rows_matched(reading: LabelTable) -> int:
        return sum(bool(directory.find(row.key)[0].size) for row in reading.rows)

    return max((replace(table, other_readings=()), *table.other_readings), key=rows_matched)


def to_csv(rows: Iterable[LabelRow]) -> str:
    """A sheet that `read_labels` reads back as these rows, with the columns that they need."""
    rows = list(rows)
    keys = [name for name in _KEYS if any(getattr(row.key, name) not in {"", None} for row in rows)]
    artifacts = [
        name for name in NAMES if any(not math.isnan(row.present[INDEX[name]]) for row in rows)
    ] or list(NAMES)
    severities = [name for name in NAMES if any(not math.isnan(row.severity[INDEX[name]]) for row in rows)]
    others = ["reader"] * any(row.reader for row in rows) + ["role"] * any(row.is_panel for row in rows)
    others += ["part"] * any(row.part for row in rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*keys, *others, *artifacts, *(f"{name}_severity" for name in severities)])
    for row in rows:
        values = {"reader": row.reader, "role": "panel" if row.is_panel else "reader", "part": row.part or ""}
        writer.writerow(
            [_written(name, getattr(row.key, name)) for name in keys]
            + [values[name] for name in others]
            + [_number(row.present[INDEX[name]]) for name in artifacts]
            + [_number(row.severity[INDEX[name]]) for name in severities]
        )
    return stream.getvalue()


def reader_pseudonym(name: str, key: bytes) -> str:
    """The site's own name for a reader: without the key a guess cannot be tested. A pseudonym stays what it
    is.
    """
    name = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if _PSEUDONYM.fullmatch(name):
        return name
    return (
        "reader-"
        + hmac.new(key, b"reader:" + name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:8]
    )


class _Readers:
    """Names of readers become pseudonyms as they are read; none is kept."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self._secret = key or b""
        self._numbers: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        pseudonym = reader_pseudonym(name, self._secret)
        if self._key is not None:
            return pseudonym
        return f"reader-{self._numbers.setdefault(pseudonym, len(self._numbers) + 1)}"


class _Directory:
    """Images by each key that a row may name."""

    def __init__(self, images: Sequence[ImageName], key: bytes | None) -> None:
        self._images, self._key = images, key
        self._at: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in _NAMING}
        for position, image in enumerate(images):
            for name in _NAMING:
                self._at[name][_comparable(name, getattr(image, name))].append(position)

    def find(self, key: RowKey) -> tuple[np.ndarray, bool]:
        """Positions of the images that fit every filled key, int64; and whether the row is ambiguous: they
        belong to several patients, or a key in no image's spelling fits several.
        """
        positions: Sequence[int] | None = None
        values: dict[str, list[str]] = {}
        for name in _NAMING:
            if text := getattr(key, name):
                values[name] = self._values(name, text)
                if positions is None:
                    positions = sorted(at for value in values[name] for at in self._at[name][value])
                else:
                    positions = [at for at in positions if self._value(name, at) in values[name]]
        positions = positions or []
        if key.series is not None:
            positions = [at for at in positions if self._images[at].series_number == key.series]
        if key.frame is not None:
            positions = [at for at in positions if self._images[at].frame == key.frame]
        is_ambiguous = len({self._images[at].patient for at in positions}) > 1 or any(
            len(fitting) > 1 and len({self._value(name, at) for at in positions}) > 1
            for name, fitting in values.items()
        )
        return np.array(positions, np.int64), is_ambiguous

    def has_lost_zeros(self, key: RowKey, positions: np.ndarray) -> bool:
        """Whether another patient's study has the row's accession number with more leading zeros, which
        spreadsheets drop.
        """
        if not key.accession.isdecimal() or key.file or key.sop_uid or key.series_uid or key.study_uid:
            return False
        named = {self._images[at].patient for at in positions.tolist()}
        return any(
            self._images[at].patient not in named
            for value in self._existing("accession", _zero_padded(key.accession))
            for at in self._at["accession"][value]
        )

    def _values(self, name: str, text: str) -> list[str]:
        """The images' values of key `name` that a cell names: as it stands, else as the site's pseudonym,
        else in every other spelling.
        """
        if exact := self._existing(name, [text]):
            return exact
        if name != "file" and _OWN_NAME.fullmatch(text.lower()) and text.lower() in self._at[name]:
            return [text.lower()]
        if name == "file":
            folded = {_folded(spelling) for spelling in _spellings(name, text)}
            return sorted({value for one in folded for value in self._folded_files.get(one, ())})
        fitting = self._existing(name, _spellings(name, text))
        if fitting and (whole := _WITH_FRACTION.fullmatch(text)):
            fitting += self._existing(name, _zero_padded(whole[1]))
        return sorted(set(fitting))

    def _existing(self, name: str, texts: Iterable[str]) -> list[str]:
        known = self._at[name]
        return [value for text in texts if (value := self._named(name, text)) and value in known]

    def _named(self, name: str, text: str) -> str:
        """How the images' list holds what a cell says: an identifier under the cache's name."""
        if self._key is None or name == "file":
            return _comparable(name, text)
        return identifier(_CACHE_NAMES[name], text, self._key)

    def _value(self, name: str, position: int) -> str:
        return _comparable(name, getattr(self._images[position], name))

    @cached_property
    def _folded_files(self) -> dict[str, set[str]]:
        """File names without case and width; one that is not UTF-8 on the disk also in other encodings."""
        folded: dict[str, set[str]] = defaultdict(set)
        for value in self._at["file"]:
            readings = [value]
            with suppress(UnicodeEncodeError):
                value.encode()
                folded[_folded(value)].add(value)
                continue
            for encoding in ("gb18030", "cp1252", "latin-1"):
                with suppress(UnicodeError):
                    readings.append(value.encode("utf-8", "surrogateescape").decode(encoding))
            for reading in readings:
                folded[_folded(reading)].add(value)
        return folded


_CACHE_NAMES = {"sop_uid": "image", "series_uid": "series", "study_uid": "study", "accession": "accession"}
_ONE_PATIENT = (
    "images of one patient; its keys fit those of several: add another key, such as study_uid or file"
)
_WITH_FRACTION = re.compile(r"(\d+)\.0+")  # a number that a program wrote as one with a fraction
_MAX_ACCESSION = 16  # characters of an SH element, DICOM PS3.5 table 6.2-1
_HYPHENS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


def _comparable(field: str, text: str) -> str:
    """Accession numbers in plain width; a file name as either way of writing its accents gives it."""
    return unicodedata.normalize("NFC" if field == "file" else "NFKC", text).strip()


def _spellings(name: str, text: str) -> list[str]:
    """What a spreadsheet, an export or a keyboard may have made `text` of."""
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf").strip()
    if quoted := re.fullmatch(
        r'="(.*)"', plain
    ):  # how some programs keep a spreadsheet from reading a number
        plain = quoted[1]
    plain = plain.lstrip("'\u2018\u2019`\u00b4").strip()
    spellings = [plain, plain.translate(_HYPHENS)]
    if name == "file":
        return [*spellings, *(PurePosixPath(one.replace("\\", "/")).as_posix() for one in spellings if one)]
    if name == "accession":
        if whole := _WITH_FRACTION.fullmatch(plain):
            spellings.append(whole[1])
        spellings += [one.upper() for one in spellings] + [one.lower() for one in spellings]
    return list(dict.fromkeys(filter(None, spellings)))


def _zero_padded(digits: str) -> list[str]:
    return [digits.zfill(length) for length in range(len(digits) + 1, _MAX_ACCESSION + 1)]


def _folded(file: str) -> str:
    return unicodedata.normalize("NFKC", file).casefold().replace("\\", "/").strip()


def _columns(header: Sequence[Cell], found: Found) -> dict[int, Column]:
    """What each column is, by its place from 1."""
    columns: dict[int, Column] = {}
    for place, cell in enumerate(header, start=1):
        if cell == "":
            continue
        column = None if isinstance(cell, Spoilt) else _column(cell)
        if column is None:
            expected = (
                f"one of {', '.join((*COLUMNS, *NAMES))}, or an artifact with _severity; "
                "docs/labels.md lists the synonyms"
            )
            found.add(1, place, code="unknown-artifact", expected=expected)
        elif column in columns.values():
            found.add(
                1,
                place,
                code="bad-label",
                title=_title(column),
                expected="one column of this meaning; an earlier one has it",
            )
        else:
            columns[place] = column
    kinds = {kind for kind, _ in columns.values()}
    if not kinds.intersection(_NAMING):
        expected = (
            "a column that names the images: file, sop_uid, series_uid, study_uid, or accession and series"
        )
        found.add(1, None, code="labels-missing", expected=expected)
    if "present" not in kinds:
        found.add(
            1, None, code="labels-missing", expected=f"a column for at least one artifact: {', '.join(NAMES)}"
        )
    return columns


def _column(title: str) -> Column | None:
    name = unicodedata.normalize("NFKC", title).strip().lower()
    for kind, words in COLUMNS.items():
        if _spelled(name) in map(_spelled, words):
            return kind, ""
    kind = "present"
    for suffix in _SEVERITY_SUFFIXES:
        if name.endswith(suffix):
            kind, name = "severity", name.removesuffix(suffix)
            break
    try:
        return kind, parse_name(name)
    except ConfigError:
        return None


def _title(column: Column) -> str:
    kind, artifact = column
    if not artifact:
        return kind
    return artifact if kind == "present" else f"{artifact}_severity"


def _spelled(text: str) -> str:
    return re.sub(r"[\s_.\-]", "", text.lower())


def _choice(
    cells: dict[Column, tuple[int, Cell]],
    kind: str,
    known: dict[str, _Value],
    expected: str,
    row: int,
    found: Found,
) -> _Value | None:
    text = text_of(cells, (kind, ""), row, found).lower()
    if text not in known:
        found.add(row, cells[kind, ""][0], code="bad-label", title=kind, expected=expected)
    return known.get(text)


def _key(
    cells: dict[Column, tuple[int, Cell]], row: int, found: Found, suspects: list[SheetProblem]
) -> RowKey | None:
    """What the row names; None where that is missing or cannot be understood.

    Args:
        suspects: gets what is unusual about a key; it is a problem only if no image has that key.
    """
    before = len(found.problems)
    texts = {kind: text_of(cells, (kind, ""), row, found) for kind in _KEYS}
    named = any(texts[kind] for kind in _NAMING)

    def wrong(kind: str, expected: str, code: str = "bad-label") -> None:
        found.add(row, cells[kind, ""][0], code=code, title=kind, expected=expected)

    def suspect(kind: str, expected: str, code: str) -> None:
        column = cells[kind, ""][0]
        suspects.append(
            SheetProblem(sheet=found.sheet, row=row, column=column, title=kind, code=code, expected=expected)
        )

    for kind in _NAMING:
        if isinstance(cells.get((kind, ""), (0, ""))[1], NumberText):
            wrong(
                kind,
                "text; the spreadsheet holds a number, without leading zeros: format the column as text and "
                "type it again",
                "not-text",
            )
    for kind in ("sop_uid", "series_uid", "study_uid"):
        if texts[kind] and not (
            _OWN_NAME.fullmatch(texts[kind]) or (_UID.fullmatch(texts[kind]) and len(texts[kind]) <= 64)
        ):
            spoilt = _EXPONENT.fullmatch(texts[kind]) is not None
            suspect(
                kind,
                "a DICOM UID; format the column as text before typing or pasting",
                "not-text" if spoilt else "bad-label",
            )
    if _EXPONENT.fullmatch(texts["accession"]):
        suspect(
            "accession",
            "the whole number; the spreadsheet shortened it: format the column as text and type it again",
            "not-text",
        )
    numbers: dict[str, int | None] = {"series": None, "frame": None}
    for kind in numbers:
        if texts[kind]:
            if (whole := _WHOLE.fullmatch(texts[kind])) is None or (kind == "frame" and int(whole[1]) < 1):
                wrong(kind, "a whole number" if kind == "series" else "a whole number from 1, or blank")
            else:
                numbers[kind] = int(whole[1])
    cell = cells.get(("file", ""), (0, ""))[1]
    file = "" if isinstance(cell, Spoilt) else cell.strip()
    relative = PurePosixPath(file.replace("\\", "/"))
    if file and (
        relative.is_absolute() or ".." in relative.parts or _DRIVE.match(file) or not relative.parts
    ):
        wrong("file", "a path relative to the images folder, without ..")
    if numbers["frame"] is not None and not (file or texts["sop_uid"]):
        wrong("frame", "blank where neither file nor sop_uid says of which file")
    if numbers["series"] is not None and not named:
        wrong(
            "series", "an accession number or study_uid beside it: many studies have a series of this number"
        )
    if not named and len(found.problems) == before:
        found.add(
            row,
            None,
            code="bad-label",
            expected="what it names: file, sop_uid, series_uid, study_uid, or accession and series",
        )
    if not named or len(found.problems) > before:
        return None
    return RowKey(
        file=relative.as_posix() if file else "",
        frame=numbers["frame"],
        sop_uid=texts["sop_uid"],
        series_uid=texts["series_uid"],
        study_uid=texts["study_uid"],
        accession=texts["accession"],
        series=numbers["series"],
    )


def _written(name: str, value: str | int | None) -> str:
    """A key for a CSV. A path that starts like a formula is written so that a spreadsheet does not take it
    for one.
    """
    text = "" if value is None else str(value)
    return f"./{text}" if name == "file" and text[:1] in {"=", "+", "-", "@"} else text


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g}"
