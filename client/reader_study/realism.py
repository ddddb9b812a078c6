"""Test whether readers can tell simulated artifacts from real images: blinded workbooks and their evaluation.

A workbook shows simulated slices and, among them, untouched ones, in an order of its own; a reader marks each
as realistic or not. What a row is stands in `key.json` alone, which stays with whoever organises the reading.
Row keys and orders are drawn anew each time and hang on no seed: who knows the command that made a workbook
knows nothing about its rows.
"""

from __future__ import annotations

import io
import json
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from client.labels.reader_agreement import agreement, wilson
from client.labels.spreadsheet import Cell, Grid, read_pages
from client.reader_study.labelling import MAX_READERS
from client.reader_study.workbooks import About, about_of, finished, picture, picture_width, refuse_too_many
from client.simulation.gallery import refuse_place
from client.simulation.gallery_text import gallery_speaker, title_of
from client.simulation.real_slices import RealSlice, Wish, chosen_slices, seed_of, simulate
from common.artifacts import Modality, parse_name
from common.errors import ConfigError, DataError
from common.files import whole_folder, write_bytes
from common.physics import SIMULATORS
from common.preprocess import normalize_image, to_stored
from common.strict import StrictModel

SIDE = 256  # of a picture, pixels
DRAWS = 5
MIN_SEEN = 0.01
"""Share of the body that a simulation must change: a row that shows nothing asks nothing."""
UNTOUCHED_SHARE = 0.2  # of the rows of each modality
# above, up to
BANDS: dict[str, tuple[float, float]] = {
    "mild": (0.0, 1 / 3),
    "moderate": (1 / 3, 2 / 3),
    "severe": (2 / 3, 1.0),
}
KEY_FILE = "key.json"
SHOWN_PROBLEMS = 12
_PAGE, _HOW = "realism 真实性", "how to 说明"
_TITLES = (
    "key",
    "no 序号",
    "picture 图像",
    "modality 模态",
    "realistic? 是否真实",
    "artifact seen 所见伪影",
    "note 备注",
)
_VERDICT, _SEEN = 4, 5  # columns, from 0
REALISTIC, NOT_REALISTIC = "realistic", "not realistic"
_WORDS = {REALISTIC: 1.0, "真实": 1.0, NOT_REALISTIC: 0.0, "不真实": 0.0}
_INSTRUCTIONS = (
    (
        "Every row shows one slice. Some are as the scanner made them; on others an artifact was simulated.",
        "每行显示一张切片。有些是设备采集的原图，有些加入了模拟的伪影。",
    ),
    (
        (
            "Column 'realistic?': 'realistic' if the picture could be what a scanner made, with or without "
            "an artifact; else 'not realistic'."
        ),
        "“是否真实”列：若图像（无论有无伪影）可能是设备真实采集的，选 realistic；否则选 not realistic。",
    ),
    (
        (
            "Column 'artifact seen' is optional: which artifact, in your own words. Leave it blank where you "
            "see none."
        ),
        "“所见伪影”列可不填：您看到的伪影，用自己的话写。未见伪影请留空。",
    ),
    (
        "CT pictures show a soft-tissue window (-160 to 240 HU) and a wide one (-1000 to 2000 HU).",
        "CT 图像并列显示软组织窗（-160 至 240 HU）和宽窗（-1000 至 2000 HU）。",
    ),
    (
        (
            "Work alone: do not compare with other readers before all are done. Do not sort, insert or "
            "delete rows. Write no names of patients."
        ),
        "请独立阅片，在所有人完成之前不要互相比较。请勿排序、插入或删除行。请勿填写患者信息。",
    ),
)


class KeyRow(StrictModel):
    """What one row is. Seed, severity and parameters make it again from the same slice."""

    slice: str  # "CT slice 1", as the command counts them
    modality: Literal["CT", "MR"]
    artifact: str | None  # of `SIMULATORS`; None: untouched
    severity: float = Field(ge=0, le=1)
    seed: int
    params: dict[str, Any]
    # reader → key of the row in that reader's workbook
    rows: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{20}$")]]


class Key(StrictModel):
    """key.json."""

    version: Literal[1] = 1
    batch: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    readers: int = Field(ge=1, le=MAX_READERS)
    seed: int
    rows: list[KeyRow] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row before it has keys."""

    clean: RealSlice
    artifact: str | None
    severity: float
    seed: int
    params: dict[str, Any]
    image: np.ndarray


# handing out


def hand_out(
    src: Path, folder: Path, wanted: Wish, *, readers: int, say: Callable[[str], None]
) -> list[Path]:
    """Write a workbook for each reader and `key.json` into a new folder.

    Raises:
        ConfigError: `bad-argument`, `output-exists`, `not-writable`.
        DataError: `no-usable-images`, `too-many-rows`.
    """
    if not 1 <= readers <= MAX_READERS:
        raise ConfigError(
            f"--readers {readers}: expected 1 to {MAX_READERS}",
            code="bad-argument",
            hint="one workbook a reader",
        )
    refuse_place(folder / KEY_FILE if folder.is_dir() else folder, src, "--blind DIR")
    chosen, more = chosen_slices(src, wanted, say)
    count = sum(
        len(slices) * len(wanted.of(modality)) * len(wanted.severities) for modality, slices in chosen.items()
    )
    refuse_too_many(math.ceil(count / (1 - UNTOUCHED_SHARE)))  # before hundreds of pictures are drawn
    rows: list[_Row] = []
    for modality, slices in chosen.items():
        own, nothing = _simulated(modality, slices, wanted)
        if nothing:
            say(
                "left out, changes nothing that can be seen: "
                + ", ".join(f"{times} × {name}" for name, times in sorted(nothing.items()))
            )
        untouched = math.ceil(len(own) * UNTOUCHED_SHARE / (1 - UNTOUCHED_SHARE))
        rows += own + [
            _untouched(one, modality, wanted) for one in _controls(slices, more[modality], untouched)
        ]
    batch = secrets.token_hex(4)
    keys = [{str(reader): secrets.token_hex(10) for reader in range(1, readers + 1)} for _ in rows]
    pictures = [_picture(row) for row in rows]
    with whole_folder(folder) as staging:
        for number in range(1, readers + 1):
            order = list(range(len(rows)))
            secrets.SystemRandom().shuffle(order)
            lines = [(keys[at][str(number)], pictures[at], rows[at].clean.modality) for at in order]
            about = About(batch=batch, reader=str(number), per="image")
            write_bytes(staging / f"realism-reader-{number}.xlsx", _workbook(lines, about), mode=0o600)
        key = Key(
            batch=batch,
            readers=readers,
            seed=wanted.seed,
            rows=[
                KeyRow(
                    slice=row.clean.name,
                    modality=row.clean.modality,
                    artifact=row.artifact,
                    severity=row.severity,
                    seed=row.seed,
                    params=row.params,
                    rows=own,
                )
                for row, own in zip(rows, keys, strict=True)
            ],
        )
        write_bytes(
            staging / KEY_FILE,
            (json.dumps(key.model_dump(), ensure_ascii=False, indent=1) + "\n").encode(),
            mode=0o600,
        )
    simulated = sum(row.artifact is not None for row in rows)
    say(
        f"{simulated} simulated and {len(rows) - simulated} untouched slices; {KEY_FILE} says which is "
        "which: keep it from the readers"
    )
    return [
        *(folder / f"realism-reader-{number}.xlsx" for number in range(1, readers + 1)),
        folder / KEY_FILE,
    ]


def _simulated(
    modality: Modality, slices: Sequence[RealSlice], wanted: Wish
) -> tuple[list[_Row], Counter[str]]:
    """A row for each artifact, severity and slice, and how often an artifact changed nothing in `DRAWS`
    draws.
    """
    rows: list[_Row] = []
    nothing: Counter[str] = Counter()
    for name in wanted.of(modality):
        for severity in wanted.severities:
            for clean in slices:
                for draw in range(DRAWS):
                    made = simulate(
                        clean, name, severity, seed_of(wanted.seed, "blind", name, severity, clean.name, draw)
                    )
                    if made.changed >= MIN_SEEN:
                        rows.append(
                            _Row(
                                clean=clean,
                                artifact=name,
                                severity=severity,
                                seed=made.seed,
                                params=made.params[name],
                                image=made.corrupted,
                            )
                        )
                        break
                else:
                    nothing[name] += 1
    return rows, nothing


def _controls(slices: Sequence[RealSlice], more: Iterator[RealSlice], count: int) -> list[RealSlice]:
    """Slices to show untouched, each once: rather such as no reader sees with an artifact."""
    fresh = list(islice(more, count))
    return fresh + list(slices[: count - len(fresh)])


def _untouched(clean: RealSlice, modality: Modality, wanted: Wish) -> _Row:
    """Through the same code as all the others, at severity zero."""
    made = simulate(clean, wanted.of(modality)[0], 0.0, seed_of(wanted.seed, "untouched", clean.name))
    return _Row(clean=clean, artifact=None, severity=0.0, seed=made.seed, params={}, image=made.corrupted)


def _picture(row: _Row) -> bytes:
    modality = row.clean.modality
    return picture(to_stored(normalize_image(row.image, modality, SIDE), modality)[None], modality, SIDE)


def _workbook(lines: Sequence[tuple[str, bytes, str]], about: About) -> bytes:
    """An .xlsx with a page to fill in and a how-to; the same form as the label sheets of `workbooks.py`."""
    from openpyxl import Workbook
    from openpyxl.drawing.image import Image
    from openpyxl.styles import Alignment, Font, Protection
    from openpyxl.worksheet.datavalidation import DataValidation

    workbook = Workbook()
    workbook.properties.creator = "fedqc"
    page = workbook.active
    page.title = _PAGE
    page.append(list(_TITLES))
    top, small = Alignment(wrap_text=True, vertical="top"), Font(size=6, color="909090")
    for number, (key, png, modality) in enumerate(lines, start=2):
        page.append([key, number - 1, None, modality])
        page.row_dimensions[number].height = SIDE * 0.75 + 4
        page.add_image(Image(io.BytesIO(png)), f"C{number}")
        for column in range(1, len(_TITLES) + 1):
            cell = page.cell(row=number, column=column)
            cell.alignment = top
            if column > _VERDICT:
                cell.protection = Protection(locked=False)
        page.cell(row=number, column=1).font = small
    widths = (6, 6, picture_width(png for _, png, _ in lines), 10, 16, 26, 30)
    for column, width in enumerate(widths, start=1):
        head = page.cell(row=1, column=column)
        head.font, head.alignment = Font(bold=True), top
        page.column_dimensions[head.column_letter].width = width
    rule = DataValidation(type="list", formula1=f'"{REALISTIC},{NOT_REALISTIC}"', allow_blank=True)
    rule.error, rule.errorTitle, rule.showErrorMessage = (
        f"{REALISTIC} 真实, {NOT_REALISTIC} 不真实",
        "fedqc",
        True,
    )
    page.add_data_validation(rule)
    letter = page.cell(row=1, column=_VERDICT + 1).column_letter
    rule.add(f"{letter}2:{letter}{len(lines) + 1}")
    page.freeze_panes = page.cell(row=2, column=4)
    page.protection.sheet = True  # without a password: against slips, not against people
    page.protection.formatColumns = page.protection.formatRows = False
    how = workbook.create_sheet(_HOW)
    how.append(
        [f"This workbook is for reader {about.reader} 阅片人. Fill in the white cells of the first page."]
    )
    for sentences in _INSTRUCTIONS:
        for sentence in sentences:
            how.append([sentence])
    how.column_dimensions["A"].width = 120
    for row in how.iter_rows():
        row[0].alignment = top
    how.protection.sheet = True
    return finished(workbook, about, len(lines))


# counting what comes back


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What readers marked, in the order of the key's rows."""

    key: Key
    verdicts: np.ndarray  # (readers, rows): 1 realistic, 0 not, nan not filled in
    seen: list[list[str]]  # (readers, rows): the artifact written down, "" where none; never shown

    @property
    def readers(self) -> list[int]:
        """Those who answered something."""
        return [reader for reader in range(len(self.verdicts)) if not np.isnan(self.verdicts[reader]).all()]


def acceptance(folder: Path, *, seed: int = 7) -> dict[str, Any]:
    """The report on the workbooks in `folder`, beside the `key.json` that belongs to them.

    Raises:
        ConfigError: `no-such-folder`.
        DataError: `no-answer-key`, or the code of the first of everything that is wrong with the workbooks:
            all of it is in the message.
    """
    answers = read_answers(folder)
    key, verdicts, readers = answers.key, answers.verdicts, answers.readers
    of_artifact = {name: np.array([row.artifact == name for row in key.rows]) for name in SIMULATORS}
    severity = np.array([row.severity for row in key.rows])
    artifacts: dict[str, Any] = {}
    for name, own in of_artifact.items():
        if own.any():
            bands = {band: own & (severity > low) & (severity <= high) for band, (low, high) in BANDS.items()}
            artifacts[name] = _counted(verdicts, own, readers) | {
                "bands": {
                    band: _counted(verdicts, rows, readers) for band, rows in bands.items() if rows.any()
                }
            }
    untouched = np.array([row.artifact is None for row in key.rows])
    _, slices = np.unique([row.slice for row in key.rows], return_inverse=True)
    sources = np.tile(np.arange(len(key.rows)), (len(verdicts), 1))
    pairs, together = agreement(verdicts, sources, slices, seed=seed)
    return {
        "rows": {"simulated": int((~untouched).sum()), "untouched": int(untouched.sum())},
        "readers": {"handed_out": key.readers, "answered": [reader + 1 for reader in readers]},
        "not_filled_in": {
            str(reader + 1): int(np.isnan(verdicts[reader]).sum()) for reader in range(key.readers)
        },
        "artifacts": artifacts,
        "untouched": _counted(verdicts, untouched, readers),
        "agreement": {
            "pairs": {
                f"{first + 1}-{second + 1}": kappa.public() for (first, second), kappa in pairs.items()
            },
            "all": None if together is None else together.public(),
        },
        "named": _named(answers),
    }


def _counted(verdicts: np.ndarray, rows: np.ndarray, readers: Sequence[int]) -> dict[str, Any]:
    """How many of some rows were called realistic, by each reader and by all of them together."""
    own = verdicts[list(readers)][:, rows]
    complete = ~np.isnan(own).any(0)
    return {
        "rows": int(rows.sum()),
        "readers": {
            str(reader + 1): _rate(int((one == 1).sum()), int((~np.isnan(one)).sum()))
            for reader, one in zip(readers, own, strict=True)
        },
        "unanimous": _rate(int((own[:, complete] == 1).all(0).sum()), int(complete.sum())),
    }


def _rate(realistic: int, answered: int) -> dict[str, Any]:
    low, high = wilson(realistic, answered)
    return {
        "realistic": realistic,
        "answered": answered,
        "rate": round(realistic / answered, 4) if answered else None,
        "low": round(low, 4) if answered else None,
        "high": round(high, 4) if answered else None,
    }


def _named(answers: Answers) -> dict[str, int]:
    """Of the artifacts that readers wrote down for simulated rows."""
    counts = {"right": 0, "another": 0, "other_words": 0}
    for one in answers.seen:
        for row, word in zip(answers.key.rows, one, strict=True):
            if row.artifact is not None and word:
                meant = _artifact(word)
                label = SIMULATORS[row.artifact].label or row.artifact
                counts["other_words" if meant is None else "right" if meant == label else "another"] += 1
    return counts


def _artifact(word: str) -> str | None:
    try:
        return parse_name(word)
    except ConfigError:
        name = word.strip().lower().replace(" ", "_").replace("-", "_")
        return (SIMULATORS[name].label or name) if name in SIMULATORS else None


def read_answers(folder: Path) -> Answers:
    """What the workbooks of a folder say. Raises: as `acceptance`."""
    key = _key_of(folder)
    problems: list[tuple[str, str]] = []
    verdicts = np.full((key.readers, len(key.rows)), np.nan)
    seen = [[""] * len(key.rows) for _ in range(key.readers)]
    owner: dict[int, str] = {}
    for path in sorted(
        one
        for one in folder.iterdir()
        if one.suffix.lower() == ".xlsx" and not one.name.startswith((".", "~$"))
    ):
        try:
            pages = read_pages(path)
            about = None if pages is None or _PAGE not in pages else about_of(pages, path)
        except DataError as error:
            problems.append((error.code, error.message.replace(str(path), path.name)))
            continue
        if pages is None or about is None:
            problems.append(("bad-label", f"{path.name}: not a workbook of --blind"))
        elif (
            about.batch != key.batch
            or not about.reader.isdecimal()
            or not 1 <= int(about.reader) <= key.readers
        ):
            problems.append(("other-key", f"{path.name}: handed out with another {KEY_FILE}"))
        elif int(about.reader) in owner:
            problems.append(
                (
                    "duplicate-label",
                    f"{path.name}: reader {about.reader} again, as in {owner[int(about.reader)]}",
                )
            )
        else:
            reader = int(about.reader) - 1
            owner[reader + 1] = path.name
            problems += [
                (code, f"{path.name}: {text}")
                for code, text in _read_page(pages[_PAGE], key, reader, verdicts[reader], seen[reader])
            ]
    if problems:
        texts = [text for _, text in problems]
        more = len(texts) - SHOWN_PROBLEMS
        said = "; ".join(texts[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise DataError(
            said, code=problems[0][0], hint=f"correct the workbooks in {folder}; --blind makes new ones"
        )
    if np.isnan(verdicts).all():
        raise DataError(
            f"{folder}: no row of any workbook is filled in",
            code="no-answers",
            hint=f"put the filled workbooks into this folder, beside {KEY_FILE}, in place of the empty ones",
        )
    return Answers(key=key, verdicts=verdicts, seen=seen)


def _key_of(folder: Path) -> Key:
    hint = "--acceptance names the folder that --blind made"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder", code="no-such-folder", hint=hint)
    path = folder / KEY_FILE
    try:
        key = Key.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror})", code="no-answer-key", hint=hint
        ) from None
    except ValidationError as error:
        where = (
            ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"])) or "the file"
        )
        raise DataError(
            f"{path}: damaged at {where}", code="no-answer-key", hint="restore the file that --blind wrote"
        ) from None
    names = [str(reader) for reader in range(1, key.readers + 1)]
    if any(sorted(row.rows) != sorted(names) for row in key.rows) or any(
        row.artifact not in {None, *SIMULATORS} for row in key.rows
    ):
        raise DataError(
            f"{path}: damaged at rows", code="no-answer-key", hint="restore the file that --blind wrote"
        )
    return key


def _read_page(
    grid: Grid, key: Key, reader: int, verdicts: np.ndarray, seen: list[str]
) -> Iterator[tuple[str, str]]:
    """Fill in what one reader marked; gives what is wrong, without the content of a cell."""
    places = {row.rows[str(reader + 1)]: at for at, row in enumerate(key.rows)}
    found: dict[int, int] = {}
    for number, cells in enumerate(grid[1:], start=2):
        line: list[Cell] = [*cells, *[""] * (len(_TITLES) - len(cells))]
        if not any(line):
            continue
        at = places.get(line[0]) if isinstance(line[0], str) else None
        if at is None:
            yield "unknown-key", f"row {number}: expected the key of a row of this workbook, unchanged"
            continue
        if at in found:
            yield "duplicate-label", f"row {number}: the same as row {found[at]}"
            continue
        found[at] = number
        word = line[_VERDICT]
        if not isinstance(word, str) or (word and " ".join(word.lower().split()) not in _WORDS):
            yield "bad-label", f"row {number}: expected {REALISTIC}, {NOT_REALISTIC} or blank"
        elif word:
            verdicts[at] = _WORDS[" ".join(word.lower().split())]
        written = line[_SEEN]
        seen[at] = written if isinstance(written, str) else ""
    if len(found) < len(places):
        missing = len(places) - len(found)
        yield "missing-row", f"{missing} row{'s' if missing > 1 else ''} of {len(places)} missing"


def acceptance_text(found: Mapping[str, Any], language: str) -> str:
    """The report for people."""
    say = gallery_speaker(language)
    readers = found["readers"]["answered"]
    heads = [say("reader", reader=reader) for reader in readers] + (
        [say("unanimous")] if len(readers) > 1 else []
    )
    table: list[tuple[str, list[str]]] = [("", heads)]

    def line(title: str, counts: Mapping[str, Any]) -> None:
        cells = [counts["readers"][str(reader)] for reader in readers] + (
            [counts["unanimous"]] if len(readers) > 1 else []
        )
        table.append((title, [_rate_text(cell) for cell in cells]))

    for name, counts in found["artifacts"].items():
        line(title_of(name, language), counts)
        for band, inner in counts["bands"].items():
            line(f"  {say(band)}", inner)
    line(say("untouched"), found["untouched"])
    first = max(_cells_wide(title) for title, _ in table)
    widths = [max(_cells_wide(cells[at]) for _, cells in table) for at in range(len(heads))]
    rows = [
        (
            _padded(title, first)
            + "".join("  " + _padded(cell, width) for cell, width in zip(cells, widths, strict=True))
        ).rstrip()
        for title, cells in table
    ]
    who = {
        f"{say('reader', reader=pair.split('-')[0])}, {pair.split('-')[1]}": one
        for pair, one in found["agreement"]["pairs"].items()
    }
    if found["agreement"]["all"] is not None:
        who[say("unanimous")] = found["agreement"]["all"]
    blank = ", ".join(
        f"{say('reader', reader=reader)}: {count}"
        for reader, count in found["not_filled_in"].items()
        if count
    )
    named = found["named"]
    return "\n".join(
        [
            say("readers", readers=len(readers), of=found["readers"]["handed_out"], **found["rows"]),
            say("blank", counts=blank or say("nothing")),
            say("acceptance"),
            "",
            *rows,
            "",
            *([say("unanimous.note")] if len(readers) > 1 else []),
            say("independent"),
            *(_kappa_text(name, one, say) for name, one in who.items()),
            say("named", right=named["right"], wrong=named["another"], unknown=named["other_words"]),
        ]
    )


def _rate_text(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "–"
    return f"{rate['realistic']}/{rate['answered']} {rate['rate']:.0%} ({rate['low']:.0%}–{rate['high']:.0%})"


def _kappa_text(who: str, kappa: Mapping[str, Any], say: Callable[..., str]) -> str:
    numbers = {
        name: say("undefined") if kappa[at] is None else f"{kappa[at]:.2f}" for name, at in _KAPPA.items()
    }
    return say("kappa", who=who, n=kappa["n"], patients=kappa["patients"], **numbers)


_KAPPA = {"value": "kappa", "low": "low", "high": "high"}


def _cells_wide(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if ord(character) > 0x2E7F else 1 for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _cells_wide(text))
