"""A cohort as the samples of a plan's network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.data.cohort import Cohort
from client.data.series import series_of_records
from common.plan import Model
from common.studies import Samples, samples_of


@dataclass(frozen=True, kw_only=True)
class CohortSamples(Samples):
    """The samples of a cohort, with the part of each."""

    part: np.ndarray  # int8 (n,), as `Cohort.part`


def cohort_samples(cohort: Cohort, model: Model) -> CohortSamples:
    """The slices of a cohort or, for a network of studies, its studies."""
    found = samples_of(
        model,
        cohort.images,
        cohort.modality,
        cohort.labels,
        cohort.patients,
        lambda: series_of_records(cohort.records),
    )
    return CohortSamples(**vars(found), part=cohort.part[found.first])
