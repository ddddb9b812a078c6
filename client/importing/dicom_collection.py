"""Import a collection that is DICOM already, as TCIA publishes them: files as they are, patients by
PatientID.

The images are not changed and get no mark: they are a scanner's. That they are no hospital's patients is the
operator's declaration alone, so that files whose header names a person are reported.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.dicom.dicom import SliceHeader, exclusion, read_headers
from client.dicom.foreign import HEAD_BYTES, foreign_code
from client.dicom.patients import readings
from client.dicom.provenance import looks_real
from client.dicom.refusals import EXCLUSIONS, refusal
from client.dicom.sources import Source, expand_archives, find_files, open_source
from client.importing.collection import (
    Account,
    Wanted,
    counted,
    finish_site,
    refuse_inside,
    site_name,
    write_report,
)
from client.labels.label_sheet import ImageName, LabelRow, LabelTable, inspect_match, read_labels, to_csv
from common.artifacts import applies_to
from common.errors import DataError, ImagingError
from common.files import whole_folder
from common.progress_bar import Progress

SiteBy = Literal["folder", "manufacturer", "model", "scanner", "patient"]


@dataclass(frozen=True, kw_only=True)
class _File:
    source: Source
    headers: tuple[SliceHeader, ...]
    patient: str
    site: str


def dicom_collection(
    src: Path,
    out: Path,
    labels: Path | None,
    wanted: Wanted,
    *,
    site_by: SiteBy | None,
    copy: bool,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Write site folders of the usable CT and MR files; hard links where the disk allows, else copies.

    A patient with images at two sites goes to the one with more of them; the others are left out.
    Args:
        labels: a label sheet (docs/labels.md); its files are relative to `src`.
        site_by: what tells sites apart: the first folder below `src`, the maker, the model, the scanner
            (serial number, else station), or the group `site` of `wanted.pattern` in the PatientID.
        copy: always copy.
    Returns:
        the content of import.json.
    Raises:
        ConfigError: `output-exists`, `not-writable`, `bad-argument`.
        DataError: `no-usable-images`, `too-many-quarantined`, or about the sheet.
    """
    refuse_inside(src, out)
    account = Account()
    table = read_labels(labels) if labels is not None else None
    files, persons = _usable(src, wanted, site_by, account, progress)
    account.check(len(files), accept=wanted.accept, src=src)
    if persons:
        say(f"warning: {persons} files name a person in their header: is this a public collection?")
    if lossy := sum(header.lossy for file in files for header in file.headers):
        say(
            f"warning: {lossy} images were compressed with loss: a site leaves them out unless its "
            "cohort.yaml says lossy: use"
        )
    sites = _dealt(files, account)
    with whole_folder(out) as staging:
        reports = []
        done = 0
        matched: set[int] = set()
        for name, own in sorted(sites.items()):
            for file in own:
                _place(file.source, staging / name / "images" / file.source.file, copy=copy)
                done += 1
                progress("importing", done, len(files))
            rows = _rows_of(own, table) if table is not None else []
            matched.update(row.row for row in rows)
            patients = len({file.patient for file in own})
            finish_site(
                staging / name,
                name,
                wanted,
                patients=patients,
                sheet=to_csv(rows) if rows else None,
                lossy=False,
            )
            reports.append(
                {
                    "site": name,
                    "patients": patients,
                    "images": sum(len(file.headers) for file in own),
                    "modalities": dict(Counter(header.modality for file in own for header in file.headers)),
                    "labels": counted(rows),
                }
            )
        if table is not None and not matched:
            raise DataError(
                f"{labels}: none of the {len(table.rows)} rows names one of the images",
                code="labels-match-nothing",
                hint="file = path below SRC, with forward slashes; or another key of docs/labels.md",
            )
        if table is not None and (lost := len(table.rows) - len(matched)):
            say(f"warning: {lost} of {len(table.rows)} rows of the sheet name no image that was imported")
        return write_report(staging, reports, account, wanted, form="DICOM")


def _usable(
    src: Path, wanted: Wanted, site_by: SiteBy | None, account: Account, progress: Progress
) -> tuple[list[_File], int]:
    """The files with a slice that intake would use, and how many of them name a person."""
    found: list[_File] = []
    persons = 0
    sources = expand_archives(find_files(src))
    for done, source in enumerate(sources, start=1):
        progress("headers", done, len(sources))
        try:
            headers = _headers(source)
        except ImagingError as error:
            if error.code in EXCLUSIONS:
                account.left_out[error.code] += 1
            else:
                account.refuse(source.file, error.code)
            continue
        codes = [exclusion(header, lossy="use") for header in headers]
        if all(codes):
            account.left_out[str(codes[0])] += 1
            continue
        first = headers[0]
        patient = readings(first.patient_id, first.charset)[0].strip()
        if not patient:
            account.refuse(source.file, "no-patient")
            continue
        persons += looks_real(patient, readings(first.patient_name, first.charset)[0], first.birth_date)
        found.append(
            _File(
                source=source,
                headers=headers,
                patient=patient,
                site=site_name(_site_of(source, first, patient, wanted, site_by) or wanted.site),
            )
        )
    return found, persons


def _headers(source: Source) -> tuple[SliceHeader, ...]:
    """The headers of a file; a text, a program or a picture is excluded as such, not damaged."""
    with open_source(source) as (stream, size):
        try:
            return read_headers(stream, size)
        except ImagingError as error:
            if error.code != "not-dicom":
                raise
            stream.seek(0)
            if (code := foreign_code(source.file, stream.read(HEAD_BYTES))) is None:
                raise
            raise refusal(code, "recognised as no DICOM image") from None


def _site_of(
    source: Source, header: SliceHeader, patient: str, wanted: Wanted, site_by: SiteBy | None
) -> str:
    if site_by == "folder":
        return source.file.partition("/")[0] if "/" in source.file else ""
    if site_by == "patient":
        return wanted.named(patient).get("site", "")
    return "" if site_by is None else str(getattr(header, site_by))


def _dealt(files: Sequence[_File], account: Account) -> dict[str, list[_File]]:
    """Files by site, each patient at the site with most of the files."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files:
        votes[file.patient][file.site] += 1
    home = {patient: min(sites, key=lambda site: (-sites[site], site)) for patient, sites in votes.items()}
    sites: dict[str, list[_File]] = defaultdict(list)
    for file in files:
        if home[file.patient] == file.site:
            sites[file.site].append(file)
        else:
            account.left_out["other-site"] += 1
    return sites


def _rows_of(files: Sequence[_File], table: LabelTable) -> list[LabelRow]:
    """The rows of the sheet that name an image of these files.

    Raises:
        DataError: a row names images of two patients, or in another way that the sheet must not.
    """
    images = [
        ImageName(
            file=file.source.file,
            sop_uid=header.sop_uid,
            series_uid=header.series_uid,
            study_uid=header.study_uid,
            accession=header.accession,
            series_number=header.series_number,
            frame=header.frame + 1,
            patient=file.patient,
        )
        for file in files
        for header in file.headers
    ]
    may_occur = np.array([applies_to(header.modality) for file in files for header in file.headers])
    matched, problems = inspect_match(table, images, may_occur)
    if problems:
        raise DataError(f"{table.path}: {problems[0]}", code=problems[0].code, hint="docs/labels.md")
    without = set(matched.rows_without_image)
    return [row for row in table.rows if row.row not in without]


def _place(source: Source, path: Path, *, copy: bool) -> None:
    """A file of the collection at its place below images/."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not copy and not source.member:
        try:
            os.link(source.path, path)
            return
        except OSError:  # another disk, or one without hard links
            pass
    with open_source(source) as (stream, _), path.open("wb") as file:
        shutil.copyfileobj(stream, file)
