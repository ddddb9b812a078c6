"""Show where a network sees an artifact: maps that need its scores alone, or its gradients.

`occlusion` (Zeiler and Fergus, ECCV 2014) smooths the slice away at one place after the other and notes how
far the logit falls; `all_but` smooths away all but one place and notes how far the logit stays above that of
the smoothed slice. Both need no gradient, so an exported network can be explained. `grad_cam` (Selvaraju et
al., ICCV 2017) weighs the maps of a layer by the mean gradient of the logit. None is believed by itself:
`benchmarks/explanations.py` scores them against the masks of the simulators, and `tested` says of which
artifacts one showed more than the middle of the body does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from client.predict.model import Model
from client.predict.model import score as score_of
from common.artifacts import MODALITIES, Modality
from common.preprocess import from_stored, to_channels, to_stored
from common.strict import StrictModel, strict_yaml

if TYPE_CHECKING:
    from torch import Tensor, nn

PLACES = 8
"""A patch is an eighth of the side; patches overlap by half."""
FINEST = 8
"""Grad-CAM uses the last layer whose maps have at least so many places a side."""

Method = Literal["occlusion", "all_but", "grad_cam"]
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From int16 (n, S, S) slices as cached and their modality, int8 (n,), to logits (n, A)."""


class Tested(StrictModel):
    """What the maps of an artifact were worth against the simulator's masks, over people (95 %)."""

    passed: bool
    method: Method
    people: int = Field(ge=1)
    images: int = Field(ge=1)
    pointing: tuple[float, float, float]  # share whose largest value lies in the mask: value, low, high
    iou: tuple[float, float, float]  # overlap of the mask and as many of the map's largest pixels
    control_pointing: float  # the better one of middle of the body and random map
    control_iou: float


class Statement(StrictModel):
    """`explanations.yaml`: which artifacts passed, and of which model that was measured."""

    network: str
    model_sha256: str
    artifacts: dict[str, Tested]


@functools.cache
def statement() -> Statement:
    """What the package states, made by `benchmarks/explanations.py`."""
    found = strict_yaml(Path(__file__).with_name("explanations.yaml").read_bytes())
    for one in found["artifacts"].values():
        one |= {name: tuple(one[name]) for name in ("pointing", "iou")}
    return Statement.model_validate(found)


def tested(network: str, artifact: str) -> Tested | None:
    """The statement about an artifact in a network; None where there is none, or it did not pass.

    It holds for networks of one name: those that a federation trained further were not tested again.
    """
    found = statement()
    one = found.artifacts.get(artifact) if found.network == network else None
    return one if one is not None and one.passed else None


def map_of(model: Model, stored: np.ndarray, modality: Modality, artifact: str) -> np.ndarray | None:
    """Where a model sees an artifact, float32 (S, S), by the method that passed for it; None where none did.

    Args:
        stored: int16 (S, S) as cached.
    """
    found = tested(model.name, artifact)
    if found is None:
        return None
    output = model.labels.index(artifact)
    if found.method == "grad_cam":
        return grad_cam(model.network, stored, modality, output)

    def score(slices: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return score_of(model, slices, codes, np.arange(len(slices)))

    return (occlusion if found.method == "occlusion" else all_but)(score, stored, modality, output)


def occlusion(score: Score, stored: np.ndarray, modality: Modality, output: int) -> np.ndarray:
    """How far the logit falls where the slice is smoothed away, float32 (S, S), at least 0.

    Args:
        score: of the network, which may have been exported.
        stored: int16 (S, S) as cached.
        output: the number of the artifact among the network's outputs.
    """
    image = from_stored(stored, modality)
    fall, places = _patched(score, image, smoothed(image), modality, output)
    return _spread(-fall, places, len(stored))


def all_but(score: Score, stored: np.ndarray, modality: Modality, output: int) -> np.ndarray:
    """How much of the logit is there where all but one place is smoothed away, float32 (S, S), at least 0.

    Args:
        score, stored: as `occlusion`.
    """
    image = from_stored(stored, modality)
    rise, places = _patched(score, smoothed(image), image, modality, output)
    return _spread(rise, places, len(stored))


def smoothed(image: np.ndarray) -> np.ndarray:
    """Medians over about twice a patch, (S, S): anatomy stays in outline, and nothing fine."""
    from scipy.ndimage import median_filter

    coarse = max(1, len(image) // 32)
    width = 2 * (_patch(len(image)) // coarse) + 1
    return np.asarray(
        np.kron(median_filter(image[::coarse, ::coarse], size=width), np.ones((coarse, coarse), np.float32))
    )[: len(image), : len(image)]


def _patch(side: int) -> int:
    return max(4, side // PLACES)


def _window(size: int) -> np.ndarray:
    edge = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 0.5
    return np.outer(edge, edge).astype(np.float32)


def _patched(
    score: Score, below: np.ndarray, above: np.ndarray, modality: Modality, output: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """How the logit changes where a patch of one image replaces that of another; and the patches' corners."""
    size = _patch(len(below))
    window, starts = _window(size), range(0, len(below) - size + 1, max(2, size // 2))
    places = [(row, column) for row in starts for column in starts]
    slices = np.repeat(to_stored(below, modality)[None], len(places) + 1, axis=0)
    for number, (row, column) in enumerate(places):
        part = np.s_[row : row + size, column : column + size]
        changed = below.copy()
        changed[part] += window * (above[part] - below[part])
        slices[number] = to_stored(changed, modality)
    logits = score(slices, np.full(len(slices), MODALITIES.index(modality), np.int8))[:, output]
    return logits[:-1] - logits[-1], places


def _spread(values: np.ndarray, places: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """Values of overlapping patches as a map."""
    window = _window(_patch(side))
    total, weight = np.zeros((2, side, side), np.float32)
    for (row, column), value in zip(places, values, strict=True):
        part = np.s_[row : row + len(window), column : column + len(window)]
        total[part] += window * value
        weight[part] += window
    return np.maximum(total / np.maximum(weight, 1e-3), 0)


def grad_cam(network: nn.Module, stored: np.ndarray, modality: Modality, output: int) -> np.ndarray:
    """Grad-CAM of the last layer with at least `FINEST` places a side, float32 (S, S), at least 0."""
    import torch

    side = stored.shape[0]
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) >= FINEST:
            kept.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        x = to_channels(stored[None], np.array([MODALITIES.index(modality)], np.int8))
        logit = network.eval()(torch.from_numpy(x).requires_grad_())[0, output]
    finally:
        for hook in hooks:
            hook.remove()
    maps = kept[-1]
    (gradient,) = torch.autograd.grad(logit, maps)
    cam = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu().detach()
    return torch.nn.functional.interpolate(cam, (side, side), mode="bilinear")[0, 0].numpy()


def middle(stored: np.ndarray, modality: Modality) -> np.ndarray:
    """The control that knows no artifact: large in the middle of the body, float32 (S, S)."""
    import torch

    from client.views.acquisition import body_of

    body = body_of(torch.from_numpy(from_stored(stored, modality)), modality).numpy()
    rows, columns = np.nonzero(body) if body.any() else np.nonzero(np.ones_like(body))
    grid = np.indices(body.shape).astype(np.float32)
    distance = (grid[0] - rows.mean()) ** 2 / max(1.0, rows.var())
    distance += (grid[1] - columns.mean()) ** 2 / max(1.0, columns.var())
    return np.exp(-distance / 2)
