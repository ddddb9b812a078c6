"""Import MRIQC's group table with ratings: one site a hospital, a vector of metrics a scan, no images.

    OUT/import.json              what was imported, and how many rows were not
    OUT/<site>/site.yaml         kind public, `measures: iqms.csv`, with the operator's declaration
    OUT/<site>/iqms.csv          file, patient, and the metrics of common/measures.py
    OUT/<site>/labels.csv        file, reader, quality

A scan is named by `bids_name` or, where there is none, by its participant; a patient is a participant. A
rating below 0, or `exclude`, is unacceptable (1), any other is not (0), as MRIQC binarizes them (Esteban et
al., PLOS ONE 12:e0184661, 2017); n/a is not rated. Each column of ratings is a reader.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.importing.collection import Wanted, site_name, slug
from client.site.config import nominal_bucket
from client.site.enrolment import declaration
from client.site.made import write_site_yaml
from common.errors import DataError
from common.files import whole_folder
from common.measures import scaling

SCAN = ("bids_name", "subject_id", "participant_id")
"""Columns that name a scan, the first that is there."""
_PARTICIPANT = re.compile(r"(?:^|/)sub-([A-Za-z0-9]+)")
_RATING = re.compile(r"(rater|rating|reader|quality|qc)(_?[A-Za-z0-9]*)$", re.IGNORECASE)
_WORDS = {"exclude": 1, "reject": 1, "fail": 1, "accept": 0, "doubtful": 0, "pass": 0, "ok": 0}
_BLANK = ("", "n/a", "na", "nan")
_POLICY = """# The scans are public: no patient to protect, and a small site may show what noise costs it.
min_nominal_patients: 1
max_epsilon: 1000.0
allow_non_private: true
evaluation: synthetic
"""
MIN_PATIENTS = 2
TEST_SHARE = 0.3
"""Of a plan by default: what the nominal number of patients leaves out."""


@dataclass(frozen=True, kw_only=True)
class ScanRow:
    """One scan with what its readers said: 1 unacceptable, 0 not."""

    name: str
    patient: str
    site: str
    metrics: tuple[str, ...]  # as the table writes them
    ratings: Mapping[str, int]


def import_mriqc(iqms: Path, ratings: Path, out: Path, wanted: Wanted, *, sites: str) -> dict[str, Any]:
    """Write the sites of a group table.

    Args:
        iqms: tab- or comma-separated, a row a scan, with every metric of `common.measures.scaling`.
        ratings: likewise, a row a scan that both name alike; may be the same file.
        sites: the column of either that tells hospitals apart; "" makes one site.
    Returns:
        counts for programs: of each site patients, scans and ratings; rows left out, by reason.
    Raises:
        DataError: `bad-measures`: a column is missing, a scan is there twice, a metric is no finite number;
            `labels-match-nothing`: no rating is of a scan of the table; `bad-label`: a rating is neither a
            number nor a known word; `too-few-patients`: a site has a single one.
        ConfigError: `output-exists` and others of `whole_folder`.
    """
    table, rated = _read(iqms), _read(ratings)
    found, left_out = scans_of(table, rated, wanted, sites=sites)
    of_site: dict[str, list[ScanRow]] = defaultdict(list)
    for scan in found:
        of_site[scan.site].append(scan)
    for site, scans in of_site.items():
        if len({scan.patient for scan in scans}) < MIN_PATIENTS:
            raise DataError(
                f"{iqms}: site {site} has one patient, who would be the whole hospital",
                code="too-few-patients",
                hint="leave its rows out, or join it to another site in --sites COLUMN",
            )
    report: dict[str, Any] = {
        "fedqc": version("fedqc"),
        "collection": wanted.collection,
        "format": "MRIQC",
        "metrics": len(scaling().names),
        "sites": {},
        "left_out": dict(sorted(left_out.items())),
    }
    with whole_folder(out) as staging:
        for site, scans in sorted(of_site.items()):
            report["sites"][site] = _write_site(staging / site, site, scans, wanted)
        (staging / "import.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as it is written: rows by scan, and where it came from."""

    path: Path
    key: str
    titles: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]


def _read(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__})",
            code="bad-measures",
            hint="MRIQC's group table, such as group_T1w.tsv, or a table of ratings",
        ) from None
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    titles = tuple(reader.fieldnames or ())
    key = next((name for name in SCAN if name in titles), "")
    if not key:
        raise _bad(f"{path}: no column that names the scans", f"one of {', '.join(SCAN)}")
    rows: dict[str, Mapping[str, str]] = {}
    for number, row in enumerate(reader, start=2):
        name = (row[key] or "").strip()
        if not name:
            raise _bad(f"{path}: row {number} names no scan", f"{key} in every row")
        if name in rows:
            raise _bad(f"{path}: row {number} is the second of scan {name}", "each scan once")
        rows[name] = {title: (row[title] or "").strip() for title in titles}
    return Table(path=path, key=key, titles=titles, rows=rows)


def scans_of(table: Table, rated: Table, wanted: Wanted, *, sites: str) -> tuple[list[ScanRow], Counter[str]]:
    """The scans that have all metrics and a rating, and why others are left out; raises as `import_mriqc`."""
    names = scaling().names
    if missing := [name for name in names if name not in table.titles]:
        raise _bad(
            f"{table.path}: metric {missing[0]} is missing", "a group table of anatomical scans (T1w, T2w)"
        )
    if sites and sites not in {*table.titles, *rated.titles}:
        raise _bad(f"no column {sites!r}", f"--sites, one of {', '.join(_no_metrics(table, rated))}")
    readers = [title for title in rated.titles if _RATING.fullmatch(title)]
    if not readers:
        raise _bad(f"{rated.path}: no column of ratings", "such as rater_1, or rating")
    if not table.rows.keys() & rated.rows.keys():
        raise DataError(
            f"{rated.path}: none of its {len(rated.rows)} scans is in {table.path}",
            code="labels-match-nothing",
            hint=f"{table.key} and {rated.key} must name scans alike",
        )
    left_out: Counter[str] = Counter({"ratings without scan": len(rated.rows.keys() - table.rows.keys())})
    found = []
    for number, (name, row) in enumerate(table.rows.items(), start=2):
        about = rated.rows.get(name, {})
        answers = {
            reader: rating
            for reader in readers
            if (rating := rating_of(about.get(reader, ""), rated.path, name, reader)) is not None
        }
        if not answers:
            left_out["scan without rating"] += 1
            continue
        for metric in names:
            if not _is_finite(row[metric]):
                raise _bad(
                    f"{table.path}: row {number}, {metric}: {row[metric] or 'nothing'}", "a finite number"
                )
        where = (about.get(sites) or row.get(sites, "")) if sites else wanted.site
        if not where:
            raise _bad(f"{table.path}: row {number}: nothing in {sites}", "a hospital for every scan")
        found.append(
            ScanRow(
                name=name,
                patient=participant_of(name),
                site=site_name(where),
                metrics=tuple(row[metric] for metric in names),
                ratings=answers,
            )
        )
    return found, +left_out


def participant_of(scan: str) -> str:
    """The participant of a BIDS name, `sub-0001_ses-1_T1w` → `0001`; of another name the name itself."""
    match = _PARTICIPANT.search(scan)
    return match[1] if match else scan


def rating_of(text: str, path: Path, scan: str, reader: str) -> int | None:
    """1 unacceptable, 0 not, None not rated; raises DataError (`bad-label`) for what is no rating."""
    plain = text.strip().lower()
    if plain in _BLANK:
        return None
    if plain in _WORDS:
        return _WORDS[plain]
    if _is_finite(plain):
        return int(float(plain) < 0)
    raise DataError(
        f"{path}: {scan}, {reader}: {text!r} is no rating",
        code="bad-label",
        hint=f"a number, below 0 unacceptable; {', '.join(_WORDS)}; or n/a",
    )


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _no_metrics(*tables: Table) -> list[str]:
    known = {*scaling().names}
    return [title for table in tables for title in table.titles[:12] if title not in known][:8]


def _bad(what: str, expected: str) -> DataError:
    return DataError(what, code="bad-measures", hint=f"expected: {expected}")


def _write_site(folder: Path, site: str, scans: Sequence[ScanRow], wanted: Wanted) -> dict[str, Any]:
    patients = len({scan.patient for scan in scans})
    folder.mkdir(parents=True)
    _write_csv(
        folder / "iqms.csv",
        [["file", "patient", *scaling().names], *([one.name, one.patient, *one.metrics] for one in scans)],
    )
    several = len({reader for scan in scans for reader in scan.ratings}) > 1
    head = ["file", "reader", "quality"] if several else ["file", "quality"]
    rows = [
        [scan.name, *([reader] if several else []), str(rating)]
        for scan in scans
        for reader, rating in scan.ratings.items()
    ]
    _write_csv(folder / "labels.csv", [head, *rows])
    fields: dict[str, object] = {
        "name": site,
        "kind": "public",
        "cohort": slug(f"{wanted.collection[:40]}-{site}")[:64],
        "nominal_patients": nominal_bucket(patients * (1 - TEST_SHARE)),
        "measures": "iqms.csv",
        "policy": "policy.yaml",
        "assessed": ["quality"],
        "declared_not_hospital": declaration(f"public collection: {wanted.collection}"[:500], "images"),
    }
    (folder / "policy.yaml").write_text(_POLICY, encoding="utf-8")
    key = hashlib.sha256(f"import key {wanted.collection} {site}".encode()).digest()
    write_site_yaml(folder, fields, key=key)
    ratings = Counter(rating for scan in scans for rating in scan.ratings.values())
    return {"patients": patients, "scans": len(scans), "unacceptable": ratings[1], "acceptable": ratings[0]}


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def report_text(report: Mapping[str, Any], out: Path) -> str:
    """The account for a terminal."""
    lines = [
        f"{site}: {about['patients']} patients, {about['scans']} scans, ratings: {about['unacceptable']} "
        f"unacceptable, {about['acceptable']} not"
        for site, about in report["sites"].items()
    ]
    if report["left_out"]:
        lines.append("left out: " + ", ".join(f"{count} {why}" for why, count in report["left_out"].items()))
    return "\n".join([*lines, f"written: {out}"])
