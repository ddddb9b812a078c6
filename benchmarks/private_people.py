"""What does a hospital gain by private training, on real people?

    FEDQC_REAL_PEOPLE=... python benchmarks/private_people.py [--quick] [--format json]

150 people (brain MR after contrast, Cheng 2015, CC BY 4.0), each in one version: clean, or with one
simulated artifact. A hash deals them into thirds. Each third is held out in turn and tested, while the other
two are two hospitals that train. They are random thirds of one collection: nothing here says how a model does
at a next hospital.

The starting weights have seen none of these people, and the settings are those that `fedqc run tune` finds on
public rehearsals. Seeds draw shuffles and noise. A share is the part of what federation without noise gains
over the starting weights that a private arm keeps. *Injected views* train on each person's own clean slices
in four versions that the agent simulates (client/views/), without any label. Controls: noise a hundred times
as large, labels shuffled over people, nothing trained. Arms without noise have two seeds: they cost most.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import numpy as np

from client.data.cohort import Cohort, load_cohort
from client.dp.dp_sgd import PrivateSteps, train_private_head
from client.dp.injected import InjectedRows
from client.simulation.people import deal_of, inject_people
from client.views.injected import ViewCoins, views_of_patient
from common.artifacts import INDEX
from common.counts import auroc, per_patient
from common.learning import extract_features, score, seed_for, set_threads, train_epochs
from common.models import as_classifier, network_of
from common.plan import Inject, RunPlan, parse_plan
from common.pricing import training_steps
from common.progress_bar import progress_shown, say, silent
from common.weights import flatten, manifest_of, to_grid, unflatten
from server.aggregation import FederatedMean
from server.run.conduct import initial_weights
from server.run.tune import resolved

FOLDERS = ("mr_cheng_a", "mr_cheng_b")
FOLDS = 3
BUCKET = 50
EPSILONS = (8.0, 2.0, 1.0)
AIMS = {8.0: 0.75, 2.0: 0.35, 1.0: 0.20}  # shares
VIEWS: dict[str, Any] = {"share": 1.0, "views": Inject().views}
VIEW_AIMS = {8.0: 0.85, 2.0: 0.70, 1.0: 0.45}
SHOWN = [INDEX[name] for name in ("motion", "susceptibility", "chemical_shift")]


@dataclass(frozen=True, kw_only=True)
class People:
    """Slices of all people, their labels, and what the head of the starting weights sees of them."""

    images: np.ndarray  # int16 (n, S, S)
    modality: np.ndarray  # int8 (n,)
    labels: np.ndarray  # float32 (n, A)
    person: np.ndarray  # int64 (n,)
    third: np.ndarray  # int64 (n,)
    features: np.ndarray  # float32 (n, F)
    weights: np.ndarray  # float64 (n,), of views among those of a person; 0: no view

    def rows(self, *thirds: int) -> np.ndarray:
        return np.flatnonzero(np.isin(self.third, thirds))


def people_of(cohort: Cohort, model: Any) -> People:
    """Deal the people of a cohort into thirds of equal size, by a hash of their names."""
    names, person = np.unique(cohort.patients, return_inverse=True)
    place = np.argsort(np.argsort([hashlib.sha256(f"third {name}".encode()).hexdigest() for name in names]))
    images = np.asarray(cohort.images)
    rows = np.arange(len(images))
    return People(
        images=images,
        modality=np.asarray(cohort.modality),
        labels=np.asarray(cohort.labels),
        person=person,
        third=(place % FOLDS)[person],
        features=extract_features(model, images, np.asarray(cohort.modality), rows),
        weights=np.zeros(len(images)),
    )


def views_of(cohort: Cohort, people: People, model: Any, plan: RunPlan) -> People:
    """What an agent would train on without labels: four versions of each person's clean slices.

    Args:
        people: of the same cohort.
    """
    made = []
    blank = np.full_like(people.labels, np.nan)
    with progress_shown() as progress:
        count = int(people.person.max()) + 1
        for number in range(count):
            progress("simulating views", number, count)
            own = np.flatnonzero(people.person == number)
            records = [cohort.records[row] for row in own]
            coins = ViewCoins(key=b"benchmark", run="people", patient=str(number))
            most = plan.privacy.max_slices_per_patient
            made.append(
                views_of_patient(people.images[own], records, blank[own], coins, Inject(), max_slices=most)
            )
        progress("simulating views", count, count)
    images = np.concatenate([one.images for one in made])
    modality = np.concatenate([one.modality for one in made])
    person = np.repeat(np.arange(len(made)), [len(one.images) for one in made])
    third = np.zeros(len(made), np.int64)
    third[people.person] = people.third
    return People(
        images=images,
        modality=modality,
        labels=np.concatenate([one.labels for one in made]),
        person=person,
        third=third[person],
        features=extract_features(model, images, modality, np.arange(len(images))),
        weights=np.concatenate([one.weights for one in made]),
    )


def macro(logits: np.ndarray, people: People, rows: np.ndarray) -> float:
    """Mean over the artifacts of the AUROC of people."""
    found = auroc(*per_patient(logits, people.labels[rows], people.person[rows]))
    return float(np.nanmean(found[SHOWN]))


@dataclass(frozen=True, kw_only=True)
class Study:
    """The people, the plan, and its starting weights."""

    people: People
    views: People  # of the same people, from clean slices
    plan: RunPlan
    initial: np.ndarray

    def network(self, flat: np.ndarray) -> Any:
        network = network_of(self.plan.model)
        network.load_state_dict(unflatten(flat, manifest_of(network.state_dict())))
        return network

    def score(self, flat: np.ndarray, rows: np.ndarray) -> float:
        people = self.people
        return macro(score(self.network(flat), people.images, people.modality, rows), people, rows)

    def without_noise(self, groups: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """FedAvg of the whole network over hospitals that hold these rows."""
        people, weights = self.people, self.initial
        for number in range(1, self.plan.training.rounds + 1):
            mean = FederatedMean(len(weights))
            for place, rows in enumerate(groups):
                network = self.network(weights)
                train_epochs(
                    network,
                    people.images,
                    people.modality,
                    people.labels,
                    rows,
                    training=self.plan.training.in_round(number),
                    seed=seed_for(seed, str(place), number),
                )
                mean.add(to_grid(flatten(network.state_dict()), weights), BUCKET)
            weights = mean.result(weights)
        return weights

    def private(
        self,
        groups: Sequence[np.ndarray],
        *,
        noise: float,
        labels: np.ndarray | None = None,
        of: People | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The private head of hospitals that hold these rows, averaged as the plan says: weight and bias."""
        people, privacy = of or self.people, self.plan.privacy
        truth = people.labels if labels is None else labels
        head = as_classifier(self.network(self.initial)).head
        weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
        after = []
        for _ in range(self.plan.training.rounds):
            answers = [
                train_private_head(
                    weight,
                    bias,
                    people.features[rows],
                    truth[rows],
                    people.person[rows],
                    PrivateSteps(
                        steps=self.plan.private_steps_per_round,
                        learning_rate=privacy.learning_rate,
                        clip_norm=privacy.clip_norm,
                        noise_multiplier=noise,
                        sample_rate=1.0,
                        nominal_patients=BUCKET,
                        max_slices_per_patient=privacy.max_slices_per_patient,
                    ),
                    injected=None if of is None else InjectedRows(weights=of.weights[rows], **VIEWS),
                )
                for rows in groups
            ]
            weight = np.mean([answer.weight for answer in answers], axis=0)
            bias = np.mean([answer.bias for answer in answers], axis=0)
            after.append((weight, bias))
        last = after[-privacy.average_rounds :]
        return np.mean([w for w, _ in last], axis=0), np.mean([b for _, b in last], axis=0)

    def injected(self, groups: Sequence[np.ndarray], *, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """As `private`, on the views of hospitals' people and no label; `groups` are rows of views."""
        return self.private(groups, noise=noise, of=self.views)

    def private_score(self, groups: Sequence[np.ndarray], *, test: np.ndarray, **how: Any) -> float:
        """The score at the rows `test` of what `private` trains."""
        return self.head_score(self.private(groups, **how), test)

    def head_score(self, head: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> float:
        weight, bias = head
        return macro(self.people.features[rows] @ weight.T + bias, self.people, rows)


def measure(
    study: Study, plans: dict[float, RunPlan], with_views: dict[float, RunPlan], seeds: int
) -> Iterator[tuple[str, list[list[float]]]]:
    """(arm, macro AUROC by fold and seed)."""
    folds = [
        (study.people.rows(test), [study.people.rows(third) for third in range(FOLDS) if third != test])
        for test in range(FOLDS)
    ]
    yield "public", [[study.score(study.initial, test)] for test, _ in folds]
    yield (
        "local",
        [
            [
                float(np.mean([study.score(study.without_noise([rows], seed), test) for rows in groups]))
                for seed in range(min(seeds, 2))
            ]
            for test, groups in folds
        ],
    )
    yield (
        "federated",
        [
            [study.score(study.without_noise(groups, seed), test) for seed in range(min(seeds, 2))]
            for test, groups in folds
        ],
    )
    for epsilon, plan in plans.items():
        one, other = replace(study, plan=plan), replace(study, plan=with_views[epsilon])
        views_noise = training_steps(other.plan).noise_multiplier
        views = [
            [study.views.rows(third) for third in range(FOLDS) if third != test] for test in range(FOLDS)
        ]
        noise = training_steps(plan).noise_multiplier

        yield (
            f"federated_dp, epsilon {epsilon:g}",
            [
                [one.private_score(groups, noise=noise, test=test) for _ in range(seeds)]
                for test, groups in folds
            ],
        )
        for name, z, count in (
            (f"epsilon {epsilon:g}", views_noise, seeds),
            (f"settings of {epsilon:g}, no noise", 0.0, 1),
        ):
            yield (
                f"federated_dp, injected views, {name}",
                [
                    [other.head_score(other.injected(groups, noise=z), test) for _ in range(count)]
                    for (test, _), groups in zip(folds, views, strict=True)
                ],
            )
        yield (
            f"local_dp, epsilon {epsilon:g}",
            [
                [
                    float(np.mean([one.private_score([rows], noise=noise, test=test) for rows in groups]))
                    for _ in range(seeds)
                ]
                for test, groups in folds
            ],
        )
        yield (
            f"federated_dp, settings of {epsilon:g}, no noise",
            [[one.private_score(groups, noise=0.0, test=test)] for test, groups in folds],
        )
        yield (
            f"control: noise x 100, epsilon {epsilon:g}",
            [
                [one.private_score(groups, noise=100 * noise, test=test) for _ in range(seeds)]
                for test, groups in folds
            ],
        )
        yield (
            f"control: labels shuffled, epsilon {epsilon:g}",
            [
                [
                    one.head_score(
                        one.private(groups, noise=noise, labels=shuffled(study.people, seed)), test
                    )
                    for seed in range(seeds)
                ]
                for test, groups in folds
            ],
        )


def shuffled(people: People, seed: int) -> np.ndarray:
    """The labels of other people, for all slices of a person those of one."""
    count = int(people.person.max()) + 1
    first = np.array([np.flatnonzero(people.person == each)[0] for each in range(count)])
    other = np.random.default_rng(seed).permutation(count)
    return people.labels[first[other[people.person]]]


def summary(found: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row an arm: mean over folds and seeds, spread over seeds, share of the gain that is kept."""
    public = float(np.mean(found["public"]))
    gain = float(np.mean(found["federated"])) - public
    return [
        {
            "arm": arm,
            "auroc": float(np.mean(scores)),
            "folds": [float(np.mean(one)) for one in scores],
            "spread": float(np.mean([np.std(one, ddof=1) for one in scores])) if len(scores[0]) > 1 else 0.0,
            "share": (float(np.mean(scores)) - public) / gain,
        }
        for arm, scores in found.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| arm | macro AUROC | each third | spread over seeds | share of the gain |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['arm']} | {row['auroc']:.3f} | {' '.join(f'{one:.3f}' for one in row['folds'])} | "
        f"{row['spread']:.3f} | {row['share']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    if not (source := os.environ.get("FEDQC_REAL_PEOPLE")):
        print("FEDQC_REAL_PEOPLE is not set: the folder of real people", file=sys.stderr)
        return 2
    set_threads(1)
    plans = {epsilon: tuned(epsilon) for epsilon in EPSILONS}
    with_views = {epsilon: tuned(epsilon, inject={}) for epsilon in EPSILONS}
    plan = next(iter(plans.values()))
    initial = initial_weights(plan, manifest_of(network_of(plan.model).state_dict()))
    with tempfile.TemporaryDirectory() as folder, progress_shown() as progress:
        out = Path(folder) / "people"
        deal = deal_of(sites=1, seed=11)
        inject_people([Path(source) / name for name in FOLDERS], out, deal, say=say, progress=progress)
        cohort = load_cohort(out / "hospital-a" / "site.yaml", size=plan.image_size)
        network = network_of(plan.model)
        network.load_state_dict(unflatten(initial, manifest_of(network.state_dict())))
        people = people_of(cohort, network)
        clean = deal_of(sites=1, seed=11, clean_share=1.0)
        out = Path(folder) / "clean"
        inject_people([Path(source) / name for name in FOLDERS], out, clean, say=say, progress=progress)
        cohort = load_cohort(out / "hospital-a" / "site.yaml", size=plan.image_size)
        views = views_of(cohort, people_of(cohort, network), network, plan)
        study = Study(people=people, views=views, plan=plan, initial=initial)
        found = {}
        for arm, scores in measure(study, plans, with_views, 2 if arguments.quick else arguments.seeds):
            found[arm] = scores
            say(f"{arm}: {np.mean(scores):.3f}")
    rows = summary(found)
    if arguments.format == "json":
        settings = {f"{epsilon:g}": plan.privacy.model_dump(mode="json") for epsilon, plan in plans.items()}
        print(measuring.to_json({"rows": rows, "settings": settings} | measuring.environment()))
    else:
        print(table(rows))
        for (epsilon, one), what in [
            *((pair, "") for pair in plans.items()),
            *((pair, ", views") for pair in with_views.items()),
        ]:
            privacy = one.privacy
            print(
                f"epsilon {epsilon:g}{what}: clip {privacy.clip_norm:g}, "
                f"learning rate {privacy.learning_rate:g}, "
                f"{privacy.steps_per_round} steps a round, mean of {privacy.average_rounds} rounds"
            )
    missed = [
        row["arm"]
        for what, aims in (("", AIMS), ("injected views, ", VIEW_AIMS))
        for epsilon, aim in aims.items()
        for row in rows
        if row["arm"] == f"federated_dp, {what}epsilon {epsilon:g}" and row["share"] < aim
    ]
    print("aims: " + (f"missed by {', '.join(missed)}" if missed else "reached"), file=sys.stderr)
    return 1 if missed else 0


def tuned(epsilon: float, **training: Any) -> RunPlan:
    """The plan of two hospitals of 50, with the settings of the public rehearsals."""
    plan = parse_plan(
        {
            "name": "private-people",
            "arms": ["public", "local", "local_dp", "federated", "federated_dp"],
            "training": training,
            "privacy": {
                "epsilon": epsilon,
                "settings": "auto",
                "expected_sites": FOLDS - 1,
                "expected_patients": BUCKET,
                "alternatives": True,
            },
        }
    )
    return resolved(plan, progress=silent)[0]


if __name__ == "__main__":
    sys.exit(main())
