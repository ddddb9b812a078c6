"""How severe is an artifact: does a network that is trained on severities say it better than a map of the
logit that says whether it is there?

    FEDQC_REAL_DATA=DIR FEDQC_REAL_PEOPLE=DIR python benchmarks/severity.py DATA [--quick] [--work DIR]
        [--format json] [--update docs/predict.md]

DATA is the folder of the sites `people` and `public` that `make real-start` makes; 400 views a source are
enough. Severity is what a simulator was asked for, 0 to 1.

    constant    the mean severity of the training slices that show the artifact
    logit       a rising map of the artifact's own logit (isotonic regression)
    features    a linear map of all that the head sees (ridge regression), the network as it is
    head        a second head, trained together with the first one and all under it; a severity counts in the
                loss as one artifact more, by binary cross-entropy, where the artifact is present

Folds leave out whole folders, their people and scanners, as benchmarks/real_start.py. Of each fold two
networks go on from the phantoms' start: one on presence alone (logit, features), one with the second head.
`shipped` are the weights of new plans as they are: they have seen all these people, in other looks, and only
the maps leave the folder out. Test slices keep their own look and show one artifact of any severity that
changed enough of the slice to be seen; test phantoms are of hospitals whose appearance is in no training set.

Figures are of slices that show the artifact: mean absolute error, Spearman's rank correlation. 95 % by a
bootstrap over people, over slices where a folder is one person.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import environment, say, to_json, update_table
from public_model import auroc
from real_start import FOLDS, PLAN, SIZE, TEST_SIZE, group_of, kept, stored
from scipy.stats import spearmanr
from torch import nn

from client.data.cohort import load_cohort
from client.predict.severity import rising
from client.simulation.real_slices import RealSlice
from client.simulation.training_views import FULL_CHANGE_AT, NAME, SEVERITY
from client.views.acquisition import acquisition_of, body_of
from client.views.corruption import DRAWS, MIN_CHANGED, changed_share
from common.artifacts import DEFAULT_LABELS, INDEX, MODALITIES, Modality, can_occur
from common.learning import extract_features, score, seed_for, set_threads, train_epochs
from common.model_file import load_model
from common.models import as_classifier, build
from common.models.small_cnn import SmallCNN
from common.physics import SIMULATORS, choose
from common.physics.acquisition import uniform
from common.physics.appearance import SITE_APPEARANCES
from common.plan import RunPlan, read_plan
from common.preprocess import resample
from common.public_phantoms import draw
from common.weights import manifest_of, resolve_initial, unflatten

PHANTOMS = "phantoms"
SHIPPED = "package:small_cnn_real.safetensors"
TEST_PATIENTS, TEST_SEED = 300, 818181
POSITIVES = 60
PENALTY = 0.01
"""Of the ridge regression, times the number of slices; features have mean 0 and deviation 1."""
WAYS = ("constant", "logit", "features", "head")
DRAWN = 1000
"""Bootstrap draws."""


@dataclass(frozen=True, kw_only=True)
class Graded:
    """Slices with the severity of what they show."""

    images: np.ndarray  # int16 (n, S, S)
    modality: np.ndarray  # int8 (n,)
    labels: np.ndarray  # float32 (n, A), nan = not assessed
    severities: np.ndarray  # float32 (n, A), nan where absent
    groups: np.ndarray  # str (n,): folder
    unit: np.ndarray  # int (n,): person, or slice where the folder is one person

    def of(self, rows: np.ndarray) -> Graded:
        return Graded(**{name: value[rows] for name, value in vars(self).items()})


def joined(parts: Sequence[Graded]) -> Graded:
    return Graded(**{name: np.concatenate([vars(one)[name] for one in parts]) for name in vars(parts[0])})


def site(folder: Path, groups: bool) -> Graded:
    """What `fedqc data inject --views` or `fedqc data phantom --public` wrote, as an agent reads it."""
    cohort = load_cohort(folder / "site.yaml", size=SIZE)
    files = [record.file for record in cohort.records]
    # `01-mr_cheng_a-00001.dcm`
    names = [Path(file).stem.split("-", 1)[1].rsplit("-", 1)[0] if groups else PHANTOMS for file in files]
    return Graded(
        images=np.asarray(cohort.images),
        modality=np.asarray(cohort.modality),
        labels=np.asarray(cohort.labels),
        severities=np.asarray(cohort.severities),
        groups=np.array(names),
        unit=np.asarray(cohort.patients),
    )


def test_phantoms(patients: int) -> Graded:
    """Phantoms of hospitals that are in no training set, of any severity."""
    looks = [replace(one, severity_range=SEVERITY) for one in SITE_APPEARANCES]
    drawn = draw(looks, patients, TEST_SEED, SIZE)
    assert drawn.severities is not None
    return Graded(
        images=drawn.images,
        modality=drawn.modality,
        labels=drawn.labels,
        severities=drawn.severities,
        groups=np.full(len(drawn.images), PHANTOMS),
        unit=drawn.patients,
    )


def own_look(group: str, slices: Sequence[RealSlice], positives: int) -> dict[str, Any]:
    """Up to so many slices of each artifact of the modality, in the folder's own look, as `Graded` holds
    them.
    """
    modality: Modality = slices[0].modality
    names = sorted({one.name for one in slices})
    order = np.random.default_rng(6).permutation(len(slices))
    images, labels, severities, unit = [], [], [], []
    for artifact in (name for name in DEFAULT_LABELS if can_occur(name, modality)):
        for turn in range(positives):
            at = int(order[turn % len(order)])
            generator = torch.Generator().manual_seed(zlib.crc32(f"{group}/{artifact}/{turn}".encode()))
            one = small(slices[at])
            image = torch.from_numpy(one.image)
            acquisition, body = acquisition_of(image, one.header, one.spacing_mm), body_of(image, modality)
            for _ in range(DRAWS):
                simulator = SIMULATORS[choose(artifact, generator)]
                drawn = simulator.draw(uniform(generator, *SEVERITY), generator, acquisition)
                changed, mask = simulator.apply(image, drawn)
                share = changed_share(image, changed, mask & body, modality)
                if share >= MIN_CHANGED[artifact] * min(1.0, drawn.severity / FULL_CHANGE_AT):
                    row = np.full((2, len(DEFAULT_LABELS)), np.nan, np.float32)
                    row[0, [INDEX[name] for name in DEFAULT_LABELS if can_occur(name, modality)]] = 0
                    row[:, INDEX[artifact]] = 1, drawn.severity
                    images.append(stored(changed.numpy(), modality))
                    labels.append(row[0])
                    severities.append(row[1])
                    unit.append(names.index(one.name) if len(names) > 1 else at)
                    break
    return {
        "images": np.stack(images),
        "modality": np.full(len(images), MODALITIES.index(modality), np.int8),
        "labels": np.stack(labels),
        "severities": np.stack(severities),
        "groups": np.full(len(images), group),
        "unit": np.array(unit),
    }


def small(one: RealSlice) -> RealSlice:
    side = len(one.image)
    if side <= TEST_SIZE:
        return one
    image = np.ascontiguousarray(resample(one.image, TEST_SIZE))
    return replace(one, image=image, spacing_mm=one.spacing_mm * side / TEST_SIZE)


def test_people(groups: Sequence[str], work: Path | None, positives: int) -> Graded:
    """Slices of these folders that show one artifact each."""
    parts = []
    for group in groups:
        real = group.startswith("site_")
        root = Path(os.environ["FEDQC_REAL_DATA" if real else "FEDQC_REAL_PEOPLE"])
        labels = root / "labels_eyeballed.csv" if real else None

        def make(group: str = group, root: Path = root, labels: Path | None = labels) -> dict[str, Any]:
            say(f"test slices of {group}")
            return own_look(group, group_of(root / group, labels), positives)

        parts.append(Graded(**kept(work and work / f"severity-{group}.npz", make)))
    return joined(parts)


def network_of(flat: np.ndarray, *, severity: bool) -> nn.Module:
    """The default network with these weights; with `severity` as many outputs again, from 0."""
    network = build("small_cnn")
    network.load_state_dict(unflatten(flat, manifest_of(network.state_dict())))
    if not severity:
        return network
    double = SmallCNN(2 * len(DEFAULT_LABELS))
    weights = network.state_dict()
    for name in ("head.weight", "head.bias"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])])
    double.load_state_dict(weights)
    return double


def trained(plan: RunPlan, flat: np.ndarray, data: Graded, *, severity: bool) -> nn.Module:
    """As the pooled arm of a plan trains."""
    network = network_of(flat, severity=severity)
    labels = np.concatenate([data.labels, data.severities], axis=1) if severity else data.labels
    for number in range(1, plan.training.rounds + 1):
        train_epochs(
            network,
            data.images,
            data.modality,
            labels,
            np.arange(len(data.images)),
            training=plan.training.in_round(number),
            seed=seed_for(plan.seed, "pooled", number),
        )
    return network


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean and deviation of the features, weights and intercept of severity (n,) on features (n, F)."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    design = (x - mean) / deviation
    weights = np.linalg.solve(
        design.T @ design + PENALTY * len(x) * np.eye(x.shape[1]), design.T @ (y - y.mean())
    )
    return mean, deviation, weights, float(y.mean())


class Seen(NamedTuple):
    """What a network makes of slices."""

    features: np.ndarray  # float32 (n, F)
    logits: np.ndarray  # float32 (n, A)
    severities: np.ndarray  # of the slices

    def of(self, rows: np.ndarray) -> Seen:
        return Seen(*(one[rows] for one in self))


def seen(network: nn.Module, data: Graded) -> Seen:
    features = extract_features(network, data.images, data.modality, np.arange(len(data.images)))
    with torch.no_grad():
        logits = as_classifier(network).head(torch.from_numpy(features))[:, : len(DEFAULT_LABELS)].numpy()
    return Seen(features, logits, data.severities)


def said(fitted_on: Seen, tested: Seen) -> dict[str, np.ndarray]:
    """Constant, logit and features -> the severity of each tested slice, (n, A)."""
    found = {way: np.full(tested.severities.shape, np.nan) for way in WAYS[:3]}
    for place in range(len(DEFAULT_LABELS)):
        rows = ~np.isnan(fitted_on.severities[:, place])
        if not rows.any():
            continue
        y = fitted_on.severities[rows, place].astype(np.float64)
        found["constant"][:, place] = y.mean()
        points = rising(fitted_on.logits[rows, place], y)
        found["logit"][:, place] = np.interp(tested.logits[:, place], *points)
        mean, deviation, weights, offset = ridge(fitted_on.features[rows].astype(np.float64), y)
        found["features"][:, place] = ((tested.features - mean) / deviation) @ weights + offset
    return found | {"features": np.clip(found["features"], 0, 1)}


def said_by_head(network: nn.Module, tested: Graded) -> np.ndarray:
    logits = score(network, tested.images, tested.modality, np.arange(len(tested.images)))
    return 1 / (1 + np.exp(-logits[:, len(DEFAULT_LABELS) :].astype(np.float64)))


def figures(answers: dict[str, np.ndarray], tested: Graded, draws: int) -> list[dict[str, Any]]:
    """One row an artifact: of each way the error and the rank correlation with their intervals, and the
    error's difference to that of the map of the logit.
    """
    rng, rows = np.random.default_rng(2), []
    _, owner = np.unique(
        [f"{group}/{one}" for group, one in zip(tested.groups, tested.unit, strict=True)], return_inverse=True
    )
    for place, name in enumerate(DEFAULT_LABELS):
        shown = np.flatnonzero(~np.isnan(tested.severities[:, place]))
        if not len(shown):
            continue
        truth, people = tested.severities[shown, place], owner[shown]
        errors = {way: np.abs(one[shown, place] - truth) for way, one in answers.items()}
        each = [np.flatnonzero(people == one) for one in np.unique(people)]
        chosen = [
            np.concatenate([each[at] for at in rng.integers(0, len(each), len(each))]) for _ in range(draws)
        ]

        def bounds(values: Sequence[float]) -> list[float]:
            return [float(one) for one in np.nanpercentile(values, [2.5, 97.5])]

        ways = {}
        for way, one in answers.items():
            values = one[shown, place]
            ways[way] = {
                "error": float(errors[way].mean()),
                "error_interval": bounds([errors[way][rows].mean() for rows in chosen]),
                "rank": _rank(values, truth),
                "rank_interval": bounds([_rank(values[rows], truth[rows]) for rows in chosen]),
                "more_than_logit": float((errors[way] - errors["logit"]).mean()),
                "more_interval": bounds([(errors[way] - errors["logit"])[rows].mean() for rows in chosen]),
            }
        rows.append({"artifact": name, "slices": len(shown), "people": len(each), "ways": ways})
    return rows


def aurocs(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Artifact -> AUROC of its presence."""
    return {
        name: auroc(logits[labels[:, place] == 1, place], logits[labels[:, place] == 0, place])
        for place, name in enumerate(DEFAULT_LABELS)
    }


def _rank(values: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's; 0 of a constant, which ranks nothing."""
    return 0.0 if np.ptp(values) == 0 or np.ptp(truth) == 0 else float(spearmanr(values, truth).statistic)


def measure(
    plan: RunPlan,
    data: Path,
    *,
    folds: Sequence[Sequence[str]],
    views: int | None,
    work: Path | None,
    positives: int,
    draws: int,
) -> dict[str, Any]:
    """Figures on people and on phantoms, of networks of this benchmark and of the shipped weights."""
    flat = {
        name: load_model(
            resolve_initial(name, sha256 if name == plan.model.initial else None),
            manifest_of(build("small_cnn").state_dict()),
            DEFAULT_LABELS,
        )
        for name, sha256 in ((plan.model.initial, plan.model.sha256), (SHIPPED, None))
    }
    every, phantoms = site(data / NAME, True), site(data / "public", False)
    few = [np.flatnonzero(every.groups == one)[:views] for one in np.unique(every.groups)]
    trains = joined([every.of(np.concatenate(few)), phantoms])
    shipped = network_of(flat[SHIPPED], severity=False)
    of_all = seen(shipped, trains)
    people = test_people([group for fold in folds for group in fold], work, positives)
    unseen = test_phantoms(TEST_PATIENTS if positives == POSITIVES else 24)
    answers: dict[str, list[dict[str, np.ndarray]]] = {"people": [], "people, shipped": [], PHANTOMS: []}
    tested, presence = [], []
    for number, fold in enumerate(folds):
        own = people.of(np.isin(people.groups, fold))
        keeps = ~np.isin(trains.groups, fold)
        rest = trains.of(keeps)
        tested.append(own)

        def make(own: Graded = own, rest: Graded = rest, number: int = number) -> dict[str, np.ndarray]:
            say(f"fold {number}: {len(rest.images)} slices train, {len(own.images)} are tested")
            plain = trained(plan, flat[plan.model.initial], rest, severity=False)
            both = trained(plan, flat[plan.model.initial], rest, severity=True)
            found = {"plain": seen(plain, unseen).logits, "both": seen(both, unseen).logits}
            of_rest = seen(plain, rest)
            for where, test in (("people", own), (PHANTOMS, unseen)):
                ways = said(of_rest, seen(plain, test)) | {"head": said_by_head(both, test)}
                found |= {f"{where}/{way}": one for way, one in ways.items()}
            return found

        made: dict[str, np.ndarray] = kept(work and work / f"severity-fold-{number}.npz", make)
        answers["people"].append({way: made[f"people/{way}"] for way in WAYS})
        answers[PHANTOMS].append({way: made[f"{PHANTOMS}/{way}"] for way in WAYS})
        answers["people, shipped"].append(said(of_all.of(keeps), seen(shipped, own)))
        presence.append({which: aurocs(made[which], unseen.labels) for which in ("plain", "both")})
    everyone = joined(tested)

    def together(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {way: np.concatenate([one[way] for one in parts]) for way in parts[0]}

    return {
        "folds": [list(fold) for fold in folds],
        "trains": [int((~np.isin(trains.groups, fold)).sum()) for fold in folds],
        "presence": presence,
        "people": figures(together(answers["people"]), everyone, draws),
        "people, shipped": figures(together(answers["people, shipped"]), everyone, draws),
        PHANTOMS: figures(answers[PHANTOMS][0], unseen, draws),
        "phantoms, shipped": figures(said(of_all, seen(shipped, unseen)), unseen, draws),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: one row an artifact and place."""
    lines = []
    for where in ("people", "people, shipped", PHANTOMS, "phantoms, shipped"):
        ways = [way for way in WAYS if way in found[where][0]["ways"]]
        lines += [
            f"| {where} | slices (people) | {' | '.join(f'{way}: error, rank' for way in ways)} |",
            f"|---|---|{'---|' * len(ways)}",
        ]
        for row in found[where]:
            cells = []
            for way in ways:
                one = row["ways"][way]
                low, high = one["error_interval"]
                cells.append(f"{one['error']:.3f} [{low:.3f}, {high:.3f}], {one['rank']:+.2f}")
            lines.append(f"| {row['artifact']} | {row['slices']} ({row['people']}) | {' | '.join(cells)} |")
        for way in ways:
            if way in ("features", "head"):
                more = {row["artifact"]: row["ways"][way] for row in found[where]}
                less = ", ".join(
                    f"{name} {one['more_than_logit']:+.3f} "
                    f"[{one['more_interval'][0]:+.3f}, {one['more_interval'][1]:+.3f}]"
                    for name, one in more.items()
                )
                lines += ["", f"Error of `{way}` less that of `logit`: {less}."]
        lines.append("")
    for which, title in (("plain", "one head"), ("both", "two")):
        macro = np.mean([np.nanmean(list(fold[which].values())) for fold in found["presence"]])
        lines.append(f"AUROC of presence on the phantoms, macro, of networks with {title}: {macro:.3f}.")
    about = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        "",
        f"{found['rounds']} rounds over {' and '.join(map(str, found['trains']))} slices; left out: "
        f"{'; '.join(', '.join(fold) for fold in found['folds'])}. {about['date']}, {about['machine']}, "
        f"{versions}.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--quick", action="store_true", help="one fold of one round, few slices")
    parser.add_argument("--fold", type=int, nargs="*", help="only these folds, by their number from 0")
    parser.add_argument("--rounds", type=int, help="of training, in place of the plan's")
    parser.add_argument("--views", type=int, help="of a source, at most, to train on; of those that DATA has")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep test slices and scores of folds here")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="replace the tables of this page")
    arguments = parser.parse_args()
    if missing := [one for one in ("FEDQC_REAL_DATA", "FEDQC_REAL_PEOPLE") if one not in os.environ]:
        print(f"{missing[0]} is not set: the real images", file=sys.stderr)
        return 2
    quick = arguments.quick
    plan = read_plan(PLAN)
    rounds = 1 if quick else arguments.rounds or plan.training.rounds
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": rounds})})
    set_threads(1)
    if arguments.work is not None:
        arguments.work.mkdir(exist_ok=True)
    found = measure(
        plan,
        arguments.data,
        folds=FOLDS[2:3] if quick else [FOLDS[place] for place in arguments.fold or range(4)],
        views=20 if quick else arguments.views,
        work=arguments.work,
        positives=6 if quick else POSITIVES,
        draws=50 if quick else DRAWN,
    )
    found |= {"rounds": rounds, "environment": environment(("fedqc", "torch", "numpy"))}
    if arguments.update:
        update_table(arguments.update, "severity", table(found))
    print(to_json(found) if arguments.format == "json" else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
