"""From physical units to model input, with hand-computed numbers."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError
from common.preprocess import (
    MR_CLIP,
    MR_STEPS,
    from_stored,
    k_space_channel,
    normalize_image,
    pad_to_square,
    resample,
    robust_scale_mr,
    to_channels,
    to_stored,
)


def phantom(rows: int = 60, columns: int = 80) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    inside = ((y - rows / 2) / rows) ** 2 + ((x - columns / 2) / columns) ** 2 < 0.16
    noise = np.random.default_rng(0).normal(0, 5, (rows, columns))
    return np.where(inside, 300 + 200 * np.sin(x / 5), 5).astype(np.float32) + np.abs(noise).astype(
        np.float32
    )


def test_resample_averages_blocks() -> None:
    image = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert resample(image, 2).tolist() == [[2.5, 4.5], [10.5, 12.5]]


@pytest.mark.parametrize(
    ("side", "size"), [(7, 3), (320, 128), (460, 128), (512, 128), (640, 128), (130, 128)]
)
def test_reducing_keeps_the_mean_and_a_constant(side: int, size: int) -> None:
    image = np.random.default_rng(0).random((side, side), np.float32)
    reduced = resample(image, size)
    assert reduced.shape == (size, size)
    assert reduced.dtype == np.float32
    assert reduced.mean() == pytest.approx(image.mean(), rel=1e-5)
    np.testing.assert_allclose(resample(np.full((side, side), 7.0), size), 7.0, rtol=1e-5)


def test_whole_and_fractional_reduction_agree() -> None:
    from common.preprocess import _weights

    image = np.random.default_rng(0).random((96, 96), np.float32)
    weights = _weights(96, 32)
    np.testing.assert_allclose(resample(image, 32), weights @ image @ weights.T, atol=1e-5)


def test_enlarging_is_linear_and_keeps_the_range() -> None:
    ramp = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    larger = resample(ramp, 16)
    assert larger[0, 1:-1] == pytest.approx(np.arange(1, 15) / 2 - 0.25)
    assert (larger.min(), larger.max()) == (0, 7)


def test_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).random((128, 128), np.float32)
    np.testing.assert_array_equal(resample(image, 128), image)


def test_a_reduction_does_not_alias() -> None:
    stripes = np.tile([0.0, 1.0], (256, 128)).astype(np.float32)
    np.testing.assert_allclose(resample(stripes, 128), 0.5)
    assert np.ptp(resample(stripes, 100)) < 0.25


def test_resample_wants_a_square() -> None:
    with pytest.raises(DataError):
        resample(np.zeros((3, 4)), 2)


def test_padding_crops_nothing_and_centres() -> None:
    square = pad_to_square(np.ones((2, 4)), fill=-1)
    assert square.tolist() == [[-1] * 4, [1] * 4, [1] * 4, [-1] * 4]


def test_mr_scale_forgets_unit_and_offset() -> None:
    image = phantom()
    scaled = robust_scale_mr(image)
    np.testing.assert_allclose(robust_scale_mr(image * 37 + 11), scaled, atol=2e-4)
    assert scaled.min() == 0
    assert 1 <= scaled.max() <= MR_CLIP
    assert np.percentile(scaled[scaled > 0.1], 99.5) == pytest.approx(1, abs=0.02)


def test_one_hot_pixel_does_not_move_the_mr_scale() -> None:
    image = phantom(256, 256)
    hot = image.copy()
    hot[10, 10] = 1e6
    plain, other = robust_scale_mr(image), robust_scale_mr(hot)
    keep = np.ones(image.shape, bool)
    keep[10, 10] = False
    np.testing.assert_allclose(other[keep], plain[keep], atol=0.01)
    assert other[10, 10] == MR_CLIP


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_constant_mr_slice_is_black(value: float) -> None:
    assert not robust_scale_mr(np.full((8, 8), value)).any()
    assert not to_channels(
        to_stored(normalize_image(np.full((8, 8), value), "MR", 4), "MR")[None], np.array([1])
    )[0, 1].any()


def test_ct_is_clipped_before_it_is_averaged() -> None:
    image = np.zeros((4, 4))
    image[0, 0] = 30000
    assert normalize_image(image, "CT", 2)[0, 0] == pytest.approx(3071 / 4)
    assert normalize_image(np.full((2, 6), -3024.0), "CT", 6).tolist() == np.full((6, 6), -1024.0).tolist()


def test_stored_form_is_exact_to_half_a_step() -> None:
    hu = np.random.default_rng(0).uniform(-1024, 3071, (16, 16)).astype(np.float32)
    assert np.abs(from_stored(to_stored(hu, "CT"), "CT") - hu).max() <= 0.5
    scaled = np.random.default_rng(0).uniform(0, MR_CLIP, (16, 16)).astype(np.float32)
    assert np.abs(from_stored(to_stored(scaled, "MR"), "MR") - scaled).max() <= 0.5 / MR_STEPS + 1e-6
    assert to_stored(hu, "CT").dtype == np.int16


def test_ct_windows_by_hand() -> None:
    stored = np.array([[[-1024, -160], [40, 2000]]], np.int16)
    channels = to_channels(stored, np.array([0], np.int8))
    assert channels.dtype == np.float32
    np.testing.assert_allclose(channels[0, 0], [[0, 0], [0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(channels[0, 1], [[0, 840 / 3000], [1040 / 3000, 1]], atol=1e-6)


@pytest.mark.parametrize("side", [8, 15, 16, 128])
def test_k_space_channel_is_the_centred_log_spectrum(side: int) -> None:
    images = np.random.default_rng(0).random((3, side, side), np.float32)
    expected = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(images), axes=(1, 2))))
    expected /= expected.max(axis=(1, 2), keepdims=True)
    channel = k_space_channel(images)
    assert channel.dtype == np.float32
    np.testing.assert_allclose(channel, expected, atol=1e-5)
    assert channel[0, side // 2, side // 2] == 1


def test_a_mixed_batch_is_its_slices_one_by_one() -> None:
    stored = np.stack(
        [
            to_stored(normalize_image(phantom() - 300, "CT", 32), "CT"),
            to_stored(normalize_image(phantom(), "MR", 32), "MR"),
        ]
    )
    stored, modality = stored[[0, 1, 1, 0]], np.array([0, 1, 1, 0], np.int8)
    together = to_channels(stored, modality)
    alone = np.concatenate([to_channels(stored[i : i + 1], modality[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(together, alone)
    assert to_channels(stored[:0], modality[:0]).shape == (0, 2, 32, 32)
