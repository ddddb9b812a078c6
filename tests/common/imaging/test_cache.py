"""The cache is built once, is complete or absent, and tells the truth after the folder changed."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path

import numpy as np
import pytest

import common.imaging.cache as cache_module
from common.errors import DataError
from common.imaging.cache import load_or_build
from common.imaging.dicom import read_pixels
from common.imaging.dicom_write import make_uid, write_slice
from common.imaging.preprocess import prepare, to_stored

KEY = bytes(range(32))


def write(path: Path, value: int, modality: str = "CT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(value).uniform(0, 900, (24, 20))
    write_slice(path, image, modality=modality, pixel_spacing_mm=1.0, patient_id=f"P{value}", study_uid=make_uid(b"s"),  # type: ignore[arg-type]
                series_uid=make_uid(b"r"), sop_uid=make_uid(str(path).encode()), instance_number=1)  # fmt: skip
    return path


def folder(root: Path, count: int = 5) -> Path:
    for number in range(count):
        write(root / f"{number}.dcm", number, "CT" if number % 2 else "MR")
    return root


def test_rows_are_the_prepared_slices(tmp_path: Path) -> None:
    slices = load_or_build(folder(tmp_path / "images"), KEY, tmp_path / "cache", 16)
    assert slices.images.shape == (5, 16, 16)
    assert slices.images.dtype == np.int16
    assert isinstance(slices.images, np.memmap)
    assert not slices.images.flags.writeable
    for row, record in zip(slices.images, slices.intake.records, strict=True):
        np.testing.assert_array_equal(row, to_stored(prepare(read_pixels(record.path), record.modality, 16), record.modality))


def test_the_second_time_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images")
    (images / "notes.txt").write_text("x")
    first = load_or_build(images, KEY, tmp_path / "cache", 16)

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache_module, "build_index", fail)
    monkeypatch.setattr(cache_module, "read_pixels", fail)
    second = load_or_build(images, KEY, tmp_path / "cache", 16)
    assert (first.built, second.built) == (True, False)
    assert second.intake.records == first.intake.records
    assert second.intake.public() == first.intake.public()
    np.testing.assert_array_equal(first.images, second.images)


def test_any_change_rebuilds_and_leaves_one_cache(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    fingerprints = {load_or_build(images, KEY, cache, 16).fingerprint}
    write(images / "new.dcm", 77)
    fingerprints.add(load_or_build(images, KEY, cache, 16).fingerprint)
    os.utime(images / "1.dcm", ns=(5, 5))
    fingerprints.add(load_or_build(images, KEY, cache, 16).fingerprint)
    fingerprints.add(load_or_build(images, bytes(32), cache, 16).fingerprint)
    assert len(fingerprints) == 4
    assert len(list(cache.glob("*.npy"))) == len(list(cache.glob("*.json"))) == 1
    load_or_build(images, bytes(32), cache, 8)
    assert len(list(cache.glob("*.npy"))) == 2


def test_a_slice_that_does_not_decode_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images")
    with (images / "2.dcm").open("r+b") as stream:
        content = stream.read()
        at = content.index(struct.pack("<HH2sH", 0x0028, 0x0010, b"US", 2))
        stream.seek(at + 8)
        stream.write(struct.pack("<H", 400))  # the header is whole, but promises more rows than there are
    slices = load_or_build(images, KEY, tmp_path / "cache", 16)
    assert slices.intake.public()["quarantined"] == [{"file": 3, "code": "truncated"}]
    assert len(slices.images) == len(slices.intake.records) == 4
    again = load_or_build(images, KEY, tmp_path / "cache", 16)
    assert again.intake.public() == slices.intake.public()
    np.testing.assert_array_equal(again.images, slices.images)
    record = slices.intake.records[-1]
    np.testing.assert_array_equal(again.images[-1], to_stored(prepare(read_pixels(record.path), record.modality, 16), record.modality))


def test_good_rows_are_bit_identical_with_and_without_bad_neighbours(tmp_path: Path) -> None:
    good = folder(tmp_path / "good")
    mixed = tmp_path / "mixed"
    shutil.copytree(good, mixed)
    (mixed / "0a.dcm").write_bytes(bytes(300))
    (mixed / "3a.dcm").write_bytes((good / "3.dcm").read_bytes()[:-9])
    first = load_or_build(good, KEY, tmp_path / "c1", 16)
    second = load_or_build(mixed, KEY, tmp_path / "c2", 16)
    assert [record.file for record in first.intake.records] == [record.file for record in second.intake.records]
    np.testing.assert_array_equal(first.images, second.images)


def test_a_killed_build_leaves_nothing_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    decode = cache_module._decode
    calls = []

    def die(*args: object) -> np.ndarray:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "_decode", die)
    with pytest.raises(KeyboardInterrupt):
        load_or_build(images, KEY, cache, 16)
    assert not list(cache.glob("*.npy"))
    assert not list(cache.glob("*.json"))
    monkeypatch.undo()
    assert load_or_build(images, KEY, cache, 16).built
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["json", "npy", "short", "missing"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    expected = np.array(load_or_build(images, KEY, cache, 16).images)
    (npy,), (index,) = cache.glob("*.npy"), cache.glob("*.json")
    if damage == "json":
        index.write_text(index.read_text()[:-30])
    elif damage == "npy":
        npy.write_bytes(b"no array")
    elif damage == "short":
        npy.write_bytes(npy.read_bytes()[:-100])
    else:
        npy.unlink()
    rebuilt = load_or_build(images, KEY, cache, 16)
    assert rebuilt.built
    np.testing.assert_array_equal(rebuilt.images, expected)


def test_a_file_that_changes_during_the_build_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images")
    build = cache_module.build_index

    def build_then_touch(*args: object) -> object:
        intake = build(*args)  # type: ignore[arg-type]
        os.utime(images / "0.dcm", ns=(5, 5))
        return intake

    monkeypatch.setattr(cache_module, "build_index", build_then_touch)
    slices = load_or_build(images, KEY, tmp_path / "cache", 16)
    assert slices.intake.public()["quarantined"] == [{"file": 1, "code": "changed"}]


def test_the_cache_is_private_and_names_no_patient(tmp_path: Path) -> None:
    load_or_build(folder(tmp_path / "images"), KEY, tmp_path / "cache", 16)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    for path in (tmp_path / "cache").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = path.read_bytes()
        assert b'"P1"' not in content
        assert str(tmp_path).encode() not in content
        assert b"2.25." not in content


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    with pytest.raises(DataError) as caught:
        load_or_build(folder(tmp_path / "images"), KEY, tmp_path / "state" / "cache", 16)
    assert caught.value.code == "cache-not-writable"


def test_an_empty_folder_gives_no_rows(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert load_or_build(tmp_path / "images", KEY, tmp_path / "cache", 16).images.shape == (0, 16, 16)
    assert not load_or_build(tmp_path / "images", KEY, tmp_path / "cache", 16).built
