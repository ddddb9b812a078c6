"""Several slices of a series as one sample: features of each slice by any slice network, pooled, one head;
or the series of a study, whose pooled features are pooled again.

Slices never become samples: the slice network runs over the places of a study one after the other, each time
on one slice of every study, so that an engine of the private arm finds one row a study. A place without a
slice holds nan; it takes no part, whatever else is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from common.errors import PlanError
from common.plan import DEFAULT_STUDY_SERIES, DEFAULT_STUDY_SLICES

ATTENTION = 64
"""Hidden units of the attention."""
GRU = 64
"""Units of the recurrent state."""


class Mean(nn.Module):
    """The mean over slices."""

    def forward(self, features: Tensor, is_slice: Tensor) -> Tensor:
        """(B, S, F) features and (B, S) whether there is a slice, to (B, F)."""
        found = features * is_slice[:, :, None]
        return found.sum(1) / is_slice.sum(1, keepdim=True).clamp(min=1)


class Max(nn.Module):
    """The maximum over slices, of each feature."""

    def forward(self, features: Tensor, is_slice: Tensor) -> Tensor:
        """As `Mean`."""
        return features.masked_fill(~is_slice[:, :, None], -torch.inf).amax(1)


class GatedAttention(nn.Module):
    """A weighted mean over slices, with weights softmax(w · (tanh(V h) * sigmoid(U h))) of their features h.

    Reference: Ilse, Tomczak & Welling, Attention-based deep multiple instance learning, ICML 2018, eq. 9.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tanh = nn.Linear(width, ATTENTION)
        self.gate = nn.Linear(width, ATTENTION)
        self.weight = nn.Linear(ATTENTION, 1, bias=False)

    def forward(self, features: Tensor, is_slice: Tensor) -> Tensor:
        """As `Mean`."""
        scores = self.weight(self.tanh(features).tanh() * self.gate(features).sigmoid())
        shares = scores.masked_fill(~is_slice[:, :, None], -torch.inf).softmax(1)
        return (shares * features).sum(1)


class GatedRecurrence(nn.Module):
    """The last state of a GRU (Cho et al., EMNLP 2014) over the slices in their order, as `torch.nn.GRU`
    computes it; of linear layers, whose gradients of each sample Opacus knows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_input = nn.Linear(width, 3 * GRU)
        self.of_state = nn.Linear(GRU, 3 * GRU)

    def forward(self, features: Tensor, is_slice: Tensor) -> Tensor:
        """As `Mean`, to (B, GRU)."""
        state = features.new_zeros(len(features), GRU)
        for place in range(features.shape[1]):
            reset, update, new = self.of_input(features[:, place]).chunk(3, 1)
            reset_by_state, update_by_state, new_by_state = self.of_state(state).chunk(3, 1)
            keep = (update + update_by_state).sigmoid()
            candidate = (new + (reset + reset_by_state).sigmoid() * new_by_state).tanh()
            after = (1 - keep) * candidate + keep * state
            state = torch.where(is_slice[:, place, None], after, state)
        return state


class StudyNetwork(nn.Module):
    """(B, S, 2, side, side) studies to (B, artifacts) logits; slices (B, 2, side, side) are studies of one.
    With `fusion` the places of several series follow one another.

    Its tensors have the names that they have in the slice network, so that weights of a slice network are a
    start for `mean` and `max`, which add none.

    Args:
        network: of slices; its parts become those of this network.
        pooling: (B, S, F) features, (B, S) whether there is a slice -> (B, width).
        head: width -> artifacts.
        fusion: what pools the vectors of series, as `pooling` those of slices; None: there is one series.
        slices: places of a series, where there is `fusion`.
    """

    def __init__(
        self,
        network: nn.Module,
        pooling: nn.Module,
        head: nn.Linear,
        fusion: Mean | Max | None,
        slices: int,
    ) -> None:
        super().__init__()
        network._modules.pop("head", None)
        self._network = [network]  # in a list: no module beside its parts, which both have as their own
        self._modules = network._modules
        self.pooling = pooling
        self.fusion = fusion
        self.slices = slices
        self.head = head

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, shape (B, width)."""
        if x.ndim == 4:
            x = x[:, None]
        of_slices: Callable[[Tensor], Tensor] = self._network[0].features  # type: ignore[assignment]
        found = torch.stack([of_slices(x[:, place].nan_to_num()) for place in range(x.shape[1])], 1)
        is_slice = ~x[:, :, 0, 0, 0].isnan()
        if self.fusion is None:
            return self.pooling(found, is_slice)
        parts = zip(found.split(self.slices, 1), is_slice.split(self.slices, 1), strict=True)
        return self._fused(self.fusion, list(parts))

    def _fused(self, fusion: Mean | Max, series: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(B, width) of features and whether there is a slice, of each series."""
        is_series = torch.stack([is_slice.any(1) for _, is_slice in series], 1)
        # zeros stand for the slices of a series that is not there: nothing is infinite, and it is left out
        pooled = [self.pooling(one, is_slice | ~is_slice.any(1, keepdim=True)) for one, is_slice in series]
        return fusion(torch.stack(pooled, 1), is_series)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def study(
    networks: Mapping[str, Callable[..., nn.Module]],
    artifacts: int,
    *,
    slice_network: str = "small_cnn",
    pooling: Literal["mean", "max", "attention", "gru"] = "attention",
    slices: Literal[2, 4, 8, 16, 32] = DEFAULT_STUDY_SLICES,
    fusion: Literal["none", "mean", "noisy_or", "mean_features", "max_features"] = "none",
    series: Literal[2, 4, 8] = DEFAULT_STUDY_SERIES,
) -> nn.Module:
    """A network of studies.

    Args:
        networks: of slices, by name.
        slice_network: one of these, without arguments of its own.
        slices: of a series that are looked at, see `common.studies`; no tensor depends on it.
        fusion: of the series of a study: of their features here; of their probabilities, `mean` and
            `noisy_or`, where patients are scored, see `common.studies`. No tensor depends on it.
        series: of a study that are looked at, where features are fused.
    Raises:
        PlanError: there is no such slice network (code `bad-model-args`).
    """
    if slice_network not in networks:
        raise PlanError(
            f"model.args.slice_network = {slice_network!r} is unknown",
            code="bad-model-args",
            hint=f"known: {', '.join(networks)}",
        )
    network = networks[slice_network](artifacts)
    head = cast(nn.Linear, network.head)
    width = head.in_features
    pooled: nn.Module
    match pooling:
        case "mean":
            pooled = Mean()
        case "max":
            pooled = Max()
        case "attention":
            pooled = GatedAttention(width)
        case "gru":
            pooled, head = GatedRecurrence(width), nn.Linear(GRU, artifacts)
    of_series: Mean | Max | None = None
    if fusion == "mean_features":
        of_series = Mean()
    elif fusion == "max_features":
        of_series = Max()
    return StudyNetwork(network, pooled, head, of_series, slices)
