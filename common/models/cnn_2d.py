"""A plain network: four convolutions, each with a maximum of 2×2, no shortcut and no gate."""

from __future__ import annotations

from torch import nn

from common.models.blocks import ConvUnit, PooledClassifier, channels_in

WIDTHS = (32, 64, 128, 256)


def cnn_2d(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """256 features, at a sixteenth of the size."""
    stages: dict[str, nn.Module] = {}
    inputs = channels_in(neighbours)
    for number, width in enumerate(WIDTHS):
        stages[f"stage{number + 1}"] = nn.Sequential(ConvUnit(inputs, width), nn.MaxPool2d(2))
        inputs = width
    return PooledClassifier(stages, inputs, artifacts)
