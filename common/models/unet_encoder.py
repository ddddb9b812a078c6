"""The contracting half of U-Net (Ronneberger et al., MICCAI 2015) as a classifier."""

from __future__ import annotations

from torch import nn

from common.models.blocks import ConvUnit, PooledClassifier, channels_in

WIDTHS = (64, 128, 256, 512, 1024)


def unet_encoder(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Five levels of two convolutions, 1024 features, at a sixteenth of the size."""
    stages: dict[str, nn.Module] = {}
    inputs = channels_in(neighbours)
    for number, width in enumerate(WIDTHS):
        pool = [nn.MaxPool2d(2)] if number else []
        stages[f"level{number + 1}"] = nn.Sequential(*pool, ConvUnit(inputs, width), ConvUnit(width, width))
        inputs = width
    return PooledClassifier(stages, inputs, artifacts)
