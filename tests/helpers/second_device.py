"""A second device for tests on machines that have none: its tensors live on the CPU but refuse to meet
tensors that do not say so.

A `Watch` must be open. Tensors sent `.to(ELSEWHERE)`, or made there, behave as on a GPU: an operation that
mixes them with the CPU's raises. Values are real, sparse matrices and masks work. It stands in for the *meta*
device, which PyTorch needs no driver for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")


class MixedDevicesError(Exception):
    """An operation had tensors on two devices: on a GPU it would fail."""


class _Far(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Far:
        # else reshape would choose a view where there is none
        strides = held.stride() if held.layout == torch.strided else None
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=strides, dtype=held.dtype, device=ELSEWHERE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class Watch(TorchDispatchMode):
    """While open, `ELSEWHERE` is a device of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __enter__(self) -> Watch:
        self._literals = _Literals()
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._literals.__exit__(*problem)


class _Literals(TorchFunctionMode):
    """`torch.tensor([...], device=ELSEWHERE)` would forget its values before a dispatch mode sees them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    far = [isinstance(leaf, _Far) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(far) and not all(far):
        raise MixedDevicesError(str(func))
    device = kwargs.get("device")
    args_held, kwargs_held = tree_map(
        lambda value: value.held if isinstance(value, _Far) else value, (args, kwargs)
    )
    if device is not None:
        kwargs_held["device"] = torch.device("cpu")
    result = func(*args_held, **kwargs_held)
    if result is None or not (any(far) if device is None else torch.device(device) == ELSEWHERE):
        return result
    if func.overloadpacket.__name__.endswith("_"):
        return args[0]
    return tree_map(lambda value: _Far(value) if isinstance(value, Tensor) else value, result)
