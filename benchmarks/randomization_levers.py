"""What did each lever of domain randomization give the public start at MR scanners that it never saw? By
ablation.

    FEDQC_REAL_DATA=DIR FEDQC_REAL_PEOPLE=DIR python benchmarks/randomization_levers.py
        [--views 160] [--passes 6] [--runs 4] [--only LEVER...] [--quick] [--work DIR]
        [--format json] [--update docs/performance.md]

A lever is one thing that client/simulation/domain_randomization.py draws anew, or that training does. It is
left out alone: it is drawn and not applied, so that everything else of a view stays as it was drawn. Of each
fold two scanners are left out (`FOLDS` of benchmarks/real_start.py); every other MR source gives as many
views, its people taking turns. From the phantoms' start one network an arm is trained on these views alone,
with the settings of configs/plans/pretrain_real.yaml and the same number of steps, and scored on test slices
of the scanners left out. Far fewer views than the shipped start saw: what is compared are arms, not this
with the shipped start. A run is a seed, which decides the views and the order of training, and a fold.

AUROC: mean over the scanners left out and the three MR artifacts, then over runs. What a lever gave: all
levers less the arm, or the arm less all levers where the arm adds something. 95 %: the slices of a scanner
(there is one person each) are drawn again with their versions, the same of both arms and of all runs; that a
next training run differs is not in it, therefore the runs stand apart. A lever is called undecided where the
interval has 0 in it or the runs differ in sign.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measuring import environment, to_json, update_table
from real_start import (
    FOLDS,
    PLAN,
    Stored,
    TestSet,
    group_of,
    kept,
    network_of,
    scores,
    stored,
    test_sets,
    trained,
)

from client.simulation import domain_randomization
from client.simulation.real_slices import RealSlice, seed_of
from client.simulation.training_views import view_of
from common.artifacts import DEFAULT_LABELS, INDEX, MODALITIES, can_occur
from common.learning import score, set_threads
from common.model_file import load_model
from common.models import build
from common.plan import RunPlan, read_plan
from common.progress_bar import say
from common.weights import manifest_of, resolve_initial

MR_FOLDS = tuple(tuple(group for group in FOLDS[place] if "_mr_" in group) for place in (2, 1))
"""Scanners left out together."""
MR_GROUPS = tuple(
    dict.fromkeys(group for fold in FOLDS for group in fold if group.startswith(("site_mr_", "mr_")))
)
MR_ARTIFACTS = tuple(name for name in DEFAULT_LABELS if can_occur(name, "MR"))
BANDS = {"visible": 1, "mild": 0}
"""Column of the table -> position in the bands of a test set."""
REFERENCE = "all levers"


def _unchanged(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def same(image: torch.Tensor, *others: Any) -> torch.Tensor:
        draw(image, *others)  # so that the next draws are the same
        return image

    return same


def _unmoved(
    draw: Callable[..., tuple[torch.Tensor, float]],
) -> Callable[..., tuple[torch.Tensor, float]]:
    def same(image: torch.Tensor, *others: Any) -> tuple[torch.Tensor, float]:
        draw(image, *others)
        return image, 1.0

    return same


def _no_texture(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *arguments: torch.zeros_like(draw(*arguments))


def _no_spots(draw: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    return lambda *arguments: [torch.zeros_like(spot) for spot in draw(*arguments)]


LEVERS: dict[str, dict[str, Callable[..., Any]]] = {
    "position, scale and mirror": {"_moved": _unmoved},
    "contrast (histogram warp)": {"_warped": _unchanged},
    "random convolution": {"_convolved": _unchanged},
    "look-alikes (texture, spots)": {"_texture": _no_texture, "spots": _no_spots},
    "shading": {"_shaded": _unchanged},
    "sharpness (k-space window)": {"_filtered": _unchanged},
    "noise": {"_noisy": _unchanged},
}
"""Lever -> function of `domain_randomization` -> what makes of it one that draws and changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How one network is trained."""

    off: tuple[str, ...] = ()  # levers
    augments: bool = True
    distils: bool = False  # targets: half the label, half what the network of all levers says
    trains: bool = True


ARMS: dict[str, Arm] = {
    REFERENCE: Arm(),
    **{lever: Arm(off=(lever,)) for lever in LEVERS},
    "all of these together": Arm(off=tuple(LEVERS)),
    "flips and turns in training": Arm(augments=False),
    "self-distillation": Arm(distils=True),
    "training on real anatomy at all": Arm(trains=False),
}


@contextmanager
def without(levers: Sequence[str]) -> Iterator[None]:
    """While open, views are made without these levers."""
    with ExitStack() as stack:
        for lever in levers:
            for name, switch_off in LEVERS[lever].items():
                original = getattr(domain_randomization, name)
                stack.enter_context(patch.object(domain_randomization, name, switch_off(original)))
        yield


def views_of(group: str, slices: Sequence[RealSlice], count: int, *, seed: int, off: Sequence[str]) -> Stored:
    """Views of a group, its people and their slices taking turns; the same draws whatever is `off`."""
    people: dict[str, list[RealSlice]] = {}
    for one in slices:
        people.setdefault(one.name, []).append(one)
    own = list(people.values())
    images, labels = [], np.full((count, len(DEFAULT_LABELS)), np.nan, np.float32)
    with without(off):
        for turn in range(count):
            usable = own[turn % len(own)]
            view = view_of(usable[turn // len(own) % len(usable)], seed_of(seed, "view", group, turn))
            images.append(stored(view.image, "MR"))
            for name, present in view.labels.items():
                labels[turn, INDEX[name]] = present
    return Stored(np.stack(images), np.full(count, MODALITIES.index("MR"), np.int8), labels)


def distilled(network: torch.nn.Module, part: Stored) -> Stored:
    """The views with targets half of the label, half of what the network says."""
    with torch.no_grad():
        logits = score(network, part.images, part.modality, np.arange(len(part.images)))
    said = 1 / (1 + np.exp(-logits[:, : part.labels.shape[1]]))
    return part._replace(labels=((part.labels + said) / 2).astype(np.float32))


def fold_scores(
    plan: RunPlan,
    start: np.ndarray,
    views: Callable[[Arm], dict[str, Stored]],
    tests: dict[str, TestSet],
    fold: Sequence[str],
    keep: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, dict[str, np.ndarray]]:
    """Arm -> group of the fold -> logits, of networks that did not see the fold."""
    references: list[torch.nn.Module] = []

    def train(arm: Arm) -> torch.nn.Module:
        if not arm.trains:
            return network_of(plan, start)
        parts = [part for group, part in views(arm).items() if group not in fold]
        if arm.distils:
            teacher = references[0] if references else train(ARMS[REFERENCE])
            parts = [distilled(teacher, part) for part in parts]
        training = plan.training.model_copy(update={} if arm.augments else {"augment": ()})
        return trained(plan.model_copy(update={"training": training}), start, parts)

    def make(arm: Arm) -> dict[str, Any]:
        network = train(arm)
        if arm == ARMS[REFERENCE]:
            references.append(network)
        return {group: scores(network, tests[group]) for group in fold}

    chosen = [(name, ARMS[name]) for name in arms]
    return {name: keep(name, lambda arm=arm: make(arm)) for name, arm in chosen}  # type: ignore[misc]


def weights_of(test: TestSet, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each slice counts, int (1 + draws, n): once, then as bootstrap draws of the units."""
    _, unit = np.unique(test.unit, return_inverse=True)
    count = int(unit.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    return np.concatenate([np.ones((1, count), int), drawn])[:, unit]


def macro(
    tests: dict[str, TestSet], logits: dict[str, np.ndarray], weights: dict[str, np.ndarray], band: int
) -> np.ndarray:
    """AUROC, mean over groups and artifacts, (1 + draws,): of all slices, then of each draw."""
    values = []
    for group in logits:
        test = tests[group]
        negative = test.band == -1
        for artifact in MR_ARTIFACTS:
            positive = (test.artifact == artifact) & (test.band == band)
            if not positive.any():
                continue
            column = logits[group][:, INDEX[artifact]]
            over = column[positive][:, None] - column[negative][None]
            wins = (over > 0) + 0.5 * (over == 0)
            of_positive, of_negative = weights[group][:, positive], weights[group][:, negative]
            with np.errstate(invalid="ignore"):  # a draw without a positive is nan
                values.append(
                    ((of_positive @ wins) * of_negative).sum(1) / (of_positive.sum(1) * of_negative.sum(1))
                )
    return np.nanmean(values, axis=0)


def compared(
    tests: dict[str, TestSet], logits: Sequence[dict[str, dict[str, np.ndarray]]], draws: int
) -> list[dict[str, Any]]:
    """One row an arm.

    Args:
        logits: of each run, arm -> group left out -> logits.
    """
    rng = np.random.default_rng(1)
    weights = {group: weights_of(test, draws, rng) for group, test in tests.items()}
    arms = {name: ARMS[name] for name in logits[0]}
    found: list[dict[str, Any]] = [{"arm": name} for name in arms]
    for column, band in BANDS.items():
        values = {
            name: np.stack([macro(tests, of_run[name], weights, band) for of_run in logits]) for name in arms
        }
        for row, (name, arm) in zip(found, arms.items(), strict=True):
            gain = (values[name] - values[REFERENCE]) * (1 if arm.distils else -1)
            low, high = np.quantile(gain.mean(0)[1:], (0.025, 0.975))
            of_runs = gain[:, 0].tolist()
            row[column] = {
                "auroc": float(values[name][:, 0].mean()),
                "gave": float(gain[:, 0].mean()),
                "low": float(low),
                "high": float(high),
                "runs": of_runs,
                "decided": bool((low > 0 and min(of_runs) > 0) or (high < 0 and max(of_runs) < 0)),
            }
    return found


def measure(
    plan: RunPlan,
    start: np.ndarray,
    slices: dict[str, list[RealSlice]],
    tests: dict[str, TestSet],
    *,
    folds: Sequence[Sequence[str]],
    views: int,
    runs: int,
    draws: int,
    arms: Sequence[str] = tuple(ARMS),
    work: Path | None = None,
) -> dict[str, Any]:
    """Rows of arms, and what they were trained and tested on."""
    order = [(1 + number // len(folds), folds[number % len(folds)]) for number in range(runs)]
    made: dict[tuple[int, tuple[str, ...]], dict[str, Stored]] = {}
    logits = []
    for seed, fold in order:

        def of_arm(arm: Arm, seed: int = seed) -> dict[str, Stored]:
            if (seed, arm.off) not in made:
                say(f"seed {seed}: views without {', '.join(arm.off) or 'nothing'}")
                made[seed, arm.off] = {
                    group: views_of(group, own, views, seed=seed, off=arm.off)
                    for group, own in slices.items()
                }
            return made[seed, arm.off]

        def keep(
            name: str, make: Callable[[], dict[str, Any]], seed: int = seed, fold: Sequence[str] = fold
        ) -> dict[str, Any]:
            say(f"seed {seed}, without {', '.join(fold)}: {name}")
            place = list(ARMS).index(name)
            return kept(work and work / f"levers-{seed}-{place}-{'-'.join(fold)}.npz", make)

        of_seed = plan.model_copy(update={"seed": plan.seed + seed})
        logits.append(fold_scores(of_seed, start, of_arm, tests, fold, keep, arms))
    return {
        "rows": compared(tests, logits, draws),
        "runs": [{"seed": seed, "left_out": list(fold)} for seed, fold in order],
        "views_of_a_source": views,
        "passes": plan.training.rounds,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: a line an arm."""
    lines = [
        "| lever | AUROC without it, severity ≥ .5 | it gave, severity ≥ .5 | each run | "
        "it gave, severity .25–.5 | each run | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        visible, mild = (row[column] for column in BANDS)
        name = f"{row['arm']} (with it)" if ARMS[row["arm"]].distils else row["arm"]
        if row["arm"] == REFERENCE:
            lines.append(f"| {name} | {visible['auroc']:.3f} (mild: {mild['auroc']:.3f}) | | | | | |")
            continue
        signs = {
            column: ("helped" if row[column]["gave"] > 0 else "harmed") if row[column]["decided"] else ""
            for column in BANDS
        }
        verdict = ", ".join(
            f"{sign} ({'≥ .5' if column == 'visible' else 'mild'})" for column, sign in signs.items() if sign
        )
        lines.append(
            f"| {name} | {visible['auroc']:.3f} | {_cell(visible)} | {_runs(visible)} | {_cell(mild)} | "
            f"{_runs(mild)} | {verdict or 'undecided'} |"
        )
    return "\n".join(lines)


def _cell(gain: dict[str, Any]) -> str:
    return f"{gain['gave']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _runs(gain: dict[str, Any]) -> str:
    return " ".join(f"{one:+.3f}" for one in gain["runs"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=int, default=160, help="of each source (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=6, help="over the views (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="two a seed (default: %(default)s)")
    parser.add_argument(
        "--only", choices=list(ARMS)[1:], nargs="+", default=list(ARMS)[1:], help="these arms, by their names"
    )
    parser.add_argument("--quick", action="store_true", help="few views, one pass, two runs")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what is done here; one a choice")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="page of the table")
    arguments = parser.parse_args()
    names = ("FEDQC_REAL_DATA", "FEDQC_REAL_PEOPLE")
    roots = {name: Path(os.environ[name]) for name in names if name in os.environ}
    if len(roots) < len(names):
        print(f"{' and '.join(names)} are not both set: the real images", file=sys.stderr)
        return 2
    quick = arguments.quick
    views, passes, runs = (8, 1, 2) if quick else (arguments.views, arguments.passes, arguments.runs)
    plan = read_plan(PLAN)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": passes})})
    set_threads(1)
    start = load_model(
        resolve_initial(plan.model.initial, plan.model.sha256),
        manifest_of(build(plan.model.name).state_dict()),
    )
    if arguments.work is not None:
        arguments.work.mkdir(exist_ok=True)
    slices = {}
    for group in MR_GROUPS:
        root = roots["FEDQC_REAL_DATA" if group.startswith("site_") else "FEDQC_REAL_PEOPLE"]
        labels = root / "labels_eyeballed.csv" if group.startswith("site_") else None
        slices[group] = group_of(root / group, labels)
    found = measure(
        plan,
        start,
        slices,
        test_sets([group for fold in MR_FOLDS for group in fold], roots, arguments.work, quick),
        folds=MR_FOLDS,
        views=views,
        runs=runs,
        draws=50 if quick else 1000,
        arms=[REFERENCE, *arguments.only],
        work=arguments.work,
    )
    if arguments.format == "json":
        print(to_json(found | {"environment": environment()}))
    else:
        print(table(found))
    if arguments.update:
        update_table(arguments.update, "randomization_levers", table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
