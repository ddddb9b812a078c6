"""Check before each task that a site may use its images: ethics approval stated, kind declared, and who has
opted out.

The list of opt-outs is read again for each task. A patient who opted out since the images were read is left
out of everything that follows; nobody comes back while the agent runs. The index, and the answers that were
stored under it, stay what they are: opt-outs are subtracted from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.agent.site_log import append_site_log
from client.data.cohort import Cohort, patient_forms
from client.data.inclusion import read_admission, read_rules
from client.dicom.patients import is_listed
from client.site.approvals import approval_of, ethics_hash
from client.site.config import SiteConfig, site_key
from client.site.kind import admit_kind
from client.site.ledger import Ledger
from client.site.policy import admit_ethics
from common.errors import FedqcError


class Consent:
    """What cohort.yaml says at the moment. Opt-outs only grow."""

    def __init__(self, folder: Path, site: SiteConfig) -> None:
        self._folder, self._site = folder, site
        self._opted_out: frozenset[str] = frozenset()
        self._kind_logged = False

    def admit(self) -> None:
        """Read cohort.yaml and the opt-out list again.

        Raises:
            RefusedError: `ethics-missing`, `kind-undeclared`.
            ConfigError: `bad-cohort`, `bad-opt-out`; with local detail, never sent anywhere.
        """
        admit_ethics(self._site.kind, read_rules(self._folder).ethics)
        reason = admit_kind(self._site, self._folder)
        if reason and not self._kind_logged:
            state = self._folder / self._site.state
            entry = f"kind {self._site.kind}: no noise, no budget; {reason}"
            self._kind_logged = append_site_log(state, entry)
        key = site_key(self._folder / self._site.state)
        self._opted_out |= read_admission(self._folder, key, self._site.patients).opted_out

    def subtracted(self, cohort: Cohort) -> Cohort:
        """The cohort without those who opted out: their slices are in no part and have no label."""
        return without(cohort, [is_listed(record, self._opted_out) for record in cohort.records])

    def hash_of(self, approved_sha256: str) -> str:
        """The keyed hash of reference, consent basis, and who approved the plan when; "" where cohort.yaml
        states neither.
        """
        with suppress(FedqcError):
            record = read_rules(self._folder).ethics
            if any(record.values()):
                state = self._folder / self._site.state
                approval = approval_of(state, approved_sha256)
                if approval is not None:
                    record |= {"by": approval.by, "at": approval.at, **approval.ethics}
                return ethics_hash(record, site_key(state))
        return ""


def without_other_accounts(cohort: Cohort, ledger: Ledger) -> Cohort:
    """The cohort without patients whom the ledger found in an account of its own before: each patient is in
    one account only. That a patient is left out is never sent: it would tell of one patient.

    Raises:
        ConfigError, LedgerError: as `Ledger.admit_patients`.
    """
    left_out = ledger.admit_patients(patient_forms(cohort.records))
    return without(cohort, [record.patient in left_out for record in cohort.records])


def without(cohort: Cohort, slices: Sequence[bool]) -> Cohort:
    """The cohort without these slices: they are in no part and have no label."""
    gone = np.array(slices, bool) & (cohort.part >= 0)
    if not gone.any():
        return cohort
    part, labels, severities = cohort.part.copy(), cohort.labels.copy(), cohort.severities.copy()
    part[gone] = -1
    labels[gone] = severities[gone] = np.nan
    opted_out = cohort.opted_out | {cohort.records[row].patient for row in np.flatnonzero(gone)}
    return replace(cohort, part=part, labels=labels, severities=severities, opted_out=opted_out)
