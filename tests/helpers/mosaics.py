"""Siemens mosaic images for tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests.helpers.dicom_files import (
    write,
)


def siemens(count: int) -> bytes:
    """The two private elements of a Siemens mosaic."""
    creator = b"SIEMENS MR HEADER "
    return (
        struct.pack("<HH2sH", 0x19, 0x10, b"LO", len(creator))
        + creator
        + struct.pack("<HH2sHH", 0x19, 0x100A, b"US", 2, count)
    )


def csa(count: int) -> bytes:
    """The same number in a CSA header (SV10), in the second private block."""
    creator, number = b"SIEMENS CSA HEADER", str(count).encode().ljust(12, b"\0")
    other = struct.pack("<64si4s3i4i", b"EchoLinePosition", 1, b"IS", 6, 1, 77, 3, 3, 77, 3) + b"31\0\0"
    wanted = (
        struct.pack("<64si4s3i4i", b"NumberOfImagesInMosaic", 1, b"US", 9, 1, 77, 12, 12, 77, 12) + number
    )
    header = b"SV10\4\3\2\1" + struct.pack("<2I", 2, 77) + other + wanted
    start = struct.pack("<HH2sH", 0x29, 0x11, b"LO", len(creator)) + creator
    return start + struct.pack("<HH2sHL", 0x29, 0x1110, b"OB", 0, len(header)) + header


def write_mosaic(
    path: Path, private: bytes, *, rows: int = 12, columns: int = 12, kind: str = "MOSAIC"
) -> Path:
    image = np.arange(rows * columns, dtype=float).reshape(rows, columns)
    write(path, image, modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", kind], SpacingBetweenSlices=3.5)
    content = path.read_bytes()
    # the elements are in the order of their tags
    after = (0x7FE0, 0x0010) if private[:1] == b"\x29" else (0x0020, 0x000D)
    at = content.rindex(struct.pack("<HH", *after))
    path.write_bytes(content[:at] + private + content[at:])
    return path
