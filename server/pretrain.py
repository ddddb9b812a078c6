"""The public start: weights trained on phantoms of public appearances, committed in common/models/.

    python -m server.pretrain common/models/small_cnn.safetensors

Deterministic for a given machine and thread count. The phantoms' seeds and appearances are none of any site's, and none
of the coordinator's public set.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.artifacts import NAMES
from common.counts import Counts, per_patient
from common.learning import SCORING_BATCH, batches, extract_features, score, train_epochs
from common.model_file import save_model
from common.models.small_cnn import SmallCNN
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import PublicSet, Training
from common.weights import flatten, manifest_of
from server.public_set import Slices, draw, measure, public_set

PATIENTS, SEED, SIZE = 900, 424242, 128
SCHEDULE = ((6, 2e-3), (4, 1e-3), (3, 3e-4))
"""(epochs, learning rate)"""
RIDGE = 0.05


def pretrain(*, patients: int = PATIENTS, schedule: tuple[tuple[int, float], ...] = SCHEDULE) -> SmallCNN:
    """Train a network on public phantoms and whiten what its head sees."""
    torch.manual_seed(SEED)
    slices = draw(PUBLIC_APPEARANCES, patients, SEED, SIZE)
    held = public_set(PublicSet(), SIZE)
    model = SmallCNN(len(NAMES))
    rows = np.arange(len(slices.images))
    print(f"{len(rows)} slices of {patients} public phantoms", file=sys.stderr)
    for stage, (epochs, rate) in enumerate(schedule):
        for epoch in range(epochs):
            training = Training(rounds=1, local_epochs=1, learning_rate=rate, weight_decay=1e-2)
            train_epochs(model, slices.images, slices.modality, slices.labels, rows, training=training, seed=1000 * stage + epoch)
            print(f"stage {stage} epoch {epoch}: {measure(model, held, 'bce')}", file=sys.stderr)
    whiten(model, slices)
    refit_head(model, slices)
    logits = score(model, held.images, held.modality, np.arange(len(held.images)))
    print(f"public AUROC by artifact: {Counts.of(*per_patient(logits, held.labels, held.patients)).auroc().round(3)}", file=sys.stderr)
    return model


@torch.no_grad()
def whiten(model: SmallCNN, slices: Slices) -> None:
    """Replace the neck by the leading principal components of the pooled features on public slices, at unit variance.

    A private head pays noise for every input alike, so its inputs should be few, uncorrelated and of equal size.
    """
    pooled = np.concatenate(
        [model.pooled(x).numpy() for _, x in batches(slices.images, slices.modality, np.arange(len(slices.images)), SCORING_BATCH)]
    ).astype(np.float64)
    mean, deviation = pooled.mean(0), pooled.std(0) + 1e-6
    values, vectors = np.linalg.eigh(np.cov(((pooled - mean) / deviation).T))
    leading = np.argsort(values)[::-1][: model.neck.out_features]
    weight = (vectors[:, leading] / np.sqrt(values[leading])).T / deviation
    model.neck.weight.copy_(torch.from_numpy(weight))
    model.neck.bias.copy_(torch.from_numpy(-weight @ mean))


def refit_head(model: SmallCNN, slices: Slices) -> None:
    """Ridge-penalised logistic regression of each artifact on the whitened features, from zero."""
    features = torch.from_numpy(extract_features(model, slices.images, slices.modality, np.arange(len(slices.images))))
    labels = torch.from_numpy(slices.labels)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        assessed = ~labels.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(model.head(features)[assessed], labels[assessed], reduction="sum")
        value = losses / len(labels) + 0.5 * RIDGE * model.head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(objective)


def main() -> None:
    out = Path(sys.argv[1])
    model = pretrain()
    state = model.state_dict()
    save_model(out, flatten(state), manifest_of(state), {"trained_by": "python -m server.pretrain", "data": "public phantoms"})
    print(f"sha256: {hashlib.sha256(out.read_bytes()).hexdigest()}", file=sys.stderr)


if __name__ == "__main__":
    main()
