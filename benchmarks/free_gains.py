"""What do changes of the private training gain that cost no privacy, on rehearsals they were not chosen on?

    python benchmarks/free_gains.py [--quick] [--wide PATIENTS] [--format json] [--update docs/performance.md]

The settings of a private arm (`server.run.tune`: rate, steps, mean of the last rounds) are chosen on four of
the five public rehearsals, by the rule of `fedqc run tune`, and scored on the fifth; so is each gain together
with its own parameter. All are post-processing of the noised sums, or follow from public phantoms:

    last model         instead of the better of that and the mean of the last half of rounds (base)
    EMA of rounds      an exponential mean of the models after each round
    mean of steps      of the last half of steps instead of rounds
    towards the start  a point between the starting weights and the trained ones
    pull               the same in every step: a Gaussian prior around the starting weights
    cosine             the learning rate falls to nothing over all steps
    heavy ball         momentum on the noised mean
    centred, whitened  in public coordinates: features less their public mean, with a power of their public
                       covariance; before the clip (each patient's gradient) or on the noised mean
    gradient moments   a power of the public second moment of patients' gradients, on the noised mean
    clip of 0.01       nearly every gradient has the same length
    more features      (--wide) further components of what the layer under the head sees, of so many patients
                       a shift, who are drawn anew

Between clip and noise nothing is changed. Each difference to the base is paired (the same noise); its
interval is that of Student's t over the five shifts. A gain is kept if, with labels or with views, the
difference at ε 2 is above 0.005, better on four shifts, and not negative at ε 8 and 1.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from measuring import command_line, environment, reported, say
from scipy.special import expit
from scipy.stats import t as student

from common.errors import PlanError
from common.learning import extract_features, set_threads
from common.model_file import load_model
from common.models import build
from common.models.small_cnn import SmallCNN, pooled
from common.physics.appearance import PUBLIC_APPEARANCES
from common.plan import Model, RunPlan, parse_plan
from common.public_phantoms import draw
from common.weights import manifest_of, unflatten
from server.public_model.rehearsals import FOLDS, SHIFTS, SIZE, Rehearsal, rehearsals_of, rehearse
from server.run import tune
from server.run.tune import Fold, Patients, Setting, Tried

MODEL, START = Model(), Path(__file__).parents[1] / "common/models/small_cnn_phantoms.safetensors"
EPSILONS, SITES, PATIENTS, ROUNDS, SEED = (8.0, 2.0, 1.0), 3, 100, 6, 7
STEPS = (2, 8)  # of a round
REACHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # learning rate times clip times steps of a round
PUBLIC_PATIENTS, PUBLIC_SEED = 240, 20261
WIDER = ((0, False), (48, False), (112, False), (48, True))  # more features, and whether of equal variance
KEPT_ABOVE, KEPT_SHIFTS = 0.005, 4

Final = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From the start, heads after each step, (steps, n, A, F + 1), and steps of a round to the heads kept."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How a training differs from that of `tune.rehearse_training`."""

    clip_norm: float = tune.CLIP
    momentum: float = 0.0
    pull: float = 0.0  # how far the whole training is pulled towards the start, in units of the way
    cosine: bool = False
    coordinates: np.ndarray | None = None  # float64 (F + 1, F + 1): features times this are trained on
    of_mean: np.ndarray | None = None  # the noised mean gradient is multiplied by this; rows or flat


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One way to train and to end, with each value of its own parameter."""

    ways: Sequence[How] = (How(),)
    finals: Sequence[Final] = field(default_factory=lambda: BASE_FINALS)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What public phantoms say about features and gradients."""

    mean: np.ndarray  # (F,)
    covariance: np.ndarray  # (F, F)
    gradients: np.ndarray  # (A (F + 1), A (F + 1)): mean over patients of the outer product


@dataclass(frozen=True, kw_only=True)
class Left:
    """Scores on the shifts left out, each with settings chosen on the others."""

    gains: np.ndarray  # (shifts,), over the starting weights
    spread: float  # standard deviation over draws of one training
    chosen: Sequence[str]


def trained(
    head: np.ndarray, patients: Patients, setting: Setting, how: How, noise: float, seed: int
) -> np.ndarray:
    """The heads after each step, (steps, DRAWS, A, F + 1); as `tune.rehearse_training` for `How()`."""
    start, steps = head, setting.steps_per_round * ROUNDS
    if how.coordinates is not None:
        start = (head @ np.linalg.inv(how.coordinates).T).astype(np.float32)
        patients = replace(patients, x=(patients.x @ how.coordinates).astype(np.float32))
    rng = np.random.default_rng(seed)
    heads = np.repeat(start[None], tune.DRAWS, axis=0)
    velocity, after = np.zeros_like(heads), []
    for step in range(steps):
        mean = tune.clipped_mean(heads, patients, setting.clip_norm)
        mean = mean + rng.standard_normal(heads.shape, dtype=np.float32) * np.float32(noise)
        if how.of_mean is not None:
            rows = mean.reshape(-1, len(how.of_mean))
            mean = (rows @ how.of_mean).astype(np.float32).reshape(mean.shape)
        velocity = how.momentum * velocity + np.float32(1 - how.momentum) * mean
        rate = setting.learning_rate * ((1 + math.cos(math.pi * step / steps)) / 2 if how.cosine else 1)
        heads = heads - np.float32(rate) * velocity
        heads = start + np.float32(1 - how.pull / steps) * (heads - start) if how.pull else heads
        after.append(heads)
    found = np.stack(after)
    return found if how.coordinates is None else found @ how.coordinates.T.astype(np.float32)


def last(start: np.ndarray, after: np.ndarray, steps: int) -> np.ndarray:
    return after[-1]


def mean_of_rounds(start: np.ndarray, after: np.ndarray, steps: int) -> np.ndarray:
    """Of the last half."""
    return after[steps - 1 :: steps][-(ROUNDS // 2) :].mean(axis=0)


def mean_of_steps(start: np.ndarray, after: np.ndarray, steps: int) -> np.ndarray:
    """Of the last half."""
    return after[len(after) // 2 :].mean(axis=0)


def ema(decay: float) -> Final:
    weights = decay ** np.arange(ROUNDS)[::-1]
    return lambda start, after, steps: np.tensordot(weights / weights.sum(), after[steps - 1 :: steps], 1)


def towards_start(share: float) -> Final:
    return lambda start, after, steps: start + share * (mean_of_rounds(start, after, steps) - start)


BASE_FINALS: Sequence[Final] = (last, mean_of_rounds)


def coordinates(moments: Moments, power: float, damping: float = 0.1) -> np.ndarray:
    """Features less their public mean, times the inverse power of their public covariance, scaled so that
    the sum of their public variances stays; the bias stays.
    """
    values, vectors = np.linalg.eigh(moments.covariance)
    scales = (np.maximum(values, 0) + damping * values.mean()) ** -power
    scales *= math.sqrt(values.sum() / (scales**2 * values).sum())
    found = np.eye(len(moments.mean) + 1)
    found[:-1, :-1] = (vectors * scales) @ vectors.T
    found[-1, :-1] = -moments.mean @ found[:-1, :-1]
    return found


def of_gradients(moments: Moments, power: float, damping: float) -> np.ndarray:
    """A power of the public second moment of gradients, scaled so that they keep their mean square."""
    values, vectors = np.linalg.eigh(moments.gradients)
    scales = (np.maximum(values, 0) + damping * values.mean()) ** power
    scales *= math.sqrt(values.sum() / (scales**2 * values).sum())
    found: np.ndarray = (vectors * scales) @ vectors.T
    return found


def moments_of(head: np.ndarray, features: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> Moments:
    patients = tune.grouped(features, labels, owners, np.ones(len(owners), bool))
    logits = np.einsum("pkf,af->pka", patients.x, head)
    residual = (expit(logits) - np.nan_to_num(patients.labels)) * patients.weight
    gradients = np.einsum("pka,pkf->paf", residual, patients.x).reshape(len(residual), -1)
    return Moments(
        mean=features.mean(axis=0),
        covariance=np.cov(features.T),
        gradients=gradients.T @ gradients / len(gradients),
    )


def gains_of(moments: Moments) -> dict[str, Gain]:
    """Name -> a gain; `base` first."""
    centred, quarter, half = coordinates(moments, 0), coordinates(moments, 0.25), coordinates(moments, 0.5)
    return {
        "base": Gain(),
        "last model": Gain(finals=(last,)),
        "EMA of rounds": Gain(finals=(ema(0.5), ema(0.8))),
        "mean of steps": Gain(finals=(mean_of_steps,)),
        "towards the start": Gain(finals=(towards_start(0.5), towards_start(0.75))),
        "pull": Gain(ways=(How(pull=0.5), How(pull=2))),
        "cosine": Gain(ways=(How(cosine=True),)),
        "heavy ball": Gain(ways=(How(momentum=0.5), How(momentum=0.9))),
        "centred, before the clip": Gain(ways=(How(coordinates=centred),)),
        "whitened, before the clip": Gain(ways=(How(coordinates=quarter), How(coordinates=half))),
        "less whitened, before the clip": Gain(ways=(How(coordinates=coordinates(moments, -0.25)),)),
        "centred, noised mean": Gain(ways=(How(of_mean=centred @ centred.T),)),
        "whitened, noised mean": Gain(ways=tuple(How(of_mean=each @ each.T) for each in (quarter, half))),
        "gradient moments, noised mean": Gain(
            ways=(
                How(of_mean=of_gradients(moments, -0.25, 0.1)),
                How(of_mean=of_gradients(moments, 0.25, 0.01)),
            )
        ),
        "clip of 0.01": Gain(ways=(How(clip_norm=0.01),)),
        "clip of 0.01, centred": Gain(ways=(How(clip_norm=0.01, coordinates=centred),)),
    }


class Bench:
    """Trainings at one epsilon on all shifts, each done once."""

    def __init__(
        self,
        head: np.ndarray,
        rehearsals: Mapping[str, Rehearsal],
        *,
        epsilon: float,
        views: bool,
        reaches: Sequence[float] = REACHES,
    ) -> None:
        self.head, self.epsilon, self.views = head, epsilon, views
        self.folds = {shift: tune.folds_of(one, views=views) for shift, one in rehearsals.items()}
        self.public = {shift: self._public(folds) for shift, folds in self.folds.items()}
        self.settings = list(itertools.product(STEPS, reaches))
        self.noise = cache(self._noise)

    def _public(self, folds: Sequence[Fold]) -> float:
        return float(np.mean([tune.macro_auroc(self.head[None], fold.test)[0] for fold in folds]))

    def _noise(self, clip_norm: float, steps: int) -> float:
        return tune.noise_of_mean(self.plan(clip_norm, steps))

    def plan(self, clip_norm: float, steps: int) -> RunPlan:
        return parse_plan(
            {
                "name": "free-gains",
                "arms": ["public", "federated_dp"],
                "seed": SEED,
                "training": {"rounds": ROUNDS} | ({"inject": {"views": 4}} if self.views else {}),
                "privacy": {
                    "epsilon": self.epsilon,
                    "clip_norm": clip_norm,
                    "steps_per_round": steps,
                    "expected_sites": SITES,
                    "expected_patients": PATIENTS,
                },
            }
        )

    def scores(self, how: How, finals: Sequence[Final]) -> list[tuple[str, dict[str, np.ndarray]]]:
        """What was tried, and its gains: shift -> (folds, draws)."""
        tried = []
        for steps, reach in self.settings:
            setting = Setting(
                clip_norm=how.clip_norm,
                learning_rate=reach / steps / how.clip_norm,
                steps_per_round=steps,
                average_rounds=1,
            )
            noise = self.noise(how.clip_norm, steps)
            found: list[dict[str, list[np.ndarray]]] = [{shift: [] for shift in self.folds} for _ in finals]
            for number, (shift, folds) in enumerate(self.folds.items()):
                for place, fold in enumerate(folds):
                    seed = SEED + FOLDS * number + place
                    after = trained(self.head, fold.training, setting, how, noise, seed)
                    for final, scores in zip(finals, found, strict=True):
                        kept = final(self.head, after, steps).astype(np.float32)
                        scores[shift].append(tune.macro_auroc(kept, fold.test) - self.public[shift])
            for place, scores in enumerate(found):
                name = f"{steps} steps, reach {reach:g}, end {place + 1}"
                tried.append((name, {shift: np.stack(values) for shift, values in scores.items()}))
        return tried

    def left_out(self, gain: Gain) -> Left:
        """Choose on all shifts but one, score on that one; each shift in turn."""
        tried = [
            (f"way {number + 1}, {name}", scores)
            for number, how in enumerate(gain.ways)
            for name, scores in self.scores(how, gain.finals)
        ]
        gains, spreads, chosen = [], [], []
        for shift in self.folds:
            others = [_tried({each: one[each] for each in one if each != shift}) for _, one in tried]
            try:
                best = tune.choose(others, STEPS)
            except PlanError:  # the starting weights are as good
                gains.append(0.0)
                spreads.append(0.0)
                chosen.append("none")
                continue
            name, scores = next(one for one, other in zip(tried, others, strict=True) if other is best)
            gains.append(float(scores[shift].mean()))
            spreads.append(float(np.mean(np.var(scores[shift], axis=1, ddof=1))))
            chosen.append(name)
        return Left(gains=np.array(gains), spread=math.sqrt(float(np.mean(spreads))), chosen=chosen)


def _tried(scores: Mapping[str, np.ndarray]) -> Tried:
    return Tried(
        setting=Setting(clip_norm=1, learning_rate=1, steps_per_round=1, average_rounds=1),  # not looked at
        gains={shift: float(values.mean()) for shift, values in scores.items()},
        spread=math.sqrt(float(np.mean([np.var(values, axis=1, ddof=1) for values in scores.values()]))),
    )


def compared(bench: Bench, gains: Mapping[str, Gain], base: Left | None = None) -> dict[str, dict[str, Any]]:
    """Each gain on the shifts left out, and less the base.

    Args:
        base: what to compare with; None: the first of `gains`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, gain in gains.items():
        began = time.process_time()
        left = bench.left_out(gain)
        base = base or left
        found[name] = row(left, base) | {"cpu_s": time.process_time() - began}
        say(f"ε {bench.epsilon:g}{', views' * bench.views}: {name} {found[name]['difference']:+.4f}")
    return found


def row(left: Left, base: Left) -> dict[str, Any]:
    difference = left.gains - base.gains
    count = len(difference)
    return {
        "gain": float(left.gains.mean()),
        "sd_shifts": float(left.gains.std(ddof=1)),
        "sd_draws": left.spread,
        "difference": float(difference.mean()),
        "interval": float(student.ppf(0.975, count - 1) * difference.std(ddof=1) / math.sqrt(count)),
        "better": int((difference > 0).sum()),
        "by_shift": left.gains.tolist(),
        "chosen": list(left.chosen),
    }


def wide_compared(start: np.ndarray, epsilons: Sequence[float], patients: int) -> dict[str, Any]:
    """More features: what the layer under the head sees, of fewer patients, drawn anew."""
    network = build(MODEL.name)
    network.load_state_dict(unflatten(start, manifest_of(network.state_dict())))
    assert isinstance(network, SmallCNN)
    weight, bias = network.neck.weight.detach().numpy(), network.neck.bias.detach().numpy()
    public = draw(PUBLIC_APPEARANCES, PUBLIC_PATIENTS, PUBLIC_SEED, SIZE)
    with patch.object(SmallCNN, "features_of", lambda _, early, late: pooled(early, late)):
        below = extract_features(network, public.images, public.modality, np.arange(len(public.images)))
        drawn = {shift: rehearse(shift, MODEL, start, patients) for shift in SHIFTS}
    rest = np.linalg.svd(weight)[2][len(weight) :]  # rows: what the neck does not see
    values, vectors = np.linalg.eigh(np.cov(rest @ below.T))
    variance = float(np.var(below @ weight.T, axis=0).mean())
    head = tune.head_of(MODEL, start)
    found: dict[str, Any] = {}
    for epsilon, views in itertools.product(epsilons, (False, True)):
        base, rows = None, {}
        for more, whitened in WIDER:
            own = values[::-1][:more]
            axes = vectors[:, ::-1][:, :more].T @ rest
            if more:
                axes *= _scales(own, variance, whitened)
            full = np.concatenate([weight, axes])
            offset = np.concatenate([bias, -axes @ below.mean(axis=0)])
            seen = {s: replace(one, features=one.features @ full.T + offset) for s, one in drawn.items()}
            wider = np.insert(head, [head.shape[1] - 1] * more, 0, axis=1)
            bench = Bench(wider, seen, epsilon=epsilon, views=views)
            name = f"{more} more features{', whitened' * whitened}"
            name = name if more else f"base, {patients} patients a shift"
            began = time.process_time()
            left = bench.left_out(Gain())
            base = base or left
            rows[name] = row(left, base) | {"cpu_s": time.process_time() - began}
            say(f"ε {epsilon:g}{', views' * views}: {name} {rows[name]['difference']:+.4f}")
        found[_column(epsilon, views)] = rows
    return found


def _scales(own: np.ndarray, variance: float, whitened: bool) -> np.ndarray:
    """What brings axes of these variances to another variance, each or on average."""
    return np.sqrt(variance / (own if whitened else np.full(len(own), own.mean())))[:, None]


def _column(epsilon: float, views: bool) -> str:
    return f"ε {epsilon:g}{', views' if views else ''}"


def measure_all(*, quick: bool, wide: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    set_threads(1)
    started_with = environment(("fedqc", "torch", "numpy", "scipy"))
    network = build(MODEL.name)
    start = load_model(START, manifest_of(network.state_dict()))
    network.load_state_dict(unflatten(start, manifest_of(network.state_dict())))
    head, rehearsals = tune.head_of(MODEL, start), rehearsals_of(MODEL, start)
    public = draw(PUBLIC_APPEARANCES, PUBLIC_PATIENTS // (4 if quick else 1), PUBLIC_SEED, SIZE)
    features = extract_features(network, public.images, public.modality, np.arange(len(public.images)))
    gains = gains_of(moments_of(head, features, public.labels, public.patients))
    epsilons, kinds = ((2.0,), (False,)) if quick else (EPSILONS, (False, True))
    reaches = (4.0, 8.0) if quick else REACHES
    found = {
        _column(epsilon, views): compared(
            Bench(head, rehearsals, epsilon=epsilon, views=views, reaches=reaches), gains
        )
        for views, epsilon in itertools.product(kinds, epsilons)
    }
    wider = wide_compared(start, epsilons, wide) if wide else {}
    return {
        "benchmark": "free_gains",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "found": found,
        "wide": wider,
        "kept": [name for each in (found, wider) for name in _names(each) if is_kept(name, each)],
    }


def _names(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(found.values()), {}))


def is_kept(name: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bool:
    """Whether a gain meets the rule, with labels or with views."""
    for end in ("", ", views"):
        rows = {column: rows[name] for column, rows in found.items() if column.endswith("views") == bool(end)}
        at_2 = rows.get(f"ε 2{end}")
        if (
            at_2
            and at_2["difference"] > KEPT_ABOVE
            and at_2["better"] >= KEPT_SHIFTS
            and all(one["difference"] >= 0 for one in rows.values())
        ):
            return True
    return False


def table(result: dict[str, Any]) -> str:
    """Markdown: gains over the starting weights, and differences to the base."""
    parts = []
    for found in (result["found"], result["wide"]):
        if not found:
            continue
        columns = list(found)
        names = _names(found)
        parts += [_head("gain, SD over shifts, SD over draws", columns)]
        parts += [_line(name, [_gain(found[column][name]) for column in columns]) for name in names]
        parts += ["", _head("less the base, interval, better of 5", [*columns, "CPU-s"])]
        for name in names[1:]:
            cells = [_difference(found[column][name]) for column in columns]
            parts.append(_line(name, [*cells, f"{sum(found[each][name]['cpu_s'] for each in columns):.0f}"]))
        parts.append("")
    env = result["environment"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    base = sum(rows["base"]["cpu_s"] for rows in result["found"].values())
    parts += [
        f"Meets the rule: {', '.join(result['kept']) or 'none'}. The base takes {base:.0f} CPU-s.",
        "",
        f"{SITES} sites of {PATIENTS} patients, {ROUNDS} rounds, {tune.DRAWS} draws of noise. {env['date']}, "
        f"{env['cores']} cores, {env['machine']}, one thread; Python {env['python']}, {versions}.",
    ]
    return "\n".join(parts)


def _head(first: str, columns: Sequence[str]) -> str:
    return _line(first, columns) + "\n|" + "---|" * (len(columns) + 1)


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def _gain(one: Mapping[str, Any]) -> str:
    return f"{one['gain']:+.4f}, {one['sd_shifts']:.4f}, {one['sd_draws']:.4f}"


def _difference(one: Mapping[str, Any]) -> str:
    return f"{one['difference']:+.4f} ± {one['interval']:.4f}, {one['better']}"


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="ε 2 with labels, few settings")
    parser.add_argument(
        "--wide", type=int, default=0, metavar="PATIENTS", help="more features, too, of so many a shift"
    )
    arguments = parser.parse_args()
    return reported(
        "free_gains", arguments, lambda: measure_all(quick=arguments.quick, wide=arguments.wide), table
    )


if __name__ == "__main__":
    sys.exit(main())
