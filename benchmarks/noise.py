"""What does exactly drawn noise cost, compared with an exact sampler in plain Python and with float noise?

    python benchmarks/noise.py [--quick] [--format json] [--update docs/performance.md]

    fedqc     `client.dp.release.rounded_gaussian`: the Gaussian, rounded to whole grid steps, drawn exactly.
    plain     the discrete Gaussian, drawn exactly by rejection with whole numbers and fractions (Canonne,
              Kamath, Steinke 2020, algorithms 1 to 3), with coins of `secrets`: another noise of the same
              use, as it is usually implemented. It draws fewer values; its time is scaled up.
    float     NumPy's normal generator (Philox), rounded: what noise costs that is not exact.

240,725 values are the parameters of the small CNN. The deviation is that of a noise multiplier of 2 on the
grid of `client.dp.release.grid_of`. In every turn the standard deviation of each side is checked.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from measuring import (
    BenchmarkError,
    Cost,
    Ratio,
    command_line,
    cost_ratios,
    environment,
    interleave,
    repetitions_of,
    reported,
    say,
)

from client.dp.coins import Coins
from client.dp.release import grid_of, noise_deviation, rounded_gaussian

VALUES = 240_725
PLAIN_VALUES = 2_000
NOISE_MULTIPLIER = 2.0
CLIP_NORM = 1.0
TOLERANCE = 6  # standard errors of a standard deviation


def bernoulli_exp(exponent: Fraction) -> bool:
    """True with probability exp(-exponent), exactly (algorithm 1)."""
    while exponent > 1:
        if not bernoulli_exp(Fraction(1)):
            return False
        exponent -= 1
    count = 1
    while secrets.randbelow(exponent.denominator * count) < exponent.numerator:
        count += 1
    return count % 2 == 1


def discrete_laplace(scale: int) -> int:
    """A whole number with probability proportional to exp(-|x| / scale), exactly (algorithm 2)."""
    while True:
        rest = secrets.randbelow(scale)
        if not bernoulli_exp(Fraction(rest, scale)):
            continue
        whole = 0
        while bernoulli_exp(Fraction(1)):
            whole += 1
        value, is_negative = rest + scale * whole, secrets.randbelow(2) == 1
        if value or not is_negative:
            return -value if is_negative else value


def discrete_gaussian(deviation: Fraction) -> int:
    """A whole number with probability proportional to exp(-x^2 / (2 deviation^2)), exactly (algorithm 3)."""
    scale = int(deviation) + 1
    variance = deviation**2
    while True:
        value = discrete_laplace(scale)
        if bernoulli_exp((abs(value) - variance / scale) ** 2 / (2 * variance)):
            return value


def fedqc_noise(count: int, deviation: float) -> np.ndarray:
    """As the release draws it, with a key of its own."""
    return rounded_gaussian(count, deviation, Coins())


def plain_noise(count: int, deviation: float) -> np.ndarray:
    """The discrete Gaussian of the deviation rounded to a whole number, which keeps its fractions small."""
    exact = Fraction(round(deviation))
    return np.array([discrete_gaussian(exact) for _ in range(count)])


def float_noise(count: int, deviation: float) -> np.ndarray:
    """Not exact, and not from a cryptographic generator."""
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(os.urandom(16), "little")))
    return np.rint(deviation * generator.standard_normal(count)).astype(np.int64)


SIDES: dict[str, tuple[Callable[[int, float], np.ndarray], bool]] = {
    "fedqc": (fedqc_noise, False),
    "plain": (plain_noise, True),
    "float": (float_noise, False),
}
"""Name -> the sampler, and whether it is slow and draws `PLAIN_VALUES` only."""


def once(name: str, count: int, deviation: float, repetition: int) -> Cost:
    """The time of `VALUES` values, from that of `count`. Memory is not measured.

    Raises:
        BenchmarkError: the values do not have the standard deviation.
    """
    draw, _ = SIDES[name]
    wall, cpu = time.perf_counter(), time.process_time()
    values = draw(count, deviation)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if abs(values.std() / deviation - 1) > TOLERANCE / math.sqrt(2 * count):
        raise BenchmarkError(f"{name}: standard deviation {values.std():.0f} in place of {deviation:.0f}")
    return Cost(wall_s=wall * VALUES / count, cpu_s=cpu * VALUES / count, peak_mib=1.0)


def measure_all(values: int, plain_values: int, repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "numpy", "scipy", "cryptography", "mpmath"))
    grid = grid_of(CLIP_NORM, VALUES)
    deviation = noise_deviation(NOISE_MULTIPLIER, Fraction(CLIP_NORM / grid) ** 2)
    counts = {name: plain_values if is_slow else values for name, (_, is_slow) in SIDES.items()}
    sides = {name: partial(once, name, count, deviation) for name, count in counts.items()}
    costs = interleave(sides, repetitions, say)
    return {
        "benchmark": "noise",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": {"repetitions": repetitions, "threads": 1, "values": counts, "deviation_steps": deviation},
        "ratios": {
            f"{side} / {reference}": {
                what: cost_ratios(costs[side], costs[reference])[what] for what in ("wall", "cpu")
            }
            for side, reference in (("plain", "fedqc"), ("fedqc", "float"))
        },
        "cpu_s": {name: min(cost.cpu_s for cost in costs[name]) for name in SIDES},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: both ratios, and the seconds of the fedqc side."""
    lines = ["| time of as many values | CPU | wall |", "|---|---|---|"]
    for pair, ratios in result["ratios"].items():
        lines.append(f"| {pair} | {_short(ratios['cpu'])} | {_short(ratios['wall'])} |")
    env, work = result["environment"], result["work"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"{VALUES} values take {result['cpu_s']['fedqc']:.3f} CPU-s with fedqc, "
        f"{result['cpu_s']['plain']:.0f} with the plain sampler. The deviation is "
        f"{work['deviation_steps']:.0f} grid steps.",
        "",
        f"Median (min–max) of n = {work['repetitions']}. {env['date']}, {env['cores']} cores, "
        f"{env['machine']}, load {env['load_1min']} before and {env['load_1min_after']} after; "
        f"Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _short(ratio: Ratio) -> str:
    digits = 0 if ratio.median >= 100 else 1
    median, least, most = (f"{value:.{digits}f}" for value in (ratio.median, ratio.min, ratio.max))
    return f"{median} ({least}–{most})"


def main() -> int:
    arguments = command_line(__doc__, quick="fewer values of the plain side").parse_args()
    plain = PLAIN_VALUES // (4 if arguments.quick else 1)
    return reported("noise", arguments, lambda: measure_all(VALUES, plain, repetitions_of(arguments)), table)


if __name__ == "__main__":
    sys.exit(main())
