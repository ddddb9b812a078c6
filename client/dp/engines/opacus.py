"""Per-slice gradients by Opacus' hooks (GradSampleModule), averaged by patient.

Gradients of many patients are computed at once. A processor's matrix product may round a row differently in
another batch, which would let one patient change the last bits of another's gradient. So every batch has the
same public number of rows, filled up with rows that teach nothing, and a patient is in one batch only. That
a row then has the same bits whatever its place and its company is tested, not proven: it depends on the
library that multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from client.dp.clipping import patient_means
from client.dp.engines.examples import Examples, check_coverage, check_losses, trained_parameters
from common.errors import ConfigError
from common.losses import PerSampleLoss


def hooked_gradients(
    network: nn.Module,
    examples: Examples,
    slices: list[np.ndarray],
    *,
    max_slices: int,
    rows_per_batch: int,
    weights: list[np.ndarray] | None = None,
    loss: PerSampleLoss,
) -> Iterator[np.ndarray]:
    """As `client.dp.engines.Engine`."""
    num_rows = rows_per_batch * math.ceil(max_slices / rows_per_batch)
    done = 0
    for batch in whole_patients(slices, num_rows):
        own, done = None if weights is None else weights[done : done + len(batch)], done + len(batch)
        inputs = torch.cat([examples.inputs(rows) for rows in batch])
        where = inputs.device
        owner = torch.as_tensor(np.repeat(np.arange(len(batch)), [len(part) for part in batch])).to(where)
        x = torch.zeros(num_rows, *inputs.shape[1:], dtype=inputs.dtype, device=where)
        y = torch.full(
            (num_rows, examples.labels.shape[1]), torch.nan, dtype=examples.labels.dtype, device=where
        )
        x[: len(owner)] = inputs
        y[: len(owner)] = examples.labels[torch.as_tensor(np.concatenate(batch)).to(where)]
        per_slice = opacus_gradients(network, x, y, loss)
        share = None if own is None else torch.as_tensor(np.concatenate(own), dtype=y.dtype).to(where)
        means = [patient_means(one[: len(owner)].flatten(1), owner, len(batch), share) for one in per_slice]
        yield torch.cat(means, dim=1).cpu().numpy()


def opacus_gradients(network: nn.Module, inputs: Tensor, labels: Tensor, loss: PerSampleLoss) -> list[Tensor]:
    """Per-slice gradients of the trained parameters from Opacus' hooks, shapes (slices, *parameter)."""
    trained = trained_parameters(network)
    try:
        module = GradSampleModule(network, batch_first=True, loss_reduction="sum")
    except NotImplementedError as refusal:
        raise ConfigError(
            f"Opacus has no per-sample gradient for this network: {refusal}", code="uncovered-parameter"
        ) from None
    try:
        with torch.enable_grad():
            # so that torch calls the first module's backward hook as it should
            logits = module(inputs.detach().requires_grad_(True))
            check_losses(loss(logits, labels), len(inputs)).sum().backward()
        found = {name: getattr(one, "grad_sample", None) for name, one in network.named_parameters()}
        gradients = {name: one for name, one in found.items() if isinstance(one, Tensor)}
        check_coverage(trained, gradients)
        return [gradients[name] for name in trained]
    finally:
        module.to_standard_module()
        network.zero_grad(set_to_none=True)


def whole_patients(slices: list[np.ndarray], num_rows: int) -> Iterator[list[np.ndarray]]:
    """Whole patients, so many that their rows fit into `num_rows`."""
    batch: list[np.ndarray] = []
    room = num_rows
    for rows in slices:
        if len(rows) > room:
            yield batch
            batch, room = [], num_rows
        batch.append(rows)
        room -= len(rows)
    if batch:
        yield batch
