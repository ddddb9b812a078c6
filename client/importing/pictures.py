"""Import a folder of PNG or JPEG with a sheet: the form in which publications share single slices.

A picture has no header. What its sheet does not say of patient, spacing or acquisition stays unknown. MR is
taken as it is, its unit being arbitrary. CT needs the window that the picture was made with, as Hounsfield
units decide what a CT slice shows; what the window clipped stays clipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client.dicom.dicom import MAX_SIDE
from client.dicom.sources import Source, find_files
from client.importing.collection import Account, Plane, Scan, Wanted, patient_id, site_name
from client.importing.sheet import Entry, Files, Labelling, Sheet, read_sheet
from common.artifacts import Modality
from common.errors import ConfigError, DataError, ImagingError

ENDINGS = (".png", ".jpg", ".jpeg")
CHROMA = 2
"""JPEG stores a grey picture with three channels to within this many levels."""
JPEG_METHOD = "ISO_10918_1"


@dataclass(frozen=True, kw_only=True)
class Window:
    """What 0 and the largest value of a picture mean in HU: `center` ∓ `width` / 2 (PS3.3 C.11.2.1.2)."""

    center: float
    width: float


def window_of(values: tuple[float, float] | None) -> Window | None:
    """The --window of the command.

    Raises:
        ConfigError: `bad-argument`.
    """
    if values is None:
        return None
    center, width = values
    if not (1 <= width <= 65535 and abs(center) <= 32768):
        raise ConfigError(
            f"--window {center:g} {width:g}: expected the center and the width in HU",
            code="bad-argument",
            hint="as the picture was made, for example --window 40 400",
        )
    return Window(center=center, width=width)


def pictures(
    src: Path, labels: Path | None, labelling: Labelling, window: Window | None, wanted: Wanted
) -> tuple[list[Scan], Account]:
    """The pictures of a folder; of one with a sheet, those that the sheet names.

    Raises:
        ConfigError: `bad-argument`: the modality is not given, or the patients.
        DataError: the sheet has a problem; `not-hounsfield`: CT without a window.
    """
    account = Account()
    files = {one.file: one for one in find_files(src) if one.file.lower().endswith(ENDINGS)}
    sheet = _sheet_of(src, labels, labelling, files, account)
    scans: list[Scan] = []
    order: dict[tuple[str, str], int] = {}
    for name, source in sorted(files.items(), key=lambda item: natural(item[0])):
        if sheet is not None and name not in sheet.entries:
            account.left_out["not-in-sheet"] += 1
            continue
        if source.problem:
            account.refuse(name, source.problem)
            continue
        entry = sheet.entries[name] if sheet is not None else Entry()
        modality = _modality_of(entry, wanted, window, src)
        named = wanted.named(name)
        who = wanted.who(name, entry.patient, named)
        if not who:
            account.refuse(name, "no-patient")
            continue
        patient = patient_id(who, name)
        site = site_name(entry.site or named.get("site", "") or wanted.site)
        number = order[site, patient] = order.get((site, patient), 0) + 1
        scans.append(
            Scan(
                source=name,
                form="picture",
                patient=patient,
                site=site,
                modality=modality,
                study="1",
                series=modality,
                labels=tuple(entry.labels),
                facts={"instance_number": number, **entry.facts},
                about=entry.about,
                planes=partial(_planes, source, window if modality == "CT" else None),
            )
        )
    if not scans and {code for _, code in account.problems} == {"no-patient"}:
        raise ConfigError(
            f"{src}: nothing says whose the pictures are",
            code="bad-argument",
            hint="a column patient of the sheet, --pattern, or --every-image-a-patient",
        )
    return scans, account


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _sheet_of(
    src: Path, labels: Path | None, labelling: Labelling, files: dict[str, Source], account: Account
) -> Sheet | None:
    if labels is None:
        if labelling != Labelling():
            raise ConfigError(
                "--label without --labels", code="bad-argument", hint="--labels FILE = the CSV or .xlsx sheet"
            )
        return None
    sheet = read_sheet(labels, Files(files, src.resolve().name), labelling)
    account.columns_not_used = list(sheet.columns_not_used)
    for name in sheet.missing:
        account.refuse(name, "missing-file")
    return sheet


def _modality_of(entry: Entry, wanted: Wanted, window: Window | None, src: Path) -> Modality:
    modality = entry.modality or wanted.modality
    if modality is None:
        raise ConfigError(
            f"{src}: a picture does not say whether it is CT or MR",
            code="bad-argument",
            hint="--modality CT or --modality MR, or a column modality of the sheet",
        )
    if modality == "CT" and window is None:
        raise DataError(
            f"{src}: CT as pictures, and nothing says what their values are in Hounsfield units",
            code="not-hounsfield",
            hint="--window CENTER WIDTH, as the pictures were made; without it they cannot be used",
        )
    return modality


def _planes(source: Source, window: Window | None) -> Iterator[Plane]:
    values, full, form = read_picture(source.path)
    bits = {255: 8, 65535: 16}[full]
    facts: dict[str, Any] = {"bits_stored": bits, "signed": False, "imported_from": form}
    if form == "JPEG":  # by its content: the name may say otherwise
        facts["lossy_method"] = JPEG_METHOD
    if window is not None:
        # the stored integers are those of the picture
        facts["slope"] = float(f"{window.width / full:.10g}")
        facts["intercept"] = float(f"{window.center - window.width / 2:.10g}")
    image = values.astype(np.float64) * facts.get("slope", 1.0) + facts.get("intercept", 0.0)
    yield Plane(image=image, facts=facts)


def read_picture(path: Path) -> tuple[np.ndarray, int, str]:
    """A grey picture as integers, shape (rows, columns), turned as its EXIF orientation says; the largest
    value that its depth holds, 255 or 65535; and its format, PNG or JPEG.

    Raises:
        ImagingError: `unreadable`, `truncated`, `too-large`; `colour`: its channels differ, or a part of it
            is transparent; `bad-geometry`: black and white only, or animated.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ImagingError(f"{path}: above {MAX_SIDE} pixels a side", code="too-large")
            if getattr(picture, "n_frames", 1) != 1 or picture.mode == "1":
                raise ImagingError(f"{path}: animated, or without shades of grey", code="bad-geometry")
            form = str(picture.format)
            turned = ImageOps.exif_transpose(picture)
            turned.load()
            if turned.mode.startswith("I"):
                values = np.asarray(turned).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ImagingError(f"{path}: more than 16 bits", code="bad-geometry")
                return values.astype(np.uint16), 65535, form
            if turned.mode == "L":
                return np.asarray(turned).astype(np.uint16), 255, form
            tolerance = CHROMA if form == "JPEG" else 0
            return _grey(np.asarray(turned.convert("RGBA")), tolerance, path), 255, form
    except ImagingError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        code = "truncated" if "truncat" in str(error).lower() else "unreadable"
        raise ImagingError(f"{path}: cannot be read ({type(error).__name__})", code=code) from None


def _grey(rgba: np.ndarray, tolerance: int, path: Path) -> np.ndarray:
    """One channel of a picture whose colours are all grey. Args: rgba: uint8 (rows, columns, 4)."""
    colours = rgba[..., :3].astype(np.int16)
    if np.ptp(colours, axis=2).max() > tolerance or rgba[..., 3].min() < 255:
        raise ImagingError(f"{path}: in colour, or partly transparent", code="colour")
    return np.rint(colours.mean(axis=2)).astype(np.uint16)
