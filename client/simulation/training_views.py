"""Write a public site whose images are views of real people, to train public starting weights on
(`fedqc data inject --views`).

A view is one clean slice of a person in another look (client/simulation/domain_randomization.py), untouched
or with one or two simulated artifacts. Every source gives as many views, whether it holds one person or a
hundred, so that no collection outweighs the scanners that have few images (but of a slice `MAX_OF_SLICE` at
most); its people take turns. A file is named for its source. The views
of a person carry one PatientID, a pseudonym, so that a site's split keeps them together; slices of a source
without a PatientID are one person's. Nothing may be measured on such a site: its people are seen in many
views.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.dicom.dicom import SliceHeader
from client.simulation.domain_randomization import other_protocol, randomized
from client.simulation.injection import (
    Version,
    admit_simulated,
    label_columns,
    labelled,
    write_image,
    write_tables,
)
from client.simulation.people import Deal, Person, find_people
from client.simulation.real_slices import RealSlice, as_square, pixels_of, seed_of
from client.site.config import nominal_bucket
from client.site.made import write_site_yaml
from client.views.acquisition import MIN_BODY, acquisition_of, body_of
from client.views.corruption import DRAWS, MIN_CHANGED, ORDER, Corrupted, changed_share, simulated
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError, DataError, ImagingError
from common.files import whole_folder
from common.physics import SIMULATORS, choose, record
from common.physics.acquisition import uniform
from common.physics.threads import one_thread
from common.progress_bar import Progress

NAME = "people"
"""Of the site."""
MAX_VIEWS, MAX_OF_SLICE = 20_000, 100
"""Of a source, and of one of its slices."""
STAND_IN = "images are views of a few public people, to train on, not to measure on"
UNTOUCHED, TWO = 0.28, 0.12
"""Shares of views without artifact, and with two."""
SEVERITY = (0.05, 1.0)
CLEAN_LABELS = ("no_artifact", "unlabelled", "no_motion_reference")
FULL_CHANGE_AT = 0.75
"""An artifact of this severity must change as much of the slice as `MIN_CHANGED` says; a weaker one less, in
proportion."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One slice in another look, with what was added."""

    clean: np.ndarray  # float32 (S, S), HU or magnitude
    image: np.ndarray  # the same with artifacts
    mask: np.ndarray  # bool (S, S), where they changed it
    spacing_mm: float
    header: SliceHeader  # of the slice, with the protocol of the look
    seed: int
    severities: dict[str, float]
    simulators: dict[str, str]
    params: dict[str, dict[str, Any]]
    changed: dict[str, float]


@one_thread()
def view_of(
    clean: RealSlice,
    seed: int,
    severity: tuple[float, float] = SEVERITY,
    artifacts: Collection[str] = DEFAULT_LABELS,
) -> View:
    """The view of a clean slice that follows from `seed`.

    An artifact that changes too little in `DRAWS` draws is left out.

    Args:
        artifacts: of which some are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    look, modality = int(torch.randint(2**31 - 1, (), generator=generator)), clean.modality
    before, spacing = randomized(torch.from_numpy(clean.image), modality, clean.spacing_mm, look, artifacts)
    acquisition = other_protocol(acquisition_of(before, clean.header, spacing), modality, look)
    names = simulated(modality, artifacts)
    order = [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
    coin = uniform(generator, 0, 1)
    wanted = order[: 0 if coin < UNTOUCHED else 2 if coin >= 1 - TWO else 1]
    image, mask = before, torch.zeros(before.shape, dtype=torch.bool)
    severities, simulators, params, changed = {}, {}, {}, {}
    for name in (name for name in ORDER if name in wanted):
        body = body_of(image, modality)
        for _ in range(DRAWS):
            drawn_severity = round(uniform(generator, *severity), 2)
            shown_by = choose(name, generator)
            drawn = SIMULATORS[shown_by].draw(drawn_severity, generator, acquisition)
            after, where = SIMULATORS[shown_by].apply(image, drawn)
            share = changed_share(image, after, where & body, modality)
            least = MIN_CHANGED[name] * min(1.0, drawn_severity / FULL_CHANGE_AT)
            if share >= least and bool(torch.isfinite(after).all()):
                image, mask = after, mask | where
                severities[name], simulators[name] = drawn_severity, shown_by
                params[name], changed[name] = record(drawn), share
                break
    header = clean.header
    if modality == "MR":
        header = replace(header, phase_encoding=acquisition.phase_encoding)
    return View(
        clean=before.numpy(),
        image=image.numpy(),
        mask=mask.numpy(),
        spacing_mm=spacing,
        header=header,
        seed=seed,
        severities=severities,
        simulators=simulators,
        params=params,
        changed=changed,
    )


def inject_views(
    sources: Sequence[Path],
    out: Path,
    views: int,
    *,
    seed: int,
    severities: Sequence[float] = (),
    artifacts: Sequence[str] = (),
    labels: Path | None = None,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Make the site folder `out`/people with up to `views` views of every source.

    The same arguments give the same files.

    Args:
        sources: folders, archives or files of clean images, each of one collection or scanner.
        severities: one, or the lowest and the highest; default .05 to 1.
        artifacts: those that are simulated; `DEFAULT_LABELS`, if empty.
        labels: CSV with the columns file (relative to the CSV's folder) and label: slices that it labels
            other than `CLEAN_LABELS` are left out.
    Returns:
        Counts for programs: of each source people, slices and views; slices skipped, by reason.
    Raises:
        ConfigError: an argument is wrong, or `out` exists.
        DataError: a source has no usable image, or `labels` cannot be read.
    """
    if not 1 <= views <= MAX_VIEWS:
        raise ConfigError(
            f"--views {views}: must be 1 to {MAX_VIEWS}", code="bad-argument", hint="for example --views 1000"
        )
    if len(severities) > 2 or any(not 0 < one <= 1 for one in severities):
        raise ConfigError(
            f"--severity {' '.join(f'{one:g}' for one in severities)}: expected one or two values above 0, "
            "at most 1",
            code="bad-argument",
            hint="the lowest and the highest: --severity 0.1 --severity 0.9",
        )
    admit_simulated(artifacts)
    shown_ones, columns = artifacts or DEFAULT_LABELS, labelled(artifacts)
    span = (min(severities), max(severities)) if severities else SEVERITY
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{out}: lies in a folder of images", code="bad-argument", hint="OUT, anywhere else"
            )
    marked = {} if labels is None else marked_files(labels)
    deal = Deal(sites=1, seed=seed)
    skipped: Counter[str] = Counter()
    rows: list[list[str]] = []
    lines: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    people: set[str] = set()
    read: list[list[tuple[Person, list[RealSlice]]]] = []
    for number, source in enumerate(sources, start=1):
        persons, left_out = find_people(
            [source], deal, say=say, progress=progress, unnamed=f"source {number}"
        )
        skipped.update(left_out)
        pairs = [(person, list(clean_slices(person, marked, skipped))) for person in persons]
        read.append([(person, usable) for person, usable in pairs if usable])
        if not read[-1]:
            raise DataError(
                f"{source}: no slice can be used", code="no-usable-images", hint="clean slices of people"
            )
    slices = [sum(len(usable) for _, usable in own) for own in read]
    counts = [min(views, MAX_OF_SLICE * one) for one in slices]
    done = 0
    with whole_folder(out) as staging:
        folder = staging / NAME
        (folder / "images").mkdir(parents=True)
        for number, (source, own) in enumerate(zip(sources, read, strict=True), start=1):
            shown: Counter[str] = Counter()
            name = re.sub(r"[^A-Za-z0-9_]+", "-", source.stem)
            for turn in range(counts[number - 1]):
                person, usable = own[turn % len(own)]
                # the slices of a person in turn, too
                clean = usable[turn // len(own) % len(usable)]
                view = view_of(clean, seed_of(seed, "view", number, turn), span, shown_ones)
                file = f"{number:02d}-{name}-{turn + 1:05d}.dcm"
                version = _version(view)
                write_image(
                    folder / "images" / file, version, 0, patient=person.name, identity=f"view {seed}/{file}"
                )
                rows.append([file, *version.labels(person.modality, columns)])
                lines.append(version.line(0, file=file, patient=person.name, mirrored=False))
                shown.update(list(view.severities) or ["untouched"])
                done += 1
                progress("simulating artifacts", done, sum(counts))
            people.update(person.name for person, _ in own)
            summary = {"people": len(own), "slices": slices[number - 1], "views": counts[number - 1]}
            found.append(summary | {"shown": {what: shown[what] for what in sorted(shown)}})
            say(
                f"source {number}: {summary['people']} people, {summary['slices']} slices, "
                f"{summary['views']} views; " + ", ".join(f"{shown[what]} {what}" for what in sorted(shown))
            )
        write_tables(folder, label_columns(columns), rows, lines)
        write_site_yaml(
            folder,
            {
                "name": NAME,
                "kind": "public",
                "cohort": f"views-{seed}",
                "nominal_patients": nominal_bucket(len(people)),
                "stand_in": STAND_IN,
            },
            key=hashlib.sha256(f"inject views site key {seed}".encode()).digest(),
        )
    if skipped:
        say("slices skipped: " + ", ".join(f"{count} × {code}" for code, count in sorted(skipped.items())))
    return {"sources": found, "skipped": dict(sorted(skipped.items()))}


def marked_files(labels: Path) -> dict[Path, str]:
    """The files that a CSV labels other than `CLEAN_LABELS`, and how.

    Raises:
        DataError: it cannot be read, or has not the columns file and label (codes `labels-missing`,
            `bad-label`).
    """
    try:
        with labels.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"--labels {labels}: cannot be read ({type(error).__name__})",
            code="labels-missing",
            hint="a CSV file with the columns file and label",
        ) from None
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(
            f"--labels {labels}: expected the columns file and label",
            code="bad-label",
            hint="file is relative to the folder of the CSV file",
        )
    root = labels.parent.resolve()
    return {
        root / row["file"]: row["label"] for row in rows if row["label"] and row["label"] not in CLEAN_LABELS
    }


def clean_slices(person: Person, marked: Mapping[Path, str], skipped: Counter[str]) -> Iterator[RealSlice]:
    """The slices of a person that show enough of the body and that nobody marked; others are counted."""
    for place in person.places:
        if place.source.path.resolve() in marked:
            skipped["marked"] += 1
            continue
        try:
            pixels = pixels_of(place)
        except ImagingError as error:
            skipped[error.code] += 1
            continue
        image, spacing = as_square(pixels, place.header)
        if float(body_of(torch.from_numpy(image), person.modality).float().mean()) < MIN_BODY:
            skipped["too-little-body"] += 1
        else:
            yield RealSlice(name=person.name, header=place.header, image=image, spacing_mm=spacing)


def _version(view: View) -> Version:
    return Version(
        clean=[view.clean],
        made=Corrupted(
            images=[view.image],
            masks=[view.mask],
            simulators=view.simulators,
            params=[view.params],
            changed=view.changed,
        ),
        headers=[view.header],
        spacings_mm=[view.spacing_mm],
        seed=view.seed,
        severities=view.severities,
    )
