"""Centred Fourier transforms and the axes of a Cartesian MR acquisition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.errors import ImagingError

GYROMAGNETIC_HZ_PER_T = 42.577e6


def to_kspace(image: Tensor) -> Tensor:
    """Orthonormal 2-D transform over the last two axes, zero frequency in the middle."""
    return torch.fft.fftshift(
        torch.fft.fft2(torch.fft.ifftshift(image, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )


def to_image(kspace: Tensor) -> Tensor:
    """Inverse of `to_kspace`; complex."""
    return torch.fft.fftshift(
        torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )


def frequencies(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Cycles per pixel of centred k-space samples, shape (count,)."""
    return (torch.arange(count, dtype=torch.float32, device=device) - count // 2) / count


def check_phase_encoding(words: Sequence[str]) -> None:
    """Raises: ImagingError: a word that is neither "ROW" nor "COL"."""
    unknown = set(words) - {"ROW", "COL"}
    if unknown:
        raise ImagingError(
            f"phase encoding {sorted(unknown)!r}, expected 'ROW' or 'COL'", code="bad-phase-encoding"
        )


def readout_last(
    images: Sequence[Tensor], phase_encoding: Sequence[str], step: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Run `step` on tensors of shape (slices, PE, RO): slices with phase_encoding "ROW" are transposed before
    and after.

    Args:
        images: tensors of shape (slices, rows, columns), all alike.
        phase_encoding: "ROW" or "COL" for each slice; slices that are not square must agree.
    Raises:
        ImagingError: another word, or a mixture in slices that are not square.
    """
    check_phase_encoding(phase_encoding)
    turned = [word == "ROW" for word in phase_encoding]
    if not any(turned):
        return step(list(images))
    if all(turned):
        return [result.transpose(-2, -1) for result in step([image.transpose(-2, -1) for image in images])]
    if images[0].shape[-2] != images[0].shape[-1]:
        raise ImagingError(
            "slices that are not square must share one phase encoding", code="bad-phase-encoding"
        )
    choice = torch.tensor(turned, device=images[0].device)[:, None, None]
    results = step([torch.where(choice, image.transpose(-2, -1), image) for image in images])
    return [torch.where(choice, result.transpose(-2, -1), result) for result in results]


def with_mask(before: Tensor, after: Tensor, *, single: bool) -> tuple[Tensor, Tensor]:
    """The last step of every MR `apply`: the slices, and a bool map of pixels changed by more than 3 % of the
    slice's maximum.
    """
    mask = (after - before).abs() > 0.03 * before.amax((-2, -1), keepdim=True)
    return (after[0], mask[0]) if single else (after, mask)
