"""What does simulating an artifact cost on a GPU, beside one core?

    python benchmarks/simulators_gpu.py [--device cuda] [--format json] [--update docs/performance.md]

Every simulator of `common.physics.SIMULATORS`, its parameters drawn beforehand at severity 0.6, is applied to
phantom slices of 128 x 128: a batch of 8 on one core, the same batch on the device, and a batch of 256 on the
device. Images are on the device before and stay there after. Both sides must give the same images, within
what float32 leaves, or nothing is printed and the exit status is 1.

Costs are wall time a slice, the device waited for, all sides in turns; a ratio is one core / device, above 1
the device is faster.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from measuring import (
    STEADY,
    BenchmarkError,
    Cost,
    Ratio,
    command_line,
    cost_ratios,
    environment,
    interleave,
    ratio,
    repetitions_of,
    reported,
    say,
)

# before torch is loaded
os.environ.update({name: value for name, value in STEADY.items() if name.endswith("_THREADS")})

import torch
from simulators import BATCH, CT, SEVERITY, SIZE, make_slices, once
from torch import Tensor

from common.physics import SIMULATORS
from common.physics.acquisition import acquire
from common.physics.threads import one_thread

LARGE_BATCH = 256
TOLERANCE = 0.05
"""Half of the pixels may differ by this much, HU or units of magnitude; a pixel at a threshold may differ by
more.
"""


def draw_params(name: str, images: Tensor, spacing_mm: float, slices: int) -> tuple[Tensor, list[Any]]:
    """`slices` slices, the given ones over and over, with parameters of their own."""
    simulator = SIMULATORS[name]
    repeated = images.repeat(-(-slices // len(images)), 1, 1)[:slices]
    generator = torch.Generator().manual_seed(5)
    acquisitions = [acquire(image, simulator.modality, pixel_spacing_mm=spacing_mm) for image in images]
    return repeated, [
        simulator.draw(SEVERITY, generator, acquisitions[place % len(images)]) for place in range(slices)
    ]


def work_on(name: str, images: Tensor, params: list[Any], device: torch.device) -> Callable[[], Tensor]:
    """The batch changed, and waited for."""
    there = images.to(device)

    def work() -> Tensor:
        changed, _ = SIMULATORS[name].apply(there, params)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return changed

    return work


def difference(here: Tensor, there: Tensor, name: str) -> dict[str, float]:
    """Median and largest distance between the images of both sides.

    Raises:
        BenchmarkError: they did not do the same work.
    """
    distance = (here - there.cpu()).abs()
    found = {"median": float(distance.median()), "largest": float(distance.max())}
    if not found["median"] <= TOLERANCE:
        raise BenchmarkError(
            f"{name}: the device's images differ from the CPU's by {found['median']:.3g} in the median"
        )
    return found


def measure_all(device: torch.device, repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("torch", "numpy"))
    with one_thread():
        slices = make_slices()
        sides: dict[str, Callable[[int], Cost]] = {}
        differences: dict[str, dict[str, float]] = {}
        for name in SIMULATORS:
            images, spacing_mm = slices["CT" if name in CT else "MR"]
            small, large = (
                draw_params(name, images, spacing_mm, BATCH),
                draw_params(name, images, spacing_mm, LARGE_BATCH),
            )
            core, same, more = (
                work_on(name, *small, torch.device("cpu")),
                work_on(name, *small, device),
                work_on(name, *large, device),
            )
            differences[name] = difference(core(), same(), name)
            sides[f"{name} core"] = partial(once, core, BATCH)
            sides[f"{name} {BATCH}"] = partial(once, same, BATCH)
            sides[f"{name} {LARGE_BATCH}"] = partial(once, more, LARGE_BATCH)
        costs = interleave(sides, repetitions)
    cases = {}
    for name in SIMULATORS:
        core_costs, same_costs, more_costs = (
            costs[f"{name} {side}"] for side in ("core", BATCH, LARGE_BATCH)
        )
        cases[name] = {
            "core_ms": _spread(core_costs),
            "device_ms": _spread(same_costs),
            "device_large_ms": _spread(more_costs),
            "wall": cost_ratios(core_costs, same_costs)["wall"],
            "wall_large": cost_ratios(core_costs, more_costs)["wall"],
            "differs": differences[name],
        }
        say(f"{name}: {cases[name]}")
    return {
        "benchmark": "simulators_gpu",
        "environment": started_with
        | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)},
        "work": {
            "repetitions": repetitions,
            "size": SIZE,
            "batch": BATCH,
            "large_batch": LARGE_BATCH,
            "severity": SEVERITY,
        },
        "cases": cases,
    }


def _spread(costs: list[Cost]) -> Ratio:
    return ratio([cost.wall_s * 1000 for cost in costs], [1.0] * len(costs))


def table(result: dict[str, Any]) -> str:
    """Markdown: one simulator a line."""
    work, env = result["work"], result["environment"]
    lines = [
        f"| simulator | one core, ms a slice | device, batch of {work['batch']} | batch of "
        f"{work['large_batch']} "
        f"| core / device, {work['batch']} | {work['large_batch']} | images differ by at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["cases"].items():
        lines.append(
            f"| {name} | {found['core_ms'].median:.2f} | {found['device_ms'].median:.3f} | "
            f"{found['device_large_ms'].median:.3f} "
            f"| {_short(found['wall'])} | {_short(found['wall_large'])} | {found['differs']['largest']:.1g} |"
        )
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"Median (min–max) of n = {work['repetitions']}, slices of {work['size']} × {work['size']} at "
        f"severity {work['severity']}. {env['date']}, {env['device']}, {env['cores']} cores, "
        f"{env['machine']}; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _short(values: Ratio) -> str:
    return f"{values.median:.1f} ({values.min:.1f}–{values.max:.1f})"


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    def measure() -> dict[str, Any]:
        device = torch.device(arguments.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError("no CUDA device here, or a PyTorch without CUDA")
        return measure_all(device, repetitions_of(arguments))

    return reported("simulators_gpu", arguments, measure, table)


if __name__ == "__main__":
    sys.exit(main())
