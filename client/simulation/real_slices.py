"""Select real slices of a folder and simulate artifacts on them (`fedqc data inject --gallery`, `--blind`).

A slice is known here by its modality and a number ("CT slice 2"). Its file and header stay in this process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.dicom.dicom import SliceHeader, exclusion, read_headers, read_slices
from client.dicom.sources import Source, expand_archives, find_files, open_source
from client.views.acquisition import MIN_BODY, acquisition_of, body_of, is_spin_echo, pulse_sequence
from common.artifacts import MODALITIES, Modality
from common.errors import ConfigError, DataError, ImagingError
from common.physics import SIMULATORS, record
from common.physics.threads import one_thread
from common.preprocess import CT_RANGE_HU, clip_ct, pad_to_square, resample
from common.progress_bar import Progress

MAX_SIDE = 256
MAX_FILES = 3000  # of a larger folder every n-th file is looked at
DEFAULT_SEVERITIES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class RealSlice:
    """One real slice as a square of at most `MAX_SIDE` pixels, HU or magnitude."""

    name: str  # "CT slice 1"
    header: SliceHeader
    image: np.ndarray
    spacing_mm: float

    @property
    def modality(self) -> Modality:
        return self.header.modality


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A clean slice, the same slice with artifacts, and where and why they differ."""

    name: str  # of the slice
    modality: Modality
    severities: dict[str, float]  # of each simulator, in the order in which they were applied
    params: dict[str, dict[str, Any]]  # as `record` writes them
    changed: float  # share of the body
    seed: int
    clean: np.ndarray
    corrupted: np.ndarray
    mask: np.ndarray  # bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a slice lies. The order along the body is that of `place`."""

    source: Source
    header: SliceHeader

    @property
    def order(self) -> tuple[float, int, str, int]:
        header = self.header
        return (header.slice_position_mm or 0.0, header.instance_number or 0, self.source.file, header.frame)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The usable slices of a folder, unread, and what happened to the rest."""

    places: Mapping[Modality, tuple[Place, ...]]
    files: int
    skipped: dict[str, int]

    def slices(self, modality: Modality) -> Iterator[RealSlice]:
        """Its slices one after the other, well apart from the start: series in turn, of each the middle
        first, then the quarters.
        """
        number = 0
        for place in _spread(self.places.get(modality, ())):
            try:
                image = pixels_of(place)
            except ImagingError:
                continue
            small, spacing = as_square(image, place.header)
            if float(body_of(torch.from_numpy(small), modality).float().mean()) >= MIN_BODY:
                number += 1
                yield RealSlice(
                    name=f"{modality} slice {number}", header=place.header, image=small, spacing_mm=spacing
                )


def find_slices(src: Path, *, max_files: int | None = MAX_FILES, progress: Progress | None = None) -> Stack:
    """The slices of a folder, an archive or a file that intake would use, by their headers alone.

    Slices to which fedqc itself added artifacts are left out: on them nothing would be clean.

    Args:
        max_files: of a larger folder every n-th file is read; None reads all.
        progress: called after each file, as stage `headers`.
    Raises:
        ConfigError: `no-such-folder`.
        DataError: `no-usable-images`.
    """
    if not src.exists():
        raise ConfigError(
            f"{src}: no such file or folder",
            code="no-such-folder",
            hint="SRC = a folder, a zip archive or a file of DICOM images",
        )
    files = find_files(src) if src.is_dir() else find_files(src.absolute().parent, only=src.name)
    sources = expand_archives(files)
    skipped: Counter[str] = Counter()
    places: dict[Modality, list[Place]] = {modality: [] for modality in MODALITIES}
    step = 1 if max_files is None else max(1, -(-len(sources) // max_files))
    for number, source in enumerate(sources[::step], start=1):
        if progress is not None:
            progress("headers", number, len(sources[::step]))
        try:
            with open_source(source) as (stream, size):
                headers = read_headers(stream, size)
        except ImagingError as error:
            skipped[error.code] += 1
            continue
        codes = Counter(code for header in headers if (code := _unfit(header)))
        skipped += codes
        for header in headers:
            if not _unfit(header):
                places[header.modality].append(Place(source=source, header=header))
    if not any(places.values()):
        why = ", ".join(f"{count} × {code}" for code, count in sorted(skipped.items())) or "no file"
        raise DataError(
            f"{src}: no usable CT or MR slice ({why})",
            code="no-usable-images",
            hint="fedqc explain CODE explains each code",
        )
    return Stack(
        places={name: tuple(found) for name, found in places.items()},
        files=len(sources),
        skipped=dict(sorted(skipped.items())),
    )


def _unfit(header: SliceHeader) -> str | None:
    made = header.image_type[:1] == ("DERIVED",) and not header.imported
    return exclusion(header) or ("derived" if made else None)


def pixels_of(place: Place) -> np.ndarray:
    """The slice, shape (rows, columns), in HU or as magnitude. Raises: ImagingError: it cannot be decoded."""
    with open_source(place.source) as (stream, size):
        return next(image for _, image in read_slices(stream, size, [place.header.frame]))


def _spread(places: Sequence[Place]) -> Iterator[Place]:
    series: dict[str, list[Place]] = {}
    for place in places:
        series.setdefault(place.header.series_uid or place.source.file.rpartition("/")[0], []).append(place)
    stacks = [
        [ordered[at] for at in halving(len(ordered))]
        for ordered in (sorted(one, key=lambda place: place.order) for one in series.values())
    ]
    turns = [stacks[at] for at in halving(len(stacks))]
    for number in range(max(map(len, turns), default=0)):
        yield from (stack[number] for stack in turns if number < len(stack))


def halving(count: int) -> list[int]:
    """0 … count - 1 with the middle first, then the middles of both halves, and so on."""
    found, spans = [], [(0, count)]
    for low, high in spans:  # grows while it is walked
        if low < high:
            middle = (low + high) // 2
            found.append(middle)
            spans += [(low, middle), (middle + 1, high)]
    return found


def as_square(image: np.ndarray, header: SliceHeader) -> tuple[np.ndarray, float]:
    """A slice in physical units as a square of at most `MAX_SIDE` pixels, and its pixel spacing in mm."""
    if header.modality == "CT":
        image = clip_ct(image)
    square = pad_to_square(image, fill=CT_RANGE_HU[0] if header.modality == "CT" else float(image.min()))
    size = min(square.shape[0], MAX_SIDE)
    return np.ascontiguousarray(resample(square, size)), (header.pixel_spacing_mm or (1.0, 1.0))[
        0
    ] * square.shape[0] / size


def scanning_sequence(header: SliceHeader) -> tuple[str, ...]:
    """ScanningSequence (0018,0020) for a slice that is written anew: as in the source, and what
    `acquisition_of` concluded from its description, which is not copied.
    """
    kind = {"EPI": "EP", "GRE": "GR", "SE": "SE"}[pulse_sequence(header)]
    concluded = [kind] if kind != "SE" or not header.scanning_sequence else []
    if is_spin_echo(header):
        concluded.append("SE")
    return tuple(dict.fromkeys((*header.scanning_sequence, *concluded)))


def seed_of(*words: object) -> int:
    """A seed that follows from the words; exact also where a JSON reader has only doubles."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:6], "little")


@one_thread()
def simulate(clean: RealSlice, name: str, severity: float, seed: int) -> Simulated:
    """One simulator on one slice; severity 0 gives the slice back."""
    image, simulator = torch.from_numpy(clean.image), SIMULATORS[name]
    acquisition = acquisition_of(image, clean.header, clean.spacing_mm)
    params = simulator.draw(severity, torch.Generator().manual_seed(seed), acquisition)
    corrupted, mask = simulator.apply(image, params)
    body = body_of(image, clean.modality)
    return Simulated(
        name=clean.name,
        modality=clean.modality,
        severities={name: severity},
        params={name: record(params)},
        changed=float((mask & body).sum()) / max(1, int(body.sum())),
        seed=seed,
        clean=clean.image,
        corrupted=corrupted.numpy(),
        mask=mask.numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be shown: which simulators at which severities, on how many slices of each modality."""

    artifacts: tuple[str, ...]  # names of `SIMULATORS`
    severities: tuple[float, ...]
    slices: int
    seed: int

    def of(self, modality: Modality) -> list[str]:
        return [name for name in self.artifacts if SIMULATORS[name].modality == modality]


def wish(artifacts: Sequence[str], severities: Sequence[float], *, slices: int, seed: int) -> Wish:
    """What was asked for, checked; without names every simulator, without severities `DEFAULT_SEVERITIES`.

    Raises:
        ConfigError: `unknown-artifact`, `bad-argument`.
    """
    for name in artifacts:
        if name not in SIMULATORS:
            raise ConfigError(
                f"--artifact {name!r}: no simulator of that name",
                code="unknown-artifact",
                hint=f"known: {', '.join(SIMULATORS)}",
            )
    for severity in severities:
        if not 0 < severity <= 1:
            raise ConfigError(
                f"--severity {severity:g}: expected above 0, at most 1",
                code="bad-argument",
                hint="for example --severity 0.5",
            )
    return Wish(
        artifacts=tuple(name for name in SIMULATORS if not artifacts or name in artifacts),
        severities=tuple(sorted(set(severities))) or DEFAULT_SEVERITIES,
        slices=slices,
        seed=seed,
    )


def chosen_slices(
    src: Path, wanted: Wish, say: Callable[[str], None]
) -> tuple[dict[Modality, list[RealSlice]], dict[Modality, Iterator[RealSlice]]]:
    """The slices to simulate on, by modality, and those that come after them.

    Raises:
        ConfigError, DataError: as `find_slices`; `no-usable-images` also where no slice is of a modality that
            was asked for.
    """
    stack = find_slices(src)
    chosen: dict[Modality, list[RealSlice]] = {}
    more: dict[Modality, Iterator[RealSlice]] = {}
    for modality in MODALITIES:
        if wanted.of(modality):
            more[modality] = stack.slices(modality)
            own = list(islice(more[modality], wanted.slices))
            if own:
                chosen[modality] = own
    if not chosen:
        needed = " or ".join(modality for modality in MODALITIES if wanted.of(modality))
        raise DataError(
            f"{src}: no {needed} slice with enough of a body in it",
            code="no-usable-images",
            hint="--artifact chooses simulators of the other modality",
        )
    slices = ", ".join(f"{len(own)} {modality}" for modality, own in chosen.items())
    skipped = ", ".join(f"{count} × {code}" for code, count in stack.skipped.items())
    say(f"{stack.files} files; slices: {slices}" + (f"; skipped: {skipped}" if skipped else ""))
    return chosen, more
