"""Read the sheet of a public collection: which file is whose, and what was seen on it.

    file,patient,site,motion,part          a column an artifact (docs/labels.md), or
    image,patient id,GA,plane,label        one column `label`: artifacts by name, or 1 and 0 about `--label`

CSV, TSV or .xlsx, read within the limits of `client/labels/spreadsheet.py`. Columns may be in any order;
those that are not understood are kept beside the images and used for nothing. A file is named by its path
below the folder, by its name, or by its name without ending, as sheets of publications do; never outside the
folder.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from client.dicom.index import PARTS, Part
from client.labels.label_sheet import COLUMNS, Column, LabelRow, RowKey, answers_of, text_of
from client.labels.spreadsheet import Cell, Found, Grid, Spoilt, letters, read_grid
from common.artifacts import ARTIFACTS, INDEX, NAMES, Modality, parse_name
from common.errors import ConfigError, DataError

TITLES: dict[str, tuple[str, ...]] = {  # compared without case, blanks, hyphens, underscores and dots
    "file": (*COLUMNS["file"], "image", "image_name", "img", "picture", "bids_name", "图像", "图片"),
    "patient": (
        "patient",
        "patient_id",
        "PID",
        "subject",
        "subject_id",
        "participant_id",
        "case",
        "患者",
        "病人",
    ),
    "site": ("site", "centre", "center", "hospital", "institution", "医院", "中心"),
    "modality": ("modality", "模态"),
    "label": ("label", "labels", "class", "artifact", "artefact", "标签", "类别", "伪影"),
    "part": (*COLUMNS["part"], "split"),
    "reader": COLUMNS["reader"],
    "role": COLUMNS["role"],
}
FACTS: dict[str, str] = {  # column → argument of `HeaderFacts`
    "pixel_spacing_mm": "pixel_spacing_mm",
    "slice_thickness_mm": "slice_thickness_mm",
    "field_strength_t": "field_strength_t",
    "echo_time_ms": "echo_time_ms",
    "repetition_time_ms": "repetition_time_ms",
    "kvp": "kvp",
}
_PARTS: dict[str, Part | None] = (
    {"": None} | {part: part for part in PARTS} | {"val": "validation", "dev": "validation"}
)
_MODALITIES: dict[str, Modality] = {"ct": "CT", "mr": "MR", "mri": "MR"}
_PANEL = {"panel", "arbiter", "仲裁", "专家", "专家组", "二级"}
_PRESENT = {"1", "1.0", "yes", "true", "present", "artifact", "artefact", "是", "有"}
_ABSENT = {"0", "0.0", "no", "false", "absent", "clean", "none", "normal", "否", "无", "無", "正常"}
_BLANK = {"", "n/a", "na", "nan", "unknown"}
_DRIVE = re.compile(r"[A-Za-z]:")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_ENDINGS = (".nii.gz", ".nii", ".png", ".jpeg", ".jpg", ".mat", ".dcm")


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """What a label column means.

    Args:
        column: its title; "" for the first that is called label, class or artifact.
        artifact: what 1 and 0, or a score, are about.
        present_from, absent_to: a score from here on is present, up to there absent; between the two it is
            not assessed.
    """

    column: str = ""
    artifact: str = ""
    present_from: float | None = None
    absent_to: float | None = None


@dataclass(kw_only=True)
class Entry:
    """What a sheet says about one file."""

    patient: str = ""
    site: str = ""
    modality: Modality | None = None
    labels: list[LabelRow] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """`entries` by the file, as `files` of `read_sheet` name it; `missing`: what is named and not there."""

    entries: dict[str, Entry]
    missing: tuple[str, ...]
    columns_not_used: tuple[str, ...]
    has_labels: bool


class Files:
    """The files of a folder by the names that a sheet may use for them."""

    def __init__(self, names: Iterable[str], root: str = "") -> None:
        self._by: dict[str, set[str]] = defaultdict(set)
        for name in names:
            base = name.rpartition("/")[2]
            for key in (name, base, _stem(base), f"{root}/{name}"):
                self._by[_plain(key)].add(name)

    def find(self, text: str) -> set[str]:
        """The files that `text` may name: the whole path first."""
        found = self._by.get(_plain(text), set())
        return {text} if text in found else found


def read_sheet(path: Path, files: Files, labelling: Labelling, *, folder: str = "") -> Sheet:
    """Read the whole sheet.

    Args:
        folder: which the names of files are relative to, with a slash at its end.
    Raises:
        DataError: `labels-missing`, `bad-label`, `not-text`, `duplicate-label`, `unknown-artifact`: one line
            that names the first problem and counts the others; no cell is quoted.
        ConfigError: `bad-argument`: an option is needed to understand a column, or contradicts it.
    """
    found = Found()
    grid = read_grid(path, found)
    columns, unused = _columns(grid[0] if grid else [], labelling, path)
    has_labels = any(kind in {"present", "label"} for kind, _ in columns.values())
    entries: dict[str, Entry] = {}
    missing: list[str] = []
    values = _Values(grid, columns, labelling, path)
    seen: set[tuple[str, str, bool]] = set()
    for number, line in enumerate(grid[1:], start=2):
        if not any(line):
            continue
        cells = {
            columns[place]: (place, cell) for place, cell in enumerate(line, start=1) if place in columns
        }
        name = _file_of(cells, number, found, folder)
        if not name:
            continue
        matching = files.find(name)
        if len(matching) > 1:
            _add(found, number, cells, "file", "a file name that only one file has; give its path below SRC")
            continue
        if not matching:
            missing.append(name)
            continue
        file = next(iter(matching))
        entry = entries.setdefault(file, Entry())
        _take(entry, cells, number, found)
        row = _row_of(cells, number, found, values)
        if (file, row.reader, row.is_panel) in seen:
            _add(found, number, cells, "file", "one row a reader and file", code="duplicate-label")
        seen.add((file, row.reader, row.is_panel))
        if has_labels or row.part:
            entry.labels.append(row)
        for place, title in unused.items():
            cell = line[place - 1] if place <= len(line) else ""
            if isinstance(cell, str) and cell:
                entry.about[title] = cell
    if found.problems:
        first, more = found.problems[0], len(found.problems) - 1
        raise DataError(
            f"{path}: {first}" + (f"; and {more} more problem{'s' * (more > 1)}" if more else ""),
            code=first.code,
            hint="correct the sheet; docs/data.md says what it may hold",
        )
    if not entries and not missing:
        raise DataError(
            f"{path}: no row below the header", code="labels-missing", hint="file, patient, label, …"
        )
    return Sheet(
        entries=entries,
        missing=tuple(missing),
        columns_not_used=tuple(unused.values()),
        has_labels=has_labels,
    )


def labelling_of(
    artifact: str | None, column: str | None, present_from: float | None, absent_to: float | None
) -> Labelling:
    """The options of the command, checked.

    Raises:
        ConfigError: `unknown-artifact`, `bad-argument`.
    """
    if absent_to is not None and (present_from is None or absent_to >= present_from):
        raise ConfigError(
            f"--absent-to {absent_to:g}: must be below --present-from",
            code="bad-argument",
            hint="for example --present-from 3 --absent-to 1",
        )
    if present_from is not None and artifact is None:
        raise ConfigError(
            "--present-from without --label",
            code="bad-argument",
            hint="--label motion: what the score is about",
        )
    return Labelling(
        column=column or "",
        artifact=parse_name(artifact) if artifact else "",
        present_from=present_from,
        absent_to=absent_to,
    )


class _Values:
    """Reads the label column. Of artifacts by name, those that occur anywhere in the column were assessed."""

    def __init__(self, grid: Grid, columns: Mapping[int, Column], labelling: Labelling, path: Path) -> None:
        self.labelling = labelling
        self._assessed: set[str] = set()
        place = next((place for place, column in columns.items() if column == ("label", "")), None)
        if place is None:
            if labelling.artifact and ("present", labelling.artifact) not in columns.values():
                raise ConfigError(
                    f"{path}: --label {labelling.artifact}, and no column label",
                    code="bad-argument",
                    hint="--label-column TITLE names the column",
                )
            return
        texts = {_text(line[place - 1]) for line in grid[1:] if place <= len(line)} - _BLANK
        if labelling.artifact:
            return
        numbers = [text for text in texts if _NUMBER.fullmatch(text)]
        if numbers:
            raise ConfigError(
                f"{path}: column {letters(place)} holds numbers, and not which artifact they are about",
                code="bad-argument",
                hint=f"--label, one of {', '.join(NAMES)}; of a score --present-from too",
            )
        for text in texts:
            self._assessed.update(name for name in self._names(text) or () if name)

    def _names(self, text: str) -> list[str] | None:
        """The artifacts that a cell names; None where it cannot be understood."""
        if text in _ABSENT:
            return []
        try:
            return [parse_name(part) for part in re.split(r"\s*[+;,/|&]\s*", text)]
        except ConfigError:
            return None

    def answers(self, text: str) -> dict[str, float] | None:
        """Artifact → 1 or 0; None where the cell cannot be understood."""
        text = _text(text)
        if text in _BLANK:
            return {}
        about = self.labelling.artifact
        if not about:
            names = self._names(text)
            return None if names is None else {name: float(name in names) for name in self._assessed}
        if self.labelling.present_from is not None:
            if not _NUMBER.fullmatch(text):
                return None
            score, low = float(text), self.labelling.absent_to
            if score >= self.labelling.present_from:
                return {about: 1.0}
            return {about: 0.0} if low is None or score <= low else {}
        if text in _PRESENT or self._names(text) == [about]:
            return {about: 1.0}
        return {about: 0.0} if text in _ABSENT else None


def _columns(
    header: Sequence[Cell], labelling: Labelling, path: Path
) -> tuple[dict[int, Column], dict[int, str]]:
    """What each column is, by its place from 1; and the titles that mean nothing here."""
    columns: dict[int, Column] = {}
    unused: dict[int, str] = {}
    for place, cell in enumerate(header, start=1):
        if not isinstance(cell, str) or not cell:
            continue
        column = _column(cell, labelling)
        if column is None or column in columns.values():
            unused[place] = cell
        else:
            columns[place] = column
    if ("file", "") not in columns.values():
        raise DataError(
            f"{path}: no column that names the files",
            code="labels-missing",
            hint=f"a title such as {', '.join(TITLES['file'][:3])} in the first row",
        )
    if labelling.column and ("label", "") not in columns.values():
        raise ConfigError(
            f"{path}: no column {labelling.column!r}",
            code="bad-argument",
            hint=f"columns: {', '.join(cell for cell in header if isinstance(cell, str) and cell)}",
        )
    return columns, unused


def _column(title: str, labelling: Labelling) -> Column | None:
    name = _spelled(title)
    if labelling.column:
        if name == _spelled(labelling.column):
            return "label", ""
        titles = {kind: words for kind, words in TITLES.items() if kind != "label"}
    else:
        titles = TITLES
    for kind, words in titles.items():
        if name in map(_spelled, words):
            return kind, ""
    for fact in FACTS:
        if name == _spelled(fact):
            return fact, ""
    for artifact in ARTIFACTS:
        for word in (artifact.name, artifact.chinese, *artifact.synonyms):
            if name == _spelled(word):
                return "present", artifact.name
            if name in {_spelled(f"{word}_severity"), _spelled(f"{word}严重程度")}:
                return "severity", artifact.name
    return None


def _file_of(cells: Mapping[Column, tuple[int, Cell]], row: int, found: Found, folder: str) -> str:
    """The file that a row names, relative to the folder of the collection; "" where that is a problem."""
    cell = cells.get(("file", ""), (0, ""))[1]
    text = "" if isinstance(cell, Spoilt) else cell.strip().replace("\\", "/").removeprefix("./")
    path = PurePosixPath(text)
    if isinstance(cell, Spoilt):
        text_of(dict(cells), ("file", ""), row, found)
        return ""
    if not text or path.is_absolute() or ".." in path.parts or _DRIVE.match(text):
        _add(found, row, cells, "file", "a file below SRC, without ..")
        return ""
    return folder + path.as_posix()


def _take(entry: Entry, cells: dict[Column, tuple[int, Cell]], row: int, found: Found) -> None:
    """Patient, site, modality and acquisition of a row; rows about one file must agree."""
    for kind in ("patient", "site"):
        text = text_of(cells, (kind, ""), row, found)
        if text and getattr(entry, kind) not in {"", text}:
            _add(found, row, cells, kind, f"the {kind} that another row gives this file")
        elif text:
            setattr(entry, kind, text)
    if text := text_of(cells, ("modality", ""), row, found):
        if text.lower() in _MODALITIES:
            entry.modality = _MODALITIES[text.lower()]
        else:
            _add(found, row, cells, "modality", "CT or MR")
    for fact, argument in FACTS.items():
        if (text := text_of(cells, (fact, ""), row, found)).lower() in _BLANK:
            continue
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
        if value > 0:
            entry.facts[argument] = value
        else:
            _add(found, row, cells, fact, "a number above 0, or blank")


def _row_of(cells: dict[Column, tuple[int, Cell]], row: int, found: Found, values: _Values) -> LabelRow:
    present, severity = map(list, answers_of(_without_na(cells), row, found))
    if ("label", "") in cells:
        answers = values.answers(text_of(cells, ("label", ""), row, found))
        if answers is None:
            about = values.labelling.artifact
            expected = "a number" if values.labelling.present_from is not None else "1, 0 or blank"
            if not about:
                expected = f"clean, or artifacts by name ({', '.join(NAMES)})"
            _add(found, row, cells, "label", expected)
        for name, answer in (answers or {}).items():
            present[INDEX[name]] = answer
    part = text_of(cells, ("part", ""), row, found).lower()
    if part not in _PARTS:
        _add(found, row, cells, "part", f"{', '.join(PARTS)} or blank")
    return LabelRow(
        row=row,
        key=RowKey(),
        reader=text_of(cells, ("reader", ""), row, found),
        is_panel=text_of(cells, ("role", ""), row, found).lower() in _PANEL,
        present=tuple(present),
        severity=tuple(severity),
        part=_PARTS.get(part),
    )


def _without_na(cells: Mapping[Column, tuple[int, Cell]]) -> dict[Column, tuple[int, Cell]]:
    """Artifact columns with `n/a`, as BIDS writes it, as blank."""
    return {
        column: (place, "" if isinstance(cell, str) and _text(cell) in _BLANK else cell)
        for column, (place, cell) in cells.items()
    }


def _add(
    found: Found,
    row: int,
    cells: Mapping[Column, Any],
    kind: str,
    expected: str,
    *,
    code: str = "bad-label",
) -> None:
    found.add(row, cells[kind, ""][0], code=code, title=kind, expected=expected)


def _stem(name: str) -> str:
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _text(cell: Cell) -> str:
    return "" if isinstance(cell, Spoilt) else _plain(cell)


def _spelled(text: str) -> str:
    return re.sub(r"[\s_.\-]", "", _plain(text))
