"""Make public starting weights from a pre-training run on phantoms and public images: whiten the features,
write model and card.

    fedqc data phantom data/public --public --patients 24000 --seed 424242
    fedqc simulate configs/plans/pretrain_phantom.yaml --data data/public --out runs/pretrain
    python -m server.public_model.pretrain runs/pretrain common/models/small_cnn_phantoms.safetensors

`make real-start` makes the start that has seen people, small_cnn_real, in the same way. The run trains the
whole network; this module whitens what its head sees, on phantoms of public appearances that the run did not
see. Deterministic for a given machine and thread count. The seeds are none of a demo site's, and none of the
coordinator's public set.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.artifacts import DEFAULT_LABELS
from common.counts import auroc, per_patient
from common.errors import ConfigError
from common.files import write_bytes
from common.learning import extract_features, score, set_threads
from common.lineage import KEY, NO_DATA, Lineage, read_lineage
from common.model_file import labels_said, load_model, save_model
from common.models.small_cnn import SmallCNN
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import PublicSet
from common.public_phantoms import draw
from common.public_slices import Slices
from common.terminal import print
from common.weights import digest, flatten, manifest_of, unflatten
from server.public_model.public_set import public_set
from server.run_folder import MODEL, RunFolder

CARDS = {"pretrain-real": "card_real.md"}
"""Name of the plan that trained -> template of the card, beside this file; others are those of phantoms."""
PATIENTS, SEED = 1200, 515151
MIN_VARIANCE = 1e-2
"""Of the largest: directions that vary less are not blown up to unit variance; a private head would pay noise
for them all the same.
"""


def finish(
    model: SmallCNN,
    *,
    patients: int = PATIENTS,
    size: int = 128,
    labels: Sequence[str] = DEFAULT_LABELS,
) -> np.ndarray:
    """Whiten in place; the AUROC of each artifact on the coordinator's public set."""
    whiten(model, draw(PUBLIC_APPEARANCES, patients, SEED, size))
    held = public_set(PublicSet(), size, labels)
    logits = score(model, held.images, held.modality, np.arange(len(held.images)))
    return auroc(*per_patient(logits, held.labels, held.patients))


@torch.no_grad()
def whiten(model: SmallCNN, slices: Slices) -> None:
    """Turn and scale what the head sees to uncorrelated inputs of unit variance on public slices, and the
    head with them: no logit changes.

    A private head pays noise for every input alike, so its inputs should be uncorrelated and of equal size.
    """
    features = extract_features(model, slices.images, slices.modality, np.arange(len(slices.images))).astype(
        np.float64
    )
    values, vectors = np.linalg.eigh(np.cov(features.T))
    values, vectors = values[::-1], vectors[:, ::-1]
    scale = np.sqrt(np.maximum(values, MIN_VARIANCE * values[0]))
    weight, bias = (tensor.numpy().astype(np.float64) for tensor in (model.neck.weight, model.neck.bias))
    head, offset = (tensor.numpy().astype(np.float64) for tensor in (model.head.weight, model.head.bias))
    mean = features.mean(0)
    whitened = (
        (model.neck.weight, (vectors / scale).T @ weight),
        (model.neck.bias, (vectors / scale).T @ (bias - mean)),
        (model.head.weight, head @ (vectors * scale)),
        (model.head.bias, offset + head @ mean),
    )
    for parameter, value in whitened:
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def card(run: RunFolder, name: str, sha256: str, auroc: np.ndarray) -> str:
    """Markdown: what the weights are made of, and what they are not good for."""
    plan, manifest = run.plan, run.manifest
    scores = ", ".join(f"{name} {value:.2f}" for name, value in zip(plan.model.labels, auroc, strict=True))
    template = Path(__file__).with_name(CARDS.get(plan.name, "card_phantoms.md"))
    return template.read_text(encoding="utf-8").format(
        name=name,
        sha256=sha256,
        plan=plan.name,
        plan_sha256=plan.sha256(),
        seed=plan.seed,
        epochs=plan.epochs,
        threads=manifest["threads"],
        torch=torch.__version__.split("+")[0],
        rounds=plan.training.rounds,
        patients=PATIENTS,
        held=plan.public_set.patients,
        scores=scores,
    )


def public_lineage(run: RunFolder, flat: np.ndarray) -> Lineage:
    """The lineage of weights made from the model of a run, whose sites hold public or synthetic data only.

    Args:
        flat: the run's model, float32 (parameters,).
    Raises:
        ConfigError: a hospital took part, or the run's own starting weights were not public (code
            `non-private-ancestor`).
    """
    kinds = [site["kind"] for site in run.manifest["sites"]]
    start = read_lineage(run.path / MODEL) or NO_DATA  # runs of earlier versions: random weights
    if "hospital" in {*kinds, *start.kinds}:
        raise ConfigError(
            f"{run.path}: hospitals took part in this run or in its starting weights",
            code="non-private-ancestor",
            hint="a public model is made of phantoms and public images",
        )
    made_by = f"pretrain, plan {run.plan.name} {run.plan.sha256()}"
    return start.child(made_by, weights=digest(flat), kinds=kinds, private=True)


def main() -> None:
    folder, out = RunFolder.open(Path(sys.argv[1])), Path(sys.argv[2])
    set_threads(folder.manifest["threads"])
    labels = folder.plan.model.labels
    model = SmallCNN(len(labels))
    manifest = manifest_of(model.state_dict())
    flat = load_model(folder.path / MODEL, manifest)
    lineage = public_lineage(folder, flat)
    model.load_state_dict(unflatten(flat, manifest))
    auroc = finish(model, labels=labels)
    state = model.state_dict()
    save_model(
        out,
        flatten(state),
        manifest_of(state),
        {"trained_by": f"plan {folder.plan.name}", KEY: lineage.text()}
        | (labels_said(labels) if labels != DEFAULT_LABELS else {}),
    )
    sha256 = hashlib.sha256(out.read_bytes()).hexdigest()
    write_bytes(out.with_suffix(".md"), card(folder, out.stem, sha256, auroc).encode())
    print(f"sha256: {sha256}\npublic AUROC by artifact: {auroc.round(3)}", file=sys.stderr)


if __name__ == "__main__":
    main()
