"""Write and read the workbooks that readers fill in.

One workbook a reader, rows in an order of its own, each with a picture and a key that reveals nothing.

A row is known by a keyed hash of what it shows, of the batch and of the reader: two readers cannot tell from
keys or order which of their rows are the same image, and a workbook of another hospital is recognized. No
path, UID, patient or date is in the file. The pictures are images of patients all the same: a workbook stays
in the hospital.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.labels.label_sheet import Column, answers_of
from client.labels.spreadsheet import MAX_BYTES, Cell, Found, Grid, Spoilt
from common.artifacts import ARTIFACTS, INDEX, NAMES, Modality, applies_to
from common.errors import DataError
from common.preprocess import SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU, from_stored, resample

Per = Literal["image", "series"]
SIDE = 128  # of a picture, pixels
MONTAGE = (2, 4)  # rows and columns of small pictures beside the middle slice of a series
MAX_ROWS = 2000  # what a person reads and a spreadsheet shows with pictures
_LABELS, _HOW, _ABOUT = "labels 标注", "how to 说明", "fedqc"
_LEAD = ("key", "no", "picture", "modality")
_NAME_AT = (1, 1)  # of the how-to page: where a reader may write a name, from 0
_BATCH = re.compile(r"[0-9a-f]{8}")
_CHINESE = {"no": "序号", "picture": "图像", "modality": "模态", "answers": "各阅片人意见", "note": "备注"}
_CHINESE |= {artifact.name: artifact.chinese for artifact in ARTIFACTS}
_INSTRUCTIONS = (
    (
        "Fill in the white cells of the page 'labels'. Work alone: do not compare with other readers "
        "before all are done.",
        "请填写“标注”页的白色单元格。请独立阅片，在所有人完成之前不要互相比较。",
    ),
    (
        "1 = the artifact is present, 0 = it is absent, blank = not assessed. Blank is not 0.",
        "1 = 有该伪影，0 = 无该伪影，留空 = 未评估。留空不等于 0。",
    ),
    (
        "Severity is optional, for what is present: 0 (hardly seen) to 1 (useless for diagnosis).",
        "严重程度可不填，仅用于存在的伪影：0（几乎看不见）至 1（无法诊断）。",
    ),
    (
        "Grey cells do not apply: the artifact cannot occur in the modality, or is not in question.",
        "灰色单元格无需填写：该模态不会出现此伪影，或该项没有争议。",
    ),
    (
        "CT pictures show a soft-tissue window (-160 to 240 HU) and a wide one (-1000 to 2000 HU). Of a "
        "series: the middle slice, then slices "
        "from first to last.",
        "CT 图像并列显示软组织窗（-160 至 240 HU）和宽窗（-1000 至 2000 HU）。"
        "按序列标注时：先是中间层，然后是从头到尾的若干层。",
    ),
    (
        "Do not sort, insert or delete rows. Write no names of patients anywhere.",
        "请勿排序、插入或删除行。请勿在任何位置填写患者信息。",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Item:
    """What one row shows: an image, or a series."""

    identity: str  # raw, in the memory of the hospital's own process; its keyed hash is what a workbook holds
    positions: tuple[int, ...]  # of its images in the site's order
    modality: Modality


@dataclass(frozen=True, kw_only=True)
class About:
    """Whose workbook it is: what keys are made from, beside the site's own."""

    batch: str
    reader: str  # "1", "2", …, or "panel"
    per: Per

    @property
    def is_panel(self) -> bool:
        return self.reader == "panel"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row to be filled in."""

    item: Item
    picture: bytes  # PNG
    is_open: tuple[bool, ...]  # which artifacts are asked, in the order of `NAMES`
    remark: str = ""  # of a panel's workbook: what the readers said


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row as filled in."""

    row: int
    item: Item
    present: tuple[float, ...]
    severity: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Filled:
    about: About
    name: str  # as the reader wrote it, "" where nobody did: to become a pseudonym at once
    answers: tuple[Answer, ...]
    blank: int  # rows without any answer


def batch_name(purpose: str, key: bytes) -> str:
    """The name of a set of workbooks, 8 hex digits."""
    return hmac.new(key, b"batch:" + purpose.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:8]


def row_key(item: Item, about: About, key: bytes) -> str:
    """How a workbook names an item: 20 hex digits that mean something only to who holds the site's key."""
    text = f"row:{about.batch}:{about.reader}:{about.per}:{item.identity}"
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:20]


def shuffled(lines: Sequence[Line], about: About, key: bytes) -> list[Line]:
    """The lines in the reader's own order, which nobody without the site's key can undo."""
    seed = hmac.new(key, f"order:{about.batch}:{about.reader}".encode(), hashlib.sha256).digest()
    return [
        lines[place] for place in np.random.default_rng(int.from_bytes(seed, "big")).permutation(len(lines))
    ]


def picture(images: np.ndarray, modality: Modality, side: int = SIDE) -> bytes:
    """A PNG of a slice, or of a series: its middle slice and small pictures from first to last.

    Args:
        images: int16 (slices, S, S) in the stored form of `common/preprocess.py`, in the order of the series.
        side: of the large picture, pixels; CT shows two side by side.
    """
    from PIL import Image  # with openpyxl, only where a workbook is written

    rows, columns = MONTAGE
    strip = _views(images[len(images) // 2], modality, side)
    if len(images) > 1:
        places = np.linspace(0, len(images) - 1, min(rows * columns, len(images))).round().astype(int)
        small = [_views(images[place], modality, side // rows)[:, : side // rows] for place in places]
        small += [np.zeros_like(small[0])] * (rows * columns - len(small))
        montage = np.vstack([np.hstack(small[row * columns : (row + 1) * columns]) for row in range(rows)])
        strip = np.hstack([strip, montage])
    stream = io.BytesIO()
    Image.fromarray(strip).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def refuse_too_many(rows: int) -> None:
    """Raises: DataError: `too-many-rows`."""
    if rows > MAX_ROWS:
        raise _too_many(rows)


def _too_many(rows: int) -> DataError:
    return DataError(
        f"{rows} rows with pictures; a workbook holds {MAX_ROWS} rows and {MAX_BYTES >> 20} MiB",
        code="too-many-rows",
        hint="--per series gives a row a series; or make a site.yaml for each part of the images",
    )


def write_workbook(lines: Sequence[Line], about: About, key: bytes) -> bytes:
    """An .xlsx with a page to fill in (drop-downs, grey where nothing is asked), a how-to in English and
    Chinese, and a hidden page.

    Raises:
        DataError: `too-many-rows`.
    """
    from openpyxl import Workbook
    from openpyxl.drawing.image import Image
    from openpyxl.styles import Alignment, Font, PatternFill, Protection

    refuse_too_many(len(lines))
    workbook = Workbook()
    workbook.properties.creator = "fedqc"
    page = workbook.active
    page.title = _LABELS
    asked = [name for name in NAMES if any(line.is_open[INDEX[name]] for line in lines)]
    titles = [
        *_LEAD,
        *(["answers"] if about.is_panel else []),
        *asked,
        *(f"{name}_severity" for name in asked),
        "note",
    ]
    page.append([_shown(title) for title in titles])
    open_cell, grey = Protection(locked=False), PatternFill("solid", fgColor="D9D9D9")
    top, small = Alignment(wrap_text=True, vertical="top"), Font(size=6, color="909090")
    for number, line in enumerate(lines, start=2):
        values = [
            row_key(line.item, about, key),
            number - 1,
            None,
            line.item.modality,
            *([line.remark] if about.is_panel else []),
        ]
        page.append(values)
        page.row_dimensions[number].height = SIDE * 0.75 + 4
        page.add_image(Image(io.BytesIO(line.picture)), f"C{number}")
        for place, title in enumerate(titles, start=1):
            cell = page.cell(row=number, column=place)
            cell.alignment = top
            name = title.removesuffix("_severity")
            if title == "note" or (name in INDEX and line.is_open[INDEX[name]]):
                cell.protection = open_cell
            elif name in INDEX:
                cell.fill = grey
        page.cell(row=number, column=1).font = small
    widths = {
        "key": 6,
        "no": 5,
        "picture": picture_width(line.picture for line in lines),
        "answers": 44,
        "note": 30,
    }
    for place, title in enumerate(titles, start=1):
        head = page.cell(row=1, column=place)
        head.font, head.alignment = Font(bold=True), top
        letter = head.column_letter
        page.column_dimensions[letter].width = widths.get(title, 14)
        if title.removesuffix("_severity") in INDEX:
            rule = _validation(title)
            page.add_data_validation(rule)
            rule.add(f"{letter}2:{letter}{max(len(lines) + 1, 2)}")
    page.freeze_panes = page.cell(row=2, column=len(_LEAD) + 1)
    page.protection.sheet = True  # without a password: against slips, not against people
    page.protection.formatColumns = page.protection.formatRows = False
    how = workbook.create_sheet(_HOW)
    who = "the panel 仲裁组" if about.is_panel else f"reader {about.reader} 阅片人"
    how.append([f"This workbook is for {who}."])
    how.append(
        ["Your name or initials (optional; a pseudonym replaces it) 姓名或代号（可不填，将以化名代替）:"]
    )
    how.cell(row=2, column=2).protection = open_cell
    for english, chinese in _INSTRUCTIONS:
        how.append([english])
        how.append([chinese])
    how.append([])
    for artifact in ARTIFACTS:
        if artifact.name in asked:
            where = ", ".join(artifact.modalities)
            how.append([f"{artifact.name} {artifact.chinese} ({where}): {artifact.definition}"])
    how.column_dimensions["A"].width, how.column_dimensions["B"].width = 110, 24
    for row in how.iter_rows():
        row[0].alignment = top
    how.protection.sheet = True
    return finished(workbook, about, len(lines))


def finished(workbook: Any, about: About, rows: int) -> bytes:
    """The file of a workbook, with the hidden page that `about_of` reads.

    Raises:
        DataError: `too-many-rows`.
    """
    hidden = workbook.create_sheet(_ABOUT)
    hidden.sheet_state = "hidden"
    for name, value in (("batch", about.batch), ("reader", about.reader), ("per", about.per)):
        hidden.append([name, value])
    stream = io.BytesIO()
    workbook.save(stream)
    # a spreadsheet saves it a little larger, and then it must be read again
    if stream.tell() > MAX_BYTES * 0.9:
        raise _too_many(rows)
    return stream.getvalue()


def is_ours(pages: Mapping[str, Grid] | None) -> bool:
    """Whether a workbook is one of `write_workbook`'s."""
    return pages is not None and _ABOUT in pages and _LABELS in pages


def about_of(pages: Mapping[str, Grid], path: Path) -> About:
    """Whose workbook it is.

    Raises:
        DataError: `bad-label`, the hidden page is damaged or missing.
    """
    said = {str(row[0]): str(row[1]) for row in pages.get(_ABOUT, []) if len(row) > 1}
    batch, reader, per = said.get("batch", ""), said.get("reader", ""), said.get("per", "")
    if (
        not _BATCH.fullmatch(batch)
        or not re.fullmatch(r"\d{1,3}|panel", reader)
        or per not in {"image", "series"}
    ):
        raise DataError(
            f"{path}: the hidden page 'fedqc' was changed",
            code="bad-label",
            hint="use the workbook as `fedqc data` wrote it",
        )
    return About(batch=batch, reader=reader, per="image" if per == "image" else "series")


def read_workbook(
    pages: Mapping[str, Grid], path: Path, items: Sequence[Item], key: bytes, found: Found
) -> Filled:
    """What a reader filled in. A bad cell goes to `found` and counts as blank.

    Raises:
        DataError: `other-site` (no row is of this site and reader), `bad-label` (the hidden page is damaged).
    """
    about = about_of(pages, path)
    known = {row_key(item, about, key): item for item in items}
    grid = pages[_LABELS]
    titles = (
        [cell.split("\n", 1)[0].strip() if isinstance(cell, str) else "" for cell in grid[0]] if grid else []
    )
    columns: dict[int, Column] = {}
    for place, title in enumerate(titles, start=1):
        name = title.removesuffix("_severity")
        if name in INDEX:
            columns[place] = ("present" if name == title else "severity", name)
    rows = [(number, line, _plain(line[0])) for number, line in enumerate(grid[1:], start=2) if line]
    if not columns or titles[:1] != ["key"] or not any(name in known for _, _, name in rows):
        raise DataError(
            f"{path}: no row of this workbook belongs to this site and reader",
            code="other-site",
            hint="merge at the site that wrote it, with the same state folder; do not copy rows "
            "between workbooks",
        )
    answers: list[Answer] = []
    seen: dict[str, int] = {}
    blank = 0
    for number, line, name in rows:
        item = known.get(name)
        if item is None:
            if any(cell != "" for cell in line):
                found.add(
                    number,
                    1,
                    code="unknown-key",
                    title="key",
                    expected="the key of a row of this workbook, unchanged",
                )
            continue
        if name in seen:
            expected = f"each key once; row {seen[name]} has it"
            found.add(number, 1, code="duplicate-label", title="key", expected=expected)
            continue
        seen[name] = number
        cells = {
            columns[place]: (place, cell) for place, cell in enumerate(line, start=1) if place in columns
        }
        for (_, artifact), (place, cell) in cells.items():
            if cell != "" and not applies_to(item.modality)[INDEX[artifact]]:
                expected = f"blank, because it cannot occur in {item.modality}"
                found.add(number, place, code="wrong-modality", title=artifact, expected=expected)
        present, severity = answers_of(cells, number, found)
        if np.isnan(present).all():
            blank += 1
        else:
            answers.append(Answer(row=number, item=item, present=present, severity=severity))
    return Filled(about=about, name=_name_of(pages.get(_HOW, [])), answers=tuple(answers), blank=blank)


def _name_of(how: Grid) -> str:
    row, column = _NAME_AT
    return _plain(how[row][column]) if len(how) > row and len(how[row]) > column else ""


def _plain(cell: Cell) -> str:
    return "" if isinstance(cell, Spoilt) else cell


def _shown(title: str) -> str:
    """The first line of a title is what is read back."""
    name = title.removesuffix("_severity")
    return f"{title}\n{_CHINESE.get(name, '')}{'严重程度' if name != title else ''}".rstrip()


def _validation(title: str) -> Any:
    from openpyxl.worksheet.datavalidation import DataValidation

    if title.endswith("_severity"):
        rule = DataValidation(
            type="decimal", operator="between", formula1="0", formula2="1", allow_blank=True
        )
        rule.error = "0 … 1, or blank 或留空"
    else:
        rule = DataValidation(type="list", formula1='"1,0"', allow_blank=True)
        rule.error = "1 = present 有, 0 = absent 无, blank = not assessed 留空 = 未评估"
    rule.errorTitle, rule.showErrorMessage = "fedqc", True
    return rule


def picture_width(pictures: Iterable[bytes]) -> float:
    """Of the pictures' column, in the spreadsheet's unit of about 7 pixels."""
    # PNG: the IHDR chunk begins with the width
    widths = [int.from_bytes(png[16:20], "big") for png in pictures]
    return max(widths, default=SIDE) / 7 + 2


def _views(stored: np.ndarray, modality: Modality, side: int) -> np.ndarray:
    """A slice as grey values, uint8: CT in two windows side by side (side, 2 side), MR (side, side)."""
    image = resample(from_stored(stored, modality), side)
    windows = (SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU) if modality == "CT" else ((0.0, 1.0),)
    views = [np.clip((image - low) / (high - low), 0, 1) for low, high in windows]
    return np.rint(np.hstack(views) * 255).astype(np.uint8)
