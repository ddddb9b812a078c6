"""Networks train and score on a device other than the CPU, and nothing is left there or forgotten here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.agent.server import _guard
from client.dp.dp_sgd import PrivateSteps, train_private_network
from common import devices, learning
from common.artifacts import DEFAULT_LABELS
from common.device_slices import SlicesOnDevice, channels_of
from common.devices import describe, device, on_device, use_device
from common.errors import ConfigError, RefusedError
from common.learning import extract_features, score, train_epochs
from common.models import fresh
from common.plan import Training
from common.preprocess import CT_RANGE_HU, MR_CLIP, MR_STEPS, to_channels
from common.studies import StudyImages
from common.trainable import trainable_names
from tests.helpers.consortium import settle
from tests.helpers.second_device import ELSEWHERE, MixedDevicesError, Watch

SIZE, SLICES = 32, 8
rng = np.random.default_rng(0)
MODALITY = np.array([0, 1] * (SLICES // 2), np.int8)
IMAGES = rng.integers(0, 3000, (SLICES, SIZE, SIZE)).astype(np.int16)
LABELS = (rng.random((SLICES, len(DEFAULT_LABELS))) < 0.5).astype(np.float32)
LABELS[0, 0] = np.nan
ROWS, PATIENTS = np.arange(SLICES), np.repeat(np.arange(4), 2)
TRAININGS: list[dict[str, Any]] = [
    {},
    {"loss": "focal", "class_weights": {"motion": 3.0}},
    {"loss": "dice"},
    {"loss": "batch_dice"},
    {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}},
    {"optimizer": "rmsprop"},
    {"augment": ("flip", "rotation", "contrast")},
    {"sampler": "balanced"},
    {"dropout": 0.5},
    {"memory_format": "channels_last"},
]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with Watch():
        monkeypatch.setattr(devices._Process, "device", ELSEWHERE)
        yield ELSEWHERE
    SlicesOnDevice._kept = None


def network() -> nn.Module:
    return fresh("small_cnn", 0)


def trained(**changes: Any) -> nn.Module:
    one = network()
    weights = np.linspace(0.5, 1.5, SLICES, dtype=np.float32)
    training = Training(**({"batch_size": 4, "local_epochs": 2} | changes))
    train_epochs(one, IMAGES, MODALITY, LABELS, ROWS, training=training, seed=1, weights=weights)
    return one


def lies_on_the_cpu(one: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in one.state_dict().values())


@pytest.mark.parametrize("changes", TRAININGS)
def test_training_leaves_no_tensor_behind(
    changes: dict[str, Any], elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = trained(**changes)
    assert lies_on_the_cpu(there)
    monkeypatch.setattr(devices._Process, "device", torch.device("cpu"))
    here = trained(**changes)
    for name, tensor in here.state_dict().items():
        assert torch.allclose(tensor, there.state_dict()[name], atol=1e-3), name
    for tensor, before in zip(here.parameters(), network().parameters(), strict=True):
        assert not torch.equal(tensor, before)


def test_scores_and_features_come_back(elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    one = network()
    there = score(one, IMAGES, MODALITY, ROWS), extract_features(one, IMAGES, MODALITY, ROWS)
    assert lies_on_the_cpu(one)
    monkeypatch.setattr(devices._Process, "device", torch.device("cpu"))
    here = score(one, IMAGES, MODALITY, ROWS), extract_features(one, IMAGES, MODALITY, ROWS)
    for two, other in zip(here, there, strict=True):
        assert np.allclose(two, other, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "gru"])
def test_studies_leave_no_tensor_behind(
    pooling: str, elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.array([[0, 2, 4], [1, 3, -1], [6, -1, -1]])
    images = StudyImages(slices=IMAGES, modality=MODALITY, rows=rows)

    def run() -> tuple[nn.Module, np.ndarray]:
        one = fresh("study", 0, {"pooling": pooling, "slices": 4})
        training = Training(batch_size=2, local_epochs=2, optimizer="sgd")
        train_epochs(one, images, MODALITY[:3], LABELS[:3], np.arange(3), training=training, seed=1)
        return one, score(one, images, MODALITY[:3], np.arange(3))

    there, scores = run()
    assert lies_on_the_cpu(there)
    assert np.isfinite(scores).all()
    monkeypatch.setattr(devices._Process, "device", torch.device("cpu"))
    assert np.allclose(run()[1], scores, atol=1e-3)


@pytest.mark.parametrize("engine", ["opacus", "patient_loop"])
@pytest.mark.parametrize("part", ["norms", "all"])
def test_private_training_computes_there_and_clips_here(
    engine: str, part: str, elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PrivateSteps(
        steps=2,
        learning_rate=0.5,
        clip_norm=1.0,
        noise_multiplier=0.0,
        sample_rate=1.0,
        nominal_patients=4,
        max_slices_per_patient=2,
        engine=engine,
    )

    def run() -> tuple[nn.Module, np.ndarray]:
        one = network()
        found = train_private_network(
            one,
            trainable_names(one, part),
            lambda rows: torch.from_numpy(to_channels(IMAGES[rows], MODALITY[rows])),
            LABELS,
            PATIENTS,
            request,
        )
        return one, found

    there, flat = run()
    assert lies_on_the_cpu(there)
    monkeypatch.setattr(devices._Process, "device", torch.device("cpu"))
    assert np.allclose(run()[1], flat, atol=1e-4)


def test_the_watch_would_see_what_is_left_behind(elsewhere: torch.device) -> None:
    one = network()
    with on_device(one), pytest.raises(MixedDevicesError):
        one(torch.from_numpy(to_channels(IMAGES, MODALITY)))
    assert lies_on_the_cpu(one)


def test_slices_are_moved_once(elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    SlicesOnDevice(IMAGES, MODALITY)
    kept = SlicesOnDevice._kept
    assert SlicesOnDevice(IMAGES, MODALITY)._there is (kept or [None])[-1]
    monkeypatch.setattr("common.device_slices._free_memory", lambda: IMAGES.nbytes)
    too_many = np.concatenate([IMAGES, IMAGES])
    follows = SlicesOnDevice(too_many, np.concatenate([MODALITY, MODALITY]))
    assert follows._there is None
    rows = np.array([3, 0, 9])
    assert torch.equal(
        follows.channels(rows).cpu(), SlicesOnDevice(IMAGES, MODALITY).channels(rows % SLICES).cpu()
    )


def test_the_channels_of_a_device_are_those_of_the_cpu() -> None:
    stored = np.concatenate(
        [
            np.linspace(*CT_RANGE_HU, 64 * 64).astype(np.int16).reshape(1, 64, 64),
            (rng.random((3, 64, 64)) * MR_CLIP * MR_STEPS).astype(np.int16),
            np.zeros((1, 64, 64), np.int16),  # a black slice
        ]
    )
    modality = np.array([0, 1, 0, 1, 1], np.int8)
    here = to_channels(stored, modality)
    there = channels_of(torch.from_numpy(stored), torch.from_numpy(modality)).numpy()
    assert here.shape == there.shape
    assert np.abs(here - there).max() < 1e-5


def test_half_precision_is_near_and_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, coarse = (
        torch.cat([one.flatten() for one in trained(precision=precision).parameters()])
        for precision in ("fp32", "bf16")
    )
    assert not torch.equal(fine, coarse)
    assert float((fine - coarse).norm() / fine.norm()) < 0.05
    assert coarse.dtype == torch.float32


def test_channels_last_is_near_in_every_convolution_and_gone_afterwards() -> None:
    def weights(memory_format: str) -> torch.Tensor:
        one = trained(memory_format=memory_format)
        assert all(parameter.is_contiguous() for parameter in one.parameters())
        return torch.cat([tensor.flatten() for tensor in one.parameters()])

    laid_out: list[bool] = []
    with nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: (
            laid_out.append(
                given[0].is_contiguous(memory_format=torch.channels_last) and not given[0].is_contiguous()
            )
            if isinstance(module, nn.Conv2d)
            else None
        )
    ):
        planes = weights("contiguous")
        assert laid_out
        assert not any(laid_out)
        laid_out.clear()
        pixels = weights("channels_last")
    assert all(laid_out)
    assert torch.equal(pixels, weights("channels_last")), "the same bits"
    assert not torch.equal(planes, pixels)
    assert float((planes - pixels).norm() / planes.norm()) < 0.01


class Small:
    """A device that has room for so many slices at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.sizes: list[int] = []
        of_samples = learning.loss_of

        def loss_of(training: Training, **more: Any) -> Any:
            loss = of_samples(training, **more)

            def limited(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                self.sizes.append(len(logits))
                if len(logits) > room:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return loss(logits, labels)

            return limited

        monkeypatch.setattr(learning, "loss_of", loss_of)


def test_a_batch_that_does_not_fit_is_halved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    small = Small(monkeypatch, room=2)
    halved = trained()
    assert small.sizes == [4, 2, 2, *[2] * 6]
    for one, other in zip(whole.parameters(), halved.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(("room", "said"), [(3, "6 would"), (1, "2 would"), (0, "nor does one slice")])
def test_what_never_fits_is_refused_with_what_would(
    room: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small(monkeypatch, room=room)
    with pytest.raises(RefusedError) as caught:
        trained(batch_size=SLICES)
    assert caught.value.code == "out-of-memory"
    assert said in caught.value.public_reason
    assert "training.batch_size = 8" in caught.value.public_reason
    if room:  # and it does
        trained(batch_size=2 * room)


def test_without_a_gpu_auto_is_the_cpu_and_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert use_device("auto") == use_device("cpu") == device() == torch.device("cpu")
    for choice in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError) as caught:
            use_device(choice)
        assert caught.value.code == "no-such-device"
    assert device() == torch.device("cpu")
    assert "CPU" in describe(device())


@pytest.mark.parametrize("choice", ["gpu", "cuda:", "cuda:-1", "", "mps"])
def test_a_word_that_names_no_device_is_refused(choice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        use_device(choice)
    assert caught.value.code == "no-such-device"


@pytest.mark.parametrize(
    ("choice", "spread", "number"), [("auto", 0, 0), ("auto", 3, 1), ("cuda", 1, 1), ("cuda:1", 0, 1)]
)
def test_gpus_are_shared_by_number(
    choice: str, spread: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[torch.device] = []
    monkeypatch.setattr(devices._Process, "device", torch.device("cpu"))
    monkeypatch.setattr(devices, "_compute_alike", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    assert use_device(choice, spread=spread) == torch.device("cuda", number) == set_to[0]
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        use_device("cuda:2")


def test_an_agent_computes_where_its_site_says(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settle(data / "hospital-a", device="cpu")
    _guard(data / "hospital-a")
    assert "agent: computes on CPU" in capsys.readouterr().err
    settle(data / "hospital-a", device="cuda:99")
    with pytest.raises(ConfigError) as caught:
        _guard(data / "hospital-a")
    assert caught.value.code == "no-such-device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_repeats_its_bits_and_agrees_with_the_cpu() -> None:
    here = trained()
    use_device("cuda")
    try:
        first, second = trained(), trained()
        assert lies_on_the_cpu(first)
        for one, two, cpu in zip(first.parameters(), second.parameters(), here.parameters(), strict=True):
            assert torch.equal(one, two)
            assert torch.allclose(one, cpu, atol=1e-2)
        on_gpu, on_cpu = (score(one, IMAGES, MODALITY, ROWS) for one in (first, here))
        assert np.allclose(on_gpu, on_cpu, atol=0.05)
    finally:
        use_device("cpu")
        torch.use_deterministic_algorithms(False)
