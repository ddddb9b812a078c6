"""What does it cost to read a hospital's files once, to read them again from the cache, and how much memory
does it take?

    python benchmarks/data_path.py [--quick] [--format json] [--update docs/performance.md]

Synthetic files: CT of 512 x 512 and MR of 256 x 256, half and half, ten slices a patient; four fifths
uncompressed, one fifth JPEG 2000 without loss. A few images, each written under many headers. Stored slices
are of the default image size. Four questions:

    intake   `load_or_build` on an empty cache, which uses all cores, beside `plain`, the loop one would
             write: dcmread, pixel_array, rescale, the same `normalize_image` and `to_stored`, kept in memory,
             one process. What fedqc does and plain does not: child processes with limits, their start, every
             check of the reader, digests of each file and image, measures of quality, a database and slices
             on the disk with fsync.
    epoch    every slice once in shuffled batches of 32 from the cache (`Slices.images[batch]`), beside
             decoding again (`plain`).
    check    `check_site` on a folder that has not changed since, beside the first time (no cache; the site's
             key stays); as a function, and as `fedqc data check` from the start of the process to its end.
    memory   the peak of resident memory of a build, of the process and of the largest of its children, at ten
             times as many slices.

Each side is a fresh process whose clock starts after its imports, except for whole commands; the sides take
turns. The cache must hold plain's slices, and the second check must say what the first said, bit for bit, or
nothing is printed and the exit status is 1. Files are in the page cache. Linux counts the memory that the
starting process had, when it started a child, into that child's peak.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    KIB_PER_MIB,
    BenchmarkError,
    Cost,
    Ratio,
    environment,
    interleave,
    ratio,
    run,
    to_json,
    update_table,
)

if TYPE_CHECKING:
    import numpy as np
    from pydicom.dataset import Dataset

SIZES = {"quick": (50, 500), "full": (500, 5000)}
"""Slices of the small and the large site."""

BATCH, SLICES_A_PATIENT = 32, 10
COMPRESSED_EVERY = 5  # patients
DIFFERENT_IMAGES = 8  # of each modality; the rest is their headers
SIDES_PX = {"CT": 512, "MR": 256}
KINDS = ("native", "jpeg-2000")
"""Folders below images/."""

AIMS = {"epoch": 80.0, "check": 20.0, "memory": 1.1}
"""Least `plain / epoch`, least `first / second`, most memory at ten times as many slices. Of intake the aim
is a CPU of at most 1.6 times plain, and on two cores no more wall time.
"""

ENOUGH_S = 0.5
KEY = bytes(range(32))
CACHE = Path("state", "cache")
"""In a site folder."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site folder, and how many slices lie in each of its folders of images."""

    folder: Path
    slices: dict[str, int]

    def images(self, kind: str = "") -> Path:
        return self.folder / "images" / kind


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a side says when it is done."""

    wall_s: float
    cpu_s: float  # children too
    own_mib: float  # peaks of resident memory
    children_mib: float
    result: str  # digest of the slices, or the report: the same for sides that did the same work


# ---- files


def make_site(folder: Path, slices: int) -> None:
    """A site with this many slices, its labels and its key. The same arguments give the same files."""
    from client.site.made import write_site_yaml
    from common.artifacts import DEFAULT_LABELS, applies_to

    rows = []
    for file, modality in _write_images(folder / "images", slices):
        rows.append(
            [
                file,
                *(
                    str(len(rows) % 2) if may_occur else ""
                    for may_occur in applies_to(modality, DEFAULT_LABELS)
                ),
            ]
        )
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["file", *DEFAULT_LABELS], *rows])
    fields: dict[str, object] = {
        "name": "benchmark",
        "kind": "synthetic",
        "cohort": "benchmark",
        "nominal_patients": 50,
    }
    write_site_yaml(folder, fields | {"stand_in": "patients are computer-generated phantoms"}, key=KEY)


def _write_images(root: Path, slices: int) -> Iterator[tuple[str, str]]:
    """Write the files; the name below `root` and the modality of each."""
    import pydicom
    from pydicom.uid import JPEG2000Lossless

    from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice

    images = {modality: make_images(modality, DIFFERENT_IMAGES) for modality in SIDES_PX}
    compressed: dict[tuple[str, int], bytes] = {}
    for number in range(slices):
        patient, position = divmod(number, SLICES_A_PATIENT)
        modality, which = ("CT", "MR")[patient % 2], number % DIFFERENT_IMAGES
        kind = KINDS[patient % COMPRESSED_EVERY == COMPRESSED_EVERY - 1]
        path = root / kind / f"{patient:05d}" / f"{position:02d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        name = f"benchmark {patient}"
        write_slice(
            path,
            images[modality][which],
            HeaderFacts(
                modality=modality,
                pixel_spacing_mm=400 / SIDES_PX[modality],
                patient_id=f"PHANTOM-{patient:05d}",
                study_uid=make_uid(f"{name} study".encode()),
                series_uid=make_uid(f"{name} series".encode()),
                sop_uid=make_uid(f"{name} {position}".encode()),
                instance_number=position + 1,
                slice_position_mm=5.0 * position,
                slice_thickness_mm=5.0,
                intercept=-1024.0 if modality == "CT" else 0.0,
                bits_stored=12,
                signed=False,
            ),
        )
        if kind == "jpeg-2000":
            dataset = pydicom.dcmread(path)
            if (modality, which) not in compressed:
                dataset.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
                compressed[modality, which] = dataset.PixelData
            _put_compressed(dataset, JPEG2000Lossless, compressed[modality, which])
            dataset.save_as(path, enforce_file_format=True)
        yield path.relative_to(root).as_posix(), modality


def _put_compressed(dataset: Dataset, syntax: str, pixels: bytes) -> None:
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = pixels
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def make_images(modality: str, count: int) -> list[np.ndarray]:
    """Bodies with organs and a scanner's noise, in physical units of 12 bits: HU from -1024, or MR signal
    from 0.
    """
    import numpy as np

    side = SIDES_PX[modality]
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    generator = np.random.default_rng(7)
    inside = [30.0, -850.0, -850.0, 60.0, 900.0] if modality == "CT" else [900.0, 300.0, 300.0, 1400.0, 60.0]
    made = []
    for _ in range(count):
        image = np.full((side, side), -1000.0 if modality == "CT" else 0.0)
        places = np.array(
            [(0.0, 0.0), (0.0, -0.35), (0.0, 0.35), (0.25, 0.0), (0.5, 0.0)]
        ) + generator.normal(0, 0.02, (5, 2))
        radii = [(0.7, 0.9), (0.4, 0.25), (0.4, 0.25), (0.2, 0.2), (0.1, 0.1)]
        for value, (top, left), (tall, wide) in zip(inside, places, radii, strict=True):
            image[((rows - top) / tall) ** 2 + ((columns - left) / wide) ** 2 < 1] = value
        image += generator.normal(0, 15, image.shape)
        made.append(np.clip(np.rint(image), *((-1024, 3071) if modality == "CT" else (0, 4095))))
    return made


# ---- sides, each in a process of its own


def plain(images: Path) -> tuple[Callable[[], list[np.ndarray]], Callable[[list[np.ndarray]], str]]:
    """The loop that one would write: every slice decoded and prepared, in memory."""
    import numpy as np
    import pydicom
    from pydicom.pixels import apply_rescale

    from common.preprocess import DEFAULT_SIZE, normalize_image, to_stored

    def work() -> list[np.ndarray]:
        kept = []
        for path in sorted(images.rglob("*.dcm")):
            dataset = pydicom.dcmread(path)
            image = apply_rescale(dataset.pixel_array, dataset).astype(np.float32)
            kept.append(to_stored(normalize_image(image, dataset.Modality, DEFAULT_SIZE), dataset.Modality))
        return kept

    return work, lambda kept: digest(np.stack(kept))


def intake(images: Path, cache: Path) -> tuple[Callable[[], Any], Callable[[Any], str]]:
    """fedqc's cache, from nothing."""
    from client.dicom.cache import load_or_build
    from common.preprocess import DEFAULT_SIZE

    shutil.rmtree(cache, ignore_errors=True)
    return partial(load_or_build, images, KEY, cache, DEFAULT_SIZE), lambda slices: digest(slices.images)


def epoch(images: Path, cache: Path) -> tuple[Callable[[], Any], Callable[[Any], str]]:
    """Every slice of the cache once, in shuffled batches."""
    import numpy as np

    from client.dicom.cache import load_or_build
    from common.preprocess import DEFAULT_SIZE

    slices = load_or_build(images, KEY, cache, DEFAULT_SIZE)
    if slices.built:
        raise BenchmarkError("the epoch found no cache")
    generator = np.random.default_rng(7)

    def work() -> None:
        order = generator.permutation(len(slices.images))
        for start in range(0, len(order), BATCH):
            slices.images[order[start : start + BATCH]]

    return work, lambda _: digest(slices.images)


def check(site: Path, first: bool) -> tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]:
    """The intake report."""
    from client.data.cohort import check_site

    if first:
        shutil.rmtree(site / CACHE, ignore_errors=True)
    return partial(check_site, site), lambda report: json.dumps(report, sort_keys=True)


SIDES: dict[str, Callable[..., tuple[Callable[[], Any], Callable[[Any], str]]]] = {
    "plain": plain,
    "intake": intake,
    "epoch": epoch,
    "first": partial(check, first=True),
    "second": partial(check, first=False),
}
"""Each imports what it needs and gives the work whose cost counts, and what tells its result."""

_REPEATED = frozenset({"epoch", "second"})
"""Short work, done until a clock can see it."""


def run_side(side: str, out: Path, arguments: list[str]) -> None:
    """Do the work of a side in this process, and write its `Outcome`."""
    work, told = SIDES[side](*map(Path, arguments))
    loops, wall_s, cpu_s = 0, time.perf_counter(), _cpu_s()
    while not loops or (side in _REPEATED and time.perf_counter() - wall_s < ENOUGH_S):
        result = work()
        loops += 1
    wall_s, cpu_s = (time.perf_counter() - wall_s) / loops, (_cpu_s() - cpu_s) / loops
    own_mib, children_mib = (
        resource.getrusage(who).ru_maxrss / KIB_PER_MIB
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    outcome = Outcome(
        wall_s=wall_s, cpu_s=cpu_s, own_mib=own_mib, children_mib=children_mib, result=told(result)
    )
    out.write_text(to_json(outcome), encoding="utf-8")


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def digest(slices: np.ndarray) -> str:
    """SHA-256 of the slices one after the other."""
    found = hashlib.sha256()
    for image in slices:
        found.update(image.tobytes())
    return f"{len(slices)} slices {found.hexdigest()}"


# ---- measuring


def start(side: str, *arguments: Path, scratch: Path) -> Outcome:
    """Run a side in a fresh process."""
    out = scratch / "outcome.json"
    out.unlink(missing_ok=True)
    run([sys.executable, Path(__file__).absolute(), "--side", side, out, *arguments])
    return Outcome(**json.loads(out.read_text(encoding="utf-8")))


def in_turns(
    sides: dict[str, tuple[str, tuple[Path, ...]]], repetitions: int, scratch: Path
) -> dict[str, list[Cost]]:
    """The costs of sides that end with the same result.

    Args:
        sides: name -> the side and its arguments.
    Raises:
        BenchmarkError: the results differ.
    """
    results: dict[str, str] = {}

    def once(name: str, repetition: int) -> Cost:
        side, arguments = sides[name]
        outcome = start(side, *arguments, scratch=scratch)
        results[name] = outcome.result
        if len(set(results.values())) > 1:
            raise BenchmarkError(
                f"{name} did other work than {', '.join(other for other in results if other != name)}"
            )
        return Cost(
            wall_s=outcome.wall_s, cpu_s=outcome.cpu_s, peak_mib=max(outcome.own_mib, outcome.children_mib)
        )

    return interleave({name: partial(once, name) for name in sides}, repetitions, say)


def speedup(costs: dict[str, list[Cost]], reference: str, side: str, what: str = "wall_s") -> Ratio:
    """How many times faster than the reference."""
    return ratio(
        [getattr(cost, what) for cost in costs[reference]], [getattr(cost, what) for cost in costs[side]]
    )


def measure_reading(site: Site, repetitions: int, scratch: Path) -> dict[str, Any]:
    """Intake and epoch beside plain, for each kind of file."""
    found: dict[str, Any] = {}
    for kind, slices in site.slices.items():
        if not slices:
            continue
        images, cache = site.images(kind), scratch / f"cache-{kind}"
        say(f"{kind}: {slices} slices")
        sides = {
            "plain": ("plain", (images,)),
            "intake": ("intake", (images, cache)),
            "epoch": ("epoch", (images, cache)),
        }
        costs = in_turns(sides, repetitions, scratch)
        found[kind] = {
            "slices": slices,
            "turns": repetitions,
            "intake": {
                "wall": speedup(costs, "plain", "intake"),
                "cpu": speedup(costs, "plain", "intake", "cpu_s"),
            },
            "epoch": {
                "wall": speedup(costs, "plain", "epoch"),
                "cpu": speedup(costs, "plain", "epoch", "cpu_s"),
                "aim": AIMS["epoch"],
            },
            "samples": costs,
        }
    return found


def measure_check(site: Site, repetitions: int, scratch: Path) -> dict[str, Any]:
    """The second check beside the first, as a function."""
    costs = in_turns({name: (name, (site.folder,)) for name in ("first", "second")}, repetitions, scratch)
    return _check_found(site, costs, repetitions) | {"aim": AIMS["check"]}


def measure_check_command(site: Site, repetitions: int) -> dict[str, Any]:
    """The same of `fedqc data check`, whole processes."""
    command = [Path(sys.executable).with_name("fedqc"), "data", "check", site.folder, "--format", "json"]

    def whole(_: int, *, first: bool) -> Cost:
        if first:
            shutil.rmtree(site.folder / CACHE, ignore_errors=True)
        return run(command)

    costs = interleave(
        {"first": partial(whole, first=True), "second": partial(whole, first=False)}, repetitions, say
    )
    return _check_found(site, costs, repetitions)


def _check_found(site: Site, costs: dict[str, list[Cost]], repetitions: int) -> dict[str, Any]:
    times = {
        what: speedup(costs, "first", "second", field)
        for what, field in (("wall", "wall_s"), ("cpu", "cpu_s"))
    }
    return {"slices": sum(site.slices.values()), "turns": repetitions, **times, "samples": costs}


def measure_memory(sites: list[Site], repetitions: int, scratch: Path) -> dict[str, Any]:
    """Peaks of a build at each size, in turns."""
    own: list[list[float]] = [[] for _ in sites]
    children: list[list[float]] = [[] for _ in sites]
    for _ in range(repetitions):
        for place, site in enumerate(sites):
            outcome = start("intake", site.images(), scratch / "cache", scratch=scratch)
            own[place].append(outcome.own_mib)
            children[place].append(outcome.children_mib)
            say(
                f"memory, {sum(site.slices.values())} slices: {outcome.own_mib:.1f} MiB, children "
                f"{outcome.children_mib:.1f} MiB"
            )
    return {
        "slices": [sum(site.slices.values()) for site in sites],
        "turns": repetitions,
        "process": {"ratio": ratio(own[-1], own[0]), "mib": [statistics.median(values) for values in own]},
        "children": {
            "ratio": ratio(children[-1], children[0]),
            "mib": [statistics.median(values) for values in children],
        },
        "aim": AIMS["memory"],
    }


def measure_all(folder: Path, sizes: tuple[int, int], repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    packages = ("fedqc", "numpy", "scipy", "pydicom", "pylibjpeg-openjpeg")
    started_with = environment(packages)
    sites = []
    for size in sizes:
        say(f"making a site of {size} slices")
        where = folder / f"{size}-slices"
        run([sys.executable, Path(__file__).absolute(), "--side", "site", where, str(size)])
        sites.append(
            Site(
                folder=where,
                slices={kind: len(list((where / "images" / kind).rglob("*.dcm"))) for kind in KINDS},
            )
        )
    small, large = sites
    few = min(2, repetitions)  # where a turn takes minutes
    scratch = folder / "scratch"
    scratch.mkdir()
    return {
        "benchmark": "data_path",
        "work": {"slices": list(sizes), "batch": BATCH},
        "reading": measure_reading(large, few, scratch),
        "check": [measure_check(small, repetitions, scratch), measure_check(large, few, scratch)],
        "command": [measure_check_command(small, repetitions)],
        "memory": measure_memory([small, large], few, scratch),
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
    }


# ---- output


def table(result: dict[str, Any]) -> str:
    """Markdown: ratios, what was aimed at, and what they depend on."""
    lines = ["| | slices | n | wall | CPU | aim, wall |", "|---|---|---|---|---|---|"]
    for what, title in (("intake", "plain / intake"), ("epoch", "plain / epoch from the cache")):
        for kind, found in result["reading"].items():
            lines.append(_row(f"{title}, {kind}", found | found[what]))
    for what, title in (
        ("check", "first / second check"),
        ("command", "first / second check, whole commands"),
    ):
        lines += [_row(title, found) for found in result[what]]
    memory = result["memory"]
    few, many = memory["slices"]
    lines += [
        "",
        f"| peak memory of a build | {few} slices, MiB | {many} slices, MiB | n | ratio | aim |",
        "|---|---|---|---|---|---|",
    ]
    for who, title in (("process", "the process"), ("children", "largest of its children")):
        found = memory[who]
        met = "met" if found["ratio"].median <= memory["aim"] else "missed"
        at = " | ".join(f"{mib:.1f}" for mib in found["mib"])
        lines.append(f"| {title} | {at} | {memory['turns']} | {found['ratio']} | ≤ {memory['aim']}: {met} |")
    env = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    load = f"load {env['load_1min']} before and {env['load_1min_after']} after"
    lines += [
        "",
        f"Median (min–max) of n turns, {env['date']}, {env['cores']} cores, {env['machine']}, {load}; "
        f"Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _row(title: str, found: dict[str, Any]) -> str:
    aim = found.get("aim")
    verdict = "" if aim is None else f"≥ {aim:g}: {'met' if found['wall'].median >= aim else 'missed'}"
    return (
        f"| {title} | {found['slices']} | {found['turns']} | {_short(found['wall'])} | "
        f"{_short(found['cpu'])} | {verdict} |"
    )


def _short(times: Ratio) -> str:
    places = 2 if times.median < 10 else 0
    return f"{times.median:.{places}f} ({times.min:.{places}f}–{times.max:.{places}f})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the slices")
    parser.add_argument(
        "--repetitions", type=int, help="of the checks of the small site, instead of 5, or 3 with --quick"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="also rewrite the table in this Markdown page"
    )
    arguments = parser.parse_args()
    repetitions = arguments.repetitions or (3 if arguments.quick else 5)
    try:
        with tempfile.TemporaryDirectory(prefix="fedqc-data-path-") as folder:
            result = measure_all(Path(folder), SIZES["quick" if arguments.quick else "full"], repetitions)
        if arguments.update:
            update_table(arguments.update, "data_path", table(result))
    except BenchmarkError as error:
        say(f"data_path: {error}")
        return 1
    print(to_json(result) if arguments.format == "json" else table(result))
    return 0


if __name__ == "__main__":
    if sys.argv[1:3] == ["--side", "site"]:
        make_site(Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["--side"]:
        run_side(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
