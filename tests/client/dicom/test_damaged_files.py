"""Files with random damage: each gives finite slices or one code, and nothing else ever comes out."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from client.dicom.dicom import read_headers, read_slices
from client.dicom.refusals import CODES, EXCLUSIONS
from client.dicom.sources import find_files
from common.errors import ImagingError
from tests.helpers.codestreams import LOSSLESS, stored
from tests.helpers.dicom_files import REAL, encapsulated, group, items, needs_real_data, write, write_frames
from tests.helpers.mosaics import csa, siemens, write_mosaic

LARGEST_SEED = 260_000


def own_files(folder: Path) -> list[bytes]:
    """One of each kind that the reader takes apart differently."""
    paths = [write(folder / "native.dcm", np.zeros((8, 8)))]
    for name, syntax in (("rle.dcm", RLELossless), ("deflated.dcm", DeflatedExplicitVRLittleEndian)):
        path = write(folder / name)
        dataset = pydicom.dcmread(path)
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        else:
            dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path)
        paths.append(path)
    for number, (syntax, encode) in enumerate(LOSSLESS.values()):  # type: ignore[assignment]
        path = write(folder / f"{number}.dcm", modality="MR", PixelRepresentation=0)
        paths.append(encapsulated(path, [bytes(encode(stored()))], str(syntax)))
    own = [group(PlanePositionSequence=items(ImagePositionPatient=[0, 0, number])) for number in range(3)]
    paths.append(write_frames(folder / "frames.dcm", np.ones((3, 6, 5)), own=own))
    paths += [write_mosaic(folder / "mosaic.dcm", siemens(8)), write_mosaic(folder / "csa.dcm", csa(8))]
    return [path.read_bytes() for path in paths]


def real_files() -> list[bytes]:
    root = Path(str(REAL))
    awkward = [source.path for source in find_files(root / "awkward")]
    files = [
        *awkward,
        root / "site_mr_uih_umr770/dtiAP_00000001.dcm",
        root / "site_mr_philips_bangalore/IM_0001",
    ]
    return [path.read_bytes() for path in files if path.stat().st_size <= LARGEST_SEED]


def damaged(seeds: list[bytes], count: int, generator: np.random.Generator) -> Iterator[bytes]:
    """One to eight bytes changed, mostly in the header; every 17th is cut as well."""
    for number in range(count):
        content = bytearray(seeds[number % len(seeds)])
        end = (
            len(content)
            if number % 3 == 0
            else min(len(content), int(generator.choice([1000, 3000, 20_000])))
        )
        for place in generator.integers(min(132, end - 1), end, generator.integers(1, 9)):
            content[place] = generator.integers(0, 256)
        yield bytes(content[: generator.integers(0, len(content))] if number % 17 == 0 else content)


def outcomes(files: Iterator[bytes]) -> Counter[str]:
    found: Counter[str] = Counter()
    for content in files:
        try:
            headers = read_headers(io.BytesIO(content), len(content))
            shapes = {}
            for number, image in read_slices(io.BytesIO(content), len(content)):
                assert np.isfinite(image).all()
                assert image.dtype == np.float32
                shapes[number] = image.shape
            assert shapes == {header.frame: (header.rows, header.columns) for header in headers}
            found["read"] += 1
        except ImagingError as error:
            assert error.code in CODES | EXCLUSIONS  # noqa: PT017
            found[error.code] += 1
    return found


def test_damaged_files_of_our_own_raise_nothing_else(tmp_path: Path) -> None:
    found = outcomes(damaged(own_files(tmp_path), 800, np.random.default_rng(7)))
    assert found.total() == 800
    assert found["read"] > 100  # the damage does not stop at the first check
    assert len(found) > 5


@needs_real_data
def test_damaged_real_files_raise_nothing_else() -> None:
    found = outcomes(damaged(real_files(), 300, np.random.default_rng(8)))
    assert found.total() == 300
    assert found["read"] > 30


@pytest.mark.slow
@needs_real_data
def test_ten_thousand_damaged_files_take_no_gigabyte(tmp_path: Path) -> None:
    seeds = [*own_files(tmp_path), *real_files()]
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak counts from here, whatever this process ran before
    before_kib = memory_kib("VmRSS")
    found = outcomes(damaged(seeds, 10_000, np.random.default_rng(9)))
    assert found.total() == 10_000
    assert memory_kib("VmHWM") - before_kib < 1 << 20


def memory_kib(field: str) -> int:
    """A field of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
