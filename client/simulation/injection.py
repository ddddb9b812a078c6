"""Write site folders of real clean slices and the same slices with simulated artifacts (`fedqc data inject`).

A map (configs/real_hospitals.yaml) says which folders of public images make up which hospital. With one
volunteer a folder, a "patient" is a stand-in: a block of neighbouring slice positions, in one version
(clean, or with one artifact, or with several). Blocks are disjoint with a gap of unused positions; all
versions of a block, and all images of one position, are in one part. A block holds one person; of a folder
of several people, all blocks of a person are in one part. Versions of a block and blocks of a person
resemble one another: figures from such a site show that the path works, not how well. `people.py` writes
one version a person instead.

Clean versions run through the same code with severity zero. An artifact that changes too little of the body
is drawn again, and after `DRAWS` attempts the version is left out, so that no label says more than the image
shows.

`injected.jsonl` of a hospital has a line for each file: what was drawn for it, enough to make it again from
the same real slice.
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from client.dicom.dicom import SliceHeader, exclusion, read_header, read_pixels
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.sources import find_files
from client.simulation.gallery import Shown, refuse_place, write_page, write_sheet
from client.simulation.gallery_text import gallery_speaker
from client.simulation.real_slices import Simulated, as_square, scanning_sequence
from client.site.config import nominal_bucket
from client.site.made import write_site_yaml
from client.views.acquisition import acquisition_of, body_of
from client.views.corruption import DRAWS, ORDER, Corrupted, corrupt, shows, simulated
from common.artifacts import DEFAULT_LABELS, NAMES, Modality, can_occur
from common.errors import ConfigError, DataError, ImagingError
from common.files import whole_folder
from common.names import SITE_NAME
from common.physics.acquisition import uniform
from common.strict import StrictModel, describe_all, describe_yaml, read_yaml

POSITION_STEP_MM = 0.1  # images closer than this along the slice normal show the same position
STAND_IN = (
    "one volunteer a scanner: 'patients' are disjoint slice blocks of the same person, each in several "
    "versions with simulated artifacts;"
    " versions of a block are not independent, so intervals are too narrow"
)
STAND_IN_SEVERAL = (
    "'patients' are slice blocks of one person each, each in several versions with simulated artifacts;"
    " blocks and versions of a person are not independent, so intervals are too narrow"
)
MANIFEST = "injected.jsonl"


def labelled(simulated_ones: Collection[str]) -> list[str]:
    """The artifacts that a label sheet has columns of: `DEFAULT_LABELS`, and others that were simulated."""
    return [name for name in NAMES if name in DEFAULT_LABELS or name in simulated_ones]


def admit_simulated(artifacts: Sequence[str]) -> None:
    """Raises ConfigError (code `unknown-artifact`): one of them is not simulated."""
    for name in artifacts:
        if name not in ORDER:
            raise ConfigError(
                f"--artifact {name!r}: no artifact of that name",
                code="unknown-artifact",
                hint=f"with --per-person and --views: {', '.join(ORDER)}",
            )


def label_columns(artifacts: Sequence[str]) -> list[str]:
    """The columns of labels.csv."""
    return ["file", *artifacts, *(f"{artifact}_severity" for artifact in artifacts)]


# a path below SRC
_Below = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*([./]?[A-Za-z0-9_-]+)*$", max_length=200)]


class Versions(StrictModel):
    """How often each block is written. Every version is a stand-in patient."""

    clean: int = Field(default=2, ge=1, le=8)
    each: int = Field(default=2, ge=1, le=8)  # with one artifact, for every artifact of the modality
    together: int = Field(default=1, ge=0, le=8)  # with two artifacts


class Severity(StrictModel):
    low: float = Field(default=0.6, gt=0, le=1)
    high: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> Severity:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} must be at most high = {self.high}")
        return self


class Folder(StrictModel):
    """One scanner's images of one volunteer."""

    folder: _Below
    accept: list[str] = Field(min_length=1)  # label values, as the label file writes them
    exclude: dict[str, str] = Field(default_factory=dict)  # file name → why
    # artifact that is not simulated here → why; the label is then "absent"
    without: dict[str, str] = Field(default_factory=dict)
    looked_at: str = ""  # what a person saw; needed where images without a label are accepted
    slices: int | None = Field(default=None, ge=1)  # instead of the map's
    gap: int | None = Field(default=None, ge=1)
    part: Literal["train", "test"] | None = None  # all blocks; otherwise both parts

    @model_validator(mode="after")
    def _looked_at(self) -> Folder:
        if "unlabelled" in self.accept and not self.looked_at:
            raise ValueError("'accept' includes 'unlabelled', so 'looked_at' must describe what a person saw")
        unknown = set(self.without) - set(NAMES)
        if unknown:
            raise ValueError(f"without: unknown artifact {sorted(unknown)[0]!r}, known: {', '.join(NAMES)}")
        return self


class HospitalMap(StrictModel):
    """configs/real_hospitals.yaml."""

    labels: _Below  # CSV below SRC with the columns file and label
    slices: int = Field(default=2, ge=1)  # positions in a block, which is to say slices of a stand-in patient
    gap: int = Field(default=1, ge=1)  # unused positions between two blocks
    test_share: float = Field(default=0.4, gt=0, lt=1)
    versions: Versions = Versions()
    severity: Severity = Severity()
    artifacts: list[str] = Field(default_factory=lambda: list(DEFAULT_LABELS), min_length=1)  # simulated
    hospitals: dict[Annotated[str, Field(pattern=SITE_NAME)], list[Folder]] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_simulated(self) -> HospitalMap:
        for name in self.artifacts:
            if name not in ORDER:
                raise ValueError(f"artifacts: {name!r} is not simulated, known: {', '.join(ORDER)}")
        return self

    @model_validator(mode="after")
    def _each_folder_once(self) -> HospitalMap:
        named = Counter(one.folder for folders in self.hospitals.values() for one in folders)
        twice = sorted(folder for folder, times in named.items() if times > 1)
        if twice:
            raise ValueError(
                f"folder {twice[0]} is named twice: the same volunteer would train and be tested"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class RealImage:
    """One real image. Its name and header stay in this process; only pixels, geometry and the maker go on."""

    path: Path
    header: SliceHeader


@dataclass(frozen=True, kw_only=True)
class Block:
    number: int
    part: str
    positions: tuple[tuple[RealImage, ...], ...]  # images of each position, e.g. several diffusion weightings


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The usable images of a folder by patient and position, and what happened to the rest."""

    patients: tuple[tuple[tuple[RealImage, ...], ...], ...]
    modality: Modality
    found: int
    skipped: dict[str, int]

    @property
    def positions(self) -> tuple[tuple[RealImage, ...], ...]:
        return tuple(position for patient in self.patients for position in patient)


@dataclass(kw_only=True)
class _Written:
    """What was made of one folder: counts for the terminal, lines of the manifest, slices for the gallery."""

    lines: list[dict[str, Any]]
    shown: list[Shown]
    patients: Counter[str] = field(default_factory=Counter)
    slices: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def inject(
    src: Path,
    out: Path,
    *,
    map_file: Path,
    seed: int,
    say: Callable[[str], None],
    gallery: Path | None = None,
    language: str = "en",
) -> None:
    """Make one site folder a hospital of the map below `out`. The same arguments give the same files.

    Args:
        src: folder of the real images; nothing in it is changed.
        gallery: also write the clean slices and their corrupted versions: a page in `language` (.html), or a
            contact sheet (.png).
    Raises:
        ConfigError: the map is wrong or names what is not there, or `out` exists.
        DataError: the label file cannot be used, or a folder holds no usable image.
    """
    gallery_speaker(language)
    wanted = read_map(map_file)
    if not src.is_dir():
        raise ConfigError(
            f"{src}: no such folder",
            code="no-such-folder",
            hint="SRC = the folder that holds the folders named in the map",
        )
    if gallery is not None:
        refuse_place(gallery, src, "--gallery FILE")
    labels = read_source_labels(src / wanted.labels)
    taken = {one.folder: take(src, one, labels) for folders in wanted.hospitals.values() for one in folders}
    shown: list[Shown] = []
    with whole_folder(out) as staging:
        for name, folders in wanted.hospitals.items():
            _write_hospital(staging / name, name, folders, taken, wanted, seed=seed, say=say, shown=shown)
    say("a patient here is a stand-in: " + STAND_IN)
    if gallery is not None and gallery.suffix.lower() == ".png":
        write_sheet(gallery, shown)
    elif gallery is not None:
        write_page(gallery, [one.simulated for one in shown], seed=seed, language=language, lead="lead.map")


def read_map(path: Path) -> HospitalMap:
    """Read the map of hospitals.

    Raises:
        ConfigError: it cannot be read, or a field is unknown, missing or out of range; all of them are named.
    """
    hint = "configs/real_hospitals.yaml is one"
    try:
        value = read_yaml(path)
    except OSError as error:
        raise ConfigError(
            f"--map {path}: cannot be read ({error.strerror})", code="no-such-map", hint=hint
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {describe_yaml(error)}", code="bad-map", hint=hint) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected fields such as 'labels: labels.csv'", code="bad-map", hint=hint)
    try:
        return HospitalMap.model_validate(value)
    except ValidationError as error:
        hint = f"fields: {', '.join(HospitalMap.model_fields)}; of a folder: {', '.join(Folder.model_fields)}"
        raise ConfigError(f"{path}: {describe_all(error)}", code="bad-map", hint=hint) from None


def read_source_labels(path: Path) -> dict[str, str]:
    """The label of each file of SRC, by its path relative to SRC."""
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = type(error).__name__
        raise DataError(
            f"{path}: cannot read the labels ({reason})",
            code="labels-missing",
            hint="'labels' of the map, below SRC",
        ) from None
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(
            f"{path}: expected the columns file and label", code="bad-label", hint="see the README beside it"
        )
    return {row["file"]: row["label"] or "" for row in rows}


def take(src: Path, wanted: Folder, labels: dict[str, str]) -> Taken:
    """The accepted, readable images of one folder, ordered along the body.

    Raises:
        ConfigError: the folder, or a file that the map excludes, is not there.
        DataError: no image is left, or CT and MR are mixed.
    """
    root = src / wanted.folder
    if not root.is_dir():
        raise ConfigError(
            f"{root}: folder named in the map does not exist",
            code="no-such-folder",
            hint="correct 'folder' in the map",
        )
    files = [found.path for found in find_files(root) if not found.problem]
    missing = set(wanted.exclude) - {path.name for path in files}
    if missing:
        raise ConfigError(
            f"{root}: excluded file {sorted(missing)[0]!r} does not exist",
            code="bad-map",
            hint="correct 'exclude'",
        )
    skipped: Counter[str] = Counter()
    sources = []
    for path in files:
        if path.name in wanted.exclude:
            skipped["excluded-by-map"] += 1
            continue
        try:
            header = read_header(path)
        except ImagingError as error:
            skipped[error.code] += 1
            continue
        label = labels.get(path.relative_to(src).as_posix(), "no-label")
        code = exclusion(header) or (None if label in wanted.accept else f"label-{label}")
        if code is None:
            sources.append(RealImage(path=path, header=header))
        else:
            skipped[code] += 1
    modalities = sorted({source.header.modality for source in sources})
    if len(modalities) != 1:
        found = " and ".join(modalities) or "no usable image"
        raise DataError(
            f"{root}: {found}; expected images of one modality",
            code="no-usable-images",
            hint="see 'accept' in the map",
        )
    return Taken(
        patients=_by_patient(sources),
        modality=modalities[0],
        found=len(files),
        skipped=dict(sorted(skipped.items())),
    )


def _by_patient(sources: Sequence[RealImage]) -> tuple[tuple[tuple[RealImage, ...], ...], ...]:
    """The positions of each patient. Images without a PatientID are taken for one patient."""
    patients: dict[str, list[RealImage]] = {}
    for source in sources:
        patients.setdefault(patient_name(source.header) or "", []).append(source)
    return tuple(_by_position(patients[name]) for name in sorted(patients))


def patient_name(header: SliceHeader) -> str | None:
    """PatientID as it is compared: without regard to width (NFKC), case and surrounding space; None without
    one.
    """
    kind, _, raw = header.patient_key.partition(":")
    if kind != "PatientID":
        return None
    with suppress(UnicodeError):  # another character set is compared byte by byte
        raw = raw.encode("latin-1").decode("utf-8")
    return unicodedata.normalize("NFKC", raw).strip().casefold() or None


def _by_position(sources: Sequence[RealImage]) -> tuple[tuple[RealImage, ...], ...]:
    """Images grouped by position along the body; by instance number where a header gives no position."""
    located = all(source.header.slice_position_mm is not None for source in sources)

    def place(source: RealImage) -> int:
        header = source.header
        return (
            round((header.slice_position_mm or 0.0) / POSITION_STEP_MM)
            if located
            else (header.instance_number or 0)
        )

    ordered = sorted(
        sources, key=lambda source: (place(source), source.header.instance_number or 0, source.path.name)
    )
    return tuple(tuple(group) for _, group in groupby(ordered, key=place))


def cut(
    positions: Sequence[tuple[RealImage, ...]], *, slices: int, gap: int, part: str | None, test_share: float
) -> list[Block]:
    """Disjoint blocks with a gap between them, centred on the body, and their parts.

    The parts do not depend on the seed: the list of test blocks is fixed. Test blocks are spread along the
    body. One block alone trains.
    """
    count = max(1, (len(positions) + gap) // (slices + gap))
    first = max(0, len(positions) - count * slices - (count - 1) * gap) // 2
    in_test = _in_test(count, test_share)
    blocks = []
    for number in range(count):
        start = first + number * (slices + gap)
        where = part or ("test" if number in in_test else "train")
        blocks.append(
            Block(number=number + 1, part=where, positions=tuple(positions[start : start + slices]))
        )
    return blocks


def _in_test(count: int, test_share: float) -> set[int]:
    tests = 0 if count == 1 else min(count - 1, max(1, round(test_share * count)))
    return {int((number + 0.5) * count / tests) for number in range(tests)}


def blocks_of(source: Taken, *, slices: int, gap: int, part: str | None, test_share: float) -> list[Block]:
    """The blocks of a folder. A block holds one patient; of several patients, all blocks of one are in one
    part.
    """
    if len(source.patients) == 1:
        return cut(source.patients[0], slices=slices, gap=gap, part=part, test_share=test_share)
    in_test = _in_test(len(source.patients), test_share)
    blocks: list[Block] = []
    for number, positions in enumerate(source.patients):
        where = part or ("test" if number in in_test else "train")
        for block in cut(positions, slices=slices, gap=gap, part=where, test_share=test_share):
            blocks.append(replace(block, number=len(blocks) + 1))
    return blocks


def versions_of(
    modality: Modality,
    wanted: Versions,
    without: Collection[str] = (),
    artifacts: Collection[str] = DEFAULT_LABELS,
) -> list[tuple[str, ...]]:
    """The artifacts of each version; none for a clean one."""
    names = [name for name in simulated(modality, artifacts) if name not in without]
    twos = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    return [
        *[()] * wanted.clean,
        *[(name,) for name in names for _ in range(wanted.each)],
        *[pair for pair in twos for _ in range(wanted.together)],
    ]


def load(source: RealImage, *, mirrored: bool) -> tuple[np.ndarray, float]:
    """A real slice as a square of at most `MAX_SIDE` pixels, HU or magnitude, and its pixel spacing in mm."""
    small, spacing = as_square(read_pixels(source.path), source.header)
    return np.ascontiguousarray(small[:, ::-1] if mirrored else small), spacing


def _write_hospital(
    folder: Path,
    name: str,
    folders: Sequence[Folder],
    taken: dict[str, Taken],
    wanted: HospitalMap,
    *,
    seed: int,
    say: Callable[[str], None],
    shown: list[Shown],
) -> None:
    """One site folder: images, labels.csv, injected.jsonl, site.yaml and a site key."""
    (folder / "images").mkdir(parents=True)
    rows: list[list[str]] = []
    lines: list[dict[str, Any]] = []
    training_blocks, several = 0, 0
    for number, one in enumerate(folders, start=1):
        source = taken[one.folder]
        slices, gap = one.slices or wanted.slices, one.gap or wanted.gap
        blocks = blocks_of(source, slices=slices, gap=gap, part=one.part, test_share=wanted.test_share)
        several += len(source.patients) > 1
        training_blocks += sum(block.part == "train" for block in blocks)
        written = _Written(lines=lines, shown=shown)
        for block in blocks:
            identity = f"{seed}/{name}/{one.folder}/{block.number}"
            versions = versions_of(source.modality, wanted.versions, one.without, wanted.artifacts)
            tag = f"{name.upper()}-{source.modality}{number}-B{block.number:02d}"
            rows += _write_block(
                folder / "images",
                tag,
                identity,
                block,
                source.modality,
                versions,
                wanted.severity,
                labelled(wanted.artifacts),
                written,
            )
        counted = Counter(block.part for block in blocks)
        say(
            f"{name}: {one.folder}: {source.found - sum(source.skipped.values())} of {source.found} files,"
            f" {len(source.positions)} positions, blocks: {counted['train']} train, {counted['test']} test;"
            f" {sum(written.patients.values())} stand-in patients, {written.slices} slices"
            + _listing("skipped", source.skipped)
            + _listing("left out, too little changed", dict(sorted(written.dropped.items())))
        )
        if len(source.patients) > 1:
            say(
                f"warning: {one.folder} holds {len(source.patients)} patients; a block holds one of them, but"
                " every version is a patient of its own, with its own ε; --per-person writes one version a"
                " person"
            )
    write_tables(folder, [*label_columns(labelled(wanted.artifacts)), "part"], rows, lines)
    write_site_yaml(
        folder,
        {
            "name": name,
            "kind": "public",
            "cohort": f"real-{name}-{seed}",
            "nominal_patients": nominal_bucket(training_blocks),
            "stand_in": STAND_IN_SEVERAL if several else STAND_IN,
        },
        key=hashlib.sha256(f"inject key {name} {seed}".encode()).digest(),
    )


def write_tables(
    folder: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[dict[str, Any]]
) -> None:
    """labels.csv and injected.jsonl of a site folder."""
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _listing(what: str, counts: dict[str, int]) -> str:
    return f"; {what}: " + ", ".join(f"{count} × {code}" for code, count in counts.items()) if counts else ""


def _write_block(
    images: Path,
    tag: str,
    identity: str,
    block: Block,
    modality: Modality,
    versions: Sequence[tuple[str, ...]],
    severity: Severity,
    artifacts: Sequence[str],
    written: _Written,
) -> Iterator[list[str]]:
    """Write the versions of a block; gives their rows of labels.csv. The rest goes to `written`."""
    seen: set[tuple[str, ...]] = set()
    for number, shown in enumerate(versions, start=1):
        mirrored = number % 2 == 0
        made = _make_version(
            f"{identity}/{number}", block, modality, shown, artifacts, severity, mirrored=mirrored
        )
        if made is None:
            written.dropped["+".join(shown)] += 1
            continue
        patient = f"{tag}-V{number:02d}"
        written.patients[block.part] += 1
        written.slices += len(made.clean)
        for position in range(len(made.clean)):
            file = f"{patient.lower()}-{position + 1}.dcm"
            write_image(images / file, made, position, patient=patient, identity=f"{identity}/{number}")
            written.lines.append(made.line(position, file=file, patient=patient, mirrored=mirrored))
            yield [file, *made.labels(modality, artifacts), block.part]
        if shown and shown not in seen:
            seen.add(shown)
            row = f"{tag} {block.part}"
            written.shown.append(Shown(row=row, title=made.title, simulated=shown_of(row, modality, made)))


def shown_of(name: str, modality: Modality, version: Version) -> Simulated:
    """The first slice of a version, for the gallery."""
    made = version.made
    body = body_of(torch.from_numpy(version.clean[0]), modality).numpy()
    return Simulated(
        name=name,
        modality=modality,
        severities={artifact: version.severities[artifact] for artifact in made.params[0]},
        params=made.params[0],
        changed=float(made.masks[0][body].mean()) if body.any() else 0.0,
        seed=version.seed,
        clean=version.clean[0],
        corrupted=made.images[0],
        mask=made.masks[0],
    )


@dataclass(frozen=True, kw_only=True)
class Version:
    """Clean slices of one patient and what was made of them."""

    clean: list[np.ndarray]
    made: Corrupted
    headers: list[SliceHeader]
    spacings_mm: list[float]
    seed: int
    severities: dict[str, float]

    @property
    def title(self) -> str:
        return (
            " + ".join(
                f"{name} {severity:.2f} ({self.made.changed[name]:.0%})"
                for name, severity in self.severities.items()
            )
            or "clean"
        )

    def labels(self, modality: Modality, artifacts: Sequence[str] = DEFAULT_LABELS) -> list[str]:
        """Present or absent for each of `artifacts` that occurs in the modality, then severities, as
        labels.csv.
        """
        return [
            *(str(int(name in self.severities)) if can_occur(name, modality) else "" for name in artifacts),
            *(f"{self.severities[name]:.2f}" if name in self.severities else "" for name in artifacts),
        ]

    def line(self, number: int, *, file: str, patient: str, mirrored: bool) -> dict[str, Any]:
        """The line of the manifest for one of its slices."""
        return {
            "file": file,
            "patient": patient,
            "mirrored": mirrored,
            "seed": self.seed,
            "artifacts": {
                name: {
                    "severity": self.severities[name],
                    "simulator": self.made.simulators[name],
                    "params": params,
                }
                for name, params in self.made.params[number].items()
            },
        }


def _make_version(
    identity: str,
    block: Block,
    modality: Modality,
    shown: tuple[str, ...],
    artifacts: Sequence[str],
    severity: Severity,
    *,
    mirrored: bool,
) -> Version | None:
    """One version of a block, or None if the artifacts change too little in `DRAWS` draws.

    Every second version is mirrored, clean or not, so that two clean versions are not the same file twice; of
    several images of a position (diffusion weightings) each version takes one kind, drawn.
    """
    seed = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    kind = uniform(generator, 0, 1)
    sources = [images[int(kind * len(images))] for images in block.positions]
    loaded = [load(source, mirrored=mirrored) for source in sources]
    clean = [image for image, _ in loaded]
    headers, spacing = [source.header for source in sources], loaded[0][1]
    acquisition = acquisition_of(torch.from_numpy(clean[0]), headers[0], spacing)
    for _ in range(DRAWS):
        severities = {name: round(uniform(generator, severity.low, severity.high), 2) for name in shown}
        made = corrupt(
            clean, modality, severities, [acquisition] * len(clean), generator, artifacts=artifacts
        )
        if shows(made, shown):
            return Version(
                clean=clean,
                made=made,
                headers=headers,
                spacings_mm=[spacing] * len(clean),
                seed=seed,
                severities=severities,
            )
    return None


def write_image(
    path: Path, version: Version, number: int, *, patient: str, identity: str, series: str = ""
) -> None:
    """Write slice `number` of a version as DICOM with nothing of the original but pixels, geometry, the
    maker's name and how the slice was taken.

    Args:
        patient: the PatientID written.
        identity: of the study; UIDs follow from it.
        series: tells series of the study apart.
    """
    first, header = version.headers[0], version.headers[number]
    image = version.made.images[number]
    is_ct = header.modality == "CT"
    write_slice(
        path,
        image,
        HeaderFacts(
            modality=header.modality,
            pixel_spacing_mm=version.spacings_mm[number],
            patient_id=patient,
            study_uid=make_uid(f"{identity}/study".encode()),
            series_uid=make_uid(f"{identity}/series{series}".encode()),
            sop_uid=make_uid(f"{identity}/{number}".encode()),
            instance_number=number + 1,
            slice_position_mm=round((header.slice_position_mm or 0.0) - (first.slice_position_mm or 0.0), 3),
            slice_thickness_mm=header.slice_thickness_mm or 1.0,
            manufacturer=header.manufacturer,
            model="",
            intercept=-1024.0 if is_ct else 0.0,
            signed=False,
            phase_encoding=None if is_ct else header.phase_encoding,
            field_strength_t=None if is_ct else header.field_strength_t,
            kvp=header.kvp if is_ct else None,
            kernel=header.kernel if is_ct else "",
            scanning_sequence=scanning_sequence(header),
            sequence_variant=header.sequence_variant or ("NONE",),
            echo_time_ms=header.echo_time_ms,
            repetition_time_ms=header.repetition_time_ms,
            pixel_bandwidth_hz=header.pixel_bandwidth_hz,
            description="real slice, artifacts simulated",
            derived=True,
        ),
    )
