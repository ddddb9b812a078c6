"""The `fedqc data import` commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import Format, FormatOption
from common.errors import ConfigError
from common.progress_bar import progress_shown, say
from common.terminal import print

if TYPE_CHECKING:
    from client.importing.collection import Wanted
    from client.importing.sheet import Labelling


class Modality(StrEnum):
    CT = "CT"
    MR = "MR"


class PlaneOption(StrEnum):
    acquired = "acquired"
    axial = "axial"
    coronal = "coronal"
    sagittal = "sagittal"


class SiteBy(StrEnum):
    folder = "folder"
    manufacturer = "manufacturer"
    model = "model"
    scanner = "scanner"
    patient = "patient"


Src = Annotated[Path, typer.Argument(help="Unpacked folder of the collection. It is not changed.")]
Out = Annotated[Path, typer.Argument(help="New folder, one subfolder per site.")]
Collection = Annotated[
    str,
    typer.Option(
        help="Name and licence of the collection. Recorded in site.yaml as your declaration that these are "
        "no hospital's patients."
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="CSV, TSV or .xlsx sheet: file, patient, site, part, and a column for each artifact or one "
        "column label."
    ),
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="The artifact that 1 and 0 of the label column, or a score, are about."),
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", help="Title of the label column. Default: label, class or artifact."),
]
PresentFrom = Annotated[
    float | None,
    typer.Option(
        "--present-from", help="The label column holds a score: from here on the artifact is present."
    ),
]
AbsentTo = Annotated[
    float | None,
    typer.Option(
        "--absent-to", help="With --present-from: up to here it is absent; between the two, not assessed."
    ),
]
SiteName = Annotated[
    str | None,
    typer.Option(
        "--site",
        help="Name of the site where the collection does not tell sites apart. Default: the name of SRC.",
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="Regular expression with a group patient, site or both, searched in each file's path, such as "
        "'(?P<patient>IXI[0-9]+)-(?P<site>[A-Za-z]+)-'.",
    ),
]
PerSiteIds = Annotated[
    bool,
    typer.Option(
        "--per-site-ids", help="Each site numbers its own patients: one ID at two sites is two people."
    ),
]
EveryImage = Annotated[
    bool,
    typer.Option(
        "--every-image-a-patient",
        help="The collection names no patients. One person may then train and be tested; site.yaml says so.",
    ),
]
Accept = Annotated[
    bool,
    typer.Option("--accept-quarantine", help="Import the others although many files cannot be imported."),
]

importing = typer.Typer(add_completion=False, no_args_is_help=True)


@importing.callback()
def _import_group() -> None:
    """Import a public collection as site folders of kind public: pictures, NIfTI, MATLAB or DICOM.

    Converted images are DICOM with a mark of their origin; no hospital's site uses them.

    docs/public_data.md has the commands for MR-ART, IXI, TCGA and others.
    """


@importing.command()
def pictures(
    src: Src,
    out: Out,
    collection: Collection,
    labels: Labels = None,
    label: Label = None,
    label_column: LabelColumn = None,
    present_from: PresentFrom = None,
    absent_to: AbsentTo = None,
    modality: Annotated[Modality | None, typer.Option(help="Of all pictures, unless the sheet says.")] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="CT: center and width in HU that the pictures were made with. Needed for CT.",
            metavar="CENTER WIDTH",
        ),
    ] = None,
    site: SiteName = None,
    pattern: Pattern = None,
    per_site_ids: PerSiteIds = False,
    every_image_a_patient: EveryImage = False,
    accept_quarantine: Accept = False,
    format: FormatOption = Format.text,
) -> None:
    """Import PNG or JPEG slices with a sheet of patients and labels."""
    from client.importing.collection import report_text, write_collection
    from client.importing.pictures import pictures as scans_of
    from client.importing.pictures import window_of

    labelling = _labelling(label, label_column, present_from, absent_to)
    wanted = _wanted(
        src, collection, site, pattern, modality, per_site_ids, accept_quarantine, every_image_a_patient
    )
    with progress_shown() as progress:
        scans, account = scans_of(_folder(src, out), labels, labelling, window_of(window), wanted)
        report = write_collection(scans, account, src, out, wanted, form="pictures", progress=progress)
    _print(report, format, report_text(report, out))


@importing.command()
def nifti(
    src: Src,
    out: Out,
    collection: Collection,
    labels: Labels = None,
    label: Label = None,
    label_column: LabelColumn = None,
    present_from: PresentFrom = None,
    absent_to: AbsentTo = None,
    modality: Annotated[
        Modality | None, typer.Option(help="Where neither the suffix of BIDS nor the sheet says.")
    ] = None,
    plane: Annotated[
        PlaneOption, typer.Option(help="Plane of the slices. acquired: as the scanner made them.")
    ] = PlaneOption.acquired,
    slices: Annotated[
        int | None,
        typer.Option(min=1, help="At most this many slices of a volume, spread evenly. Default: all."),
    ] = None,
    site: SiteName = None,
    pattern: Pattern = None,
    per_site_ids: PerSiteIds = False,
    every_image_a_patient: EveryImage = False,
    accept_quarantine: Accept = False,
    format: FormatOption = Format.text,
) -> None:
    """Import a BIDS data set, or a folder of NIfTI volumes."""
    from client.importing.collection import report_text, write_collection
    from client.importing.nifti import nifti as scans_of

    labelling = _labelling(label, label_column, present_from, absent_to)
    wanted = _wanted(
        src, collection, site, pattern, modality, per_site_ids, accept_quarantine, every_image_a_patient
    )
    with progress_shown() as progress:
        scans, account = scans_of(
            _folder(src, out), labels, labelling, wanted, progress, plane=plane.value, slices=slices
        )
        report = write_collection(scans, account, src, out, wanted, form="NIfTI", progress=progress)
    _print(report, format, report_text(report, out))


@importing.command()
def mriqc(
    iqms: Annotated[Path, typer.Argument(help="Group table of MRIQC (TSV or CSV), a row a scan.")],
    ratings: Annotated[
        Path,
        typer.Argument(
            help="Ratings of the same scans, a column a reader (rater_1, rating): below 0, or exclude, is "
            "unacceptable. May be the same file."
        ),
    ],
    out: Out,
    collection: Collection,
    sites: Annotated[
        str, typer.Option("--sites", help="Column that tells hospitals apart. Default: one site.")
    ] = "",
    site: SiteName = None,
    format: FormatOption = Format.text,
) -> None:
    """Import MRIQC's metrics of scans, without images: one site a hospital, label quality."""
    from client.importing.mriqc import import_mriqc, report_text

    wanted = _wanted(iqms, collection, site or "hospital", None, None, False, False)
    report = import_mriqc(iqms, ratings, out, wanted, sites=sites)
    _print(report, format, report_text(report, out))


@importing.command()
def mat(
    src: Src,
    out: Out,
    collection: Collection,
    labels: Labels = None,
    label: Label = None,
    label_column: LabelColumn = None,
    present_from: PresentFrom = None,
    absent_to: AbsentTo = None,
    site: SiteName = None,
    accept_quarantine: Accept = False,
    format: FormatOption = Format.text,
) -> None:
    """Import the brain tumor set of figshare: MATLAB 7.3 files with a structure cjdata."""
    from client.importing.collection import report_text, write_collection
    from client.importing.figshare import figshare

    labelling = _labelling(label, label_column, present_from, absent_to)
    wanted = _wanted(src, collection, site, None, None, False, accept_quarantine)
    with progress_shown() as progress:
        scans, account = figshare(_folder(src, out), labels, labelling, wanted, progress)
        report = write_collection(scans, account, src, out, wanted, form="MATLAB", progress=progress)
    _print(report, format, report_text(report, out))


@importing.command()
def dicom(
    src: Src,
    out: Out,
    collection: Collection,
    labels: Annotated[
        Path | None, typer.Option(help="Label sheet as docs/labels.md describes it; files relative to SRC.")
    ] = None,
    site_by: Annotated[
        SiteBy | None,
        typer.Option(
            "--site-by",
            help="What tells sites apart: the first folder below SRC, the header's maker, model or scanner, "
            "or the group site of --pattern in the PatientID. Default: one site.",
        ),
    ] = None,
    site: SiteName = None,
    pattern: Pattern = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the files. Default: hard links where possible.")
    ] = False,
    accept_quarantine: Accept = False,
    format: FormatOption = Format.text,
) -> None:
    """Import a collection of DICOM files, such as those of TCIA; patients by PatientID."""
    from client.importing.collection import report_text
    from client.importing.dicom_collection import dicom_collection

    if (pattern is not None) != (site_by is SiteBy.patient):
        raise ConfigError(
            "--pattern and --site-by patient belong together",
            code="bad-argument",
            hint="for example --site-by patient --pattern 'TCGA-(?P<site>[^-]+)-'",
        )
    wanted = _wanted(src, collection, site, pattern, None, False, accept_quarantine)
    with progress_shown() as progress:
        report = dicom_collection(
            _folder(src, out),
            out,
            labels,
            wanted,
            site_by=None if site_by is None else site_by.value,
            copy=copy,
            say=say,
            progress=progress,
        )
    _print(report, format, report_text(report, out))


def _folder(src: Path, out: Path) -> Path:
    """SRC, checked with OUT before anything is read."""
    from client.importing.collection import refuse_inside

    refuse_inside(src, out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists and is not an empty folder",
            code="output-exists",
            hint="choose another folder or remove it",
        )
    return src


def _labelling(
    label: str | None, column: str | None, present_from: float | None, absent_to: float | None
) -> Labelling:
    from client.importing.sheet import labelling_of

    return labelling_of(label, column, present_from, absent_to)


def _wanted(
    src: Path,
    collection: str,
    site: str | None,
    pattern: str | None,
    modality: Modality | None,
    per_site_ids: bool,
    accept: bool,
    every_image: bool = False,
) -> Wanted:
    from client.importing.collection import Wanted, compiled

    if not collection.strip():
        raise ConfigError(
            "--collection: empty",
            code="bad-argument",
            hint="name and licence of the collection, such as 'MR-ART, OpenNeuro ds004173, CC0'",
        )
    return Wanted(
        collection=" ".join(collection.split()),
        site=site or src.resolve().name,
        modality=None if modality is None else modality.value,
        pattern=compiled(pattern),
        per_site_ids=per_site_ids,
        every_image=every_image,
        accept=accept,
    )


def _print(report: Mapping[str, Any], format: Format, text: str) -> None:
    print(json.dumps(report, ensure_ascii=False) if format is Format.json else text)
