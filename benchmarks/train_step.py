"""What does a training step cost in bfloat16, with channels last, or on a GPU, and does the model become
another?

    python benchmarks/train_step.py [--quick] [--compile NETWORK] [--format json] [--update FILE]

The loop is the product's own (`common.learning.train_epochs`), on one core and, where there is one, on the
first GPU. Cost: epochs over the same slices in turns, as ratios to float32 on the CPU. Model: from the public
start, on phantoms of shifted appearances, several seeds; macro AUROC on other phantoms, each side less fp32
with the same seed (Student's t). `--compile` adds sides whose network torch compiles first, which no plan can
ask for, and what that costs; it needs a C++ compiler, and minutes.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import Cost, command_line, environment, interleave, ratio, repetitions_of, reported, say
from scipy import stats
from torch import nn

from common.counts import auroc, per_patient
from common.devices import describe, use_device
from common.learning import score, seed_for, set_threads, train_epochs
from common.model_file import load_model
from common.models import fresh
from common.physics.appearance import SITE_APPEARANCES
from common.plan import Model, Training
from common.public_phantoms import draw
from common.public_slices import Slices
from common.weights import manifest_of, resolve_initial, unflatten

NETWORKS = ("small_cnn", "resnet18")
SIZE_PX, BATCH = 128, 16
AIM, AMX = 0.65, "amx_bf16"
SIDES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "channels last": {"memory_format": "channels_last"},
    "bf16, channels last": {"precision": "bf16", "memory_format": "channels_last"},
}
"""Keys of `training`."""
COMPILED = {"compiled": "fp32", "compiled, channels last": "channels last"}
MODELS = ("fp32", "bf16", "channels last")
"""Sides whose models are scored."""


def processor_has_amx() -> bool:
    """Whether this CPU has units for bfloat16 matrices (Intel AMX)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return AMX in file.read()
    except OSError:
        return False


def phantoms(patients: int, seed: int) -> Slices:
    return draw(tuple(SITE_APPEARANCES), patients, seed, SIZE_PX)


def epoch(
    model: nn.Module, device: str, keys: dict[str, Any], slices: Slices, epochs: int, repetition: int = 0
) -> Cost:
    """One call of the product's training loop; `repetition` is not needed."""
    use_device(device)
    rows = np.arange(len(slices.images))
    training = Training(batch_size=BATCH, local_epochs=epochs, **keys)
    wall, cpu = time.perf_counter(), cpu_seconds()
    train_epochs(model, slices.images, slices.modality, slices.labels, rows, training=training, seed=0)
    if device != "cpu":
        torch.cuda.synchronize()
    cost = Cost(wall_s=time.perf_counter() - wall, cpu_s=cpu_seconds() - cpu, peak_mib=0)
    use_device("cpu")
    return cost


def cpu_seconds() -> float:
    """Of this process and of the compilers that it called."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def costs(
    networks: tuple[str, ...], slices: Slices, epochs: int, repetitions: int, *, compile: str
) -> dict[str, Any]:
    """Ratios of CPU (of wall time on a GPU) to float32 on the CPU, by network and side; full batches alone.

    Args:
        compile: the network that is also compiled; "" for none.
    """
    whole = len(slices.images) // BATCH * BATCH or len(slices.images)  # one shape to compile for
    slices = Slices(
        images=slices.images[:whole],
        modality=slices.modality[:whole],
        labels=slices.labels[:whole],
        patients=slices.patients[:whole],
    )
    found: dict[str, Any] = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for network in networks:
        sides = {
            f"{device} {side}": partial(epoch, fresh(network, 0), device, keys, slices, epochs)
            for device in devices
            for side, keys in SIDES.items()
        }
        compiling: dict[str, float] = {}
        for side, plain in COMPILED.items() if network == compile else ():
            model = fresh(network, 0)
            model.compile(dynamic=False, fullgraph=True)
            compiling[side] = epoch(model, "cpu", SIDES[plain], slices, epochs).cpu_s
            say(f"{network} {side}: first epoch {compiling[side]:.1f} CPU-s")
            sides[f"cpu {side}"] = partial(epoch, model, "cpu", SIDES[plain], slices, epochs)
        measured = interleave(sides, repetitions, partial(_say, network))
        reference = measured["cpu fp32"]
        ratios = {
            side: ratio(
                [one.wall_s if side.startswith("cuda") else one.cpu_s for one in measured[side]],
                [one.wall_s if side.startswith("cuda") else one.cpu_s for one in reference],
            )
            for side in sides
        }
        own = min(one.cpu_s for one in reference)
        found[network] = {
            "ratios": ratios,
            "own_cpu_s": own,
            "steps": epochs * math.ceil(whole / BATCH),
            "compiling_cpu_s": {side: first - own for side, first in compiling.items()},
        }
    return found


def _say(network: str, text: str) -> None:
    say(f"{network} {text}")


def macro(model: Any, slices: Slices) -> float:
    logits = score(model, slices.images, slices.modality, np.arange(len(slices.images)))
    return float(np.nanmean(auroc(*per_patient(logits, slices.labels, slices.patients))))


def models(seeds: int, patients: int, epochs: int) -> dict[str, Any]:
    """Macro AUROC of models that were trained in each way, and differences from float32 with their
    intervals.
    """
    named, test = Model(), phantoms(patients, 77)
    found: dict[str, list[float]] = {side: [] for side in MODELS}
    for seed in range(seeds):
        slices = phantoms(patients, 1000 + seed)
        for side in MODELS:
            model = fresh(named.name, 0)
            manifest = manifest_of(model.state_dict())
            flat = load_model(resolve_initial(named.initial, named.sha256), manifest, named.labels)
            model.load_state_dict(unflatten(flat, manifest))
            train_epochs(
                model,
                slices.images,
                slices.modality,
                slices.labels,
                np.arange(len(slices.images)),
                training=Training(batch_size=BATCH, local_epochs=epochs, **SIDES[side]),
                seed=seed_for(seed, "train_step", 1),
            )
            found[side].append(macro(model, test))
            say(f"seed {seed} {side}: {found[side][-1]:.4f}")
    return {
        "seeds": seeds,
        "fp32": statistics.fmean(found["fp32"]),
        "others": {side: _less(found[side], found["fp32"]) for side in MODELS if side != "fp32"},
    }


def _less(values: list[float], plain: list[float]) -> dict[str, float]:
    """The mean of some scores, and its difference from others of the same seeds with a 95 % interval."""
    differences = [one - other for one, other in zip(values, plain, strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * spread
    return {
        "auroc": statistics.fmean(values),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
    }


def measure_all(
    networks: tuple[str, ...], work: dict[str, int], repetitions: int, *, compile: str = ""
) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    set_threads(1)
    started_with = environment(("fedqc", "torch", "numpy"))
    found = costs(networks, phantoms(work["patients"], 5), work["epochs"], repetitions, compile=compile)
    return {
        "benchmark": "train_step",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "amx": processor_has_amx(),
        "gpu": describe(torch.device("cuda", 0)) if torch.cuda.is_available() else None,
        "work": work | {"repetitions": repetitions, "batch": BATCH, "side_px": SIZE_PX},
        "networks": found,
        "models": models(work["seeds"], work["model_patients"], work["model_epochs"]),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: cost by network and side, and what became of the model."""
    networks = result["networks"].values()
    sides = [side for side in max((one["ratios"] for one in networks), key=len) if side != "cpu fp32"]
    lines = [
        "| an epoch / fp32 on one core | " + " | ".join(sides) + " |",
        "|---|" + "---|" * len(sides),
        *(
            f"| `{name}` | " + " | ".join(str(one["ratios"].get(side, "–")) for side in sides) + " |"
            for name, one in result["networks"].items()
        ),
    ]
    env, work, found = result["environment"], result["work"], result["models"]
    has = "has" if result["amx"] else "does not have"
    verdict = "the aim does not apply"
    if result["amx"]:
        worst = max(one["ratios"]["cpu bf16"].median for one in networks)
        verdict = f"aim of {AIM} {'met' if worst <= AIM else 'missed'}"
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"Macro AUROC of `{Model().name}` after training on {work['model_patients']} patients "
        f"({work['model_epochs']} epochs, {found['seeds']} seeds): fp32 {found['fp32']:.4f}; "
        + "; ".join(
            f"{side} {one['auroc']:.4f}, difference {one['difference']:+.4f} "
            f"[{one['low']:+.4f}, {one['high']:+.4f}]"
            for side, one in found["others"].items()
        )
        + ".",
        "",
        *_compiling(result["networks"]),
        f"This CPU {has} units for bfloat16 matrices (AMX): {verdict}. "
        + (f"GPU: {result['gpu']}." if result["gpu"] else "No GPU was at hand."),
        "",
        f"Median (min–max) of n = {work['repetitions']}. {env['date']}, {env['cores']} cores, "
        f"{env['machine']}, load {env['load_1min']} before and {env['load_1min_after']} after; "
        f"Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _compiling(networks: dict[str, Any]) -> list[str]:
    """What compiling cost before the first step, and after how many steps that is won back."""
    said = []
    for name, one in networks.items():
        for side, cpu_s in one["compiling_cpu_s"].items():
            saved = one["own_cpu_s"] / one["steps"] * (1 - one["ratios"][f"cpu {side}"].median)
            after = f"won back after {cpu_s / saved:,.0f} steps" if saved > 0 else "never won back"
            said.append(f"`{name}`, {side}: {cpu_s:.0f} CPU-s, {after}")
    return ["Compiling, once in each process: " + "; ".join(said) + ".", ""] if said else []


def main() -> int:
    options = command_line(__doc__, quick="fewer slices and 2 seeds", usual=5)
    options.add_argument("--compile", choices=NETWORKS, default="", help="also compile this network")
    arguments = options.parse_args()
    work = {"patients": 30, "epochs": 1, "seeds": 5, "model_patients": 200, "model_epochs": 3}
    if arguments.quick:
        work |= {"patients": 8, "seeds": 2, "model_patients": 20, "model_epochs": 1}
    return reported(
        "train_step",
        arguments,
        lambda: measure_all(NETWORKS, work, repetitions_of(arguments), compile=arguments.compile),
        table,
    )


if __name__ == "__main__":
    sys.exit(main())
