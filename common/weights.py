"""A model as ONE flat float32 array plus a manifest, updates as integers on a public grid, and both as frames
of bytes.

One array crosses Flower in a third of the time of one array a layer; integers make sums exact in any order.

A frame is a uint8 array: a tag of four bytes (kind and version), the CRC-32 of tag and body, and a body of
zstd (RFC 8878, without its magic number) that declares its content's size. The receiver knows what size to
expect, and refuses any other before it allocates. The CRC finds accidents; against forgery there is the
signature of the message that a frame travels in.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from common.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

GRID = 2.0**-24
"""Spacing of update values: finer than the last bit of a float32 of magnitude 1/2."""

LIMIT = 2**30
"""Largest magnitude of one update value in grid steps: larger is refused, never wrapped."""

MAX_EXACT_WEIGHT = 2**21
"""Up to this total weight a mean in floating point, which takes less than half the time, is rounded as in
integers.
"""

REACH = LIMIT * GRID
"""The same in weight units: 64."""

IN_CACHE = 1 << 16
"""Values that are worked on at a time, so that what lies between two steps stays in the processor's cache."""

BLOCK = 1024
"""Values that share one scale in an int8 frame."""

MAX_SHIFT = 24
"""Scale of a block whose largest value is LIMIT, as a power of two."""

STEPS, FLOATS, INT8 = b"fqs1", b"fqf1", b"fq81"
HEADER = struct.Struct("<4sI")

ZSTD_LEVEL = 1
"""Level 3 costs up to 2.5 times as much, takes 0.4 % off a trained update and makes noised ones and models
larger.
"""

MAX_WINDOW = 8 << 20
"""Bytes that any zstd decoder must be ready to look back over (RFC 8878, section 3.1.1.1.2)."""


Part = slice | np.ndarray
"""Some values of a flat array, as numpy takes an index: a slice, or ascending positions (int64)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Names, shapes and order of the tensors in a flat array."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    def part(self, prefix: str) -> slice:
        """The stretch of the flat array whose tensor names begin with `prefix`; they must lie side by
        side.
        """
        ends = np.cumsum([0] + [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes])
        inside = [position for position, name in enumerate(self.names) if name.startswith(prefix)]
        if not inside or inside != list(range(inside[0], inside[-1] + 1)):
            raise RunError(f"the model has no contiguous `{prefix}*`", code="wrong-model")
        return slice(int(ends[inside[0]]), int(ends[inside[-1] + 1]))

    def places(self, names: Collection[str]) -> Part:
        """Where the tensors `names` lie in the flat array: a slice where they lie side by side."""
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]
        found = np.flatnonzero(np.repeat([name in names for name in self.names], sizes))
        if missing := set(names) - set(self.names):
            raise RunError(f"the model has no tensor `{min(missing)}`", code="wrong-model")
        if found.size and found[-1] - found[0] == found.size - 1:
            return slice(int(found[0]), int(found[-1]) + 1)
        found.setflags(write=False)
        return found

    def sha256(self) -> str:
        text = json.dumps(
            [[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)],
            separators=(",", ":"),
        )
        return hashlib.sha256(text.encode()).hexdigest()


def part_size(part: Part) -> int:
    """How many values a part has."""
    return int(part.stop - part.start) if isinstance(part, slice) else int(part.size)


def outside(part: Part, size: int) -> np.ndarray:
    """The positions of a flat array of `size` values that are not in `part`, int64."""
    return np.delete(np.arange(size), part)


def manifest_of(state: Mapping[str, torch.Tensor]) -> Manifest:
    return Manifest(names=tuple(state), shapes=tuple(tuple(tensor.shape) for tensor in state.values()))


def flatten(state: Mapping[str, torch.Tensor]) -> np.ndarray:
    """All tensors of a state dict, in its order, as one float32 array of shape (manifest.size,)."""
    return np.concatenate(
        [tensor.detach().cpu().numpy().astype(np.float32, copy=False).ravel() for tensor in state.values()]
    )


def unflatten(flat: np.ndarray, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The state dict that `flatten` came from.

    Raises:
        RunError: the array's length is not the manifest's.
    """
    import torch

    if flat.shape != (manifest.size,):
        raise RunError(
            f"model array has shape {flat.shape}, the manifest needs ({manifest.size},)", code="wrong-model"
        )
    state, start = {}, 0
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        state[name] = torch.from_numpy(
            flat[start : start + count].reshape(shape).astype(np.float32, copy=True)
        )
        start += count
    return state


def digest(flat: np.ndarray) -> str:
    """SHA-256 of a flat array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(flat).data).hexdigest()


def to_grid(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The update `after - before` in whole grid steps, int32, same shape.

    Raises:
        RunError: a value is not finite or lies beyond LIMIT.
    """
    steps = np.rint((after.astype(np.float64) - before.astype(np.float64)) / GRID)
    if not np.all(np.isfinite(steps)) or np.abs(steps).max(initial=0) > LIMIT:
        raise RunError(
            "the update is not finite or too large for the grid",
            code="diverged",
            hint="lower training.learning_rate",
        )
    return steps.astype(np.int32)


def mean_steps(total: np.ndarray, weight: int) -> np.ndarray:
    """`total / weight` to the nearest whole step, ties to even, exactly: int32, same shape.

    Args:
        total: the sum of weighted updates, int64 (n,).
    Raises:
        RunError: the mean lies beyond LIMIT, or there is none (code `diverged`).
    """
    if weight < 1:
        raise RunError("the mean of no update", code="diverged")
    most = LIMIT * weight
    if total.max(initial=0) > most or total.min(initial=0) < -most:
        raise RunError(
            "the mean update is too large for the grid", code="diverged", hint="lower training.learning_rate"
        )
    if weight > MAX_EXACT_WEIGHT:
        whole, rest = np.divmod(total, np.int64(weight))
        rest *= 2
        whole += (rest > weight) | ((rest == weight) & (whole & 1 == 1))
        return whole.astype(np.int32)
    # a quotient is off by 2^-24 at most, a step that is not halfway between two lies 2^-22 or more from
    # there, and halves are exact
    mean = np.empty(total.shape, np.int32)
    for start in range(0, len(total), IN_CACHE):
        part = total[start : start + IN_CACHE] / weight
        mean[start : start + IN_CACHE] = np.rint(part, out=part)
    return mean


def advance(base: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """`base + GRID * steps` as float32, same shape; whoever holds `base` and the int32 steps gets the same
    bits.

    The mean of a round is therefore rounded to the grid first (`mean_steps`): the price is half a step,
    2^-25, in each weight.
    """
    after = np.empty(base.shape, np.float32)
    for start in range(0, len(base), IN_CACHE):
        part = slice(start, start + IN_CACHE)
        moved = np.multiply(steps[part], GRID, dtype=np.float64)
        after[part] = np.add(moved, base[part], out=moved)
    return after


def encode_steps(steps: np.ndarray) -> np.ndarray:
    """A frame, uint8 (bytes,), that holds int32 steps (n,) without loss.

    Signs go to the lowest bit, so that small values of either sign have zeros above; then all first bytes,
    all second bytes, and so on.
    """
    unsigned = np.ascontiguousarray(steps).view(np.uint32)
    return _pack(STEPS, _planes(unsigned << 1 ^ (steps >> 31).view(np.uint32)))


def decode_steps(frame: np.ndarray, size: int) -> np.ndarray:
    """The int32 steps (size,) of a frame.

    Raises:
        RunError: the frame is damaged, of another kind, or does not hold `size` values (code `bad-frame`).
    """
    zigzag = _from_planes(_unpack(STEPS, frame, 4 * size))
    return (zigzag >> 1 ^ -(zigzag & 1)).view(np.int32)


def encode_floats(flat: np.ndarray) -> np.ndarray:
    """A frame, uint8 (bytes,), that holds float32 (n,) bit for bit, for a receiver that holds no earlier
    model.
    """
    return _pack(FLOATS, _planes(np.ascontiguousarray(flat, np.float32).view(np.uint32)))


def decode_floats(frame: np.ndarray, size: int) -> np.ndarray:
    """The float32 array (size,) of a frame; raises RunError as `decode_steps`."""
    return _from_planes(_unpack(FLOATS, frame, 4 * size)).view(np.float32)


def quantize_int8(steps: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """A frame of one byte a value before zstd, and the variance that this adds.

    Each block of 1024 values has the smallest power of two 2^k as its scale with which it fits into -127 ...
    127. A value v becomes floor((v + r) / 2^k), r uniform on 0 ... 2^k - 1: what arrives is v on average,
    exactly, in whole grid steps, and never beyond LIMIT.

    Args:
        steps: int32 (n,). In a private run they are noised already: this is post-processing and costs no
            privacy.
        generator: decides the rounding. Sites must not share one, or their errors add up instead of averaging
            out.
    Returns:
        uint8 (bytes,), and the mean over the values of the variance of their rounding, in weight units
        squared. It is exact given the steps, from their remainders f: 4^k f (1 - f). It is a function of the
        steps alone.
    Raises:
        RunError: a value lies beyond LIMIT (code `diverged`).
    """
    blocks = np.zeros((-(-steps.size // BLOCK), BLOCK), np.int32)
    blocks.reshape(-1)[: steps.size] = steps
    largest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1).astype(np.int64))
    if largest.max(initial=0) > LIMIT:
        raise RunError(
            "the update is too large for the grid", code="diverged", hint="lower training.learning_rate"
        )
    # bits of ceil(largest / 127) - 1
    _, shifts = np.frexp(np.maximum(-(-largest // 127) - 1, 0).astype(np.float64))
    below = (np.int32(1) << shifts[:, None]) - 1
    rests = (blocks & below) * np.ldexp(np.float32(1), -shifts)[:, None]  # in [0, 1), exact
    added = float(((rests - rests * rests).sum(axis=1, dtype=np.float64) * 4.0**shifts).sum())
    coins = generator.integers(0, 1 << MAX_SHIFT, blocks.shape, np.int32) & below
    rounded = (blocks + coins) >> shifts[:, None]
    content = np.concatenate([shifts.astype(np.int8), rounded.reshape(-1)[: steps.size].astype(np.int8)])
    return _pack(INT8, content), added * GRID**2 / max(1, steps.size)


def dequantize_int8(frame: np.ndarray, size: int) -> np.ndarray:
    """The int32 steps (size,) of a frame made by `quantize_int8`; raises RunError as `decode_steps`."""
    shifts, values = _scales_and_values(frame, size)
    blocks = np.zeros((len(shifts), BLOCK), np.int32)
    blocks.reshape(-1)[:size] = values
    return (blocks * (np.int32(1) << shifts[:, None])).reshape(-1)[:size]


def int8_variance(frame: np.ndarray, size: int) -> float:
    """The variance that rounding put on each value of a frame, their mean, in weight units squared, if the
    remainders are uniform: (4^k - 1) / 6 grid steps squared in a block of scale 2^k.

    It is a function of the frame, so that who states it tells nothing else, and who reads it can compute it;
    the sum is exact, and both get the same bits.
    Raises: RunError as `decode_steps`.
    """
    shifts, _ = _scales_and_values(frame, size)
    sizes = np.full(len(shifts), BLOCK, np.int64)
    sizes[-1:] = size - BLOCK * (len(shifts) - 1)
    total = sum(int(own) * (4 ** int(shift) - 1) for own, shift in zip(sizes, shifts, strict=True))
    return total * GRID**2 / (6 * max(1, size))


def _scales_and_values(frame: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a frame of `quantize_int8`: k of each block's scale 2^k, int32 (blocks,), and the values, int8
    (size,).
    """
    count = -(-size // BLOCK)
    content = _unpack(INT8, frame, count + size)
    shifts = content[:count].astype(np.int32)
    if shifts.max(initial=0) > MAX_SHIFT:
        raise _bad_frame("a scale is beyond the grid")
    return shifts, content[count:].view(np.int8)


def _planes(words: np.ndarray) -> np.ndarray:
    """uint32 (n,) as bytes (4, n), the lowest first."""
    planes = np.empty((4, words.size), np.uint8)
    for start in range(0, words.size, IN_CACHE):
        part = slice(start, start + IN_CACHE)
        for plane in range(4):
            planes[plane, part] = (words[part] >> 8 * plane).astype(np.uint8)
    return planes


def _from_planes(content: np.ndarray) -> np.ndarray:
    """uint32 (n,) of the bytes (4 * n,) that `_planes` made."""
    planes = content.reshape(4, -1)
    words = np.empty(planes.shape[1], np.uint32)
    for start in range(0, words.size, IN_CACHE):
        part = slice(start, start + IN_CACHE)
        word = planes[3, part].astype(np.uint32)
        for plane in (2, 1, 0):
            word <<= 8
            word |= planes[plane, part]
        words[part] = word
    return words


def _pack(tag: bytes, content: np.ndarray) -> np.ndarray:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL,
        source_size=content.nbytes,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=True,
        write_checksum=False,
    )
    body = zstandard.ZstdCompressor(compression_params=parameters).compress(content.data)
    return np.frombuffer(HEADER.pack(tag, zlib.crc32(body, zlib.crc32(tag))) + body, np.uint8)


def _unpack(tag: bytes, frame: np.ndarray, length: int) -> np.ndarray:
    """The `length` bytes in a frame, uint8; everything that it declares is checked before they are
    allocated.
    """
    if frame.dtype != np.uint8 or frame.ndim != 1 or frame.size < HEADER.size:
        raise _bad_frame("no header")
    data = np.ascontiguousarray(frame).data
    found, checksum = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    if found != tag:
        raise _bad_frame(f"kind {found!r}, expected {tag!r}")
    if zlib.crc32(body, zlib.crc32(tag)) != checksum:
        raise _bad_frame("its checksum does not hold")
    try:
        declared = zstandard.get_frame_parameters(body, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        if declared.content_size != length:
            raise _bad_frame(f"it declares {declared.content_size} bytes, expected {length}")
        if declared.window_size > max(length, MAX_WINDOW) or declared.dict_id:
            raise _bad_frame("it asks for more memory than it fills, or for a dictionary")
        decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        return np.frombuffer(decompressor.decompress(body, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise _bad_frame(str(error)) from None


def _bad_frame(found: str) -> RunError:
    return RunError(
        f"not a frame of this model: {found}",
        code="bad-frame",
        hint="damaged on the way, or made by another version of fedqc",
    )


RENAMED = {"small_cnn.safetensors": "small_cnn_phantoms.safetensors"}
"""Packaged weights -> what they are called now: a plan that names the old file means the same weights."""


def resolve_initial(reference: str, sha256: str | None) -> Path:
    """The file that a plan's `model.initial` means.

    Raises:
        ConfigError: it is missing, or its hash is not the plan's.
    """
    is_packaged = reference.startswith("package:")
    models = Path(__file__).parent / "models"
    name = reference.removeprefix("package:")
    path = models / RENAMED.get(name, name) if is_packaged else Path(reference)
    if not path.is_file() or (is_packaged and path.parent != models):
        raise ConfigError(
            f"model.initial = {reference!r}: no such file",
            code="no-initial-weights",
            hint="use package:small_cnn_real.safetensors, package:small_cnn_phantoms.safetensors, an "
            "absolute path, or random",
        )
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ConfigError(
                f"model.initial = {reference!r} has sha256 {found}, the plan says {sha256}",
                code="wrong-initial-weights",
            )
    return path
