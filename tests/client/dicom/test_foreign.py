"""Files that were never images are excluded, not quarantined; tar is read as zip is."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.dicom.cache import load_or_build
from client.dicom.foreign import foreign_code
from client.dicom.index import Intake
from tests.helpers.dicom_files import write

KEY = bytes(range(32))
NIFTI = struct.pack("<i", 348) + bytes(340) + b"n+1\0" + bytes(400)
NUMPY = b"\x93NUMPY\x01\0v\0{'descr': '<f4'}" + bytes(400)
META_IMAGE = b"ObjectType = Image\nNDims = 3\nElementDataFile = LOCAL\n" + bytes(200)


def intake_of(root: Path, cache: Path) -> Intake:
    return load_or_build(root, KEY, cache, 16).intake


def codes(intake: Intake) -> dict[str, int]:
    return dict(Counter(problem.code for problem in (*intake.quarantined, *intake.excluded)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("AUTORUN.INF", b"[autorun]\r\nopen=v.exe\r\n", "foreign-file"),
        ("README", "Lies mich: für Ärzte".encode("latin-1"), "foreign-file"),
        ("读我.txt", "请双击".encode("gb18030"), "foreign-file"),
        ("notes.log", "\ufeffutf-16".encode("utf-16"), "foreign-file"),
        ("v.exe", b"MZ" + bytes(600), "foreign-file"),
        ("libqt.so", b"\x7fELF" + bytes(600), "foreign-file"),
        ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "foreign-file"),
        ("report.pdf", b"%PDF-1.4\n" + bytes(600), "foreign-file"),
        ("report.docx", b"PK\x03\x04" + bytes(600), "foreign-file"),
        ("index", b"SQLite format 3\0" + bytes(600), "foreign-file"),
        ("clip.mp4", b"\0\0\0\x18ftypmp42" + bytes(600), "foreign-file"),
        ("icon.ico", b"\0\0\x01\0\x01\0" + bytes(600), "foreign-file"),
        ("data.bin.lock", b"", "foreign-file"),
        ("im.jpg", b"\xff\xd8\xff\xe0" + bytes(600), "picture-file"),
        ("im", b"\x89PNG\r\n\x1a\n" + bytes(600), "picture-file"),
        ("im.bmp", b"BM" + bytes(600), "picture-file"),
        ("t1.nii", NIFTI, "volume-file"),
        ("t1.nii.gz", NIFTI, "volume-file"),
        ("a.npy", NUMPY, "volume-file"),
        ("a.mha", META_IMAGE, "volume-file"),
        ("a.nrrd", b"NRRD0004\ntype: short\n" + bytes(600), "volume-file"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(600), "unsupported-archive"),
        ("a.tar.bz2", b"BZh91AY" + bytes(600), "unsupported-archive"),
        # to be looked at: they were to be images, or nothing is known of them
        ("IM0001", bytes(600), None),
        ("IM0001.dcm", b"<html>404 not found</html>", None),
        ("IM0001.dcm", b"", None),
        ("IM0001", b"\x08\0\x05\0CS\x0a\0ISO_IR 100\x08\0\x08\0CS" + bytes(600), None),
        ("IM0001", bytes(np.random.default_rng(0).integers(0, 256, 900, np.uint8)), None),
    ],
)
def test_a_foreign_file_is_known_by_content_or_name(name: str, content: bytes, expected: str | None) -> None:
    assert foreign_code(f"folder/{name}", content[:4096]) == expected


def test_a_patient_cd_is_in_order(tmp_path: Path) -> None:
    root = tmp_path / "cd"
    (root / "DICOM").mkdir(parents=True)
    (root / "VIEWER").mkdir()
    for number in range(3):
        write(root / f"DICOM/IM{number}", np.full((8, 8), number))
    for name, content in {
        "README.TXT": b"hello\n",
        "AUTORUN.INF": b"[autorun]\n",
        "VIEWER/v.exe": b"MZ" + bytes(300),
        "VIEWER/help.html": b"<html></html>",
        "im.jpg": b"\xff\xd8\xff\xe0" + bytes(300),
        "t1.nii.gz": gzip.compress(NIFTI),
    }.items():
        (root / name).write_bytes(content)
    intake = intake_of(root, tmp_path / "cache")
    assert codes(intake) == {"foreign-file": 4, "picture-file": 1, "volume-file": 1}
    assert (intake.used, intake.share_quarantined) == (3, 0.0)


def test_the_storage_folder_of_orthanc_is_read(tmp_path: Path) -> None:
    """DICOM under UUIDs, as it is or compressed; beside it JSON, headers without pixels, the database."""
    root, number = tmp_path / "storage", 0

    def stored(content: bytes) -> None:
        nonlocal number
        number += 1
        name = str(uuid.UUID(int=number * 7919))
        path = root / name[:2] / name[2:4] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def compressed(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + zlib.compress(content)

    for value in range(4):
        dicom = write(
            tmp_path / "one.dcm", np.full((8, 8), value), SOPInstanceUID=f"1.2.{value}"
        ).read_bytes()
        stored(compressed(dicom) if value % 2 else dicom)
        stored(dicom[: dicom.rindex(struct.pack("<HH", 0x7FE0, 0x0010) + b"OW")])  # DicomUntilPixelData
        sidecar = json.dumps({"0008,0005": {"Name": "SpecificCharacterSet"}}).encode()
        stored(compressed(sidecar) if value % 2 else sidecar)
    (root / "index").write_bytes(b"SQLite format 3\0" + bytes(300))
    (root / "index-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(300))
    intake = intake_of(root, tmp_path / "cache")
    assert codes(intake) == {"foreign-file": 10}
    assert intake.used == 4


def tar_of(
    path: Path, mode: str, members: dict[str, bytes], change: Callable[..., None] | None = None
) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change:
                change(info)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("bin", "w:gz")]
)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_file_of_a_tar_archive_counts(tmp_path: Path, suffix: str, mode: str, form: int) -> None:
    dicom = [
        write(tmp_path / "x", np.full((8, 8), n), SOPInstanceUID=f"1.2.{n}").read_bytes() for n in range(3)
    ]
    root = tmp_path / "images"
    root.mkdir()
    members = {f"study/{'long' * 20}/{n}.dcm": content for n, content in enumerate(dicom)}
    members |= {
        "README.txt": b"hello",
        "._hidden": b"x",
        "../../etc/passwd": b"x",
        "/abs": b"x",
        "in.zip": b"PK\x03\x04" + bytes(600),
    }
    with tarfile.open(root / f"a.{suffix}", mode, format=form) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    intake = intake_of(root, tmp_path / "cache")
    assert codes(intake) == {"foreign-file": 1, "unsafe-path": 3, "nested-archive": 1}
    assert intake.used == 3
    assert {record.file.rpartition("/")[2] for record in intake.records} == {"0.dcm", "1.dcm", "2.dcm"}


def test_a_damaged_or_empty_tar_archive_is_one_file(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    whole = tar_of(tmp_path / "w", "w", {"a": bytes(3000), "b": bytes(3000)}).read_bytes()
    (root / "cut.tar").write_bytes(whole[:4000])
    (root / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-20])
    tar_of(root / "hidden.tar", "w", {".x": b"x"})
    intake = intake_of(root, tmp_path / "cache")
    assert intake.found == 3
    assert set(codes(intake)) <= {"bad-archive", "empty-archive", "truncated", "not-dicom"}
    assert not intake.used


def test_a_member_of_negative_size_does_not_hang(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    archive = bytearray(tar_of(tmp_path / "w", "w", {"a": bytes(3000)}).read_bytes())
    archive[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base 256, negative
    archive[148:156] = b" " * 8
    archive[148:156] = f"{sum(archive[:512]):06o}\0 ".encode()
    (root / "a.tar").write_bytes(archive)
    assert codes(intake_of(root, tmp_path / "cache")) == {"bad-archive": 1}


def test_a_compressed_tar_above_the_limit_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.dicom.sources.FREE_EXPANSION_BYTES", 1 << 16)
    root = tmp_path / "images"
    root.mkdir()
    tar_of(root / "a.tar.gz", "w:gz", {"a": bytes(8 << 20)})
    assert codes(intake_of(root, tmp_path / "cache")) == {"too-large": 1}
