"""Train and score a network on slices or studies, and extract its features, in plain PyTorch.

One loop for a hospital, for the pooled baseline and for the public start, so that comparisons compare like
with like.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.artifacts import DEFAULT_LABELS
from common.augmentation import augmenter
from common.device_slices import SlicesOnDevice
from common.devices import device, on_device
from common.errors import RefusedError
from common.losses import loss_of
from common.models import as_classifier
from common.optimizers import optimizer_of
from common.plan import Training
from common.preprocess import to_channels
from common.samplers import SAMPLERS
from common.studies import Images, StudyImages

SCORING_BATCH = 64
"""Slices; of studies as many as have so many places."""


def seed_for(seed: int, site: str, round_number: int) -> int:
    """The seed of one site's shuffles in one round: derived, never carried, so that a resumed run repeats
    it.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{site}/{round_number}".encode()).digest()[:7], "little")


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc not to return a batch's memory to the kernel: faulting it in again costs a sixth of the CPU
    of training.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 256 << 20)
        library.mallopt(mmap_threshold, 32 << 20)


def batches(
    images: Images,
    modality: np.ndarray,
    rows: np.ndarray,
    size: int,
    augment: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(row numbers, (B, 2, S, S) float32 channels on the device), `size` rows at a time, in the order of
    `rows`; where there is `augment`, of the slices that it makes of these and their modality. Of studies
    their channels, (B, slices, 2, S, S), of slices with neighbours (B, 6, S, S).
    """
    if isinstance(images, StudyImages):
        see = _channels_of(images.slices, images.modality, augment)
    else:
        see = _channels_of(images, modality, augment)
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        yield chosen, images.channels(chosen, see) if isinstance(images, StudyImages) else see(chosen)


def _channels_of(
    images: np.ndarray,
    modality: np.ndarray,
    augment: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
) -> Callable[[np.ndarray], Tensor]:
    """What gives the channels of slices, on the device, by their rows."""
    if device().type != "cpu" and augment is None:
        return SlicesOnDevice(images, modality).channels

    def see(rows: np.ndarray) -> Tensor:
        slices = images[rows] if augment is None else augment(images[rows], modality[rows])
        return torch.from_numpy(to_channels(slices, modality[rows])).to(device())

    return see


def train_epochs(
    model: nn.Module,
    images: Images,
    modality: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    training: Training,
    seed: int,
    weights: np.ndarray | None = None,
    outputs: Sequence[str] = DEFAULT_LABELS,
    tick: Callable[[int], None] = lambda epochs: None,
) -> None:
    """`training.local_epochs` passes of the plan's optimizer over `rows` of a site's slices, in place.

    Args:
        images: (n, S, S) int16 as cached, or n studies: what is said of slices then holds of studies.
            modality: (n,) codes. labels: (n, A) float32, nan where not
            assessed.
        seed: decides the order of the slices, their augmentation and what drops out; nothing else is random.
        weights: (n,) of each slice's loss; None: all 1.
        outputs: what the columns of `labels` are, `model.labels` of a plan.
        tick: called before every batch with the number of finished passes; what it raises ends the training.
    Raises:
        RefusedError: half a batch does not fit into the memory of the device either (code `out-of-memory`).
    """
    keep_freed_memory()
    of_samples = loss_of(training, labels=outputs)
    rng = np.random.default_rng(seed)
    model.train()
    with on_device(model) as where, _laid_out(model, training.memory_format) as laid_out:
        parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        step = optimizer_of(training, parameters)
        truth = torch.from_numpy(np.ascontiguousarray(labels, np.float32)).to(where)
        halves = training.precision == "bf16"
        network = as_classifier(model)
        coins = torch.Generator().manual_seed(seed)
        shares = None if weights is None else torch.from_numpy(weights).to(where)

        def gradients(chosen: np.ndarray, x: Tensor) -> tuple[Tensor, ...]:
            own = torch.as_tensor(chosen, device=where)
            with torch.autocast(where.type, torch.bfloat16) if halves else contextlib.nullcontext():
                logits = (
                    network.head(_dropped_out(network.features(x), training.dropout, coins))
                    if training.dropout
                    else model(x)
                ).float()
            losses = of_samples(logits, truth[own])
            return torch.autograd.grad(
                (losses if shares is None else losses * shares[own]).mean(), parameters
            )

        fitting = _Fitting(gradients, training.batch_size)
        alike = images.rows.shape[1] if isinstance(images, StudyImages) and images.is_stacked else 1
        sample, augment = SAMPLERS[training.sampler], augmenter(training.augment, seed, alike=alike)
        for epoch in range(training.local_epochs):
            order = sample(rows, modality, labels, rng)
            for chosen, x in batches(images, modality, order, training.batch_size, augment):
                tick(epoch)
                step(fitting(chosen, laid_out(x)))


@contextlib.contextmanager
def _laid_out(
    model: nn.Module, memory_format: Literal["contiguous", "channels_last"]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """While open, weights are laid out in memory so; gives what lays out channels. Of studies, which have an
    axis more, the first convolution does that.
    """
    if memory_format == "contiguous":
        yield lambda tensor: tensor
        return

    def lay_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    for parameter in model.parameters():
        parameter.data = lay_out(parameter.data)
    try:
        yield lay_out
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()


def _dropped_out(features: Tensor, share: float, coins: torch.Generator) -> Tensor:
    """Features, shape (B, F), a share of them 0 and the others larger, so that the mean stays."""
    keeps = (torch.rand(features.shape, generator=coins) >= share) / (1 - share)
    return features * keeps.to(features)


class _Fitting:
    """Gradients of batches, halved once a batch does not fit into the memory of the device: the mean over the
    batch stays what it is, up to rounding. Depends on the machine and on public sizes alone.
    """

    def __init__(
        self, gradients: Callable[[np.ndarray, Tensor], tuple[Tensor, ...]], batch_size: int
    ) -> None:
        self._gradients, self._batch_size, self._is_halved = gradients, batch_size, False

    def __call__(self, chosen: np.ndarray, x: Tensor) -> tuple[Tensor, ...]:
        if not self._is_halved:
            try:
                return self._gradients(chosen, x)
            except torch.OutOfMemoryError:
                self._is_halved = True
        try:
            return self._in_parts(chosen, x, math.ceil(self._batch_size / 2))
        except torch.OutOfMemoryError:
            pass
        fits = self._fits(chosen, x)
        raise RefusedError(
            f"a batch of {self._batch_size} slices does not fit into the memory of {device()}, nor does half",
            code="out-of-memory",
            public_reason=(
                f"training.batch_size = {self._batch_size} exceeds the memory of the site's device; "
                + (f"{fits} would" if fits else "nor does one slice of this network")
            ),
            hint="end other programs on it, choose device: cpu in site.yaml, or ask for smaller batches",
        )

    def _in_parts(self, chosen: np.ndarray, x: Tensor, size: int) -> tuple[Tensor, ...]:
        total: list[Tensor] | None = None
        for start in range(0, len(chosen), size):
            part = slice(start, start + size)
            share = len(chosen[part]) / len(chosen)
            found = [one * share for one in self._gradients(chosen[part], x[part])]
            total = found if total is None else list(torch._foreach_add(total, found))
        assert total is not None
        return tuple(total)

    def _fits(self, chosen: np.ndarray, x: Tensor) -> int:
        """The largest batch that could be trained: twice as many slices as fit at a time; 0 if none does."""
        low, high = 0, len(chosen)  # `low` fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._gradients(chosen[:middle], x[:middle])
                low = middle
            except torch.OutOfMemoryError:
                high = middle
        return 2 * low


@torch.no_grad()
def score(model: nn.Module, images: Images, modality: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits of `rows`, float32 (len(rows), A)."""
    keep_freed_memory()
    model.eval()
    with on_device(model):
        parts = [model(x).cpu().numpy() for _, x in batches(images, modality, rows, _scoring_batch(images))]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


@torch.no_grad()
def extract_features(model: nn.Module, images: Images, modality: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What the head sees for each of `rows`, float32 (len(rows), F)."""
    model.eval()
    network = as_classifier(model)
    with on_device(model):
        return np.concatenate(
            [
                network.features(x).cpu().numpy()
                for _, x in batches(images, modality, rows, _scoring_batch(images))
            ]
        )


def _scoring_batch(images: Images) -> int:
    """How many samples are scored at once."""
    places = images.rows.shape[1] if isinstance(images, StudyImages) and not images.is_stacked else 1
    return max(1, SCORING_BATCH // places)


def get_threads() -> int:
    """Threads that torch computes with in this process; another number may change the last bit of a
    result.
    """
    return torch.get_num_threads()


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
