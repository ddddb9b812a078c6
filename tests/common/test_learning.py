"""One loop for everybody: the same seed gives the same bits, and the plan decides how."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.artifacts import DEFAULT_LABELS
from common.augmentation import augmenter
from common.learning import _dropped_out, batches, extract_features, score, seed_for, train_epochs
from common.models import as_classifier, build
from common.plan import Training
from common.preprocess import to_channels
from common.weights import flatten

SLICES, SIDE = 12, 32


def slices(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(-1000, 3000, (SLICES, SIDE, SIDE)).astype(np.int16)
    modality = np.arange(SLICES) % 2
    labels = rng.integers(0, 2, (SLICES, len(DEFAULT_LABELS))).astype(np.float32)
    labels[modality == 0, 2:] = np.nan
    labels[modality == 1, :2] = np.nan
    return images, modality.astype(np.int8), labels


def trained(
    *, seed: int = 1, rows: np.ndarray | None = None, labels: np.ndarray | None = None, **changes: object
) -> np.ndarray:
    torch.manual_seed(0)
    model = build("small_cnn")
    images, modality, truth = slices()
    training = Training(**({"batch_size": 4} | changes))  # type: ignore[arg-type]
    chosen = np.arange(SLICES) if rows is None else rows
    train_epochs(
        model, images, modality, truth if labels is None else labels, chosen, training=training, seed=seed
    )
    return flatten(model.state_dict())


def test_the_same_seed_gives_the_same_bits() -> None:
    assert trained().tobytes() == trained().tobytes()


def test_another_seed_shuffles_otherwise() -> None:
    assert trained(seed=2).tobytes() != trained(seed=1).tobytes()


def test_the_global_generator_decides_nothing() -> None:
    first = trained()
    torch.manual_seed(0)
    build("small_cnn")
    torch.rand(100)
    assert trained().tobytes() == first.tobytes()


def test_rows_left_out_do_not_matter() -> None:
    rows = np.arange(6)
    _, _, labels = slices()
    changed = labels.copy()
    changed[6:] = 1 - changed[6:]
    assert trained(rows=rows).tobytes() == trained(rows=rows, labels=changed).tobytes()


def test_learning_rate_zero_changes_nothing() -> None:
    torch.manual_seed(0)
    before = flatten(build("small_cnn").state_dict())
    assert trained(learning_rate=0.0).tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_the_plan_names_the_optimizer(name: str) -> None:
    found = trained(optimizer=name)
    assert np.isfinite(found).all()
    assert found.tobytes() == trained(optimizer=name).tobytes()
    assert found.tobytes() != trained().tobytes()


def test_a_balanced_pass_learns_from_what_is_rare() -> None:
    """All slices but one are clean: the last one's label decides more of the step than in a uniform pass."""
    labels = np.zeros((SLICES, len(DEFAULT_LABELS)), np.float32)
    labels[:-1, :] = 0
    other = labels.copy()
    other[-1, 2] = 1

    def moved(sampler: str) -> float:
        first, second = (trained(labels=one, sampler=sampler, optimizer="sgd") for one in (labels, other))
        return float(np.abs(first - second).max())

    assert moved("balanced") > moved("uniform") > 0
    assert trained(sampler="balanced").tobytes() == trained(sampler="balanced").tobytes()
    assert trained(sampler="balanced").tobytes() != trained(sampler="balanced", seed=2).tobytes()


def test_augmentation_follows_from_the_seed_and_changes_every_pass() -> None:
    words = ("flip", "rotation", "scale", "crop", "shift", "contrast")
    found = trained(augment=words)
    assert found.tobytes() == trained(augment=words).tobytes()
    assert found.tobytes() not in (trained().tobytes(), trained(augment=words, seed=2).tobytes())
    images, modality, _ = slices()
    seen: list[bytes] = []
    augment = augmenter(words, 1)
    for _ in range(2):
        for _, x in batches(images, modality, np.arange(SLICES), SLICES, augment):
            seen.append(x.numpy().tobytes())
    assert len(set(seen)) == 2


def test_every_row_is_in_exactly_one_batch_in_the_given_order() -> None:
    images, modality, _ = slices()
    rows = np.array([5, 1, 7, 2, 11])
    found = list(batches(images, modality, rows, 2))
    assert np.concatenate([chosen for chosen, _ in found]).tolist() == rows.tolist()
    channels = torch.cat([x for _, x in found])
    assert channels.shape == (5, 2, SIDE, SIDE)
    assert np.array_equal(channels.numpy(), to_channels(images[rows], modality[rows]))


def test_scores_do_not_depend_on_the_company() -> None:
    torch.manual_seed(0)
    model = build("small_cnn")
    images, modality, _ = slices()
    together = score(model, images, modality, np.arange(SLICES))
    alone = np.concatenate([score(model, images, modality, np.array([row])) for row in range(SLICES)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_scoring_leaves_no_trace_in_the_model() -> None:
    model = build("small_cnn")
    before = flatten(model.state_dict()).tobytes()
    images, modality, _ = slices()
    score(model, images, modality, np.arange(SLICES))
    assert flatten(model.state_dict()).tobytes() == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_scored_is_an_empty_array() -> None:
    images, modality, _ = slices()
    assert len(score(build("small_cnn"), images, modality, np.zeros(0, np.int64))) == 0


def test_the_head_on_the_features_is_the_model() -> None:
    torch.manual_seed(0)
    model = build("small_cnn")
    images, modality, _ = slices()
    rows = np.arange(SLICES)
    features = torch.from_numpy(extract_features(model, images, modality, rows))
    with torch.no_grad():
        logits = as_classifier(model).head(features).numpy()
    np.testing.assert_allclose(logits, score(model, images, modality, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", [(8, "a", 1), (7, "b", 1), (7, "a", 2), (1, "7/a", 1)])
def test_every_site_and_round_has_a_seed_of_its_own(changed: tuple[int, str, int]) -> None:
    assert seed_for(*changed) != seed_for(7, "a", 1)
    assert seed_for(7, "a", 1) == seed_for(7, "a", 1) >= 0


def test_dropout_is_drawn_from_the_seed_and_only_in_training() -> None:
    first = trained(dropout=0.5)
    torch.rand(100)  # the global generator decides nothing
    assert trained(dropout=0.5).tobytes() == first.tobytes()
    assert trained(dropout=0.5, seed=2).tobytes() != first.tobytes()
    assert trained().tobytes() != first.tobytes()
    images, modality, _ = slices()
    model = build("small_cnn")
    rows = np.arange(SLICES)
    assert np.array_equal(score(model, images, modality, rows), score(model, images, modality, rows))


def test_dropout_keeps_the_mean_and_its_share() -> None:
    features = torch.ones(200, 50)
    left = _dropped_out(features, 0.4, torch.Generator().manual_seed(0))
    assert float((left == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert float(left.mean()) == pytest.approx(1, abs=0.03)
    assert len({tuple(row.tolist()) for row in left != 0}) > 190  # a draw for each slice
