"""Does a model that has never seen a real image find simulated artifacts in real slices, folder by folder?

    FEDQC_REAL_DATA=DIR python benchmarks/public_model.py [--quick] [--model FILE] [--format json]

Every folder of real images gives clean slices (by its label file); each is shifted by whole pixels and
sometimes mirrored, then written as a negative (every simulator of the modality at severity zero) or with one
artifact at a severity of one of three bands. AUROC of that artifact's score, positives of a band against all
negatives of the folder. Intervals: two-stage bootstrap, source slices first, versions of a slice second, so
that they hold for slices of this folder and not for other people: there is one person a folder. A draw that
changes less than `fedqc data inject` asks for is drawn again, and left out after five.

Then the real labels: how many images that people called artifact or clean score above each threshold of the
negatives, as counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from client.dicom.dicom import SliceHeader, read_headers, read_slices
from client.dicom.sources import find_files, open_source
from client.simulation.real_slices import as_square
from client.views.acquisition import acquisition_of, body_of
from client.views.corruption import MIN_CHANGED, changed_share
from common.artifacts import ARTIFACTS, DEFAULT_LABELS, INDEX, MODALITIES, Modality, can_occur
from common.learning import score, set_threads
from common.model_file import load_model
from common.models import build
from common.physics import SIMULATORS, choose
from common.physics.acquisition import integer, uniform
from common.preprocess import normalize_image, to_stored
from common.weights import manifest_of, unflatten

BANDS = ((0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
CLEAN = ("no_artifact", "unlabelled", "no_motion_reference", "")
REAL = {"mri_motion": "motion", "mri_susceptibility": "susceptibility"}
MIN_BODY, DRAWS = 0.06, 5


@dataclass(frozen=True, kw_only=True)
class CleanSlice:
    file: str
    label: str
    image: np.ndarray
    header: SliceHeader
    spacing_mm: float


def sources_of(folder: Path, labels: dict[str, str]) -> Iterator[CleanSlice]:
    """The slices of a folder as squares."""
    for found in find_files(folder):
        with open_source(found) as (stream, size):
            headers = read_headers(stream, size)
            for number, pixels in read_slices(stream, size):
                image, spacing = as_square(pixels, headers[number])
                file = found.path.relative_to(folder.parent).as_posix()
                yield CleanSlice(
                    file=file,
                    label=labels.get(file, ""),
                    image=image,
                    header=headers[number],
                    spacing_mm=spacing,
                )


def body_share(source: CleanSlice) -> float:
    return float(body_of(torch.from_numpy(source.image), source.header.modality).float().mean())


def version_of(source: CleanSlice, generator: torch.Generator) -> torch.Tensor:
    """The slice shifted by whole pixels, mirrored every second time."""
    image = torch.from_numpy(source.image)
    reach = image.shape[0] // 24
    moved = image.roll((integer(generator, -reach, reach), integer(generator, -reach, reach)), (0, 1))
    return moved.flip(-1) if uniform(generator, 0, 1) < 0.5 else moved


def untouched(image: torch.Tensor, source: CleanSlice, generator: torch.Generator) -> torch.Tensor:
    acquisition = acquisition_of(image, source.header, source.spacing_mm)
    for simulator in SIMULATORS.values():
        if simulator.modality == source.header.modality and simulator.label is not None:
            image, _ = simulator.apply(image, simulator.draw(0.0, generator, acquisition))
    return image


def with_artifact(
    image: torch.Tensor, source: CleanSlice, label: str, band: tuple[float, float], generator: torch.Generator
) -> torch.Tensor | None:
    acquisition = acquisition_of(image, source.header, source.spacing_mm)
    modality = source.header.modality
    body = body_of(image, modality)
    for _ in range(DRAWS):
        simulator = SIMULATORS[choose(label, generator)]
        changed, mask = simulator.apply(
            image, simulator.draw(uniform(generator, *band), generator, acquisition)
        )
        if changed_share(image, changed, mask & body, modality) >= MIN_CHANGED[label] * min(
            1.0, band[1] / 0.75
        ):
            return changed
    return None


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    if not len(positive) or not len(negative):
        return math.nan
    return float(
        roc_auc_score(np.repeat((1, 0), (len(positive), len(negative))), np.concatenate([positive, negative]))
    )


def interval(
    positive: dict[int, np.ndarray], negative: dict[int, np.ndarray], draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95 %, percentile, two stages: source slices with replacement, then the versions of each."""
    keys = sorted(negative)
    values = []
    for _ in range(draws):
        chosen = rng.choice(keys, len(keys))
        parts = [
            [rng.choice(scores[key], len(scores[key])) for key in chosen if key in scores]
            for scores in (positive, negative)
        ]
        if all(parts):
            values.append(auroc(*(np.concatenate(part) for part in parts)))
    return (
        (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5)))
        if values
        else (math.nan, math.nan)
    )


def scores_of(model: torch.nn.Module, images: list[np.ndarray], modality: Modality) -> np.ndarray:
    stored = np.stack([to_stored(normalize_image(image, modality, 128), modality) for image in images])
    return score(
        model, stored, np.full(len(stored), MODALITIES.index(modality), np.int8), np.arange(len(stored))
    )


def make_set(folder: Path, labels: dict[str, str], *, most: int, versions: int, seed: int) -> dict[str, Any]:
    """Negatives and positives of a folder as stored 128 x 128 slices: what a model is scored on."""
    usable = [one for one in sources_of(folder, labels) if one.label in CLEAN and body_share(one) >= MIN_BODY]
    chosen = [
        usable[place]
        for place in np.unique(np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(int))
    ]
    modality = chosen[0].header.modality
    each = max(2, math.ceil(versions / len(chosen)))
    made: dict[str, Any] = {
        "folder": folder.name,
        "modality": modality,
        "sources": len(chosen),
        "missing": {},
        "images": [],
        "keys": [],
    }
    for number, source in enumerate(chosen):
        for turn in range(2 * each):
            generator = torch.Generator().manual_seed(seed + 100_000 * number + turn)
            made["images"].append(untouched(version_of(source, generator), source, generator).numpy())
            made["keys"].append((number, "", -1))
        for label in (name for name in DEFAULT_LABELS if can_occur(name, modality)):
            for band, bounds in enumerate(BANDS):
                for turn in range(each):
                    generator = torch.Generator().manual_seed(
                        seed + 100_000 * number + 1000 * (1 + INDEX[label]) + 100 * band + turn
                    )
                    changed = with_artifact(version_of(source, generator), source, label, bounds, generator)
                    if changed is None:
                        made["missing"][(label, band)] = made["missing"].get((label, band), 0) + 1
                    else:
                        made["images"].append(changed.numpy())
                        made["keys"].append((number, label, band))
    made["images"] = np.stack(
        [to_stored(normalize_image(image, modality, 128), modality) for image in made["images"]]
    )
    return made


def measure(model: torch.nn.Module, made: dict[str, Any], *, draws: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    images = made["images"]
    logits = score(
        model,
        images,
        np.full(len(images), MODALITIES.index(made["modality"]), np.int8),
        np.arange(len(images)),
    )
    cells: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (number, label, band), row in zip(made["keys"], logits, strict=True):
        for name in (
            [label] if label else [name for name in DEFAULT_LABELS if can_occur(name, made["modality"])]
        ):
            cells[name, band][number].append(float(row[INDEX[name]]))
    rows = []
    for artifact in (ARTIFACTS[INDEX[name]] for name in DEFAULT_LABELS):
        if made["modality"] not in artifact.modalities:
            continue
        negative = {number: np.array(values) for number, values in cells[artifact.name, -1].items()}
        for title, bands in (
            *((f"{low:g}-{high:g}", (band,)) for band, (low, high) in enumerate(BANDS)),
            (">= 0.5", (1, 2)),
        ):
            positive: dict[int, np.ndarray] = {}
            for number in negative:
                found = [value for band in bands for value in cells[artifact.name, band].get(number, [])]
                if found:
                    positive[number] = np.array(found)
            count = sum(map(len, positive.values()))
            value = (
                auroc(np.concatenate(list(positive.values())), np.concatenate(list(negative.values())))
                if count
                else math.nan
            )
            low, high = interval(positive, negative, draws, rng) if count else (math.nan, math.nan)
            rows.append(
                {
                    "folder": made["folder"],
                    "artifact": artifact.name,
                    "severity": title,
                    "sources": made["sources"],
                    "positives": count,
                    "not_shown": sum(made["missing"].get((artifact.name, band), 0) for band in bands),
                    "negatives": sum(map(len, negative.values())),
                    "auroc": value,
                    "low": low,
                    "high": high,
                }
            )
    return rows


def real_labels(
    model: torch.nn.Module, root: Path, folders: list[Path], labels: dict[str, str]
) -> list[dict[str, Any]]:
    """Per folder and real label: how many slices score above the 80th and 95th percentile of the folder's
    clean slices.
    """
    rows = []
    for folder in folders:
        found = [one for one in sources_of(folder, labels) if body_share(one) >= MIN_BODY]
        for label, name in REAL.items():
            marked = [one.image for one in found if one.label == label]
            clean = [one.image for one in found if one.label in ("no_artifact", "no_motion_reference")]
            if not marked or not clean:
                continue
            column = INDEX[name]
            above, reference = (
                scores_of(model, images, found[0].header.modality)[:, column] for images in (marked, clean)
            )
            for share in (80, 95):
                bound = np.percentile(reference, share)
                rows.append(
                    {
                        "folder": folder.name,
                        "label": label,
                        "above": f"{share}th percentile of {len(reference)} clean",
                        "hits": int((above > bound).sum()),
                        "of": len(above),
                        "auroc": auroc(above, reference),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("common/models/small_cnn_phantoms.safetensors"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    if "FEDQC_REAL_DATA" not in os.environ:
        sys.exit("FEDQC_REAL_DATA is not set: the folder that holds site_* folders and labels_eyeballed.csv")
    root = Path(os.environ["FEDQC_REAL_DATA"])
    with (root / "labels_eyeballed.csv").open(newline="", encoding="utf-8") as handle:
        labels = {row["file"]: row["label"] for row in csv.DictReader(handle)}
    set_threads(1)
    torch.set_grad_enabled(False)
    model = build("small_cnn")
    manifest = manifest_of(model.state_dict())
    model.load_state_dict(unflatten(load_model(arguments.model, manifest), manifest))
    folders = sorted(path for path in root.iterdir() if path.name.startswith("site_"))
    rows = []
    for folder in folders:
        print(folder.name, file=sys.stderr)
        made = make_set(
            folder,
            labels,
            most=8 if arguments.quick else 24,
            versions=16 if arguments.quick else 48,
            seed=arguments.seed,
        )
        rows += measure(model, made, draws=200 if arguments.quick else 1000)
    counts = real_labels(model, root, folders, labels)
    if arguments.format == "json":
        print(json.dumps({"artifacts": DEFAULT_LABELS, "rows": rows, "real_labels": counts}, indent=1))
        return
    print_table(rows)
    for row in counts:
        print(
            f"{row['folder']:42} {row['label']:20} {row['hits']:>4} of {row['of']} above the "
            f"{row['above']} (AUROC {row['auroc']:.2f})"
        )


def print_table(rows: list[dict[str, Any]]) -> None:
    for artifact in DEFAULT_LABELS:
        print(f"\n{artifact}")
        for row in rows:
            if row["artifact"] == artifact:
                shown = (
                    f"{row['auroc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                    if row["positives"]
                    else "nothing to show"
                )
                print(
                    f"  {row['folder']:42} {row['severity']:9} {shown:22} n = {row['positives']:3} + "
                    f"{row['negatives']:3} of {row['sources']} slices"
                    + (f", {row['not_shown']} not shown" if row["not_shown"] else "")
                )


if __name__ == "__main__":
    main()
