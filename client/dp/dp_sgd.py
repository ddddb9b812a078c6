"""Train a linear head on cached features, or more of a network on images, privately: DP-SGD with the patient
as the unit.

The promise of `train_private_head` and `train_private_network`: `steps` steps of the Poisson-subsampled
Gaussian mechanism with the given noise multiplier and sample rate, per *patient*, add/remove;
`common.privacy.GaussianSteps` with the same three numbers is what it costs. Everything they return may be
released at that cost, and everything computed from it is post-processing. This holds in integers, not up to
rounding: `client.dp.release`.

What voids it: features that depend on other patients (a batch statistic, a feature extractor trained on this
cohort outside the ledger); a patient under two ids; a nominal number, learning rate or step count chosen by
looking at the cohort. The gradient of each patient comes from an engine (`client.dp.engines`); Opacus'
optimizer is not used, because it adds float noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from client.dp.clipping import clipped_sum
from client.dp.coins import Coins
from client.dp.engines import DEFAULT_ENGINE, ENGINES
from client.dp.engines.examples import Examples
from client.dp.injected import InjectedRows
from client.dp.release import clipped_integer_sum, grid_of, noise_deviation, release
from client.dp.sampler import draw_slices, rows_by_patient, sample_patients
from common.devices import on_device
from common.errors import ConfigError
from common.losses import PerSampleLoss, masked_bce
from common.privacy import GaussianSteps
from common.weights import digest

HEAD_ROWS, NETWORK_ROWS = 1024, 32
"""Slices that an engine computes with at once, of features and of images: a multiple of what a processor
handles at once, so that no row is a remainder.
"""


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
        engine: a name in `client.dp.engines.ENGINES`.
        keeps_grid: with noise 0, sum on the grid all the same, so that nothing but the noise is left out.
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
    engine: str = DEFAULT_ENGINE
    keeps_grid: bool = False

    def __post_init__(self) -> None:
        GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)
        wrong = {
            "learning_rate": not (math.isfinite(self.learning_rate) and self.learning_rate > 0),
            "clip_norm": not (math.isfinite(self.clip_norm) and self.clip_norm > 0),
            "nominal_patients": self.nominal_patients < 1,
            "max_slices_per_patient": self.max_slices_per_patient < 1,
            "engine": self.engine not in ENGINES,
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
    injected: InjectedRows | None = None,
    tick: Callable[[int], None] = lambda steps: None,
) -> TrainedHead:
    """Train a linear head, each patient's influence on each step clipped and covered by noise: `descend`.

    Args:
        weight, bias: shapes (A, F) and (A,), where training starts: public, or released before.
        features: shape (n, F), one row per slice.
        labels: shape (n, A), in [0, 1], nan = not assessed.
        patients: shape (n,), whose slice each row is.
        injected: which rows are views; the mean is then that of client/dp/injected.py.
        tick: called before every step with the number of finished ones, a public number; what it raises ends
            the training.
    Returns:
        the head after `steps` steps and that number.
    Raises:
        ConfigError: `bad-shape`, the shapes of the arrays do not fit; `bad-privacy-parameters`, the clip or
            the noise has no grid. Never because of a value in them.
    """
    _check(weight, bias, features, labels, patients)
    x = torch.as_tensor(np.ascontiguousarray(features, dtype=np.float32))
    y = torch.as_tensor(np.ascontiguousarray(labels, dtype=np.float32))

    def gradients(parameters: np.ndarray, drawn: DrawnRows) -> Iterator[np.ndarray]:
        return head_gradients(
            parameters,
            weight.shape,
            x,
            y,
            drawn.rows,
            max_slices=drawn.most,
            weights=drawn.weights,
            engine=request.engine,
        )

    start = np.concatenate([np.asarray(weight, dtype=np.float64).ravel(), np.asarray(bias, dtype=np.float64)])
    parameters = descend(start, gradients, patients, request, injected=injected, tick=tick)
    split = weight.size
    return TrainedHead(
        parameters[:split].reshape(weight.shape).astype(np.float32),
        parameters[split:].astype(np.float32),
        request.steps,
    )


def train_private_network(
    network: nn.Module,
    trained: Sequence[str],
    inputs: Callable[[np.ndarray], Tensor],
    labels: np.ndarray,
    patients: np.ndarray,
    request: PrivateSteps,
    *,
    injected: InjectedRows | None = None,
    tick: Callable[[int], None] = lambda steps: None,
) -> np.ndarray:
    """Train parameters of a network on images, each patient's influence on each step clipped and covered by
    noise: `descend`. All trained parameters are clipped and noised together; all else is checked to be the
    same bits after every step.

    Args:
        network: where training starts: public, or released before. It is changed in place.
        trained: names of the parameters that are trained.
        inputs: what the network takes, (slices, ...), for rows of `labels`; called for the rows of one
            patient at a time, and a function of these alone.
        labels: shape (n, A), in [0, 1], nan = not assessed.
        patients: shape (n,), whose slice each row is.
        injected, tick: as `train_private_head`.
    Returns:
        the trained parameters, flat, in the order of `network.named_parameters()`, float64.
    Raises:
        ConfigError: `bad-shape`; `bad-privacy-parameters`; `uncovered-parameter`, a trained parameter has no
            gradient, or training changes what is not trained. Never because of a value in the arrays.
    """
    if labels.ndim != 2 or len(labels) != len(patients):
        raise ConfigError(
            f"labels have shape {labels.shape}, {len(patients)} patients are named", code="bad-shape"
        )
    network.train()
    with on_device(network) as where:
        return _train_network(
            network,
            set(trained),
            Examples(
                inputs=lambda rows: inputs(rows).to(where),
                labels=torch.as_tensor(np.ascontiguousarray(labels, np.float32)).to(where),
            ),
            patients,
            request,
            injected=injected,
            tick=tick,
        )


def _train_network(
    network: nn.Module,
    trained: set[str],
    examples: Examples,
    patients: np.ndarray,
    request: PrivateSteps,
    *,
    injected: InjectedRows | None,
    tick: Callable[[int], None],
) -> np.ndarray:
    tensors = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            tensors.append(parameter)
    frozen = _digest_outside(network, trained)

    def gradients(parameters: np.ndarray, drawn: DrawnRows) -> Iterator[np.ndarray]:
        _load(tensors, parameters)
        yield from ENGINES[request.engine](
            network,
            examples,
            drawn.rows,
            max_slices=drawn.most,
            rows_per_batch=NETWORK_ROWS,
            weights=drawn.weights,
            loss=masked_bce,
        )
        if _digest_outside(network, trained) != frozen:
            raise ConfigError(
                "training changes a part of the network that is not trained", code="uncovered-parameter"
            )

    start = np.concatenate([tensor.detach().cpu().numpy().ravel() for tensor in tensors])
    parameters = descend(start.astype(np.float64), gradients, patients, request, injected=injected, tick=tick)
    _load(tensors, parameters)
    return parameters


def _load(tensors: Iterable[Tensor], parameters: np.ndarray) -> None:
    """Write flat parameters into tensors, in their order."""
    begin = 0
    with torch.no_grad():
        for tensor in tensors:
            end = begin + tensor.numel()
            tensor.copy_(torch.as_tensor(parameters[begin:end].reshape(tensor.shape)).to(tensor.device))
            begin = end


def _digest_outside(network: nn.Module, trained: set[str]) -> str:
    """The digest of everything that a network holds but the trained parameters."""
    parts = {name: value for name, value in network.state_dict().items() if name not in trained}
    return digest(np.concatenate([np.zeros(0, np.uint8), *(_bytes(value) for value in parts.values())]))


def _bytes(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(-1).view(np.uint8)


class DrawnRows(NamedTuple):
    """What one step uses of each sampled patient."""

    rows: list[np.ndarray]
    weights: list[np.ndarray] | None  # of these rows in the patient's mean; None: all the same
    most: int  # rows of one patient at most: public


def drawn_rows(
    slices: list[np.ndarray], max_slices: int, injected: InjectedRows | None, coins: Coins
) -> DrawnRows:
    """Draw the rows that a step uses.

    Args:
        slices: all rows of each sampled patient.
    """
    if injected is None:
        return DrawnRows([draw_slices(own, max_slices, coins) for own in slices], None, max_slices)
    chosen = [injected.draw(own, max_slices, coins) for own in slices]
    weights = [injected.mean_weights(rows) for rows in chosen]
    return DrawnRows(chosen, weights, injected.max_rows(max_slices))


def descend(
    parameters: np.ndarray,
    gradients: Callable[[np.ndarray, DrawnRows], Iterator[np.ndarray]],
    patients: np.ndarray,
    request: PrivateSteps,
    *,
    injected: InjectedRows | None = None,
    tick: Callable[[int], None] = lambda steps: None,
) -> np.ndarray:
    """The steps of a private training.

    Each step: patients are Poisson-sampled; at most `max_slices_per_patient` slices of each are drawn; the
    loss of a patient is the mean over them, weighted where some are views (client/dp/injected.py); its
    gradient, all parameters together, is clipped once to `clip_norm` and truncated to whole steps of a public
    grid; the integer sum over patients gets exactly drawn, rounded noise of deviation noise_multiplier *
    clip_norm and is divided by the *public* sample_rate * nominal_patients; plain SGD follows. A step on no
    patients adds its noise and counts. A patient whose gradient is not finite weighs zero. All coins, of
    patients, slices and noise, come from one cryptographic generator with a key of the operating system, new
    in each training.

    With noise_multiplier 0, which is not private, the sum is that of the clipped float gradients, without
    grid and noise; with `keeps_grid`, it is the integer sum without noise.

    Args:
        parameters: float64 (n,), where training starts.
        gradients: from parameters and the rows of each sampled patient to the gradient of each, some
            patients at a time, floats (patients, n).
        patients: shape (slices,), whose slice each row is.
        injected: as `train_private_head`.
    Returns:
        float64 (n,).
    """
    slices_of = rows_by_patient(patients, np.arange(len(patients)))
    coins = Coins()
    for step in range(request.steps):
        tick(step)
        sampled = sample_patients(len(slices_of), request.sample_rate, coins)
        own = [slices_of[position] for position in sampled]
        drawn = drawn_rows(own, request.max_slices_per_patient, injected, coins)
        total = noised_sum(gradients(parameters, drawn), parameters.size, request, coins)
        mean = total / (request.sample_rate * request.nominal_patients)
        parameters = parameters - request.learning_rate * mean
    return parameters


def noised_sum(gradients: Iterator[np.ndarray], size: int, request: PrivateSteps, coins: Coins) -> np.ndarray:
    """The sum over patients of their clipped gradients with the noise that `request` asks for: one step of
    the Gaussian mechanism.

    Args:
        gradients: floats, shapes (patients, size).
    Returns:
        float64, shape (size,), a multiple of the grid.
    """
    if request.noise_multiplier == 0 and not request.keeps_grid:
        return sum((clipped_sum(chunk, request.clip_norm) for chunk in gradients), start=np.zeros(size))
    grid = grid_of(request.clip_norm, size)
    if request.noise_multiplier == 0:
        return clipped_integer_sum(gradients, size, request.clip_norm, grid) * grid
    deviation = noise_deviation(request.noise_multiplier, Fraction(request.clip_norm / grid) ** 2)
    total = clipped_integer_sum(gradients, size, request.clip_norm, grid)
    return release(total, deviation, coins) * grid


def head_gradients(
    parameters: np.ndarray,
    shape: tuple[int, ...],
    features: Tensor,
    labels: Tensor,
    slices: list[np.ndarray],
    *,
    max_slices: int,
    weights: list[np.ndarray] | None = None,
    engine: str = DEFAULT_ENGINE,
    loss: PerSampleLoss = masked_bce,
) -> Iterator[np.ndarray]:
    """The gradient of each patient's mean loss, some patients at a time, in the order of `slices`.

    Args:
        parameters: shape (A * F + A,), weight then bias.
        shape: (A, F).
        slices: the rows of each sampled patient, in any order, `max_slices` at most.
        max_slices: public; with it the batches have the same shape whoever is in them.
        weights: of each patient's rows in the mean, beside `slices`; None: all the same.
    Returns:
        float32, shapes (patients, A * F + A). Private, and not clipped.
    """
    num_outputs, num_features = shape
    layer = nn.Linear(num_features, num_outputs)
    _load(layer.parameters(), parameters)
    yield from ENGINES[engine](
        layer,
        Examples(inputs=lambda rows: features[rows], labels=labels),
        slices,
        max_slices=max_slices,
        rows_per_batch=HEAD_ROWS,
        weights=weights,
        loss=loss,
    )


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
