"""What does a training step cost in bfloat16, or on a GPU, and does the model become another?

    python benchmarks/train_step.py [--quick] [--format json] [--update docs/performance.md]

The loop is the product's own (`common.learning.train_epochs`), on one core and, where there is one, on the
first GPU. Cost: epochs over the same slices in turns, as ratios to float32 on the CPU. Model: from the public
start, on phantoms of shifted appearances, several seeds; macro AUROC on other phantoms, bf16 less fp32 with
the same seed (Student's t).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from measuring import Cost, command_line, environment, interleave, ratio, repetitions_of, reported, say
from scipy import stats

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
Precision = Literal["fp32", "bf16"]
SIDES: tuple[Precision, ...] = get_args(Precision)


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
    network: str, device: str, precision: Precision, slices: Slices, epochs: int, repetition: int
) -> Cost:
    """One call of the product's training loop; `repetition` is not needed."""
    use_device(device)
    model, rows = fresh(network, 0), np.arange(len(slices.images))
    training = Training(batch_size=BATCH, local_epochs=epochs, precision=precision)
    wall, cpu = time.perf_counter(), time.process_time()
    train_epochs(model, slices.images, slices.modality, slices.labels, rows, training=training, seed=0)
    if device != "cpu":
        torch.cuda.synchronize()
    cost = Cost(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu, peak_mib=0)
    use_device("cpu")
    return cost


def costs(networks: tuple[str, ...], slices: Slices, epochs: int, repetitions: int) -> dict[str, Any]:
    """Ratios of CPU (of wall time on a GPU) to float32 on the CPU, by network and side."""
    found: dict[str, Any] = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for network in networks:
        sides = {
            f"{device} {precision}": partial(epoch, network, device, precision, slices, epochs)
            for device in devices
            for precision in SIDES
        }
        measured = interleave(sides, repetitions, partial(_say, network))
        reference = measured["cpu fp32"]
        found[network] = {
            side: ratio(
                [one.wall_s if side.startswith("cuda") else one.cpu_s for one in measured[side]],
                [one.wall_s if side.startswith("cuda") else one.cpu_s for one in reference],
            )
            for side in sides
        }
        found[network]["own_cpu_s"] = min(one.cpu_s for one in reference)
    return found


def _say(network: str, text: str) -> None:
    say(f"{network} {text}")


def macro(model: Any, slices: Slices) -> float:
    logits = score(model, slices.images, slices.modality, np.arange(len(slices.images)))
    return float(np.nanmean(auroc(*per_patient(logits, slices.labels, slices.patients))))


def models(seeds: int, patients: int, epochs: int) -> dict[str, Any]:
    """Macro AUROC of models that were trained in either precision, by seed."""
    named, test = Model(), phantoms(patients, 77)
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        slices = phantoms(patients, 1000 + seed)
        for side in SIDES:
            model = fresh(named.name, 0)
            manifest = manifest_of(model.state_dict())
            flat = load_model(resolve_initial(named.initial, named.sha256), manifest)
            model.load_state_dict(unflatten(flat, manifest))
            train_epochs(
                model,
                slices.images,
                slices.modality,
                slices.labels,
                np.arange(len(slices.images)),
                training=Training(batch_size=BATCH, local_epochs=epochs, precision=side),
                seed=seed_for(seed, "train_step", 1),
            )
            found[side].append(macro(model, test))
            say(f"seed {seed} {side}: {found[side][-1]:.4f}")
    differences = [coarse - fine for fine, coarse in zip(*found.values(), strict=True)]
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * spread
    mean = statistics.fmean(differences)
    return {
        **{side: statistics.fmean(values) for side, values in found.items()},
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
        "seeds": seeds,
    }


def measure_all(networks: tuple[str, ...], work: dict[str, int], repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    set_threads(1)
    started_with = environment(("fedqc", "torch", "numpy"))
    found = costs(networks, phantoms(work["patients"], 5), work["epochs"], repetitions)
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
    sides = [
        side for side in next(iter(result["networks"].values())) if side not in ("cpu fp32", "own_cpu_s")
    ]
    lines = [
        "| an epoch / fp32 on one core | " + " | ".join(sides) + " |",
        "|---|" + "---|" * len(sides),
        *(
            f"| `{name}` | " + " | ".join(str(one[side]) for side in sides) + " |"
            for name, one in result["networks"].items()
        ),
    ]
    env, work, found = result["environment"], result["work"], result["models"]
    has = "has" if result["amx"] else "does not have"
    verdict = "the aim does not apply"
    if result["amx"]:
        worst = max(one["cpu bf16"].median for one in result["networks"].values())
        verdict = f"aim of {AIM} {'met' if worst <= AIM else 'missed'}"
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"Macro AUROC of `{Model().name}` after training on {work['model_patients']} patients "
        f"({work['model_epochs']} epochs): fp32 {found['fp32']:.4f}, bf16 {found['bf16']:.4f}; difference "
        f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], {found['seeds']} seeds.",
        "",
        f"This CPU {has} units for bfloat16 matrices (AMX): {verdict}. "
        + (f"GPU: {result['gpu']}." if result["gpu"] else "No GPU was at hand."),
        "",
        f"Median (min–max) of n = {work['repetitions']}. {env['date']}, {env['cores']} cores, "
        f"{env['machine']}, load {env['load_1min']} before and {env['load_1min_after']} after; "
        f"Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line(__doc__, quick="fewer slices and 2 seeds", usual=5).parse_args()
    work = {"patients": 30, "epochs": 1, "seeds": 5, "model_patients": 200, "model_epochs": 3}
    if arguments.quick:
        work |= {"patients": 8, "seeds": 2, "model_patients": 20, "model_epochs": 1}
    return reported(
        "train_step", arguments, lambda: measure_all(NETWORKS, work, repetitions_of(arguments)), table
    )


if __name__ == "__main__":
    sys.exit(main())
