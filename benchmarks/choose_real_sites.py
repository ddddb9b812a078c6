"""Which settings should `real_sites.py` train with? Chosen on rehearsal hospitals made of the public table
ds030, with the noise on, never on ABIDE.

    python benchmarks/choose_real_sites.py [--seed 11] [--arm ARM] [--zero] [--check]

A rehearsal splits ds030's people into thirds: one gives the scale and the start, one the eight training
hospitals, one eight hospitals to be scored. A person of a hospital is a ds030 person moved up to 60 % of the
way to another. Each hospital shifts and stretches every metric, by half or one and a half times what two
ds030 people differ by, and has a prevalence of its own; 8 % of ratings are flipped. Three kinds of raters:
those of ds030, and raters whose judgement agrees with the start by a correlation of .7 or .3, the rest a
random direction (so that a start is no better than what real hospitals show, and training can gain). Six
shifts in all, each repeated.

Regret is the distance from a shift's best setting. For each arm and epsilon the smallest worst-case regret
over the shifts decides; of settings within .003 of it, the fewest steps. An optimum at an end of its grid is
marked. Noise is float
noise of the deviation that the real release has. `--check` scores the chosen settings on rehearsals of
another seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from dataclasses import dataclass, replace

from measuring import STEADY

# before NumPy is loaded
os.environ.update({name: value for name, value in STEADY.items() if name.endswith("_THREADS")})

import numpy as np
from real_sites import (
    CHOSEN,
    CHOSEN_FROM_ZERO,
    DELTA,
    EPSILONS,
    PublicScale,
    arms_of,
    read_people,
    say,
    tables_folder,
)
from scipy.special import expit
from scipy.stats import rankdata

from common.privacy import noise_multiplier_for

SHIFTS = (0.5, 1.5)
AGREEMENTS = (None, 0.7, 0.3)
REPETITIONS, DRAWS = 3, 6
TRAINING_PEOPLE = (180, 140, 110, 100, 60, 60, 55, 55)
SCORED_HOSPITALS, SCORED_PEOPLE = 8, 60
FLIPPED = 0.08
TOLERANCE = 0.003  # of a regret: what a mean over shifts, repetitions and draws cannot tell apart
STEPS = (1, 2, 4, 8, 16, 32, 64)
CLIPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

Rows = tuple[np.ndarray, np.ndarray]  # features, bad


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One draw of hospitals under one shift."""

    start: np.ndarray
    training: list[Rows]
    scored: list[Rows]


class Public:
    """The public people as robust z-scores, from which hospitals are drawn."""

    def __init__(self) -> None:
        people, _ = read_people(tables_folder() / "ds030.tsv")
        self.metrics, self.bad = people.metrics, people.bad
        scale = PublicScale.of(self.metrics, self.bad)
        varies = scale.spread > 0
        self.median, self.spread = scale.median[varies], scale.spread[varies] / 1.349
        self.metrics = self.metrics[:, varies]
        self.z = np.clip((self.metrics - self.median) / self.spread, -6, 6)

    def hospital(self, scale: PublicScale, people: np.ndarray, count: int, raters: Raters) -> Rows:
        """`count` people made of `people`, as one hospital with its own shift sees and rates them."""
        generator = raters.generator
        share = float(np.clip(generator.beta(1.5, 3), 0.08, 0.85))
        first, second, bad = raters.draw(people, count, share)
        z = self.z[first] + generator.uniform(0, 0.6, (count, 1)) * (self.z[second] - self.z[first])
        if raters.direction is not None:
            bad = raters.rate(z, share)
        one, other = generator.choice(len(self.z), 2, replace=False)
        pattern = np.clip(self.z[one] - self.z[other], -4, 4) / np.sqrt(2)
        offset = raters.shift * 0.7 * (pattern + generator.normal(size=z.shape[1]))
        z = z * np.exp(0.25 * generator.normal(size=z.shape[1])) + offset
        return scale.features(z * self.spread + self.median), bad ^ (generator.random(count) < FLIPPED)

    def rehearse(self, seed: int, shift: float, agreement: float | None, repetition: int) -> Rehearsal:
        """Scale, start, training hospitals and scored hospitals of three thirds of the people."""
        key = [seed, int(10 * shift), 0 if agreement is None else int(10 * agreement), repetition]
        generator = np.random.default_rng(key)
        ours, theirs, scored = np.array_split(generator.permutation(len(self.z)), 3)
        scale = PublicScale.of(self.metrics[ours], self.bad[ours])
        raters = Raters(self, generator, shift, agreement)
        return Rehearsal(
            start=scale.start,
            training=[self.hospital(scale, theirs, count, raters) for count in TRAINING_PEOPLE],
            scored=[self.hospital(scale, scored, SCORED_PEOPLE, raters) for _ in range(SCORED_HOSPITALS)],
        )


class Raters:
    """Who is rated bad in one rehearsal; None as agreement: as in ds030."""

    def __init__(
        self, public: Public, generator: np.random.Generator, shift: float, agreement: float | None
    ) -> None:
        self.generator, self.shift, self.bad = generator, shift, public.bad
        self.direction: np.ndarray | None = None
        if agreement is not None:
            whole = PublicScale.of(public.z, public.bad)
            head = np.zeros(public.z.shape[1])
            head[whole.spread > 0] = whole.start[:-1] / whole.spread[whole.spread > 0]
            other = generator.normal(size=public.z.shape[1])
            known, new = (weights / (public.z @ weights).std() for weights in (head, other))
            self.direction = agreement * known + np.sqrt(1 - agreement**2) * new

    def draw(self, people: np.ndarray, count: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two positions of public people for each person, of one class where the raters are ds030's."""
        if self.direction is not None:
            first, second = (self.generator.choice(people, count) for _ in range(2))
            return first, second, np.zeros(count, dtype=bool)
        bad = self.generator.random(count) < share
        bad[:5], bad[5:10] = True, False
        of_class = {each: people[self.bad[people] == each] for each in (False, True)}
        first, second = (
            np.array([self.generator.choice(of_class[bool(each)]) for each in bad]) for _ in range(2)
        )
        return first, second, bad

    def rate(self, z: np.ndarray, share: float) -> np.ndarray:
        """Ratings by the direction, with a logistic doubt; at least five of each class."""
        score = z @ self.direction
        score = 2.5 * (score - np.quantile(score, 1 - share)) / max(score.std(), 1e-9)
        bad = self.generator.random(len(z)) < expit(score)
        order = np.argsort(score)
        bad[order[-5:]], bad[order[:5]] = True, False
        return bad


def nominal(count: int) -> int:
    """The public size class of a training hospital of these rehearsals."""
    return 100 if count >= 100 else 50


def train_many(
    sites: list[Rows], start: np.ndarray, steps: int, noise: float, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """The heads of all clips and lengths at once, shape (features + 1, clips * lengths * draws)."""
    grid = np.repeat(np.array(list(itertools.product(CLIPS, LENGTHS))), draws, axis=0)
    clip, length = grid[:, 0], grid[:, 1]
    weights = np.repeat(start[:, None], len(grid), axis=1)
    norms = [np.linalg.norm(features, axis=1)[:, None] for features, _ in sites]
    divisor = sum(nominal(len(bad)) for _, bad in sites)
    for _ in range(steps):
        total = noise * np.sqrt(len(sites)) * clip * generator.normal(size=weights.shape) if noise else 0.0
        for (features, bad), norm in zip(sites, norms, strict=True):
            errors = expit(features @ weights) - bad[:, None]
            total = total + features.T @ (
                errors * np.minimum(1, clip / np.maximum(np.abs(errors) * norm, 1e-12))
            )
        weights = weights - length / clip * total / divisor
    return weights


def scores(rehearsal: Rehearsal, heads: np.ndarray, draws: int) -> np.ndarray:
    """Mean AUROC over scored hospitals and draws, one number a setting."""
    each = []
    for features, bad in rehearsal.scored:
        ranks, positives = rankdata(features @ heads, axis=0), int(bad.sum())
        wins = ranks[bad].sum(axis=0) - positives * (positives + 1) / 2
        each.append(wins / (positives * (len(bad) - positives)))
    return np.mean(each, axis=0).reshape(-1, draws).mean(axis=1)


def curve(rehearsals: list[Rehearsal], arm: str, seed: int) -> np.ndarray:
    """AUROC of every setting under every rehearsal, shape (steps, clips * lengths, rehearsals)."""
    found = []
    for steps in STEPS:
        noise = noise_multiplier_for(float(arm.split()[1]), DELTA, 1.0, steps) if "_dp" in arm else 0.0
        draws = 1 if not noise else 2 if arm.startswith("local") else DRAWS
        generator = np.random.default_rng([seed, steps])
        by_rehearsal = []
        for rehearsal in rehearsals:
            groups = [[site] for site in rehearsal.training]
            groups = groups if arm.startswith("local") else [rehearsal.training]
            by_rehearsal.append(
                np.mean(
                    [
                        scores(
                            rehearsal, train_many(g, rehearsal.start, steps, noise, draws, generator), draws
                        )
                        for g in groups
                    ],
                    axis=0,
                )
            )
        found.append(np.array(by_rehearsal).T)
    return np.array(found)


def choose(found: np.ndarray) -> tuple[tuple[int, float, float], np.ndarray, float, str]:
    """The fewest steps whose worst-case regret is within `TOLERANCE` of the smallest, and of these the
    setting of the smallest regret; with its AUROC by shift, the regret, and grid ends.
    """
    by_shift = found.reshape(*found.shape[:2], -1, REPETITIONS).mean(axis=-1)
    regret = (by_shift.max(axis=(0, 1)) - by_shift).max(axis=-1)
    step = int(np.flatnonzero(regret.min(axis=1) <= regret.min() + TOLERANCE)[0])
    rest = int(regret[step].argmin())
    clip, length = divmod(rest, len(LENGTHS))
    ends = [
        name
        for name, position, grid in (
            ("steps", step, STEPS),
            ("clip", clip, CLIPS),
            ("length", length, LENGTHS),
        )
        if position in (0, len(grid) - 1)
    ]
    setting = (STEPS[step], CLIPS[clip], LENGTHS[length])
    return setting, by_shift[step, rest], float(regret[step, rest]), ", ".join(ends)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument(
        "--check", action="store_true", help="score the chosen settings on rehearsals of seed + 1"
    )
    parser.add_argument("--arm", action="append", help="only this one, such as 'federated_dp 2'; repeatable")
    parser.add_argument(
        "--zero", action="store_true", help="every arm starts from zero, not from a public head"
    )
    arguments = parser.parse_args()
    public, chosen = Public(), CHOSEN_FROM_ZERO if arguments.zero else CHOSEN
    seed = arguments.seed + int(arguments.check)
    rehearsals = [
        public.rehearse(seed, shift, agreement, repetition)
        for shift in SHIFTS
        for agreement in AGREEMENTS
        for repetition in range(REPETITIONS)
    ]
    if arguments.zero:
        rehearsals = [replace(each, start=np.zeros_like(each.start)) for each in rehearsals]
    start = np.array([scores(each, each.start[:, None], 1)[0] for each in rehearsals])
    print("start:", np.round(start.reshape(-1, REPETITIONS).mean(axis=1), 3), f"mean {start.mean():.3f}")
    for arm in arguments.arm or arms_of(EPSILONS)[1:]:
        found = curve(rehearsals, arm, seed)
        if arguments.check:
            steps, clip, length = chosen[arm]
            each = found[STEPS.index(steps), CLIPS.index(clip) * len(LENGTHS) + LENGTHS.index(length)]
            print(f"{arm}: {chosen[arm]} mean {each.mean():.3f}", flush=True)
            continue
        setting, by_shift, regret, ends = choose(found)
        print(
            f'    "{arm}": {setting},  # mean {by_shift.mean():.3f}, worst regret {regret:.3f}, by shift '
            f"{np.round(by_shift, 3)}{', END OF GRID: ' + ends if ends else ''}",
            flush=True,
        )
        say(f"{arm}: chosen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
