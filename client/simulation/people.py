"""Write site folders of real people, one version each: clean, or with one simulated artifact
(`fedqc data inject --per-person`).

A patient of such a site is a person: the PatientID written is a keyed pseudonym of the original one, the
same in all slices. Site, version and severity follow from that pseudonym alone, so they stay when people are
added, and nobody is at two sites. The split into train and test is left to the site, which splits by
patient.

All slices of a person show one draw of the artifact at one severity, placed relative to the body in each
slice; motion differs from slice to slice, because slices are acquired one after the other. If the artifact
changes too little of any slice in `DRAWS` draws, the person gets the next artifact in a drawn order, at last
a clean version.

The key follows from the seed: who knows the seed and a PatientID can compute the pseudonym. Keep the seed of
images that are not public.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.dicom.dicom import SliceHeader
from client.dicom.index import pseudonym
from client.simulation.gallery import Shown, refuse_place, write_page, write_sheet
from client.simulation.gallery_text import gallery_speaker
from client.simulation.injection import (
    Severity,
    Version,
    admit_simulated,
    label_columns,
    labelled,
    patient_name,
    shown_of,
    write_image,
    write_tables,
)
from client.simulation.real_slices import Place, as_square, find_slices, halving, pixels_of, seed_of
from client.site.config import nominal_bucket
from client.site.made import write_site_yaml
from client.views.acquisition import MIN_BODY, acquisition_of, body_of
from client.views.corruption import DRAWS, corrupt, shows, simulated
from common.artifacts import DEFAULT_LABELS, MODALITIES, Modality
from common.errors import ConfigError, DataError, ImagingError
from common.files import whole_folder
from common.physics.acquisition import uniform
from common.progress_bar import Progress

CLEAN = "clean"
MAX_SITES = 26
STAND_IN = "every patient is one person, in one version: clean, or with one simulated artifact"
ROW = 6  # people in a row of the contact sheet
MAX_SHOWN = 24  # people of each version of a site in a gallery


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How people are dealt: to how many sites, and to which versions.

    Attributes:
        artifacts: those that are simulated; `DEFAULT_LABELS`, if empty.
        clean_share: of the people; None: as many as show each artifact.
        slices: at most so many of a person, spread along the body; None: all.
    """

    sites: int
    seed: int
    artifacts: tuple[str, ...] = ()
    clean_share: float | None = None
    severity: Severity = field(default_factory=Severity)
    slices: int | None = None

    @property
    def key(self) -> bytes:
        """Of the pseudonyms."""
        return hashlib.sha256(f"inject person key {self.seed}".encode()).digest()

    def of(self, modality: Modality) -> list[str]:
        return simulated(modality, self.artifacts or DEFAULT_LABELS)

    @property
    def labelled(self) -> list[str]:
        """The artifacts that the label sheets have columns of."""
        return labelled(self.artifacts)

    def site_of(self, person: str) -> int:
        return seed_of(self.seed, "site", person) % self.sites

    def versions_for(self, person: str, modality: Modality) -> list[str]:
        """The version drawn for a person, then those that replace it; `CLEAN` is always among them."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "version", person))
        names = self.of(modality)
        share = 1 / (len(names) + 1) if self.clean_share is None else self.clean_share
        clean = uniform(generator, 0, 1) < share
        order = [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
        return [CLEAN] if clean else [*order, CLEAN]


def deal_of(
    *,
    sites: int,
    seed: int,
    artifacts: Sequence[str] = (),
    severities: Sequence[float] = (),
    clean_share: float | None = None,
    slices: int | None = None,
) -> Deal:
    """The options of the command, checked.

    Args:
        severities: one, or the lowest and the highest; both above 0, at most 1. Default: 0.6 to 1.
    Raises:
        ConfigError: `bad-argument`, `unknown-artifact`.
    """
    if not 1 <= sites <= MAX_SITES:
        raise ConfigError(
            f"--sites {sites}: must be 1 to {MAX_SITES}", code="bad-argument", hint="for example --sites 3"
        )
    admit_simulated(artifacts)
    if clean_share is not None and not 0 <= clean_share <= 1:
        raise ConfigError(
            f"--clean-share {clean_share:g}: must be 0 to 1",
            code="bad-argument",
            hint="for example --clean-share 0.5",
        )
    if len(severities) > 2 or any(not 0 < severity <= 1 for severity in severities):
        listed = " ".join(f"{severity:g}" for severity in severities)
        raise ConfigError(
            f"--severity {listed}: expected one or two values above 0, at most 1",
            code="bad-argument",
            hint="the lowest and the highest: --severity 0.5 --severity 0.9",
        )
    severity = Severity(low=min(severities), high=max(severities)) if severities else Severity()
    return Deal(
        sites=sites,
        seed=seed,
        artifacts=tuple(artifacts),
        clean_share=clean_share,
        severity=severity,
        slices=slices,
    )


@dataclass(frozen=True, kw_only=True)
class Person:
    """The slices of one person, of one modality, unread and in order along the body."""

    name: str  # the pseudonym
    modality: Modality
    places: tuple[Place, ...]


@dataclass(kw_only=True)
class SiteSummary:
    """What was written of a site: counts only."""

    name: str
    people: int = 0
    slices: int = 0
    versions: Counter[str] = field(default_factory=Counter)

    def public(self) -> dict[str, Any]:
        return {
            "site": self.name,
            "people": self.people,
            "slices": self.slices,
            "versions": dict(sorted(self.versions.items())),
        }


@dataclass(kw_only=True)
class _Counts:
    """Slices that are not used, by reason, and people who got another version than the one drawn."""

    skipped: Counter[str]
    replaced: Counter[str] = field(default_factory=Counter)


def inject_people(
    sources: Sequence[Path],
    out: Path,
    deal: Deal,
    *,
    say: Callable[[str], None],
    progress: Progress,
    gallery: Path | None = None,
    language: str = "en",
) -> dict[str, Any]:
    """Make `deal.sites` site folders below `out`. The same arguments give the same files.

    Args:
        sources: folders, archives or files of clean images. One PatientID in several of them is one person.
        gallery: also write a page in `language` (.html) or a contact sheet (.png).
    Returns:
        Counts for programs: sites with people, slices and versions; slices skipped, by reason.
    Raises:
        ConfigError: an argument is wrong, or `out` exists.
        DataError: no usable image has a PatientID.
    """
    gallery_speaker(language)
    for source in sources:
        if gallery is not None:
            refuse_place(gallery, source, "--gallery FILE")
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(
                f"{out}: lies in a folder of images", code="bad-argument", hint="OUT, anywhere else"
            )
    people, skipped = find_people(sources, deal, say=say, progress=progress)
    counts = _Counts(skipped=skipped)
    by_site: list[list[Person]] = [[] for _ in range(deal.sites)]
    for person in people:
        by_site[deal.site_of(person.name)].append(person)
    if not all(by_site):
        raise ConfigError(
            f"--sites {deal.sites}: a site would have no patient ({len(people)} people in all)",
            code="bad-argument",
            hint="fewer sites, more people or another --seed",
        )
    sites: list[SiteSummary] = []
    shown: list[Shown] = []
    done = 0
    with whole_folder(out) as staging:
        for number, own in enumerate(by_site):
            summary = SiteSummary(name=f"hospital-{chr(ord('a') + number)}")
            rows: list[list[str]] = []
            lines: list[dict[str, Any]] = []
            folder = staging / summary.name
            (folder / "images").mkdir(parents=True)
            for person in own:
                version = _version_of(person, deal, counts)
                done += 1
                progress("simulating artifacts", done, len(people))
                if version is None:
                    continue
                _write_person(folder / "images", person, version, summary, deal.labelled, rows, lines)
                if gallery is not None:
                    _show(shown, summary, person, version, everyone=gallery.suffix.lower() == ".png")
            if not summary.people:
                raise DataError(
                    f"{summary.name}: no slice of its people can be used",
                    code="no-usable-images",
                    hint="fewer sites, more people or another --seed",
                )
            write_tables(folder, label_columns(deal.labelled), rows, lines)
            _write_site(folder, summary, deal.seed)
            sites.append(summary)
    _report(sites, counts, say)
    if gallery is not None and gallery.suffix.lower() == ".png":
        write_sheet(gallery, sorted(shown, key=lambda one: one.row))
    elif gallery is not None:
        write_page(
            gallery, [one.simulated for one in shown], seed=deal.seed, language=language, lead="lead.map"
        )
    return {
        "sites": [site.public() for site in sites],
        "skipped": dict(sorted(counts.skipped.items())),
        "replaced": dict(sorted(counts.replaced.items())),
    }


def find_people(
    sources: Sequence[Path],
    deal: Deal,
    *,
    say: Callable[[str], None],
    progress: Progress,
    unnamed: str | None = None,
) -> tuple[list[Person], Counter[str]]:
    """The people of some folders, ordered by pseudonym, and the slices that are not used, by reason.

    Of a person with CT and MR the modality with more slices is taken.
    Args:
        unnamed: whose slices those without a PatientID are; None: they are not used.
    Raises:
        ConfigError: `no-such-folder`; `bad-argument`: no person can show the artifacts asked for.
        DataError: `no-usable-images`.
    """
    skipped: Counter[str] = Counter()
    places: dict[str, dict[Modality, list[Place]]] = {}
    seen_in: dict[str, set[int]] = {}
    for number, source in enumerate(sources):
        stack = find_slices(source, max_files=None, progress=progress)
        skipped.update(stack.skipped)
        for modality, own in stack.places.items():
            for place in own:
                name = patient_name(place.header) or unnamed
                if name is None:
                    skipped["no-patient-id"] += 1
                    continue
                places.setdefault(name, {}).setdefault(modality, []).append(place)
                seen_in.setdefault(name, set()).add(number)
    if not places:
        raise DataError(
            f"{', '.join(map(str, sources))}: no usable slice has a PatientID",
            code="no-usable-images",
            hint="--per-person needs a PatientID in every image; a pseudonym is enough",
        )
    _warn(seen_in, skipped, say)
    people = []
    for name, by_modality in places.items():
        modality = max(MODALITIES, key=lambda one: len(by_modality.get(one, ())))
        skipped["other-modality"] += sum(len(own) for other, own in by_modality.items() if other != modality)
        ordered = sorted(by_modality[modality], key=lambda place: (place.header.series_uid, place.order))
        if deal.slices is not None and len(ordered) > deal.slices:
            chosen = sorted(halving(len(ordered))[: deal.slices])
            skipped["more-than-slices"] += len(ordered) - len(chosen)
            ordered = [ordered[at] for at in chosen]
        people.append(
            Person(name=pseudonym(f"person:{name}", deal.key), modality=modality, places=tuple(ordered))
        )
    if not any(deal.of(person.modality) for person in people):
        present = " and ".join(sorted({person.modality for person in people}))
        raise ConfigError(
            f"--artifact {', '.join(deal.artifacts)}: cannot occur in {present}",
            code="bad-argument",
            hint="leave --artifact out to simulate all that can occur",
        )
    return sorted(people, key=lambda person: person.name), +skipped


def _warn(seen_in: Mapping[str, set[int]], skipped: Mapping[str, int], say: Callable[[str], None]) -> None:
    shared = sum(len(numbers) > 1 for numbers in seen_in.values())
    if shared:
        say(f"{shared} PatientIDs are in more than one folder: each is taken for one person")
    alike = Counter(name.lstrip("0") for name in seen_in)
    near = sum(count for count in alike.values() if count > 1)
    if near:
        say(f"warning: {near} PatientIDs differ from another one only in leading zeros: the same person?")
    if skipped.get("no-patient-id"):
        say(f"warning: {skipped['no-patient-id']} slices without a PatientID are left out")


def _version_of(person: Person, deal: Deal, counts: _Counts) -> Version | None:
    """The version of a person; None if no slice of the person can be used."""
    clean, headers, spacings = _read(person, counts.skipped)
    if not clean:
        return None
    acquisitions = [
        acquisition_of(torch.from_numpy(image), header, spacing)
        for image, header, spacing in zip(clean, headers, spacings, strict=True)
    ]
    seed = seed_of(deal.seed, "artifact", person.name)
    generator = torch.Generator().manual_seed(seed)
    drawn, *others = deal.versions_for(person.name, person.modality)
    for name in [drawn, *others]:
        made, severities = None, {}
        for _ in range(1 if name == CLEAN else DRAWS):
            if name != CLEAN:
                severities = {name: round(uniform(generator, deal.severity.low, deal.severity.high), 2)}
            attempt = corrupt(
                clean, person.modality, severities, acquisitions, generator, artifacts=deal.labelled
            )
            if shows(attempt, severities):
                made = attempt
                break
        if made is not None:
            if name != drawn:
                counts.replaced[drawn] += 1
            return Version(
                clean=clean,
                made=made,
                headers=headers,
                spacings_mm=spacings,
                seed=seed,
                severities=severities,
            )
    raise AssertionError("a clean version is always possible")


def _read(person: Person, skipped: Counter[str]) -> tuple[list[np.ndarray], list[SliceHeader], list[float]]:
    """The slices of a person that decode and show enough of the body, each picture once."""
    clean: list[np.ndarray] = []
    headers: list[SliceHeader] = []
    spacings: list[float] = []
    pictures: set[bytes] = set()
    for place in person.places:
        try:
            pixels = pixels_of(place)
        except ImagingError as error:
            skipped[error.code] += 1
            continue
        picture = hashlib.sha256(pixels.tobytes()).digest()
        image, spacing = as_square(pixels, place.header)
        if picture in pictures:
            skipped["duplicate"] += 1
        elif float(body_of(torch.from_numpy(image), person.modality).float().mean()) < MIN_BODY:
            skipped["too-little-body"] += 1
        else:
            pictures.add(picture)
            clean.append(image)
            headers.append(place.header)
            spacings.append(spacing)
    return clean, headers, spacings


def _write_person(
    images: Path,
    person: Person,
    version: Version,
    summary: SiteSummary,
    artifacts: Sequence[str],
    rows: list[list[str]],
    lines: list[dict[str, Any]],
) -> None:
    series = list(dict.fromkeys(header.series_uid for header in version.headers))
    for number, header in enumerate(version.headers):
        file = f"{person.name}-{number + 1:03d}.dcm"
        write_image(
            images / file,
            version,
            number,
            patient=person.name,
            identity=f"person {person.name}",
            series=f" {series.index(header.series_uid) + 1}",
        )
        rows.append([file, *version.labels(person.modality, artifacts)])
        lines.append(version.line(number, file=file, patient=person.name, mirrored=False))
    summary.people += 1
    summary.slices += len(version.headers)
    summary.versions[next(iter(version.severities), CLEAN)] += 1


def _show(
    shown: list[Shown], summary: SiteSummary, person: Person, version: Version, *, everyone: bool
) -> None:
    """Add the first slice of a person to the gallery; clean ones only to the contact sheet."""
    name = next(iter(version.severities), CLEAN)
    count = summary.versions[name]
    if count > MAX_SHOWN or (name == CLEAN and not everyone):
        return
    row = f"{summary.name} {name} {-(-count // ROW):02d}"
    simulated = shown_of(f"{summary.name}, person {summary.people}", person.modality, version)
    shown.append(Shown(row=row, title=version.title, simulated=simulated))


def _write_site(folder: Path, summary: SiteSummary, seed: int) -> None:
    write_site_yaml(
        folder,
        {
            "name": summary.name,
            "kind": "public",
            "cohort": f"people-{summary.name}-{seed}",
            "nominal_patients": nominal_bucket(summary.people),
            "stand_in": STAND_IN,
        },
        key=hashlib.sha256(f"inject people site key {summary.name} {seed}".encode()).digest(),
    )


def _report(sites: Sequence[SiteSummary], counts: _Counts, say: Callable[[str], None]) -> None:
    for site in sites:
        versions = ", ".join(f"{count} {name}" for name, count in sorted(site.versions.items()))
        say(f"{site.name}: {site.people} people, {site.slices} slices; {versions}")
    for text, counted in (
        ("slices skipped", counts.skipped),
        ("people with another version, because the artifact drawn changed too little", counts.replaced),
    ):
        if counted:
            say(f"{text}: " + ", ".join(f"{count} × {code}" for code, count in sorted(counted.items())))
