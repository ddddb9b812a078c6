"""Write results about series as a DICOM structured report (Comprehensive SR, TID 1500), by highdicom.

A report belongs to the patient's study: it bears the identifiers of the images, like every DICOM file of the
study. It is written where a person asks for it, and stays in the hospital.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pydicom
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from client.dicom.sources import Source, expand_archives, find_files, open_source
from common.errors import ConfigError, ImagingError
from common.files import write_bytes

SCHEME = "99FEDQC"
"""Private codes: DICOM has none for most artifacts."""
MAX_HEADER_BYTES = 64 << 20
MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
"""Attributes of type 2 (DICOM PS3.3 C.7.1.1, C.7.2.1): what an image leaves out, its report leaves empty."""
TIMES = ("PatientBirthDate", "StudyDate", "StudyTime")
"""Of these what is no date or time, as de-identification leaves it, is left empty, too."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is said of one artifact in a series."""

    artifact: str
    present: bool | None  # None: scored, not decided
    probability: float | None


@dataclass(frozen=True, kw_only=True)
class SeriesSaid:
    """What is said of a series; `file` is the one of its first image."""

    file: str
    said: tuple[Said, ...]


def headers_of(path: Path, files: Sequence[str]) -> Mapping[str, pydicom.Dataset]:
    """File -> header without pixels, of files below a path as intake names them.

    Args:
        path: a DICOM file, a folder, or an archive.
    """
    real = path.resolve()
    found = find_files(real) if real.is_dir() else find_files(real.parent, only=real.name)
    wanted = set(files)
    headers = {}
    for source in expand_archives(found):
        if source.file in wanted:
            headers[source.file] = _header(source)
    return headers


def _header(source: Source) -> pydicom.Dataset:
    with open_source(source) as (stream, size):
        data = stream.read(min(size, MAX_HEADER_BYTES))
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
    for keyword in MAY_BE_EMPTY:
        if keyword not in header or (keyword in TIMES and not str(header[keyword].value)[:6].isdigit()):
            setattr(header, keyword, "")
    if not header.get("SpecificCharacterSet", "ASCII"):
        del header.SpecificCharacterSet
    return header


def write_report(
    path: Path,
    headers: Sequence[pydicom.Dataset],
    series: Sequence[SeriesSaid],
    *,
    models: Sequence[str],
    basis: str,
) -> None:
    """One report of one study.

    Args:
        headers: of the first image of each series, in the order of `series`; all of one study.
        models: SHA-256 of the model's file, or of each of an ensemble. basis: where thresholds come from.
    Raises:
        ConfigError: `missing-extra`.
        ImagingError: `sr-impossible`, a header lacks what a report must repeat.
    """
    if find_spec("highdicom") is None:
        raise ConfigError("a DICOM SR needs highdicom", code="missing-extra", hint="pip install 'fedqc[sr]'")
    import highdicom as hd
    from highdicom import sr
    from pydicom.sr.codedict import codes

    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=["fedqc", *models]),
            name="fedqc",
            manufacturer_name="fedqc: research software, not a medical device",
            model_name="+".join(models),
        ),
    )
    algorithm = sr.AlgorithmIdentification(
        name="fedqc artifact classifier",
        version=version("fedqc"),
        parameters=[*(f"sha256 {model}" for model in models), basis],
    )
    states = {True: codes.SCT.Present, False: codes.SCT.Absent, None: codes.SCT.Indeterminate}
    groups = []
    try:
        for number, (header, one) in enumerate(zip(headers, series, strict=True), start=1):
            groups.append(
                sr.MeasurementsAndQualitativeEvaluations(
                    tracking_identifier=sr.TrackingIdentifier(
                        uid=generate_uid(), identifier=f"series {number}"
                    ),
                    algorithm_id=algorithm,
                    source_images=[
                        sr.SourceImageForMeasurementGroup(
                            referenced_sop_class_uid=header.SOPClassUID,
                            referenced_sop_instance_uid=header.SOPInstanceUID,
                        )
                    ],
                    measurements=[
                        sr.Measurement(
                            name=_coded(f"P_{said.artifact}", f"probability of {said.artifact}"),
                            value=round(said.probability, 4),
                            unit=codes.UCUM.NoUnits,
                        )
                        for said in one.said
                        if said.probability is not None
                    ]
                    or None,
                    qualitative_evaluations=[
                        sr.QualitativeEvaluation(
                            name=_coded(said.artifact, said.artifact.replace("_", " ")),
                            value=states[said.present],
                        )
                        for said in one.said
                    ],
                )
            )
        report = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=_coded("QC", "image quality control"),
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they print the patient's name
            document = sr.ComprehensiveSR(
                evidence=list(headers),
                content=report[0],
                series_instance_uid=hd.UID(),
                series_number=9000,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="fedqc",
                series_description="fedqc: image artifacts (research, not a medical device)",
            )
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise ImagingError(
            f"no structured report: the headers do not allow it ({str(error)[:80]})", code="sr-impossible"
        ) from None
    stream = io.BytesIO()
    document.save_as(stream, enforce_file_format=True)
    write_bytes(path, stream.getvalue(), 0o600)


def _coded(code: str, meaning: str) -> Code:
    """A private code; a value has at most 16 characters (DICOM PS3.5 6.2, SH)."""
    return Code(code.upper()[:16], SCHEME, meaning)
