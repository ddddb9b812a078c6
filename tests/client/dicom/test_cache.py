"""The cache is built once, is complete or absent, and tells the truth after the folder changed."""

from __future__ import annotations

import dataclasses
import gzip
import json
import mmap
import os
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

import client.dicom.cache as cache_module
from client.dicom.cache import ADMIT_ALL, is_prepared, load_or_build, open_current
from client.dicom.dicom import read_pixels
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.index import SliceRecord
from client.dicom.patients import AS_WRITTEN
from client.dicom.reading import HEADERS_AT_ONCE
from client.dicom.workers import Outcome
from common.errors import DataError
from common.preprocess import normalize_image, to_stored
from tests.helpers.dicom_files import group, items, write_frames

KEY = bytes(range(32))


def write(path: Path, value: int, modality: str = "CT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(value).uniform(0, 900, (24, 20))
    write_slice(
        path,
        image,
        HeaderFacts(
            modality=modality,
            pixel_spacing_mm=1.0,
            patient_id=f"P{value}",
            study_uid=make_uid(b"s"),  # type: ignore[arg-type]
            series_uid=make_uid(b"r"),
            sop_uid=make_uid(str(path).encode()),
            instance_number=1,
        ),
    )
    return path


@dataclass(frozen=True)
class WithoutPatient:
    """Criteria that leave out one patient."""

    patient: str

    def __call__(self, record: SliceRecord, /) -> str:
        return "opted-out" if record.patient == self.patient else ""

    patients = AS_WRITTEN

    def has_opted_out(self, record: SliceRecord, /) -> bool:
        return record.patient == self.patient

    def digest(self) -> str:
        return self.patient

    def kept_text(self, header: dict[str, Any], /) -> dict[str, str]:
        return ADMIT_ALL.kept_text(header)

    def text_digest(self) -> str:
        return ADMIT_ALL.text_digest()


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
        np.testing.assert_array_equal(
            row, to_stored(normalize_image(read_pixels(record.path), record.modality, 16), record.modality)
        )


def resident(path: Path) -> int:
    """Bytes of a file that are mapped into this process and in its memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    return sum(
        int(next(line for line in lines[number:] if line.startswith("Rss:")).split()[1]) << 10
        for number in at
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_spared_slices_are_the_same_and_leave_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slices.i16"
    path.write_bytes(np.random.default_rng(0).bytes(512 * 128 * 128 * 2))
    pack = np.memmap(path, np.dtype("<i2"), "r", shape=(512, 128, 128))
    monkeypatch.setattr(cache_module, "_SPARED_BYTES", 1 << 20)
    backwards = cache_module.StoredSlices(pack, np.arange(512)[::-1])
    for images in (pack, backwards):
        slices = cache_module.spared(images)
        pack._mmap.madvise(mmap.MADV_DONTNEED)
        for at in range(512):
            assert np.array_equal(slices[at], images[at])
        assert resident(path) < 6 << 20
        assert np.array_equal(slices[[3, 1]], images[[3, 1]])
    np.asarray(pack).sum()
    assert resident(path) > 15 << 20


def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a file was read again")

    monkeypatch.setattr(cache_module.Workers, "map", fail)


def packs(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(cache.glob("slices-*"))]


def test_the_second_time_no_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images")
    (images / "notes.txt").write_text("x")
    first = load_or_build(images, KEY, tmp_path / "cache", 16)
    no_workers(monkeypatch)
    monkeypatch.setattr(cache_module, "expand_archives", lambda files: pytest.fail("a file was opened"))
    second = load_or_build(images, KEY, tmp_path / "cache", 16)
    assert (first.built, second.built) == (True, False)
    assert second.intake == first.intake
    assert second.measures == first.measures
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(first.images, second.images)


def test_only_what_is_new_is_decoded_and_the_index_changes_with_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    first = load_or_build(images, KEY, cache, 16)
    write(images / "1a.dcm", 77)
    asked: list[dict[str, object]] = []
    whole = cache_module.Workers.map

    def watched(self: object, items: object) -> object:
        kept = list(items)  # type: ignore[call-overload]
        asked.extend(kept)
        return whole(self, kept)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module.Workers, "map", watched)
    second = load_or_build(images, KEY, cache, 16)
    assert [Path(str(item["path"])).name for item in asked] == ["1a.dcm", "1a.dcm"]  # its header, its slice
    assert first.fingerprint != second.fingerprint
    assert [record.file for record in second.intake.records] == [
        "0.dcm",
        "1.dcm",
        "1a.dcm",
        "2.dcm",
        "3.dcm",
        "4.dcm",
    ]
    for row, record in zip(second.images, second.intake.records, strict=True):
        np.testing.assert_array_equal(
            row, to_stored(normalize_image(read_pixels(record.path), record.modality, 16), record.modality)
        )
    np.testing.assert_array_equal(second.images[[4, 2]], np.stack([second.images[4], second.images[2]]))
    np.testing.assert_array_equal(np.asarray(second.images), second.images[:])
    assert second.images.shape == (6, 16, 16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The items that workers are given."""
    found: list[dict[str, Any]] = []
    whole = cache_module.Workers.map

    def watched(self: Any, items: Any) -> Any:
        return whole(self, (found.append(item) or item for item in items))  # type: ignore[func-returns-value]

    monkeypatch.setattr(cache_module.Workers, "map", watched)
    return found


def in_two_passes(images: Path, cache: Path, patch: pytest.MonkeyPatch, **how: Any) -> cache_module.Slices:
    """Headers of all files first, as where something is in the cache."""
    with patch.context() as patched:
        patched.setattr(cache_module._Store, "has_slices", lambda self: True)
        return load_or_build(images, KEY, cache, 16, **how)


def kept(cache: Path) -> tuple[Any, ...]:
    """All that a cache holds."""
    with closing(sqlite3.connect(cache / "store.sqlite3")) as database:
        tables = [sorted(database.execute(f"SELECT * FROM {name}")) for name in ("meta", "slices")]
        columns = "file, number, path, member, size_bytes, mtime_ns, code, slices"
        return packs(cache), *tables, sorted(database.execute(f"SELECT {columns} FROM files"))


def test_the_first_time_each_file_of_one_slice_is_opened_once(
    tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    images = folder(tmp_path / "images")
    (images / "1a.txt").write_text("x")
    assert load_or_build(images, KEY, tmp_path / "cache", 16).intake.used == 5
    assert [item["name"] for item in asked] == ["0.dcm", "1.dcm", "1a.txt", "2.dcm", "3.dcm", "4.dcm"]


@pytest.mark.parametrize("what", ["slices", "frames", "damaged", "criteria"])
def test_one_pass_keeps_what_two_passes_keep(
    tmp_path: Path, what: str, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_IN_VAIN", 0)
    images, how = folder(tmp_path / "images", 30), {}
    if what == "frames":
        own = [group(PlanePositionSequence=items(ImagePositionPatient=[0, 0, n])) for n in range(3)]
        write_frames(images / "1b.dcm", np.arange(12, dtype=np.float32).reshape(3, 2, 2), own=own)
    elif what == "damaged":
        shutil.copy(images / "3.dcm", images / "3-copy.dcm")
        content = (images / "2.dcm").read_bytes()
        (images / "2.dcm").write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1))
        (images / "22.dcm").write_bytes(content[:-9])
    elif what == "criteria":
        first = load_or_build(images, KEY, tmp_path / "c0", 16).intake.records[0].patient
        how["admit"] = WithoutPatient(first)
        asked.clear()
    once = load_or_build(images, KEY, tmp_path / "c1", 16, **how)
    assert any("size" in item and "frames" not in item for item in asked)
    assert any("frames" in item for item in asked) == (what in {"frames", "criteria"})
    two = in_two_passes(images, tmp_path / "c2", monkeypatch, **how)
    assert isinstance(once.images, np.memmap), "in the order of the index"
    assert (once.intake, once.measures, once.fingerprint) == (two.intake, two.measures, two.fingerprint)
    assert kept(tmp_path / "c1") == kept(tmp_path / "c2")


def test_a_file_whose_pixels_kill_the_decoder_keeps_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = folder(tmp_path / "images")
    whole = cache_module.Workers.map

    def map(self: Any, items: Any) -> Any:
        items = list(items)
        for item, outcome in zip(items, whole(self, items), strict=True):
            hurts = item["name"] == "2.dcm" and "size" in item
            yield Outcome(failure="decoder-crashed") if hurts else outcome

    monkeypatch.setattr(cache_module.Workers, "map", map)
    once = load_or_build(images, KEY, tmp_path / "c1", 16)
    two = in_two_passes(images, tmp_path / "c2", monkeypatch)
    assert once.intake.public()["quarantined"] == [{"file": 3, "code": "decoder-crashed"}]
    assert once.intake == two.intake
    assert once.intake.flow[0].slices == 5


def test_a_file_that_moved_or_was_touched_is_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    first = load_or_build(images, KEY, cache, 16)
    before = packs(cache)
    (images / "deep").mkdir()
    (images / "3.dcm").rename(images / "deep" / "x.dcm")
    os.utime(images / "1.dcm", ns=(5, 5))
    monkeypatch.setattr(cache_module, "_decode", lambda store, workers, missing, *_: assert_empty(missing))
    second = load_or_build(images, KEY, cache, 16)
    assert second.fingerprint == first.fingerprint
    assert [record.file for record in second.intake.records] == [
        "0.dcm",
        "1.dcm",
        "2.dcm",
        "4.dcm",
        "deep/x.dcm",
    ]
    np.testing.assert_array_equal(second.images[4], first.images[3])
    assert packs(cache) == before


def assert_empty(items: object) -> None:
    assert not items


def test_what_no_index_refers_to_leaves_the_disk_and_is_noted(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    first = load_or_build(images, KEY, cache, 16)
    gone = first.images[1].tobytes()
    patient = first.intake.records[1].patient
    second = load_or_build(
        images,
        KEY,
        cache,
        16,
        admit=WithoutPatient(patient),
    )
    assert [record.file for record in second.intake.records] == ["0.dcm", "2.dcm", "3.dcm", "4.dcm"]
    assert second.intake.public()["excluded"] == {"opted-out": 1}
    assert len(packs(cache)) == 1
    assert gone not in packs(cache)[0]
    np.testing.assert_array_equal(second.images, first.images[[0, 2, 3, 4]])
    noted = [json.loads(line) for line in (cache / "indexes.jsonl").read_text().splitlines()]
    assert [(line["patients"], line["patients_new"], line["patients_gone"]) for line in noted] == [
        (5, 5, 0),
        (4, 0, 1),
    ]
    # without the rule he is back
    assert load_or_build(images, KEY, cache, 16).fingerprint == first.fingerprint


def test_a_cache_of_a_version_that_knew_less_of_patients_goes_on_with_the_same_index(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    first = load_or_build(images, KEY, cache, 16)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("slices-*")}
    lacking = ("patient_origin", "patient_forms", "patient_near", "birth", "sex")
    with closing(sqlite3.connect(cache / "store.sqlite3")) as database:
        database.execute("DELETE FROM meta WHERE name = 'patients' OR name LIKE 'members:%'")
        for file, text in database.execute("SELECT file, slices FROM files").fetchall():
            slices = json.loads(text)
            for values, _ in slices:
                for name in lacking:
                    del values[name]
            database.execute("UPDATE files SET slices = ? WHERE file = ?", (json.dumps(slices), file))
        database.commit()
    second = load_or_build(images, KEY, cache, 16)
    assert second.built
    assert (second.fingerprint, second.intake) == (first.fingerprint, first.intake)
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("slices-*")} == before
    assert len((cache / "indexes.jsonl").read_text().splitlines()) == 1
    gone = second.intake.records[1].patient  # and from now on opt-outs are subtracted from it
    third = load_or_build(images, KEY, cache, 16, admit=WithoutPatient(gone))
    assert (third.fingerprint, len(third.intake.records), third.opted_out) == (first.fingerprint, 4, {gone})
    assert not load_or_build(images, KEY, cache, 16, admit=WithoutPatient(gone)).built


def test_an_image_that_goes_with_an_opt_out_makes_a_new_index(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    first = load_or_build(images, KEY, cache, 16)
    gone = first.intake.records[1].patient
    (images / "3.dcm").unlink()
    assert load_or_build(images, KEY, cache, 16, admit=WithoutPatient(gone)).fingerprint != first.fingerprint


def test_a_cache_is_prepared_for_the_sizes_it_was_made_for(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    assert not is_prepared(cache, 16)
    load_or_build(images, KEY, cache, 16)
    assert is_prepared(cache, 16)
    assert not is_prepared(cache, 8)


def test_another_key_or_size_is_another_cache(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    fingerprints = {
        load_or_build(images, key, cache, size).fingerprint for key in (KEY, bytes(32)) for size in (16, 8)
    }
    assert len(fingerprints) == 4
    assert len(packs(cache)) == 2


def test_duplicates_and_conflicts_are_told_by_their_pixels(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    shutil.copy(images / "3.dcm", images / "3-copy.dcm")
    for _ in range(3):  # built, opened, brought up to date
        slices = load_or_build(images, KEY, cache, 16)
        assert (slices.intake.used, slices.intake.duplicates) == (5, (5,))
    os.utime(images / "0.dcm", ns=(5, 5))
    assert load_or_build(images, KEY, cache, 16).intake.duplicates == (5,)


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
    np.testing.assert_array_equal(
        again.images[-1],
        to_stored(normalize_image(read_pixels(record.path), record.modality, 16), record.modality),
    )


def test_good_rows_are_bit_identical_with_and_without_bad_neighbours(tmp_path: Path) -> None:
    good = folder(tmp_path / "good")
    mixed = tmp_path / "mixed"
    shutil.copytree(good, mixed)
    (mixed / "0a.dcm").write_bytes(bytes(300))
    (mixed / "3a.dcm").write_bytes((good / "3.dcm").read_bytes()[:-9])
    first = load_or_build(good, KEY, tmp_path / "c1", 16)
    second = load_or_build(mixed, KEY, tmp_path / "c2", 16)
    assert [record.file for record in first.intake.records] == [
        record.file for record in second.intake.records
    ]
    np.testing.assert_array_equal(first.images, second.images)


KILLED = """
import sys, os, signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import client.dicom.cache as cache
cache._COMMIT_S = 0.0
def progress(stage, done, total):
    if stage == sys.argv[3] and done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
cache.load_or_build(Path(sys.argv[1]), bytes(range(32)), Path(sys.argv[2]), 16, progress=progress)
"""


@pytest.mark.parametrize(
    ("stage", "at"), [("headers", 2), ("headers", 5), ("slices", 1), ("slices", 4), ("slices", 5)]
)
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, stage: str, at: int) -> None:
    images = folder(tmp_path / "images")
    undisturbed = load_or_build(images, KEY, tmp_path / "c1", 16)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(images), str(tmp_path / "c2"), stage, str(at)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    done = len(packs(tmp_path / "c2")[0]) // 512 if packs(tmp_path / "c2") else 0
    assert done >= (at - 1 if stage == "slices" else 0)
    resumed = load_or_build(images, KEY, tmp_path / "c2", 16)
    assert resumed.fingerprint == undisturbed.fingerprint
    assert resumed.intake == undisturbed.intake
    assert packs(tmp_path / "c2") == packs(tmp_path / "c1")


@pytest.mark.parametrize("damage", ["database", "half a database", "short", "missing"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    expected = np.array(load_or_build(images, KEY, cache, 16).images)
    (pack,), database = cache.glob("slices-*"), cache / "store.sqlite3"
    if damage == "database":
        database.write_bytes(b"no database")
    elif damage == "half a database":
        database.write_bytes(database.read_bytes()[:5000])
    elif damage == "short":
        pack.write_bytes(pack.read_bytes()[:-100])
    else:
        pack.unlink()
    rebuilt = load_or_build(images, KEY, cache, 16)
    assert rebuilt.built
    np.testing.assert_array_equal(rebuilt.images, expected)


def test_verification_finds_a_flipped_bit_and_decodes_that_slice_again(tmp_path: Path) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    expected = np.array(load_or_build(images, KEY, cache, 16).images)
    (pack,) = cache.glob("slices-*")
    content = bytearray(pack.read_bytes())
    content[512 * 2 + 7] ^= 4
    pack.write_bytes(content)
    assert not np.array_equal(load_or_build(images, KEY, cache, 16).images, expected)
    np.testing.assert_array_equal(load_or_build(images, KEY, cache, 16, verify=True).images, expected)
    np.testing.assert_array_equal(load_or_build(images, KEY, cache, 16).images, expected)


def test_a_file_that_changes_during_the_build_is_quarantined_and_read_again_later(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write(images / "9.dcm", 9)
    load_or_build(images, KEY, tmp_path / "cache", 16)  # from now on headers are read first, then slices
    folder(images)

    def touch(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("headers", total):
            os.utime(images / "0.dcm", ns=(5, 5))

    slices = load_or_build(images, KEY, tmp_path / "cache", 16, progress=touch)
    assert slices.intake.public()["quarantined"] == [{"file": 1, "code": "changed"}]
    # its time is another now: the folder changed
    assert load_or_build(images, KEY, tmp_path / "cache", 16).intake.used == 6


def test_a_problem_that_may_have_passed_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    whole = cache_module.Workers.map
    monkeypatch.setattr(
        cache_module.Workers,
        "map",
        lambda self, items: (Outcome(failure="too-slow") for _ in whole(self, items)),
    )
    assert {problem.code for problem in load_or_build(images, KEY, cache, 16).intake.quarantined} == {
        "too-slow"
    }
    monkeypatch.undo()
    assert load_or_build(images, KEY, cache, 16).intake.used == 0
    assert load_or_build(images, KEY, cache, 16, again=True).intake.used == 5
    assert load_or_build(images, KEY, cache, 16).intake.used == 5


@pytest.mark.parametrize(
    "lie", [{"pixels": ["x"]}, {"failure": ["x"]}, {"failure": "x"}, {"headers": [[{"rows": []}, ""]]}]
)
def test_a_worker_that_lies_gets_its_file_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any]
) -> None:
    images = folder(tmp_path / "images", 1)
    whole = cache_module.Workers.map

    def lying(self: object, items: object) -> object:
        for outcome in whole(self, items):  # type: ignore[arg-type]
            yield (dataclasses.replace(outcome, value=outcome.value | lie) if outcome.arrays else outcome)

    monkeypatch.setattr(cache_module.Workers, "map", lying)
    assert load_or_build(images, KEY, tmp_path / "cache", 16).intake.quarantined[0].code == "decoder-crashed"


def test_no_room_is_said_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError) as caught:
        load_or_build(folder(tmp_path / "images"), KEY, tmp_path / "cache", 16)
    assert caught.value.code == "disk-full"
    assert not packs(tmp_path / "cache")


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 1)
    os.rename(images / "0.dcm", os.fsencode(images) + b"/\xff\xfe.dcm")
    for _ in range(2):
        slices = load_or_build(images, KEY, tmp_path / "cache", 16)
        assert slices.intake.used == 1
        assert slices.intake.records[0].path.exists()


def test_archives_and_slices_of_one_file_are_kept(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 3)
    with zipfile.ZipFile(images / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(write(tmp_path / "other.dcm", 9), "a/9.dcm")
    (images / "1.dcm.gz").write_bytes(gzip.compress((images / "1.dcm").read_bytes()))
    slices = load_or_build(images, KEY, tmp_path / "cache", 16)
    assert [record.file for record in slices.intake.records] == [
        "0.dcm",
        "1.dcm",
        "2.dcm",
        "study.zip!/a/9.dcm",
    ]
    assert slices.intake.duplicates == (3,)
    expected = to_stored(normalize_image(read_pixels(tmp_path / "other.dcm"), "CT", 16), "CT")
    np.testing.assert_array_equal(load_or_build(images, KEY, tmp_path / "cache", 16).images[3], expected)


def test_the_cache_is_private_and_names_no_patient(tmp_path: Path) -> None:
    load_or_build(folder(tmp_path / "images"), KEY, tmp_path / "cache", 16)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    for path in (tmp_path / "cache").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = path.read_bytes()
        assert b"P1" not in content
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


def test_a_cache_of_an_earlier_version_reads_headers_again_and_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its database held more than a rule needs, and fewer measures of each slice."""
    images, cache = folder(tmp_path / "images"), tmp_path / "cache"
    first = load_or_build(images, KEY, cache, 16)
    with closing(sqlite3.connect(cache / "store.sqlite3")) as database:
        database.execute("DELETE FROM meta WHERE name IN ('headers', 'state:16')")
        rows = database.execute("SELECT content, frame, measures FROM slices").fetchall()
        for content, frame, measured in rows:
            short = json.dumps(json.loads(measured)[:4])
            database.execute(
                "UPDATE slices SET measures = ? WHERE content = ? AND frame = ?", (short, content, frame)
            )
        database.execute('UPDATE files SET slices = replace(slices, \'"bits"\', \'"SECRET": 1, "bits"\')')
        database.commit()
    monkeypatch.setattr("client.dicom.cache._decode", lambda *args: args[2] == [] or pytest.fail("decoded"))
    second = load_or_build(images, KEY, cache, 16)
    assert second.built
    kinds = [record.modality for record in first.intake.records]
    kept = zip(first.measures, kinds, strict=True)  # the MR signal is not at hand without decoding
    expected = [one if kind == "CT" else [*one[:4], 0.0, 0.0, 0.0, 0.0] for one, kind in kept]
    assert (second.fingerprint, second.measures) == (first.fingerprint, expected)
    assert set(kinds) == {"CT", "MR"}
    np.testing.assert_array_equal(second.images, first.images)
    assert b"SECRET" not in (cache / "store.sqlite3").read_bytes()


def test_the_database_keeps_no_day_and_no_free_text(tmp_path: Path) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    path = write(images / "a.dcm", 1)
    dataset = pydicom.dcmread(path)
    dataset.StudyDate, dataset.SeriesDescription = "20240319", "T1 of Mrs Smith"
    dataset.save_as(path)
    (record,) = load_or_build(images, KEY, cache, 16).intake.records
    assert (record.study_date, record.series_description) == ("20240301", "")
    kept = b"".join(one.read_bytes() for one in cache.glob("store.sqlite3*"))
    assert b"20240319" not in kept
    assert b"Smith" not in kept
    assert b"a.dcm" in kept  # to open it


def test_a_file_of_many_frames_is_read_in_pieces(tmp_path: Path) -> None:
    count = HEADERS_AT_ONCE + 50
    images = np.arange(count * 4, dtype=np.float32).reshape(count, 1, 4) % 1000
    own = [group(PlanePositionSequence=items(ImagePositionPatient=[0, 0, n])) for n in range(count)]
    (tmp_path / "images").mkdir()
    write_frames(tmp_path / "images/a.dcm", images, own=own)
    found = load_or_build(tmp_path / "images", KEY, tmp_path / "cache", 4)
    assert [record.frame for record in found.intake.records] == list(range(count))
    assert found.intake.share_quarantined == 0


def test_a_cache_is_opened_without_building_only_where_it_is_that_of_the_folder(tmp_path: Path) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    write(images / "1.dcm", 1)
    assert open_current(images, KEY, cache, 16) is None
    assert not cache.exists()
    built = load_or_build(images, KEY, cache, 16)
    opened = open_current(images, KEY, cache, 16)
    assert opened is not None
    assert opened.fingerprint == built.fingerprint
    assert open_current(images, KEY, cache, 32) is None
    held = {path.name: path.read_bytes() for path in cache.iterdir()}
    write(images / "2.dcm", 2)
    assert open_current(images, KEY, cache, 16) is None
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == held
