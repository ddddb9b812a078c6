"""The public model: what a pre-training run on phantoms learned, made ready to start hospitals from, with its card.

    fedqc data phantom data/public --public --patients 6000 --seed 424242
    fedqc simulate configs/plans/pretrain_phantom.yaml --data data/public --out runs/pretrain
    python -m server.pretrain runs/pretrain common/models/small_cnn.safetensors

The run trains the whole network; this module whitens what its head sees and fits the head anew, both on phantoms of public appearances
that the run did not see. Deterministic for a given machine and thread count. The seeds are none of a demo site's, and none of the
coordinator's public set.
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
from common.files import write_bytes
from common.learning import SCORING_BATCH, batches, extract_features, score, set_threads
from common.model_file import load_model, save_model
from common.models.small_cnn import SmallCNN
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import PublicSet
from common.weights import flatten, manifest_of, unflatten
from server.public_set import Slices, draw, public_set
from server.runs import MODEL, RunFolder

PATIENTS, SEED = 900, 515151
RIDGE = 0.05


def finish(model: SmallCNN, *, patients: int = PATIENTS, size: int = 128) -> np.ndarray:
    """Whiten and fit the head in place; the AUROC of each artifact on the coordinator's public set."""
    slices = draw(PUBLIC_APPEARANCES, patients, SEED, size)
    whiten(model, slices)
    refit_head(model, slices)
    held = public_set(PublicSet(), size)
    logits = score(model, held.images, held.modality, np.arange(len(held.images)))
    return Counts.of(*per_patient(logits, held.labels, held.patients)).auroc()


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


def card(run: RunFolder, sha256: str, auroc: np.ndarray) -> str:
    """Markdown: what the weights are made of, and what they are not good for."""
    plan, manifest = run.plan, run.manifest
    scores = ", ".join(f"{name} {value:.2f}" for name, value in zip(NAMES, auroc, strict=True))
    return CARD.format(
        sha256=sha256,
        plan=plan.name,
        plan_sha256=plan.sha256(),
        seed=plan.seed,
        epochs=plan.epochs,
        threads=manifest["threads"],
        torch=torch.__version__.split("+")[0],
        patients=PATIENTS,
        held=plan.public_set.patients,
        scores=scores,
    )


CARD = """# small_cnn.safetensors

The public starting weights of fedqc: one network of 0.25 M parameters, five artifacts, 128 x 128 pixels.

- **SHA-256** `{sha256}`
- **Data**: computer-generated phantoms with simulated artifacts, and nothing else. No image of a person, no file of anybody's.
- **Made by**
  ```
  fedqc data phantom data/public --public --patients 6000 --seed 424242
  fedqc simulate configs/plans/pretrain_phantom.yaml --data data/public --out runs/pretrain
  python -m server.pretrain runs/pretrain common/models/small_cnn.safetensors
  ```
  plan `{plan}` ({plan_sha256:.12}), seed {seed}, {epochs} epochs, {threads} threads, torch {torch}; not private, for there is nobody to
  protect. The neck whitens the pooled features of {patients} other phantoms, the head is a ridge-penalised logistic regression on them.
- **Score** on {held} phantoms it never saw, AUROC a patient: {scores}.
- **On real slices** with simulated artifacts: docs/physics.md, by artifact, severity and folder.

## Limits

Chosen and tuned on phantoms, while looking at real slices of nine scanners: those are no untouched test. Phantoms are ellipses and smooth
textures: a real image without artifact may score high for a reason no phantom has. Scores are no probabilities of a hospital, for the
prevalence in the training data is invented; use ranks, or fit thresholds on one's own data. Not a medical device.
"""


def main() -> None:
    folder, out = RunFolder.open(Path(sys.argv[1])), Path(sys.argv[2])
    set_threads(folder.manifest["threads"])
    model = SmallCNN(len(NAMES))
    manifest = manifest_of(model.state_dict())
    model.load_state_dict(unflatten(load_model(folder.path / MODEL, manifest), manifest))
    auroc = finish(model)
    state = model.state_dict()
    save_model(out, flatten(state), manifest_of(state), {"trained_by": "configs/plans/pretrain_phantom.yaml", "data": "public phantoms"})
    sha256 = hashlib.sha256(out.read_bytes()).hexdigest()
    write_bytes(out.with_suffix(".md"), card(folder, sha256, auroc).encode())
    print(f"sha256: {sha256}\npublic AUROC by artifact: {auroc.round(3)}", file=sys.stderr)


if __name__ == "__main__":
    main()
