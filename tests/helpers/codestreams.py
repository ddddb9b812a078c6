"""Pixel data in every lossless encoding."""

from __future__ import annotations

import imagecodecs
import numpy as np

ROWS, COLUMNS = 24, 20
JPEG = "1.2.840.10008.1.2.4."


def stored(dtype: str = "u2", bits: int = 12) -> np.ndarray:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if dtype[0] == "i" else (0, 1 << bits)
    return np.random.default_rng(5).integers(low, high, (ROWS, COLUMNS)).astype(dtype)


LOSSLESS = {
    "JPEG 57": (
        JPEG + "57",
        lambda image: imagecodecs.jpeg8_encode(image, lossless=True, bitspersample=16, predictor=4),
    ),
    "JPEG 70": (JPEG + "70", lambda image: imagecodecs.jpeg8_encode(image, lossless=True, bitspersample=16)),
    "JPEG 70, 12 bits": (JPEG + "70", lambda image: imagecodecs.ljpeg_encode(image, bitspersample=12)),
    "JPEG-LS": (JPEG + "80", imagecodecs.jpegls_encode),
    "JPEG 2000": (
        JPEG + "90",
        lambda image: imagecodecs.jpeg2k_encode(image, codecformat="j2k", level=0, reversible=True),
    ),
    "JPEG 2000 in JP2": (
        JPEG + "91",
        lambda image: imagecodecs.jpeg2k_encode(image, codecformat="jp2", level=0, reversible=True),
    ),
}
