"""When is a map of where a network sees an artifact to be believed? Against the simulators' masks.

    FEDQC_REAL_PEOPLE=DIR python benchmarks/explanations.py [--quick] [--people N]
        [--format json] [--update docs/predict.md]

Of each person one slice (CT: two) gets one artifact of severity .5 to 1 (client/views/corruption.py). Where
it is visible is the part of the simulator's mask in which the slice changed by more than 100 HU, or by a
tenth of the MR scale: the masks themselves begin at 10 HU and 3 % and cover most of the body. Maps are made
of slices that the network calls positive for the artifact at its image threshold from phantoms.

    occlusion     one place after the other smoothed away      (client/predict/explanation.py)
    all_but       all but one place smoothed away
    grad_cam      of the last layer with 8 places a side
    middle        large in the middle of the body, whatever the artifact
    random        8 x 8 random numbers, interpolated

pointing: share of maps whose largest pixel lies in the mask. IoU: of the mask with as many of the map's
largest pixels. deletion: mean fall of the logit while the map's largest pixels are smoothed away in tenths
(higher is better). Intervals: 95 %, bootstrap over people. A method passes for an artifact where both
pointing and IoU exceed those of the better control, each by a paired difference whose interval is above 0. Of
those that pass the one with the largest IoU is used.

Patch, smoothing and thresholds of visibility were chosen on the first 12 people of ct_tcga_17 and mr_cheng_a,
who are left out here. The shipped network has seen all people in other looks.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measuring import environment, say, to_json, update_table
from real_start import group_of, stored

from client.predict import exported
from client.predict.explanation import all_but, grad_cam, middle, occlusion, smoothed
from client.predict.model import START, Model, find_model, score
from client.predict.operating_point import operating_points, user_cache
from client.simulation.real_slices import RealSlice
from client.views.acquisition import acquisition_of, body_of
from client.views.corruption import DRAWS, MIN_CHANGED, changed_share
from common.artifacts import ARTIFACTS, MODALITIES, Modality
from common.learning import set_threads
from common.physics import SIMULATORS, choose
from common.physics.acquisition import uniform
from common.preprocess import from_stored, resample, to_stored

GROUPS = {"CT": ("ct_tcga_17", "ct_tcga_50"), "MR": ("mr_cheng_b",)}
CHOSEN_ON = {"ct_tcga_17": 12}
"""The first people of a group, on whom settings were chosen."""
SLICES = {"CT": 2, "MR": 1}
VISIBLE = {"CT": 100.0, "MR": 0.1}
TEST_SIZE, DRAWS_OF_PEOPLE, STEPS = 160, 2000, 10
METHODS = ("occlusion", "all_but", "grad_cam")
CONTROLS = ("middle", "random")
STATEMENT = Path(__file__).parents[1] / "client/predict/explanations.yaml"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One slice with one artifact."""

    person: str
    image: np.ndarray  # int16 (S, S) as cached
    mask: np.ndarray  # bool (S, S): where it is visible


def cases_of(slices: Sequence[RealSlice], artifact: str, modality: Modality, people: int) -> list[Case]:
    """At most `SLICES` of each person, and at most `people`; what shows too little is left out."""
    found: list[Case] = []
    taken: dict[str, int] = {}
    for one in slices:
        if taken.get(one.name, 0) >= SLICES[modality] or (one.name not in taken and len(taken) >= people):
            continue
        side = len(one.image)
        image = torch.from_numpy(np.ascontiguousarray(resample(one.image, min(side, TEST_SIZE))))
        spacing = one.spacing_mm * side / len(image)
        number = taken.get(one.name, 0)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{one.name}/{artifact}/{number}".encode()))
        acquisition, body = acquisition_of(image, one.header, spacing), body_of(image, modality)
        for _ in range(DRAWS):
            simulator = SIMULATORS[choose(artifact, generator)]
            drawn = simulator.draw(uniform(generator, 0.5, 1), generator, acquisition)
            changed, mask = simulator.apply(image, drawn)
            if changed_share(image, changed, mask & body, modality) < MIN_CHANGED[artifact]:
                continue
            kept = stored(changed.numpy(), modality)
            scale = 1.0 if modality == "CT" else float(np.percentile(image.numpy(), 99.5))
            change = np.where(mask.numpy(), np.abs((changed - image).numpy()), 0) / max(scale, 1e-6)
            visible = resample(change.astype(np.float32), len(kept)) > VISIBLE[modality]
            if visible.any():
                found.append(Case(person=one.name, image=kept, mask=visible))
                taken[one.name] = number + 1
            break
    return found


def maps_of(case: Case, artifact: str, modality: Modality, model: Model) -> dict[str, np.ndarray]:
    def scores(images: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return score(model, images, codes, np.arange(len(images)))

    noise = np.random.default_rng(zlib.crc32(case.image.tobytes())).random((8, 8)).astype(np.float32)
    return {
        "occlusion": occlusion(scores, case.image, modality, model.labels.index(artifact)),
        "all_but": all_but(scores, case.image, modality, model.labels.index(artifact)),
        "grad_cam": grad_cam(model.network, case.image, modality, model.labels.index(artifact)),
        "middle": middle(case.image, modality),
        "random": resample(noise, len(case.image)),
    }


def against(found: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Whether the largest pixel lies in the mask, and the overlap with as many of the largest pixels."""
    order = np.argsort(-found, axis=None, kind="stable")
    flat = mask.ravel()
    hits = int(flat[order[: flat.sum()]].sum())
    return float(flat[order[0]]), hits / (2 * int(flat.sum()) - hits)


def deletion(found: np.ndarray, case: Case, artifact: str, modality: Modality, model: Model) -> float:
    """Mean fall of the logit, from the first tenth deleted to the last."""
    image = from_stored(case.image, modality)
    base, order = smoothed(image), np.argsort(-found, axis=None, kind="stable")
    steps = []
    for step in range(STEPS + 1):
        changed = image.copy().ravel()
        gone = order[: len(order) * step // STEPS]
        changed[gone] = base.ravel()[gone]
        steps.append(to_stored(changed.reshape(image.shape), modality))
    codes = np.full(len(steps), MODALITIES.index(modality), np.int8)
    logits = score(model, np.stack(steps), codes, np.arange(len(steps)))[:, model.labels.index(artifact)]
    return float(np.mean(logits[0] - logits[1:]))


def bootstrap(values: np.ndarray, people: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean over people of their means, with its 95 % interval."""
    means = np.array([values[people == one].mean() for one in np.unique(people)])
    drawn = means[rng.integers(0, len(means), (DRAWS_OF_PEOPLE, len(means)))].mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(means.mean()), float(low), float(high)


def measure(artifact: str, modality: Modality, root: Path, model: Model, people: int) -> dict[str, Any]:
    """All methods and controls on the people of one modality."""
    cases: list[Case] = []
    for group in GROUPS[modality]:
        slices = group_of(root / group, None)
        names = list(dict.fromkeys(one.name for one in slices))[CHOSEN_ON.get(group, 0) :]
        cases += cases_of([one for one in slices if one.name in names], artifact, modality, people)
    point = operating_points(model, cache=user_cache()).images[artifact]
    codes = np.full(len(cases), MODALITIES.index(modality), np.int8)
    logits = score(model, np.stack([one.image for one in cases]), codes, np.arange(len(cases)))
    called = [
        one
        for one, logit in zip(cases, logits[:, model.labels.index(artifact)], strict=True)
        if logit >= point.threshold
    ]
    values: dict[str, list[tuple[float, float, float]]] = {}
    for case in called:
        for name, found in maps_of(case, artifact, modality, model).items():
            left = deletion(found, case, artifact, modality, model)
            values.setdefault(name, []).append((*against(found, case.mask), left))
    owners = np.array([one.person for one in called])
    table = {name: np.array(rows) for name, rows in values.items()}
    rng = np.random.default_rng(3)
    rows: dict[str, Any] = {
        name: {
            what: bootstrap(own[:, place], owners, rng)
            for place, what in enumerate(("pointing", "iou", "deletion"))
        }
        for name, own in table.items()
    }
    passed = {}
    for name in METHODS:
        above = []
        for place, what in enumerate(("pointing", "iou")):
            control = max(CONTROLS, key=lambda one: rows[one][what][0])
            above.append(bootstrap(table[name][:, place] - table[control][:, place], owners, rng))
        passed[name] = all(low > 0 for _, low, _ in above)
        rows[name]["above"] = above
    best = max([name for name in METHODS if passed[name]] or METHODS, key=lambda one: rows[one]["iou"][0])
    return {
        "artifact": artifact,
        "people": len(np.unique(owners)),
        "images": len(called),
        "of": len(cases),
        "mask_share": float(np.mean([one.mask.mean() for one in called])),
        "rows": rows,
        "passed": passed,
        "used": best,
    }


def statement(results: Sequence[Mapping[str, Any]], model: Model) -> str:
    """`client/predict/explanations.yaml`."""
    artifacts = {}
    for one in results:
        own = one["rows"][one["used"]]
        artifacts[one["artifact"]] = {
            "passed": bool(one["passed"][one["used"]]),
            "method": one["used"],
            "people": one["people"],
            "images": one["images"],
            "pointing": [round(value, 3) for value in own["pointing"]],
            "iou": [round(value, 3) for value in own["iou"]],
            "control_pointing": round(max(one["rows"][name]["pointing"][0] for name in CONTROLS), 3),
            "control_iou": round(max(one["rows"][name]["iou"][0] for name in CONTROLS), 3),
        }
    head = "# Made by benchmarks/explanations.py: which maps of where an artifact lies are worth showing.\n"
    about = {"network": model.name, "model_sha256": model.sha256, "artifacts": artifacts}
    return head + str(yaml.safe_dump(about, sort_keys=False, default_flow_style=None))


def table_of(results: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| artifact | people, images (of) | map | pointing [95 %] | IoU [95 %] | deletion [95 %] | passes |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        for place, (name, row) in enumerate(one["rows"].items()):
            head = (
                f"{one['artifact']} | {one['people']}, {one['images']} ({one['of']})" if place == 0 else " | "
            )
            cells = " | ".join(
                f"{row[what][0]:.2f} [{row[what][1]:.2f}, {row[what][2]:.2f}]"
                for what in ("pointing", "iou", "deletion")
            )
            passes = ("**yes**" if one["passed"][name] else "no") if name in METHODS else "control"
            lines.append(f"| {head} | {name} | {cells} | {passes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 people an artifact; writes no statement")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="write the table, and the package's statement"
    )
    parser.add_argument("--people", type=int, default=40, help="at most, of each group")
    options = parser.parse_args()
    root = os.environ.get("FEDQC_REAL_PEOPLE")
    if not root:
        sys.exit("FEDQC_REAL_PEOPLE is not set")
    set_threads(1)
    model = find_model(START, None, exports=exported.folder(None))  # faster where it is kept
    results, points = [], operating_points(model, cache=user_cache()).images
    for artifact in ARTIFACTS:
        if artifact.name in points:
            say(artifact.name)
            people = 4 if options.quick else options.people
            results.append(measure(artifact.name, artifact.modalities[0], Path(root), model, people))
    table = table_of(results)
    if options.update and not options.quick:
        update_table(options.update, "explanations", table)
        STATEMENT.write_text(statement(results, model), encoding="utf-8")
    print(to_json({"environment": environment(), "results": results}) if options.format == "json" else table)


if __name__ == "__main__":
    main()
