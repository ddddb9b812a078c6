"""Frames: what arrives is what was sent, or what was promised about it; what is damaged or hostile is refused
before it costs anything.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import RunError
from common.weights import (
    BLOCK,
    FLOATS,
    GRID,
    HEADER,
    INT8,
    LIMIT,
    MAX_SHIFT,
    STEPS,
    decode_floats,
    decode_steps,
    dequantize_int8,
    encode_floats,
    encode_steps,
    int8_variance,
    quantize_int8,
)

SIZES = st.integers(0, 3 * BLOCK)
ANY_STEPS = arrays(np.int32, SIZES, elements=st.integers(-(2**31), 2**31 - 1))
GRID_STEPS = arrays(np.int32, SIZES, elements=st.integers(-LIMIT, LIMIT))
ANY_BITS = arrays(np.uint32, SIZES, elements=st.integers(0, 2**32 - 1))

Decode = Callable[[np.ndarray, int], np.ndarray]
KINDS: dict[str, tuple[bytes, Callable[[np.ndarray], np.ndarray], Decode, Callable[[int], int]]] = {
    "steps": (STEPS, encode_steps, decode_steps, lambda size: 4 * size),
    "floats": (
        FLOATS,
        lambda steps: encode_floats(steps.astype(np.float32)),
        decode_floats,
        lambda size: 4 * size,
    ),
    "int8": (
        INT8,
        lambda steps: quantize_int8(steps, coins())[0],
        dequantize_int8,
        lambda size: size + -(-size // BLOCK),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def coins(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaussian(size: int, deviation: float, seed: int = 1) -> np.ndarray:
    """int32 steps, `deviation` in steps."""
    return np.rint(np.random.default_rng(seed).standard_normal(size) * deviation).astype(np.int32)


def forged(tag: bytes, body: bytes) -> np.ndarray:
    """A frame with a valid checksum, as an adversary would make it."""
    return np.frombuffer(HEADER.pack(tag, zlib.crc32(body, zlib.crc32(tag))) + body, np.uint8)


def zstd_body(
    content: bytes, *, declared: int | None = None, window_log: int = 10, dictionary: int = 0
) -> bytes:
    """A zstd frame without magic number, spelt out (RFC 8878, section 3.1.1): one raw block, and whatever
    header one likes.
    """
    size = len(content) if declared is None else declared
    descriptor = 0b11000000 | (1 if dictionary else 0)  # eight bytes of content size, a window descriptor
    header = (
        bytes([descriptor, (window_log - 10) << 3])
        + (bytes([dictionary]) if dictionary else b"")
        + size.to_bytes(8, "little")
    )
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


def smallest_scale(block: np.ndarray) -> int:
    largest = max(abs(int(value)) for value in block)
    return next(2**k for k in range(32) if 127 * 2**k >= largest)


def refused(decode: Decode, frame: np.ndarray, size: int) -> str:
    with pytest.raises(RunError) as caught:
        decode(frame, size)
    assert caught.value.code == "bad-frame"
    return caught.value.message


@given(ANY_STEPS)
def test_steps_come_back_exactly(steps: np.ndarray) -> None:
    frame = encode_steps(steps)
    assert (frame.dtype, frame.ndim) == (np.uint8, 1)
    back = decode_steps(frame, steps.size)
    assert back.dtype == np.int32
    assert np.array_equal(back, steps)
    assert back.flags.writeable


@given(ANY_BITS)
def test_floats_come_back_bit_for_bit(bits: np.ndarray) -> None:
    """Any bits: payloads of nan, signed zeros and subnormals too."""
    back = decode_floats(encode_floats(bits.view(np.float32)), bits.size)
    assert back.dtype == np.float32
    assert back.tobytes() == bits.tobytes()


def test_special_floats_come_back_bit_for_bit() -> None:
    bits = np.array(
        [0x80000000, 0, 1, 0x807FFFFF, 0x7FC00001, 0xFFBADBAD, 0x7F800000, 0xFF800000, 0x3F800000], np.uint32
    )
    assert decode_floats(encode_floats(bits.view(np.float32)), bits.size).tobytes() == bits.tobytes()


def test_a_view_with_gaps_is_encoded_as_what_it_shows() -> None:
    steps = gaussian(100, 1000)
    assert np.array_equal(decode_steps(encode_steps(steps[::2]), 50), steps[::2])
    weights = steps.astype(np.float32)[::-3]
    assert np.array_equal(decode_floats(encode_floats(weights), weights.size), weights)
    assert np.array_equal(dequantize_int8(quantize_int8(steps[::2] % 100, coins())[0], 50), steps[::2] % 100)


def test_a_frame_of_today_is_read_tomorrow() -> None:
    """Stored runs and other versions hold such bytes; whoever changes the format changes the tag."""
    steps = np.frombuffer(
        bytes.fromhex("66717331edd742932014a10000000201feff000000ffff000000ffff000000ffff"), np.uint8
    )
    assert decode_steps(steps, 5).tolist() == [0, 1, -1, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize(("deviation", "aim"), [(1e-3, 0.58), (3 * 1.5 / 200, 0.78)])
def test_frames_are_smaller_than_float32(deviation: float, aim: float) -> None:
    steps = gaussian(200_000, deviation / GRID)
    assert encode_steps(steps).nbytes <= aim * 4 * steps.size
    assert quantize_int8(steps, coins())[0].nbytes <= 0.25 * 4 * steps.size


def test_no_change_costs_nothing() -> None:
    assert encode_steps(np.zeros(1_000_000, np.int32)).nbytes < 1000


# What is not a frame.


@kinds
def test_a_changed_byte_is_refused_wherever_it_is(kind: str) -> None:
    _, encode, decode, _ = KINDS[kind]
    frame = encode(gaussian(40, 1000))
    decode(frame, 40)
    for position in range(frame.size):
        for change in (1, 16, 128, 255):
            damaged = frame.copy()
            damaged[position] ^= change
            refused(decode, damaged, 40)


@kinds
def test_a_truncated_or_longer_frame_is_refused(kind: str) -> None:
    _, encode, decode, _ = KINDS[kind]
    frame = encode(gaussian(40, 1000))
    for length in range(frame.size):
        refused(decode, frame[:length], 40)
    refused(decode, np.append(frame, np.uint8(0)), 40)
    refused(decode, np.concatenate([frame, frame]), 40)


@kinds
def test_a_frame_of_another_size_or_kind_is_refused(kind: str) -> None:
    tag, encode, decode, _ = KINDS[kind]
    frame = encode(gaussian(40, 1000))
    for size in (0, 1, 39, 41, 40 * 1024, 2**40):
        assert "expected" in refused(decode, frame, size)
    for other, (_, _, other_decode, _) in KINDS.items():
        if other != kind:
            assert f"kind {tag!r}" in refused(other_decode, frame, 40)


@kinds
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float32])
def test_an_array_of_other_numbers_is_refused(kind: str, dtype: type) -> None:
    _, encode, decode, _ = KINDS[kind]
    refused(decode, encode(gaussian(40, 1000)).astype(dtype), 40)
    refused(decode, encode(gaussian(40, 1000)).reshape(1, -1), 40)


@kinds
def test_hostile_frames_with_a_valid_checksum_are_refused(kind: str) -> None:
    tag, _, decode, length = KINDS[kind]
    content = bytes(length(40))
    # the control: such a frame is read when it is honest
    assert not decode(forged(tag, zstd_body(content)), 40).any()
    assert not decode(forged(tag, zstd_body(content, window_log=23)), 40).any()
    hostile = [
        ("more memory", zstd_body(content, window_log=24)),
        ("more memory", zstd_body(content, window_log=31)),
        ("too much memory", zstd_body(content, window_log=41)),  # more than zstd itself accepts
        ("dictionary", zstd_body(content, dictionary=7)),
        ("declares", zstd_body(content, declared=len(content) + 1)),
        ("declares", zstd_body(content + b"\0")),
        ("decompression error", zstd_body(content[1:], declared=len(content))),
        ("decompression error", zstd_body(content + b"\0", declared=len(content))),
        ("unused data", zstd_body(content) + b"\0"),
        ("unused data", zstd_body(content) * 2),
        ("not enough data", b""),
    ]
    for reason, body in hostile:
        assert reason in refused(decode, forged(tag, body), 40)
    unknown = zstandard.ZstdCompressionParameters.from_level(
        1, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False
    )
    assert "declares" in refused(
        decode, forged(tag, zstandard.ZstdCompressor(compression_params=unknown).compress(content)), 40
    )


@kinds
@given(body=st.binary(max_size=80))
def test_any_bytes_are_a_frame_of_the_expected_size_or_refused(kind: str, body: bytes) -> None:
    tag, _, decode, length = KINDS[kind]
    for attempt in (body, zstd_body(bytes(length(4)))[:10] + body):
        with contextlib.suppress(RunError):
            assert decode(forged(tag, attempt), 4).shape == (4,)


@kinds
def test_a_bomb_is_refused_before_anything_is_allocated(kind: str) -> None:
    tag, encode, decode, length = KINDS[kind]
    size = 1 << 24
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, format=zstandard.FORMAT_ZSTD1_MAGICLESS, source_size=length(size)
    )
    bomb = forged(tag, zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(length(size))))
    assert bomb.nbytes < 10_000
    lie = forged(tag, zstd_body(b"", declared=2**50))
    honest = encode(gaussian(1 << 18, 1000))
    tracemalloc.start()
    try:
        for frame in (bomb, lie):
            refused(decode, frame, 40)
        assert tracemalloc.get_traced_memory()[1] < 200_000
        decode(honest, 1 << 18)
        assert tracemalloc.get_traced_memory()[1] > 1 << 18  # the control: what is allocated is seen
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_liar_costs_no_memory_of_any_kind() -> None:
    """tracemalloc does not see what zstd itself allocates; the kernel does."""
    body = zstd_body(b"", declared=2**34, window_log=31)
    code = (
        "import resource, sys, numpy as np\n"
        "from common.errors import RunError\n"
        "from common.weights import decode_steps\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "frame = np.frombuffer(bytes.fromhex(sys.argv[1]), np.uint8)\n"
        "for size in (40, 2**32):\n"
        "    try:\n"
        "        decode_steps(frame, size)\n"
        "    except RunError as error:\n"
        "        print(error.code)\n"
        "    except MemoryError:\n"
        "        print('memory')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, forged(STEPS, body).tobytes().hex()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # the second is the control: 16 GiB wanted by the receiver itself
    assert said.stdout.split() == ["bad-frame", "memory"], said.stderr


def test_a_scale_beyond_the_grid_is_refused() -> None:
    size = BLOCK + 1
    for shift in (MAX_SHIFT + 1, 31, 32, 128, 255):
        assert "scale" in refused(
            dequantize_int8, forged(INT8, zstd_body(bytes([0, shift]) + bytes(size))), size
        )
    largest = dequantize_int8(
        forged(INT8, zstd_body(bytes([MAX_SHIFT, MAX_SHIFT]) + bytes([128]) * size)), size
    )
    assert largest.tolist() == [-(2**31)] * size  # beyond LIMIT, for the gate to refuse; but not wrapped


# What rounding to one byte promises.


@given(GRID_STEPS, st.integers(0, 2**32))
def test_int8_moves_a_value_by_less_than_its_scale_and_never_off_the_grid(
    steps: np.ndarray, seed: int
) -> None:
    frame, added = quantize_int8(steps, coins(seed))
    back = dequantize_int8(frame, steps.size)
    assert back.dtype == np.int32
    assert back.shape == steps.shape
    assert np.abs(back.astype(np.int64)).max(initial=0) <= LIMIT
    for start in range(0, steps.size, BLOCK):
        part, arrived = (array[start : start + BLOCK].astype(np.int64) for array in (steps, back))
        scale = smallest_scale(part)
        assert np.all(arrived % scale == 0)
        assert np.all(np.abs(arrived - part) < scale)
    assert 0 <= added <= (2 * LIMIT / 127 * GRID) ** 2 / 4
    assert 0 <= int8_variance(frame, steps.size) <= (2 * LIMIT / 127 * GRID) ** 2 / 6


@given(arrays(np.int32, SIZES, elements=st.integers(-127, 127)))
def test_int8_of_small_steps_is_exact(steps: np.ndarray) -> None:
    frame, added = quantize_int8(steps, coins())
    assert np.array_equal(dequantize_int8(frame, steps.size), steps)
    assert added == int8_variance(frame, steps.size) == 0


def test_the_variance_that_a_frame_tells_is_a_function_of_its_scales_alone() -> None:
    """By hand: 1024 values at scale 4 have 1024 * 15 / 6 grid steps squared, one at scale 1 has none."""
    steps = np.full(BLOCK + 1, 500, np.int32)
    steps[-1] = 3
    told = {int8_variance(quantize_int8(steps + moved, coins())[0], steps.size) for moved in (0, 1, 2)}
    assert told == {BLOCK * 15 * GRID**2 / (6 * steps.size)}


@pytest.mark.parametrize("deviation", [100, 17_000, 5_000_000])
def test_int8_is_unbiased_and_says_its_variance(deviation: float) -> None:
    """The mean error, and each value's, within 5 standard errors (of one value: its largest, half its scale);
    the variance within 10 %.
    """
    steps, repetitions = gaussian(2 * BLOCK + 100, deviation), 400
    generator = coins(7)
    frames = [quantize_int8(steps, generator) for _ in range(repetitions)]
    added = {variance for _, variance in frames}
    assert len(added) == 1  # it depends on the steps, not on the coins
    errors = np.stack([dequantize_int8(frame, steps.size) for frame, _ in frames]).astype(np.float64) - steps
    empirical = float((errors**2).mean()) * GRID**2
    assert added.pop() == pytest.approx(empirical, rel=0.1)
    assert int8_variance(frames[0][0], steps.size) == pytest.approx(empirical, rel=0.1)
    spread = errors.std() / np.sqrt(repetitions)
    assert abs(errors.mean()) <= 5 * spread / np.sqrt(steps.size)
    means = errors.mean(axis=0)
    for start in range(0, steps.size, BLOCK):
        half = smallest_scale(steps[start : start + BLOCK]) / 2
        assert np.abs(means[start : start + BLOCK]).max() <= 5 * half / np.sqrt(repetitions)
    # no part of the error stays when it is averaged
    assert float((means**2).mean()) == pytest.approx(spread**2, rel=0.15)


def test_the_variance_by_hand() -> None:
    """127 * 4 is the largest: the scale is 4. Remainders 1, 2 and 3 quarters have variances 3, 4 and 3 steps
    squared.
    """
    _, added = quantize_int8(np.array([508, 1, 2, 3, -1], np.int32), coins())
    assert added == (3 + 4 + 3 + 3) / 5 * GRID**2


def test_the_variance_is_a_function_of_the_steps_alone() -> None:
    steps = gaussian(5000, 20_000)
    frames = [quantize_int8(steps, coins(seed)) for seed in range(2)]
    assert frames[0][1] == frames[1][1]
    assert frames[0][0].tobytes() != frames[1][0].tobytes()
    assert quantize_int8(steps, coins(0))[0].tobytes() == frames[0][0].tobytes()


@pytest.mark.parametrize("value", [LIMIT + 1, -LIMIT - 1, 2**31 - 1, -(2**31)])
def test_int8_of_what_leaves_the_grid_is_refused(value: int) -> None:
    with pytest.raises(RunError) as caught:
        quantize_int8(np.array([0, value], np.int32), coins())
    assert caught.value.code == "diverged"


def test_the_limit_itself_passes_through_int8() -> None:
    steps = np.array([LIMIT, -LIMIT, LIMIT - 1, 1 - LIMIT], np.int32)
    for seed in range(20):
        assert (
            np.abs(dequantize_int8(quantize_int8(steps, coins(seed))[0], 4).astype(np.int64)).max() <= LIMIT
        )


@kinds
def test_encoding_changes_nothing_of_what_is_encoded(kind: str) -> None:
    steps = gaussian(3000, 1000)
    before = steps.copy()
    KINDS[kind][1](steps)
    assert np.array_equal(steps, before)
