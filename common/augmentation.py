"""Random changes of slices that keep their labels true, and what the scanner could have made.

An artifact has an axis that its label does not name: motion ghosts and EPI distortion lie along phase
encoding, chemical shift along the readout, both along rows or columns of the image, and streaks are straight.
So there are two functions:

- `augment_slices` changes slices that may show an artifact already, and takes its axis along. Mirror images,
  quarter turns, other fields of view and off-centre patients are what a scanner makes with other settings. A
  free turn of an MR slice is not: ghosts would leave rows and columns. It turns CT slices only, whose
  geometry has no axis in the image. Nothing is bent.
- `augment_anatomy` changes slices before an artifact is simulated on them, so that the axis is right whatever
  the anatomy did: free turns in both modalities, and elastic deformation.

What is done never depends on a label: if only clean slices were turned freely or bent, the network would
learn to tell that from the rest. What lies outside of the image is air.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from common.artifacts import MODALITIES, Modality
from common.preprocess import CT_RANGE_HU, MR_CLIP, from_stored, to_stored

MAX_TURN_DEG = 15.0
MAX_SCALE = 1.1  # larger or smaller by at most this factor
MIN_CROP = 0.8  # of the side
MAX_SHIFT = 0.06  # of the side, along rows and along columns
MAX_GAMMA = 1.35  # MR: signal to the power gamma, or one over it
MAX_CT_ERROR = 0.03  # CT: relative error of attenuation, as between tube voltages
BEND, BEND_POINTS = 0.02, 4  # standard deviation, of the side, of the moves of so many points along each axis
DRAWS = 10
"""Random numbers of a slice, always as many, so that one change does not decide what is drawn for another."""

AIR_HU = CT_RANGE_HU[0]
_CT = MODALITIES.index("CT")


def augmenter(
    words: Sequence[str], seed: int, *, alike: int = 1
) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """What a training without noise does to each batch, or None where `words` names nothing.

    Args:
        words: `training.augment` of a plan. `elastic` is for `augment_anatomy` alone.
        seed: decides all that is drawn, batch after batch.
        alike: so many slices, one after the other, are changed in the same way.
    Returns:
        a function of stored slices, int16 (B, S, S), and their modality, (B,), that gives slices of the same
        form.
    """
    if not words:
        return None
    generator = torch.Generator().manual_seed(seed)
    return lambda stored, modality: augment_slices(stored, modality, words, generator, alike=alike)


def augment_slices(
    stored: np.ndarray,
    modality: np.ndarray,
    words: Sequence[str],
    generator: torch.Generator,
    *,
    alike: int = 1,
) -> np.ndarray:
    """Change slices that may show artifacts; the axes of the image stay axes.

    Args:
        stored: int16 (B, S, S), see common/preprocess.py. modality: (B,), positions in MODALITIES.
    Returns:
        the same form, each slice changed by draws of its own, or each `alike` of them by the same.
    """
    draws = torch.rand((len(stored) // alike, DRAWS), generator=generator).repeat_interleave(alike, 0)
    is_ct = torch.from_numpy(np.asarray(modality) == _CT)
    images = torch.empty(stored.shape)
    for code, name in enumerate(MODALITIES):
        of = np.flatnonzero(np.asarray(modality) == code)
        images[of] = torch.from_numpy(from_stored(stored[of], name))
    quarters = torch.floor(4 * draws[:, 2]) * (math.pi / 2)
    turns = torch.where(is_ct, _small_turn(draws), quarters)
    images = _moved(images, is_ct, _affine(draws, turns, words), None)
    images = _with_contrast(images, is_ct, draws, words)
    changed = np.empty_like(stored)
    for code, name in enumerate(MODALITIES):
        of = np.flatnonzero(np.asarray(modality) == code)
        changed[of] = to_stored(images[of].numpy(), name)
    return changed


def augment_anatomy(
    images: Sequence[np.ndarray], modality: Modality, words: Sequence[str], generator: torch.Generator
) -> list[np.ndarray]:
    """Change slices of one patient before an artifact is simulated on them: all of them alike.

    Args:
        images: float32 (S, S) each, HU or scaled MR.
    """
    draws = torch.rand((1, DRAWS), generator=generator).expand(len(images), -1)
    moves = BEND * 2 * torch.randn((1, 2, BEND_POINTS, BEND_POINTS), generator=generator)
    stack = torch.from_numpy(np.stack(images))
    is_ct = torch.full((len(images),), modality == "CT")
    bend = moves.expand(len(images), -1, -1, -1) if "elastic" in words else None
    stack = _moved(stack, is_ct, _affine(draws, _small_turn(draws), words), bend)
    return list(_with_contrast(stack, is_ct, draws, words).numpy())


def _small_turn(draws: Tensor) -> Tensor:
    return (2 * draws[:, 2] - 1) * math.radians(MAX_TURN_DEG)


def _affine(draws: Tensor, turns: Tensor, words: Sequence[str]) -> Tensor:
    """Where each pixel comes from, (B, 2, 3), in coordinates from -1 to 1 over the image."""
    one = torch.ones(len(draws))
    turns = turns if "rotation" in words else torch.zeros(len(draws))
    mirrors = torch.where(draws[:, :2] < 0.5, -1.0, 1.0) if "flip" in words else torch.ones((len(draws), 2))
    size = MAX_SCALE ** (2 * draws[:, 3] - 1) if "scale" in words else one
    crop = MIN_CROP + (1 - MIN_CROP) * draws[:, 4] if "crop" in words else one
    size = crop * size
    cosine, sine = turns.cos() * size, turns.sin() * size
    move = (2 * draws[:, 5:7] - 1) * (1 - crop)[:, None]
    if "shift" in words:
        move = move + (2 * draws[:, 7:9] - 1) * 2 * MAX_SHIFT
    rows = torch.stack([cosine, -sine, sine, cosine], dim=1).reshape(-1, 2, 2) * mirrors[:, None, :]
    return torch.cat([rows, move[:, :, None]], dim=2)


def _moved(images: Tensor, is_ct: Tensor, affine: Tensor, bend: Tensor | None) -> Tensor:
    """Images (B, S, S) by linear interpolation at other places; `bend` (B, 2, points, points) moves these."""
    identity = torch.eye(2, 3).expand(len(images), -1, -1)
    if bend is None and torch.equal(affine, identity):
        return images
    air = torch.where(is_ct, AIR_HU, 0.0)[:, None, None]
    side = images.shape[-1]
    grid = affine_grid(affine, [len(images), 1, side, side], align_corners=False)
    if bend is not None:
        grid = grid + interpolate(bend, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    found = grid_sample((images - air)[:, None], grid, align_corners=False)
    return found[:, 0] + air


def _with_contrast(images: Tensor, is_ct: Tensor, draws: Tensor, words: Sequence[str]) -> Tensor:
    """MR: another contrast of tissues. CT: attenuation a little off; HU are calibrated."""
    if "contrast" not in words:
        return images
    much = (2 * draws[:, 9] - 1)[:, None, None]
    attenuation = (images + 1000) * (1 + MAX_CT_ERROR * much) - 1000  # HU: 1000 (mu - mu_water) / mu_water
    signal = images.clamp(0, MR_CLIP) ** (MAX_GAMMA**much)
    return torch.where(is_ct[:, None, None], attenuation.clamp(*CT_RANGE_HU), signal.clamp(0, MR_CLIP))
