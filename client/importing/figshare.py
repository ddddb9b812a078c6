"""Import the brain tumor set of Cheng et al.: one MATLAB file (version 7.3, which is HDF5) a slice.

    cjdata/image         int16, columns first as MATLAB stores it
    cjdata/PID           the patient, one character code a cell
    cjdata/label         1 meningioma, 2 glioma, 3 pituitary tumor
    cjdata/tumorBorder, tumorMask

No artifact is labelled. What the collection's README says of all images is written into their headers: T1
weighted after Gd-DTPA, 0.49 mm pixels of a 512 × 512 matrix, slices of 6 mm. Hospital, scanner and plane of a
slice are unpublished.

Reference: Cheng, figshare, doi 10.6084/m9.figshare.1512427; Cheng et al., PLoS ONE 10(10) e0140381 (2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client.dicom.dicom import MAX_SIDE
from client.dicom.sources import find_files
from client.importing.collection import Account, Plane, Scan, Wanted, patient_id, site_name
from client.importing.extras import load_h5py
from client.importing.sheet import Files, Labelling, Sheet, read_sheet
from common.errors import ImagingError
from common.progress_bar import Progress

TUMOURS = {1: "meningioma", 2: "glioma", 3: "pituitary tumor"}
SPACING_MM, MATRIX, SLICE_THICKNESS_MM = 0.49, (512, 512), 6.0
MAX_PID = 64


def figshare(
    src: Path, labels: Path | None, labelling: Labelling, wanted: Wanted, progress: Progress
) -> tuple[list[Scan], Account]:
    """The `.mat` files of a folder. Other files, such as cvind.mat, are counted as `no-cjdata`.

    Raises:
        ConfigError: `missing-extra`.
        DataError: the sheet has a problem.
    """
    load_h5py()
    account = Account()
    files = {one.file: one for one in find_files(src) if one.file.lower().endswith(".mat")}
    sheet: Sheet | None = None
    if labels is not None:
        sheet = read_sheet(labels, Files(files, src.resolve().name), labelling)
        account.columns_not_used = list(sheet.columns_not_used)
        for name in sheet.missing:
            account.refuse(name, "missing-file")
    scans: list[Scan] = []
    order: dict[str, int] = {}
    for done, (name, source) in enumerate(files.items(), start=1):
        progress("headers", done, len(files))
        if source.problem:
            account.refuse(name, source.problem)
            continue
        try:
            pid, label = _about(source.path)
        except ImagingError as error:
            if error.code == "no-cjdata":
                account.left_out[error.code] += 1
            else:
                account.refuse(name, error.code)
            continue
        entry = None if sheet is None else sheet.entries.get(name)
        patient = patient_id(pid, name)
        order[patient] = order.get(patient, 0) + 1
        scans.append(
            Scan(
                source=name,
                form="MATLAB",
                patient=patient,
                site=site_name((entry.site if entry else "") or wanted.site),
                modality="MR",
                study="1",
                series="1",
                labels=tuple(entry.labels) if entry else (),
                facts={
                    "instance_number": order[patient],
                    "slice_thickness_mm": SLICE_THICKNESS_MM,
                    "description": "T1 contrast-enhanced",
                    "elements": {"BodyPartExamined": "BRAIN", "ContrastBolusAgent": "Gd-DTPA"},
                },
                about={"tumour": TUMOURS[label]} if label in TUMOURS else {},
                planes=partial(_planes, source.path),
            )
        )
    return scans, account


def _about(path: Path) -> tuple[str, int]:
    """Patient and tumour of a file.

    Raises:
        ImagingError: `no-cjdata`, `unreadable`.
    """
    with _opened(path) as file:
        group = _group(file, path)
        codes = np.asarray(_member(group, "PID", path, limit=MAX_PID)).ravel()
        label = np.asarray(_member(group, "label", path, limit=1)).ravel()
        if codes.dtype.kind not in "ui" or not label.size:
            raise ImagingError(f"{path}: PID or label is not what the collection has", code="unreadable")
        return "".join(map(chr, codes.tolist())), int(label[0])


def _planes(path: Path) -> Iterator[Plane]:
    with _opened(path) as file:
        stored = np.asarray(_member(_group(file, path), "image", path, limit=MAX_SIDE**2))
    if stored.ndim != 2 or max(stored.shape) > MAX_SIDE or stored.dtype.kind not in "iuf":
        raise ImagingError(f"{path}: the image is not of two dimensions", code="bad-geometry")
    image = stored.T.astype(np.float64)
    if not np.isfinite(image).all():
        raise ImagingError(f"{path}: values that are not finite", code="non-finite")
    facts: dict[str, Any] = {"pixel_spacing_mm": SPACING_MM} if image.shape == MATRIX else {}
    yield Plane(image=image, facts=facts)


class _opened:
    """An HDF5 file, opened for reading; whatever is wrong with it is an ImagingError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        h5py = load_h5py()
        try:
            self._file = h5py.File(self._path, "r")
        except OSError:
            code = "unreadable" if h5py.is_hdf5(self._path) else "no-cjdata"
            raise ImagingError(f"{self._path}: not a MATLAB file of version 7.3", code=code) from None
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._file.close()
        if isinstance(error, (OSError, RuntimeError, ValueError, TypeError, KeyError)):
            raise ImagingError(f"{self._path}: damaged ({type(error).__name__})", code="unreadable") from None


def _group(file: Any, path: Path) -> Any:
    h5py = load_h5py()
    if not isinstance(file.get("cjdata", getlink=True), h5py.HardLink) or not isinstance(
        file["cjdata"], h5py.Group
    ):
        raise ImagingError(f"{path}: no structure cjdata", code="no-cjdata")
    return file["cjdata"]


def _member(group: Any, name: str, path: Path, *, limit: int) -> Any:
    """A field of the structure, if it lies in this very file and is not too large."""
    h5py = load_h5py()
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ImagingError(f"{path}: cjdata has no {name}", code="unreadable")
    field = group[name]
    if not isinstance(field, h5py.Dataset) or field.external or field.is_virtual:
        raise ImagingError(f"{path}: {name} lies in another file", code="unreadable")
    if field.size > limit:
        raise ImagingError(f"{path}: {name} is too large", code="too-large")
    return field[()]
