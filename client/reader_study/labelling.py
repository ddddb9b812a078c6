"""Check a site's label sheet, write workbooks for readers and merge their answers (`fedqc data labels`).

Reports hold counts, file and row numbers, codes and readers' pseudonyms; they stay in the hospital all the
same.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import image_names, site_slices
from client.dicom.index import SliceRecord
from client.labels.label_sheet import (
    ImageName,
    LabelRow,
    LabelTable,
    MatchedLabels,
    RowKey,
    best_reading,
    inspect_labels,
    inspect_match,
    reader_pseudonym,
    to_csv,
)
from client.labels.reader_agreement import agreement
from client.labels.spreadsheet import Found, SheetProblem, SheetProblems, read_pages
from client.reader_study.workbooks import (
    About,
    Item,
    Line,
    Per,
    about_of,
    batch_name,
    is_ours,
    picture,
    read_workbook,
    refuse_too_many,
    shuffled,
    write_workbook,
)
from client.site.config import SiteConfig
from common.artifacts import DEFAULT_LABELS, MODALITIES, NAMES, applies_to
from common.errors import ConfigError, DataError
from common.files import whole_folder, write_bytes
from common.preprocess import DEFAULT_SIZE

MAX_READERS = 20
SEED = 7
SHOWN = 20  # disputes on a terminal
UNNAMED = "unnamed"  # the reader of a merged sheet that has no readers


@dataclass(frozen=True, kw_only=True)
class SiteImages:
    """A site's usable slices, in one order, as readers' work needs them."""

    site: SiteConfig
    folder: Path
    key: bytes
    records: tuple[SliceRecord, ...]
    images: np.ndarray  # int16 (n, S, S)
    names: list[ImageName]
    may_occur: np.ndarray  # bool (n, artifacts)
    patients: np.ndarray  # int64 (n,)

    @property
    def labels_path(self) -> Path:
        return self.folder / self.site.labels


def site_images(site_yaml: Path, *, size: int = DEFAULT_SIZE) -> SiteImages:
    """Index and decode a site's images, or open the cache. Labels need not be there.

    Raises:
        ConfigError: site.yaml.
        DataError: `no-such-folder`, `no-usable-images`.
    """
    found = site_slices(site_yaml, size=size)
    records = found.slices.intake.records
    modality = np.array([MODALITIES.index(record.modality) for record in records])
    _, patients = np.unique([record.patient for record in records], return_inverse=True)
    return SiteImages(
        site=found.site,
        folder=found.folder,
        key=found.key,
        records=records,
        images=found.slices.images,
        names=image_names(records),
        may_occur=np.array([applies_to(name) for name in MODALITIES])[modality],
        patients=patients,
    )


def check(
    site_yaml: Path, *, seed: int = SEED, size: int = DEFAULT_SIZE
) -> tuple[dict[str, Any], SheetProblems | None]:
    """The report on a site's sheet, and its refusal where something is wrong with it. Changes nothing but the
    site's own cache.

    Raises:
        DataError: `labels-missing` or `bad-label` where no sheet can be read at all; as `site_images`.
    """
    ours = site_images(site_yaml, size=size)
    table, problems = inspect_labels(ours.labels_path, key=ours.key)
    matched, more = inspect_match(table, ours.names, ours.may_occur, ours.site.consensus, key=ours.key)
    problems = (*problems, *more)
    refusal = SheetProblems(problems, [ours.labels_path]) if problems else None
    return _report(ours, table, matched, problems, seed=seed), refusal


def hand_out(
    site_yaml: Path,
    *,
    readers: int,
    out: Path | None,
    per: Per,
    seed: int = SEED,
    size: int = DEFAULT_SIZE,
    only: Set[int] | None = None,
) -> list[Path]:
    """Write one workbook a reader, each in an order of its own, into a new folder. It asks for
    `DEFAULT_LABELS` and what else site.yaml names as `assessed`.

    Args:
        only: positions of slices in `site_images`; rows with one of these are written. None: all.
        out: the folder, by default `sheets` beside site.yaml; it may exist if it is empty.
        seed: another seed makes another batch, with other keys and orders.
    Raises:
        ConfigError: `bad-argument`, `output-exists`, `not-writable`.
        DataError: `too-many-rows`; as `site_images`.
    """
    if not 1 <= readers <= MAX_READERS:
        raise ConfigError(
            f"--sheets = {readers}; expected 1 to {MAX_READERS}",
            code="bad-argument",
            hint="one workbook a reader",
        )
    ours = site_images(site_yaml, size=size)
    folder = out or ours.folder / "sheets"
    _refuse_among_images(folder, ours)
    items = [item for item in _items(ours, per) if only is None or not only.isdisjoint(item.positions)]
    refuse_too_many(len(items))  # before thousands of pictures are drawn
    chosen = "" if only is None else ":" + ",".join(map(str, sorted(only)))
    batch = batch_name(f"readers:{seed}:{per}{chosen}", ours.key)
    lines = [
        Line(item=item, picture=_picture(ours, item), is_open=_is_asked(ours.site, item.modality))
        for item in items
    ]
    paths = []
    with whole_folder(folder) as staging:
        for number in range(1, readers + 1):
            about = About(batch=batch, reader=str(number), per=per)
            path = staging / f"labels-reader-{number}.xlsx"
            write_bytes(path, write_workbook(shuffled(lines, about, ours.key), about, ours.key), mode=0o600)
            paths.append(folder / path.name)
    return paths


def merge(
    site_yaml: Path,
    files: Sequence[Path],
    *,
    out: Path | None,
    force: bool,
    seed: int = SEED,
    size: int = DEFAULT_SIZE,
) -> dict[str, Any]:
    """Put filled workbooks and other label sheets together: every reader's row, by pseudonym, in one
    labels.csv.

    Where readers differ, a workbook for the panel is written beside it, under a name that is not taken:
    `disputes.xlsx`, `disputes-2.xlsx`.
    Args:
        files: workbooks of `hand_out`, filled workbooks for the panel, or label sheets; a sheet without
            readers is one unnamed reader's.
        out: the folder for both files; by default the sheet that site.yaml names.
        force: an existing sheet may be replaced.
    Returns:
        the report, with `written` and `blank_rows` (by reader).
    Raises:
        SheetProblems: all that is wrong in any of the files; nothing is written.
        ConfigError: `output-exists`, `bad-argument`.
        DataError: `other-site`, `labels-missing`, `bad-label`, `labels-match-nothing`; as `site_images`.
    """
    ours = site_images(site_yaml, size=size)
    target = ours.labels_path if out is None else out / "labels.csv"
    _refuse_among_images(target.parent, ours)
    if target.suffix.lower() != ".csv":
        raise ConfigError(
            f"{target}: the merged sheet is a CSV",
            code="bad-argument",
            hint="--out FOLDER, then labels: labels.csv in site.yaml",
        )
    if target.exists() and not force:
        raise ConfigError(
            f"{target}: exists",
            code="output-exists",
            hint="--out FOLDER, or --force to replace it; merge it too to keep its rows",
        )
    rows, problems, blank, pers = _read_all(ours, files)
    first_of: dict[tuple[RowKey, str, bool], LabelRow] = {}
    kept = []
    for row in rows:
        first = first_of.setdefault((row.key, row.reader, row.is_panel), row)
        if first is row:
            kept.append(row)
        else:
            expected = f"one row a reader for one thing; row {first.row} of sheet {first.sheet} is the other"
            problems.append(
                SheetProblem(
                    sheet=row.sheet,
                    row=row.row,
                    column=None,
                    title="",
                    code="duplicate-label",
                    expected=expected,
                )
            )
    table = LabelTable(path=target, rows=tuple(kept), artifacts=NAMES)
    problems += inspect_match(table, ours.names, ours.may_occur, ours.site.consensus, key=ours.key)[1]
    if problems:
        raise SheetProblems(problems, files)
    table = replace(
        table, rows=tuple(replace(row, row=number, sheet=1) for number, row in enumerate(kept, start=2))
    )
    matched, _ = inspect_match(table, ours.names, ours.may_occur, ours.site.consensus, key=ours.key)
    if len(matched.rows_without_image) == len(table.rows):
        raise DataError(
            (
                f"none of the {len(table.rows)} rows of {len(files)} sheets names one of the "
                f"{len(ours.names)} usable images"
            ),
            code="labels-match-nothing",
            hint="workbooks and sheets must be of this site, and hold at least one answer",
        )
    written = []
    if matched.disputed.any():
        path = _free(target.parent, {file.resolve() for file in files})
        write_bytes(
            path, _panel_workbook(ours, matched, "series" if pers == {"series"} else "image"), mode=0o600
        )
        written.append(str(path))
    # the mark tells a spreadsheet that it is UTF-8
    write_bytes(target, ("\ufeff" + to_csv(table.rows)).encode("utf-8"), mode=0o640)
    return _report(ours, table, matched, (), seed=seed) | {
        "written": [str(target), *written],
        "blank_rows": blank,
    }


def report_text(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    readers = ", ".join(
        f"{one['reader'] or 'one reader'}{' (panel)' if one['panel'] else ''}: {one['answers']}"
        for one in found["readers"]
    )
    lines = [
        f"{found['rows']} rows understood; consensus: {found['consensus']}; split: {found['split']}",
        f"answers of {readers or 'nobody'}",
    ]
    lines += [f"  {problem_text(problem)}" for problem in found["problems"]]
    for at, title in (
        ("rows_without_image", "rows without an image"),
        ("wrong-modality", "rows that claim what the modality cannot show"),
    ):
        if found[at]["count"]:
            lines.append(f"  {found[at]['count']} {title}: row {', '.join(map(str, found[at]['rows']))}")
    if found["images_without_label"]:
        lines.append(f"  {found['images_without_label']} images without a row")
    lines += [
        f"  {count} rows left blank by {reader}"
        for reader, count in found.get("blank_rows", {}).items()
        if count
    ]
    for artifact, counts in found["labels"].items():
        lines.append(
            f"  {artifact:15s} "
            + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        )
    for artifact, kappas in found["agreement"].items():
        for pair in kappas["cohen"]:
            lines.append(
                f"  {artifact:15s} kappa of {pair['readers'][0]} and {pair['readers'][1]}: "
                f"{_kappa_text(pair)}"
            )
        if kappas["fleiss"]:
            lines.append(f"  {artifact:15s} Fleiss' kappa of all: {_kappa_text(kappas['fleiss'])}")
    for dispute in found["disputes"][:SHOWN]:
        answers = ", ".join(f"{reader} {answer}" for reader, answer in dispute["answers"].items())
        alike = f" and {dispute['images'] - 1} more of one row" if dispute["images"] > 1 else ""
        lines.append(f"  in dispute: {dispute['artifact']} of file {dispute['file']}{alike}: {answers}")
    if len(found["disputes"]) > SHOWN:
        lines.append(f"  … and {len(found['disputes']) - SHOWN} more in dispute; --format json lists all")
    lines += [f"written: {path}" for path in found.get("written", [])]
    return "\n".join(lines)


def problem_text(problem: dict[str, Any]) -> str:
    """One line on one problem, from `SheetProblem.public`."""
    column = "" if problem["column"] is None else f", column {problem['column']}"
    title = f" ({problem['title']})" if problem["title"] else ""
    return (
        f"sheet {problem['sheet']}, row {problem['row']}{column}{title}: [{problem['code']}] expected "
        f"{problem['expected']}"
    )


def _kappa_text(kappa: dict[str, Any]) -> str:
    if kappa["kappa"] is None:
        return (
            f"undefined ({kappa['n']} read by "
            f"all{'' if kappa['observed'] is None else ', who always say the same'})"
        )
    interval = "" if kappa["low"] is None else f" [{kappa['low']:.2f}, {kappa['high']:.2f}]"
    return (
        f"{kappa['kappa']:.2f}{interval}, {kappa['observed']:.0%} agree, n = {kappa['n']} of "
        f"{kappa['patients']} patients"
    )


def _read_all(
    ours: SiteImages, files: Sequence[Path]
) -> tuple[list[LabelRow], list[SheetProblem], dict[str, int], set[Per]]:
    """Rows of all files by pseudonym, their problems, rows left blank by reader, and what the rows of the
    workbooks are.
    """
    rows: list[LabelRow] = []
    problems: list[SheetProblem] = []
    blank: dict[str, int] = defaultdict(int)
    pers: set[Per] = set()
    items: dict[Per, list[Item]] = {}
    sizes, shared = (
        Counter(name.series_uid for name in ours.names),
        {name.file for name in ours.names if name.frame > 1},
    )
    for sheet, path in enumerate(files, start=1):
        found = Found(sheet=sheet)
        pages = read_pages(path)
        if pages is not None and is_ours(pages):
            per = about_of(pages, path).per
            if per not in items:
                items[per] = _items(ours, per)
            pers.add(per)
            filled = read_workbook(pages, path, items[per], ours.key, found)
            about = filled.about
            reader = reader_pseudonym(filled.name or f"sheet {about.batch} {about.reader}", ours.key)
            blank[reader] += filled.blank
            # as the site's files are, not as the workbook
            for answer in sorted(filled.answers, key=lambda answer: answer.item.positions):
                for key in _row_keys(ours.names, answer.item, about.per, sizes, shared):
                    rows.append(
                        LabelRow(
                            row=answer.row,
                            key=key,
                            reader=reader,
                            is_panel=about.is_panel,
                            present=answer.present,
                            severity=answer.severity,
                            part=None,
                            sheet=sheet,
                        )
                    )
        else:
            pers.add("image")
            table, more = inspect_labels(path, key=ours.key, sheet=sheet)
            table = best_reading(table, ours.names, key=ours.key)
            found.problems += more
            rows += [
                replace(row, reader=row.reader or reader_pseudonym(UNNAMED, ours.key)) for row in table.rows
            ]
        problems += found.problems
    return rows, problems, dict(blank), pers


def _items(ours: SiteImages, per: Per) -> list[Item]:
    """What the rows of a workbook show, in the site's order."""
    if per == "image":
        return [
            Item(identity=f"image:{name.file}#{name.frame}", positions=(at,), modality=record.modality)
            for at, (name, record) in enumerate(zip(ours.names, ours.records, strict=True))
        ]
    series: dict[str, list[int]] = defaultdict(list)
    for at, record in enumerate(ours.records):
        series[f"series:{record.patient}:{record.series}:{record.modality}"].append(at)
    return [
        Item(
            identity=identity,
            positions=tuple(_in_order(ours, positions)),
            modality=ours.records[positions[0]].modality,
        )
        for identity, positions in series.items()
    ]


def _in_order(ours: SiteImages, positions: list[int]) -> list[int]:
    """Slices of a series from first to last: by instance number where every slice has one, else by file."""
    numbers = [ours.records[at].instance_number for at in positions]
    if any(number is None for number in numbers):
        return positions
    return sorted(positions, key=lambda at: (ours.records[at].instance_number or 0, at))


def _row_keys(
    names: Sequence[ImageName], item: Item, per: Per, sizes: Counter[str], shared: set[str]
) -> list[RowKey]:
    """How labels.csv names an item. A series is named by its UID if that means these images and no others;
    else its images are.

    Args:
        sizes: images by series UID.
        shared: files of several frames.
    """
    ours = [names[at] for at in item.positions]
    uids = {name.series_uid for name in ours}
    uid = ours[0].series_uid
    if per == "series" and uid and len(uids) == 1 and sizes[uid] == len(ours):
        return [RowKey(series_uid=uid)]
    return [RowKey(file=name.file, frame=name.frame if name.file in shared else None) for name in ours]


def _is_asked(site: SiteConfig, modality: str) -> tuple[bool, ...]:
    """Of each artifact of the vocabulary whether readers are asked about it on an image."""
    asked = {*DEFAULT_LABELS, *(site.assessed or ())}
    return tuple(
        name in asked and possible for name, possible in zip(NAMES, applies_to(modality), strict=True)
    )


def _picture(ours: SiteImages, item: Item) -> bytes:
    return picture(ours.images[list(item.positions)], item.modality)


def _panel_workbook(ours: SiteImages, matched: MatchedLabels, per: Per) -> bytes:
    """What is in dispute, with the readers' answers by pseudonym."""
    lines = []
    for item in _items(ours, per):
        disputed = matched.disputed[list(item.positions)]
        if not disputed.any():
            continue
        is_open = np.asarray(disputed.any(axis=0))
        remarks = []
        for artifact in np.flatnonzero(is_open):
            at = item.positions[int(np.flatnonzero(disputed[:, artifact])[0])]
            said = [f"{reader} {answer}" for reader, answer in _answers(matched, at, int(artifact)).items()]
            remarks.append(f"{NAMES[artifact]}: {', '.join(said)}")
        lines.append(
            Line(
                item=item,
                picture=_picture(ours, item),
                is_open=tuple(is_open.tolist()),
                remark="\n".join(remarks),
            )
        )
    batch = batch_name(
        "disputes:" + ";".join(f"{line.item.identity}{line.is_open}" for line in lines), ours.key
    )
    about = About(batch=batch, reader="panel", per=per)
    return write_workbook(shuffled(lines, about, ours.key), about, ours.key)


def _answers(matched: MatchedLabels, image: int, artifact: int) -> dict[str, int]:
    said = matched.answers[:, image, artifact]
    return {
        name + (" (panel)" if panel else ""): int(answer)
        for name, panel, answer in zip(matched.readers, matched.is_panel, said, strict=True)
        if not math.isnan(answer)
    }


def _report(
    ours: SiteImages,
    table: LabelTable,
    matched: MatchedLabels,
    problems: Sequence[SheetProblem],
    *,
    seed: int,
) -> dict[str, Any]:
    """Counts, row and file numbers, codes and pseudonyms; no path, identifier or value of a cell."""
    first = ~matched.is_panel
    kappas: dict[str, Any] = {}
    disputes: list[dict[str, Any]] = []
    names = [name for name, panel in zip(matched.readers, matched.is_panel, strict=True) if not panel]
    for artifact, title in enumerate(NAMES):
        pairs, fleiss = agreement(
            matched.answers[first, :, artifact], matched.sources[first, :, artifact], ours.patients, seed=seed
        )
        if pairs:
            cohen = [{"readers": [names[a], names[b]]} | kappa.public() for (a, b), kappa in pairs.items()]
            kappas[title] = {"cohen": cohen, "fleiss": fleiss.public() if fleiss else None}
        at = np.flatnonzero(matched.disputed[:, artifact])
        if at.size:  # one row for a series is one dispute
            _, where, images = np.unique(
                matched.sources[:, at, artifact], axis=1, return_index=True, return_counts=True
            )
            disputes += [
                {
                    "file": ours.records[at[place]].number,
                    "images": int(count),
                    "artifact": title,
                    "answers": _answers(matched, int(at[place]), artifact),
                }
                for place, count in sorted(zip(where.tolist(), images.tolist(), strict=True))
            ]
    ordered = sorted(problems, key=lambda problem: (problem.sheet, problem.row, problem.column or 0))
    return {
        "rows": len(table.rows),
        "consensus": matched.rule,
        "split": matched.split,
        "fixed_images": matched.fixed_images,
        "readers": [
            {"reader": name, "panel": bool(panel), "answers": int((~np.isnan(answers)).sum())}
            for name, panel, answers in zip(matched.readers, matched.is_panel, matched.answers, strict=True)
        ],
        "problems": [problem.public() for problem in ordered],
        "rows_without_image": {
            "count": len(matched.rows_without_image),
            "rows": list(matched.rows_without_image),
        },
        "wrong-modality": {"count": len(matched.wrong_modality), "rows": list(matched.wrong_modality)},
        "images_without_label": matched.images_without_label,
        "labels": {
            title: {
                "present": int((matched.present[:, artifact] == 1).sum()),
                "absent": int((matched.present[:, artifact] == 0).sum()),
                "disputed": int(matched.disputed[:, artifact].sum()),
                "incomplete": int(matched.incomplete[:, artifact].sum()),
            }
            for artifact, title in enumerate(NAMES)
            if ours.may_occur[:, artifact].any()
            and (title in DEFAULT_LABELS or not np.isnan(matched.answers[:, :, artifact]).all())
        },
        "agreement": kappas,
        "disputes": disputes,
    }


def _refuse_among_images(folder: Path, ours: SiteImages) -> None:
    if folder.resolve().is_relative_to((ours.folder / ours.site.images).resolve()):
        raise ConfigError(
            f"{folder}: lies inside the images folder",
            code="bad-argument",
            hint="--out: a folder beside the images",
        )


def _free(folder: Path, taken: set[Path]) -> Path:
    """A name for the panel's workbook that overwrites nobody's answers."""
    number = 1
    while True:
        path = folder / ("disputes.xlsx" if number == 1 else f"disputes-{number}.xlsx")
        if not path.exists() and path.resolve() not in taken:
            return path
        number += 1
