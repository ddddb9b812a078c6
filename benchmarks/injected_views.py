"""What does training on injected views gain over the public model, without any label?

    FEDQC_REAL_PEOPLE=DIR [FEDQC_REAL_DATA=DIR] python benchmarks/injected_views.py
        [--quick] [--format json] [--update docs/physics.md]

People of `mr_cheng_a` and `mr_cheng_b`: 50, by a hash, are tested on; of the others two sites of 25 or of 50
are made, and, as there are no two of 100, one site of all 100. Each site trains the private head as the agent
does, on views of its own people (client/views/injected.py, on cached slices), and the mean of the heads goes
on, 20 times; the result is the mean of the last ten. Test people show each artifact once and are once
untouched: drawn by the same simulators from other seeds, on the slices in their full size, before they are
cached. Score: macro AUROC over the three artifacts, a version of a person being a case, those with another
artifact among the negatives; the interval of the public model is over draws of test people, ± is the spread
over draws of the noise.

    views     1, 2, 4 or 8 versions of a person, in the place of any label; "1": by a coin with or without
    noise     of ε 2 at δ 1e-5 for the 20 steps alone; 0: the same steps without it, not private
    permuted  control: the labels of the views are permuted among all rows

Real labels, where FEDQC_REAL_DATA is set: slices with the label above percentiles of clean slices of their
folder, for the public head and for one trained with views at the larger number of people.

The probe: a linear model sees mean, deviation, share of high frequencies and traces of rounding of cached
slices, of which half became view 0. It must not tell which. Beside it the same for the network's features.

Step and clip were looked for on the test people (three clips, six steps): optimistic. Test people of one
collection say nothing about a hospital never seen.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import public_model
import torch
from measuring import environment, to_json, update_table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from client.dicom.dicom import SliceHeader
from client.dp.dp_sgd import PrivateSteps, train_private_head
from client.dp.injected import InjectedRows
from client.simulation.people import Deal, find_people
from client.simulation.real_slices import as_square, pixels_of, seed_of
from client.site.config import nominal_bucket
from client.views import injected
from client.views.acquisition import MIN_BODY, acquisition_of, body_of
from client.views.corruption import DRAWS, corrupt, shows, simulated
from client.views.injected import ViewCoins, views_of_patient
from common.artifacts import DEFAULT_LABELS, INDEX, MODALITIES
from common.counts import per_patient
from common.learning import extract_features, set_threads
from common.model_file import load_model
from common.models import build
from common.physics.acquisition import uniform
from common.plan import Inject
from common.preprocess import normalize_image, to_stored
from common.privacy import noise_multiplier_for
from common.weights import manifest_of, unflatten

FOLDERS = ("mr_cheng_a", "mr_cheng_b")
SIZE, TESTED, SITES, SLICES = 128, 50, 2, 4
STEPS, AVERAGED, CLIP, STEP = 20, 10, 0.1, 15.0
EPSILON, DELTA = 2.0, 1e-5
MR = MODALITIES.index("MR")
ARTIFACTS = simulated("MR")
OUTPUTS = [INDEX[name] for name in ARTIFACTS]


@dataclass(frozen=True, kw_only=True)
class Imaged:
    """A person's slices: as read, and as a site caches them."""

    name: str
    full: list[np.ndarray]
    headers: list[SliceHeader]
    spacings_mm: list[float]
    cached: np.ndarray  # int16 (slices, SIZE, SIZE)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features and labels of people, as the head is trained or tested on."""

    features: np.ndarray  # float32 (n, F)
    labels: np.ndarray  # float32 (n, artifacts)
    owners: np.ndarray  # int64 (n,)
    weights: np.ndarray  # float64 (n,)


def read_people(root: Path, most: int) -> list[Imaged]:
    """People in the order of a hash of their names."""
    found, _ = find_people(
        [root / folder for folder in FOLDERS],
        Deal(sites=1, seed=1, slices=SLICES),
        say=lambda _: None,
        progress=lambda *_: None,
    )
    people = []
    for person in sorted(found, key=lambda one: hashlib.sha256(one.name.encode()).digest())[:most]:
        squares = [(as_square(pixels_of(place), place.header), place.header) for place in person.places]
        kept = [
            (image, spacing, header)
            for (image, spacing), header in squares
            if float(body_of(torch.from_numpy(image), "MR").float().mean()) >= MIN_BODY
        ]
        if kept:
            images = [image for image, _, _ in kept]
            people.append(
                Imaged(
                    name=person.name,
                    full=images,
                    headers=[header for _, _, header in kept],
                    spacings_mm=[spacing for _, spacing, _ in kept],
                    cached=np.stack([stored(image) for image in images]),
                )
            )
    return people


def stored(image: np.ndarray) -> np.ndarray:
    return to_stored(normalize_image(image, "MR", SIZE), "MR")


def tested_rows(people: Sequence[Imaged], features: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """Each person once untouched and once with each artifact, as `--per-person` draws it."""
    images, labels, owners = [], [], []
    for number, person in enumerate(people):
        acquisitions = [
            acquisition_of(torch.from_numpy(image), header, spacing)
            for image, header, spacing in zip(person.full, person.headers, person.spacings_mm, strict=True)
        ]
        for place, name in enumerate(["", *ARTIFACTS]):
            generator = torch.Generator().manual_seed(seed_of("another draw", person.name, name))
            for _ in range(DRAWS):
                severities = {name: uniform(generator, 0.6, 1.0)} if name else {}
                made = corrupt(person.full, "MR", severities, acquisitions, generator)
                if shows(made, severities):
                    truth = np.full(len(DEFAULT_LABELS), np.nan, np.float32)
                    truth[OUTPUTS] = [float(one == name) for one in ARTIFACTS]
                    images += [stored(image) for image in made.images]
                    labels += [truth] * len(made.images)
                    owners += [number * 10 + place] * len(made.images)
                    break
    return Rows(
        features=features(np.stack(images)),
        labels=np.stack(labels),
        owners=np.array(owners),
        weights=np.zeros(len(owners)),
    )


@contextmanager
def remembered() -> Iterator[None]:
    """Views that more settings share are drawn once: the same coins give the same images."""
    real, known = injected._with_artifact, dict[tuple[int, str], Any]()

    def once(clean: Any, modality: Any, name: str, acquisitions: Any, generator: Any, inject: Any) -> Any:
        key = generator.initial_seed(), name
        if key not in known:
            known[key] = real(clean, modality, name, acquisitions, generator, inject)
        return known[key]

    with patch.object(injected, "_with_artifact", once):
        yield


def training_rows(
    people: Sequence[Imaged], views: int, features: Callable[[np.ndarray], np.ndarray]
) -> tuple[Rows, int]:
    """What a site trains on without a sheet, and how many views were left out."""
    parts, left_out = [], 0
    for person in people:
        blank = np.full((len(person.cached), len(DEFAULT_LABELS)), np.nan, np.float32)
        coins = ViewCoins(key=b"benchmark", run="run", patient=person.name)
        inject = Inject(views=views)
        parts.append(views_of_patient(person.cached, person.headers, blank, coins, inject, max_slices=SLICES))
        left_out += parts[-1].left_out
    owners = np.repeat(np.arange(len(parts)), [len(part.images) for part in parts])
    rows = Rows(
        features=np.concatenate([features(part.images) for part in parts if len(part.images)]),
        labels=np.concatenate([part.labels for part in parts]),
        owners=owners,
        weights=np.concatenate([part.weights for part in parts]),
    )
    return rows, left_out


def trained(
    head: tuple[np.ndarray, np.ndarray], sites: Sequence[Rows], views: int, nominal: int, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """The head after `STEPS` rounds of one private step a site, mean of the last `AVERAGED`."""
    request = PrivateSteps(
        steps=1,
        learning_rate=STEP,
        clip_norm=CLIP,
        noise_multiplier=noise,
        sample_rate=1.0,
        nominal_patients=nominal,
        max_slices_per_patient=SLICES,
    )
    weight, bias = head
    last = []
    for _ in range(STEPS):
        answers = [
            train_private_head(
                weight,
                bias,
                site.features,
                site.labels,
                site.owners,
                request,
                injected=InjectedRows(weights=site.weights, share=1.0, views=views),
            )
            for site in sites
        ]
        weight = np.mean([answer.weight for answer in answers], axis=0)
        bias = np.mean([answer.bias for answer in answers], axis=0)
        last = [*last, (weight, bias)][-AVERAGED:]
    return np.mean([one for one, _ in last], axis=0), np.mean([one for _, one in last], axis=0)


def macro(head: tuple[np.ndarray, np.ndarray], rows: Rows, kept: np.ndarray | None = None) -> float:
    """Macro AUROC over the artifacts; `kept`: test people, repeated as they were drawn."""
    scores, truth = per_patient(rows.features @ head[0].T + head[1], rows.labels, rows.owners)
    if kept is not None:
        people = np.unique(rows.owners) // 10
        chosen = np.concatenate([np.flatnonzero(people == person) for person in kept])
        scores, truth = scores[chosen], truth[chosen]
    return float(np.mean([roc_auc_score(truth[:, one], scores[:, one]) for one in OUTPUTS]))


def probe(people: Sequence[Imaged], features: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Cross-validated AUROC of telling view 0 from the cached slice, and what chance gives at most."""
    pictures, passed = [], []
    for number, person in enumerate(people):
        views = injected._version(
            *_as_clean(person), ViewCoins(key=b"p", run="", patient=person.name).generator(0)
        )[0]
        pictures.append(views if number % 2 else person.cached)
        passed += [number % 2] * len(person.cached)
    images, owners = np.concatenate(pictures), np.array(passed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = {}
    for name, table in (("statistics", _statistics(images)), ("features", features(images))):
        scores = cross_val_predict(model, table, owners, cv=folds, method="decision_function")
        found[name] = float(roc_auc_score(owners, scores))
    return found | {"bound": float(0.5 + 2 * 0.29 / np.sqrt(len(people) / 4))}


def _as_clean(person: Imaged) -> tuple[Any, ...]:
    clean = [injected.from_stored(image, "MR") for image in person.cached]
    pairs = zip(clean, person.headers, strict=True)
    return clean, "MR", {}, [injected._acquisition(image, header) for image, header in pairs]


def _statistics(images: np.ndarray) -> np.ndarray:
    side = images.shape[-1]
    rows = []
    for image in images.astype(np.float64):
        spectrum = np.abs(np.fft.fft2(image)) ** 2
        high = spectrum[side // 4 : -side // 4, side // 4 : -side // 4].sum() / spectrum.sum()
        used = np.unique(image).size / image.size
        rows.append([image.mean(), image.std(), np.log(high + 1e-12), used, (image % 2).mean()])
    return np.array(rows)


def measure(root: Path, real: Path | None, *, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of the tables."""
    set_threads(1)
    model = build("small_cnn")
    manifest = manifest_of(model.state_dict())
    start = load_model(Path("common/models/small_cnn_phantoms.safetensors"), manifest)
    model.load_state_dict(unflatten(start, manifest))
    head = model.head.weight.detach().numpy().copy(), model.head.bias.detach().numpy().copy()

    def features(images: np.ndarray) -> np.ndarray:
        return extract_features(model, images, np.full(len(images), MR, np.int8), np.arange(len(images)))

    sizes, draws = ((25,), 2) if quick else ((25, 50), 5)
    tested = 12 if quick else TESTED
    people = read_people(root, tested + SITES * max(sizes))
    test, others = people[:tested], people[tested:]
    rows = tested_rows(test, features)
    say(f"{len(test)} people tested, {len(others)} train")
    rng = np.random.default_rng(0)
    spread = [macro(head, rows, rng.integers(0, len(test), len(test))) for _ in range(20 if quick else 200)]
    found: dict[str, Any] = {
        "public": macro(head, rows),
        "public_interval": np.percentile(spread, [2.5, 97.5]).tolist(),
        "gains": [],
        "probe": probe(others, features),
    }
    noise = noise_multiplier_for(EPSILON, DELTA, 1.0, STEPS)
    with remembered():
        for views in (8, 4, 2, 1):
            sites, left_out = [], 0
            for site in range(SITES):
                made, failed = training_rows(others[site::SITES], views, features)
                sites.append(made)
                left_out += failed
            say(f"{views} views drawn, {left_out} left out")
            of_sizes = [(size, [_first(site, size) for site in sites]) for size in sizes]
            of_sizes.append((SITES * sizes[-1], [_together(sites)]))  # all of them at one site
            for size, of_size in of_sizes:
                nominal = nominal_bucket(size)
                free = trained(head, of_size, views, nominal, 0.0)
                noised = [macro(trained(head, of_size, views, nominal, noise), rows) for _ in range(draws)]
                found["gains"].append(
                    {
                        "people": size,
                        "sites": len(of_size),
                        "views": views,
                        "without_noise": macro(free, rows),
                        "noise": float(np.mean(noised)),
                        "spread": float(np.std(noised, ddof=1)),
                        "left_out": left_out,
                    }
                )
                say(str(found["gains"][-1]))
                if views == 4 and size == sizes[-1]:
                    best = free
                    mixed = [_permuted(site) for site in of_size]
                    found["permuted"] = macro(trained(head, mixed, views, nominal, 0.0), rows)
                    noised_head = trained(head, of_size, views, nominal, noise)
    if real is not None:
        with (real / "labels_eyeballed.csv").open(newline="", encoding="utf-8") as handle:
            labels = {row["file"]: row["label"] for row in csv.DictReader(handle)}
        folders = [real / "site_mr_philips_bangalore", real / "site_mr_siemens_trio_usc"]
        found["real_labels"] = []
        for name, one in (("public", head), ("4 views, no noise", best), ("4 views, ε 2", noised_head)):
            with torch.no_grad():
                model.head.weight.copy_(torch.as_tensor(one[0]))
                model.head.bias.copy_(torch.as_tensor(one[1]))
                counted = public_model.real_labels(model, real, folders, labels)
            found["real_labels"] += [{"head": name} | row for row in counted]
    return found


def _first(rows: Rows, people: int) -> Rows:
    kept = rows.owners < people
    return Rows(
        features=rows.features[kept],
        labels=rows.labels[kept],
        owners=rows.owners[kept],
        weights=rows.weights[kept],
    )


def _together(sites: Sequence[Rows]) -> Rows:
    """The rows of several sites as those of one."""
    starts = np.cumsum([0, *(site.owners.max() + 1 for site in sites[:-1])])
    return Rows(
        features=np.concatenate([site.features for site in sites]),
        labels=np.concatenate([site.labels for site in sites]),
        owners=np.concatenate([site.owners + start for site, start in zip(sites, starts, strict=True)]),
        weights=np.concatenate([site.weights for site in sites]),
    )


def _permuted(rows: Rows) -> Rows:
    order = np.random.default_rng(3).permutation(len(rows.labels))
    return replace(rows, labels=rows.labels[order])


def table(found: dict[str, Any]) -> str:
    """The tables of the page."""
    low, high = found["public_interval"]
    lines = [
        f"Public model {found['public']:.3f} [{low:.3f}, {high:.3f}].",
        "",
        "| people a site | views | without noise | ε 2 | gain at ε 2 |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(found["gains"], key=lambda one: (one["people"], one["views"])):
        lines.append(
            f"| {row['people']}{', one site' if row['sites'] == 1 else ''} | {row['views']} "
            f"| {row['without_noise']:.3f} | {row['noise']:.3f} ± {row['spread']:.3f} "
            f"| {row['noise'] - found['public']:+.3f} |"
        )
    probe_ = found["probe"]
    lines += [
        "",
        f"Control, labels of the views permuted (4 views, no noise): {found['permuted']:.3f}. Probe of view "
        f"0 against the cached slice: {probe_['statistics']:.2f} from statistics, "
        f"{probe_['features']:.2f} from the network's features; chance stays below {probe_['bound']:.2f}.",
    ]
    if found.get("real_labels"):
        lines += [
            "",
            "| real label, folder | head | above | slices | AUROC |",
            "|---|---|---|---|---|",
            *(
                f"| {row['label']}, {row['folder'].removeprefix('site_mr_').replace('_', ' ')} "
                f"| {row['head']} | {row['above']} | {row['hits']} of {row['of']} | {row['auroc']:.2f} |"
                for row in found["real_labels"]
            ),
        ]
    about = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join([*lines, "", f"{about['date']}, {about['machine']}, {versions}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="12 people tested, 25 a site, two draws")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="replace the table of this page")
    arguments = parser.parse_args()
    if "FEDQC_REAL_PEOPLE" not in os.environ:
        sys.exit("FEDQC_REAL_PEOPLE is not set: the folder that holds mr_cheng_a and mr_cheng_b")
    real = os.environ.get("FEDQC_REAL_DATA")
    found = measure(
        Path(os.environ["FEDQC_REAL_PEOPLE"]),
        Path(real) if real else None,
        quick=arguments.quick,
        say=lambda text: print(text, file=sys.stderr),
    )
    found["environment"] = environment()
    print(to_json(found) if arguments.format == "json" else table(found))
    if arguments.update:
        update_table(arguments.update, "injected_views", table(found))


if __name__ == "__main__":
    main()
