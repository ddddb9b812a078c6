"""VGG-16 and VGG-19 (Simonyan & Zisserman, ICLR 2015), with GroupNorm after each convolution.

The three linear layers of the original (120 M parameters at 224 pixels) fix the size of the input; the mean
over places and one linear head take their place.
"""

from __future__ import annotations

from torch import nn

from common.models.blocks import ConvUnit, PooledClassifier, channels_in

WIDTHS = (64, 128, 256, 512, 512)


def _vgg(counts: tuple[int, ...], artifacts: int, neighbours: bool) -> nn.Module:
    """`counts`: convolutions of each stage."""
    stages: dict[str, nn.Module] = {}
    inputs = channels_in(neighbours)
    for number, (count, width) in enumerate(zip(counts, WIDTHS, strict=True)):
        units = [ConvUnit(width if place else inputs, width) for place in range(count)]
        stages[f"stage{number + 1}"] = nn.Sequential(*units, nn.MaxPool2d(2))
        inputs = width
    return PooledClassifier(stages, inputs, artifacts)


def vgg16(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Thirteen convolutions, 512 features."""
    return _vgg((2, 2, 3, 3, 3), artifacts, neighbours)


def vgg19(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Sixteen convolutions, 512 features."""
    return _vgg((2, 2, 4, 4, 4), artifacts, neighbours)
