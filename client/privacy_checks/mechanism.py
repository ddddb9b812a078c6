"""Check one private training, `client.dp.dp_sgd.train_private_head`, as a black box where that is possible.

A step is observed in two ways. What moves the head is observed from outside: it starts at zero, so that the
change is a whole number of grid steps, exactly. And `release`, through which everything must pass, is
replaced by a spy that notes the sum it is given and, where noise would hide what is measured, adds none; a
step that does not pass through it fails.

Bounds are so wide that a sound installation fails one of the checks less than once in ten thousand runs.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import binom, chi2, kstest, norm

from client.dp import dp_sgd
from client.dp.coins import KEY_BYTES
from client.dp.dp_sgd import PrivateSteps
from client.dp.engines import ENGINES
from client.dp.injected import InjectedRows
from client.dp.release import grid_of
from client.privacy_checks.finding import Finding, Scene

NOMINAL = 64  # a power of two, so that dividing by it is exact
OTHER_CLIP, OTHER_RATE = 0.37, 0.25
BOUND = 5.5  # standard errors
VALUES = 100_000
UNTAUGHT, CALLS = 4_000, 13  # outputs without labels, and trainings
SEEN, FAR = 0.02, 4.0  # what is to be found; deviations beyond which values are counted
STEPS, PATIENTS = 300, 64


@dataclass(frozen=True, kw_only=True)
class Patients:
    """Slices of generated patients, as `train_private_head` takes them."""

    features: np.ndarray  # (n, F)
    labels: np.ndarray  # (n, A)
    patients: np.ndarray  # (n,)

    def of(self, kept: np.ndarray) -> Patients:
        """The slices where `kept` is true."""
        return Patients(features=self.features[kept], labels=self.labels[kept], patients=self.patients[kept])


@dataclass(frozen=True, kw_only=True)
class Released:
    """One call of `release`."""

    total: np.ndarray
    deviation: float
    result: np.ndarray


@contextmanager
def releases(answer: Callable[[np.ndarray], np.ndarray] | None = None) -> Iterator[list[Released]]:
    """Note every release of a training.

    Args:
        answer: gives what is released in the place of the sum and its noise; None: the real thing.
    """
    seen: list[Released] = []
    real = vars(dp_sgd)["release"]

    def spy(total: np.ndarray, deviation: float, *rest: object) -> np.ndarray:
        result = real(total, deviation, *rest) if answer is None else answer(total)
        seen.append(Released(total=total.copy(), deviation=deviation, result=result.copy()))
        return result

    with patch.object(dp_sgd, "release", spy):
        yield seen


def steps_of(scene: Scene, **changes: Any) -> PrivateSteps:
    """The plan's private training with a public size that makes divisions exact."""
    privacy = scene.plan.privacy
    values: dict[str, Any] = {
        "steps": 1,
        "learning_rate": 1.0,
        "clip_norm": privacy.clip_norm,
        "noise_multiplier": scene.noise_multiplier,
        "sample_rate": 1.0,
        "nominal_patients": NOMINAL,
        "max_slices_per_patient": max(4, privacy.max_slices_per_patient),
        "engine": privacy.engine,
    }
    return PrivateSteps(**{**values, **changes})


def half_views(patients: np.ndarray) -> InjectedRows:
    """Every second row of a patient as a view that was simulated on the patient's own slices."""
    weights = np.zeros(len(patients))
    for number in np.unique(patients):
        weights[np.flatnonzero(patients == number)[1::2]] = 1.0
    return InjectedRows(weights=weights, share=0.5, views=4)


def moved(site: Patients, request: PrivateSteps, injected: InjectedRows | None = None) -> np.ndarray:
    """How far one training moves a head that starts at zero, weight then bias, times its public divisor and
    -1: the sum of what its steps released, if the learning rate is 1. float64.
    """
    outputs, width = site.labels.shape[1], site.features.shape[1]
    head = dp_sgd.train_private_head(
        np.zeros((outputs, width), np.float32),
        np.zeros(outputs, np.float32),
        site.features,
        site.labels,
        site.patients,
        request,
        injected=injected,
    )
    flat = np.concatenate([head.weight.ravel(), head.bias]).astype(np.float64)
    return -flat * (request.sample_rate * request.nominal_patients)


def nobody(outputs: int, width: int) -> Patients:
    """No patient at all."""
    return Patients(
        features=np.zeros((0, width), np.float32),
        labels=np.zeros((0, outputs), np.float32),
        patients=np.zeros(0, np.int64),
    )


def outlying_patients(clip_norm: float, max_slices: int) -> Patients:
    """Ordinary patients, and those that test a bound: huge, not finite, without labels, with many slices.

    All gradients are far above the clip, in weight and in bias. Patient numbers are in order; the last has
    more slices than a step may use.
    """
    generator = np.random.default_rng(1)
    scale = 40 * max(clip_norm, 1.0)
    ordinary = min(3, max_slices)
    scales = [*([scale] * 5), scale * 1e6, 1e30, np.nan, np.inf, scale, clip_norm / 50, scale]
    features, labels, patients = [], [], []
    for number, factor in enumerate(scales):
        is_last = number == len(scales) - 1
        count = 15 * max_slices if is_last else max_slices if number == 0 else ordinary
        direction = generator.standard_normal(8)
        rows = np.abs(direction) * (1 + 0.01 * generator.random((count, 8)))
        truth = generator.integers(0, 2, 3).astype(np.float32) * np.ones((count, 1), np.float32)
        if number == 9:
            truth[:] = np.nan
        with np.errstate(over="ignore", invalid="ignore"):
            features.append((rows * factor).astype(np.float32))
        labels.append(truth)
        patients.append(np.full(count, number))
    return Patients(
        features=np.concatenate(features), labels=np.concatenate(labels), patients=np.concatenate(patients)
    )


def sensitivity(scene: Scene) -> Finding:
    """One patient moves the released sum by exactly their own steps, and by the clip at most, in integers:
    with every engine, with views of their slices as without.
    """
    found, longest = [], 0.0
    clips = sorted({scene.plan.privacy.clip_norm, OTHER_CLIP})
    cases = [*((clip_norm, False) for clip_norm in clips), (OTHER_CLIP, True)]
    for (clip_norm, with_views), engine in itertools.product(cases, ENGINES):
        request = steps_of(scene, clip_norm=clip_norm, engine=engine)
        everyone = outlying_patients(clip_norm, request.max_slices_per_patient)
        grid = grid_of(clip_norm, 3 * 8 + 3)

        def total(
            site: Patients, request: PrivateSteps = request, grid: float = grid, views: bool = with_views
        ) -> np.ndarray:
            with releases(lambda total: total) as seen:
                change = moved(site, request, half_views(site.patients) if views else None) / grid
            if len(seen) != 1 or not np.array_equal(change, seen[0].total):
                found.append("a step moves the head by other than what it releases")
            wanted = Fraction(scene.noise_multiplier) * Fraction(request.clip_norm) / Fraction(grid)
            if any(not wanted * (1 - Fraction(1, 10**12)) <= one.deviation <= wanted * 2 for one in seen):
                found.append(f"a noise of {seen[0].deviation:g} grid steps, {float(wanted):g} expected")
            return np.rint(np.nan_to_num(change)).astype(np.int64)

        most = Fraction(clip_norm / grid) ** 2
        last = int(everyone.patients.max())  # whose slices are drawn at random: no two sums with them compare
        others = everyone.of(everyone.patients != last)
        together = total(others)
        for number in range(last + 1):
            own = total(everyone.of(everyone.patients == number))
            if number == last:
                gone = total(everyone) - together
            else:
                gone = together - total(others.of(others.patients != number))
            squared = sum(int(step) ** 2 for step in gone)
            longest = max(longest, float(squared / most) ** 0.5)
            if squared > most:
                found.append(f"one patient moves the sum by {float(squared / most) ** 0.5:.3f} clip")
            if number != last and not np.array_equal(gone, own):
                found.append("one patient changes what others contribute")
            if number in (7, 8, 9) and gone.any():
                found.append("a patient without a finite gradient counts")
    return Finding(
        check="sensitivity",
        holds=not found,
        measured=_most_common(found) or f"one patient in or out moves the sum by {longest:.4f} clip at most",
        expected="their own steps and at most 1 clip, in integers; nobody else's change",
    )


def noise(scene: Scene) -> Finding:
    """A step is noise of the promised deviation, on weight and bias apart, at a clip other than 1: where
    nobody takes part, and on those values that the patients who take part leave alone. Its values are
    independent, Gaussian, and as often far out as they should be.
    """
    clip_norm = scene.plan.privacy.clip_norm if scene.plan.privacy.clip_norm != 1 else OTHER_CLIP
    found, shown, far, drawn_in_all = [], [], 0, 0
    taught = np.zeros((2 * 6, 2 * UNTAUGHT), np.float32)
    taught[:, 1::2] = np.nan  # not assessed: no gradient there
    some = Patients(
        features=np.ones((2 * 6, 1), np.float32), labels=taught, patients=np.repeat(np.arange(6), 2)
    )
    cases = [
        ("one empty step", 1, nobody(VALUES, 1), 1),
        ("three empty steps", 3, nobody(VALUES, 1), 1),
        ("an empty step of a wide head", 1, nobody(200, VALUES // 200), 1),
        ("values that no patient moves", 1, some, CALLS),
    ]
    for words, steps, site, calls in cases:
        request = steps_of(
            scene, clip_norm=clip_norm, steps=steps, sample_rate=scene.plan.privacy.sample_rate
        )
        whole = np.stack([moved(site, request) for _ in range(calls)])
        outputs = site.labels.shape[1]
        alone = slice(1, None, 2) if len(site.labels) else slice(None)
        expected = scene.noise_multiplier * clip_norm * np.sqrt(steps)
        for name, values in (
            ("weight", whole[:, :-outputs][:, alone]),
            ("bias", whole[:, -outputs:][:, alone]),
        ):
            values = values.ravel() / expected
            error = 1 / np.sqrt(2 * values.size)
            shown += [values.std()] if 5 * error < SEEN else []
            if steps == 1:  # a sum of draws without tails has some
                far, drawn_in_all = far + int((np.abs(values) > FAR).sum()), drawn_in_all + values.size
            if not abs(values.std() - 1) <= max(SEEN / 2, 4.5 * error):
                found.append(f"{words}: the noise on the {name} is {values.std():.3f} of what is charged")
            elif not abs(values.mean()) <= BOUND / np.sqrt(values.size):
                found.append(f"{words}: the noise on the {name} is not centred")
            elif not kstest(values, "norm").statistic <= 2.7 / np.sqrt(values.size):
                found.append(f"{words}: the noise on the {name} is not Gaussian")
        if calls == 1 and _largest_correlation(whole.ravel()) > 1.2 * BOUND:
            found.append(f"{words}: values of the noise depend on one another")
    share = 2 * norm.sf(FAR)
    if min(binom.cdf(far, drawn_in_all, share), binom.sf(far - 1, drawn_in_all, share)) < 1e-6:
        found.append(
            f"{far} of {drawn_in_all} values beyond {FAR} deviations, not {share * drawn_in_all:.0f}"
        )
    return Finding(
        check="noise",
        holds=not found,
        measured="; ".join(found[:2])
        or f"{min(shown):.4f} to {max(shown):.4f} of z·C on weight and bias, C = {clip_norm:g}; "
        f"{far} of {drawn_in_all} values beyond {FAR} deviations",
        expected="1 within 1 % (2 % too little is seen with probability above .999); "
        f"{share * drawn_in_all:.0f}",
    )


def _largest_correlation(values: np.ndarray) -> float:
    """Of a series with itself at any distance, in standard errors."""
    values = (values - values.mean()) / max(values.std(), 1e-300)
    spectrum = np.abs(np.fft.rfft(values, 2 * values.size)) ** 2
    lags = np.fft.irfft(spectrum)[1 : values.size]
    pairs = np.arange(values.size - 1, 0, -1)
    many = pairs >= 1000
    return float(np.abs(lags[many] / np.sqrt(pairs[many])).max())


def noise_between_steps(scene: Scene) -> Finding:
    """The noise of any two steps of a training is uncorrelated, as is the noise with the sum it covers."""
    steps, site = 40, _spread_patients(20, 400)
    request = steps_of(scene, steps=steps, sample_rate=scene.plan.privacy.sample_rate, learning_rate=1e-3)
    with releases() as seen:
        moved(site, request)
    found = [] if len(seen) == steps else [f"{len(seen)} releases in {steps} steps"]
    largest = 0.0
    if len(seen) > 1:
        drawn = np.stack([one.result - one.total for one in seen]).astype(np.float64)
        totals = np.stack([one.total for one in seen]).astype(np.float64)
        among = np.atleast_2d(np.corrcoef(drawn))[np.triu_indices(len(seen), 1)]
        beside = [
            np.corrcoef(one, other)[0, 1] for one, other in zip(drawn, totals, strict=True) if other.any()
        ]
        size = np.sqrt(drawn.shape[1])
        largest = float(np.abs(np.nan_to_num([*among, *beside], nan=1.0)).max() * size)
        if largest > BOUND:
            found.append(f"the noise of two steps is correlated: {largest / size:.2f}")
    return Finding(
        check="noise between steps",
        holds=not found,
        measured="; ".join(found) or f"largest correlation {largest:.1f} standard errors",
        expected=f"none beyond {BOUND} standard errors; one release a step",
    )


def noise_between_calls(scene: Scene) -> Finding:
    """The noise of two trainings is uncorrelated, also where every generator of this process is set back in
    between, and each takes its key from the operating system.
    """
    found, drawn = [], []
    request = steps_of(scene)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    real, asked = os.urandom, [0]

    def urandom(count: int) -> bytes:
        asked[0] += count
        return real(count)

    try:
        for _ in range(3):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            asked[0] = 0
            with patch.object(os, "urandom", urandom):
                drawn.append(moved(nobody(20_000, 1), request))
            if asked[0] < KEY_BYTES:
                found.append(f"a training takes {asked[0]} bytes of the operating system")
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
    between = np.atleast_2d(np.corrcoef(np.stack(drawn)))[np.triu_indices(3, 1)]
    largest = float(np.abs(np.nan_to_num(between, nan=1.0)).max())
    if largest * np.sqrt(drawn[0].size) > BOUND:
        found.append(f"the noise of two trainings is correlated: {largest:.2f}")
    return Finding(
        check="noise between calls",
        holds=not found,
        measured=_most_common(found)
        or f"largest correlation {largest * np.sqrt(drawn[0].size):.1f} standard errors",
        expected=f"none beyond {BOUND} standard errors; {KEY_BYTES} bytes of the operating system each",
    )


def _spread_patients(count: int, outputs: int) -> Patients:
    generator = np.random.default_rng(2)
    return Patients(
        features=generator.standard_normal((count * 2, 3)).astype(np.float32),
        labels=generator.integers(0, 2, (count * 2, outputs)).astype(np.float32),
        patients=np.repeat(np.arange(count), 2),
    )


def participation(scene: Scene) -> Finding:
    """Inside a training, each patient takes part in each step with the charged rate, independently of other
    patients and of other steps.
    """
    found, shown = [], []
    plan_rate = scene.plan.privacy.sample_rate
    for rate in sorted({plan_rate, OTHER_RATE}):
        taken = _participation(scene, rate)
        if taken is None:
            found.append(f"rate {rate:g}: the steps do not pass through release")
            continue
        shown.append(f"{taken.mean():.4f} at {rate:g}")
        found += [f"rate {rate:g}: {fault}" for fault in participation_faults(taken, rate)]
    return Finding(
        check="participation",
        holds=not found,
        measured="; ".join(found[:3]) or f"share of patients in a step: {', '.join(shown)}",
        expected="the charged rate; sizes, repetitions and pairs as independent coins give them",
    )


def _participation(scene: Scene, rate: float) -> np.ndarray | None:
    """Who took part in which step of a training, bool (steps, patients): patient i alone moves weight i."""
    site = Patients(
        features=np.repeat(np.eye(PATIENTS, dtype=np.float32), 2, axis=0),
        labels=np.zeros((2 * PATIENTS, 1), np.float32),
        patients=np.repeat(np.arange(PATIENTS), 2),
    )
    request = steps_of(scene, steps=STEPS, sample_rate=rate, learning_rate=1e-6)
    with releases(np.zeros_like) as seen:
        moved(site, request)
    if len(seen) != STEPS:
        return None
    return np.stack([one.total[:PATIENTS] != 0 for one in seen])


def participation_faults(taken: np.ndarray, rate: float) -> list[str]:
    """What is wrong with who took part, bool (steps, patients), for coins of probability `rate`."""
    steps, patients = taken.shape
    if rate == 1:
        return [] if taken.all() else ["patients are left out of steps"]
    found = []
    for words, counts, out_of in (
        ("the rate", taken.sum()[None], taken.size),
        ("the size of a step", taken.sum(axis=1), patients),
        ("how often a patient takes part", taken.sum(axis=0), steps),
    ):
        tail = np.minimum(binom.cdf(counts, out_of, rate), binom.sf(counts - 1, out_of, rate)).min()
        if tail * len(counts) < 1e-6:
            found.append(f"{words} is off: {counts.mean() / out_of:.4f} on average")
    variance = rate * (1 - rate)
    for words, counts, out_of in (
        ("sizes of the steps", taken.sum(axis=1), patients),
        ("participations of the patients", taken.sum(axis=0), steps),
    ):
        spread = float(np.square(counts - out_of * rate).sum() / (out_of * variance))
        low, high = chi2.ppf([1e-6, 1 - 1e-6], len(counts))
        if not 0.8 * low <= spread <= 1.25 * high:
            found.append(f"{words} vary {spread / len(counts):.2f} times as much as independent ones")
    centred = (taken - rate) / np.sqrt(variance)
    for words, series in (("steps", centred), ("patients", centred.T)):
        count = len(series)
        for distance in range(1, count):
            product = (series[:-distance] * series[distance:]).sum()
            if abs(product) > _bernstein(series[:-distance].size, rate):
                found.append(f"{words} at distance {distance} are not independent")
                break
    pairs = np.square((centred.T @ centred)[np.triu_indices(patients, 1)] / np.sqrt(steps))
    if not abs(pairs.mean() - 1) <= 8 * np.sqrt(2 + 1 / (steps * variance**2)) / np.sqrt(pairs.size):
        found.append(f"pairs of patients come together: {pairs.mean():.2f} instead of 1")
    return found


def _bernstein(terms: int, rate: float) -> float:
    """A bound on the sum of products of two standardized coins, exceeded with probability 1e-8."""
    log, largest = np.log(2e8), max(rate, 1 - rate) / min(rate, 1 - rate)
    return float(largest * log / 3 + np.sqrt((largest * log / 3) ** 2 + 2 * terms * log))


def public_divisor(scene: Scene) -> Finding:
    """How a release moves the head, and how many there are, is public: whoever and however many take part."""
    found = []
    privacy = scene.plan.privacy
    for nominal, rate in ((50, privacy.sample_rate), (NOMINAL, OTHER_RATE)):
        request = steps_of(scene, steps=3, sample_rate=rate, nominal_patients=nominal, learning_rate=0.5)
        for count in (0, 1, 17, 200):
            site = _spread_patients(count, 3)
            with releases(lambda total: np.full_like(total, 1000)) as seen:
                change = moved(site, request) / (rate * nominal)
            expected = 3 * 0.5 * 1000 * grid_of(privacy.clip_norm, 12) / (rate * nominal)
            if len(seen) != 3:
                found.append(f"{len(seen)} releases instead of 3 with {count} patients")
            elif not np.allclose(change, expected, rtol=1e-6, atol=0):
                found.append(f"{count} patients: a release moves {change.mean() / expected:.3f} as far")
    return Finding(
        check="public divisor",
        holds=not found,
        measured="; ".join(found[:2]) or "0, 1, 17 and 200 patients: the same",
        expected="learning rate / (rate · nominal patients) for any cohort, and as many steps",
    )


def _most_common(faults: list[str]) -> str:
    """The faults, each once."""
    return "; ".join(dict.fromkeys(faults))[:300]
