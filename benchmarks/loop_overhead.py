"""What does a simulated consortium cost beyond the training itself?

    python benchmarks/loop_overhead.py [--quick] [--format json] [--update docs/performance.md]

Runs `fedqc simulate` (one arm, `federated`) against a floor on the same work: FedAvg, 4 sites, 5 rounds, 1
local epoch, batches of 32 of the default image size, the default network, one thread. "1 batch" is 32
training images a site and shows the fixed cost; "nominal" is 200. `--quick` measures 1 batch only. Each run
is a fresh process; the sides take turns.

    simulation  the whole command: imports, plan, run folder, messages through the LocalGrid, checks,
                checkpoints and records with fsync, the model scored on a public set of 2 phantoms each round,
                the final evaluation on 2 test patients a site.
    floor       one process without Flower, messages, files or scoring: opens the same caches, runs the same
                local epochs, averages in memory. Its final weights must equal the simulation's bit for bit,
                or nothing is printed and the exit status is 1.
    plain       the script one would write without fedqc: arrays from .npy files, torch.optim.AdamW, weights
                averaged as floats. The last bits differ, so its weights must agree to 1e-4 relative. It pays
                for torch._dynamo, which torch.optim imports, as did the floor that the peers in the aims were
                measured against.

All sides run under the same allocator settings (measuring.STEADY); without them chance decides which side
pays for page faults.
Counted: everything from the start of the process to its end. Not counted: making the phantoms and decoding
    them into the caches.
Synthetic sites keep no ledger; a hospital's adds a small durable write a round. Memory is the peak of
resident memory. The full run also prints how CPU and memory grow with 2, 4 and 8 sites: the aim of one extra
model a site is about that growth; what imports of Flower and the command line hold is there once, whatever
the number of sites.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    BenchmarkError,
    Cost,
    Ratio,
    command_line,
    cost_ratios,
    environment,
    interleave,
    repetitions_of,
    reported,
    run,
    say,
)

if TYPE_CHECKING:
    import numpy as np

SITES, ROUNDS, BATCH = 4, 5, 32
WORK = {"1 batch": 32, "nominal": 200}
"""Training images a site."""

AIMS = {"1 batch": 1.05, "nominal": 1.02}
PEERS = {"1 batch": {"best": 1.14, "Flower on Ray": 2.64}, "nominal": {"best": 1.09, "Flower on Ray": 1.38}}
"""Wall ratios, from another machine and against a floor that pays for torch._dynamo; see
docs/performance.md.
"""

SCALING = (2, 4, 8)
SEED = 7
PLAIN_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Sites whose caches are warm, and the plan to run on them."""

    plan: Path
    data: Path  # of `fedqc simulate`
    arrays: Path  # the training slices of each site as .npy, for `plain`


def write_plan(path: Path, *, rounds: int = ROUNDS, image_size: int | None = None) -> None:
    """The plan of both sides; JSON is YAML."""
    values: dict[str, object] = {
        "name": "loop-overhead",
        "arms": ["federated"],
        "split": {"train": 0.6, "test": 0.4},  # not used: the label sheets fix each patient's part
        "training": {"rounds": rounds, "local_epochs": 1, "batch_size": BATCH},
        "public_set": {"patients": 2},
        "seed": SEED,
    }
    path.write_text(
        json.dumps(values if image_size is None else values | {"image_size": image_size}), encoding="utf-8"
    )


def make_sites(data: Path, arrays: Path, plan_file: Path, *, sites: int, images: int) -> None:
    """Phantom sites with exactly `images` training images and two test patients each, their caches built."""
    import numpy as np

    from client.agent.tasks import prepare
    from client.simulation.phantom_sites import write_consortium
    from common.plan import read_plan

    plan = read_plan(plan_file)
    # 2 or 3 images each; `trim` picks
    write_consortium(data, sites=sites, patients=images // 2 + 12, seed=SEED, say=lambda _: None)
    for site_yaml in sorted(data.glob("*/site.yaml")):
        trim(site_yaml.parent, images)
        cohort = prepare(site_yaml, plan)
        rows = np.flatnonzero(cohort.part == 0)
        if len(rows) != images:
            raise BenchmarkError(f"{cohort.site.name}: {len(rows)} training images, {images} wanted")
        folder = arrays / cohort.site.name
        folder.mkdir(parents=True)
        for name in ("images", "modality", "labels"):
            np.save(folder / f"{name}.npy", getattr(cohort, name)[rows])
        (folder / "weight.json").write_text(str(cohort.site.nominal_patients))


def trim(site: Path, images: int) -> None:
    """Leave whole patients with `images` training images in all, and two test patients."""
    sheet = site / "labels.csv"
    header, *rows = list(csv.reader(sheet.open(encoding="utf-8", newline="")))
    patients: dict[str, list[list[str]]] = {}
    for row in rows:
        patients.setdefault(row[0].partition("_")[0], []).append(row)
    kept: list[list[str]] = []
    tests = 0
    missing = images
    for group in patients.values():
        rest = missing - len(group)
        if rest == 0 or rest >= 2:  # 1 could not be filled by a patient of 2 or 3 images
            kept += [[*row, "train"] for row in group]
            missing = rest
        elif tests < 2:
            kept += [[*row, "test"] for row in group]
            tests += 1
    names = {row[0] for row in kept}
    for path in (site / "images").iterdir():
        if path.name not in names:
            path.unlink()
    with sheet.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[*header, "part"], *kept])


def floor(plan_file: Path, data: Path) -> tuple[dict[str, np.ndarray], int]:
    """The same epochs, one after another, averaged in memory. Returns the final weights by name, and their
    number.
    """
    import numpy as np

    from client.data.cohort import load_cohort
    from common.learning import seed_for, set_threads, train_epochs
    from common.model_file import load_model
    from common.models import network_of
    from common.plan import read_plan
    from common.weights import flatten, manifest_of, resolve_initial, to_grid, unflatten
    from server.aggregation import FederatedMean

    set_threads(1)
    plan = read_plan(plan_file)
    cohorts = [
        load_cohort(path, size=plan.image_size, plan_split=plan.split)
        for path in sorted(data.glob("*/site.yaml"))
    ]
    model = network_of(plan.model)
    manifest = manifest_of(model.state_dict())
    flat = load_model(resolve_initial(plan.model.initial, plan.model.sha256), manifest, plan.model.labels)
    for number in range(1, plan.training.rounds + 1):
        mean = FederatedMean(manifest.size)
        for cohort in cohorts:
            model.load_state_dict(unflatten(flat, manifest))
            rows = np.flatnonzero(cohort.part == 0)
            seed = seed_for(plan.seed, cohort.site.name, number)
            train_epochs(
                model, cohort.images, cohort.modality, cohort.labels, rows, training=plan.training, seed=seed
            )
            mean.add(to_grid(flatten(model.state_dict()), flat), cohort.site.nominal_patients)
        flat = mean.result(flat)
    return {name: tensor.numpy() for name, tensor in unflatten(flat, manifest).items()}, manifest.size


def plain(plan_file: Path, arrays: Path) -> tuple[dict[str, np.ndarray], int]:
    """The same work as a script with nothing of fedqc but the network, its input and its loss."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from common.losses import masked_bce
    from common.models.small_cnn import SmallCNN
    from common.preprocess import to_channels

    torch.set_num_threads(1)
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    import common.models

    state = load_file(Path(common.models.__file__).with_name("small_cnn_real.safetensors"))
    sites = []
    for folder in sorted(arrays.iterdir()):
        loaded = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "modality", "labels")]
        sites.append((folder.name, int((folder / "weight.json").read_text()), *loaded))
    outputs = sites[0][4].shape[1]
    state = {name: tensor[:outputs] if name.startswith("head.") else tensor for name, tensor in state.items()}
    model = SmallCNN(outputs)
    whole = sum(site[1] for site in sites)
    for number in range(1, plan["training"]["rounds"] + 1):
        total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for name, weight, images, modality, labels in sites:
            model.load_state_dict(state)
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
            order = np.random.default_rng(_seed_for(plan["seed"], name, number)).permutation(
                np.arange(len(images))
            )
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                x = torch.from_numpy(to_channels(images[chosen], modality[chosen]))
                optimizer.zero_grad()
                masked_bce(model(x), torch.from_numpy(labels[chosen])).mean().backward()
                optimizer.step()
            for key, tensor in model.state_dict().items():
                total[key] += tensor * (weight / whole)
        state = total
    return {name: tensor.numpy() for name, tensor in state.items()}, sum(
        tensor.numel() for tensor in state.values()
    )


def _seed_for(seed: int, site: str, number: int) -> int:
    """As common.learning.seed_for, without importing what that module brings."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{site}/{number}".encode()).digest()[:7], "little")


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Largest relative L2 distance of a tensor; 0 means the same bits. Infinite where names or shapes
    differ.
    """
    import numpy as np

    if {name: array.shape for name, array in found.items()} != {
        name: array.shape for name, array in wanted.items()
    }:
        return float("inf")
    if all(found[name].tobytes() == wanted[name].tobytes() for name in wanted):
        return 0.0
    a, b = (
        np.concatenate([weights[name].astype(np.float64).ravel() for name in sorted(wanted)])
        for weights in (found, wanted)
    )
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)), np.finfo(np.float64).tiny)


def measure(
    prepared: Prepared, scratch: Path, names: tuple[str, ...], repetitions: int
) -> tuple[dict[str, list[Cost]], dict[str, float], int]:
    """Costs of each side, the largest difference of its weights from the simulation's, and the number of
    weights.

    Raises:
        BenchmarkError: the weights differ.
    """
    import safetensors.numpy

    own: list[str | Path] = [sys.executable, Path(__file__).absolute()]
    fedqc = "from common.cli import main; main()"
    simulate: list[str | Path] = [
        sys.executable,
        "-c",
        fedqc,
        "simulate",
        prepared.plan,
        "--data",
        prepared.data,
        "--jobs",
        "1",
    ]
    commands: dict[str, list[str | Path]] = {
        "simulation": [*simulate, "--out"],
        "floor": [*own, "--side", "floor", prepared.plan, prepared.data],
        "plain": [*own, "--side", "plain", prepared.plan, prepared.arrays],
    }
    results: dict[str, dict[int, Path]] = {name: {} for name in names}

    def side(name: str, repetition: int) -> Cost:
        out = scratch / f"{name}-{repetition}"
        results[name][repetition] = out / "model.safetensors"
        return run([*commands[name], out])

    costs = interleave(
        {name: lambda repetition, name=name: side(name, repetition) for name in names}, repetitions, say
    )  # type: ignore[misc]
    differences = dict.fromkeys(names[1:], 0.0)
    size = 0
    for repetition in range(repetitions + 1):
        wanted = safetensors.numpy.load_file(results["simulation"][repetition])
        size = sum(array.size for array in wanted.values())
        for name in names[1:]:
            found = difference(safetensors.numpy.load_file(results[name][repetition]), wanted)
            differences[name] = max(differences[name], found)
            if found > (0 if name == "floor" else PLAIN_TOLERANCE):
                raise BenchmarkError(
                    f"the final weights of {name} differ from the simulation's by {found:.2g} (relative "
                    "L2): no ratio counts"
                )
    shutil.rmtree(scratch)
    return costs, differences, size


def measure_scaling(prepared: dict[int, Prepared], scratch: Path, repetitions: int) -> dict[str, Any]:
    """CPU seconds and memory of simulation and floor at several numbers of sites, and their slopes a site by
    least squares.

    The least CPU of the repetitions: noise of a shared machine only adds, and a slope has no partner within a
    turn to cancel it.
    """
    names = ("simulation", "floor")
    costs: dict[int, dict[str, list[Cost]]] = {}
    for sites, at in prepared.items():
        say(f"{sites} sites")
        costs[sites] = measure(at, scratch / f"scaling-{sites}", names, repetitions)[0]
    found: dict[str, Any] = {"sites": list(prepared)}
    for name in names:
        cpu_s = [min(cost.cpu_s for cost in at[name]) for at in costs.values()]
        peak_mib = [statistics.median(cost.peak_mib for cost in at[name]) for at in costs.values()]
        slope, fixed = statistics.linear_regression(list(prepared), cpu_s)
        found[name] = {
            "cpu_s": cpu_s,
            "cpu_s_per_site": slope,
            "cpu_s_fixed": fixed,
            "cpu_s_residual": max(
                abs(value - fixed - slope * sites) for sites, value in zip(prepared, cpu_s, strict=True)
            ),
            "peak_mib": peak_mib,
            "peak_mib_per_site": statistics.linear_regression(list(prepared), peak_mib).slope,
        }
    found["slope_ratio"] = found["simulation"]["cpu_s_per_site"] / found["floor"]["cpu_s_per_site"]
    found["extra_mib_per_site"] = (
        found["simulation"]["peak_mib_per_site"] - found["floor"]["peak_mib_per_site"]
    )
    return found


def measure_all(folder: Path, works: dict[str, int], repetitions: int, scaling: bool) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    plan = folder / "plan.yaml"
    write_plan(plan)
    started_with = environment()
    sets: dict[str, Any] = {}
    slope: dict[str, Any] | None = None
    for work, images in works.items():
        sites = max(SCALING) if scaling and work == "1 batch" else SITES
        say(f"{work}: making {sites} sites of {images} training images")
        whole = folder / f"{images}-images"
        run(
            [
                sys.executable,
                Path(__file__).absolute(),
                "--side",
                "sites",
                plan,
                whole,
                str(sites),
                str(images),
            ]
        )
        at = {
            count: _first_sites(whole, plan, count) for count in {SITES, *(SCALING if sites > SITES else ())}
        }
        costs, differences, size = measure(
            at[SITES], folder / "scratch", ("simulation", "floor", "plain"), repetitions
        )
        floor_mib = statistics.median(cost.peak_mib for cost in costs["floor"])
        sets[work] = {
            "images_per_site": images,
            "ratios": {name: cost_ratios(costs["simulation"], costs[name]) for name in ("floor", "plain")},
            "aim": AIMS[work],
            "extra_memory_mib": statistics.median(cost.peak_mib for cost in costs["simulation"]) - floor_mib,
            "model_mib": size * 4 / 2**20,
            "weights": {
                "floor": "equal bit for bit",
                "plain": f"within {differences['plain']:.1g} (relative L2)",
            },
            "floor_cpu_s": statistics.median(cost.cpu_s for cost in costs["floor"]),
            "samples": costs,
        }
        if sites > SITES:
            slope = measure_scaling(
                {count: at[count] for count in SCALING}, folder / "scratch", max(1, repetitions - 2)
            )
    return {
        "benchmark": "loop_overhead",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": {
            "sites": SITES,
            "rounds": ROUNDS,
            "local_epochs": 1,
            "batch_size": BATCH,
            "repetitions": repetitions,
            "threads": 1,
        },
        "sets": sets,
        "scaling": slope,
    }


def _first_sites(whole: Path, plan: Path, count: int) -> Prepared:
    """The first `count` of the sites made, as a consortium of its own."""
    folder = whole / f"first-{count}"
    for kind in ("data", "arrays"):
        (folder / kind).mkdir(parents=True)
        for site in sorted((whole / kind).iterdir())[:count]:
            (folder / kind / site.name).symlink_to(site)
    return Prepared(plan=plan, data=folder / "data", arrays=folder / "arrays")


def table(result: dict[str, Any]) -> str:
    """Markdown: ratios with the reference, what was aimed at, and what they depend on."""
    lines = [
        "| work | wall | CPU | memory | aim, wall and CPU | wall of peers |",
        "|---|---|---|---|---|---|",
    ]
    for work, found in result["sets"].items():
        peers = ", ".join(f"{name} {value}" for name, value in PEERS[work].items())
        for name in ("floor", "plain"):
            ratios: dict[str, Ratio] = found["ratios"][name]
            cells = [
                f"simulation / {name}, {work} ({found['images_per_site']} images a site)",
                *(str(ratios[key]) for key in ("wall", "cpu", "memory")),
            ]
            cells += [_verdict(ratios, found["aim"]), ""] if name == "floor" else ["", peers]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for work, found in result["sets"].items():
        lines.append(
            f"{work}: {found['extra_memory_mib']:+.0f} MiB beside the floor (one model is "
            f"{found['model_mib']:.2f} MiB). "
            f"Final weights: floor {found['weights']['floor']}, plain {found['weights']['plain']}. Floor "
            f"{found['floor_cpu_s']:.1f} CPU-s."
        )
    if result["scaling"]:
        scaling = result["scaling"]
        lines += [
            "",
            "| 1 batch | " + " | ".join(f"{sites} sites" for sites in scaling["sites"]) + " | a site |",
        ]
        lines.append("|---" * (len(scaling["sites"]) + 2) + "|")
        for unit, key, form in (("CPU-s, least", "cpu_s", ".2f"), ("MiB", "peak_mib", ".0f")):
            for name in ("simulation", "floor"):
                cells = [
                    *(format(value, form) for value in scaling[name][key]),
                    f"{scaling[name][f'{key}_per_site']:.2f}",
                ]
                lines.append(f"| {name}, {unit} | {' | '.join(cells)} |")
        residual = scaling["simulation"]["cpu_s_residual"]
        lines += [
            "",
            f"A further site costs {scaling['slope_ratio']:.3f} times the floor's CPU (largest distance "
            f"from the line {residual:.2f} s) "
            f"and {scaling['extra_mib_per_site']:+.2f} MiB more than the floor's; aim: one model.",
        ]
    env = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    load = f"load {env['load_1min']} before and {env['load_1min_after']} after"
    lines += [
        "",
        f"Median (min–max) of n = {result['work']['repetitions']}, {env['date']}, {env['cores']} cores, "
        f"{env['machine']}, {load}; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _verdict(ratios: dict[str, Ratio], aim: float) -> str:
    missed = [name for name in ("wall", "cpu") if ratios[name].median > aim]
    return f"≤ {aim}: {'missed (' + ', '.join(missed) + ')' if missed else 'met'}"


def run_side(side: str, arguments: list[str]) -> None:
    """What a child process does; see `measure`."""
    if side == "sites":
        plan, whole, sites, images = arguments
        make_sites(
            Path(whole) / "data", Path(whole) / "arrays", Path(plan), sites=int(sites), images=int(images)
        )
        return
    import safetensors.numpy

    plan_file, where, out = map(Path, arguments)
    weights, _ = floor(plan_file, where) if side == "floor" else plain(plan_file, where)
    out.mkdir(parents=True)
    safetensors.numpy.save_file(weights, out / "model.safetensors")


def main() -> int:
    arguments = command_line(__doc__, quick="1 batch only", usual=5).parse_args()
    works = {"1 batch": WORK["1 batch"]} if arguments.quick else WORK

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="fedqc-loop-overhead-") as folder:
            return measure_all(Path(folder), works, repetitions_of(arguments), scaling=not arguments.quick)

    return reported("loop_overhead", arguments, measure, table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        run_side(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
