"""Make the model of a run smaller on public images: distil it into another network, set small weights to 0.

    python -m server.public_model.compress RUN OUT.safetensors --into small_cnn --prune 0.5

No hospital is asked, and nothing is spent: it is post-processing of a model that was released. The images are
phantoms of public appearances, drawn from a seed. What comes out is scored beside its teacher on the public
set of the run's plan, which it was not trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.cli import Format
from common.errors import ConfigError, FedqcError
from common.learning import score, set_threads, train_epochs
from common.lineage import KEY, read_lineage
from common.model_file import load_model, save_model
from common.models import build, fresh, network_of
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import RunPlan, Training
from common.public_phantoms import draw
from common.public_slices import Slices
from common.terminal import print
from common.weights import digest, flatten, manifest_of, unflatten
from server.public_model.public_set import measure, public_set
from server.run_folder import MODEL, RunFolder

PATIENTS, SEED = 1200, 616161
"""Of the phantoms that are learned from; the seed is none of a demo site's nor of a public set."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What became of a model."""

    network: nn.Module
    scores: dict[str, dict[str, float]]  # teacher, and each step: parameters that are not 0, macro AUROC


def distilled(
    teacher: nn.Module,
    student: nn.Module,
    slices: Slices,
    *,
    training: Training,
    seed: int,
    share: float = 0.5,
) -> None:
    """Train `student` to say what `teacher` says, in place (Hinton, Vinyals, Dean, arXiv 1503.02531, at
    temperature 1: an output is a yes or no, whose probability is its soft target).

    Args:
        slices: public ones. Where no label stands the teacher is not asked either.
        share: of the target that is the teacher's; the rest is the label.
    """
    rows = np.arange(len(slices.images))
    said = 1 / (1 + np.exp(-score(teacher, slices.images, slices.modality, rows).astype(np.float64)))
    targets = (share * said + (1 - share) * slices.labels).astype(np.float32)
    train_epochs(student, slices.images, slices.modality, targets, rows, training=training, seed=seed)


def pruned(network: nn.Module, share: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Set the smallest weights of all layers together to 0, in place (Han et al., NeurIPS 2015), and keep
    them so in further training.

    Args:
        share: of the weights of convolutions and linear layers.
    Returns:
        handles; `remove()` lets the weights move again.
    """
    weights = [one for one in network.parameters() if one.ndim > 1]
    sizes = torch.cat([one.detach().abs().flatten() for one in weights])
    limit = sizes.sort().values[min(int(share * len(sizes)), len(sizes) - 1)]
    handles = []
    for one in weights:
        stays = one.detach().abs() >= limit
        with torch.no_grad():
            one.mul_(stays)
        handles.append(one.register_hook(lambda gradient, stays=stays: gradient * stays))
    return handles


def compress(
    plan: RunPlan,
    teacher: nn.Module,
    *,
    into: str | None,
    prune: float,
    epochs: int,
    patients: int = PATIENTS,
) -> Compressed:
    """Distil and prune, and score each step.

    Args:
        plan: of the run, for its images and its training.
        into: name of the student; None: the teacher itself is pruned.
        prune: share of weights that become 0; 0: none.
    Raises:
        ConfigError: there is nothing to do, or a number is out of range (code `bad-argument`).
    """
    if (into is None and not prune) or not 0 <= prune < 1 or epochs < 1:
        raise ConfigError(
            f"--prune {prune:g}, --epochs {epochs}: nothing to do, or out of range",
            code="bad-argument",
            hint="--into NETWORK, or --prune of 0 to 1, or both; --epochs of at least 1",
        )
    if plan.model.neighbours:
        raise ConfigError(
            "the run's network sees slices with their neighbours, and is asked here about single slices",
            code="bad-argument",
            hint="name a run without model.args.neighbours",
        )
    held = public_set(plan.public_set, plan.image_size, plan.model.labels)
    learned = draw(PUBLIC_APPEARANCES, patients, SEED, plan.image_size, plan.model.labels)
    training = Training(
        local_epochs=epochs, batch_size=plan.training.batch_size, learning_rate=plan.training.learning_rate
    )
    scores = {"teacher": _about(teacher, held)}
    network = teacher
    if into is not None:
        network = fresh(into, plan.seed)
        distilled(teacher, network, learned, training=training, seed=plan.seed)
        scores[f"distilled into {into}"] = _about(network, held)
    if prune:
        name, args = (plan.model.name, plan.model.args) if into is None else (into, {})
        smaller = build(name, args)
        smaller.load_state_dict(network.state_dict())
        handles = pruned(smaller, prune)
        scores[f"pruned by {prune:g}"] = _about(smaller, held)
        distilled(teacher, smaller, learned, training=training, seed=plan.seed + 1)
        scores[f"pruned by {prune:g}, trained again"] = _about(smaller, held)
        for handle in handles:
            handle.remove()
        network = smaller
    return Compressed(network=network, scores=scores)


def _about(network: nn.Module, held: Slices) -> dict[str, float]:
    from common.losses import masked_bce

    left = sum(int(torch.count_nonzero(one)) for one in network.parameters())
    return {"parameters": left, "auroc": measure(network, held, masked_bce)["auroc"]}


def write(run: RunFolder, teacher: np.ndarray, found: Compressed, out: Path) -> None:
    """Write the model, with the lineage of its teacher and of the phantoms it saw."""
    state = found.network.state_dict()
    lineage = read_lineage(run.path / MODEL)
    metadata = {"trained_by": f"compress, plan {run.plan.name}"}
    if lineage is not None:
        child = lineage.child(
            f"compress, run {run.manifest['run']}", weights=digest(teacher), kinds=["synthetic"], private=True
        )
        metadata[KEY] = child.text()
    save_model(out, flatten(state), manifest_of(state), metadata)


def table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a step."""
    first = scores["teacher"]["parameters"]
    lines = ["| model | parameters that are not 0 | share | macro AUROC, public set |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {one['parameters']:,} | {one['parameters'] / first:.2f} | {one['auroc']:.3f} |"
        for name, one in scores.items()
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, whose model is the teacher")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--into", metavar="NETWORK", help="distil into this network")
    parser.add_argument("--prune", type=float, default=0.0, metavar="SHARE", help="set this share to 0")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--patients", type=int, default=PATIENTS, help="phantoms to learn from")
    parser.add_argument("--format", choices=[one.value for one in Format], default=Format.text.value)
    asked = parser.parse_args(words)
    set_threads(1)
    try:
        run = RunFolder.open(asked.run)
        teacher = network_of(run.plan.model)
        manifest = manifest_of(teacher.state_dict())
        flat = load_model(run.path / MODEL, manifest)
        teacher.load_state_dict(unflatten(flat, manifest))
        found = compress(
            run.plan,
            teacher,
            into=asked.into,
            prune=asked.prune,
            epochs=asked.epochs,
            patients=asked.patients,
        )
        write(run, flat, found, asked.out)
    except FedqcError as error:
        print(f"compress: error [{error.code}]: {error.message}", file=sys.stderr)
        print(f"compress: hint: {error.hint}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"model": str(asked.out), "scores": found.scores}
    print(json.dumps(result) if asked.format == Format.json.value else table(found.scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
