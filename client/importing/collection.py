"""Write what an importer reads of a public collection as site folders.

    OUT/import.json          what was imported, and every file that was not
    OUT/<site>/site.yaml     kind public, with the operator's declaration
    OUT/<site>/images/       DICOM, each with its mark of provenance (`dicom_write.HeaderFacts.imported_from`)
    OUT/<site>/labels.csv    where the collection has labels
    OUT/<site>/imported.jsonl    of each image: the file and slice it comes from, and what its sheet says

An importer gives scans, each of one file of the collection; their pixels are read one scan at a time. The
folder is complete or absent. Names of patients are those of the collection, which are public.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.index import MAX_QUARANTINED
from client.labels.label_sheet import LabelRow, RowKey, to_csv
from client.site.config import nominal_bucket
from client.site.enrolment import declaration
from client.site.made import write_site_yaml
from common.artifacts import INDEX, NAMES, Modality
from common.errors import ConfigError, DataError, ImagingError
from common.files import whole_folder
from common.progress_bar import Progress
from common.strict import dump_yaml

MANIFEST = "imported.jsonl"
REPORT = "import.json"
MAX_PATIENT_ID = 64  # characters of an LO element, DICOM PS3.5 6.2
IMPORT_CODES: dict[str, str] = {
    "missing-file": "a row of the sheet names a file that is not in the folder",
    "four-dimensional": "a volume over time or of several echoes, which holds no single image of anatomy",
    "no-cjdata": "a MATLAB file without the structure cjdata, or not of version 7.3",
    "no-patient": "the collection does not say whose image it is",
}
"""Why a file of a collection is not imported, besides the codes of `client.dicom.refusals`."""
EVERY_IMAGE_A_PATIENT = (
    "the collection names no patients: every image counts as a patient, so that one person may be in several "
    "parts of the split, and intervals are too narrow"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One slice: shape (rows, columns), HU or MR signal; `number` is its place in the source, from 1."""

    image: np.ndarray
    number: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)  # arguments of `HeaderFacts` of this slice


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One file of a collection.

    Args:
        source: the file, relative to the folder of the collection.
        form: its format, as the header of the images will say.
        study, series: which scans of a patient belong together.
        labels: the rows of the sheet about it; their keys are not used.
        facts: arguments of `HeaderFacts` that hold for all its slices.
        about: what else the collection says of it.
        planes: reads the pixels. Raises ImagingError, whose code is counted.
        left_out: filled by `planes`: slices that are left out by rule, by code.
    """

    source: str
    form: str
    patient: str
    site: str
    modality: Modality
    study: str
    series: str
    planes: Callable[[], Iterator[Plane]]
    labels: tuple[LabelRow, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class Account:
    """What became of the files that are not imported. Names of files may be shown: they are public."""

    problems: list[tuple[str, str]] = field(default_factory=list)  # file, code: a person should look
    left_out: Counter[str] = field(default_factory=Counter)  # by rule
    columns_not_used: list[str] = field(default_factory=list)

    def refuse(self, source: str, code: str) -> None:
        self.problems.append((source, code))

    def check(self, imported: int, *, accept: bool, src: Path) -> None:
        """Stop where nothing can be used, or more than a few files cannot.

        Raises:
            DataError: `no-usable-images`; `too-many-quarantined` (unless `accept`).
        """
        counts = Counter(code for _, code in self.problems)
        said = listing(counts + self.left_out) or "no file of this format"
        if not imported:
            raise DataError(
                f"{src}: nothing to import ({said})",
                code="no-usable-images",
                hint="fedqc explain CODE explains each code",
            )
        total = len(self.problems) + imported
        if len(self.problems) > MAX_QUARANTINED * total and not accept:
            (first, code), bad = self.problems[0], len(self.problems)
            raise DataError(
                f"{src}: {bad} of {total} files cannot be imported ({listing(counts)}); "
                f"the first: {first} ({code})",
                code="too-many-quarantined",
                hint="correct the folder or the sheet, or --accept-quarantine to import the others",
            )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a person says of a collection.

    Args:
        collection: name and licence; recorded as the declaration that these are no hospital's patients.
        site: name of the site where the collection does not tell sites apart.
        per_site_ids: patient IDs are numbered anew at each site.
        every_image: the collection names no patients; see `EVERY_IMAGE_A_PATIENT`.
        accept: import although many files cannot be.
    """

    collection: str
    site: str
    modality: Modality | None = None
    pattern: re.Pattern[str] | None = None
    per_site_ids: bool = False
    every_image: bool = False
    accept: bool = False

    def named(self, name: str) -> dict[str, str]:
        """What `pattern` finds in a name: patient, site."""
        found = self.pattern.search(name) if self.pattern else None
        return {key: text for key, text in found.groupdict().items() if text} if found else {}

    def who(self, source: str, said: str, named: Mapping[str, str]) -> str:
        """The patient of a file: as the sheet says, else its name; "" where nothing says."""
        return said or named.get("patient", "") or (source if self.every_image else "")


@dataclass(kw_only=True)
class _Site:
    name: str
    folder: Path
    numbers: dict[str, int] = field(default_factory=dict)  # patient → number in the names of files
    rows: list[LabelRow] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)  # patient → images written
    modalities: Counter[str] = field(default_factory=Counter)
    lossy: bool = False

    def public(self) -> dict[str, Any]:
        return {
            "site": self.name,
            "patients": len(self.images),
            "images": sum(self.images.values()),
            "modalities": dict(sorted(self.modalities.items())),
            "labels": counted(self.rows),
        }


def write_collection(
    scans: Sequence[Scan],
    account: Account,
    src: Path,
    out: Path,
    wanted: Wanted,
    *,
    form: str,
    progress: Progress,
) -> dict[str, Any]:
    """Write the scans as site folders below `out`. The same arguments give the same images.

    Returns:
        the content of import.json.
    Raises:
        ConfigError: `output-exists`, `not-writable`, `bad-argument`.
        DataError: `no-usable-images`, `too-many-quarantined`, `patient-at-two-sites`.
    """
    refuse_inside(src, out)
    one_site_each(((scan.patient, scan.site) for scan in scans), wanted)
    sites: dict[str, _Site] = {}
    imported = 0
    with whole_folder(out) as staging:
        for done, scan in enumerate(scans, start=1):
            site = sites.setdefault(scan.site, _Site(name=scan.site, folder=staging / scan.site))
            try:
                imported += _write_scan(site, scan, wanted)
            except ImagingError as error:
                account.refuse(scan.source, error.code)
            account.left_out += scan.left_out
            progress("importing", done, len(scans))
        account.check(imported, accept=wanted.accept, src=src)
        written = [site for _, site in sorted(sites.items()) if site.images]
        for site in written:
            finish_site(
                site.folder,
                site.name,
                wanted,
                patients=len(site.images),
                sheet=to_csv(site.rows) if any(counted(site.rows).values()) else None,
                lossy=site.lossy,
            )
            write_lines(site.folder / MANIFEST, site.lines)
        return write_report(staging, [site.public() for site in written], account, wanted, form=form)


def _write_scan(site: _Site, scan: Scan, wanted: Wanted) -> bool:
    """Write all slices of a scan, or none; whether there was one to write."""
    number = site.numbers.setdefault(scan.patient, len(site.numbers) + 1)
    images = site.folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    identity = f"{wanted.collection}/{site.name}/{scan.patient}"
    made: list[Path] = []
    lossy = False
    try:
        for plane in scan.planes():
            place = site.images[scan.patient] + len(made) + 1
            path = images / f"p{number:05d}-{place:05d}.dcm"
            facts: dict[str, Any] = {
                "pixel_spacing_mm": None,
                "slice_thickness_mm": None,
                "slice_position_mm": None,
                "manufacturer": "",
                "model": "",
                "scanning_sequence": (),
                "sequence_variant": (),
                **scan.facts,
                **plane.facts,
            }
            facts.setdefault("instance_number", plane.number)
            facts.setdefault("imported_from", scan.form)
            lossy |= bool(facts.get("lossy_method"))
            write_slice(
                path,
                plane.image,
                HeaderFacts(
                    modality=scan.modality,
                    patient_id=scan.patient,
                    study_uid=make_uid(f"{identity}/study {scan.study}".encode()),
                    series_uid=make_uid(f"{identity}/study {scan.study}/series {scan.series}".encode()),
                    sop_uid=make_uid(f"{identity}/{scan.source}/{plane.number}".encode()),
                    **facts,
                ),
            )
            made.append(path)
    except ImagingError:
        for path in made:
            path.unlink()
        raise
    if not made:
        return False
    site.images[scan.patient] += len(made)
    site.modalities[scan.modality] += len(made)
    site.lossy |= lossy
    for place, path in enumerate(made, start=1):
        site.rows += [replace(row, key=RowKey(file=path.name)) for row in scan.labels]
        line: dict[str, Any] = {"file": path.name, "source": scan.source, "patient": scan.patient}
        if len(made) > 1:
            line["slice"] = place
        site.lines.append(line | ({"about": dict(scan.about)} if scan.about else {}))
    return True


def finish_site(
    folder: Path, name: str, wanted: Wanted, *, patients: int, sheet: str | None, lossy: bool
) -> None:
    """site.yaml with its declaration, the key, the label sheet and, where images were compressed with loss,
    a cohort.yaml that takes them.
    """
    fields: dict[str, object] = {
        "name": name,
        "kind": "public",
        "cohort": slug(f"{wanted.collection[:40]}-{name}")[:64],
        "nominal_patients": nominal_bucket(patients),
    }
    if sheet is None:
        fields["labels"] = "none"
    else:
        (folder / "labels.csv").write_text(sheet, encoding="utf-8")
    if wanted.every_image:
        fields["stand_in"] = EVERY_IMAGE_A_PATIENT
    fields["declared_not_hospital"] = declaration(f"public collection: {wanted.collection}"[:500], "images")
    key = hashlib.sha256(f"import key {wanted.collection} {name}".encode()).digest()
    write_site_yaml(folder, fields, key=key)
    if lossy:
        (folder / "cohort.yaml").write_text(
            "# The collection was published as JPEG: there are no originals.\n"
            + dump_yaml({"name": str(fields["cohort"]), "lossy": "use"}, sort_keys=False),
            encoding="utf-8",
        )


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON, one object a line."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_report(
    staging: Path, sites: list[dict[str, Any]], account: Account, wanted: Wanted, *, form: str
) -> dict[str, Any]:
    """import.json; returns its content."""
    report = {
        "format": form,
        "collection": wanted.collection,
        "fedqc": version("fedqc"),
        "sites": sites,
        "not_imported": [{"file": file, "code": code} for file, code in account.problems],
        "left_out": dict(sorted(account.left_out.items())),
        "columns_not_used": account.columns_not_used,
    }
    (staging / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return report


def report_text(report: Mapping[str, Any], out: Path) -> str:
    """A line for each site, what was not imported, and what to type next."""
    lines = []
    for site in report["sites"]:
        labels = ", ".join(
            f"{name}: {of['present']} present, {of['absent']} absent"
            for name, of in site["labels"].items()
            if sum(of.values())
        )
        modalities = " and ".join(site["modalities"])
        lines.append(
            f"{site['site']}: {site['patients']} patients, {site['images']} images ({modalities}); "
            f"labels: {labels or 'none'}"
        )
    problems = report["not_imported"]
    if problems:
        lines.append(
            f"not imported: {listing(Counter(one['code'] for one in problems))}; "
            f"the first: {problems[0]['file']}; all: {out / REPORT}"
        )
    if report["left_out"]:
        lines.append(f"left out: {listing(Counter(report['left_out']))}")
    if report["columns_not_used"]:
        lines.append(f"columns not used: {', '.join(report['columns_not_used'])}")
    lines.append(f"written: {out}")
    return "\n".join(lines)


def counted(rows: Iterable[LabelRow]) -> dict[str, dict[str, int]]:
    """Of each artifact: answers present and absent. Artifacts without an answer are left out."""
    counts = {name: {"present": 0, "absent": 0} for name in NAMES}
    for row in rows:
        for name, of in counts.items():
            answer = row.present[INDEX[name]]
            of["present"] += answer == 1
            of["absent"] += answer == 0
    return {name: of for name, of in counts.items() if sum(of.values())}


def one_site_each(patients: Iterable[tuple[str, str]], wanted: Wanted) -> None:
    """Check that nobody is at two sites, where a model could train on one and be tested on the other.

    Raises:
        DataError: `patient-at-two-sites`.
    """
    if wanted.per_site_ids:
        return
    seen: dict[str, set[str]] = {}
    for patient, site in patients:
        seen.setdefault(patient, set()).add(site)
    shared = sorted(patient for patient, of in seen.items() if len(of) > 1)
    if shared:
        at = ", ".join(sorted(seen[shared[0]]))
        raise DataError(
            f"{len(shared)} patients are at two sites, the first: {shared[0]} ({at})",
            code="patient-at-two-sites",
            hint="one site for all images of a patient; if each site numbers its own: --per-site-ids",
        )


def patient_id(text: str, where: str) -> str:
    """A patient's name as DICOM can hold it.

    Raises:
        DataError: `bad-patient-id`.
    """
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    if not plain or len(plain) > MAX_PATIENT_ID or _CONTROL.search(plain):
        raise DataError(
            f"{where}: not usable as PatientID",
            code="bad-patient-id",
            hint=f"1 to {MAX_PATIENT_ID} characters, without a backslash",
        )
    return plain


def site_name(text: str) -> str:
    """A site's name of what a collection calls it: `Guy's` becomes `guy-s`; what has no Latin letter or digit
    gets a name of its own.
    """
    return slug(text)[:32].strip("-") or f"site-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The --pattern of the command.

    Raises:
        ConfigError: `bad-argument`.
    """
    if pattern is None:
        return None
    hint = "for example --pattern '(?P<patient>IXI[0-9]+)-(?P<site>[A-Za-z]+)-'"
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--pattern: {error}", code="bad-argument", hint=hint) from None
    if not found.groupindex or set(found.groupindex) - {"patient", "site"}:
        raise ConfigError(
            "--pattern: expected the groups patient, site or both", code="bad-argument", hint=hint
        )
    return found


def refuse_inside(src: Path, out: Path) -> None:
    """Raises ConfigError (code `no-such-folder`, `bad-argument`): SRC is no folder, or OUT lies in it."""
    if not src.is_dir():
        raise ConfigError(
            f"{src}: no such folder",
            code="no-such-folder",
            hint="SRC = the unpacked folder of the collection",
        )
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(src)):
        raise ConfigError(
            f"{out}: lies in the folder to import", code="bad-argument", hint="OUT, anywhere else"
        )


def listing(counts: Mapping[str, int]) -> str:
    """`3 × colour, 1 × truncated`."""
    return ", ".join(f"{count} × {code}" for code, count in sorted(counts.items()))
