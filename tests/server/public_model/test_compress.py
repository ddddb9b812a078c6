"""A model is made smaller on public images alone, and says what it lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.artifacts import DEFAULT_LABELS
from common.learning import score
from common.lineage import read_lineage
from common.model_file import load_model
from common.models import build, fresh
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import Training
from common.public_phantoms import draw
from common.weights import manifest_of, unflatten
from server.public_model.compress import distilled, main, pruned
from server.run_folder import MODEL
from tests.helpers.consortium import Consortium, tiny_plan

PATIENTS = 8
SLICES = draw(PUBLIC_APPEARANCES, PATIENTS, 5, 64)
ROWS = np.arange(len(SLICES.images))


def agreement(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Mean squared difference of the probabilities that two networks give."""
    first, second = (
        torch.sigmoid(torch.from_numpy(score(network, SLICES.images, SLICES.modality, ROWS)))
        for network in (one, other)
    )
    return float((first - second).square().mean())


def test_a_student_learns_what_its_teacher_says() -> None:
    teacher, student = fresh("small_cnn", 3), fresh("small_cnn", 4)
    with torch.no_grad():
        teacher.head.weight.mul_(20)  # type: ignore[operator, union-attr]  # a teacher who is sure
    before = agreement(teacher, student)
    training = Training(local_epochs=6, learning_rate=3e-3)
    distilled(teacher, student, SLICES, training=training, seed=1, share=1.0)
    assert agreement(teacher, student) < 0.5 * before


def test_where_no_label_stands_nothing_is_learned() -> None:
    """Outputs that cannot occur in a slice's modality have no target."""
    student, labels = fresh("small_cnn", 4), np.full((len(ROWS), len(DEFAULT_LABELS)), np.nan, np.float32)
    unlabelled = type(SLICES)(
        images=SLICES.images, modality=SLICES.modality, labels=labels, patients=SLICES.patients
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    training = Training(local_epochs=1, weight_decay=0.0)
    distilled(fresh("small_cnn", 3), student, unlabelled, training=training, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_pruned_weights_are_the_smallest_and_stay_zero() -> None:
    network = fresh("small_cnn", 3)
    weights = [one for one in network.parameters() if one.ndim > 1]
    sizes = torch.cat([one.detach().abs().flatten() for one in weights])
    handles = pruned(network, 0.7)
    zero = torch.cat([(one == 0).flatten() for one in weights])
    assert float(zero.float().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(sizes[zero].max()) <= float(sizes[~zero].min())
    biases = [one for one in network.parameters() if one.ndim == 1]
    kept = torch.cat([one.flatten() for one in biases]).clone()
    distilled(fresh("small_cnn", 4), network, SLICES, training=Training(local_epochs=2), seed=1)
    again = torch.cat([(one == 0).flatten() for one in weights])
    assert torch.equal(again & zero, zero)
    assert not torch.equal(kept, torch.cat([one.flatten() for one in biases]))
    for handle in handles:
        handle.remove()
    distilled(fresh("small_cnn", 4), network, SLICES, training=Training(local_epochs=1), seed=1)
    assert not torch.equal(torch.cat([(one == 0).flatten() for one in weights]) & zero, zero)


def test_a_run_is_compressed_from_the_command_line(
    consortium: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = consortium.conduct(tiny_plan(arms=["federated"], training={"rounds": 1}), tmp_path / "run")
    out = tmp_path / "small.safetensors"
    words = [str(run.path), str(out), "--into", "cnn_2d", "--prune", "0.5", "--epochs", "1"]
    assert main([*words, "--patients", str(PATIENTS), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["scores"]) == [
        "teacher",
        "distilled into cnn_2d",
        "pruned by 0.5",
        "pruned by 0.5, trained again",
    ]
    network = build("cnn_2d")
    manifest = manifest_of(network.state_dict())
    network.load_state_dict(unflatten(load_model(out, manifest), manifest))
    left = sum(int(torch.count_nonzero(one)) for one in network.parameters())
    assert left == said["scores"]["pruned by 0.5, trained again"]["parameters"]
    mine, its = read_lineage(out), read_lineage(run.path / MODEL)
    assert mine is not None
    assert its is not None
    assert (set(mine.kinds), mine.private) == ({*its.kinds, "synthetic"}, its.private)
    assert mine.ancestors[1:] == its.ancestors


@pytest.mark.parametrize(
    "words", [[], ["--prune", "1"], ["--prune", "-0.1"], ["--prune", "0.5", "--epochs", "0"]]
)
def test_nothing_to_do_is_one_line(
    words: list[str], consortium: Consortium, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = consortium.conduct(tiny_plan(arms=["public"], training={"rounds": 1}), tmp_path / "run")
    assert main([str(run.path), str(tmp_path / "out"), *words]) == 2
    assert "error [bad-argument]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
