"""The hospital's label sheet: one CSV, one row an image, one column an artifact.

    file,metal,beam_hardening,motion,susceptibility,chemical_shift,metal_severity,part
    ct/0001.dcm,1,0,,,,0.6,train

A cell is 1 (present), 0 (absent) or blank (not assessed, which is not the same as absent). Artifact columns may carry any name or synonym
of `common/artifacts.py`. Optional: `<artifact>_severity`, 0 to 1, and `part`, which fixes the part of the patient.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.artifacts import INDEX, NAMES, parse_name
from common.errors import ConfigError, DataError
from common.imaging.index import PARTS, Part

MAX_BYTES = 64 << 20
_PRESENT = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": math.nan}  # spreadsheets write 1.0 in columns that have blanks
_SEVERITY_SUFFIXES = ("_severity", " severity", "_严重程度", "严重程度")


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """One row. `present` is 1, 0 or nan (not assessed); `severity` is 0..1 or nan; both in the order of `NAMES`."""

    row: int  # as a spreadsheet shows it; the header is row 1
    file: str
    present: tuple[float, ...]
    severity: tuple[float, ...]
    part: Part | None


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    path: Path
    rows: dict[str, LabelRow]  # by file, in the order of the sheet
    artifacts: tuple[str, ...]  # those that have a column


@dataclass(frozen=True, kw_only=True)
class MatchedLabels:
    """Labels in the order of a list of images, and what did not fit. Row numbers are local."""

    present: np.ndarray  # float32 (images, artifacts), nan = not assessed
    severity: np.ndarray  # float32 (images, artifacts), nan = unknown
    parts: tuple[Part | None, ...]
    rows_without_image: tuple[int, ...]
    images_without_label: int
    wrong_modality: tuple[int, ...]  # rows that claim an artifact which cannot occur in the image's modality; the claim is dropped


def read_labels(path: Path) -> LabelTable:
    """Read and check the whole sheet.

    Raises:
        DataError: `labels-missing` (no sheet, no `file` or no artifact column), `unknown-artifact` (a column nobody knows), `bad-label` (a
            cell; the message names row, column, value and what is allowed), `duplicate-label` (two rows for one file).
    """
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True)
    try:
        lines = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: row {reader.line_num}: not a CSV row: {error}", code="bad-label", hint="save the sheet as CSV") from error
    if not lines or not any(lines[0]):
        raise DataError(f"{path}: the sheet is empty", code="labels-missing", hint=f"first row: file,{','.join(NAMES)}")
    columns = [_column(title, path) for title in lines[0]]
    for column in set(columns):
        if columns.count(column) > 1:
            raise DataError(f"{path}: two columns for {' '.join(column)}", code="bad-label", hint="keep one of them")
    if ("file", "") not in columns:
        raise DataError(f"{path}: no column 'file'", code="labels-missing", hint="file = path of the image, relative to the images folder")
    artifacts = tuple(name for name in NAMES if ("present", name) in columns)
    if not artifacts:
        raise DataError(f"{path}: no artifact column", code="labels-missing", hint=f"known: {', '.join(NAMES)}")
    rows: dict[str, LabelRow] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(columns):
            raise DataError(
                f"{path}: row {number} has {len(cells)} cells; the header has {len(columns)}",
                code="bad-label",
                hint="a comma inside a file name needs quotes",
            )
        row = _row(dict(zip(columns, cells, strict=False)), number, path)
        if row.file in rows:
            raise DataError(
                f"{path}: rows {rows[row.file].row} and {number} both label {row.file!r}", code="duplicate-label", hint="keep one of them"
            )
        rows[row.file] = row
    if not rows:
        raise DataError(f"{path}: the sheet has a header and no row", code="labels-missing", hint="one row an image")
    return LabelTable(path=path, rows=rows, artifacts=artifacts)


def match_labels(table: LabelTable, files: list[str], may_occur: np.ndarray) -> MatchedLabels:
    """Bring the labels into the order of `files`.

    Args:
        files: the usable images, relative to the images folder.
        may_occur: bool (images, artifacts), whether the artifact can occur in the image's modality.
    Raises:
        DataError: `labels-match-nothing`.
    """
    present = np.full((len(files), len(NAMES)), np.nan, np.float32)
    severity = np.full_like(present, np.nan)
    parts: list[Part | None] = [None] * len(files)
    wrong: list[int] = []
    matched = set()
    for position, file in enumerate(files):
        row = table.rows.get(file)
        if row is None:
            continue
        matched.add(file)
        parts[position] = row.part
        claims = np.array(row.present, np.float32)
        if (claims[~may_occur[position]] == 1).any():
            wrong.append(row.row)
        present[position] = np.where(may_occur[position], claims, np.nan)
        severity[position] = np.where(may_occur[position], row.severity, np.nan)
    if not matched:
        first = next(iter(table.rows))
        raise DataError(
            f"{table.path}: none of the {len(table.rows)} rows names one of the {len(files)} usable images; first row: {first!r}",
            code="labels-match-nothing",
            hint="file = path relative to the images folder, with forward slashes, including the ending",
        )
    return MatchedLabels(
        present=present,
        severity=severity,
        parts=tuple(parts),
        rows_without_image=tuple(row.row for row in table.rows.values() if row.file not in matched),
        images_without_label=len(files) - len(matched),
        wrong_modality=tuple(sorted(wrong)),
    )


def _text_of(path: Path) -> str:
    """The sheet's text: UTF-8, or GB 18030 as Chinese spreadsheets save it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than {MAX_BYTES} bytes", code="bad-label", hint="a label sheet has one short row an image")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the labels: {error.strerror}", code="labels-missing", hint="site.yaml: labels = the CSV sheet"
        ) from error
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}: neither UTF-8 nor GB 18030 text", code="bad-label", hint="save the sheet as CSV UTF-8")


def _column(title: str, path: Path) -> tuple[str, str]:
    """("file" | "part" | "present" | "severity", artifact or "")."""
    name = title.strip().lower()
    if name in {"file", "part"}:
        return name, ""
    kind = "present"
    for suffix in _SEVERITY_SUFFIXES:
        if name.endswith(suffix):
            kind, name = "severity", name.removesuffix(suffix)
            break
    try:
        return kind, parse_name(name)
    except ConfigError:
        raise DataError(
            f"{path}: unknown column {title!r}",
            code="unknown-artifact",
            hint=f"known: file, part, {', '.join(NAMES)}, each artifact also with _severity",
        ) from None


def _row(cells: dict[tuple[str, str], str], number: int, path: Path) -> LabelRow:
    present, severity = [math.nan] * len(NAMES), [math.nan] * len(NAMES)
    for (kind, artifact), cell in cells.items():
        text = cell.strip()
        if kind == "present":
            if text not in _PRESENT:
                raise _bad_cell(path, number, artifact, text, "1, 0 or blank")
            present[INDEX[artifact]] = _PRESENT[text]
        elif kind == "severity" and text:
            try:
                severity[INDEX[artifact]] = float(text)
            except ValueError:
                raise _bad_cell(path, number, f"{artifact}_severity", text, "a number from 0 to 1, or blank") from None
            if not 0 <= severity[INDEX[artifact]] <= 1:
                raise _bad_cell(path, number, f"{artifact}_severity", text, "a number from 0 to 1, or blank")
    for position, artifact in enumerate(NAMES):
        if severity[position] > 0 and present[position] != 1:
            raise _bad_cell(path, number, f"{artifact}_severity", str(severity[position]), f"blank or 0, because {artifact} is not 1")
    part = cells.get(("part", ""), "").strip().lower()
    known = next((name for name in PARTS if name == part), None)
    if part and known is None:
        raise _bad_cell(path, number, "part", part, f"{', '.join(PARTS)} or blank")
    return LabelRow(
        row=number, file=_file(cells.get(("file", ""), ""), number, path), present=tuple(present), severity=tuple(severity), part=known
    )


def _file(cell: str, number: int, path: Path) -> str:
    text = cell.strip().replace("\\", "/")
    relative = PurePosixPath(text)
    if not text or relative.is_absolute() or ".." in relative.parts or text[1:2] == ":":
        raise _bad_cell(path, number, "file", cell, "a path relative to the images folder")
    return relative.as_posix()


def _bad_cell(path: Path, number: int, column: str, value: str, allowed: str) -> DataError:
    return DataError(f"{path}: row {number}, {column} = {value!r}; expected {allowed}", code="bad-label", hint="correct the cell")
