"""Tell training patients from others by a finished model alone: what an arm without noise gives away.

The attacker has the model, the public model that it started from, and the images and labels of a patient,
and asks: did this patient train it? A model's confidence in a patient is the logit of exp(-loss); the score
is how much more confident the model is than the public one. What makes a patient hard for any model, which
tells nothing, cancels.

On the demo this was the strongest of four scores (docs/privacy.md); the loss alone, and the plain difference
of losses, are measured beside it. Attacks that train models of their own (LiRA) find more: a low figure is no
proof.

References: Yeom et al. 2018 (arXiv 1709.01604), the loss as a score; Watson et al. 2022 (arXiv 2111.08440),
    less that of a reference model; Carlini et al. 2022 (arXiv 2112.03570), the logit, and true positives at
    few false ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.data.cohort import Cohort
from client.data.studies import cohort_samples
from client.dp.sampler import rows_by_patient
from client.privacy_checks.guessing import Estimate, auc, share_found, share_found_interval
from client.privacy_checks.own_patients import labelled_rows
from common.learning import score
from common.losses import masked_bce
from common.models import network_of
from common.plan import Model
from common.weights import manifest_of, unflatten

LEAST_LOSS = 1e-6  # below, a float32 loss is rounding


@dataclass(frozen=True, kw_only=True)
class PatientLosses:
    """Of several models on the same patients. Private: not to be sent."""

    members: np.ndarray  # (models, training patients)
    others: np.ndarray  # (models, test patients)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well training patients are told from test patients; nan where either are missing."""

    members: int
    others: int
    auc: float
    auc_interval: tuple[float, float]  # 95 %
    found: float  # share of the training patients, at 1 % false alarms
    found_interval: tuple[float, float]
    auc_of_difference: float  # by the difference of the losses
    auc_of_loss: float  # by the loss alone


def patient_losses(cohort: Cohort, model: Model, weights: Sequence[np.ndarray]) -> PatientLosses:
    """Each patient's mean loss over the slices or studies of which something was assessed.

    Args:
        weights: of each model, float32 (parameters,).
    """
    network, samples = network_of(model), cohort_samples(cohort, model)
    manifest = manifest_of(network.state_dict())
    found: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for flat in weights:
        network.load_state_dict(unflatten(flat, manifest))
        for part, losses in found.items():
            groups = rows_by_patient(samples.patients, labelled_rows(samples, part))
            if not groups:
                losses.append(np.zeros(0))
                continue
            rows = np.concatenate(groups)
            logits = score(network, samples.images, samples.modality, rows)
            of_slices = masked_bce(torch.from_numpy(logits), torch.from_numpy(samples.labels[rows])).numpy()
            ends = np.cumsum([len(group) for group in groups])[:-1]
            losses.append(np.array([part.mean() for part in np.split(of_slices.astype(np.float64), ends)]))
    return PatientLosses(members=np.stack(found["train"]), others=np.stack(found["test"]))


def membership(public: PatientLosses, attacked: PatientLosses) -> Membership:
    """Attack one model.

    Args:
        public, attacked: the losses of the public model and of the attacked one, one row each, of the same
            patients.
    """
    inside, outside = membership_scores(public, attacked)
    area = _area(inside, outside)
    return Membership(
        members=inside.size,
        others=outside.size,
        auc=area.value,
        auc_interval=area.interval(),
        found=share_found(inside, outside),
        found_interval=share_found_interval(inside, outside),
        auc_of_difference=_area(public.members - attacked.members, public.others - attacked.others).value,
        auc_of_loss=_area(-attacked.members, -attacked.others).value,
    )


def membership_scores(public: PatientLosses, attacked: PatientLosses) -> tuple[np.ndarray, np.ndarray]:
    """The attacker's score of each training patient and of each test patient; higher: more likely trained."""
    inside = _confidence(attacked.members) - _confidence(public.members)
    outside = _confidence(attacked.others) - _confidence(public.others)
    return inside.ravel(), outside.ravel()


def _confidence(losses: np.ndarray) -> np.ndarray:
    """The logit of exp(-loss): it still tells apart losses that are all near zero."""
    return -np.log(np.expm1(np.maximum(losses, LEAST_LOSS)))


def _area(inside: np.ndarray, outside: np.ndarray) -> Estimate:
    return auc(inside.reshape(-1, 1), outside.reshape(-1, 1))
