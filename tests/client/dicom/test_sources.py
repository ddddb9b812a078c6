"""Every file is found and accounted for, on the disk and in archives; nothing is followed out, and nothing
expands without a limit.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import socket
import stat
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from client.dicom import sources
from client.dicom.sources import ARCHIVE_CODES, Source, expand_archives, find_files, open_source
from common.errors import ImagingError

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")

CODES = set(ARCHIVE_CODES) | {"too-large", "truncated", "changed", "unreadable"}
IMAGE = bytes(128) + b"DICM" + random.Random(0).randbytes(5000)


def find_sources(root: Path) -> list[Source]:
    return expand_archives(find_files(root))


def content(source: Source) -> bytes:
    with open_source(source) as (stream, size):
        data = stream.read()
        assert len(data) == size
        stream.seek(100)
        assert stream.read(50) == data[100:150]
    return data


def code_of(source: Source) -> str:
    with pytest.raises(ImagingError) as caught, open_source(source):
        pass
    assert caught.value.code in CODES
    assert caught.value.hint
    return caught.value.code


def listed(root: Path) -> dict[str, str]:
    found = find_sources(root)
    assert [source.number for source in found] == list(range(1, len(found) + 1))
    assert [source.file for source in found] == sorted(source.file for source in found)
    return {source.file: source.problem for source in found}


def zipped(
    path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data, None if isinstance(name, str) else method)
    return path


def entry(name: str, **fields: Any) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def patched(path: Path, record: bytes, offset: int, value: bytes, *, which: int = 0) -> Path:
    """Overwrite bytes at `offset` of the n-th record with this signature."""
    data, at = bytearray(path.read_bytes()), -1
    for _ in range(which + 1):
        at = data.index(record, at + 1)
    data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)
    return path


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder in which permissions count: root may read everything."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield root
    finally:
        os.seteuid(user)
        for folder, _, _ in os.walk(root):
            Path(folder).chmod(0o777)
        shutil.rmtree(root)


# ---- on the disk


def test_d14_what_is_not_followed_is_counted(tmp_path: Path) -> None:
    root, outside = tmp_path / "images", tmp_path / "outside.dcm"
    (root / "deep").mkdir(parents=True)
    outside.write_bytes(IMAGE)
    for name in ("b.dcm", "a.dcm", "deep/c"):
        (root / name).write_bytes(IMAGE)
    os.mkfifo(root / "pipe")
    links = {
        "out.dcm": outside,
        "self": root / "self",
        "up": tmp_path,
        "loop": root,
        "deep/folder": root / "deep",
        "nowhere": root / "x",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "same.dcm").symlink_to(root / "a.dcm")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket"))
        found = listed(root)
    good = {"a.dcm", "b.dcm", "deep/c", "same.dcm"}
    assert found == dict.fromkeys(good, "") | dict.fromkeys([*links, "pipe", "socket"], "unsafe-path")
    by_name = {source.file: source for source in find_sources(root)}
    assert all(content(by_name[name]) == IMAGE for name in good)
    assert {code_of(source) for source in by_name.values() if source.problem} == {"unsafe-path"}


def test_a_link_to_the_root_itself_is_no_link_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a").write_bytes(IMAGE)
    (tmp_path / "images/b").symlink_to(tmp_path / "images/a")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert listed(tmp_path / "link") == {"a": "", "b": ""}
    assert [content(source) for source in find_sources(tmp_path / "link")] == [IMAGE, IMAGE]


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in (".DS_Store", "._a.dcm", ".git/b.dcm", "a.dcm"):
        (tmp_path / name).write_bytes(IMAGE)
    zipped(
        tmp_path / "z", (".DS_Store", b"x"), ("__MACOSX/a/._1", b"x"), ("a/.svn/x", b"x"), ("./a/1", IMAGE)
    )
    assert listed(tmp_path) == {"a.dcm": "", "z!/a/1": ""}


def test_what_may_not_be_read_is_counted_and_the_rest_goes_on() -> None:
    with as_nobody() as root:
        for folder in ("closed", "open"):
            (root / folder).mkdir()
            (root / folder / "1").write_bytes(IMAGE)
        (root / "2").write_bytes(IMAGE)
        (root / "2").chmod(0)
        (root / "closed").chmod(0)
        assert listed(root) == {"2": "unreadable", "closed": "unreadable", "open/1": ""}
        (root / "closed").chmod(0o400)  # names, and nothing about them
        assert listed(root) == {"2": "unreadable", "closed/1": "unreadable", "open/1": ""}
        closed_later = next(source for source in find_sources(root) if source.file == "open/1")
        (root / "open/1").chmod(0)
        assert code_of(closed_later) == "unreadable"


def test_a_root_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ImagingError) as caught:
            find_sources(root)
        assert caught.value.code == "unreadable"


def test_an_unchanged_folder_is_listed_without_opening_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(IMAGE)
    zipped(tmp_path / "z", ("1", IMAGE))
    before = find_files(tmp_path)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    assert find_files(tmp_path) == before
    assert [(source.file, source.path, source.size_bytes) for source in before] == [
        (name, tmp_path / name, (tmp_path / name).stat().st_size) for name in ("a", "z")
    ]


def test_a_plain_file_above_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as stream:
        stream.truncate(sources.MAX_FILE_BYTES + 1)
    assert listed(tmp_path) == {"a": "too-large"}


def test_names_that_are_not_text(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.dcm")).write_bytes(IMAGE)
    (source,) = find_sources(tmp_path)
    assert content(source) == IMAGE
    assert tmp_path / source.file == source.path


# ---- changes


def test_d18_a_file_that_changed_after_it_was_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(IMAGE)
    (source,) = find_sources(tmp_path)
    assert content(source) == IMAGE
    os.utime(path, ns=(1, 1))
    assert code_of(source) == "changed"
    path.write_bytes(IMAGE + b"\0")
    os.utime(path, ns=(source.mtime_ns, source.mtime_ns))
    assert code_of(source) == "changed"
    path.unlink()
    assert code_of(source) == "changed"
    path.symlink_to("/etc/hostname")
    assert code_of(source) == "unsafe-path"
    path.unlink()
    os.mkfifo(path)
    assert code_of(source) == "unsafe-path"


def test_d18_a_file_that_changes_while_it_is_open(tmp_path: Path) -> None:
    def read_while_it_grows(source: Source) -> None:
        with open_source(source) as (stream, _):
            stream.read(10)
            with source.path.open("ab") as more:
                more.write(b"\0")
            os.utime(source.path, ns=(source.mtime_ns, source.mtime_ns))

    (tmp_path / "a").write_bytes(IMAGE)
    zipped(tmp_path / "z", ("1", IMAGE))
    for source in find_sources(tmp_path):
        with pytest.raises(ImagingError) as caught:
            read_while_it_grows(source)
        assert caught.value.code == "changed"


def test_an_error_of_the_reader_is_not_disguised(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(IMAGE)
    (source,) = find_sources(tmp_path)
    with pytest.raises(OSError, match="disk full"), open_source(source):
        raise OSError("disk full")


def test_a_file_that_goes_between_the_two_looks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(IMAGE)
    files = find_files(tmp_path)
    (tmp_path / "a").unlink()
    assert [source.problem for source in expand_archives(files)] == ["changed", ""]


# ---- archives as they should be


def test_each_file_in_an_archive_counts_and_the_archive_does_not(tmp_path: Path) -> None:
    members = [(f"s{number % 2}/{number}.dcm", IMAGE + bytes([number])) for number in range(4)]
    (tmp_path / "0").write_bytes(IMAGE)
    zipped(tmp_path / "study.bin", ("s0/", b""), *members)
    found = find_sources(tmp_path)
    assert [source.file for source in found] == ["0", *sorted(f"study.bin!/{name}" for name, _ in members)]
    assert {source.file.partition("!/")[2]: content(source) for source in found[1:]} == dict(members)
    assert all(source.size_bytes == len(IMAGE) + 1 for source in found[1:])
    assert {source.path for source in found[1:]} == {tmp_path / "study.bin"}
    assert find_sources(tmp_path) == found
    assert Source(**asdict(found[1])) == found[1]  # it can travel to a worker as it is


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 1, 150, 3_000_000])
def test_stored_and_deflated_members(tmp_path: Path, method: int, size: int) -> None:
    datas = [random.Random(1).randbytes(size), bytes(size)]
    zipped(tmp_path / "z", *[(str(number), data) for number, data in enumerate(datas)], method=method)
    for source, data in zip(find_sources(tmp_path), datas, strict=True):
        with open_source(source) as (stream, count):
            assert (stream.read(), count) == (data, size)


def test_archives_written_as_a_stream_and_with_64_bit_sizes(tmp_path: Path) -> None:
    class OneWay(io.RawIOBase):
        """A pipe: sizes and checksums come after the data."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

    pipe = OneWay()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
        archive.writestr("a", IMAGE)
        with archive.open("b", "w", force_zip64=True) as member:
            member.write(IMAGE)
    assert b"PK\x07\x08" in pipe.data
    (tmp_path / "z").write_bytes(pipe.data)
    assert [content(source) for source in find_sources(tmp_path)] == [IMAGE, IMAGE]


def test_a_large_archive_is_not_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", len(IMAGE))
    zipped(tmp_path / "z", *[(str(number), IMAGE) for number in range(5)], ("big", IMAGE + b"\0"))
    assert sorted(listed(tmp_path).values()) == ["", "", "", "", "", "too-large"]


def test_gzip_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(gzip.compress(IMAGE))
    (tmp_path / "b").write_bytes(gzip.compress(IMAGE[:1000]) + gzip.compress(IMAGE[1000:]) + bytes(512))
    found = find_sources(tmp_path)
    assert [source.file for source in found] == ["a.dcm", "b"]
    assert [content(source) for source in found] == [IMAGE, IMAGE]
    assert found[0].size_bytes == (tmp_path / "a.dcm").stat().st_size


def test_the_content_tells_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "plain.zip").write_bytes(IMAGE)
    (tmp_path / "plain.gz").write_bytes(b"PK")
    (tmp_path / "empty.zip").touch()
    for number, signature in enumerate((LOCAL, b"PK\x05\x06", b"\x1f\x8b\x08")):
        (tmp_path / f"preamble{number}").write_bytes(signature.ljust(128, b"\0") + b"DICM" + IMAGE)
    found = find_sources(tmp_path)
    assert all(not source.problem and not source.member for source in found)
    for source in found:
        with open_source(source) as (stream, _):
            assert stream.read() == source.path.read_bytes()


def test_a_document_or_a_program_is_one_file(tmp_path: Path) -> None:
    zipped(tmp_path / "report.docx", ("[Content_Types].xml", b"<x/>"), ("word/document.xml", b"<x/>"))
    zipped(tmp_path / "table.ods", ("mimetype", b"application"), ("content.xml", b"<x/>"))
    zipped(tmp_path / "viewer.jar", ("META-INF/MANIFEST.MF", b"Main-Class: x"), ("x.class", b"x"))
    assert listed(tmp_path) == {"report.docx": "", "table.ods": "", "viewer.jar": ""}


# ---- names inside archives


def test_names_in_the_charsets_of_hospitals(tmp_path: Path) -> None:
    zipped(tmp_path / "utf8", ("头部/1", IMAGE))
    for name, charset in (("gbk", "gbk"), ("utf8_unsaid", "utf-8")):
        path = zipped(tmp_path / name, ("x" * len("头部/1".encode(charset)), IMAGE))
        path.write_bytes(
            path.read_bytes().replace(b"x" * len("头部/1".encode(charset)), "头部/1".encode(charset))
        )
    assert set(listed(tmp_path)) == {"utf8!/头部/1", "gbk!/头部/1", "utf8_unsaid!/头部/1"}
    assert all(content(source) == IMAGE for source in find_sources(tmp_path))


def test_names_are_printable_and_unique(tmp_path: Path) -> None:
    names = [
        "a\x1b[2Jb",
        "a\nb",
        "a\u202eb",
        "same",
        "same",
        "same",
        "same#2",
        "./same",
        "a\\b",
        "a/b",
        "é",
        " ",
        "C",
    ]
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(tmp_path / "z", *[(name, f"{number}".encode() * 200) for number, name in enumerate(names)])
    (tmp_path / "z!").mkdir()
    (tmp_path / "z!/same").write_bytes(IMAGE)
    found = find_sources(tmp_path)
    assert len(found) == len({source.file for source in found}) == len(names) + 1
    assert all(source.file.isprintable() for source in found)
    members = {content(source) for source in found if source.member}
    assert members == {f"{number}".encode() * 200 for number in range(len(names))}
    assert [source.path for source in found if source.file == "z!/same"] == [tmp_path / "z!/same"]


def test_many_members_of_one_name_cost_no_more_than_others(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "z", *[(f"{number:05}", b"") for number in range(20_000)], method=zipfile.ZIP_STORED
    )
    data = bytearray(path.read_bytes())
    at = data.find(CENTRAL)
    while at >= 0:
        data[at + 46 : at + 51] = b"00000"
        at = data.find(CENTRAL, at + 46)
    path.write_bytes(data)
    assert len({source.file for source in find_sources(tmp_path)}) == 20_000


@pytest.mark.parametrize(
    "name", ["../up", "a/../../up", "/etc/passwd", "..\\up", "C:\\up", "c:up", "//server/share", "..", "a/.."]
)
def test_a_name_that_leads_out_of_its_archive(tmp_path: Path, name: str) -> None:
    zipped(tmp_path / "z", (entry(name), IMAGE), ("good", IMAGE))
    assert sorted(listed(tmp_path).values()) == ["", "unsafe-path"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_member_that_is_no_regular_file(tmp_path: Path, kind: int) -> None:
    zipped(
        tmp_path / "z", (entry("link", external_attr=(kind | 0o777) << 16), b"/etc/passwd"), ("good", IMAGE)
    )
    assert listed(tmp_path) == {"z!/good": "", "z!/link": "unsafe-path"}


# ---- archives as they should not be


def test_an_encrypted_member(tmp_path: Path) -> None:
    patched(zipped(tmp_path / "z", ("a", IMAGE), ("b", IMAGE)), CENTRAL, 8, b"\1\0")
    assert listed(tmp_path) == {"z!/a": "encrypted", "z!/b": ""}


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_method_other_than_deflate(tmp_path: Path, method: int) -> None:
    zipped(tmp_path / "z", ("a", IMAGE), method=method)
    assert listed(tmp_path) == {"z!/a": "unsupported-archive"}


@pytest.mark.parametrize("hidden", [(), (".a", "b/.c")])
def test_an_archive_without_a_file_is_not_lost(tmp_path: Path, hidden: tuple[str, ...]) -> None:
    zipped(tmp_path / "z", ("folder/", b""), *[(name, b"x") for name in hidden])
    zipped(tmp_path / "empty")
    assert listed(tmp_path) == {"empty": "empty-archive", "z": "empty-archive"}


def test_an_archive_inside_an_archive_is_not_opened(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner", ("a", IMAGE)).read_bytes()
    (tmp_path / "inner").unlink()
    zipped(tmp_path / "z", ("zip", inner), ("gzip", gzip.compress(IMAGE)))
    (tmp_path / "y").write_bytes(gzip.compress(inner))
    (tmp_path / "x").write_bytes(gzip.compress(gzip.compress(IMAGE)))
    assert [code_of(source) for source in find_sources(tmp_path)] == ["nested-archive"] * 4


def test_members_that_share_their_bytes(tmp_path: Path) -> None:
    """A few bytes that claim to be many files, as in Fifield's bomb of 2019; the member that stands alone is
    read.
    """
    path = zipped(tmp_path / "z", ("a", IMAGE), ("b", IMAGE), ("c", IMAGE), ("d", IMAGE))
    second = path.read_bytes().index(LOCAL, 4)
    for which in (2, 3):
        patched(path, CENTRAL, 42, struct.pack("<I", second), which=which)
    assert listed(tmp_path) == {
        "z!/a": "",
        "z!/b": "bad-archive",
        "z!/c": "bad-archive",
        "z!/d": "bad-archive",
    }


def test_a_member_that_reaches_into_the_table_of_contents(tmp_path: Path) -> None:
    path = zipped(tmp_path / "z", ("a", IMAGE), ("b", IMAGE), method=zipfile.ZIP_STORED)
    patched(path, CENTRAL, 20, struct.pack("<II", len(IMAGE) + 90, len(IMAGE) + 90), which=1)
    assert listed(tmp_path) == {"z!/a": "", "z!/b": "bad-archive"}


def test_a_declared_bomb(tmp_path: Path) -> None:
    path = zipped(tmp_path / "z", ("a", bytes(1000)), ("b", IMAGE))
    patched(path, CENTRAL, 24, struct.pack("<I", sources.FREE_EXPANSION_BYTES))
    assert listed(tmp_path) == {"z!/a": "", "z!/b": ""}
    patched(path, CENTRAL, 24, struct.pack("<I", sources.FREE_EXPANSION_BYTES + 1))
    assert listed(tmp_path) == {"z!/a": "too-large", "z!/b": ""}
    patched(path, CENTRAL, 24, struct.pack("<I", sources.MAX_FILE_BYTES + 1), which=1)
    assert listed(tmp_path) == {"z!/a": "too-large", "z!/b": "too-large"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_comes_out_counts_and_not_what_is_declared(tmp_path: Path, method: int) -> None:
    path = zipped(tmp_path / "z", ("less", IMAGE), ("more", IMAGE), ("other", IMAGE), method=method)
    data = path.read_bytes()
    crc = data.index(CENTRAL) + 16
    for which, size in enumerate((len(IMAGE) + 1, len(IMAGE) - 1)):
        patched(path, CENTRAL, 24, struct.pack("<I", size), which=which)
    patched(path, CENTRAL, 16, bytes(byte ^ 255 for byte in data[crc : crc + 4]), which=2)
    assert [code_of(source) for source in find_sources(tmp_path)] == [
        "truncated",
        "bad-archive",
        "bad-archive",
    ]


def test_a_bomb_that_declares_little_stays_little(tmp_path: Path) -> None:
    path = zipped(tmp_path / "z", ("a", bytes(200 << 20)))
    patched(path, CENTRAL, 24, struct.pack("<I", 1000))
    (source,) = find_sources(tmp_path)
    assert not source.problem
    tracemalloc.start()
    try:
        assert code_of(source) == "bad-archive"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_stops_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FREE_EXPANSION_BYTES", 4 << 20)
    for name, count in (("a", 4 << 20), ("b", 80 << 20), ("c", (4 << 20) + 1)):
        (tmp_path / name).write_bytes(gzip.compress(bytes(count)))
    (tmp_path / "d").write_bytes(gzip.compress(bytes(1 << 20)) * 5)
    tracemalloc.start()
    try:
        fits, *bombs = find_sources(tmp_path)
        assert [code_of(source) for source in bombs] == ["too-large"] * 3
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    with open_source(fits) as (_, size):
        assert size == 4 << 20


def test_limits_of_a_whole_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path / "z", *[(str(number), IMAGE) for number in range(4)])
    assert len(find_sources(tmp_path)) == 4
    for name, limit in (
        ("MAX_MEMBERS", 3),
        ("MAX_ARCHIVE_BYTES", 4 * len(IMAGE) - 1),
        ("MAX_DIRECTORY_BYTES", 100),
    ):
        with monkeypatch.context() as context:
            context.setattr(sources, name, limit)
            assert listed(tmp_path) == {"z": "too-large"}, name


@pytest.mark.parametrize("keep", [4, 100, -30, -1])
def test_a_cut_archive_is_one_bad_file(tmp_path: Path, keep: int) -> None:
    path = zipped(tmp_path / "z", ("a", IMAGE), ("b", IMAGE))
    path.write_bytes(path.read_bytes()[:keep])
    assert listed(tmp_path) == {"z": "bad-archive"}


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda data: data[:-9], "truncated"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:4], "truncated"),
        (lambda data: data + b"more", "bad-archive"),
        (lambda data: data[:-8] + bytes(8), "bad-archive"),
        (lambda data: data[:2] + b"\x07" + data[3:], "bad-archive"),
        (lambda data: data[:10] + b"\xff" * 20 + data[30:], "bad-archive"),
    ],
)
def test_a_damaged_gzip_file(tmp_path: Path, damage: Any, code: str) -> None:
    (tmp_path / "a").write_bytes(damage(gzip.compress(IMAGE)))
    (source,) = find_sources(tmp_path)
    assert code_of(source) == code


@pytest.mark.parametrize("damage", ["moved", "cut"])
def test_an_archive_that_was_replaced_under_its_old_date(tmp_path: Path, damage: str) -> None:
    path = zipped(tmp_path / "z", ("a", IMAGE), ("b", IMAGE))
    first, second = find_sources(tmp_path)
    data = path.read_bytes()
    path.write_bytes(b"\0" + data if damage == "moved" else data[:600])
    os.utime(path, ns=(first.mtime_ns, first.mtime_ns))
    assert [code_of(first), code_of(second)] == (
        ["bad-archive"] * 2 if damage == "moved" else ["truncated", "bad-archive"]
    )


def test_no_damage_to_an_archive_is_more_than_a_code(tmp_path: Path) -> None:
    path, rng = tmp_path / "z", random.Random(5)
    good = zipped(path, ("a", bytes(3000)), ("b/c", IMAGE), ("d", IMAGE), ("e/", b"")).read_bytes()
    zipped_and_gzipped = (good, gzip.compress(IMAGE + bytes(3000)))
    codes: set[str] = set()
    read = 0
    for turn in range(1500):
        data = bytearray(zipped_and_gzipped[turn % 2])
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.randrange(len(data)) if turn % 4 < 2 else max(0, len(data) - rng.randrange(1, 300))
            data[place] = rng.choice((0, 255, rng.randrange(256)))
        path.write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(1, len(data))])
        found = find_sources(tmp_path)
        assert found
        for source in found:
            try:
                with open_source(source) as (stream, size):
                    assert len(stream.read()) == size
                    read += 1
            except ImagingError as error:
                codes.add(error.code)
    assert codes <= CODES
    assert {"bad-archive", "truncated"} <= codes
    assert read > 300


def test_every_code_has_its_explanation() -> None:
    assert all(len(line) > 20 for line in ARCHIVE_CODES.values())
    problem = Source(number=1, file="a", path=Path("a"), size_bytes=1, mtime_ns=1, problem="encrypted")
    assert code_of(problem) == "encrypted"
    assert code_of(replace(problem, problem="unsafe-path")) == "unsafe-path"


@needs_real_data
def test_real_files_come_out_of_an_archive_as_they_went_in(tmp_path: Path) -> None:
    root = Path(str(REAL)) / "awkward"
    plain = find_sources(root)
    assert not [source.file for source in plain if source.problem or source.member]
    with zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as archive:
        for source in plain:
            archive.write(source.path, source.file)
    packed = find_sources(tmp_path)
    assert [source.file for source in packed] == [f"z!/{source.file}" for source in plain]
    for one, other in zip(plain, packed, strict=True):
        with open_source(one) as (stream, size), open_source(other) as (expanded, count):
            assert size == count
            assert stream.read() == expanded.read()
