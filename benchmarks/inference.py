"""What does `fedqc predict` cost? The network in several forms against eager fp32, and a study in its parts.

    python benchmarks/inference.py [--quick] [--format json] [--update docs/performance.md]

One core. CPU seconds of this process (start: of a fresh one), all sides in turn within each repetition, so
that a ratio compares like with like on a machine that others use, too. Ratios: median (least - largest).

    network      logits of cached slices, which includes their two channels: 1 slice, and 200
    decode       200 DICOM files of 256 x 256 read, decoded and prepared into an empty cache
    page         report.html of the same study
    start        a fresh `fedqc predict` of one slice, its thresholds known: torch, and a kept export
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import environment, run, to_json, update_table

from client.dicom.cache import load_or_build
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.predict import exported
from client.predict.export import export
from client.predict.model import START, Model, find_model, score
from client.predict.operating_point import operating_points, user_cache
from client.predict.page import render
from client.predict.predict import predict
from common.learning import set_threads
from common.preprocess import to_channels

SLICES = 200


def write_study(folder: Path, slices: int) -> None:
    rng = np.random.default_rng(1)
    for number in range(slices):
        image = np.kron(rng.uniform(100, 900, (32, 32)), np.ones((8, 8))) + rng.normal(0, 20, (256, 256))
        write_slice(
            folder / f"{number:04d}.dcm",
            image,
            HeaderFacts(
                modality="MR",
                pixel_spacing_mm=1.0,
                patient_id="P",
                study_uid=make_uid(b"s"),
                series_uid=make_uid(b"r"),
                sop_uid=make_uid(f"i{number}".encode()),
                instance_number=number,
                slice_position_mm=float(number),
                manufacturer="SIEMENS",
                model="Verio",
                intercept=0.0,
            ),
        )


def cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(repetitions: int) -> dict[str, Any]:
    plain = find_model(START, None)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        study = root / "study"
        study.mkdir()
        write_study(study, SLICES)
        (root / "one").mkdir()
        write_study(root / "one", 1)
        os.environ["XDG_CACHE_HOME"] = str(root / "xdg")
        points = operating_points(plain, cache=user_cache())
        path = exported.folder(None) / f"{plain.sha256}{exported.SUFFIX}"
        kept = root / path.name
        export(plain, kept)
        sides = {
            "eager fp32": plain,
            "bf16, channels last": replace(plain, precision="bf16"),
            "ONNX Runtime": replace(plain, export=kept),
        }
        slices = load_or_build(study, b"k" * 32, root / "warm", plain.size)
        codes = np.ones(SLICES, np.int8)

        def network(model: Model, count: int) -> float:
            return cpu(lambda: score(model, slices.images, codes, np.arange(count)))

        found: dict[str, list[float]] = {}
        for repetition in range(repetitions + 1):  # the first warms up
            row: dict[str, float] = {}
            for side, model in sides.items():
                row[f"{side}, 1 slice"] = sum(network(model, 1) for _ in range(5)) / 5
                row[f"{side}, {SLICES} slices"] = network(model, SLICES)
            row["decode"] = cpu(
                lambda: load_or_build(study, b"k" * 32, root / f"cache{repetition}", plain.size)  # noqa: B023
            )
            row["channels"] = cpu(lambda: to_channels(slices.images, codes))
            predictions = predict(study, sides["ONNX Runtime"], points)
            row["page"] = cpu(lambda: render(predictions, "en"))  # noqa: B023
            command = [sys.executable, "-m", "common.cli", "predict", root / "one"]
            path.unlink(missing_ok=True)
            row["start, torch"] = run(command).cpu_s
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept.read_bytes())
            row["start, export"] = run(command).cpu_s
            if repetition:
                for key, value in row.items():
                    found.setdefault(key, []).append(value)
    return found


def table_of(found: dict[str, list[float]]) -> str:
    lines = ["| part | CPU s, median | ratio to eager fp32 (start: to torch) |", "|---|---|---|"]
    for part, values in found.items():
        base = None
        if part.endswith(("slice", "slices")):
            base = found["eager fp32" + part[part.rindex(", ") :]]
        elif part.startswith("start"):
            base = found["start, torch"]
        ratio = ""
        if base is not None and base is not values:
            ratios = [one / other for one, other in zip(values, base, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        lines.append(f"| {part} | {statistics.median(values):.3f} | {ratio} |")
    whole = [
        sum(parts)
        for parts in zip(found["decode"], found[f"ONNX Runtime, {SLICES} slices"], found["page"], strict=True)
    ]
    lines.append(
        f"| decode + ONNX Runtime + page, {SLICES} slices | {statistics.median(whole):.3f} | aim: .8 |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 repetitions in place of 7")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--update", type=Path, metavar="PAGE")
    options = parser.parse_args()
    set_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of ONNX Runtime, and of the processes that are started
    found = measure(3 if options.quick else 7)
    table = table_of(found)
    if options.update:
        update_table(options.update, "inference", table)
    print(to_json({"environment": environment(), "cpu_s": found}) if options.format == "json" else table)


if __name__ == "__main__":
    main()
