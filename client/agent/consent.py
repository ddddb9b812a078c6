"""Check before each task that a hospital may use its images: ethics approval stated, and who has opted out.

The list of opt-outs is read again for each task. A patient who opted out since the images were read is left
out of everything that follows; nobody comes back while the agent runs. The index, and the answers that were
stored under it, stay what they are: opt-outs are subtracted from it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.data.cohort import Cohort
from client.data.inclusion import read_admission, read_rules
from client.dicom.patients import is_listed
from client.site.approvals import approval_of, ethics_hash
from client.site.config import SiteConfig, site_key
from client.site.policy import ETHICS_FIELDS, admit_ethics
from common.errors import FedqcError


class Consent:
    """What cohort.yaml says at the moment. Opt-outs only grow."""

    def __init__(self, folder: Path, site: SiteConfig) -> None:
        self._folder, self._site = folder, site
        self._opted_out: frozenset[str] = frozenset()

    def admit(self) -> None:
        """Read cohort.yaml and the opt-out list again.

        Raises:
            RefusedError: `ethics-missing`.
            ConfigError: `bad-cohort`, `bad-opt-out`; with local detail, never sent anywhere.
        """
        admit_ethics(self._site.kind, read_rules(self._folder).ethics)
        key = site_key(self._folder / self._site.state)
        self._opted_out |= read_admission(self._folder, key, self._site.patients).opted_out

    def subtracted(self, cohort: Cohort) -> Cohort:
        """The cohort without those who opted out: their slices are in no part and have no label."""
        gone = np.array([is_listed(record, self._opted_out) for record in cohort.records], bool)
        gone &= cohort.part >= 0
        if not gone.any():
            return cohort
        part, labels, severities = cohort.part.copy(), cohort.labels.copy(), cohort.severities.copy()
        part[gone] = -1
        labels[gone] = severities[gone] = np.nan
        patients = {cohort.records[row].patient for row in np.flatnonzero(gone)}
        opted_out = cohort.opted_out | patients
        return replace(cohort, part=part, labels=labels, severities=severities, opted_out=opted_out)

    def hash_of(self, plan_sha256: str) -> str:
        """The keyed hash of reference, consent basis, and who approved the plan when; "" where cohort.yaml
        states neither.
        """
        with suppress(FedqcError):
            record = read_rules(self._folder).ethics
            if any(record.values()):
                state = self._folder / self._site.state
                approval = approval_of(state, plan_sha256)
                record |= {name: approval[name] for name in ("by", "at", *ETHICS_FIELDS) if name in approval}
                return ethics_hash(record, site_key(state))
        return ""
