"""List the files of a folder of images, also inside zip and tar archives, and read their bytes.

The account is complete: what is not followed or cannot be read is a `Source` too, with the code of its
problem. Two kinds of entry are left out on purpose: hidden ones (a file or folder whose name begins with a
dot: `.DS_Store`, `._x`, an editor's swap file), on the disk and inside an archive, and folders, which count
    through what they hold.

Archives are known by their content, never by their name. Each file inside a zip or tar archive counts, the
archive itself does not; a gzip file is one file, unless a tar archive is in it. A compressed tar archive can
only be read from its beginning, so it is expanded into memory, once in each process, up to the limit of one
file; an attachment that Orthanc compressed is expanded as a gzip file is. Nothing is unpacked onto a disk:
what was compressed lives in memory, within limits that hold against what really comes out of the
decompressor, whatever the archive says about itself.

Reference: PKWARE APPNOTE 6.3.10 (4.3.7 local header, 4.4 fields), RFC 1951 (deflate), RFC 1952 (gzip),
    POSIX.1 (ustar, pax).
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from client.dicom.foreign import compressed_length, is_uuid
from common.errors import ImagingError

ARCHIVE_CODES: dict[str, str] = {
    "unsafe-path": (
        "a link, pipe, socket or device, which is not followed; or a name that leads out of its archive"
    ),
    "encrypted": "a file inside an archive that is protected by a password",
    "bad-archive": "a zip, tar or gzip archive that is damaged, or that contradicts itself",
    "empty-archive": "an archive without a file in it",
    "nested-archive": "an archive inside an archive",
    "unsupported-archive": ("packed by a method other than deflate (bzip2, xz, zstd, 7z, RAR); unpack it"),
}
_HINTS = ARCHIVE_CODES | {
    "too-large": "above the limit for a file or an archive; unpack a large archive before reading it",
    "truncated": "the file ends before its content does",
    "changed": "the file changed after it was found; read the folder again",
    "unreadable": "give this user read permission",
}

MAX_FILE_BYTES = 512 << 20  # one file, compressed or not
MAX_MEMBERS = 100_000  # of an archive; as many slices as a large cohort has
MAX_ARCHIVE_BYTES = 64 << 30  # of an archive, expanded: 100,000 slices of 0.6 MiB
MAX_DIRECTORY_BYTES = 32 << 20  # an archive's table of contents: 100,000 members with names of 250 characters
# Deflate can reach 1000:1; images reach 2:1 to 5:1, empty ones 100:1. Small files may do as they like: they
# cannot hurt.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 64 << 20

_BLOCK = 1 << 20
_HEAD = 132  # the DICOM preamble and "DICM"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # a first member, or the end of an empty table of contents
_GZIP = b"\x1f\x8b"
_TAR_BLOCK = 512
_TAR, _TAR_GZ = "tar", "tgz"  # of a member: how its archive is packed
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_ENCRYPTED, _PATCHED, _UTF8 = 0x0001 | 0x0040 | 0x2000, 0x0020, 0x0800  # bits of a member's flags
# A document or a program (a viewer on a patient's CD) that happens to be a zip: one file, not hundreds.
_DOCUMENT_MARKS = frozenset({"[Content_Types].xml", "mimetype", "META-INF/MANIFEST.MF"})
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file to account for: on the disk, or inside an archive. Only `number` and `problem` may be
    shown.
    """

    number: int  # place in the list, from 1
    # relative to the root, with forward slashes; unique; "study.zip!/a/b.dcm" inside an archive. Never
    # leaves the hospital
    file: str
    path: Path  # the file on the disk; of a link, what it leads to
    member: str = (
        ""  # where it lies in the archive: "offset:packed bytes:method:CRC-32", or "offset:bytes:tar" (:tgz,
        # in the expanded archive); "" for a file on the disk
    )
    size_bytes: int  # on the disk; inside an archive, expanded, as the archive declares it
    mtime_ns: int  # of the file on the disk
    problem: str = ""  # a code, where it is known without reading that the file cannot be used


def find_files(root: Path, *, only: str = "") -> list[Source]:
    """Every entry on the disk below `root` that is to be accounted for, sorted by `file`, archives not looked
    into. No file is opened.

    This is what tells whether a folder changed. A file that a link below `root` leads to counts twice, under
    both names. A link that leads elsewhere, to a folder or nowhere, a pipe, a socket or a device is not
    followed: `unsafe-path`. A folder that cannot be listed stands for its files: `unreadable`.
    Args:
        only: the name of one file or folder in `root`; nothing else is looked at.
    Raises:
        ImagingError: `unreadable`, the folder `root` itself cannot be listed.
    """
    found: list[Source] = []
    inside = os.path.join(os.path.realpath(root), "")
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            if not prefix:
                raise _refuse(
                    "unreadable", f"{folder}: cannot list the folder ({type(error).__name__})"
                ) from None
            found.append(
                Source(
                    number=0,
                    file=prefix[:-1],
                    path=Path(folder),
                    size_bytes=0,
                    mtime_ns=0,
                    problem=_problem_of(error),
                )
            )
            continue
        for entry in entries:
            if entry.name.startswith(".") or (only and not prefix and entry.name != only):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    found.append(_on_disk(entry, prefix + entry.name, inside))
            except OSError as error:
                problem = _problem_of(error)
                found.append(
                    Source(
                        number=0,
                        file=prefix + entry.name,
                        path=Path(entry.path),
                        size_bytes=0,
                        mtime_ns=0,
                        problem=problem,
                    )
                )
    return _numbered(found)


def expand_archives(files: Sequence[Source]) -> list[Source]:
    """The same files with every zip archive among them replaced by the files it holds, sorted and numbered
    anew.

    An archive that cannot be read, or is above a limit as a whole, stays as one source with its problem.
    Args:
        files: from `find_files`.
    """
    found: list[Source] = []
    for source in files:
        found += [source] if source.problem else _looked_into(source)
    return _numbered(found)


@contextmanager
def open_source(source: Source) -> Iterator[tuple[BinaryIO, int]]:
    """The content of one source: a stream that can seek, and its size in bytes. Compressed content is
    expanded, into memory.

    A file that is on the disk as it is stays there, and is checked again at the end: nobody may change it
    while it is read.
    Raises:
        ImagingError: the source's own problem; `changed` (since it was found, or while open), `too-large`,
            `truncated`, `bad-archive`, `nested-archive`, `unsafe-path`, `unreadable`.
    """
    if source.problem:
        raise _refuse(source.problem, f"{source.path}: {_HINTS.get(source.problem, source.problem)}")
    with _opened(source.path) as stream:
        before = os.fstat(stream.fileno())
        if before.st_mtime_ns != source.mtime_ns or (
            not source.member and before.st_size != source.size_bytes
        ):
            raise _refuse("changed", f"{source.path}: not as it was found")
        content = _expanded(stream, source)
        yield (stream, before.st_size) if content is None else (content, content.getbuffer().nbytes)
        after = os.fstat(stream.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _refuse("changed", f"{source.path}: it changed while it was read")


def _refuse(code: str, message: str) -> ImagingError:
    return ImagingError(message, code=code, hint=_HINTS.get(code, ""))


def _problem_of(error: OSError) -> str:
    """A file that was there a moment ago and is not now has changed; everything else is for the operator to
    permit or repair.
    """
    return "changed" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable"


def _numbered(sources: Iterable[Source]) -> list[Source]:
    """Sorted by name, each name made unique, numbered from 1. A file on the disk keeps its name: it is how it
    is found again.
    """
    ordered = sorted(sources, key=lambda source: (source.file, source.member != "", source.member))
    taken = {source.file for source in ordered if not source.member}
    copies: Counter[str] = Counter()
    numbered: list[Source] = []
    for number, source in enumerate(ordered, start=1):
        file = source.file
        if source.member:
            while file in taken:
                copies[source.file] += 1
                file = f"{source.file}#{copies[source.file] + 1}"
            taken.add(file)
        numbered.append(
            source
            if (source.number, source.file) == (number, file)
            else replace(source, number=number, file=file)
        )
    return numbered


def _on_disk(entry: os.DirEntry[str], file: str, inside: str) -> Source:
    """The source of one directory entry that is no folder; OSError where its state cannot be read."""
    path, state = entry.path, entry.stat(follow_symlinks=False)
    regular = stat.S_ISREG(state.st_mode)
    if stat.S_ISLNK(state.st_mode):
        target = os.path.realpath(path)
        if target.startswith(inside) and stat.S_ISREG((behind := _state_of(target) or state).st_mode):
            path, state, regular = target, behind, True
    problem = "" if regular else "unsafe-path"
    return Source(
        number=0,
        file=file,
        path=Path(path),
        size_bytes=state.st_size,
        mtime_ns=state.st_mtime_ns,
        problem=problem,
    )


def _state_of(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open. A pipe must not block us, and what turned into a link after it was found is not
    followed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        state = _state_of(str(path))
        code = "unsafe-path" if state is not None and not stat.S_ISREG(state.st_mode) else _problem_of(error)
        raise _refuse(code, f"{path}: cannot be opened ({type(error).__name__})") from None
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refuse("unsafe-path", f"{path}: not a regular file any more")
        yield stream


def _is_archive(head: bytes) -> bool:
    """By the first bytes. A DICOM file may carry anything in its preamble, also another format's signature:
    it stays a DICOM file.
    """
    return head.startswith((*_ZIP, _GZIP)) and head[128:132] != b"DICM"


def _looked_into(source: Source) -> list[Source]:
    """The members of a zip or tar archive; of any other file, itself."""
    try:
        with _opened(source.path) as stream:
            head = stream.read(_TAR_BLOCK)
            if _is_archive(head) and not head.startswith(_GZIP):
                return _members(source, stream.fileno())
            if _is_tar(head):
                stream.seek(0)
                return _tar_members(source, stream, _TAR)
            if _is_archive(head):
                stream.seek(0)
                with gzip.GzipFile(fileobj=stream) as inflater:
                    if _is_tar(_beginning(inflater)):
                        return _tar_gz_members(source, stream)
    except ImagingError as error:
        return [replace(source, problem=error.code)]
    except OSError as error:
        return [replace(source, problem=_problem_of(error))]
    return [replace(source, problem="too-large")] if source.size_bytes > MAX_FILE_BYTES else [source]


def _is_tar(head: bytes) -> bool:
    """By the checksum of the first header, which tar archives of all kinds have. A DICOM file stays one."""
    if len(head) < _TAR_BLOCK or head[128:132] == b"DICM" or not head[0]:
        return False
    try:
        stated = int(head[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    return stated == sum(head[:148]) + 8 * 32 + sum(head[156:_TAR_BLOCK])


def _beginning(inflater: gzip.GzipFile) -> bytes:
    """The first block of a gzip file, or nothing where it is damaged, which reading it will tell."""
    try:
        return inflater.read(_TAR_BLOCK)
    except (OSError, EOFError, zlib.error):
        return b""


def _tar_gz_members(source: Source, stream: BinaryIO) -> list[Source]:
    """The members of a compressed tar archive.

    Raises:
        ImagingError: `too-large`, above the limit of one file when expanded; as `_tar_members`.
    """
    stream.seek(0)
    try:
        content = _expanded_gzip(stream, source)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise _refuse("bad-archive", f"{source.path}: the compressed data is damaged") from None
    assert content is not None
    content.seek(0)
    return _tar_members(source, content, _TAR_GZ)


class _Entry(tarfile.TarInfo):
    """A member of a tar archive whose size is not negative: the standard library would read such a one again
    and again (CVE-2025-8194).
    """

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("negative size")
        return int(super()._block(count))  # type: ignore[misc]


def _tar_members(source: Source, stream: BinaryIO, packing: str) -> list[Source]:
    """One source for each file in a tar archive.

    Raises:
        ImagingError: `bad-archive`, `empty-archive` or `too-large`, about the archive as a whole.
    """
    entries: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=stream, mode="r:", errorlevel=2, tarinfo=_Entry) as archive:
            for count, entry in enumerate(archive):
                if not entry.isdir() and not _is_hidden(entry.name):
                    entries.append(entry)
                archive.members = []  # type: ignore[attr-defined]  # it would keep each header twice
                if count > 2 * MAX_MEMBERS or len(entries) > MAX_MEMBERS:
                    raise _refuse("too-large", f"{source.path}: more than {MAX_MEMBERS} files in it")
            end = stream.seek(0, os.SEEK_END)
    except ImagingError:
        raise
    except Exception as error:  # the standard library raises many kinds about a damaged archive
        raise _refuse("bad-archive", f"{source.path}: damaged ({type(error).__name__})") from None
    if not entries:
        raise _refuse("empty-archive", f"{source.path}: no file in it")
    if sum(entry.size for entry in entries) > MAX_ARCHIVE_BYTES:
        raise _refuse("too-large", f"{source.path}: more than {MAX_ARCHIVE_BYTES} bytes in it")
    found = []
    for entry in entries:
        name = _tar_name(entry)
        problem = ""
        if not (entry.isreg() or entry.issparse()) or _is_unsafe(name):
            problem = "unsafe-path"
        elif entry.issparse():
            problem = "unsupported-archive"
        elif entry.size > MAX_FILE_BYTES:
            problem = "too-large"
        elif entry.offset_data + entry.size > end:
            problem = "truncated"
        found.append(
            replace(
                source,
                file=f"{source.file}!/{_printable(_normal(name))}",
                member=f"{entry.offset_data}:{entry.size}:{packing}",
                size_bytes=entry.size,
                problem=problem,
            )
        )
    return found


def _tar_name(entry: tarfile.TarInfo) -> str:
    """The member's name with forward slashes; bytes that are no UTF-8 are taken for GB 18030."""
    raw = entry.name.encode("utf-8", "surrogateescape")
    for charset in ("utf-8", "gb18030"):
        try:
            return raw.decode(charset).replace("\\", "/")
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1").replace("\\", "/")


class _TableOfContents(io.BufferedReader):
    """A file for `zipfile` to read a table of contents from, which it would read in one piece, however long
    it claims to be.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise _refuse("too-large", "the archive's table of contents is above the limit")
        return super().read(size)


def _members(source: Source, descriptor: int) -> list[Source]:
    """One source for each file in the archive that is open as `descriptor`.

    Raises:
        ImagingError: `bad-archive`, `empty-archive` or `too-large`, about the archive as a whole.
    """
    try:
        with (
            _TableOfContents(io.FileIO(descriptor, closefd=False)) as stream,
            zipfile.ZipFile(stream) as archive,
        ):
            entries, start_of_directory = archive.infolist(), archive.start_dir
    except (ImagingError, OSError):
        raise
    except Exception as error:  # the standard library raises many kinds about a damaged archive
        raise _refuse(
            "bad-archive", f"{source.path}: no readable table of contents ({type(error).__name__})"
        ) from None
    files = [(entry, _name_of(entry)) for entry in entries]
    if _DOCUMENT_MARKS & {name for _, name in files}:
        return [source]
    files = [(entry, name) for entry, name in files if not (_is_folder(entry, name) or _is_hidden(name))]
    if not files:
        raise _refuse("empty-archive", f"{source.path}: no file in it")
    if len(files) > MAX_MEMBERS or sum(entry.file_size for entry, _ in files) > MAX_ARCHIVE_BYTES:
        raise _refuse(
            "too-large", f"{source.path}: more than {MAX_MEMBERS} files or {MAX_ARCHIVE_BYTES} bytes in it"
        )
    overlapping = _overlapping([entry for entry, _ in files], start_of_directory)
    return [
        replace(
            source,
            file=f"{source.file}!/{_printable(_normal(name))}",
            member=f"{entry.header_offset}:{entry.compress_size}:{entry.compress_type}:{entry.CRC:08x}",
            size_bytes=entry.file_size,
            problem="bad-archive" if entry.header_offset in overlapping else _member_problem(entry, name),
        )
        for entry, name in files
    ]


def _name_of(entry: zipfile.ZipInfo) -> str:
    """The member's name with forward slashes.

    Where the archive does not say that a name is UTF-8 it is whatever the sender's system used. In China that
    is GBK, and `zipfile` takes it for the IBM code page 437; that reading loses nothing, so it can be taken
    back.
    """
    name = entry.orig_filename
    if not (entry.flag_bits & _UTF8 or name.isascii()):
        raw = name.encode("cp437")
        for charset in ("utf-8", "gb18030", "cp437"):
            try:
                name = raw.decode(charset)
                break
            except UnicodeDecodeError:
                continue
    return name.replace("\\", "/")


def _normal(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in {"", "."}) or "?"


def _printable(text: str) -> str:
    """Control characters, invisible ones and what cannot be encoded, as escapes: a name must not steer a
    terminal or break a log.
    """
    if text.isascii() and text.isprintable():
        return text
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden else c for c in text
    )


def _is_folder(entry: zipfile.ZipInfo, name: str) -> bool:
    return name.endswith("/") and entry.file_size == 0


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in name.split("/"))


def _is_unsafe(name: str) -> bool:
    """Whether a name leads out of its archive."""
    return (
        not name
        or "\0" in name
        or name.startswith("/")
        or _DRIVE.match(name) is not None
        or ".." in name.split("/")
    )


def _member_problem(entry: zipfile.ZipInfo, name: str) -> str:
    """The code of what speaks against a member before any of it is decompressed, or ""."""
    if stat.S_IFMT(entry.external_attr >> 16) not in {0, stat.S_IFREG} or _is_unsafe(name):
        return "unsafe-path"
    if entry.flag_bits & _ENCRYPTED:
        return "encrypted"
    if entry.flag_bits & _PATCHED or entry.compress_type not in {_STORED, _DEFLATED}:
        return "unsupported-archive"
    if entry.file_size > MAX_FILE_BYTES or entry.file_size > _expansion_limit(entry.compress_size):
        return "too-large"
    return ""


def _expansion_limit(packed_bytes: int) -> int:
    return max(FREE_EXPANSION_BYTES, MAX_EXPANSION * packed_bytes)


def _overlapping(entries: Sequence[zipfile.ZipInfo], start_of_directory: int) -> set[int]:
    """Offsets of members that share bytes with another one or with the table of contents: how a few bytes
    claim to be many files.
    """
    bad: set[int] = set()
    latest, end = -1, 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        start, stop = entry.header_offset, entry.header_offset + 30 + entry.compress_size
        if start < end:
            bad |= {start, latest}
        if start < 0 or stop > start_of_directory:
            bad.add(start)
        if stop > end:
            latest, end = start, stop
    return bad


def _expanded(stream: BinaryIO, source: Source) -> io.BytesIO | None:
    """The decompressed content, at its beginning; None for a file that is not compressed."""
    try:
        if source.member.endswith((_TAR, _TAR_GZ)):
            content: io.BytesIO | None = _tar_member(stream, source)
        elif source.member:
            content = _expanded_member(stream, source)
        else:
            content = _expanded_gzip(stream, source) or _expanded_attachment(stream, source)
    except zlib.error:
        raise _refuse("bad-archive", f"{source.path}: the compressed data is damaged") from None
    except EOFError:
        raise _refuse("truncated", f"{source.path}: the compressed data ends too early") from None
    except MemoryError:
        raise _refuse("too-large", f"{source.path}: does not fit into memory") from None
    except OSError as error:
        raise _refuse("unreadable", f"{source.path}: cannot be read ({type(error).__name__})") from None
    if content is not None:
        content.seek(0)
        head = content.read(_TAR_BLOCK)
        if (_is_archive(head) and not _is_document(head)) or _is_tar(head):
            raise _refuse("nested-archive", f"{source.path}: an archive inside an archive")
        content.seek(0)
    return content


def _expanded_gzip(stream: BinaryIO, source: Source) -> io.BytesIO | None:
    head = stream.read(_HEAD)
    stream.seek(0)
    if not (_is_archive(head) and head.startswith(_GZIP)):
        return None
    limit = min(MAX_FILE_BYTES, _expansion_limit(source.size_bytes))
    beyond = _refuse("too-large", f"{source.path}: expands beyond {limit} bytes")
    try:
        with gzip.GzipFile(fileobj=stream) as inflater:
            return _collected(iter(lambda: inflater.read(_BLOCK), b""), limit, beyond)
    except gzip.BadGzipFile:
        raise _refuse(
            "bad-archive", f"{source.path}: the gzip data is damaged, or something else follows it"
        ) from None


def _expanded_attachment(stream: BinaryIO, source: Source) -> io.BytesIO | None:
    """A DICOM file that Orthanc keeps compressed: its length in 8 bytes, then zlib data (RFC 1950).

    Reference: Orthanc book, "Storage area", StorageCompression.
    """
    head = stream.read(_HEAD)
    stream.seek(0)
    length = compressed_length(head) if is_uuid(source.file) else None
    if length is None:
        return None
    limit = min(MAX_FILE_BYTES, _expansion_limit(source.size_bytes))
    if length > limit:
        raise _refuse("too-large", f"{source.path}: expands beyond {limit} bytes")
    stream.seek(8)
    beyond = _refuse("bad-archive", f"{source.path}: longer than it says")
    blocks = iter(lambda: stream.read(_BLOCK), b"")
    content = _collected(_inflated(blocks, wbits=zlib.MAX_WBITS), length, beyond)
    if content.tell() < length:
        raise EOFError
    return content


_last_tar: tuple[tuple[Path, int, int], io.BytesIO] | None = None
"""The last compressed tar archive, expanded: its members are asked for one after the other."""


def _tar_member(stream: BinaryIO, source: Source) -> io.BytesIO:
    """One file of a tar archive."""
    global _last_tar  # noqa: PLW0603
    offset, length = map(int, source.member.split(":")[:2])
    if length > MAX_FILE_BYTES:
        raise _refuse("too-large", f"{source.path}: a file in it is above {MAX_FILE_BYTES} bytes")
    archive = stream
    if source.member.endswith(_TAR_GZ):
        size = os.fstat(stream.fileno()).st_size
        key = (source.path, size, source.mtime_ns)
        if _last_tar is None or _last_tar[0] != key:
            _last_tar = None  # before the next one takes memory
            expanded = _expanded_gzip(stream, replace(source, size_bytes=size))
            if expanded is None:
                raise _refuse("changed", f"{source.path}: no compressed archive any more")
            _last_tar = (key, expanded)
        archive = _last_tar[1]
    archive.seek(offset)
    beyond = _refuse("bad-archive", f"{source.path}: a file in it is longer than its header says")
    return _collected(_blocks(archive, length), length, beyond)


def _is_document(head: bytes) -> bool:
    """A zip that may be a document or program: inside an archive it is not looked into, and is no image."""
    return head.startswith(_ZIP) and any(mark.encode() in head for mark in _DOCUMENT_MARKS)


def _expanded_member(stream: BinaryIO, source: Source) -> io.BytesIO:
    """One file of a zip archive, found by its place: the table of contents of 100,000 others need not be read
    again.
    """
    offset, packed, method = map(int, source.member.split(":")[:3])
    if source.size_bytes > MAX_FILE_BYTES:
        raise _refuse("too-large", f"{source.path}: a file in it is above {MAX_FILE_BYTES} bytes")
    stream.seek(offset)
    header = stream.read(30)
    if len(header) < 30 or not header.startswith(_ZIP[0]):
        raise _refuse("bad-archive", f"{source.path}: no file where the table of contents says")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    stream.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    blocks = _blocks(stream, packed)
    contradiction = _refuse(
        "bad-archive", f"{source.path}: a file in it is longer than the table of contents says"
    )
    content = _collected(
        _inflated(blocks) if method == _DEFLATED else blocks, source.size_bytes, contradiction
    )
    if content.tell() < source.size_bytes:
        raise EOFError
    if f"{zlib.crc32(content.getbuffer()):08x}" != source.member.split(":")[3]:
        raise _refuse("bad-archive", f"{source.path}: a file in it does not have its checksum")
    return content


def _collected(blocks: Iterable[bytes], limit: int, beyond: ImagingError) -> io.BytesIO:
    """All blocks in one piece of memory, which grows with what really comes; `beyond` is raised above `limit`
    bytes.
    """
    content = io.BytesIO()
    for block in blocks:
        if content.tell() + len(block) > limit:
            raise beyond
        content.write(block)
    return content


def _blocks(stream: BinaryIO, count: int) -> Iterator[bytes]:
    """The next `count` bytes; EOFError where there are fewer."""
    while count:
        block = stream.read(min(count, _BLOCK))
        if not block:
            raise EOFError
        count -= len(block)
        yield block


def _inflated(blocks: Iterator[bytes], *, wbits: int = -zlib.MAX_WBITS) -> Iterator[bytes]:
    """A deflate stream, raw or as `wbits` says, in blocks of at most `_BLOCK` however much a byte may stand
    for; EOFError where its end is missing.
    """
    inflater = zlib.decompressobj(wbits)
    while not inflater.eof:
        packed = inflater.unconsumed_tail or next(blocks, b"")
        block = inflater.decompress(packed, _BLOCK)
        if not (packed or block or inflater.eof):
            raise EOFError
        yield block
