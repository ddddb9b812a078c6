"""Cached slices on a device other than the CPU, and what the network sees of them there."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from common.artifacts import MODALITIES
from common.devices import device
from common.preprocess import MR_STEPS, SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU

_SHARE_OF_MEMORY = 0.5  # of what a GPU has free: so much of it may hold the slices of a site


class SlicesOnDevice:
    """The slices of a site for a device other than the CPU: all of them lie there where they fit, else they
    follow as they are asked for. What was moved last is kept, so that rounds and epochs do not move it again.

    Args:
        images, modality: as `train_epochs`.
    """

    _kept: tuple[weakref.ref[np.ndarray], torch.device, Tensor] | None = None

    def __init__(self, images: np.ndarray, modality: np.ndarray) -> None:
        self._images, self._modality, self._there = images, modality, None
        kept = SlicesOnDevice._kept
        if kept is not None and kept[0]() is images and kept[1] == device():
            self._there = kept[2]
        elif images.nbytes <= _SHARE_OF_MEMORY * _free_memory():
            SlicesOnDevice._kept = None  # before the next takes its place
            self._there = torch.from_numpy(np.ascontiguousarray(images)).to(device())
            SlicesOnDevice._kept = weakref.ref(images), device(), self._there

    def channels(self, rows: np.ndarray) -> Tensor:
        """What the network sees of `rows`, on the device."""
        if self._there is not None:
            stored = self._there[torch.as_tensor(rows, device=device())]
        else:
            stored = torch.from_numpy(self._images[rows])
            if device().type == "cuda":
                stored = stored.pin_memory()
            stored = stored.to(device(), non_blocking=True)
        return channels_of(stored, torch.as_tensor(self._modality[rows], device=device()))


def _free_memory() -> int:
    return torch.cuda.mem_get_info(device())[0] if device().type == "cuda" else 1 << 62


def channels_of(stored: Tensor, modality: Tensor) -> Tensor:
    """As `to_channels`, by torch on the device of its inputs: the same up to rounding.

    Args:
        stored: int16, shape (n, S, S). modality: shape (n,).
    """
    if stored.ndim == 2:
        return stored
    is_ct = (modality == MODALITIES.index("CT"))[:, None, None]
    values = stored.to(torch.float32)
    soft, wide = (
        ((values - low) * (1.0 / (high - low))).clamp(0.0, 1.0)
        for low, high in (SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU)
    )
    scaled = values * (1.0 / MR_STEPS)
    spectrum = torch.log1p(torch.fft.fftshift(torch.fft.fft2(scaled), dim=(-2, -1)).abs())
    peak = spectrum.amax(dim=(-2, -1), keepdim=True)
    spectrum = torch.where(peak > 0, spectrum / peak, torch.zeros_like(spectrum))
    return torch.stack([torch.where(is_ct, soft, scaled), torch.where(is_ct, wide, spectrum)], dim=1)
