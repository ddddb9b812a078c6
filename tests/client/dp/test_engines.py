"""Both engines give the gradients of a loop over single slices, patient by patient, whatever the others are.

With the default network, thoroughly; tests/client/dp/test_networks.py has every network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.dp import dp_sgd
from client.dp.clipping import clipped_sum
from client.dp.coins import Coins
from client.dp.dp_sgd import NETWORK_ROWS, PrivateSteps, train_private_network
from client.dp.engines import ENGINES
from client.dp.engines.examples import Examples
from client.dp.injected import InjectedRows
from client.dp.release import clipped_integer_sum, grid_of
from client.dp.sampler import draw_slices, rows_by_patient, sample_patients
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.losses import masked_bce
from common.models import build, fresh
from common.trainable import trainable_names

SIDE = 32
SLICES = {"one slice": [1] * 6, "four slices": [4] * 6, "unequal": [1, 4, 2, 3, 4, 1, 7]}
TRAINABLE = ("norms", "all")


def site(counts: list[int], dtype: torch.dtype = torch.float32) -> tuple[Examples, np.ndarray]:
    """Images and labels of patients with so many slices each; whose each is, shuffled."""
    generator = torch.Generator().manual_seed(0)
    total = sum(counts)
    images = torch.rand(total, 2, SIDE, SIDE, generator=generator).to(dtype)
    labels = torch.randint(0, 2, (total, len(DEFAULT_LABELS)), generator=generator).to(dtype)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = torch.nan
    patients = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return Examples(inputs=lambda rows: images[rows], labels=labels), patients


def network_of(name: str, trainable: str = "all", dtype: torch.dtype = torch.float32) -> nn.Module:
    network = fresh(name, 0).to(dtype).train()
    trained = trainable_names(network, trainable)
    for each, parameter in network.named_parameters():
        parameter.requires_grad_(each in trained)
    return network


def rows_of(
    engine: str,
    network: nn.Module,
    examples: Examples,
    slices: list[np.ndarray],
    max_slices: int = 4,
    weights: list[np.ndarray] | None = None,
) -> np.ndarray:
    chunks = ENGINES[engine](
        network,
        examples,
        slices,
        max_slices=max_slices,
        rows_per_batch=NETWORK_ROWS,
        weights=weights,
        loss=masked_bce,
    )
    return np.concatenate(list(chunks))


def one_slice_at_a_time(
    network: nn.Module,
    examples: Examples,
    slices: list[np.ndarray],
    weights: list[np.ndarray] | None = None,
) -> np.ndarray:
    """The mean over a patient's slices of gradients that plain autograd gives for each slice by itself."""
    trained = [one for one in network.parameters() if one.requires_grad]

    def gradient(row: int) -> Tensor:
        loss = masked_bce(network(examples.inputs(np.array([row]))), examples.labels[[row]]).sum()
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, trained)])

    if weights is None:
        weights = [np.full(len(rows), 1 / len(rows)) for rows in slices]
    means = [
        sum(float(weight) * gradient(row) for row, weight in zip(rows, own, strict=True))
        for rows, own in zip(slices, weights, strict=True)
    ]
    return torch.stack([torch.as_tensor(one) for one in means]).numpy()


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("counts", SLICES)
@pytest.mark.parametrize("name", ["small_cnn"])
def test_every_engine_gives_the_gradients_of_a_loop_over_slices(
    name: str, counts: str, trainable: str
) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        examples, patients = site(SLICES[counts], dtype)
        network = network_of(name, trainable, dtype)
        slices = rows_by_patient(patients, np.arange(len(patients)))
        expected = one_slice_at_a_time(network, examples, slices)
        for engine in ENGINES:
            found = rows_of(engine, network, examples, slices, max(SLICES[counts]))
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=f"{engine} {dtype}")
            np.testing.assert_allclose(found.sum(0), expected.sum(0), rtol=0, atol=tolerance)


def weights_of(slices: list[np.ndarray]) -> list[np.ndarray]:
    """Unequal weights that sum to 1 for each patient."""
    generator = np.random.default_rng(5)
    return [generator.dirichlet(np.ones(len(rows))) for rows in slices]


@pytest.mark.parametrize("trainable", ["head", "norms", "all"])
def test_every_engine_weighs_the_rows_of_a_patient(trainable: str) -> None:
    """Over several batches of the opacus engine, with rows of padding in each."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        examples, patients = site([1, 4, 7, 7, 7, 7, 3, 7, 2], dtype)
        network, slices = (
            network_of("small_cnn", trainable, dtype),
            rows_by_patient(patients, np.arange(len(patients))),
        )
        weights = weights_of(slices)
        expected = one_slice_at_a_time(network, examples, slices, weights)
        for engine in ENGINES:
            found = rows_of(engine, network, examples, slices, 7, weights)
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=f"{engine} {dtype}")
            assert np.abs(found - rows_of(engine, network, examples, slices, 7)).max() > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_a_patient_in_or_out_change_no_bit_of_another(engine: str) -> None:
    examples, patients = site([4, 4, 3, 1, 2, 4, 4, 4, 1, 4, 3])
    network, slices = network_of("small_cnn"), rows_by_patient(patients, np.arange(len(patients)))
    weights = weights_of(slices)
    everyone = rows_of(engine, network, examples, slices, 4, weights)
    for out in (0, 3, 10):
        others = [position for position in range(len(slices)) if position != out]
        found = rows_of(
            engine,
            network,
            examples,
            [slices[position] for position in others],
            4,
            [weights[position] for position in others],
        )
        np.testing.assert_array_equal(found, everyone[others])


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_on_views_descends_on_the_documented_mean_with_one_clip(
    engine: str, trainable: str
) -> None:
    examples, patients = site([1, 4, 2, 3])
    is_view = np.zeros(len(patients))
    for number in range(4):
        is_view[np.flatnonzero(patients == number)[1:]] = 0.25
    injected = InjectedRows(weights=is_view, share=0.3, views=3)
    slices = rows_by_patient(patients, np.arange(len(patients)))
    weights = [injected.mean_weights(rows) for rows in slices]
    per_patient = one_slice_at_a_time(network_of("small_cnn", trainable), examples, slices, weights)
    clip_norm = float(np.median(np.linalg.norm(per_patient, axis=1)))
    names = trainable_names(fresh("small_cnn", 0), trainable)
    before = np.concatenate([fresh("small_cnn", 0).state_dict()[name].numpy().ravel() for name in names])
    after = trained(
        fresh("small_cnn", 0),
        names,
        injected,
        engine=engine,
        steps=1,
        learning_rate=1.0,
        noise_multiplier=0.0,
        clip_norm=clip_norm,
    )
    expected = clipped_sum(per_patient, clip_norm) / 4
    np.testing.assert_allclose(before - after, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("name", ["small_cnn"])
def test_engines_agree_on_the_sum_of_a_step_to_the_grid(name: str, rate: float) -> None:
    """In whole grid steps, which truncate a value that lies next to a step to either side of it."""
    examples, patients = site([1, 4, 2, 3, 4, 1, 7])
    network, slices = network_of(name), rows_by_patient(patients, np.arange(len(patients)))
    coins = Coins(bytes(32))
    sampled = sample_patients(len(slices), rate, coins)
    chosen = [draw_slices(slices[position], 4, coins) for position in sampled]
    size = sum(one.numel() for one in network.parameters())
    grid = grid_of(0.1, size)
    totals = [
        clipped_integer_sum([rows_of(engine, network, examples, chosen)], size, 0.1, grid)
        for engine in ENGINES
    ]
    assert np.abs(totals[0] - totals[1]).max() <= len(chosen)
    assert np.linalg.norm((totals[0] - totals[1]) * grid) < 1e-4 * 0.1 * len(chosen)


@pytest.mark.parametrize(("threads", "removed"), [(1, range(0, 11, 2)), (2, (3,))])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["small_cnn"])
def test_a_patient_in_or_out_changes_no_bit_of_another(
    name: str, engine: str, threads: int, removed: Sequence[int]
) -> None:
    """Whoever is left out, and in any order; the opacus engine needs several batches here."""
    examples, patients = site([4, 4, 3, 1, 2, 4, 4, 4, 1, 4, 3])
    slices = rows_by_patient(patients, np.arange(len(patients)))
    network, before = network_of(name), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        everyone = rows_of(engine, network, examples, slices)
        for out in removed:
            others = [position for position in range(len(slices)) if position != out]
            found = rows_of(engine, network, examples, [slices[position] for position in others])
            np.testing.assert_array_equal(found, everyone[others])
        if threads == 1:
            backwards = rows_of(engine, network, examples, slices[::-1])
            np.testing.assert_array_equal(backwards[::-1], everyone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_slice_of_huge_values_changes_no_bit_of_another_patient(engine: str) -> None:
    examples, patients = site([4] * 5)
    slices = rows_by_patient(patients, np.arange(len(patients)))
    network = network_of("small_cnn")
    everyone = rows_of(engine, network, examples, slices)
    wild = torch.where(torch.arange(20)[:, None, None, None] == int(slices[2][0]), 1e30, 1.0)

    def inputs(rows: np.ndarray) -> Tensor:
        return examples.inputs(rows) * wild[rows]

    found = rows_of(engine, network, Examples(inputs=inputs, labels=examples.labels), slices)
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(everyone, 2, 0))


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_that_of_some_patients_and_inputs_are_asked_for_one_at_a_time(engine: str) -> None:
    examples, patients = site([2] * 40)
    slices = rows_by_patient(patients, np.arange(len(patients)))
    asked: list[set[int]] = []

    def inputs(rows: np.ndarray) -> Tensor:
        asked.append(set(patients[rows].tolist()))
        return examples.inputs(rows)

    chunks = ENGINES[engine](
        network_of("small_cnn", "norms"),
        Examples(inputs=inputs, labels=examples.labels),
        slices,
        max_slices=4,
        rows_per_batch=NETWORK_ROWS,
        loss=masked_bce,
    )
    assert max(len(chunk) for chunk in chunks) <= NETWORK_ROWS // 2
    assert [len(one) for one in asked] == [1] * 40


class Unused(nn.Module):
    """A layer that takes no part in the output, or whose part has no gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.aside, self.head = (
            nn.Conv2d(2, 4, 3),
            nn.Conv2d(2, 4, 3),
            nn.Linear(4, len(DEFAULT_LABELS)),
        )

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        if self.how == "detached":
            found = found + self.aside(x).detach()
        return self.head(found.mean((2, 3)))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, len(DEFAULT_LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((2, 3)))


def trained(
    network: nn.Module, names: Any = None, injected: InjectedRows | None = None, **changes: Any
) -> np.ndarray:
    examples, patients = site([1, 4, 2, 3])
    values: dict[str, Any] = {
        "steps": 2,
        "learning_rate": 0.5,
        "clip_norm": 0.5,
        "noise_multiplier": 1.0,
        "sample_rate": 1.0,
        "nominal_patients": 4,
        "max_slices_per_patient": 4,
    }
    return train_private_network(
        network,
        [name for name, _ in network.named_parameters()] if names is None else names,
        examples.inputs,
        examples.labels.numpy(),
        patients,
        PrivateSteps(**values | changes),
        injected=injected,
    )


@pytest.mark.parametrize("how", ["not called", "detached"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_gets_no_gradient_is_refused_and_may_be_frozen(engine: str, how: str) -> None:
    with pytest.raises(ConfigError, match="aside") as refusal:
        trained(Unused(how), engine=engine)
    assert refusal.value.code == "uncovered-parameter"
    covered = [name for name, _ in Unused(how).named_parameters() if "aside" not in name]
    assert trained(Unused(how), covered, engine=engine).size == 4 * 2 * 9 + 4 + 4 * 5 + 5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_remembers_other_patients_is_refused(engine: str) -> None:
    """BatchNorm: Opacus has no rule for it; alone, a patient changes the running mean."""
    with pytest.raises(ConfigError) as refusal:
        trained(Normalized(), engine=engine)
    assert refusal.value.code == "uncovered-parameter"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_untrained_parameter_that_moves_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, real = fresh("small_cnn", 0), ENGINES[engine]

    def careless(net: nn.Module, *arguments: Any, **named: Any) -> Iterator[np.ndarray]:
        yield from real(net, *arguments, **named)
        with torch.no_grad():
            net.get_parameter("stem.weight")[0, 0, 0, 0] += 1e-6

    monkeypatch.setitem(dp_sgd.ENGINES, engine, careless)
    with pytest.raises(ConfigError, match="not trained"):
        trained(network, trainable_names(network, "norms"), engine=engine)


@pytest.mark.parametrize("trainable", ["head", "norms", "all"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_trained_keeps_its_bits_and_everything_trained_moves(engine: str, trainable: str) -> None:
    network, begin = fresh("small_cnn", 0), fresh("small_cnn", 0).state_dict()
    names = trainable_names(network, trainable)
    after = trained(network, names, engine=engine)
    for name, value in network.state_dict().items():
        assert torch.equal(value, begin[name]) == (name not in names)
        # noise is whole steps of a grid: of 100,000 values one returns to its start in a run of twenty
        assert name not in names or float((value != begin[name]).float().mean()) > 0.99
    flat = np.concatenate([network.state_dict()[name].numpy().ravel() for name in names])
    np.testing.assert_array_equal(flat, after.astype(np.float32))


def test_without_noise_and_with_a_huge_clip_both_engines_descend_on_patient_means() -> None:
    reference = fresh("small_cnn", 0)
    examples, patients = site([1, 4, 2, 3])
    parameters = list(reference.parameters())
    losses = masked_bce(reference(examples.inputs(np.arange(10))), examples.labels)
    means = [losses[torch.as_tensor(patients == one)].mean() for one in range(4)]
    gradients = torch.autograd.grad(torch.stack(means).mean(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.5)
    expected = np.concatenate([one.detach().numpy().ravel() for one in parameters])
    for engine in ENGINES:
        found = trained(fresh("small_cnn", 0), engine=engine, steps=1, noise_multiplier=0.0, clip_norm=1e6)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_on_nobody_is_noise_on_every_parameter(engine: str) -> None:
    network = fresh("small_cnn", 0)
    begin = np.concatenate([one.detach().numpy().ravel() for one in network.parameters()])
    moved = trained(network, engine=engine, steps=1, sample_rate=1e-9, noise_multiplier=2.0) - begin
    assert moved.std() == pytest.approx(0.5 * 2.0 * 0.5 / (1e-9 * 4), rel=0.01)


def test_labels_that_do_not_fit_are_refused() -> None:
    examples, patients = site([1, 2])
    with pytest.raises(ConfigError, match="shape"):
        train_private_network(
            build("small_cnn"), [], examples.inputs, examples.labels.numpy()[1:], patients, REQUEST
        )


REQUEST = PrivateSteps(
    steps=1,
    learning_rate=1.0,
    clip_norm=1.0,
    noise_multiplier=1.0,
    sample_rate=1.0,
    nominal_patients=50,
    max_slices_per_patient=4,
)
