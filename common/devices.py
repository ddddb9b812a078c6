"""Where torch computes: the CPU, or a GPU of this machine. The site's choice, not the plan's; one a process.

Only networks and slices move. Noise, clipping and sums are made on the CPU, whatever the device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from common.errors import ConfigError
from common.names import DEVICE_CHOICE

_CPU = torch.device("cpu")


class _Process:
    """This process: where it computes."""

    device = _CPU


_DRIVER = Path("/proc/driver/nvidia/version")


def device_of(choice: str, *, spread: int = 0) -> torch.device:
    """The device that a choice means on this machine; arguments and errors as `use_device`."""
    if not re.fullmatch(DEVICE_CHOICE, choice):
        raise ConfigError(
            f"device {choice!r}: unknown", code="no-such-device", hint="auto, cpu, cuda, cuda:N"
        )
    count = torch.cuda.device_count() if choice != "cpu" and torch.cuda.is_available() else 0
    if choice == "cpu" or (choice == "auto" and not count):
        return _CPU
    _, _, number = choice.partition(":")
    if int(number or 0) >= count:
        raise ConfigError(
            f"device {choice}: {_what_there_is(count)}",
            code="no-such-device",
            hint="auto or cpu; a GPU needs its driver and a PyTorch with CUDA: make setup TORCH_INDEX=…",
        )
    return torch.device("cuda", int(number) if number else spread % count)


def use_device(choice: str, *, spread: int = 0) -> torch.device:
    """Compute on this device from now on, deterministically.

    Args:
        choice: `auto`, `cpu`, `cuda` or `cuda:N`.
        spread: number of this process among several: where the choice names no GPU they share all there are.
    Returns:
        the device.
    Raises:
        ConfigError: this machine, or this build of torch, has no such GPU (code `no-such-device`).
    """
    _Process.device = device_of(choice, spread=spread)
    if _Process.device.type != "cpu":
        _compute_alike()
        torch.cuda.set_device(_Process.device)
    return _Process.device


def device() -> torch.device:
    """Where torch computes in this process."""
    return _Process.device


@contextmanager
def on_device(network: nn.Module) -> Iterator[torch.device]:
    """While open, the network lies on the device of the process; then it is back where it was."""
    before = next((one.device for one in network.parameters()), _CPU)
    if before == _Process.device:
        yield _Process.device
        return
    network.to(_Process.device)
    try:
        yield _Process.device
    finally:
        network.to(before)


def describe(where: torch.device) -> str:
    """A device in words: name, memory, driver and build of torch of a GPU."""
    if where.type == "cpu":
        return f"CPU (torch {torch.__version__})"
    about = torch.cuda.get_device_properties(where)
    return (
        f"{about.name} ({about.total_memory / 2**30:.0f} GiB, driver {_driver()}, "
        f"torch {torch.__version__} for CUDA {torch.version.cuda})"
    )


def _driver() -> str:
    """Version of the NVIDIA kernel driver; "unknown" where it does not say."""
    try:
        said = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return "unknown"
    return said[0] if said else "unknown"


def _what_there_is(count: int) -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return (
        f"there are {count} GPUs here, counted from 0" if count else "no GPU, or its driver does not answer"
    )


def _compute_alike() -> None:
    """The same bits for the same input: https://docs.pytorch.org/docs/stable/notes/randomness.html. No TF32,
    which rounds the factors of a product to 10 bits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
