"""What does a private step on the whole network cost, compared with a plain one?

    python benchmarks/dp_step.py [--quick] [--format json] [--update docs/performance.md]

    plain         the mean loss over all slices, one backward, plain SGD.
    patient_loop  `client.dp.dp_sgd.train_private_network` with this engine: the gradient of each patient,
    opacus        clipped on the grid, summed in integers, exactly drawn noise, SGD; with Opacus' hooks.
    ghost         Opacus' ghost clipping (GradSampleModuleFastGradientClipping, two backwards), normal noise,
                  SGD. Its unit is the slice: it cannot clip a patient of several.

Every side trains all parameters of the network on the same random slices, in a fresh process, one thread.
Cost is CPU time a step, after one that is not counted; memory is the peak above what the process held once
network, slices and libraries were loaded. In every turn the sums of the gradients, not clipped, are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measuring import (
    KIB_PER_MIB,
    BenchmarkError,
    Cost,
    Ratio,
    cost_ratios,
    environment,
    interleave,
    run,
    to_json,
    update_table,
)

SIDES = ("plain", "patient_loop", "opacus", "ghost")
AIMS = {"cpu": 1.15, "memory": 0.5}  # of patient_loop
PATIENTS, SLICES, SIDE_PX = 8, 4, 128
CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.01
NO_CLIP = 1e9
TOLERANCE = 1e-4  # of the length of the sum of gradients
MODEL = "small_cnn"


def once(name: str, work: dict[str, int], sums: dict[str, float], repetition: int) -> Cost:
    """The cost of one step of a side, measured by a process of its own.

    Args:
        sums: side -> length of the sum of its gradients, which this adds to and compares.
    Raises:
        BenchmarkError: the side failed, or its gradients are others.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cost.json"
        run([sys.executable, __file__, "--side", name, "--work", json.dumps(work), "--out", out])
        found = json.loads(out.read_text(encoding="utf-8"))
    sums[name] = found.pop("length")
    reference = sums.get("plain", sums[name])
    if abs(sums[name] / reference - 1) > TOLERANCE:
        raise BenchmarkError(f"{name}: gradients of length {sums[name]:g}, plain {reference:g}")
    return Cost(**found)


def measure_side(name: str, work: dict[str, int]) -> dict[str, float]:
    """Cost of a step, and the length of the sum over patients of their gradients."""
    import torch

    from common.artifacts import DEFAULT_LABELS
    from common.learning import keep_freed_memory
    from common.models import fresh

    torch.set_num_threads(1)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    count = work["patients"] * work["slices"]
    images = torch.rand(count, 2, work["side_px"], work["side_px"], generator=generator)
    labels = torch.randint(0, 2, (count, len(DEFAULT_LABELS)), generator=generator).float()
    side = _side(name, work["slices"])
    side(fresh(MODEL, 0), images[: work["slices"], :, :32, :32].contiguous(), labels[: work["slices"]], 1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    held = _memory("VmRSS")
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    network = fresh(MODEL, 0)
    side(network, images, labels, work["steps"] + 1, mark)
    mark()
    peak = _memory("VmHWM") - held
    (wall, cpu), (wall_end, cpu_end) = marks[1], marks[-1]
    return {
        "wall_s": (wall_end - wall) / work["steps"],
        "cpu_s": (cpu_end - cpu) / work["steps"],
        "peak_mib": peak / KIB_PER_MIB,
        "length": _length(name, images, labels, work["slices"]),
    }


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _side(name: str, slices: int) -> Callable[..., None]:
    return {"plain": _plain, "ghost": _ghost}.get(name) or partial(_private, name, slices)


def _plain(network: Any, images: Any, labels: Any, steps: int, mark: Callable[[], object] = int) -> None:
    import torch

    from common.losses import masked_bce

    parameters = list(network.parameters())
    for _ in range(steps):
        mark()
        gradients = torch.autograd.grad(masked_bce(network(images), labels).mean(), parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, gradients, alpha=LEARNING_RATE)


def _private(
    engine: str,
    slices: int,
    network: Any,
    images: Any,
    labels: Any,
    steps: int,
    mark: Callable[[], object] = int,
) -> None:
    import numpy as np

    from client.dp.dp_sgd import PrivateSteps, train_private_network

    patients = len(images) // slices
    train_private_network(
        network,
        [name for name, _ in network.named_parameters()],
        lambda rows: images[rows],
        labels.numpy(),
        np.repeat(np.arange(patients), slices),
        PrivateSteps(
            steps=steps,
            learning_rate=LEARNING_RATE,
            clip_norm=CLIP_NORM,
            noise_multiplier=NOISE_MULTIPLIER,
            sample_rate=1.0,
            nominal_patients=patients,
            max_slices_per_patient=slices,
            engine=engine,
        ),
        tick=lambda step: mark(),
    )


def _ghost(
    network: Any,
    images: Any,
    labels: Any,
    steps: int,
    mark: Callable[[], object] = int,
    clip_norm: float = CLIP_NORM,
) -> None:
    """One step: a backward for the norms, one for the sum of the gradients with their weights."""
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    from common.losses import masked_bce

    module = GradSampleModuleFastGradientClipping(
        network, batch_first=True, loss_reduction="sum", max_grad_norm=clip_norm, use_ghost_clipping=True
    )
    parameters = list(network.parameters())
    for _ in range(steps):
        mark()
        losses = masked_bce(module(images.detach().requires_grad_(True)), labels)
        losses.sum().backward(retain_graph=True)
        weights = module.get_clipping_coef()
        for parameter in parameters:
            parameter.grad = None
        module.disable_hooks()
        (weights * losses).sum().backward()
        module.enable_hooks()
        if clip_norm == NO_CLIP:
            return
        with torch.no_grad():
            for parameter in parameters:
                noise = torch.randn_like(parameter) * (NOISE_MULTIPLIER * clip_norm)
                parameter -= LEARNING_RATE / len(images) * (parameter.grad + noise)
        module.zero_grad(set_to_none=True)


def _length(name: str, images: Any, labels: Any, slices: int) -> float:
    """The L2 norm of the sum of all slices' gradients, as this side computes them."""
    import numpy as np
    import torch

    from common.losses import masked_bce
    from common.models import fresh

    network = fresh(MODEL, 0).train()
    if name == "plain":
        parts = torch.autograd.grad(masked_bce(network(images), labels).sum(), list(network.parameters()))
        return float(torch.cat([one.flatten() for one in parts]).norm())
    if name == "ghost":
        _ghost(network, images, labels, 1, clip_norm=NO_CLIP)
        return float(torch.cat([one.grad.flatten() for one in network.parameters()]).norm())
    from client.dp.dp_sgd import NETWORK_ROWS
    from client.dp.engines import ENGINES
    from client.dp.engines.examples import Examples

    rows = np.arange(len(images)).reshape(-1, slices)
    chunks = ENGINES[name](
        network,
        Examples(inputs=lambda rows: images[rows], labels=labels),
        list(rows),
        max_slices=slices,
        rows_per_batch=NETWORK_ROWS,
        loss=masked_bce,
    )
    return float(slices * np.linalg.norm(sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks)))


def measure_all(work: dict[str, int], repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "torch", "opacus", "numpy"))
    sums: dict[str, float] = {}
    costs = interleave({name: partial(once, name, work, sums) for name in SIDES}, repetitions, say)
    ratios = {name: cost_ratios(costs[name], costs["plain"]) for name in SIDES if name != "plain"}
    loop = ratios["patient_loop"]
    return {
        "benchmark": "dp_step",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": work | {"repetitions": repetitions, "threads": 1, "model": MODEL},
        "ratios": ratios,
        "aims": {what: {"aim": aim, "met": loop[what].median <= aim} for what, aim in AIMS.items()},
        "plain": {
            "cpu_s": min(cost.cpu_s for cost in costs["plain"]),
            "peak_mib": min(cost.peak_mib for cost in costs["plain"]),
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: cost and memory of each side, and the aims."""
    lines = ["| a step / plain | CPU | memory | aim |", "|---|---|---|---|"]
    for name, ratios in result["ratios"].items():
        verdict = ""
        if name == "patient_loop":
            verdict = ", ".join(
                f"{what} ≤ {one['aim']}: {'met' if one['met'] else 'missed'}"
                for what, one in result["aims"].items()
            )
        lines.append(f"| {name} | {_short(ratios['cpu'])} | {_short(ratios['memory'])} | {verdict} |")
    env, work = result["environment"], result["work"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"{work['model']}, {work['side_px']} px, {work['patients']} patients of {work['slices']} slices, "
        f"{work['steps']} steps. A plain step takes {result['plain']['cpu_s']:.3f} CPU-s and "
        f"{result['plain']['peak_mib']:.0f} MiB.",
        "",
        f"Median (min–max) of n = {work['repetitions']}. {env['date']}, {env['cores']} cores, "
        f"{env['machine']}, load {env['load_1min']} before and {env['load_1min_after']} after; "
        f"Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _short(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.min:.2f}–{ratio.max:.2f})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 repetitions of 2 steps")
    parser.add_argument("--repetitions", type=int, help="instead of 7, or 3 with --quick")
    parser.add_argument("--patients", type=int, default=PATIENTS)
    parser.add_argument("--slices", type=int, default=SLICES, help="of each patient")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="also rewrite the table in this Markdown page"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        cost = measure_side(arguments.side, arguments.work)
        arguments.out.write_text(json.dumps(cost), encoding="utf-8")
        return 0
    work = {
        "patients": arguments.patients,
        "slices": arguments.slices,
        "side_px": SIDE_PX,
        "steps": 2 if arguments.quick else 6,
    }
    try:
        result = measure_all(work, arguments.repetitions or (3 if arguments.quick else 7))
        if arguments.update:
            update_table(arguments.update, "dp_step", table(result))
    except BenchmarkError as error:
        say(f"dp_step: {error}")
        return 1
    print(to_json(result) if arguments.format == "json" else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
