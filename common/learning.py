"""Train and score a network on slices, and extract its features, in plain PyTorch.

One loop for a hospital, for the pooled baseline and for the public start, so that comparisons compare like
with like.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common.augmentation import augmenter
from common.losses import loss_of
from common.models import as_classifier
from common.optimizers import optimizer_of
from common.plan import Training
from common.preprocess import to_channels
from common.samplers import SAMPLERS

SCORING_BATCH = 64


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
    images: np.ndarray,
    modality: np.ndarray,
    rows: np.ndarray,
    size: int,
    augment: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(row numbers, (B, 2, S, S) float32 channels), `size` rows at a time, in the order of `rows`; where
    there is `augment`, of the slices that it makes of these and their modality.
    """
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        slices = images[chosen] if augment is None else augment(images[chosen], modality[chosen])
        yield chosen, torch.from_numpy(to_channels(slices, modality[chosen]))


def train_epochs(
    model: nn.Module,
    images: np.ndarray,
    modality: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    training: Training,
    seed: int,
    weights: np.ndarray | None = None,
    tick: Callable[[int], None] = lambda epochs: None,
) -> None:
    """`training.local_epochs` passes of the plan's optimizer over `rows` of a site's slices, in place.

    Args:
        images: (n, S, S) int16 as cached. modality: (n,) codes. labels: (n, A) float32, nan where not
            assessed.
        seed: decides the order of the slices and their augmentation, and nothing else is random.
        weights: (n,) of each slice's loss; None: all 1.
        tick: called before every batch with the number of finished passes; what it raises ends the training.
    """
    keep_freed_memory()
    of_samples = loss_of(training)
    rng = np.random.default_rng(seed)
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = optimizer_of(training, parameters)
    truth = torch.from_numpy(np.ascontiguousarray(labels, np.float32))
    sample, augment = SAMPLERS[training.sampler], augmenter(training.augment, seed)
    model.train()
    for epoch in range(training.local_epochs):
        order = sample(rows, modality, labels, rng)
        for chosen, x in batches(images, modality, order, training.batch_size, augment):
            tick(epoch)
            losses = of_samples(model(x), truth[chosen])
            loss = (losses if weights is None else losses * torch.from_numpy(weights[chosen])).mean()
            step(torch.autograd.grad(loss, parameters))


@torch.no_grad()
def score(model: nn.Module, images: np.ndarray, modality: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits of `rows`, float32 (len(rows), A)."""
    keep_freed_memory()
    model.eval()
    parts = [model(x).numpy() for _, x in batches(images, modality, rows, SCORING_BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


@torch.no_grad()
def extract_features(
    model: nn.Module, images: np.ndarray, modality: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """What the head sees for each of `rows`, float32 (len(rows), F)."""
    model.eval()
    network = as_classifier(model)
    return np.concatenate(
        [network.features(x).numpy() for _, x in batches(images, modality, rows, SCORING_BATCH)]
    )


def get_threads() -> int:
    """Threads that torch computes with in this process; another number may change the last bit of a
    result.
    """
    return torch.get_num_threads()


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
