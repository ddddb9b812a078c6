"""Audit the real private step: how well can someone who sees everything else tell who took part?

White box: the attacker knows every other patient, subtracts what they contribute, and sees the final head,
which for steps that all weigh the same is a sufficient statistic of everything that was released. 240
canaries a run, each a patient whose gradient has the length of the clip in a direction of its own, take part
by fair coins. What is estimated is mu of Gaussian differential privacy, the distance of the two distributions
of a canary's score in standard deviations; its interval comes from resampling whole runs.

It finds gross faults: with 6,000 canaries the standard deviation of the estimate is about 0.03.

References: Nasr et al. 2023 (arXiv 2302.07956), white-box canaries; Steinke, Nasr, Jagielski 2023 (arXiv
    2305.08846), many canaries in one run; Dong, Roth, Su 2022 (arXiv 1905.02383), mu.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.privacy_checks.finding import Finding, Scene
from client.privacy_checks.mechanism import Patients, moved, steps_of
from common.privacy import GaussianSteps, gdp_mu, noise_multiplier_for

EPSILONS, DELTA = (8.0, 3.0, 1.0), 1e-5
CANARIES, RUNS, STEPS = 240, 25, 4
KNOWN, DIRECTION = 20, 1e4  # features of a canary are so large that its bias does not matter
RESAMPLES, ONE_SIDED = 4000, 0.01
RATE_OF_LEARNING = 1e-7  # the head stays where it is, so that all steps weigh the same


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What the audit found at one epsilon."""

    epsilon: float
    estimate: float  # mu
    lower: float  # 99 % of resampled runs give more
    upper: float
    mu: float  # of the accountant


def audit(scene: Scene) -> list[Finding]:
    """One finding for each of `EPSILONS` at delta 1e-5. Chance fails a sound step once in a hundred audits;
    what fails is therefore audited again, with other coins and twice the runs, and that one counts.
    """
    return [_finding(_confirmed(scene, epsilon)) for epsilon in EPSILONS]


def _confirmed(scene: Scene, epsilon: float) -> Audited:
    first = audited(scene, epsilon)
    return first if first.lower <= first.mu else audited(scene, epsilon, runs=2 * RUNS, seed=1)


def _finding(found: Audited) -> Finding:
    return Finding(
        check=f"audit at ε {found.epsilon:g}",
        holds=found.lower <= found.mu,
        measured=f"μ {found.estimate:.3f}, 99 % above {found.lower:.3f}, 99 % below {found.upper:.3f}",
        expected=f"99 % not above the accountant's {found.mu:.3f}",
    )


def audited(scene: Scene, epsilon: float, *, runs: int = RUNS, seed: int = 0) -> Audited:
    """Audit the step with the noise of `epsilon`, and the plan's clip.

    Args:
        seed: of coins, known patients and resampling; the noise is never seeded.
    """
    generator = np.random.default_rng(seed)
    noise = noise_multiplier_for(epsilon, DELTA, 1.0, STEPS)
    clip_norm = scene.plan.privacy.clip_norm
    request = steps_of(
        scene, steps=STEPS, noise_multiplier=noise, learning_rate=RATE_OF_LEARNING, max_slices_per_patient=4
    )
    known = _known(generator)
    without_noise = steps_of(
        scene, steps=STEPS, noise_multiplier=0.0, learning_rate=RATE_OF_LEARNING, max_slices_per_patient=4
    )
    background = moved(known, without_noise) / RATE_OF_LEARNING
    scores, coins = [], []
    for _ in range(runs):
        taken = generator.integers(0, 2, CANARIES).astype(bool)
        result = moved(_with_canaries(known, taken), request) / RATE_OF_LEARNING
        scores.append((result - background)[:CANARIES] / clip_norm)
        coins.append(taken)
    score, coin = np.stack(scores), np.stack(coins)
    drawn = [generator.integers(0, runs, runs) for _ in range(RESAMPLES)]
    resampled = np.quantile([_mu(score[rows], coin[rows]) for rows in drawn], [ONE_SIDED, 1 - ONE_SIDED])
    return Audited(
        epsilon=epsilon,
        estimate=_mu(score, coin),
        lower=float(resampled[0]),
        upper=float(resampled[1]),
        mu=gdp_mu([GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=STEPS)]),
    )


def _mu(score: np.ndarray, coin: np.ndarray) -> float:
    """The difference of means in pooled standard deviations."""
    inside, outside = score[coin], score[~coin]
    pooled = np.sqrt((np.square(inside - inside.mean()).sum() + np.square(outside - outside.mean()).sum()) / (
        score.size - 2
    ))  # fmt: skip
    return float((inside.mean() - outside.mean()) / pooled)


def _known(generator: np.random.Generator) -> Patients:
    """Patients whom the attacker knows."""
    return Patients(
        features=generator.standard_normal((3 * KNOWN, CANARIES)).astype(np.float32),
        labels=generator.integers(0, 2, (3 * KNOWN, 1)).astype(np.float32),
        patients=np.repeat(np.arange(KNOWN), 3),
    )


def _with_canaries(known: Patients, taken: np.ndarray) -> Patients:
    """The known patients and those canaries that take part."""
    rows = DIRECTION * np.eye(CANARIES, dtype=np.float32)[taken]
    return Patients(
        features=np.concatenate([known.features, rows]),
        labels=np.concatenate([known.labels, np.zeros((len(rows), 1), np.float32)]),
        patients=np.concatenate([known.patients, KNOWN + np.flatnonzero(taken)]),
    )
