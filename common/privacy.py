"""Privacy accounting: what a history of noisy sums costs one patient.

The promise these numbers describe: each entry is a Gaussian mechanism on a sum to which one *patient*
contributes a vector of L2 norm at most C; the noise has standard deviation `noise_multiplier` * C; patients
enter each step independently with probability `sample_rate` (Poisson). Neighbouring data sets differ by
*adding or removing one patient* of one cohort at one site. Replacing a patient costs about twice as much.
What voids the promise: shuffled or fixed-size batches, noise seeded from anything known, a divisor or step
count that depends on the private number of patients, a release that is missing from the history.

The *gate* is one filter a ledger (`PrivacyFilter`), fixed by the first request: Gaussian differential privacy
where nothing samples patients, else Renyi divergences at one order. Both stay valid when later choices depend
on earlier outputs. PLD is the tightest for a schedule fixed in advance, and is only *reported* beside it.

Nothing here trusts its input: a noise multiplier, rate, count or delta that is not a finite number in range
raises ConfigError, because an accountant fed with -1 step or an empty history would report a cost that is too
small.

References: Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), sampled Gaussian; Canonne, Kamath, Steinke 2020
    (arXiv 2004.00010), Proposition 12, from RDP to (epsilon, delta); those of the filters stand there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from common.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

ADJACENCY = "add/remove"

FilterKind = Literal["gdp", "rdp"]

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
    may be spent is decided by a `PrivacyFilter`, whose order is fixed beforehand.

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


def epsilon_of(history: Sequence[GaussianSteps], delta: float) -> float:
    """Epsilon at `delta` of everything in `history`, per patient, add/remove: what is printed.

    Exact (Gaussian differential privacy) where no step samples patients, else by Renyi differential privacy.

    Returns:
        0 for an empty history, infinity if any entry has no noise.
    """
    if history and all(entry.is_private and entry.sample_rate == 1 for entry in history):
        return gdp_epsilon(gdp_mu(history), delta)
    return rdp_epsilon(history, delta)


def gdp_mu(history: Iterable[GaussianSteps]) -> float:
    """mu of the composition of unsampled Gaussian steps: sqrt(sum of steps / noise_multiplier^2).

    References: Dong, Roth, Su 2022 (arXiv 1905.02383), Corollary 3.3.
    Raises:
        ConfigError: an entry samples patients, or has no noise (code `bad-privacy-parameters`).
    """
    return math.sqrt(_mu_squared(history))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon for which a mu-GDP mechanism is (epsilon, delta) differentially private, rounded
    up.

    References: Balle and Wang 2018 (arXiv 1805.06530), Theorem 8.
    """
    delta = _checked_delta(delta)
    if not _is_number(mu) or mu < 0:
        raise _bad("mu", mu, "a finite number, at least 0")
    if mu == 0 or _gdp_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _gdp_delta(mu, high) > delta:
        low, high = high, 2 * high
    return _bisect(lambda epsilon: _gdp_delta(mu, epsilon) <= delta, low, high)[1]


def gdp_max_mu(epsilon: float, delta: float) -> float:
    """The largest mu with which a mu-GDP mechanism is (epsilon, delta) differentially private, rounded
    down.
    """
    epsilon, delta = _checked_epsilon(epsilon), _checked_delta(delta)
    low, high = 0.0, 1.0
    while _gdp_delta(high, epsilon) <= delta:
        low, high = high, 2 * high
    return _bisect(lambda mu: _gdp_delta(mu, epsilon) > delta, low, high)[0]


@dataclass(frozen=True, kw_only=True)
class PrivacyFilter:
    """Decides whether more may be released from one ledger: fixed before the first release, for all time.

    A filter stays valid although later requests depend on earlier outputs, because what it adds up does not
    depend on them. `gdp`: every release is a Gaussian mechanism without sampling; the sum of
    steps / noise_multiplier^2 stays at or below the square of `gdp_max_mu`. `rdp`: the Renyi divergence at
    one order, fixed by the first request and the policy alone. No tight curve (PLD) is used as a filter: a
    bound that is optimised over the outputs so far is not proven to hold.

    References: Koskela, Tobaben, Honkela 2022 (arXiv 2209.15596); Smith and Thakurta 2022 (arXiv 2210.17520);
    Feldman and Zrnic 2021 (arXiv 2008.11193) and Lecuyer 2021 (arXiv 2103.01379) for `rdp`.

    Args:
        epsilon: cap over the lifetime of the ledger; may be lower later, never higher because of outputs.
        delta: of the policy.
        order: of `rdp`, one of `ORDERS`; None for `gdp`.
    """

    kind: FilterKind
    epsilon: float
    delta: float
    order: float | None = None

    def __post_init__(self) -> None:
        _checked_epsilon(self.epsilon)
        _checked_delta(self.delta)
        if self.kind not in ("gdp", "rdp") or (self.order in ORDERS) != (self.kind == "rdp"):
            raise _bad(
                "filter", (self.kind, self.order), "gdp without an order, or rdp with one of its orders"
            )

    @staticmethod
    def for_first(
        first: GaussianSteps, *, epsilon: float, delta: float, kind: FilterKind | None = None
    ) -> PrivacyFilter:
        """The filter of a ledger whose first request is `first`: a function of request and policy only.

        The order of `rdp` is the one under which most repetitions of `first` fit, so that a first request is
        admitted exactly when its `rdp_epsilon` fits.

        Args:
            kind: None: `gdp` where `first` does not sample, else `rdp`.
        """
        epsilon, delta = _checked_epsilon(epsilon), _checked_delta(delta)
        if not first.is_private:
            raise _bad("noise_multiplier", 0, "above 0: a release without noise has no budget")
        if (kind or ("gdp" if first.sample_rate == 1 else "rdp")) == "gdp":
            return PrivacyFilter(kind="gdp", epsilon=epsilon, delta=delta)
        left = epsilon - _conversion(delta)
        best = int((left / _divergence(float(first.noise_multiplier), float(first.sample_rate))).argmax())
        return PrivacyFilter(kind="rdp", epsilon=epsilon, delta=delta, order=ORDERS[best])

    def with_epsilon(self, epsilon: float) -> PrivacyFilter:
        """The same filter with another cap."""
        return replace(self, epsilon=epsilon)

    def permits_sampling(self) -> bool:
        """Whether a release may sample patients: not under `gdp`."""
        return self.kind == "rdp"

    def cost(self, history: Sequence[GaussianSteps]) -> float:
        """Epsilon at the filter's delta of `history`, as this filter adds it up; compared with the cap.

        Infinity where an entry has no noise or, under `gdp`, samples patients.
        """
        if not history:
            return 0.0
        if not all(entry.is_private for entry in history):
            return math.inf
        if self.kind == "gdp":
            if any(entry.sample_rate != 1 for entry in history):
                return math.inf
            return gdp_epsilon(gdp_mu(history), self.delta)
        position = ORDERS.index(self.order or 0.0)
        return max(
            0.0, float(_total_divergence(merge(history))[position] + _conversion(self.delta)[position])
        )

    def admits(self, history: Sequence[GaussianSteps], planned: GaussianSteps) -> bool:
        """Whether `planned` may follow everything in `history`."""
        everything = [*history, planned]
        if not all(entry.is_private for entry in everything):
            return False
        if self.kind == "gdp":
            if any(entry.sample_rate != 1 for entry in everything):
                return False
            return _mu_squared(everything) <= gdp_max_mu(self.epsilon, self.delta) ** 2
        return self.cost(everything) <= self.epsilon * (1 + 1e-12)


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


class GuessBounds(NamedTuple):
    """How well anybody can tell whether one patient took part, of two cases as likely as each other."""

    accuracy: float  # share of right guesses; a coin has 0.5
    auc: float  # probability that a case with the patient looks more like one than a case without


def guess_bounds(history: Sequence[GaussianSteps]) -> GuessBounds:
    """The best that an attacker reaches who sees all of `history`, per patient, add/remove.

    Reached (Gaussian differential privacy) where no step samples patients: Phi(mu / 2) and Phi(mu / sqrt 2).
    Else an upper bound: the advantage is delta at epsilon 0 of the privacy loss distribution, pessimistic,
    and no trade-off curve of that advantage has more area than 1 - (1 - advantage)^2 / 2.

    References: Dong, Roth, Su 2022 (arXiv 1905.02383), trade-off functions.
    """
    merged = merge(history)
    if not merged:
        return GuessBounds(0.5, 0.5)
    if not all(entry.is_private for entry in merged):
        return GuessBounds(1.0, 1.0)
    if all(entry.sample_rate == 1 for entry in merged):
        mu = gdp_mu(merged)
        return GuessBounds(_normal_cdf(mu / 2), _normal_cdf(mu / math.sqrt(2)))
    advantage = min(1.0, float(_pld_accountant(tuple(merged)).get_delta(0.0)))
    return GuessBounds((1 + advantage) / 2, 1 - (1 - advantage) ** 2 / 2)


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    *,
    besides: Sequence[GaussianSteps] = (),
    cost: Callable[[Sequence[GaussianSteps], float], float] = epsilon_of,
) -> float:
    """The smallest noise multiplier, rounded up to 3 decimals, with which `steps` steps and all that is asked
    besides cost at most `epsilon`.

    Args:
        besides: other releases about the same patients.
        cost: the accountant, `epsilon_of` or `rdp_epsilon`.
    Raises:
        ConfigError: no noise multiplier up to 1e6 suffices, or an argument is out of range.
    """
    epsilon, delta = _checked_epsilon(epsilon), _checked_delta(delta)

    def fits(thousandths: int) -> bool:
        planned = GaussianSteps(noise_multiplier=thousandths / 1000, sample_rate=sample_rate, steps=steps)
        return cost([*besides, planned], delta) <= epsilon

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


def epsilon_text(epsilon: float, decimals: int = 2) -> str:
    """Epsilon for a person, rounded *up*: a guarantee that is printed must hold."""
    if not math.isfinite(epsilon):
        return "∞"
    return str(Decimal(repr(float(epsilon))).quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_CEILING))


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


def _mu_squared(history: Iterable[GaussianSteps]) -> float:
    """Sum of steps / noise_multiplier^2, rounded up."""
    entries = list(history)
    for entry in entries:
        if not entry.is_private or entry.sample_rate != 1:
            raise _bad("history", entry, "Gaussian steps with noise and without sampling")
    return math.fsum(entry.steps / entry.noise_multiplier**2 for entry in entries) * (1 + 1e-14)


def _gdp_delta(mu: float, epsilon: float) -> float:
    """Delta of a mu-GDP mechanism at `epsilon`, rounded up.

    Phi(-b) - exp(epsilon) Phi(-a) with a, b = epsilon / mu + mu / 2, epsilon / mu - mu / 2. Since
    exp(epsilon) = exp((a^2 - b^2) / 2), both terms are a scaled complementary error function times
    exp(-b^2 / 2), and nothing overflows.
    """
    from scipy.special import erfcx

    a, b = epsilon / mu + mu / 2, epsilon / mu - mu / 2
    if b < -5:
        return 1.0 if b < -8.3 else math.erfc(b / math.sqrt(2)) / 2
    first, second = float(erfcx(b / math.sqrt(2))), float(erfcx(a / math.sqrt(2)))
    return 0.5 * math.exp(-b * b / 2) * (max(first - second, 0.0) + 1e-14 * first)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _bisect(is_beyond: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The last point before `is_beyond` and the first one at which it holds, to the last bits of a float."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return low, high


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
    return float(_pld_accountant(history, delta).get_epsilon(delta))


def _pld_accountant(history: tuple[GaussianSteps, ...], delta: float = 1e-5) -> Any:
    """With `history` composed; `delta` decides how fine it is."""
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    coarse = rdp_epsilon(history, delta)
    accountant = PLDAccountant(value_discretization_interval=1e-4 * max(1.0, coarse / 25))
    for entry in history:
        event = GaussianDpEvent(entry.noise_multiplier)
        accountant.compose(
            event if entry.sample_rate == 1 else PoissonSampledDpEvent(entry.sample_rate, event), entry.steps
        )
    return accountant


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
