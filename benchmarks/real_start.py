"""How good is a public start at people and scanners that it never saw? Before and after, with whole groups
left out.

    FEDQC_REAL_DATA=DIR FEDQC_REAL_PEOPLE=DIR python benchmarks/real_start.py DATA [--quick]
        [--format json] [--update docs/performance.md]

DATA is the folder of the sites `people` and `public` that `make real-start` makes, and on which it trains the
shipped start. Here parts of it are left out.

A group is one folder: one scanner (FEDQC_REAL_DATA) or half of a collection of people (FEDQC_REAL_PEOPLE).
A fold leaves out several folders together, so that less is known than with one folder out; the collection of
150 people is left out whole once, so that neither its people nor its scanners are known, and half of it once,
so that only the people are new. Of each
fold a network is trained as configs/plans/pretrain_real.yaml says, from the phantoms' start, on views of the
other folders (client/simulation/training_views.py) and on phantoms, and scored on the folders left out. The
whitening that `pretrain` adds changes no score. `before` is the phantoms' start on the same slices.

Test slices keep their own look. Positives show one artifact that changed enough of the slice to be seen;
negatives are untouched, and in CT every second one shows what else is bright or streaked: dense spots
(calcification, contrast medium), photon starvation, motion, low dose. AUROC of an artifact's score against
all negatives of the group; where motion in CT is looked for, those that move are none. 95 % by a two-stage
bootstrap, people first (slices where a folder is one person), versions second. So the interval of a folder
holds for its scanner, not for the next one.

Alarms: an artifact's threshold is where 80 % of the positives of severity >= .5 are found over all *other*
collections, by networks that had not seen them; a negative of the group raises an alarm where the score of
any artifact exceeds its threshold.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import environment, to_json, update_table
from public_model import auroc, interval

from client.data.cohort import load_cohort
from client.simulation.domain_randomization import spots
from client.simulation.people import Deal, find_people
from client.simulation.real_slices import RealSlice
from client.simulation.training_views import FULL_CHANGE_AT, NAME, clean_slices, marked_files
from client.views.acquisition import acquisition_of, body_of
from client.views.corruption import DRAWS, MIN_CHANGED, changed_share
from common.artifacts import MODALITIES, Modality, can_occur
from common.learning import score, seed_for, set_threads, train_epochs
from common.model_file import load_model
from common.models import build
from common.physics import SIMULATORS, choose
from common.physics.acquisition import integer, uniform
from common.plan import RunPlan, read_plan
from common.preprocess import normalize_image, resample, to_stored
from common.progress_bar import say, silent
from common.weights import manifest_of, resolve_initial, unflatten

PLAN = Path(__file__).parents[1] / "configs/plans/pretrain_real.yaml"
SIZE, TEST_SIZE = 128, 160
BANDS: dict[str, tuple[tuple[float, float], ...]] = {
    "metal": ((0.05, 0.3), (0.5, 1.0)),
    "beam_hardening": ((0.25, 0.5), (0.5, 1.0)),
    "motion": ((0.25, 0.5), (0.5, 1.0)),
    "susceptibility": ((0.25, 0.5), (0.5, 1.0)),
    "chemical_shift": ((0.25, 0.5), (0.5, 1.0)),
    "ct_motion": ((0.25, 0.5), (0.5, 1.0)),
}
"""Artifact -> the severities of a table's columns, mild and visible."""
LABELS = tuple(BANDS)
"""Outputs of the networks, `model.labels` of the plan."""
FOLDS: tuple[tuple[str, ...], ...] = (
    ("mr_cheng_a", "mr_cheng_b", "ct_tcga_50"),
    ("site_mr_ge_signa_uthscsa", "site_mr_siemens_trio_usc", "ct_tcga_17"),
    (
        "site_mr_siemens_verio_utah",
        "site_mr_uih_umr770",
        "site_ct_philips_nottingham_phantom",
        "site_ct_unknown_lungmask",
    ),
    ("site_mr_philips_bangalore", "site_ct_siemens_basel", "site_ct_ge_lightspeed_qiicr"),
    ("mr_cheng_b",),
)
"""What is left out together."""
SENSITIVITY = 0.8
STREAKS = ("photon_starvation", "ct_motion", "low_dose")


class Stored(NamedTuple):
    """Slices as a cache holds them, and their labels."""

    images: np.ndarray  # int16 (n, S, S)
    modality: np.ndarray  # int8 (n,)
    labels: np.ndarray  # float32 (n, A), nan = not assessed; A: `model.labels`


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """Test slices of one group."""

    images: np.ndarray  # int16 (n, S, S)
    modality: Modality
    unit: np.ndarray  # int (n,): person, or slice where the group is one person
    artifact: np.ndarray  # str (n,); "" without
    band: np.ndarray  # int (n,), position in BANDS; -1 without artifact
    streaks: np.ndarray  # str (n,): the simulator of a negative's streaks; "" without
    not_shown: dict[tuple[str, int], int]
    people: int
    slices: int


def group_of(folder: Path, labels: Path | None) -> list[RealSlice]:
    """The clean slices of a folder; `name` is the person."""
    marked = {} if labels is None else marked_files(labels)
    people, _ = find_people(
        [folder], Deal(sites=1, seed=1), say=lambda text: None, progress=silent, unnamed=folder.name
    )
    return [one for person in people for one in clean_slices(person, marked, Counter())]


def stored(image: np.ndarray, modality: Modality) -> np.ndarray:
    return to_stored(normalize_image(image, modality, SIZE), modality)


def views_from(data: Path) -> dict[str, Stored]:
    """Group -> its views, as an agent reads the site that `fedqc data inject --views` wrote."""
    cohort = load_cohort(data / NAME / "site.yaml", size=SIZE, labels=LABELS)
    files = [record.file for record in cohort.records]
    groups = np.array([re.sub(r"^\d+-|-\d+\.dcm$", "", file) for file in files])
    images, modality, labels = (np.asarray(one) for one in (cohort.images, cohort.modality, cohort.labels))
    found = {}
    for group in dict.fromkeys(groups.tolist()):
        rows = np.flatnonzero(groups == group)
        found[group] = Stored(images[rows], modality[rows], labels[rows])
    return found


def phantoms_from(data: Path) -> Stored:
    """Those of the site folder that `fedqc data phantom --public` wrote."""
    cohort = load_cohort(data / "public" / "site.yaml", size=SIZE, labels=LABELS)
    return Stored(np.asarray(cohort.images), np.asarray(cohort.modality), np.asarray(cohort.labels))


def _version(clean: RealSlice, generator: torch.Generator) -> torch.Tensor:
    """The slice shifted by whole pixels, mirrored every second time."""
    image = torch.from_numpy(clean.image)
    reach = image.shape[0] // 24
    moved = image.roll((integer(generator, -reach, reach), integer(generator, -reach, reach)), (0, 1))
    return moved.flip(-1) if uniform(generator, 0, 1) < 0.5 else moved


def _otherwise_bright(
    image: torch.Tensor, clean: RealSlice, generator: torch.Generator
) -> tuple[torch.Tensor, str]:
    """A CT slice with bright objects or streaks of another cause, and the simulator of the streaks."""
    place = integer(generator, 0, len(STREAKS))
    if place == len(STREAKS):
        tissue = body_of(image, "CT") & (image > -200)
        for spot in spots(tissue, generator, integer(generator, 1, 4), (0.008, 0.03), 1.5):
            image = torch.maximum(image, image * (1 - spot) + spot * uniform(generator, 300, 1500))
        return image, ""
    simulator = SIMULATORS[STREAKS[place]]
    acquisition = acquisition_of(image, clean.header, clean.spacing_mm)
    drawn = simulator.draw(uniform(generator, 0.3, 0.8), generator, acquisition)
    return simulator.apply(image, drawn)[0], STREAKS[place]


def test_set(group: str, slices: Sequence[RealSlice], *, negatives: int, positives: int) -> TestSet:
    """Negatives, and as many positives of each artifact and band as asked for, in the folder's own look."""
    modality = slices[0].modality
    slices = [_small(one) for one in slices]
    names = sorted({one.name for one in slices})
    unit = (lambda at: names.index(slices[at].name)) if len(names) > 1 else (lambda at: at)
    order = np.random.default_rng(5).permutation(len(slices))
    images, rows = [], []
    missing: dict[tuple[str, int], int] = {}

    def one(turn: int, *words: object) -> tuple[int, torch.Tensor, torch.Generator]:
        at = int(order[turn % len(order)])
        generator = torch.Generator().manual_seed(
            zlib.crc32("/".join(map(str, (group, turn, *words))).encode())
        )
        return at, _version(slices[at], generator), generator

    for turn in range(negatives):
        at, image, generator = one(turn, "without")
        streaks = ""
        if modality == "CT" and turn % 2:
            image, streaks = _otherwise_bright(image, slices[at], generator)
        images.append(stored(image.numpy(), modality))
        rows.append((unit(at), "", -1, streaks))
    for artifact in (name for name in LABELS if can_occur(name, modality)):
        for band, (low, high) in enumerate(BANDS[artifact]):
            for turn in range(positives):
                at, image, generator = one(turn, artifact, band)
                acquisition = acquisition_of(image, slices[at].header, slices[at].spacing_mm)
                body = body_of(image, modality)
                for _ in range(DRAWS):
                    simulator = SIMULATORS[choose(artifact, generator)]
                    drawn = simulator.draw(uniform(generator, low, high), generator, acquisition)
                    changed, mask = simulator.apply(image, drawn)
                    share = changed_share(image, changed, mask & body, modality)
                    if share >= MIN_CHANGED[artifact] * min(1.0, drawn.severity / FULL_CHANGE_AT):
                        images.append(stored(changed.numpy(), modality))
                        rows.append((unit(at), artifact, band, ""))
                        break
                else:
                    missing[artifact, band] = missing.get((artifact, band), 0) + 1
    units, artifacts, bands, streaks_of = zip(*rows, strict=True)
    return TestSet(
        images=np.stack(images),
        modality=modality,
        unit=np.array(units),
        artifact=np.array(artifacts),
        band=np.array(bands),
        streaks=np.array(streaks_of),
        not_shown=missing,
        people=len(names),
        slices=len(slices),
    )


def _small(one: RealSlice) -> RealSlice:
    side = len(one.image)
    if side <= TEST_SIZE:
        return one
    image = np.ascontiguousarray(resample(one.image, TEST_SIZE))
    return replace(one, image=image, spacing_mm=one.spacing_mm * side / TEST_SIZE)


def network_of(plan: RunPlan, flat: np.ndarray) -> torch.nn.Module:
    network = build(plan.model.name, plan.model.args, plan.model.labels)
    network.load_state_dict(unflatten(flat, manifest_of(network.state_dict())))
    return network


def trained(plan: RunPlan, start: np.ndarray, parts: Sequence[Stored]) -> torch.nn.Module:
    """As the pooled arm of the plan trains."""
    images, modality, labels = (np.concatenate([part[place] for part in parts]) for place in range(3))
    network = network_of(plan, start)
    for number in range(1, plan.training.rounds + 1):
        train_epochs(
            network,
            images,
            modality,
            labels,
            np.arange(len(images)),
            training=plan.training.in_round(number),
            seed=seed_for(plan.seed, "pooled", number),
            outputs=plan.model.labels,
        )
    return network


def scores(network: torch.nn.Module, test: TestSet) -> np.ndarray:
    """Logits, float32 (n, A)."""
    modality = np.full(len(test.images), MODALITIES.index(test.modality), np.int8)
    with torch.no_grad():
        return score(network, test.images, modality, np.arange(len(test.images)))


def rows_of(group: str, left_out: str, test: TestSet, logits: np.ndarray, draws: int) -> list[dict[str, Any]]:
    """One row an artifact and band: AUROC with its interval."""
    rng, rows = np.random.default_rng(1), []
    for artifact in (name for name in LABELS if can_occur(name, test.modality)):
        column = logits[:, LABELS.index(artifact)]
        negative = _by_unit(test, column, negatives_of(test, artifact))
        for band, (low, high) in enumerate(BANDS[artifact]):
            positive = _by_unit(test, column, (test.artifact == artifact) & (test.band == band))
            count = sum(map(len, positive.values()))
            value = (
                auroc(np.concatenate(list(positive.values())), np.concatenate(list(negative.values())))
                if count
                else math.nan
            )
            bounds = interval(positive, negative, draws, rng) if count else (math.nan, math.nan)
            rows.append(
                {
                    "group": group,
                    "left_out": left_out,
                    "artifact": artifact,
                    "severity": f"{low:g}-{high:g}",
                    "visible": band == 1,
                    "people": test.people,
                    "slices": test.slices,
                    "positives": count,
                    "not_shown": test.not_shown.get((artifact, band), 0),
                    "negatives": sum(map(len, negative.values())),
                    "auroc": value,
                    "low": bounds[0],
                    "high": bounds[1],
                }
            )
    return rows


def negatives_of(test: TestSet, artifact: str) -> np.ndarray:
    """Which slices do not show an artifact, bool (n,), of those that show no artifact or its look-alikes."""
    return (test.band == -1) & (test.streaks != artifact)


def _by_unit(test: TestSet, column: np.ndarray, chosen: np.ndarray) -> dict[int, np.ndarray]:
    return {int(unit): column[chosen & (test.unit == unit)] for unit in np.unique(test.unit[chosen])}


def _collection(group: str) -> str:
    return group if group.startswith("site_") else group.rpartition("_")[0]


def alarms(tests: dict[str, TestSet], logits: dict[str, np.ndarray]) -> dict[str, float]:
    """Group -> share of its negatives that raise an alarm at the thresholds of other collections; without a
    group that has no other of its modality.

    Args:
        logits: of each group, by a model that had not seen it.
    """
    found = {}
    for group, test in tests.items():
        others = [
            name
            for name, other in tests.items()
            if other.modality == test.modality and _collection(name) != _collection(group)
        ]
        if not others:
            continue
        raised = np.zeros(len(test.images), bool)
        for artifact in (name for name in LABELS if can_occur(name, test.modality)):
            column = LABELS.index(artifact)
            visible = np.concatenate(
                [
                    logits[name][(tests[name].artifact == artifact) & (tests[name].band == 1), column]
                    for name in others
                ]
            )
            if len(visible):
                above = logits[group][:, column] > np.quantile(visible, 1 - SENSITIVITY)
                raised |= above & negatives_of(test, artifact)
        found[group] = float(raised[test.band == -1].mean())
    return found


GroupScores = dict[str, np.ndarray]


def kept(path: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The arrays in a file, or those that `make` gives, which the file then keeps; None: no file."""
    if path is None:
        return make()
    if not path.is_file():
        made = make()
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, **made)
        path.with_suffix(".part").rename(path)
    with np.load(path) as arrays:
        return dict(arrays)


def test_sets(
    groups: Sequence[str], roots: dict[str, Path], work: Path | None, quick: bool
) -> dict[str, TestSet]:
    """Group -> its test slices."""
    tests = {}
    for group in groups:
        root = roots["FEDQC_REAL_DATA" if group.startswith("site_") else "FEDQC_REAL_PEOPLE"]
        labels = root / "labels_eyeballed.csv" if group.startswith("site_") else None

        def make(group: str = group, root: Path = root, labels: Path | None = labels) -> dict[str, Any]:
            say(f"test slices of {group}")
            slices = group_of(root / group, labels)
            counts = {"negatives": 20, "positives": 6} if quick else {"negatives": 100, "positives": 40}
            made = asdict(test_set(group, slices, **counts))
            missing = made.pop("not_shown")
            return made | {
                "missing": np.array([f"{artifact} {band}" for artifact, band in missing]),
                "times": np.array(list(missing.values()), int),
            }

        arrays = kept(work and work / f"test-{group}.npz", make)
        pairs = (str(one).split() for one in arrays.pop("missing"))
        times = arrays.pop("times")
        arrays |= {name: arrays[name].item() for name in ("modality", "people", "slices") if work}
        missing = {(name, int(band)): int(count) for (name, band), count in zip(pairs, times, strict=True)}
        tests[group] = TestSet(**arrays, not_shown=missing)
    return tests


def measure(
    plan: RunPlan,
    start: np.ndarray,
    tests: dict[str, TestSet],
    views: dict[str, Stored],
    phantoms: Stored,
    *,
    folds: Sequence[Sequence[str]],
    draws: int,
    work: Path | None = None,
) -> dict[str, Any]:
    """Rows before and after, and alarms; `after` is of networks that did not see the group."""
    begin = network_of(plan, start)
    before = {group: scores(begin, test) for group, test in tests.items()}
    after: GroupScores = {}
    found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for fold in folds:

        def make(fold: Sequence[str] = fold) -> GroupScores:
            say(f"without {', '.join(fold)}")
            parts = [part for group, part in views.items() if group not in fold]
            network = trained(plan, start, [*parts, phantoms])
            return {group: scores(network, tests[group]) for group in fold if group in tests}

        for group, logits in kept(work and work / f"without-{'-'.join(fold)}.npz", make).items():
            left_out = "people" if group in after else "folder"
            after.setdefault(group, logits)
            for when, made in (("before", before[group]), ("after", logits)):
                found[when] += rows_of(group, left_out, tests[group], made, draws)
    scored = {group: test for group, test in tests.items() if group in after}
    return found | {
        "alarms": {
            "before": alarms(scored, {group: before[group] for group in scored}),
            "after": alarms(scored, after),
        }
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over folders, each as good as the other: what the aims are judged by."""
    folders = [row for row in rows if row["left_out"] == "folder" and not math.isnan(row["auroc"])]

    def mean(artifact: str, visible: bool) -> float:
        values = [
            row["auroc"] for row in folders if row["artifact"] == artifact and row["visible"] is visible
        ]
        return float(np.mean(values)) if values else math.nan

    mr = [name for name in LABELS if can_occur(name, "MR")]
    found = {f"{name}, visible": mean(name, True) for name in LABELS}
    worst = min((row["auroc"] for row in folders if row["visible"]), default=math.nan)
    return found | {
        "metal, mild": mean("metal", False),
        "MR macro, visible": float(np.mean([found[f"{name}, visible"] for name in mr])),
        "worst folder, visible": worst,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: the means with the aims, every folder, the alarms."""
    before, after = (summary(found[when]) for when in ("before", "after"))
    lines = ["| mean over folders left out | before | after | aim |", "|---|---|---|---|"]
    for name in after:
        aim = f"{AIMS[name]:.2f}" if name in AIMS else ""
        lines.append(f"| {name} | {before[name]:.3f} | {after[name]:.3f} | {aim} |")
    lines += [
        "",
        "| artifact | left out | severity | before | after | positives + negatives (people, slices) |",
        "|---|---|---|---|---|---|",
    ]
    for artifact in LABELS:
        for first, second in zip(found["before"], found["after"], strict=True):
            if second["artifact"] == artifact:
                group = second["group"].removeprefix("site_").replace("_", " ")
                what = " (other half known)" if second["left_out"] == "people" else ""
                lines.append(
                    f"| {artifact} | {group}{what} | {second['severity']} | {_cell(first)} | "
                    f"{_cell(second)} | "
                    f"{second['positives']} + {second['negatives']} "
                    f"({second['people']}, {second['slices']}) |"
                )
    lines += ["", "| negatives with an alarm | before | after |", "|---|---|---|"]
    for group, share in found["alarms"]["after"].items():
        name = group.removeprefix("site_").replace("_", " ")
        lines.append(f"| {name} | {found['alarms']['before'][group]:.0%} | {share:.0%} |")
    if found["alarms"]["after"]:
        mean = {when: np.mean(list(found["alarms"][when].values())) for when in ("before", "after")}
        lines.append(f"| mean (aim: 5 %) | {mean['before']:.0%} | {mean['after']:.0%} |")
    return "\n".join(lines)


AIMS = {
    "MR macro, visible": 0.90,
    "motion, visible": 0.80,
    "susceptibility, visible": 0.80,
    "chemical_shift, visible": 0.80,
    "metal, mild": 0.95,
    "beam_hardening, visible": 0.90,
    "worst folder, visible": 0.65,
}


def _cell(row: dict[str, Any]) -> str:
    return f"{row['auroc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row["positives"] else "–"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--quick", action="store_true", help="two folds of one round, few slices")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep test slices and scores of folds here")
    parser.add_argument("--fold", type=int, nargs="*", help="only these folds, by their number from 0")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", nargs="*", default=[], help="pages of the table"
    )
    arguments = parser.parse_args()
    roots = {
        name: Path(os.environ[name])
        for name in ("FEDQC_REAL_DATA", "FEDQC_REAL_PEOPLE")
        if name in os.environ
    }
    if len(roots) < 2:
        print("FEDQC_REAL_DATA and FEDQC_REAL_PEOPLE are not both set: the real images", file=sys.stderr)
        return 2
    quick = arguments.quick
    plan = read_plan(PLAN)
    if quick:
        rounds = plan.training.model_copy(update={"rounds": 1})
        plan = plan.model_copy(update={"training": rounds})
    set_threads(1)
    start = load_model(
        resolve_initial(plan.model.initial, plan.model.sha256),
        manifest_of(build(plan.model.name, plan.model.args, LABELS).state_dict()),
        LABELS,
    )
    folds = FOLDS[1:3] if quick else [FOLDS[place] for place in arguments.fold or range(len(FOLDS))]
    groups = list(dict.fromkeys(group for fold in folds for group in fold))
    if arguments.work is not None:
        arguments.work.mkdir(exist_ok=True)
    found = measure(
        plan,
        start,
        test_sets(groups, roots, arguments.work, quick),
        views_from(arguments.data),
        phantoms_from(arguments.data),
        folds=folds,
        draws=50 if quick else 1000,
        work=arguments.work,
    )
    if arguments.format == "json":
        print(to_json(found | {"environment": environment()}))
    else:
        print(table(found))
    for page in arguments.update:
        update_table(page, "real_start", table(found))
    means = summary(found["after"])
    missed = [name for name, aim in AIMS.items() if not means[name] >= aim]
    print("aims: " + (f"missed: {', '.join(missed)}" if missed else "reached"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
