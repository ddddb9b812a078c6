"""Import NIfTI volumes: a BIDS data set, or a folder of files whose names, or whose sheet, say the rest.

Of BIDS: patient, session and suffix from the names, the acquisition from the JSON beside a file or above
it (the inheritance principle), site, sex and age from participants.tsv, labels from the scans.tsv of each
person. Of other folders: `--pattern`, or a sheet. Names such as IXI002-Guys-0828-T1.nii.gz are known.

A volume becomes slices in the plane in which it was acquired, rows and columns as radiologists look at them
(feet up axial, patient's left on the right). Orientation and position follow from the affine. The stored
integers of a volume share one scale; integers of 16 bits are kept as they are.

Reference: BIDS 1.10 (common principles; MRI), NIfTI-1 (qform, sform), DICOM PS3.3 C.7.6.2 (Image Plane).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from client.dicom.content import Content, not_anatomy
from client.dicom.dicom import MAX_DECODED_BYTES, MAX_SIDE
from client.dicom.sources import Source, find_files
from client.importing.collection import Account, Plane, Scan, Wanted, patient_id, site_name
from client.importing.extras import load_nibabel
from client.importing.sheet import TITLES, Entry, Files, Labelling, Sheet, read_sheet
from client.labels.spreadsheet import Found, read_grid
from client.views.acquisition import MIN_BODY, body_of
from common.artifacts import Modality
from common.errors import ConfigError, ImagingError
from common.progress_bar import Progress

PlaneName = Literal["acquired", "axial", "coronal", "sagittal"]
ENDINGS = (".nii", ".nii.gz")
ANATOMY: dict[str, Modality] = {
    **dict.fromkeys(("T1w", "T2w", "PDw", "T2starw", "FLAIR", "PDT2", "inplaneT1", "inplaneT2"), "MR"),
    "ct": "CT",
}
"""Suffixes of BIDS that are images of anatomy; not maps, masks, functional or diffusion series."""
OTHER_FOLDERS = frozenset({"derivatives", "sourcedata", "code", "stimuli", "phenotype"})
IXI = re.compile(r"(?P<patient>IXI\d+)-(?P<site>Guys|HH|IOP)-\d+-\w+\.nii")
MAX_JSON_BYTES = 4 << 20
ANISOTROPIC = 1.5
"""Voxels so many times as long as wide were acquired as slices across their length."""
AIR_HU = -200.0
"""CT holds something below this, if it is in HU."""
_NAME = re.compile(r"(sub-[A-Za-z0-9]+)((?:_[a-z]+-[A-Za-z0-9]+)*)_([A-Za-z0-9]+)\.nii(?:\.gz)?")
_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_AXES: dict[str, tuple[int, int, int]] = {  # of a volume in RAS order: across the slices, rows, columns
    "sagittal": (0, 2, 1),
    "coronal": (1, 2, 0),
    "axial": (2, 1, 0),
}
_TO_LPS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True, kw_only=True)
class _Volume:
    """A volume in RAS order, shape (x, y, z), and what its header says of it.

    Args:
        affine: to mm; None where the file does not say how it lies.
        zooms: sides of a voxel in mm.
        across: the axis across the slices, as stored (dim_info, else the file's third axis).
        phase: the axis along which phase was encoded; None where dim_info does not say.
        is_stated: whether dim_info names the axis across the slices.
    """

    values: np.ndarray
    affine: np.ndarray | None
    zooms: tuple[float, float, float]
    across: int = 2
    phase: int | None = None
    is_stated: bool = False


@dataclass(frozen=True, kw_only=True)
class _Name:
    """What the name of a BIDS file says."""

    patient: str
    entities: dict[str, str]
    suffix: str


def nifti(
    src: Path,
    labels: Path | None,
    labelling: Labelling,
    wanted: Wanted,
    progress: Progress,
    *,
    plane: PlaneName = "acquired",
    slices: int | None = None,
) -> tuple[list[Scan], Account]:
    """The volumes of a folder.

    Args:
        labels: a sheet instead of the scans.tsv of a BIDS data set.
        plane: of the slices.
        slices: at most so many of a volume, evenly over those that show enough of the body.
    Raises:
        ConfigError: `missing-extra`; `bad-argument`: patients or modality are not known.
        DataError: a sheet has a problem.
    """
    load_nibabel()
    account = Account()
    everything = {one.file: one for one in find_files(src)}
    is_bids = any(file.startswith("sub-") for file in everything)
    files = {
        file: one
        for file, one in everything.items()
        if file.lower().endswith(ENDINGS) and not (is_bids and PurePosixPath(file).parts[0] in OTHER_FOLDERS)
    }
    sheets = _Sheets(src, labels, labelling, everything if labels is None and is_bids else {}, files, account)
    people = _people(src / "participants.tsv") if is_bids else {}
    jsons = {file: one for file, one in everything.items() if file.endswith(".json") and not one.problem}
    scans: list[Scan] = []
    for done, (file, source) in enumerate(files.items(), start=1):
        progress("headers", done, len(files))
        name = _bids_name(file) if is_bids else None
        entry = sheets.entry(file)
        if entry is None:
            account.left_out["not-in-sheet"] += 1
            continue
        if is_bids and (name is None or name.suffix not in ANATOMY):
            account.left_out["other-suffix"] += 1
            continue
        if source.problem:
            account.refuse(file, source.problem)
            continue
        sidecar = _sidecar(file, name, jsons)
        modality = entry.modality or (ANATOMY[name.suffix] if name else None) or wanted.modality
        if modality is None:
            raise ConfigError(
                f"{src}: NIfTI does not say whether it is CT or MR",
                code="bad-argument",
                hint="--modality CT or --modality MR, or a column modality of the sheet",
            )
        if code := _excluded(name, modality, sidecar):
            account.left_out[code] += 1
            continue
        named = wanted.named(file) or _ixi(file)
        person = people.get(name.patient, {}) if name else {}
        who = wanted.who(file, entry.patient or (name.patient if name else ""), named)
        if not who:
            account.refuse(file, "no-patient")
            continue
        left_out: Counter[str] = Counter()
        scans.append(
            Scan(
                source=file,
                form="NIfTI",
                patient=patient_id(who, file),
                site=site_name(entry.site or person.get("site", "") or named.get("site", "") or wanted.site),
                modality=modality,
                study=name.entities.get("ses", "1") if name else "1",
                series=file,
                labels=tuple(entry.labels),
                facts=acquisition_facts(modality, sidecar, person) | entry.facts,
                about=entry.about,
                planes=partial(_planes, source, modality, sidecar, plane, slices, left_out),
                left_out=left_out,
            )
        )
    if not scans and {code for _, code in account.problems} == {"no-patient"}:
        raise ConfigError(
            f"{src}: nothing says whose the volumes are",
            code="bad-argument",
            hint="a BIDS data set, --pattern, --labels with a column patient, or --every-image-a-patient",
        )
    return scans, account


class _Sheets:
    """The one sheet of a folder, or the scans.tsv of each person of a BIDS data set."""

    def __init__(
        self,
        src: Path,
        labels: Path | None,
        labelling: Labelling,
        everything: Mapping[str, Source],
        files: Mapping[str, Source],
        account: Account,
    ) -> None:
        self._entries: dict[str, Entry] = {}
        self._only_listed = labels is not None
        known = Files(files, src.resolve().name)
        sheets: list[Sheet] = []
        if labels is not None:
            sheets.append(read_sheet(labels, known, labelling))
            for name in sheets[0].missing:
                account.refuse(name, "missing-file")
        else:
            for file, one in everything.items():
                if file.endswith("_scans.tsv") and file.startswith("sub-") and not one.problem:
                    folder = file.rpartition("/")[0] + "/"
                    sheets.append(read_sheet(one.path, known, labelling, folder=folder))
                    for name in sheets[-1].missing:  # BIDS lists the other types of data, too
                        if name.endswith(ENDINGS):
                            account.refuse(name, "missing-file")
        if labelling != Labelling() and not any(sheet.has_labels for sheet in sheets):
            raise ConfigError(
                f"{src}: no sheet has the label column",
                code="bad-argument",
                hint="--labels FILE, or --label-column TITLE of the scans.tsv",
            )
        for sheet in sheets:
            self._entries |= sheet.entries
        account.columns_not_used = sorted({title for sheet in sheets for title in sheet.columns_not_used})

    def entry(self, file: str) -> Entry | None:
        """What the sheets say of a file; None where a sheet lists the files to import, and not this one."""
        return self._entries.get(file) or (None if self._only_listed else Entry())


def acquisition_facts(
    modality: Modality, sidecar: Mapping[str, Any], person: Mapping[str, str]
) -> dict[str, Any]:
    """Arguments of `HeaderFacts` that a BIDS JSON and a row of participants.tsv give. BIDS states times in
    seconds, DICOM in milliseconds.
    """
    facts: dict[str, Any] = {
        "manufacturer": _text(sidecar, "Manufacturer"),
        "model": _text(sidecar, "ManufacturersModelName"),
        "description": _text(sidecar, "SeriesDescription") or _text(sidecar, "ProtocolName"),
    }
    elements: dict[str, Any] = {}
    if modality == "MR":
        facts |= {
            "field_strength_t": _number(sidecar, "MagneticFieldStrength"),
            "echo_time_ms": _number(sidecar, "EchoTime", 1000),
            "repetition_time_ms": _number(sidecar, "RepetitionTime", 1000),
            "pixel_bandwidth_hz": _number(sidecar, "PixelBandwidth"),
            "scanning_sequence": _codes(sidecar, "ScanningSequence"),
            "sequence_variant": _codes(sidecar, "SequenceVariant"),
        }
        for keyword, key, factor in (("FlipAngle", "FlipAngle", 1), ("InversionTime", "InversionTime", 1000)):
            if (value := _number(sidecar, key, factor)) is not None:
                elements[keyword] = f"{value:.10g}"
        if name := _text(sidecar, "SequenceName", 16):
            elements["SequenceName"] = name
        if (acquired := _text(sidecar, "MRAcquisitionType")) in {"2D", "3D"}:
            elements["MRAcquisitionType"] = acquired
    else:
        facts |= {"kvp": _number(sidecar, "KVP"), "kernel": _text(sidecar, "ConvolutionKernel", 16)}
    for keyword, key in (
        ("BodyPartExamined", "BodyPartExamined"),
        ("DeviceSerialNumber", "DeviceSerialNumber"),
    ):
        if text := _text(sidecar, key, 16 if key == "BodyPartExamined" else 64):
            elements[keyword] = text.upper() if key == "BodyPartExamined" else text
    if sex := {"m": "M", "male": "M", "f": "F", "female": "F"}.get(person.get("sex", "").lower()):
        elements["PatientSex"] = sex
    if re.fullmatch(r"\d{1,3}(\.\d+)?", age := person.get("age", "")):
        elements["PatientAge"] = f"{int(float(age)):03d}Y"
    return facts | {"elements": elements}


def _planes(
    source: Source,
    modality: Modality,
    sidecar: Mapping[str, Any],
    plane: PlaneName,
    slices: int | None,
    left_out: Counter[str],
) -> Iterator[Plane]:
    volume = _volume(source.path)
    values, affine, zooms = volume.values, volume.affine, volume.zooms
    if modality == "CT" and values.min() > AIR_HU:
        raise ImagingError(f"{source.path}: nothing as dark as air: not in HU", code="not-hounsfield")
    scale = _scale(values, modality)
    across, rows, columns = _axes(plane, sidecar, volume)
    stack = np.moveaxis(values, (across, rows, columns), (0, 1, 2))
    if affine is not None:
        stack = stack[:, ::-1, ::-1]
    kept = []
    for number in range(len(stack)):
        image = torch.from_numpy(np.ascontiguousarray(stack[number], np.float32))
        if float(body_of(image, modality).float().mean()) >= MIN_BODY:
            kept.append(number)
    left_out["too-little-body"] += len(stack) - len(kept)
    if slices is not None and len(kept) > slices:
        left_out["more-than-slices"] += len(kept) - slices
        kept = [kept[int((place + 0.5) * len(kept) / slices)] for place in range(slices)]
    is_acquired = across == _acquired(sidecar, affine)
    thickness = _number(sidecar, "SliceThickness") if is_acquired else None
    shared: dict[str, Any] = scale | {
        "pixel_spacing_mm": (zooms[rows], zooms[columns]) if min(zooms[rows], zooms[columns]) > 0 else None,
        "slice_thickness_mm": thickness or zooms[across] or None,
    }
    for number in kept:
        facts = dict(shared)
        if affine is not None:
            facts |= _geometry(affine, values.shape, (across, rows, columns), number)
            if modality == "MR":
                facts["phase_encoding"] = _phase_encoding(sidecar, facts["orientation"]) or {
                    rows: "COL",
                    columns: "ROW",
                }.get(-1 if volume.phase is None else volume.phase)
        yield Plane(image=np.ascontiguousarray(stack[number]), number=number + 1, facts=facts)


def _volume(path: Path) -> _Volume:
    """Read a volume.

    Raises:
        ImagingError: `unreadable`, `four-dimensional`, `colour`, `not-magnitude`, `too-large`, `non-finite`.
    """
    nibabel = load_nibabel()
    try:
        volume = nibabel.load(path)
        shape, kind = volume.shape, volume.get_data_dtype()
    except Exception as error:  # nibabel lets anything through that a damaged header provokes
        raise ImagingError(f"{path}: not a NIfTI file ({type(error).__name__})", code="unreadable") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        code = "four-dimensional" if len(shape) > 3 else "bad-geometry"
        raise ImagingError(f"{path}: {len(shape)} dimensions", code=code)
    if kind.fields is not None or kind.kind == "c":
        code = "not-magnitude" if kind.kind == "c" else "colour"
        raise ImagingError(f"{path}: values of type {kind}", code=code)
    if max(shape) > MAX_SIDE or min(shape) < 1 or math.prod(shape) * 8 > MAX_DECODED_BYTES:
        raise ImagingError(f"{path}: {' x '.join(map(str, shape))} voxels", code="too-large")
    try:
        codes = [int(volume.header[name]) for name in ("qform_code", "sform_code")]
        lies = any(codes)
        _, phase, across = volume.header.get_dim_info()
        order = [0, 1, 2]  # the axis of the RAS order that each stored axis becomes
        if lies:
            order = [int(axis) for axis in nibabel.io_orientation(volume.affine)[:, 0]]
            volume = nibabel.as_closest_canonical(volume)
        values = np.asarray(volume.dataobj).reshape(volume.shape[:3])
        factor = _MM.get(volume.header.get_xyzt_units()[0], 1.0)
        # stored with seven digits
        zooms = [float(f"{side * factor:.6g}") for side in volume.header.get_zooms()[:3]]
        affine = np.diag([factor, factor, factor, 1.0]) @ volume.affine
    except Exception as error:
        code = "truncated" if isinstance(error, (OSError, EOFError)) else "unreadable"
        raise ImagingError(f"{path}: cannot be read ({type(error).__name__})", code=code) from None
    if not np.isfinite(values).all():
        raise ImagingError(f"{path}: voxels that are not finite", code="non-finite")
    if not all(math.isfinite(side) and side >= 0 for side in zooms):
        raise ImagingError(f"{path}: voxels of no size", code="bad-geometry")
    directions = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-9)
    lies = lies and bool(np.allclose(directions.T @ directions, np.eye(3), atol=1e-2))  # no shear
    return _Volume(
        values=values,
        affine=affine if lies else None,
        zooms=(zooms[0], zooms[1], zooms[2]),
        across=order[2 if across is None else across],
        phase=None if phase is None else order[phase],
        is_stated=across is not None,
    )


def _scale(values: np.ndarray, modality: Modality) -> dict[str, Any]:
    """How the values of a volume are stored in 16 bits: as they are, where they are integers that fit."""
    low, high = float(values.min()), float(values.max())
    if modality == "CT":
        return {"signed": True, "slope": 1.0, "intercept": 0.0}
    integers = values.dtype.kind in "iub" or bool((values == np.rint(values)).all())
    if integers and high - min(low, 0) <= 65535:
        return {"signed": False, "slope": 1.0, "intercept": min(low, 0.0)}
    slope = float(f"{(high - low) / 65535 or 1.0:.9g}")
    return {"signed": False, "slope": slope, "intercept": float(f"{low:.9g}")}


def _axes(plane: PlaneName, sidecar: Mapping[str, Any], volume: _Volume) -> tuple[int, int, int]:
    """The axes of the volume across the slices, along the rows' order and along the columns' order.

    The plane in which a volume was acquired is that of the JSON, else of dim_info, else across the longest
    side of a voxel, else that of the file's first two axes.
    """
    if volume.affine is None:
        return (2, 1, 0)
    if plane != "acquired":
        return _AXES[plane]
    across = _acquired(sidecar, volume.affine)
    if across is None:
        zooms, across = volume.zooms, volume.across
        longest = int(np.argmax(zooms))
        others = [side for axis, side in enumerate(zooms) if axis != longest]
        if zooms[longest] >= ANISOTROPIC * max(others) and not volume.is_stated:
            across = longest
    return next(axes for axes in _AXES.values() if axes[0] == across)


def _acquired(sidecar: Mapping[str, Any], affine: np.ndarray | None) -> int | None:
    """The axis across the slices that the scanner reconstructed; None where the JSON does not say."""
    cosines = _orientation(sidecar)
    if cosines is None or affine is None:
        return None
    normal = _TO_LPS @ np.cross(cosines[:3], cosines[3:])
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return int(np.argmax(np.abs(normal @ directions)))


def _geometry(
    affine: np.ndarray, shape: tuple[int, ...], axes: tuple[int, int, int], number: int
) -> dict[str, Any]:
    """ImageOrientationPatient, ImagePositionPatient and the place along the normal of a slice."""
    across, rows, columns = axes
    first = np.zeros(4)
    first[[across, rows, columns]] = number, shape[rows] - 1, shape[columns] - 1
    first[3] = 1
    corner = _TO_LPS @ (affine @ first)[:3]
    along_row, along_column = (
        -_TO_LPS @ (affine[:3, axis] / np.linalg.norm(affine[:3, axis])) for axis in (columns, rows)
    )
    position = float(corner @ np.cross(along_row, along_column))
    orientation = tuple(round(float(value), 6) for value in (*along_row, *along_column))
    return {
        "orientation": orientation,
        "corner_mm": tuple(round(float(value), 4) for value in corner),
        "slice_position_mm": round(position, 4),
    }


def _phase_encoding(sidecar: Mapping[str, Any], orientation: tuple[float, ...] | None) -> str | None:
    """ROW or COL of the slice that is written, from the direction that the JSON states for the slice that was
    acquired; None where it lies across the slice.
    """
    cosines, stated = _orientation(sidecar), _text(sidecar, "InPlanePhaseEncodingDirectionDICOM").upper()
    if cosines is None or orientation is None or stated not in {"ROW", "COL"}:
        return None
    direction = cosines[:3] if stated == "ROW" else cosines[3:]
    along_row, along_column = (
        abs(float(direction @ np.array(part))) for part in (orientation[:3], orientation[3:])
    )
    if max(along_row, along_column) < 0.8:
        return None
    return "ROW" if along_row > along_column else "COL"


def _orientation(sidecar: Mapping[str, Any]) -> np.ndarray | None:
    stated = sidecar.get("ImageOrientationPatientDICOM")
    if not isinstance(stated, list) or len(stated) != 6:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in stated):
        return None
    return np.array(stated, dtype=np.float64)


def _bids_name(file: str) -> _Name | None:
    found = _NAME.fullmatch(file.rpartition("/")[2])
    if found is None:
        return None
    entities = dict(part.split("-", 1) for part in found[2].split("_") if part)
    return _Name(patient=found[1], entities=entities, suffix=found[3])


def _excluded(name: _Name | None, modality: Modality, sidecar: Mapping[str, Any]) -> str | None:
    """The code by which a volume is no image of anatomy, as DICOM images are judged."""
    if name is not None and name.entities.get("part", "mag") != "mag":
        return "not-magnitude"
    stated = sidecar.get("ImageType")
    if not isinstance(stated, list) or not all(isinstance(value, str) for value in stated):
        return None
    return not_anatomy(Content(modality=modality, image_type=tuple(value.upper() for value in stated)))


def _ixi(file: str) -> dict[str, str]:
    found = IXI.match(file.rpartition("/")[2])
    return found.groupdict() if found else {}


def _sidecar(file: str, name: _Name | None, jsons: Mapping[str, Source]) -> dict[str, Any]:
    """The JSON about a file: those above it first, each nearer one overriding them."""
    own = re.sub(r"\.nii(\.gz)?$", ".json", file)
    if name is None:
        return _json_of(jsons[own].path) if own in jsons else {}
    values: dict[str, Any] = {}
    folders = [*reversed(PurePosixPath(file).parents)]
    for folder in folders:
        for path in sorted(path for path in jsons if PurePosixPath(path).parent == folder):
            base = path.rpartition("/")[2].removesuffix(".json")
            *stated, suffix = base.split("_")
            if suffix != name.suffix:
                continue
            entities = dict(part.split("-", 1) for part in stated if "-" in part)
            mine = {**name.entities, "sub": name.patient.removeprefix("sub-")}
            if all(mine.get(key) == value for key, value in entities.items()):
                values |= _json_of(jsons[path].path)
    return values


def _json_of(path: Path) -> dict[str, Any]:
    """A JSON object; {} where it cannot be read: a volume can be used without it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _people(path: Path) -> dict[str, dict[str, str]]:
    """participants.tsv: site, sex and age of each participant_id."""
    if not path.is_file():
        return {}
    grid = read_grid(path, Found())
    header = [cell.lower() if isinstance(cell, str) else "" for cell in grid[0]] if grid else []
    if "participant_id" not in header:
        return {}
    sites = [place for place, title in enumerate(header) if title in TITLES["site"]]
    wanted = {"site": sites[0] if sites else -1} | {
        title: header.index(title) for title in ("sex", "age") if title in header
    }
    people = {}
    for line in grid[1:]:
        texts = [cell if isinstance(cell, str) and cell.lower() != "n/a" else "" for cell in line]
        texts += [""] * (len(header) - len(texts))
        of = {kind: texts[place] for kind, place in wanted.items() if place >= 0}
        people[texts[header.index("participant_id")]] = of
    return people


def _number(values: Mapping[str, Any], key: str, factor: float = 1) -> float | None:
    value = values.get(key)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        return None
    return float(f"{value * factor:.10g}")


def _text(values: Mapping[str, Any], key: str, longest: int = 64) -> str:
    value = values.get(key)
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return "".join(letter for letter in text if letter.isprintable() and letter != "\\").strip()[:longest]


def _codes(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A coded value, as JSON holds it: `GR\\IR`, `GR_IR` or a list."""
    value = values.get(key)
    texts = value if isinstance(value, list) else re.split(r"[\\_/]", value) if isinstance(value, str) else []
    return tuple(text for text in texts if isinstance(text, str) and re.fullmatch(r"[A-Z0-9 ]{1,16}", text))
