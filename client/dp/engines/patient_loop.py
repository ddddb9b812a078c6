"""Forward and backward for one patient after the other: exact for any layer, in the memory of one patient.

A patient's gradient is the ordinary gradient of the mean loss over that patient's slices, so that no layer
needs a rule of its own, and nobody else's slices are there to change a bit of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from client.dp.engines.examples import Examples, check_coverage, check_losses, trained_parameters
from common.losses import PerSampleLoss


def looped_gradients(
    network: nn.Module,
    examples: Examples,
    slices: list[np.ndarray],
    *,
    max_slices: int,
    rows_per_batch: int,
    weights: list[np.ndarray] | None = None,
    loss: PerSampleLoss,
) -> Iterator[np.ndarray]:
    """As `client.dp.engines.Engine`, one patient at a time; batches have the patient's own slices alone."""
    trained = trained_parameters(network)
    for number, rows in enumerate(slices):
        with torch.enable_grad():
            inputs = examples.inputs(rows)
            losses = loss(network(inputs), examples.labels[torch.as_tensor(rows).to(inputs.device)])
            check_losses(losses, len(rows))
            if weights is None:
                mean = losses.mean()
            else:
                mean = (losses * torch.as_tensor(weights[number], dtype=losses.dtype).to(losses.device)).sum()
            found = torch.autograd.grad(mean, list(trained.values()), allow_unused=True)
        gradients = {name: one for name, one in zip(trained, found, strict=True) if one is not None}
        check_coverage(trained, gradients)
        yield torch.cat([one.flatten() for one in gradients.values()])[None].cpu().numpy()
