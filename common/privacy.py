"""Privacy accounting: what a history of noisy sums costs one patient.

The promise these numbers describe: each entry is a Gaussian mechanism on a sum to which one *patient*
contributes a vector of L2 norm at most C; the noise has standard deviation `noise_multiplier` * C; patients
enter each step independently with probability `sample_rate` (Poisson). Neighbouring data sets differ by
*adding or removing one patient* of one cohort at one site. Replacing a patient costs about twice as much.
What voids the promise: shuffled or fixed-size batches, noise seeded from anything known, a divisor or step
count that depends on the private number of patients, a release that is missing from the history.

Two accountants. RDP is the *gate*: composition of Renyi divergences at an order fixed beforehand stays valid
when later choices depend on earlier outputs. PLD is tighter, holds for a schedule fixed in advance, and is
only *reported* beside it.

Nothing here trusts its input: a noise multiplier, rate, count or delta that is not a finite number in range
raises ConfigError, because an accountant fed with -1 step or an empty history would report a cost that is too
small.

References: Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), sampled Gaussian; Canonne, Kamath, Steinke 2020
    (arXiv 2004.00010),
Proposition 12, from RDP to (epsilon, delta); Feldman and Zrnic 2021 (arXiv 2008.11193) and Lecuyer 2021
(arXiv 2103.01379), RDP filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

ADJACENCY = "add/remove"

SMALLEST_NOISE_MULTIPLIER = (
    0.1  # below, one step costs an epsilon in the hundreds and the arithmetic is not worth trusting
)
MAX_NOISE_MULTIPLIER = 1e6
SMALLEST_SAMPLE_RATE = 1e-9
MAX_STEPS = 10_000_000

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    *(72.0, 96.0, 128.0, 256.0, 512.0, 1024.0),
)


@dataclass(frozen=True, kw_only=True)
class GaussianSteps:
    """A number of equal steps of the Poisson-subsampled Gaussian mechanism, per patient, add/remove.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, divided by the L2 bound of one patient.
            0 means *no noise*: such an entry costs an infinite epsilon.
        sample_rate: probability that a patient takes part in a step. 1 is the plain Gaussian mechanism, with
            no amplification.
        steps: how many such steps, at least 1. A step on an empty batch is a step.
    Raises:
        ConfigError: a value is not a finite number in its range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        noise, rate, steps = self.noise_multiplier, self.sample_rate, self.steps
        if not _is_number(noise) or not (
            noise == 0 or SMALLEST_NOISE_MULTIPLIER <= noise <= MAX_NOISE_MULTIPLIER
        ):
            raise _bad(
                "noise_multiplier",
                noise,
                f"0 (none) or in [{SMALLEST_NOISE_MULTIPLIER}, {MAX_NOISE_MULTIPLIER:g}]",
            )
        if not _is_number(rate) or not SMALLEST_SAMPLE_RATE <= rate <= 1:
            raise _bad("sample_rate", rate, f"a number in [{SMALLEST_SAMPLE_RATE}, 1]")
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise _bad("steps", steps, f"a whole number in [1, {MAX_STEPS}]")

    @property
    def is_private(self) -> bool:
        return self.noise_multiplier > 0


def rdp_epsilon(history: Sequence[GaussianSteps], delta: float) -> float:
    """Epsilon at `delta` of everything in `history`, per patient, add/remove, by Renyi differential privacy.

    The best of `ORDERS` is taken, which is exact bookkeeping for a schedule fixed in advance; whether *more*
    may be spent is decided by `filter_admits`, whose order is fixed beforehand.

    Returns:
        0 for an empty history, infinity if any entry has no noise.
    """
    delta = _checked_delta(delta)
    merged = merge(history)
    if not merged:
        return 0.0
    if not all(entry.is_private for entry in merged):
        return math.inf
    return max(0.0, float((_total_divergence(merged) + _conversion(delta)).min()))


def filter_admits(
    history: Sequence[GaussianSteps], planned: GaussianSteps, *, epsilon: float, delta: float
) -> bool:
    """Whether `planned` may follow `history` without the whole exceeding (`epsilon`, `delta`): the gate, an
    RDP filter.

    A filter is valid under adaptive choices at *one* Renyi order that does not depend on what was released.
    That order is a function of the first entry ever made and of the cap: the one under which most repetitions
    of that first entry would fit. Hence a first plan is admitted exactly when its `rdp_epsilon` fits; a later
    one may be refused although `rdp_epsilon` of the whole would just fit. An operator who changes the cap
    because of what was released steps outside the theorem.
    """
    return filter_epsilon(history, planned, epsilon=epsilon, delta=delta) <= epsilon * (1 + 1e-12)


def filter_epsilon(
    history: Sequence[GaussianSteps], planned: GaussianSteps, *, epsilon: float, delta: float
) -> float:
    """What `filter_admits` compares with `epsilon`: the cost of `history` and `planned` at the filter's
    order; at least `rdp_epsilon`.
    """
    epsilon, delta = _checked_epsilon(epsilon), _checked_delta(delta)
    everything = merge([*history, planned])
    if not all(entry.is_private for entry in everything):
        return math.inf
    import numpy as np

    conversion = _conversion(delta)
    order = int(
        np.argmax(
            (epsilon - conversion) / _divergence(everything[0].noise_multiplier, everything[0].sample_rate)
        )
    )
    return max(0.0, float(_total_divergence(everything)[order] + conversion[order]))


def pld_epsilon(history: Sequence[GaussianSteps], delta: float) -> float:
    """Epsilon at `delta` by privacy loss distributions (dp-accounting), pessimistic; for the report, never
    for the gate.

    Valid for a schedule fixed in advance; per patient, add/remove. The discretization is 1e-4, coarser (still
    an upper bound) where epsilon is so large that digits do not matter.
    """
    delta = _checked_delta(delta)
    merged = merge(history)
    if not merged:
        return 0.0
    if not all(entry.is_private for entry in merged):
        return math.inf
    return _pld_epsilon(tuple(merged), delta)


def noise_multiplier_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier, rounded up to 3 decimals, with which `steps` steps cost at most
    `epsilon` by the gate's accountant.

    Raises:
        ConfigError: no noise multiplier up to 1e6 suffices, or an argument is out of range.
    """
    epsilon, delta = _checked_epsilon(epsilon), _checked_delta(delta)

    def fits(thousandths: int) -> bool:
        planned = GaussianSteps(noise_multiplier=thousandths / 1000, sample_rate=sample_rate, steps=steps)
        return rdp_epsilon([planned], delta) <= epsilon

    low = math.ceil(SMALLEST_NOISE_MULTIPLIER * 1000)
    if fits(low):
        return low / 1000
    high = 2 * low
    while not fits(high):
        low, high = high, 2 * high
        if high > MAX_NOISE_MULTIPLIER * 1000:
            raise _bad(
                "epsilon",
                epsilon,
                f"reachable with a noise multiplier up to {MAX_NOISE_MULTIPLIER:g} in {steps} steps",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high / 1000


def merge(history: Iterable[GaussianSteps]) -> list[GaussianSteps]:
    """The same history with the steps of equal mechanisms added up, in the order of first appearance."""
    steps: dict[tuple[float, float], int] = {}
    for entry in history:
        mechanism = (float(entry.noise_multiplier), float(entry.sample_rate))
        steps[mechanism] = steps.get(mechanism, 0) + entry.steps
    return [
        GaussianSteps(noise_multiplier=noise, sample_rate=rate, steps=count)
        for (noise, rate), count in steps.items()
    ]


def _total_divergence(history: Sequence[GaussianSteps]) -> np.ndarray:
    """Renyi divergence of the composition at each of `ORDERS`; every entry private."""
    import numpy as np

    total = np.zeros(len(ORDERS))
    for entry in history:
        total += entry.steps * _divergence(float(entry.noise_multiplier), float(entry.sample_rate))
    return total


@lru_cache(maxsize=1024)
def _divergence(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Renyi divergence of one step at each of `ORDERS` (read-only).

    log A(a) / (a - 1) with A(a) = E over x ~ N(0, s^2) of (1 - q + q exp((2x - 1) / (2 s^2)))^a, the larger
    of the two directions (arXiv 1908.10530, section 3.3). The integrand is analytic in a strip of half-width
    pi s^2, so the trapezoid rule with step min(s, s^2) / 4 is exact to rounding. An allowance of 1e-13 covers
    the rounding.
    """
    import numpy as np

    orders = np.array(ORDERS)
    if sample_rate == 1:
        divergence = orders / (2 * noise_multiplier**2)
    else:
        divergence = np.empty_like(orders)
        spacing = min(noise_multiplier, noise_multiplier**2) / 4
        for position, order in enumerate(ORDERS):
            x = np.arange(-13 * noise_multiplier, order + 13 * noise_multiplier, spacing)
            log_density = -0.5 * (x / noise_multiplier) ** 2 - math.log(
                noise_multiplier * math.sqrt(2 * math.pi)
            )
            log_ratio = np.logaddexp(
                math.log1p(-sample_rate), math.log(sample_rate) + (2 * x - 1) / (2 * noise_multiplier**2)
            )
            log_moment = float(np.logaddexp.reduce(log_density + order * log_ratio)) + math.log(spacing)
            divergence[position] = (max(log_moment, 0.0) + 1e-13) / (order - 1)
    divergence.setflags(write=False)
    return divergence


@lru_cache(maxsize=64)
def _conversion(delta: float) -> np.ndarray:
    """What is added to the divergence at each of `ORDERS` to obtain epsilon at `delta` (read-only)."""
    import numpy as np

    orders = np.array(ORDERS)
    added = np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    added.setflags(write=False)
    return added


@lru_cache(maxsize=256)
def _pld_epsilon(history: tuple[GaussianSteps, ...], delta: float) -> float:
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    coarse = rdp_epsilon(history, delta)
    accountant = PLDAccountant(value_discretization_interval=1e-4 * max(1.0, coarse / 25))
    for entry in history:
        event = GaussianDpEvent(entry.noise_multiplier)
        accountant.compose(
            event if entry.sample_rate == 1 else PoissonSampledDpEvent(entry.sample_rate, event), entry.steps
        )
    return float(accountant.get_epsilon(delta))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_epsilon(epsilon: float) -> float:
    if not _is_number(epsilon) or epsilon <= 0:
        raise _bad("epsilon", epsilon, "a finite number above 0")
    return float(epsilon)


def _checked_delta(delta: float) -> float:
    if not _is_number(delta) or not 0 < delta < 1:
        raise _bad("delta", delta, "a number between 0 and 1, well below 1 / patients")
    return float(delta)


def _bad(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"privacy accounting: {name} = {value!r} must be {expected}", code="bad-privacy-parameters"
    )
