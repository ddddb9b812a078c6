"""Look at a few files of a folder: did fedqc write them, and do their patients look like persons?"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pydicom

from client.dicom.dicom import WRITER
from client.dicom.patients import is_placeholder, normalised

SAMPLE = 64
"""Files that are looked at, evenly over the folder in the order of their names."""
MAX_FILES = 1_000_000
_DATE = re.compile(r"(?<!\d)(19|20)\d\d[-./]?(0[1-9]|1[0-2])[-./]?(0[1-9]|[12]\d|3[01])(?!\d)")
_HOSPITAL_NUMBER = re.compile(r"[A-Z]{0,3}\d{6,12}")
_CHINESE_NAME = re.compile(r"[一-鿿]{2,4}")
_TAGS = ["PatientID", "PatientName", "PatientBirthDate"]


def is_generated(images: Path) -> bool | None:
    """Whether fedqc wrote the images of a folder: phantoms, or slices with simulated artifacts. None where no
    file of the sample is a DICOM file.

    Every DICOM file of the sample must say so in its meta information (Implementation Version Name). This
    finds a folder that was named by mistake; it is no proof against somebody who writes that name into files.
    """
    writers = {writer for path in sample(images) if (writer := _writer(path)) is not None}
    return writers == {WRITER} if writers else None


def with_real_ids(images: Path) -> int:
    """Files of the sample that fedqc did not write, and whose patient looks like a person: see `looks_real`.
    Names nobody.
    """
    return sum(_writer(path) != WRITER and looks_real(*_patient(path)) for path in sample(images))


def looks_real(patient_id: str, name: str, birth_date: str) -> bool:
    """Whether a header names a person: a birth date, a name that is not the ID again, or an ID that is a
    name, holds a date, or is a hospital's number.
    """
    if re.fullmatch(r"\d{8}", birth_date.strip()) and not birth_date.startswith(("1900", "0001", "9999")):
        return True
    for text in (name, patient_id):
        plain = normalised(text)
        if is_placeholder(text) or (text is name and plain == normalised(patient_id)):
            continue
        parts = [part for part in re.split(r"[\^ ,=]+", plain) if part]
        if (len(parts) > 1 and all(part.isalpha() for part in parts[:2])) or _CHINESE_NAME.fullmatch(plain):
            return True
    plain = normalised(patient_id)
    return not is_placeholder(patient_id) and bool(_DATE.search(plain) or _HOSPITAL_NUMBER.fullmatch(plain))


def sample(images: Path, count: int = SAMPLE) -> list[Path]:
    """At most `count` regular files of a folder, evenly spaced in the order of their names."""
    files = sorted(_files(images))
    if len(files) <= count:
        return files
    return [files[position * len(files) // count] for position in range(count)]


def _files(images: Path) -> Iterator[Path]:
    found = 0
    for folder, folders, names in os.walk(images):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path
                found += 1
        if found > MAX_FILES:
            return


def _writer(path: Path) -> str | None:
    """Who wrote a file, by its file meta information; "" where it says nothing, None where it is no DICOM
    file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meta = pydicom.filereader.read_file_meta_info(path)
            if "TransferSyntaxUID" not in meta:  # damaged: no image can be read from it
                return None
            return str(meta.get("ImplementationVersionName", "")).strip()
    except Exception:  # hostile or damaged files raise anything; their text may quote the header
        return None


def _patient(path: Path) -> tuple[str, str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
            return tuple(str(header.get(tag, "") or "") for tag in _TAGS)  # type: ignore[return-value]
    except Exception:
        return "", "", ""
