"""Does private federation help at a real hospital that never took part? 17 hospitals, ratings by people.

    python benchmarks/real_sites.py [--quick] [--format json] [--update docs/performance.md]

Needs the extra `bench`: the package mriqc-learn (Apache-2.0) ships two tables of image-quality metrics that
MRIQC computed from head MR (Esteban et al. 2017, doi:10.1371/journal.pone.0184661): ABIDE, 1,101 people at 17
hospitals, and ds030, 265 people, here the public set. The tables are read where they lie; nothing is copied.

Task: a logistic head predicts from the metrics that a rater would exclude the image. Metrics are scaled by
the median and the interquartile range of ds030. Every arm starts from a head that was fitted to ds030's
ratings, and its settings come from `choose_real_sites.py`: found on rehearsal hospitals made of ds030, never
on ABIDE. Each hospital is left out in turn, and every number is an AUROC at the hospital left out:

    public         the start, nothing trained
    local          each other hospital alone; the mean of their models' AUROCs. local_dp: with noise
    federated      the other hospitals together, no noise. federated_dp: with noise

Private arms pass through the product's release, `client.dp.dp_sgd.noised_sum`: one clip a person, integer
grid, exactly drawn noise, the public size class as divisor. `server.aggregation.FederatedMean` averages.
Three trials: hospitals below 50 people sit out of the training (`out`, on which the aim is judged), or train
together as one site (`pool`); they are scored in either case. In `zero` they sit out, and every arm starts
from zero, as if nobody had rated the public set.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from measuring import STEADY, BenchmarkError, environment, to_json, update_table

# before NumPy is loaded
os.environ.update({name: value for name, value in STEADY.items() if name.endswith("_THREADS")})

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata, t

from client.dp.coins import Coins
from client.dp.dp_sgd import PrivateSteps, noised_sum
from client.site.config import nominal_bucket
from common.privacy import noise_multiplier_for
from common.weights import REACH, to_grid
from server.aggregation import FederatedMean

DELTA = 1e-5
EPSILONS = (8.0, 2.0, 1.0)
AIM_EPSILON, AIM = 2.0, 0.05
SEEDS = 10
MIN_TRAINING_PEOPLE = 50
MIN_OF_EACH_CLASS = 5  # at a hospital that is scored
SCALE_BOUND = 3.0  # of a scaled metric, in standard deviations of the public set
ROW_NORM = 2.0  # root mean square norm of a public person's features, beside the constant 1 of the bias
PRIOR_PRECISION = 1.0  # of the ridge with which the start is fitted
NOT_METRICS = ("subject_id", "site", "has_ghost", "rater_1", "rater_2", "rater_3")
GEOMETRY = tuple(f"{what}_{axis}" for what in ("size", "spacing") for axis in "xyz")
NOISE_CONTROL = 100.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one arm trains; chosen by `choose_real_sites.py`.

    Args:
        steps: full passes, one update each.
        clip_norm: L2 bound of a person's gradient.
        step_length: learning rate times `clip_norm`.
        noise_multiplier: of each step; 0 is not private.
    """

    steps: int
    clip_norm: float
    step_length: float
    noise_multiplier: float = 0.0


# What `python benchmarks/choose_real_sites.py` printed, before these hospitals were looked at.
CHOSEN: dict[str, tuple[int, float, float]] = {
    "local": (8, 0.1, 10.0),
    "federated": (16, 0.3, 10.0),
    "local_dp 8": (16, 0.1, 3.0),
    "local_dp 2": (4, 0.1, 3.0),
    "local_dp 1": (8, 0.3, 1.0),
    "federated_dp 8": (32, 0.3, 3.0),
    "federated_dp 2": (8, 0.03, 10.0),
    "federated_dp 1": (32, 0.3, 1.0),
}
"""Arm and epsilon -> steps, clip norm, step length."""

CHOSEN_FROM_ZERO: dict[str, tuple[int, float, float]] = {
    "local": (16, 0.1, 10.0),
    "federated": (32, 0.3, 10.0),
    "local_dp 2": (16, 0.1, 1.0),
    "federated_dp 2": (8, 1.0, 3.0),
}
"""The same where every arm starts from zero."""


class People(NamedTuple):
    """A rated table."""

    metrics: np.ndarray  # (people, metrics)
    bad: np.ndarray  # (people,), bool: a rater excludes the image
    site: np.ndarray  # (people,), names


class Site(NamedTuple):
    """What trains or is scored as one: a hospital, or the pool."""

    name: str
    features: np.ndarray  # (people, features + 1), the last is 1
    bad: np.ndarray  # (people,), bool

    @property
    def nominal(self) -> int:
        """The public size class."""
        return nominal_bucket(len(self.bad))


@dataclass(frozen=True, kw_only=True)
class PublicScale:
    """How metrics become features, and where training starts: a function of the public table alone."""

    median: np.ndarray
    spread: np.ndarray  # 0 where the public set has none: the metric is dropped
    mean: np.ndarray
    factor: float
    start: np.ndarray  # (features + 1,)

    @classmethod
    def of(cls, metrics: np.ndarray, bad: np.ndarray) -> PublicScale:
        """From the public table: scale by median and IQR, then fit the start by ridge logistic regression."""
        upper, lower = np.percentile(metrics, [75, 25], axis=0)
        zero = np.zeros(0)
        scale = cls(median=np.median(metrics, axis=0), spread=upper - lower, mean=zero, factor=1, start=zero)
        bounded = scale.bounded(metrics)
        scale = replace(scale, mean=bounded.mean(axis=0))
        norms = np.square(bounded - scale.mean).sum(axis=1)
        scale = replace(scale, factor=ROW_NORM / math.sqrt(norms.mean()))
        return replace(scale, start=ridge_logistic(scale.features(metrics), bad))

    def bounded(self, metrics: np.ndarray) -> np.ndarray:
        """Robust z-scores of the metrics that vary in public, cut at `SCALE_BOUND`."""
        varies = self.spread > 0
        z = (metrics[:, varies] - self.median[varies]) / (self.spread[varies] / 1.349)
        return np.clip(z, -SCALE_BOUND, SCALE_BOUND)

    def features(self, metrics: np.ndarray) -> np.ndarray:
        """Shape (people, features + 1); the last column is the constant of the bias."""
        return np.column_stack([(self.bounded(metrics) - self.mean) * self.factor, np.ones(len(metrics))])


def ridge_logistic(features: np.ndarray, bad: np.ndarray, precision: float = PRIOR_PRECISION) -> np.ndarray:
    """Logistic regression with a Gaussian prior of `precision` on all but the last weight (Newton)."""
    weights = np.zeros(features.shape[1])
    penalty = np.full(len(weights), precision)
    penalty[-1] = 1e-3
    for _ in range(30):
        p = expit(features @ weights)
        hessian = features.T @ (features * (p * (1 - p))[:, None]) + np.diag(penalty)
        weights = weights - np.linalg.solve(hessian, features.T @ (p - bad) + penalty * weights)
    return weights


def tables_folder() -> Path:
    """The folder of mriqc-learn's tables. The package is not imported: it would load pandas.

    Raises:
        BenchmarkError: it is not installed.
    """
    found = find_spec("mriqc_learn")
    if found is None or found.origin is None:
        raise BenchmarkError("mriqc-learn is not installed; pip install -e '.[bench]' brings it")
    return Path(found.origin).parent / "datasets"


def read_people(path: Path, metrics: Sequence[str] | None = None) -> tuple[People, list[str]]:
    """A table of the package, and the names of its metrics.

    An image is *bad* where any of the first two raters excludes it (-1); ABIDE's third column of ratings is
    not used. Geometry is no metric.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names = list(metrics or [n for n in rows[0] if n not in NOT_METRICS + GEOMETRY])
    ratings = [[row.get(rater) for rater in ("rater_1", "rater_2")] for row in rows]
    values = np.array([[float(row[name]) for name in names] for row in rows])
    if not np.isfinite(values).all():
        raise BenchmarkError(f"{path.name}: a metric is not finite")
    bad = np.array([any(r not in (None, "n/a") and float(r) < 0 for r in pair) for pair in ratings])
    return People(values, bad, np.array([row["site"] for row in rows])), names


def read_hospitals(folder: Path) -> tuple[PublicScale, list[Site]]:
    """The public scale, and ABIDE's hospitals, the largest first."""
    public, names = read_people(folder / "ds030.tsv")
    people, _ = read_people(folder / "abide.tsv", names)
    scale = PublicScale.of(public.metrics, public.bad)
    sites = [
        Site(str(name), scale.features(people.metrics[rows]), people.bad[rows])
        for name in np.unique(people.site)
        for rows in [people.site == name]
    ]
    return scale, sorted(sites, key=lambda site: (-len(site.bad), site.name))


def settings_of(arm: str, chosen: Mapping[str, tuple[int, float, float]]) -> Settings:
    """The chosen settings of an arm such as `federated_dp 2`, with the noise that its epsilon asks for."""
    steps, clip_norm, step_length = chosen[arm]
    noise = 0.0
    if "_dp" in arm:
        noise = noise_multiplier_for(float(arm.split()[1]), DELTA, 1.0, steps)
    return Settings(steps=steps, clip_norm=clip_norm, step_length=step_length, noise_multiplier=noise)


def train(sites: Sequence[Site], start: np.ndarray, settings: Settings, coins: Coins) -> np.ndarray:
    """The head after `settings.steps` rounds of one step at each site and the weighted mean; float32.

    One row is one person, so a person's gradient is (p - bad) times the row, weight and bias together.
    """
    weights = start.astype(np.float32)
    rate = settings.step_length / settings.clip_norm
    requests = [
        PrivateSteps(
            steps=1,
            learning_rate=rate,
            clip_norm=settings.clip_norm,
            noise_multiplier=settings.noise_multiplier,
            sample_rate=1.0,
            nominal_patients=site.nominal,
            max_slices_per_patient=1,
        )
        for site in sites
    ]
    for _ in range(settings.steps):
        mean = FederatedMean(len(weights))
        for site, request in zip(sites, requests, strict=True):
            errors = expit(site.features @ weights.astype(np.float64)) - site.bad
            gradients = (errors[:, None] * site.features).astype(np.float32)
            total = noised_sum(iter([gradients]), len(weights), request, coins)
            # cut to what an update can hold; only the control with 100 times the noise comes near
            step = np.clip(-rate * total / site.nominal, -REACH / 2, REACH / 2)
            moved = weights + step
            mean.add(to_grid(moved.astype(np.float32), weights), site.nominal)
        weights = mean.result(weights)
    return weights


def auroc(scores: np.ndarray, bad: np.ndarray) -> float:
    """P(score of a bad image > score of another) + half of ties."""
    positives = int(bad.sum())
    wins = rankdata(scores)[bad].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(bad) - positives)))


class Trial:
    """Trains each head once, however many comparisons need it.

    Args:
        small: `out` or `pool`, what hospitals below `MIN_TRAINING_PEOPLE` do.
        shuffled: train on labels that are permuted within each hospital, anew for each seed.
        noise: factor on the noise of the private arms.
        chosen: the settings, by arm; None: `CHOSEN`.
    """

    def __init__(
        self,
        hospitals: Sequence[Site],
        start: np.ndarray,
        *,
        small: str,
        shuffled: bool = False,
        noise: float = 1.0,
        chosen: Mapping[str, tuple[int, float, float]] | None = None,
    ) -> None:
        self.hospitals, self.start, self.chosen = list(hospitals), start, chosen or CHOSEN
        self.small, self.shuffled, self.noise = small, shuffled, noise
        self.testers = [
            site
            for site in hospitals
            if min(int(site.bad.sum()), int((~site.bad).sum())) >= MIN_OF_EACH_CLASS
        ]
        self._heads: dict[tuple[str, tuple[str, ...], int], np.ndarray] = {}
        self._scores: dict[tuple[str, tuple[str, ...], int, str], float] = {}

    def sites(self, excluded: Iterable[str]) -> list[Site]:
        """Who trains when these hospitals take no part."""
        present = [site for site in self.hospitals if site.name not in set(excluded)]
        large = [site for site in present if len(site.bad) >= MIN_TRAINING_PEOPLE]
        few = [site for site in present if len(site.bad) < MIN_TRAINING_PEOPLE]
        if self.small == "pool" and sum(len(site.bad) for site in few) >= MIN_TRAINING_PEOPLE:
            large.append(
                Site(
                    "+".join(site.name for site in few),
                    np.concatenate([site.features for site in few]),
                    np.concatenate([site.bad for site in few]),
                )
            )
        return large

    def participants(self) -> list[str]:
        """Hospitals that train or are scored."""
        trains = {name for site in self.sites([]) for name in site.name.split("+")}
        scored = {site.name for site in self.testers}
        return [site.name for site in self.hospitals if site.name in trains | scored]

    def score(self, arm: str, tester: Site, dropped: str, seed: int) -> float:
        """AUROC of an arm at `tester`, with `tester` and `dropped` out of the training."""
        sites = self.sites([tester.name, dropped])
        if arm == "public":
            return auroc(tester.features @ self.start, tester.bad)
        if arm.startswith("local"):
            return float(np.mean([self._score(arm, [site], tester, seed) for site in sites]))
        return self._score(arm, sites, tester, seed)

    def _score(self, arm: str, sites: list[Site], tester: Site, seed: int) -> float:
        seed = seed if "_dp" in arm or self.shuffled else 0
        key = (arm, tuple(site.name for site in sites), seed)
        if (*key, tester.name) not in self._scores:
            if key not in self._heads:
                self._heads[key] = self._train(arm, sites, seed)
            self._scores[(*key, tester.name)] = auroc(tester.features @ self._heads[key], tester.bad)
        return self._scores[(*key, tester.name)]

    def _train(self, arm: str, sites: list[Site], seed: int) -> np.ndarray:
        settings = settings_of(arm, self.chosen)
        settings = replace(settings, noise_multiplier=settings.noise_multiplier * self.noise)
        names = ",".join(site.name for site in sites)
        key = hashlib.sha256(f"{arm}|{names}|{seed}|{self.shuffled}|{self.noise}".encode()).digest()
        if self.shuffled:
            generator = np.random.default_rng(list(key))
            sites = [site._replace(bad=generator.permutation(site.bad)) for site in sites]
        # A known key voids the guarantee; these people are public, and the table can be made again.
        return train(sites, self.start, settings, Coins(key))


class Interval(NamedTuple):
    """A mean and the half-widths of three 95 % intervals around it; nan where too few hospitals."""

    mean: float
    jackknife: float  # hospitals as testers and trainers
    given: float  # given these training hospitals
    next: float  # of the difference that one more hospital would see, with one training
    s: float  # standard deviation over hospitals, root of the mean over seeds of s^2
    seeds: float  # standard deviation over seeds of the mean
    above: int  # hospitals with a difference above 0
    hospitals: int


def half_width(standard_error: float, degrees: int) -> float:
    """Of the 95 % interval with Student's t; nan without degrees of freedom."""
    return float(t.ppf(0.975, degrees) * standard_error) if degrees > 0 else math.nan


def jackknife_error(without: Sequence[float]) -> float:
    """Standard error from n estimates, each without one unit: sqrt((n - 1) / n * sum of squares about their
    mean). nan for fewer than two.
    """
    values = np.asarray(without, dtype=float)
    if len(values) < 2:
        return math.nan
    return float(np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()))


def single_seed_variance(differences: np.ndarray) -> float:
    """s^2 over hospitals of one training: the mean over seeds of the variance over hospitals.

    Args:
        differences: shape (hospitals, seeds), at least two hospitals.
    """
    return float(np.var(differences, axis=0, ddof=1).mean())


def next_hospital(variance: float, hospitals: int) -> float:
    """Half-width of the 95 % prediction interval of one more hospital: t(k - 1) * s * sqrt(1 + 1 / k)."""
    return half_width(math.sqrt(variance * (1 + 1 / hospitals)), hospitals - 1)


def intervals(differences: np.ndarray, without: Sequence[float]) -> Interval:
    """All intervals of one comparison.

    Args:
        differences: shape (hospitals, seeds).
        without: the mean when one hospital is neither scored nor trains, for each that does either.
    """
    hospitals, seeds = differences.shape
    by_hospital = differences.mean(axis=1)
    variance = single_seed_variance(differences) if hospitals > 1 else math.nan
    given = float(by_hospital.std(ddof=1) / math.sqrt(hospitals)) if hospitals > 1 else math.nan
    return Interval(
        mean=float(by_hospital.mean()),
        jackknife=half_width(jackknife_error(without), len(without) - 1),
        given=half_width(given, hospitals - 1),
        next=next_hospital(variance, hospitals),
        s=math.sqrt(variance),
        seeds=float(differences.mean(axis=0).std(ddof=1)) if seeds > 1 else math.nan,
        above=int((by_hospital > 0).sum()),
        hospitals=hospitals,
    )


def compare(side: tuple[Trial, str], reference: tuple[Trial, str], seeds: int) -> Interval:
    """Raw AUROC differences side - reference at the hospitals left out, and their intervals."""

    def differences(dropped: str) -> np.ndarray:
        testers = [site for site in side[0].testers if site.name != dropped]
        return np.array(
            [
                [
                    side[0].score(side[1], site, dropped, seed)
                    - reference[0].score(reference[1], site, dropped, seed)
                    for seed in range(seeds)
                ]
                for site in testers
            ]
        )

    return intervals(differences(""), [float(differences(name).mean()) for name in side[0].participants()])


def meets(found: Interval) -> bool:
    """Whether the aim is reached: the mean is large enough, and the jackknife interval excludes zero."""
    return found.mean >= AIM and found.mean - found.jackknife > 0


def arms_of(epsilons: Sequence[float]) -> list[str]:
    private = [f"{arm} {epsilon:g}" for arm in ("local_dp", "federated_dp") for epsilon in epsilons]
    return ["public", "local", "federated", *private]


def pairs_of(epsilons: Sequence[float]) -> list[tuple[str, str]]:
    """Side and reference of every comparison."""
    pairs = [("public", "local"), ("federated", "local"), ("federated", "public")]
    for epsilon in epsilons:
        side = f"federated_dp {epsilon:g}"
        pairs += [(side, "local"), (side, f"local_dp {epsilon:g}"), (side, "public"), (side, "federated")]
    return pairs


def measure_all(
    hospitals: Sequence[Site], start: np.ndarray, seeds: int, epsilons: Sequence[float]
) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    result: dict[str, Any] = {
        "benchmark": "real_sites",
        "environment": environment(("fedqc", "mriqc-learn", "numpy", "scipy")),
        "work": {
            "seeds": seeds,
            "epsilons": list(epsilons),
            "delta": DELTA,
            "settings": {"out and pool": CHOSEN, "zero": CHOSEN_FROM_ZERO},
        },
        "noise_multipliers": {
            arm: settings_of(arm, CHOSEN).noise_multiplier for arm in arms_of(epsilons) if "_dp" in arm
        },
    }
    trials = {small: Trial(hospitals, start, small=small) for small in ("out", "pool")}
    trials["zero"] = Trial(hospitals, np.zeros_like(start), small="out", chosen=CHOSEN_FROM_ZERO)
    plain = trials["out"]
    if len(plain.testers) < 3 or len(plain.sites([])) < 4:
        raise BenchmarkError("too few hospitals to leave one out")
    result["hospitals"] = {
        site.name: {
            "people": len(site.bad),
            "bad": int(site.bad.sum()),
            "nominal": site.nominal if len(site.bad) >= MIN_TRAINING_PEOPLE else None,
            "auroc": {
                arm: float(np.mean([plain.score(arm, site, "", seed) for seed in range(seeds)]))
                for arm in arms_of(epsilons)
            }
            if site in plain.testers
            else None,
        }
        for site in plain.hospitals
    }
    result["differences"] = {}
    for name, trial in trials.items():
        result["differences"][name] = {}
        for side, reference in pairs_of(epsilons if trial is plain else (AIM_EPSILON,)):
            found = compare((trial, side), (trial, reference), seeds)
            result["differences"][name][f"{side} - {reference}"] = found._asdict()
            say(f"{name}: {side} - {reference}: {found.mean:+.3f} ± {found.jackknife:.3f}")
    result["controls"] = controls(plain, seeds)
    claim = Interval(**result["differences"]["out"][f"federated_dp {AIM_EPSILON:g} - local"])
    result["aim"] = {"mean": AIM, "epsilon": AIM_EPSILON, "met": meets(claim)}
    return result


def controls(plain: Trial, seeds: int) -> dict[str, Any]:
    """The claim's comparison with something broken; none may meet the aim."""
    side = f"federated_dp {AIM_EPSILON:g}"
    broken = {
        "noise × 100": (Trial(plain.hospitals, plain.start, small="out", noise=NOISE_CONTROL), side),
        "labels shuffled": (Trial(plain.hospitals, plain.start, small="out", shuffled=True), side),
        "nothing trained": (plain, "public"),
    }
    result = {}
    for name, what in broken.items():
        found = compare(what, (plain, "local"), seeds)
        result[name] = {**found._asdict(), "fails": not meets(found)}
        say(f"control, {name}: {found.mean:+.3f} ± {found.jackknife:.3f}")
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: hospitals, differences, controls."""
    arms = list(next(each["auroc"] for each in result["hospitals"].values() if each["auroc"]))
    lines = [
        "| hospital left out | people | bad | bucket | " + " | ".join(arms) + " |",
        "|---|---|---|---|" + "---|" * len(arms),
    ]
    scored = [each for each in result["hospitals"].values() if each["auroc"]]
    for name, each in result["hospitals"].items():
        cells = [f"{each['auroc'][arm]:.3f}" if each["auroc"] else "" for arm in arms]
        lines.append(
            f"| {name} | {each['people']} | {each['bad']} | {each['nominal'] or '–'} | {' | '.join(cells)} |"
        )
    means = [f"{np.mean([each['auroc'][arm] for each in scored]):.3f}" for arm in arms]
    lines += [f"| mean of {len(scored)} | | | | {' | '.join(means)} |", ""]
    head = "mean ± jackknife | ± given trainers | ± next hospital | s | SD over seeds | above 0 |"
    rule = "|---|---|---|---|---|---|---|---|"
    lines += [f"| trial | difference of AUROC | {head}", rule]
    lines += [
        f"| {trial} | {name.replace(' - ', ' − ')} | {_cells(each)}"
        for trial, differences in result["differences"].items()
        for name, each in differences.items()
    ]
    lines += ["", f"| control of federated_dp {AIM_EPSILON:g} − local | {head} claim |", rule]
    lines += [
        f"| {name} | {_cells(each)} {'fails' if each['fails'] else 'HOLDS'} |"
        for name, each in result["controls"].items()
    ]
    env, work = result["environment"], result["work"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    chosen = ". ".join(
        f"{name}: "
        + "; ".join(f"{arm} {steps}, {clip:g}, {step:g}" for arm, (steps, clip, step) in each.items())
        for name, each in work["settings"].items()
    )
    lines += [
        "",
        f"Aim: federated_dp {AIM_EPSILON:g} − local at least {AIM} with a jackknife interval above 0: "
        f"{'met' if result['aim']['met'] else 'missed'}.",
        "",
        f"{work['seeds']} seeds, δ {work['delta']:g}. Steps, clip, step length of {chosen}. {env['date']}, "
        f"Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _cells(each: Mapping[str, float]) -> str:
    return (
        f"{each['mean']:+.3f} ± {each['jackknife']:.3f} | {each['given']:.3f} | {each['next']:.3f} | "
        f"{each['s']:.3f} | {each['seeds']:.3f} | {each['above']} of {each['hospitals']} |"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, epsilon 2, the 7 largest hospitals")
    parser.add_argument("--seeds", type=int, help=f"instead of {SEEDS}, or 2 with --quick")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="also rewrite the table in this Markdown page"
    )
    arguments = parser.parse_args()
    try:
        scale, hospitals = read_hospitals(tables_folder())
        result = measure_all(
            hospitals[:7] if arguments.quick else hospitals,
            scale.start,
            arguments.seeds or (2 if arguments.quick else SEEDS),
            (AIM_EPSILON,) if arguments.quick else EPSILONS,
        )
        if arguments.update:
            update_table(arguments.update, "real_sites", table(result))
    except BenchmarkError as error:
        say(f"real_sites: {error}")
        return 1
    print(to_json(result) if arguments.format == "json" else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
