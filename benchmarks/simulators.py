"""What does simulating an artifact cost, beside the nearest thing that other packages offer?

    python benchmarks/simulators.py [--quick] [--format json] [--update docs/performance.md]

Needs the extra `bench`: TorchIO and scikit-image. Every simulator of `common.physics.SIMULATORS` draws its
parameters at severity 0.6 for eight phantom slices of 128 x 128 and is applied to them as one batch. Rivals
take the same slices one by one, as they must:

    MR    TorchIO's transform of that name with its defaults, where it has one. What it simulates is similar,
          not equal.
    CT    no package has these artifacts; scikit-image's radon and iradon, with as many views as our scanner,
          are what one would build them from. They must return a disc as our scanner does, within 3 %, or
          nothing is printed and the exit status is 1.

Costs are CPU and wall time of one thread within this process, all sides in turns; a ratio is rival / fedqc,
above 1 fedqc is faster. Also, in CPU seconds: a projector built, and what the demo's phantoms cost (anatomy,
physics, appearance; DICOM is not written).
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
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

import numpy as np
import torch
from torch import Tensor

from common.physics import SIMULATORS, ct
from common.physics.acquisition import acquire
from common.physics.appearance import SITE_APPEARANCES
from common.physics.phantom import draw_patient
from common.physics.threads import one_thread

SIZE, BATCH, SEVERITY = 128, 8, 0.6
AIM = 10.0
"""How many times faster than its rival a simulator should be."""
DEMO_SITES, DEMO_PATIENTS, DEMO_AIM_CPU_S = 4, 340, 60.0
ENOUGH_S = 0.05
CT = ("metal", "beam_hardening", "photon_starvation", "low_dose", "ring", "ct_motion")
TORCHIO = {
    "motion": "RandomMotion",
    "ghosting": "RandomGhosting",
    "spike": "RandomSpike",
    "bias_field": "RandomBiasField",
    "rician_noise": "RandomNoise",
}
"""Simulator -> TorchIO's nearest transform. It has none of chemical shift, susceptibility or truncation."""

Rival = tuple[str, Callable[[Tensor], object]]


def rival_of(name: str) -> Rival | None:
    """What to compare a simulator with: its name, and a function of one slice.

    Raises:
        BenchmarkError: the package is not installed.
    """
    if name in CT:
        return "scikit-image radon + iradon", partial(scan_like_skimage, _optional("skimage.transform"))
    if name not in TORCHIO:
        return None
    transform = getattr(_optional("torchio"), TORCHIO[name])()
    return f"TorchIO {TORCHIO[name]}", lambda image: transform(image[None, :, :, None])


def _optional(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except ImportError as error:
        raise BenchmarkError(f"{module} is not installed; pip install -e '.[bench]' brings it") from error


def scan_like_skimage(transform: Any, image: Tensor) -> np.ndarray:
    """Radon and inverse by scikit-image, as many views and the same window as our scanner."""
    size = image.shape[-1]
    angles = np.linspace(0.0, 180.0, size * 9 // 8, endpoint=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sinogram = transform.radon(image.numpy() + 1000, theta=angles, circle=True)
        back: np.ndarray = transform.iradon(sinogram, theta=angles, filter_name="hann", circle=True) - 1000
    return back


def check_scanners() -> float:
    """How far the rival scanner's mean within a disc is from ours, as a share.

    Raises:
        BenchmarkError: they do not do the same work.
    """
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    radius = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    disc = torch.where(radius < 40, 0.0, -1000.0)
    paths = ct.project(disc[None], 0.2)
    ours = float(ct.reconstruct(paths.water, paths)[0][radius < 35].mean())
    theirs = (
        float(scan_like_skimage(_optional("skimage.transform"), disc)[(radius < 35).numpy()].mean()) + 1000
    )
    if abs(theirs / ours - 1) > 0.03:
        raise BenchmarkError(
            f"a disc of 1000 comes back as {ours:.0f} from our scanner and {theirs:.0f} from scikit-image's"
        )
    return abs(theirs / ours - 1)


def make_slices() -> dict[str, tuple[Tensor, float]]:
    """Modality -> clean phantom slices (`BATCH`, `SIZE`, `SIZE`) and their pixel spacing, mm."""
    clean = replace(
        SITE_APPEARANCES[0], matrix=SIZE, prevalence=dict.fromkeys(SITE_APPEARANCES[0].prevalence, 0.0)
    )
    found: dict[str, list[Any]] = {"CT": [], "MR": []}
    patient = 0
    while min(map(len, found.values())) < BATCH:
        for one in draw_patient(clean, patient, seed=7):
            found[one.modality].append(one)
        patient += 1
    return {
        modality: (
            torch.stack([torch.from_numpy(one.image) for one in several[:BATCH]]),
            several[0].pixel_spacing_mm,
        )
        for modality, several in found.items()
    }


def ours(name: str, images: Tensor, spacing_mm: float) -> Callable[[], object]:
    """Parameters drawn for each slice, and the batch changed."""
    modality = "CT" if name in CT else "MR"
    acquisitions = [acquire(image, modality, pixel_spacing_mm=spacing_mm) for image in images]
    simulator = SIMULATORS[name]

    def work() -> object:
        generator = torch.Generator().manual_seed(5)
        return simulator.apply(images, [simulator.draw(SEVERITY, generator, one) for one in acquisitions])

    return work


def once(work: Callable[[], object], slices: int, repetition: int) -> Cost:
    """Cost a slice; short work many times over, until a clock can see it. Memory is not measured."""
    loops = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while not loops or time.perf_counter() - wall < ENOUGH_S:
        work()
        loops += 1
    done = loops * slices
    return Cost(
        wall_s=(time.perf_counter() - wall) / done, cpu_s=(time.process_time() - cpu) / done, peak_mib=1.0
    )


def build(size: int, repetition: int) -> Cost:
    """Cost of one projector, built anew."""
    wall, cpu = time.perf_counter(), time.process_time()
    ct.projector.__wrapped__(size)
    return Cost(wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu, peak_mib=1.0)


def demo_patients(patients: int, repetition: int) -> Cost:
    """Cost a patient of the demo's four hospitals, scanners already built."""
    wall, cpu = time.perf_counter(), time.process_time()
    appearances = SITE_APPEARANCES[:DEMO_SITES]
    for appearance in appearances:
        for patient in range(patients):
            draw_patient(appearance, repetition * patients + patient, seed=7)
    done = patients * len(appearances)
    return Cost(
        wall_s=(time.perf_counter() - wall) / done, cpu_s=(time.process_time() - cpu) / done, peak_mib=1.0
    )


@contextmanager
def _steady() -> Iterator[None]:
    """One thread, here and in the library below TorchIO."""
    sitk = sys.modules.get("SimpleITK")
    if sitk is not None:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with one_thread():
        yield


def measure_all(repetitions: int, patients: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "torch", "numpy", "torchio", "scikit-image"))
    rivals = {name: rival_of(name) for name in SIMULATORS}
    with _steady():
        disagreement = check_scanners() if any(name in CT for name in SIMULATORS) else 0.0
        slices = make_slices()
        sides: dict[str, Callable[[int], Cost]] = {}
        for name, rival in rivals.items():
            images, spacing_mm = slices["CT" if name in CT else "MR"]
            sides[name] = partial(once, ours(name, images, spacing_mm), BATCH)
            if rival is not None:
                label, function = rival
                if label not in sides:
                    sides[label] = partial(once, partial(_each, function, images[:2]), 2)
        for size in (SIZE, ct.WORKING_SIZE):
            sides[f"projector {size}"] = partial(build, size)
        sides["demo"] = partial(demo_patients, patients)
        costs = interleave(sides, repetitions)
    cases: dict[str, Any] = {}
    for name, rival in rivals.items():
        found: dict[str, Any] = {"cpu_ms": _spread(costs[name], 1000), "rival": None}
        if rival is not None:
            ratios = cost_ratios(costs[rival[0]], costs[name])
            found |= {
                "rival": rival[0],
                "rival_cpu_ms": _spread(costs[rival[0]], 1000),
                "cpu": ratios["cpu"],
                "wall": ratios["wall"],
            }
        cases[name] = found
        say(f"{name}: {found}")
    return {
        "benchmark": "simulators",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": {
            "repetitions": repetitions,
            "threads": 1,
            "size": SIZE,
            "batch": BATCH,
            "severity": SEVERITY,
            "patients": patients,
        },
        "scanners_differ_by": disagreement,
        "cases": cases,
        "projector_cpu_s": {
            str(size): _spread(costs[f"projector {size}"], 1) for size in (SIZE, ct.WORKING_SIZE)
        },
        "demo_cpu_s": _spread(costs["demo"], DEMO_SITES * DEMO_PATIENTS),
    }


def _each(function: Callable[[Tensor], object], images: Tensor) -> None:
    for image in images:
        function(image)


def _spread(costs: list[Cost], factor: float) -> Ratio:
    return ratio([cost.cpu_s * factor for cost in costs], [1.0] * len(costs))


def table(result: dict[str, Any]) -> str:
    """Markdown: simulators beside their rivals, then what a projector and the demo cost."""
    lines = [
        "| simulator | CPU-ms a slice | rival | CPU-ms a slice | CPU | wall | aim |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["cases"].items():
        if found["rival"] is None:
            lines.append(f"| {name} | {_short(found['cpu_ms'], 2)} | none | | | | |")
            continue
        verdict = f"≥ {AIM:.0f}: {'met' if found['cpu'].median >= AIM else 'missed'}"
        lines.append(
            f"| {name} | {_short(found['cpu_ms'], 2)} | {found['rival']} | "
            f"{_short(found['rival_cpu_ms'], 2)} "
            f"| {_short(found['cpu'], 1)} | {_short(found['wall'], 1)} | {verdict} |"
        )
    work, env, demo = result["work"], result["environment"], result["demo_cpu_s"]
    builds = ", ".join(
        f"{_short(seconds, 2)} CPU-s for {size}" for size, seconds in result["projector_cpu_s"].items()
    )
    verdict = "met" if demo.median <= DEMO_AIM_CPU_S else "missed"
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"A projector is built in {builds}. The demo's phantoms, {DEMO_SITES} hospitals of {DEMO_PATIENTS} "
        f"patients: {_short(demo, 0)} CPU-s, from {work['patients'] * DEMO_SITES} patients a turn; aim ≤ "
        f"{DEMO_AIM_CPU_S:.0f}: {verdict}.",
        "",
        f"Median (min–max) of n = {work['repetitions']}, one thread, {work['batch']} slices of "
        f"{work['size']} × {work['size']} at severity "
        f"{work['severity']}. {env['date']}, {env['cores']} cores, {env['machine']}, load "
        f"{env['load_1min']} before and "
        f"{env['load_1min_after']} after; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _short(values: Ratio, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.min:.{digits}f}–{values.max:.{digits}f})"


def main() -> int:
    arguments = command_line(__doc__, quick="5 patients a hospital").parse_args()
    patients = 5 if arguments.quick else 20
    return reported("simulators", arguments, lambda: measure_all(repetitions_of(arguments), patients), table)


if __name__ == "__main__":
    sys.exit(main())
