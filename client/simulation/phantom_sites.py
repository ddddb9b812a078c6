"""Write site folders of phantoms as DICOM (`fedqc data phantom`)."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.simulation.injection import label_columns, labelled
from client.site.config import nominal_bucket
from client.site.made import write_site_yaml
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.files import whole_folder
from common.physics.appearance import PUBLIC_APPEARANCES, SITE_APPEARANCES, Appearance
from common.physics.phantom import PhantomSlice, draw_patients

TRAINING_SHARE = 0.6
SLICE_SPACING_MM = 5.0
MAX_SERIES = 4
MOVING = 0.35
"""Share of CT patients who move, where that is asked for."""


def _artifacts(ct_motion: bool) -> list[str]:
    """What the label sheets have columns of."""
    return labelled(["ct_motion"] if ct_motion else [])


def write_consortium(
    out: Path,
    *,
    sites: int,
    patients: int,
    seed: int,
    say: Callable[[str], None],
    series: int = 1,
    ct_motion: bool = False,
) -> None:
    """`sites` hospitals of `patients` phantoms each, with so many series each; the last one looks like none
    of the others and is meant to be held out.

    The same arguments give the same files. With `ct_motion` some CT patients move, and the sheets say who.
    """
    if not 2 <= sites <= 26:
        raise ConfigError(f"--sites {sites}: must be 2 to 26", code="bad-argument")
    if not 1 <= series <= MAX_SERIES:
        raise ConfigError(f"--series {series}: must be 1 to {MAX_SERIES}", code="bad-argument")
    with whole_folder(out) as staging:
        for number, appearance in enumerate(appearances_for(sites)):
            if ct_motion:
                chances = {**appearance.prevalence, "ct_motion": MOVING}
                appearance = replace(appearance, prevalence=chances)
            name = f"hospital-{chr(ord('a') + number)}"
            slices = write_site(
                staging / name,
                name,
                appearance,
                patients=patients,
                seed=_derived(seed, name),
                series=series,
                ct_motion=ct_motion,
            )
            say(f"{name}: {patients} patients, {slices} slices, {appearance.manufacturer}")


def write_public(
    out: Path, *, patients: int, seed: int, say: Callable[[str], None], ct_motion: bool = False
) -> None:
    """One site, `public`, whose phantoms have the public appearances in turn: what the public model is
    trained on.

    The same arguments give the same files. With `ct_motion` the sheet says who moved in CT: some always do.
    """
    name, number_of, artifacts = "public", len(PUBLIC_APPEARANCES), _artifacts(ct_motion)
    with whole_folder(out) as staging:
        folder = staging / name
        rows: list[list[str]] = []
        (folder / "images").mkdir(parents=True)
        for number, appearance in enumerate(PUBLIC_APPEARANCES):
            drawn = draw_patients(
                appearance, len(range(number, patients, number_of)), _derived(seed, appearance.name)
            )
            rows += write_patients(
                folder / "images",
                drawn,
                appearance,
                f"{name}/{seed}/{appearance.name}",
                artifacts,
                f"{number}-",
            )
            say(f"{appearance.name}: {len(rows)} slices so far")
        finish_site(folder, name, rows, kind="public", patients=patients, seed=seed, artifacts=artifacts)
    say(f"{name}: {patients} patients, {len(rows)} slices")


def appearances_for(sites: int) -> list[Appearance]:
    """The last is the one outside the range of the others; more sites than appearances repeat them with other
    noise.
    """
    *ordinary, outside = SITE_APPEARANCES
    chosen = []
    for number in range(sites - 1):
        appearance, lap = ordinary[number % len(ordinary)], number // len(ordinary)
        low, high = appearance.noise_percent
        chosen.append(replace(appearance, noise_percent=(low * (1 + 0.2 * lap), high * (1 + 0.2 * lap))))
    return [*chosen, outside]


def write_site(
    folder: Path,
    name: str,
    appearance: Appearance,
    *,
    patients: int,
    seed: int,
    series: int = 1,
    ct_motion: bool = False,
) -> int:
    """One site folder: images, labels.csv, site.yaml and a site key. Returns the number of slices."""
    images = folder / "images"
    images.mkdir(parents=True)
    drawn = draw_patients(appearance, patients, seed, series=series)
    artifacts = _artifacts(ct_motion)
    rows = list(write_patients(images, drawn, appearance, f"{name}/{seed}", artifacts))
    finish_site(folder, name, rows, kind="synthetic", patients=patients, seed=seed, artifacts=artifacts)
    return len(rows)


def write_patients(
    images: Path,
    patients: Iterable[list[PhantomSlice]],
    appearance: Appearance,
    identity: str,
    artifacts: Sequence[str] = DEFAULT_LABELS,
    prefix: str = "",
) -> Iterator[list[str]]:
    """Write the slices of patients, whose numbers get `prefix`; gives their rows of labels.csv."""
    for slices in patients:
        for item in slices:
            place = f"{item.series}-{item.position}" if item.series else f"{item.position}"
            file = f"p{prefix}{item.patient:04d}_{place}.dcm"
            _write_phantom(images / file, item, appearance, identity, f"PHANTOM-{prefix}{item.patient:04d}")
            labels = [str(item.labels.get(name, "")) for name in artifacts]
            severities = [
                f"{item.severities[name]:.2f}" if name in item.severities else "" for name in artifacts
            ]
            yield [file, *labels, *severities]


def finish_site(
    folder: Path,
    name: str,
    rows: list[list[str]],
    *,
    kind: str,
    patients: int,
    seed: int,
    artifacts: Sequence[str] = DEFAULT_LABELS,
) -> None:
    """labels.csv, site.yaml and the key of a site of phantoms."""
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file_handle:
        writer = csv.writer(file_handle, lineterminator="\n")
        writer.writerow(label_columns(artifacts))
        writer.writerows(rows)
    write_site_yaml(
        folder,
        {
            "name": name,
            "kind": kind,
            "cohort": f"phantoms-{name}-{seed}",
            "nominal_patients": nominal_bucket(patients * TRAINING_SHARE),
            "stand_in": "patients are computer-generated phantoms",
        },
        key=hashlib.sha256(f"phantom key {name} {seed}".encode()).digest(),
    )


def _write_phantom(
    path: Path, item: PhantomSlice, appearance: Appearance, identity: str, patient_id: str
) -> None:
    patient = f"{identity}/{item.patient}"
    series = f"{patient}/series-{item.series}" if item.series else f"{patient}/series"
    sop = f"{series}/{item.position}" if item.series else f"{patient}/{item.position}"
    is_ct = item.modality == "CT"
    write_slice(
        path,
        item.image,
        HeaderFacts(
            modality=item.modality,
            pixel_spacing_mm=item.pixel_spacing_mm,
            patient_id=patient_id,
            study_uid=make_uid(f"{patient}/study".encode()),
            series_uid=make_uid(series.encode()),
            sop_uid=make_uid(sop.encode()),
            instance_number=item.position + 1,
            slice_position_mm=SLICE_SPACING_MM * item.position,
            slice_thickness_mm=SLICE_SPACING_MM,
            manufacturer=appearance.manufacturer,
            model=appearance.model_name,
            slope=appearance.rescale_slope if is_ct else 1.0,
            intercept=appearance.rescale_intercept if is_ct else 0.0,
            bits_stored=appearance.bits_stored if is_ct else 16,
            signed=appearance.signed if is_ct else False,
            phase_encoding=item.phase_encoding,
            field_strength_t=None if is_ct else appearance.field_tesla,
            kvp=120.0 if is_ct else None,
            description="phantom",
        ),
    )


def _derived(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
