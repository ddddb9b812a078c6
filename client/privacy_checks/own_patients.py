"""A site's own patients for an attack, read without writing anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.data.cohort import Cohort, load_cohort, not_prepared
from client.data.studies import CohortSamples
from client.dicom.index import PARTS
from client.site.config import read_site
from common.errors import ConfigError
from common.plan import RunPlan


def own_patients(site_yaml: Path, plan: RunPlan) -> Cohort:
    """The cohort of a site as a plan would train on it. No file of the site is made or changed; SQLite's own
    -wal and -shm files beside the cache come and go.

    The ledger is not opened: patients of a disjoint cohort are left out at training, and not here.

    Args:
        site_yaml: the file, or the folder that holds it.
    Raises:
        ConfigError: `bad-argument`, the plan holds this site out, or it cannot be read.
        DataError: `not-prepared`; others as `client.data.cohort.load_cohort`.
        RefusedError: `split-differs`.
    """
    site, folder = read_site(site_yaml)
    if site.name in plan.held_out:
        raise ConfigError(
            f"{site.name}: the plan holds this site out, its patients never train",
            code="bad-argument",
            hint="name a site that trains, or another --plan",
        )
    if not (folder / site.state / "site.key").is_file():  # reading a site that has none makes one
        raise not_prepared(site_yaml)
    return load_cohort(
        site_yaml,
        size=plan.image_size,
        plan_split=plan.split,
        build=False,
        labels=plan.model.labels,
    )


def labelled_rows(cohort: Cohort | CohortSamples, part: str) -> np.ndarray:
    """The slices or samples of the patients of a part, of which something was assessed."""
    in_part = cohort.part == PARTS.index(part)
    return np.flatnonzero(in_part & ~np.isnan(cohort.labels).all(axis=1))
