"""How many bytes does each `federation.codec` put on the wire, and what does it cost to make and read them?

    python benchmarks/update_codecs.py [--quick] [--format json] [--update docs/performance.md]

    plain     the array's bytes and their SHA-256, as every message is hashed when it is signed.
    lossless  a frame of `encode_steps` (an update, in whole grid steps) or `encode_floats` (a model), the
              SHA-256 of the frame, and its decoding. What arrives must equal what was sent bit for bit, or
              nothing is printed and the exit status is 1.
    int8      a frame of `quantize_int8`, likewise. Its mean squared error must be the variance that it
              reports, within 10 %.

Four arrays, the first two with as many values as ResNet18 has weights (--quick: a tenth):

    trained   an update without noise: Gaussian of 1e-3, each of 62 layers on a scale of its own (log-normal,
              0.3 decades).
    noised    an update under differential privacy: learning rate * noise multiplier * clip / patients *
              Gaussian = 3 * 1.5 * 1 / 200.
    head      the same noise on the 245 weights that the demo's private arm sends: what the frame's header
              costs.
    model     the public start that fedqc ships, as a site receives it that holds no earlier model.

Synthetic updates compress better or worse than trained ones as their size varies from layer to layer: on
updates of the demo's plan (rounds 1 to 3, 100 phantoms a site, standard deviation 0.003) lossless was 0.566
and int8 0.21.

Bytes are a share of float32. Costs are CPU and wall time of one thread within this process, the sides in
turns, as a ratio to `plain`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
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

from common.model_file import load_model
from common.models import build
from common.weights import (
    GRID,
    decode_floats,
    decode_steps,
    dequantize_int8,
    encode_floats,
    encode_steps,
    manifest_of,
    quantize_int8,
    resolve_initial,
)

RESNET18, LAYERS, HEAD = 11_689_512, 62, 245
TRAINED, NOISED = 1e-3, 3 * 1.5 * 1 / 200
AIMS = {"trained": 0.58, "noised": 0.78, "head": 0.78}
"""Largest share of float32 that `lossless` may take."""
VARIANCE_TOLERANCE = 0.1
ENOUGH = 2_000_000

Codec = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, int], np.ndarray]]
PLAIN: Codec = (lambda values: values, lambda frame, size: frame)
OF_STEPS: dict[str, Codec] = {
    "plain": PLAIN,
    "lossless": (encode_steps, decode_steps),
    "int8": (lambda steps: quantize_int8(steps, np.random.default_rng(0))[0], dequantize_int8),
}
OF_FLOATS: dict[str, Codec] = {"plain": PLAIN, "lossless": (encode_floats, decode_floats)}


def make_arrays(size: int) -> dict[str, np.ndarray]:
    """The arrays of the docstring: updates as int32 steps, the model as float32."""
    generator = np.random.default_rng(7)
    scales = TRAINED * 10 ** generator.normal(0, 0.3, LAYERS)
    layer = np.arange(size) * LAYERS // size

    def steps(deviations: np.ndarray | float, count: int) -> np.ndarray:
        return np.rint(generator.standard_normal(count) * deviations / GRID).astype(np.int32)

    manifest = manifest_of(build("small_cnn").state_dict())
    return {
        "trained": steps(scales[layer], size),
        "noised": steps(NOISED, size),
        "head": steps(NOISED, HEAD),
        "model": load_model(resolve_initial("package:small_cnn.safetensors", None), manifest),
    }


def check(name: str, values: np.ndarray) -> dict[str, Any]:
    """Bytes of each codec as a share of plain, and what int8 adds.

    Raises:
        BenchmarkError: what arrives is not what the codec promises.
    """
    found: dict[str, Any] = {"values": values.size, "share": {"plain": 1.0}}
    if values.dtype == np.float32:
        frame = encode_floats(values)
        back = decode_floats(frame, values.size)
    else:
        frame = encode_steps(values)
        back = decode_steps(frame, values.size)
        rounded, variance = quantize_int8(values, np.random.default_rng(0))
        error = GRID * (dequantize_int8(rounded, values.size).astype(np.float64) - values)
        empirical = float(np.mean(error**2))
        if values.size > HEAD and abs(empirical / variance - 1) > VARIANCE_TOLERANCE:
            raise BenchmarkError(
                f"{name}: int8 reports a variance of {variance:.3g}, its errors have {empirical:.3g}"
            )
        found["share"]["int8"] = rounded.nbytes / values.nbytes
        found["added_variance"] = variance
        found["relative_error"] = float(
            np.linalg.norm(error) / (GRID * np.linalg.norm(values.astype(np.float64)))
        )
    if back.tobytes() != values.tobytes():
        raise BenchmarkError(f"{name}: lossless gives back other bits")
    found["share"]["lossless"] = frame.nbytes / values.nbytes
    return found


def once(codec: Codec, values: np.ndarray, repetition: int) -> Cost:
    """To bytes, hashed, and back; short work many times over, until a clock can see it. Memory is not
    measured.
    """
    encode, decode = codec
    loops = max(1, ENOUGH // values.size)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(loops):
        data = encode(values).tobytes()
        hashlib.sha256(data).digest()
        frame = np.frombuffer(data, values.dtype if encode is PLAIN[0] else np.uint8)
        decode(frame, values.size)
    return Cost(
        wall_s=(time.perf_counter() - wall) / loops, cpu_s=(time.process_time() - cpu) / loops, peak_mib=1.0
    )


def measure_all(size: int, repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "numpy", "zstandard"))
    cases: dict[str, Any] = {}
    for name, values in make_arrays(size).items():
        found = check(name, values)
        codecs = OF_FLOATS if values.dtype == np.float32 else OF_STEPS
        costs = interleave({key: partial(once, codec, values) for key, codec in codecs.items()}, repetitions)
        say(f"{name}: {values.size} values, shares {found['share']}")
        found["ratios"] = {
            key: {what: cost_ratios(costs[key], costs["plain"])[what] for what in ("wall", "cpu")}
            for key in codecs
        }
        found["plain_cpu_s"] = min(cost.cpu_s for cost in costs["plain"])
        found["aim"] = AIMS.get(name)
        cases[name] = found
    return {
        "benchmark": "update_codecs",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": {"repetitions": repetitions, "threads": 1},
        "cases": cases,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: bytes, cost, what was aimed at."""
    lines = [
        "| array | codec | bytes / float32 | aim | CPU / plain | wall / plain |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["cases"].items():
        for codec, ratios in found["ratios"].items():
            if codec == "plain":
                continue
            share: float = found["share"][codec]
            aim = found["aim"] if codec == "lossless" else None
            verdict = "" if aim is None else f"≤ {aim}: {'met' if share <= aim else 'missed'}"
            cpu, wall = (_short(ratios[what]) for what in ("cpu", "wall"))
            lines.append(
                f"| {name}, {found['values']} values | {codec} | {share:.3f} | {verdict} | {cpu} | {wall} |"
            )
    lines.append("")
    for name, found in result["cases"].items():
        if "added_variance" in found:
            variance, error = found["added_variance"], found["relative_error"]
            lines.append(
                f"{name}: int8 adds a variance of {variance:.2g} a value, an error of {error:.3f} of the "
                "update's length."
            )
    env = result["environment"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    load = f"load {env['load_1min']} before and {env['load_1min_after']} after"
    lines += [
        "",
        f"Median (min–max) of n = {result['work']['repetitions']}, one thread; plain takes "
        f"{1000 * result['cases']['trained']['plain_cpu_s']:.0f} CPU-ms for "
        f"{result['cases']['trained']['values']} values. "
        f"{env['date']}, {env['cores']} cores, {env['machine']}, {load}; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _short(ratio: Ratio) -> str:
    return f"{ratio.median:.1f} ({ratio.min:.1f}–{ratio.max:.1f})"


def main() -> int:
    arguments = command_line(__doc__, quick="a tenth of the values").parse_args()
    values = RESNET18 // 10 if arguments.quick else RESNET18
    return reported("update_codecs", arguments, lambda: measure_all(values, repetitions_of(arguments)), table)


if __name__ == "__main__":
    sys.exit(main())
