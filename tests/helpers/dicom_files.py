"""DICOM files for tests, built in code: a good slice, then what may be wrong with one."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from client.dicom.dicom import SliceHeader, read_headers, read_pixels, read_slices
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.refusals import CODES, EXCLUSIONS
from common.errors import ImagingError

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")
ENHANCED = {"CT": "1.2.840.10008.5.1.4.1.1.2.1", "MR": "1.2.840.10008.5.1.4.1.1.4.1"}


def write(path: Path, image: np.ndarray | None = None, modality: str = "CT", **changes: object) -> Path:
    """A good slice, then header changes; a change to None deletes the element."""
    if image is None:
        image = np.random.default_rng(0).integers(-900, 1200, (24, 20)).astype(np.float32)
    write_slice(
        path,
        image,
        HeaderFacts(
            modality=modality,  # type: ignore[arg-type]
            pixel_spacing_mm=0.7,
            patient_id="P1",
            study_uid=make_uid(b"study"),
            series_uid=make_uid(b"series"),
            sop_uid=make_uid(path.name.encode()),
            instance_number=3,
            slice_position_mm=12.5,
            slice_thickness_mm=5.0,
        ),
    )
    if changes:
        dataset = pydicom.dcmread(path)
        for keyword, value in changes.items():
            if value is None:
                delattr(dataset, keyword)
            elif keyword == "PixelPaddingValue":
                dataset.add_new(keyword, "SS", value)
            else:
                setattr(dataset, keyword, value)
        dataset.save_as(path)
    return path


def replace_element(path: Path, keyword: str, vr: bytes, value: bytes) -> Path:
    """Put a raw explicit-VR element in the place of a short one, as no library would write it."""
    content = path.read_bytes()
    tag = pydicom.tag.Tag(keyword)
    at = content.index(struct.pack("<HH", tag.group, tag.element), 132)
    length = struct.unpack("<H", content[at + 6 : at + 8])[0]
    element = struct.pack("<HH", tag.group, tag.element) + vr + struct.pack("<H", len(value)) + value
    path.write_bytes(content[:at] + element + content[at + 8 + length :])
    return path


def insert_before_pixels(path: Path, raw: bytes) -> Path:
    content = path.read_bytes()
    at = content.rindex(struct.pack("<HH", 0x7FE0, 0x0010) + b"OW")
    path.write_bytes(content[:at] + raw + content[at:])
    return path


def code_of(path: Path) -> str:
    with pytest.raises(ImagingError) as caught:
        read_pixels(path)
    assert caught.value.code in CODES | EXCLUSIONS
    assert caught.value.hint
    return caught.value.code


def encapsulated(
    path: Path, frames: Sequence[bytes], syntax: str, *, table: bool = False, pieces: int = 1
) -> Path:
    """Put codestreams in the place of the pixels."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.PixelData = pydicom.encaps.encapsulate(list(frames), fragments_per_frame=pieces, has_bot=table)
    dataset["PixelData"].is_undefined_length = True
    with pydicom.config.disable_value_validation():
        dataset.save_as(path, implicit_vr=False, little_endian=True)
    return path


def items(**elements: object) -> Items:
    """A sequence of one item."""
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return Items([item])


def group(**sequences: Items) -> Dataset:
    """Functional groups: the sequences of one frame, or those that all share."""
    groups = Dataset()
    for keyword, value in sequences.items():
        setattr(groups, keyword, value)
    return groups


def write_frames(
    path: Path,
    images: np.ndarray,
    modality: str = "MR",
    *,
    shared: Dataset | None = None,
    own: Sequence[Dataset] = (),
    **changes: object,
) -> Path:
    """An enhanced image of frames x rows x columns."""
    write(path, images.reshape(-1, images.shape[2]), modality)
    dataset = pydicom.dcmread(path)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(ENHANCED[modality])
    dataset.Rows, dataset.NumberOfFrames = images.shape[1], len(images)
    if shared is not None:
        dataset.SharedFunctionalGroupsSequence = Items([shared])
    if own:
        dataset.PerFrameFunctionalGroupsSequence = Items(list(own))
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def headers_of(content: Path | bytes) -> tuple[SliceHeader, ...]:
    content = content.read_bytes() if isinstance(content, Path) else content
    return read_headers(io.BytesIO(content), len(content))


def slices_of(content: Path | bytes, frames: Sequence[int] | None = None) -> dict[int, np.ndarray]:
    content = content.read_bytes() if isinstance(content, Path) else content
    return dict(read_slices(io.BytesIO(content), len(content), frames))


def header_code(path: Path) -> str:
    """The code by which the header alone refuses the file."""
    with pytest.raises(ImagingError) as caught:
        headers_of(path)
    assert caught.value.code in CODES | EXCLUSIONS
    return caught.value.code
