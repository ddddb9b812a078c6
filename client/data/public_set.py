"""Write the slices of a site of public images as one file: a coordinator's public set (`public_set.file`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import load_cohort
from client.data.series import series_of_records
from client.site.config import read_site
from client.site.kind import admit_kind
from common.artifacts import DEFAULT_LABELS, NAMES
from common.errors import ConfigError, DataError
from common.public_slices import Slices, save_slices


def write_public_set(site_yaml: Path, out: Path, *, size: int) -> dict[str, Any]:
    """Write all slices with a label, of all patients but those who opted out, whatever their part.

    Returns:
        `file`, an absolute path, and `sha256`, as a plan names them; the numbers of `slices` and `patients`.
    Raises:
        ConfigError: the site is a hospital (`not-public`): its images stay where they are; something is at
            `out` (`output-exists`), or it cannot be written (`not-writable`).
        DataError: as `load_cohort`; no slice has a label (`nothing-assessed`).
        RefusedError: `kind-undeclared`.
    """
    site, folder = read_site(site_yaml)
    if site.kind == "hospital":
        raise ConfigError(
            f"{site.name}: images of a hospital do not leave it",
            code="not-public",
            hint="a public set is made of a site of kind public or synthetic",
        )
    admit_kind(site, folder, again=True)
    if out.exists():
        raise ConfigError(f"{out}: exists already", code="output-exists", hint="choose another name")
    cohort = load_cohort(site_yaml, size=size, quarantine="ignore", labels=NAMES)
    rows = np.flatnonzero((cohort.part >= 0) & ~np.isnan(cohort.labels).all(axis=1))
    if not len(rows):
        raise DataError(f"{site.name}: no slice has a label", code="nothing-assessed")
    kept = [
        name
        for name, column in zip(cohort.artifacts, cohort.labels[rows].T, strict=True)
        if name in DEFAULT_LABELS or not np.isnan(column).all()
    ]
    series, order, _ = series_of_records(cohort.records)
    rows = order[np.isin(order, rows)]
    slices = Slices(
        images=cohort.images[rows],
        modality=cohort.modality[rows],
        labels=cohort.labels[rows][:, [NAMES.index(name) for name in kept]],
        patients=cohort.patients[rows],
        series=series[rows],
    )
    try:
        sha256 = save_slices(out, slices, kept)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})", code="not-writable") from None
    return {
        "file": str(out.absolute()),
        "sha256": sha256,
        "slices": len(rows),
        "patients": len(np.unique(slices.patients)),
    }


def public_set_text(written: dict[str, Any]) -> str:
    """What was written, with the lines that a plan needs."""
    return (
        f"public set: {written['slices']} slices of {written['patients']} patients; in a plan:\n"
        f"public_set:\n  file: {written['file']}\n  sha256: {written['sha256']}"
    )
