"""What does each network of `MODELS` cost, beside the default one?

python benchmarks/networks.py [--quick] [--format json] [--update docs/networks.md]

parameters    of the network with its head, and what each of Opacus' rows of gradients then takes.
FLOPs         of one slice forward, two a multiplication with an addition: torch.utils.flop_counter.
sees          how far the pixels lie apart that convolutions and pooling let one place of the last map
              see. Norms, gates and attention see the whole slice in some way, and are left out.
step, scoring CPU time of `train_epochs`' step on a batch and of a batch without gradients, and the peak
              of memory of each above what the process held before, in a fresh process, one thread. Sides
              take turns with the default network, and only ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measuring import (
    KIB_PER_MIB,
    BenchmarkError,
    Cost,
    command_line,
    cost_ratios,
    environment,
    interleave,
    repetitions_of,
    reported,
    run,
)

DEFAULT = "small_cnn"
SIDE_PX = 128
LONG_PX = 3072
"""Wider than any of the networks sees."""
MAX_OPACUS_MIB = 1024
"""What a batch of per-slice gradients may take, for the engine `opacus` to fit."""
QUICK = ("small_cnn", "cnn_2d", "csp")
POOLINGS = ("mean", "max", "gru")
"""Of `study`, beside the default; `study/gru` is a name here, and a study has one slice."""


def network_named(name: str) -> Any:
    """A fresh network of `MODELS`, or of studies with a pooling."""
    from common.models import fresh

    entry, _, pooling = name.partition("/")
    return fresh(entry, 0, {"pooling": pooling} if pooling else {})


def facts(name: str) -> dict[str, Any]:
    """What is counted and not measured."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from client.dp.dp_sgd import NETWORK_ROWS

    network = network_named(name).eval()
    parameters = sum(one.numel() for one in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 2, SIDE_PX, SIDE_PX))
    rows_mib = NETWORK_ROWS * parameters * 4 / 2**20
    return {
        "parameters": parameters,
        "flops": counter.get_total_flops(),
        "sees_px": field_of_view(network),
        "layers": dict(
            Counter(_kind(one) for one in network.modules() if isinstance(one, nn.Conv2d | nn.Linear))
        ),
        "other": sorted({_other(one) for one in network.modules()} - {""}),
        "gradients_mib": rows_mib,
        "engine": "opacus" if rows_mib <= MAX_OPACUS_MIB else "patient_loop",
    }


def _kind(layer: Any) -> str:
    if not hasattr(layer, "kernel_size"):
        return "linear"
    rows, columns = layer.kernel_size
    depthwise = " depthwise" if layer.groups > 1 else ""
    return f"{rows}×{columns}{depthwise}"


def _other(layer: Any) -> str:
    """What else a network is made of, in one word."""
    return {
        "ChannelGate": "gates",
        "_Block": "gates",
        "ChannelAttention": "attention",
        "SpatialAttention": "attention",
        "_DenseLayer": "dense",
        "_Partial": "partial",
        "_Maxima": "pyramid of maxima",
        "Pyramid": "pyramid",
        "GatedAttention": "attention",
        "GatedRecurrence": "recurrence",
        "Residual": "residual",
        "_Inverted": "residual",
        "MaxPool2d": "maxima",
        "TwoStems": "two stems",
    }.get(type(layer).__name__, "")


def field_of_view(network: Any) -> int:
    """Pixels from the first to the last column of a wide slice that one place of the last map depends on.

    All that looks further than convolutions and pooling do is made to pass its input on, and weights are made
    equal, so that no influence cancels.
    """
    import torch
    from torch import nn

    class Passed(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    for parent in list(network.modules()):
        for key, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in {"GroupNorm", "SpatialAttention"}:
                setattr(parent, key, Passed())
            elif isinstance(child, nn.MaxPool2d):
                mean = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                setattr(parent, key, mean)
    for parameter in network.parameters():  # 0 in linear layers, so that every gate is open by half
        nn.init.constant_(parameter, 1 / parameter[0].numel() if parameter.ndim == 4 else 0)
    last: list[Any] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            last[:] = [output]

    for module in network.modules():
        module.register_forward_hook(keep)
    x = torch.ones(1, 2, 32, LONG_PX, dtype=torch.float64, requires_grad=True)
    network.double().features(x)
    found = last[0]
    (gradient,) = torch.autograd.grad(found[:, :, 0, found.shape[-1] // 2].sum(), x)
    columns = gradient.abs().sum((0, 1, 2)).nonzero()
    return int(columns.max() - columns.min()) + 1


def once(name: str, work: dict[str, int], scoring: dict[str, list[Cost]], repetition: int) -> Cost:
    """The cost of a step of a network, measured by a process of its own.

    Args:
        scoring: name -> costs of scoring, which this adds to.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cost.json"
        run([sys.executable, __file__, "--side", name, "--work", json.dumps(work), "--out", out])
        found = json.loads(out.read_text(encoding="utf-8"))
    if repetition:
        scoring.setdefault(name, []).append(Cost(**found["scoring"]))
    return Cost(**found["step"])


def measure_side(name: str, work: dict[str, int]) -> dict[str, dict[str, float]]:
    """CPU and wall time of scoring and of a step, and their peaks above what was held."""
    import torch

    from common.artifacts import DEFAULT_LABELS
    from common.learning import keep_freed_memory
    from common.losses import masked_bce
    from common.optimizers import adamw

    torch.set_num_threads(1)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    network = network_named(name)
    parameters = list(network.parameters())
    images = torch.rand(work["slices"], 2, SIDE_PX, SIDE_PX, generator=generator)
    labels = torch.randint(0, 2, (work["slices"], len(DEFAULT_LABELS)), generator=generator).float()
    update = adamw(parameters, 1e-3, 1e-4)

    def step() -> None:
        update(torch.autograd.grad(masked_bce(network(images), labels).mean(), parameters))

    @torch.no_grad()
    def scoring() -> None:
        network(images)

    held = _memory("VmRSS")

    def cost(act: Callable[[], None]) -> dict[str, float]:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        act()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(work["repeats"]):
            act()
        return {
            "wall_s": (time.perf_counter() - wall) / work["repeats"],
            "cpu_s": (time.process_time() - cpu) / work["repeats"],
            "peak_mib": (_memory("VmHWM") - held) / KIB_PER_MIB,
        }

    return {"scoring": cost(scoring), "step": cost(step)}  # the smaller peak first: freed memory is kept


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def facts_apart(name: str) -> dict[str, Any]:
    """`facts`, in a process of its own: torch would count into the peak of the sides started here."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        run([sys.executable, __file__, "--facts", name, "--out", out])
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def measure_all(names: tuple[str, ...], work: dict[str, int], repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "torch", "numpy"))
    found: dict[str, dict[str, Any]] = {name: facts_apart(name) for name in names}
    scoring: dict[str, list[Cost]] = {}
    sides: dict[str, Callable[[int], Cost]] = {name: partial(once, name, work, scoring) for name in names}
    for what, costs in (("step", interleave(sides, repetitions, say)), ("scoring", scoring)):
        for name in names:
            ratios = cost_ratios(costs[name], costs[DEFAULT])
            found[name][what] = {key: ratios[key] for key in ("cpu", "memory")}
        found[DEFAULT][what]["own"] = {
            "cpu_s": min(cost.cpu_s for cost in costs[DEFAULT]),
            "peak_mib": min(cost.peak_mib for cost in costs[DEFAULT]),
        }
    return {
        "benchmark": "networks",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": work | {"repetitions": repetitions, "threads": 1, "side_px": SIDE_PX},
        "networks": found,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: one row a network."""
    lines = [
        "| `model.name` | parameters | GFLOP a slice | sees, pixels | layers | gradients of a batch, engine "
        "that fits | step: CPU | memory | scoring: CPU | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in result["networks"].items():
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(one["layers"].items()))
        more = f"; {', '.join(one['other'])}" if one["other"] else ""
        entry, _, pooling = name.partition("/")
        cells = [
            f"`{entry}`{pooling and f', {pooling}'}",
            f"{one['parameters'] / 1e6:.2f} M",
            f"{one['flops'] / 1e9:.2f}",
            str(one["sees_px"]),
            layers + more,
            f"{one['gradients_mib']:.0f} MiB, `{one['engine']}`",
            *(f"{one[what][key].median:.1f}" for what in ("step", "scoring") for key in ("cpu", "memory")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    env, work = result["environment"], result["work"]
    own = {what: result["networks"][DEFAULT][what]["own"] for what in ("step", "scoring")}
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"{work['side_px']} px; a step and a scoring of {work['slices']} slices, one thread, as multiples of "
        f"`{DEFAULT}`: {own['step']['cpu_s']:.3f} CPU-s and {own['step']['peak_mib']:.0f} MiB a step, "
        f"{own['scoring']['cpu_s']:.3f} CPU-s and {own['scoring']['peak_mib']:.0f} MiB a scoring.",
        "",
        f"Medians of n = {work['repetitions']}. {env['date']}, {env['cores']} cores, {env['machine']}, load "
        f"{env['load_1min']} before and {env['load_1min_after']} after; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = command_line(__doc__, quick="3 of the networks, 4 slices", usual=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--facts", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side or arguments.facts:
        found = facts(arguments.facts) if arguments.facts else measure_side(arguments.side, arguments.work)
        arguments.out.write_text(json.dumps(found), encoding="utf-8")
        return 0
    if arguments.quick and arguments.update:
        parser.error("--quick measures some of the networks, and the page has all")
    return reported(
        "networks",
        arguments,
        lambda: measure_all(
            QUICK if arguments.quick else all_names(),
            {"slices": 4 if arguments.quick else 8, "repeats": 2},
            repetitions_of(arguments),
        ),
        table,
    )


def all_names() -> tuple[str, ...]:
    """The names of `MODELS`, read in another process, and `study` with each pooling."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "names.json"
        code = (
            "import json, sys; from common.models import MODELS; json.dump([*MODELS], open(sys.argv[1], 'w'))"
        )
        run([sys.executable, "-c", code, out])
        names = json.loads(out.read_text(encoding="utf-8"))
    if DEFAULT not in names:
        raise BenchmarkError(f"{DEFAULT} is no network")
    return (*names, *(f"study/{pooling}" for pooling in POOLINGS))


if __name__ == "__main__":
    sys.exit(main())
