"""Train a linear head on cached features privately: DP-SGD with the patient as the unit.

The promise of `train_private_head`: `steps` steps of the Poisson-subsampled Gaussian mechanism with the given
noise multiplier and sample rate, per *patient*, add/remove; `common.privacy.GaussianSteps` with the same
three numbers is what it costs. Everything it returns may be released at that cost, and everything computed
from it is post-processing.

What voids it: features that depend on other patients (a batch statistic, a feature extractor trained on this
cohort outside the ledger); a patient under two ids; a nominal number, learning rate or step count chosen by
looking at the cohort. Gradients per slice are Opacus' (GradSampleModule, hooks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from client.dp.clipping import clipped_sum, patient_means
from client.dp.noise import add_noise, fresh_generator
from client.dp.sampler import sample_patients
from common.errors import ConfigError
from common.losses import PerSampleLoss, masked_bce
from common.privacy import GaussianSteps

PATIENTS_PER_CHUNK = 256  # bounds memory; changes nothing else, since patients do not meet before the sum


class TrainedHead(NamedTuple):
    """What one call of `train_private_head` releases."""

    weight: np.ndarray  # (artifacts, features), float32
    bias: np.ndarray  # (artifacts,), float32
    steps_done: int


@dataclass(frozen=True, kw_only=True)
class PrivateSteps:
    """The public numbers of one private training; none of them may be chosen by looking at the cohort.

    Args:
        steps: optimizer steps.
        learning_rate: of plain SGD.
        clip_norm: L2 bound of one patient's gradient.
        noise_multiplier: standard deviation of the noise, in units of `clip_norm`; 0 is not private.
        sample_rate: probability with which a patient takes part in a step.
        nominal_patients: the site's public size class; the true number of patients is never used.
        max_slices_per_patient: slices of one patient that a step uses at most.
    Raises:
        ConfigError: `bad-privacy-parameters`, a number is out of range.
    """

    steps: int
    learning_rate: float
    clip_norm: float
    noise_multiplier: float
    sample_rate: float
    nominal_patients: int
    max_slices_per_patient: int

    def __post_init__(self) -> None:
        GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)
        wrong = {
            "learning_rate": not (math.isfinite(self.learning_rate) and self.learning_rate > 0),
            "clip_norm": not (math.isfinite(self.clip_norm) and self.clip_norm > 0),
            "nominal_patients": self.nominal_patients < 1,
            "max_slices_per_patient": self.max_slices_per_patient < 1,
        }
        if any(wrong.values()):
            raise ConfigError(
                f"out of range: {', '.join(name for name, is_wrong in wrong.items() if is_wrong)}",
                code="bad-privacy-parameters",
            )


def train_private_head(
    weight: np.ndarray,
    bias: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    request: PrivateSteps,
    *,
    tick: Callable[[int], None] = lambda steps: None,
) -> TrainedHead:
    """Train a linear head, each patient's influence on each step clipped and covered by noise.

    Each step: patients are Poisson-sampled; at most `max_slices_per_patient` slices of each are drawn; the
    loss of a patient is the mean over them; its gradient, weight and bias together, is clipped once to
    `clip_norm`; the sum over patients gets noise of deviation noise_multiplier * clip_norm and is divided by
    the *public* sample_rate * nominal_patients; plain SGD follows. A step on no patients adds its noise and
    counts. A patient whose gradient is not finite weighs zero. Sampling and noise come from keys of the
    operating system, new in each step.

    Args:
        weight, bias: shapes (A, F) and (A,), where training starts: public, or released before.
        features: shape (n, F), one row per slice.
        labels: shape (n, A), in [0, 1], nan = not assessed.
        patients: shape (n,), whose slice each row is.
        tick: called before every step with the number of finished ones, a public number; what it raises ends
            the training.
    Returns:
        the head after `steps` steps and that number.
    Raises:
        ConfigError: `bad-shape`, the shapes of the arrays do not fit. Never because of a value in them.
    """
    _check(weight, bias, features, labels, patients)
    slices_of = _slices_by_patient(patients)
    x = torch.as_tensor(np.ascontiguousarray(features, dtype=np.float32))
    y = torch.as_tensor(np.ascontiguousarray(labels, dtype=np.float32))
    parameters = np.concatenate(
        [np.asarray(weight, dtype=np.float64).ravel(), np.asarray(bias, dtype=np.float64)]
    )
    for step in range(request.steps):
        tick(step)
        generator = fresh_generator()
        sampled = sample_patients(len(slices_of), request.sample_rate, generator)
        chosen = [
            draw_slices(slices_of[position], request.max_slices_per_patient, generator)
            for position in sampled
        ]
        total = head_gradient_sum(parameters, weight.shape, x, y, chosen, clip_norm=request.clip_norm)
        noised = add_noise(
            total,
            noise_multiplier=request.noise_multiplier,
            clip_norm=request.clip_norm,
            generator=generator,
        )
        mean = noised / (request.sample_rate * request.nominal_patients)
        parameters = parameters - request.learning_rate * mean
    split = weight.size
    return TrainedHead(
        parameters[:split].reshape(weight.shape).astype(np.float32),
        parameters[split:].astype(np.float32),
        request.steps,
    )


def head_gradient_sum(
    parameters: np.ndarray,
    shape: tuple[int, ...],
    features: Tensor,
    labels: Tensor,
    slices: list[np.ndarray],
    *,
    clip_norm: float,
    loss: PerSampleLoss = masked_bce,
) -> np.ndarray:
    """The sum over patients of their clipped gradients, before noise: moves by at most `clip_norm` when a
    patient comes or goes.

    Args:
        parameters: shape (A * F + A,), weight then bias.
        shape: (A, F).
        slices: the rows of each sampled patient, in any order.
    Returns:
        float64, shape (A * F + A,). Private: not to be released without noise.
    """
    num_outputs, num_features = shape
    total = np.zeros(parameters.shape)
    with torch.enable_grad():
        layer = nn.Linear(num_features, num_outputs)
        with torch.no_grad():
            layer.weight.copy_(
                torch.as_tensor(parameters[: num_outputs * num_features].reshape(num_outputs, num_features))
            )
            layer.bias.copy_(torch.as_tensor(parameters[num_outputs * num_features :]))
        for start in range(0, len(slices), PATIENTS_PER_CHUNK):
            chunk = slices[start : start + PATIENTS_PER_CHUNK]
            rows = torch.as_tensor(np.concatenate(chunk))
            owner = torch.as_tensor(np.repeat(np.arange(len(chunk)), [len(part) for part in chunk]))
            gradients = opacus_gradients(layer, features[rows], labels[rows], loss)
            total += clipped_sum(patient_means(gradients, owner, len(chunk)), clip_norm).numpy()
    return total


def opacus_gradients(layer: nn.Linear, features: Tensor, labels: Tensor, loss: PerSampleLoss) -> Tensor:
    """Per-slice gradients of weight and bias from Opacus' hooks, shape (slices, A * F + A)."""
    module = GradSampleModule(layer, batch_first=True, loss_reduction="sum")
    try:
        # so that torch calls the module's backward hook as it should
        logits = module(features.detach().requires_grad_(True))
        _checked_losses(loss(logits, labels), len(features)).sum().backward()
        gradients = [each.grad_sample for each in (layer.weight, layer.bias)]  # type: ignore[attr-defined]
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    finally:
        module.to_standard_module()
        layer.zero_grad(set_to_none=True)


def draw_slices(rows: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """At most `most` of a patient's rows, without replacement. A function of this patient's rows and fresh
    coins only.
    """
    if len(rows) <= most:
        return rows
    return generator.choice(rows, size=most, replace=False)


def _slices_by_patient(patients: np.ndarray) -> list[np.ndarray]:
    """The rows of each patient."""
    if len(patients) == 0:
        return []
    _, owner = np.unique(patients, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)


def _checked_losses(losses: Tensor, num_slices: int) -> Tensor:
    if losses.shape != (num_slices,):
        raise ConfigError(
            f"the loss gave shape {tuple(losses.shape)}, per-sample clipping needs ({num_slices},)",
            code="bad-loss",
        )
    return losses


def _check(
    weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray, patients: np.ndarray
) -> None:
    artifacts, num_features = weight.shape if weight.ndim == 2 else (-1, -1)
    slices = len(patients)
    expected = {
        "bias": (artifacts,),
        "features": (slices, num_features),
        "labels": (slices, artifacts),
        "patients": (slices,),
    }
    actual = {
        "bias": bias.shape,
        "features": features.shape,
        "labels": labels.shape,
        "patients": patients.shape,
    }
    for name, shape in expected.items():
        if artifacts < 1 or actual[name] != shape:
            raise ConfigError(
                f"{name} has shape {actual[name]}, weight {weight.shape} asks for {shape}", code="bad-shape"
            )
