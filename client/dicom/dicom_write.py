"""Write synthetic and imported slices as DICOM files: the same arguments give the same bytes."""

from __future__ import annotations

import hashlib
import io
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID
from pydicom.valuerep import format_number_as_ds

from client.dicom.codecs import EXPLICIT
from client.dicom.dicom import IMPORTER, MAX_SIDE, SOP_CLASSES, WRITER
from client.dicom.refusals import refusal
from common.artifacts import Modality

_SOP_CLASS_OF: dict[Modality, str] = {modality: uid for uid, modality in SOP_CLASSES.items()}


def make_uid(seed: bytes) -> str:
    """A UID that is always the same for the same seed: `2.25.` and a UUID as an integer (PS3.5 B.2). Not
    reversible without the seed.
    """
    return f"2.25.{uuid.UUID(bytes=hashlib.sha256(seed).digest()[:16], version=5).int}"


@dataclass(frozen=True, kw_only=True)
class HeaderFacts:
    """The header of a synthetic or an imported slice, and how its values are stored. What is None is left out
    of the header.

    Args:
        pixel_spacing_mm: one number, or between rows and between columns.
        slice_position_mm: along the slice normal; of an imported slice, None where the source gives none.
        orientation, corner_mm: ImageOrientationPatient and ImagePositionPatient, instead of an axial slice
            whose centre lies on the z axis at `slice_position_mm`.
        slope, intercept: value = stored × slope + intercept.
        bits_stored, signed: range of the stored integers.
        phase_encoding: "ROW" or "COL", MR only.
        kvp, kernel: tube voltage in kV and reconstruction kernel, CT only.
        scanning_sequence, sequence_variant, echo_time_ms, repetition_time_ms, pixel_bandwidth_hz,
            field_strength_t: how the slice was acquired, MR only. A simulator chooses its physics by them.
        derived: made from a real image: the header then says DERIVED; nothing of the real header is copied.
        imported_from: the format that the slice was converted from, such as PNG. The header then says DERIVED
            and SECONDARY, names fedqc as the equipment that converted it, and holds nothing that is not given
            here.
        lossy_method: LossyImageCompressionMethod, where the source was compressed with loss.
        elements: further elements by keyword.
    """

    modality: Modality
    pixel_spacing_mm: float | tuple[float, float] | None
    patient_id: str
    study_uid: str
    series_uid: str
    sop_uid: str
    instance_number: int
    slice_position_mm: float | None = 0.0
    slice_thickness_mm: float | None = 1.0
    manufacturer: str = "fedqc"
    model: str = "phantom"
    slope: float = 1.0
    intercept: float = 0.0
    bits_stored: int = 16
    signed: bool = True
    phase_encoding: str | None = None
    field_strength_t: float | None = None
    kvp: float | None = None
    kernel: str = ""
    scanning_sequence: tuple[str, ...] = ("GR",)
    sequence_variant: tuple[str, ...] = ("NONE",)
    echo_time_ms: float | None = None
    repetition_time_ms: float | None = None
    pixel_bandwidth_hz: float | None = None
    description: str = ""
    derived: bool = False
    orientation: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    corner_mm: tuple[float, float, float] | None = None
    imported_from: str = ""
    lossy_method: str = ""
    elements: Mapping[str, Any] = field(default_factory=dict)


def write_slice(path: Path, image: np.ndarray, facts: HeaderFacts) -> None:
    """Write a synthetic or imported slice as CT or MR Image Storage, Explicit VR Little Endian; the same
    arguments give the same bytes.

    Args:
        image: shape (rows, columns), physical units (HU for CT). Stored as round((image - intercept) /
            slope), clipped to what `bits_stored` and `signed` can hold, so `read_pixels` gives the image back
            to within slope / 2 where it was not clipped.
    Raises:
        ImagingError: `bad-geometry`, `non-finite`, `bad-rescale`: the image is not a finite 2-D array of at
            most 4096 x 4096, or the slope is not usable.
    """
    values = np.asarray(image, dtype=np.float64)
    if values.ndim != 2 or not 1 <= min(values.shape) <= max(values.shape) <= MAX_SIDE:
        raise refusal(
            "bad-geometry", f"image of shape {values.shape}; expected (rows, columns), each 1..{MAX_SIDE}"
        )
    if not np.isfinite(values).all():
        raise refusal("non-finite", "the image holds values that are not finite")
    if not (
        math.isfinite(facts.slope)
        and math.isfinite(facts.intercept)
        and facts.slope != 0
        and 1 <= facts.bits_stored <= 16
    ):
        raise refusal(
            "bad-rescale",
            f"slope {facts.slope}, intercept {facts.intercept}, bits_stored {facts.bits_stored} "
            "cannot store an image",
        )
    slope_text, intercept_text = (
        format_number_as_ds(float(facts.slope)),
        format_number_as_ds(float(facts.intercept)),
    )
    low, high = (
        (-(1 << facts.bits_stored - 1), (1 << facts.bits_stored - 1) - 1)
        if facts.signed
        else (0, (1 << facts.bits_stored) - 1)
    )
    stored = np.clip(np.rint((values - float(intercept_text)) / float(slope_text)), low, high).astype(
        "<i2" if facts.signed else "<u2"
    )
    rows, columns = stored.shape

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(_SOP_CLASS_OF[facts.modality])
    meta.MediaStorageSOPInstanceUID = UID(facts.sop_uid)
    meta.TransferSyntaxUID = UID(EXPLICIT)
    meta.ImplementationClassUID = UID(make_uid(b"fedqc"))
    # not pydicom's version: the same arguments give the same bytes
    meta.ImplementationVersionName = IMPORTER if facts.imported_from else WRITER
    dataset = Dataset()
    dataset.file_meta = meta
    fields: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": [
            "DERIVED" if facts.derived else "ORIGINAL",
            "PRIMARY",
            "AXIAL" if facts.modality == "CT" else "M",
        ],
        "SOPClassUID": UID(_SOP_CLASS_OF[facts.modality]),
        "SOPInstanceUID": UID(facts.sop_uid),
        "Modality": facts.modality,
        "PatientName": "DERIVED^PUBLIC" if facts.derived else "SYNTHETIC^PHANTOM",
        "PatientID": facts.patient_id,
        "PatientBirthDate": "",
        "PatientSex": "O",
        "StudyInstanceUID": UID(facts.study_uid),
        "StudyDate": "",
        "StudyTime": "",
        "StudyID": "",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "SeriesInstanceUID": UID(facts.series_uid),
        "SeriesNumber": 1,
        "SeriesDescription": facts.description,
        "PatientPosition": "HFS",
        "PositionReferenceIndicator": "",
        "Manufacturer": facts.manufacturer,
        "ManufacturerModelName": facts.model,
        "InstanceNumber": facts.instance_number,
        "AcquisitionNumber": 1,
        "BurnedInAnnotation": "NO",
        **_plane(facts, rows, columns),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": 16,
        "BitsStored": facts.bits_stored,
        "HighBit": facts.bits_stored - 1,
        "PixelRepresentation": int(facts.signed),
    }
    if facts.modality == "CT":
        fields |= {
            "KVP": _number(facts.kvp),
            "RescaleType": "HU",
        }
        if facts.kernel:
            fields["ConvolutionKernel"] = facts.kernel.replace("\\", " ")[:16].strip()
    else:
        fields |= {
            "ScanningSequence": list(facts.scanning_sequence),
            "SequenceVariant": list(facts.sequence_variant),
            "ScanOptions": "",
            "MRAcquisitionType": "2D",
        }
        fields |= {
            "RepetitionTime": _number(facts.repetition_time_ms),
            "EchoTime": _number(facts.echo_time_ms),
            "EchoTrainLength": "",
        }
        if facts.pixel_bandwidth_hz is not None:
            fields["PixelBandwidth"] = _number(facts.pixel_bandwidth_hz)
        if facts.phase_encoding is not None:
            fields["InPlanePhaseEncodingDirection"] = facts.phase_encoding
        if facts.field_strength_t is not None:
            fields["MagneticFieldStrength"] = format_number_as_ds(float(facts.field_strength_t))
    if facts.modality == "CT" or (facts.slope, facts.intercept) != (1, 0):
        fields |= {"RescaleSlope": slope_text, "RescaleIntercept": intercept_text}
    if facts.imported_from:
        fields = _as_imported(fields, facts)
    for keyword, value in (fields | dict(facts.elements)).items():
        setattr(dataset, keyword, value)
    dataset.add_new("PixelData", "OW", stored.tobytes() + b"\0" * (stored.nbytes % 2))

    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(buffer.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _number(value: float | None) -> str:
    return "" if value is None else format_number_as_ds(float(value))


def _plane(facts: HeaderFacts, rows: int, columns: int) -> dict[str, Any]:
    """Where the slice lies, as far as it is known."""
    fields: dict[str, Any] = {}
    spacing = facts.pixel_spacing_mm
    if isinstance(spacing, int | float):
        spacing = (spacing, spacing)
    if spacing is not None:
        fields["PixelSpacing"] = _numbers(spacing)
    if facts.slice_thickness_mm is not None:
        fields["SliceThickness"] = _number(facts.slice_thickness_mm)
    if facts.slice_position_mm is not None:
        fields["SliceLocation"] = _number(facts.slice_position_mm)
        if spacing is not None:
            corner = facts.corner_mm or _corner(rows, columns, spacing, facts.slice_position_mm)
            fields["ImageOrientationPatient"] = (
                [int(value) for value in facts.orientation]
                if facts.corner_mm is None
                else _numbers(facts.orientation)
            )
            fields["ImagePositionPatient"] = _numbers(corner)
            fields["FrameOfReferenceUID"] = UID(
                make_uid(b"frame of reference of " + facts.study_uid.encode())
            )
    return fields


def _as_imported(fields: dict[str, Any], facts: HeaderFacts) -> dict[str, Any]:
    """The header of an image of a public collection: its provenance, and nothing that the source does not
    say.

    Reference: DICOM PS3.3 C.7.6.1.1.2 (Image Type), C.8.6.1 (Conversion Type), C.12.1 (Contributing
    Equipment), PS3.16 CID 7005.
    """
    unknown = (
        "PatientPosition",
        "BurnedInAnnotation",
        "MRAcquisitionType",
        "SeriesNumber",
        "AcquisitionNumber",
    )
    kept = {keyword: value for keyword, value in fields.items() if keyword not in unknown}
    purpose, equipment = Dataset(), Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "109103", "DCM"
    purpose.CodeMeaning = "Modifying Equipment"
    equipment.Manufacturer, equipment.ManufacturerModelName = "fedqc", "fedqc data import"
    equipment.PurposeOfReferenceCodeSequence = [purpose]
    kept |= {
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL" if facts.modality == "CT" else "OTHER"],
        "ConversionType": "WSD",
        "DerivationDescription": f"converted from {facts.imported_from} of a public collection",
        "ContributingEquipmentSequence": [equipment],
        "PatientName": facts.patient_id,
        "PatientSex": "",
    }
    if facts.lossy_method:
        kept |= {"LossyImageCompression": "01", "LossyImageCompressionMethod": facts.lossy_method}
    return kept


def _numbers(values: Iterable[float]) -> list[str]:
    return [format_number_as_ds(float(value)) for value in values]


def _corner(
    rows: int, columns: int, spacing: tuple[float, float], position_mm: float
) -> tuple[float, float, float]:
    """Centre of the first pixel, so that the image centre lies on the z axis."""
    return (-(columns - 1) / 2 * spacing[1], -(rows - 1) / 2 * spacing[0], position_mm)
