"""Write files that are complete or absent, also after a power cut (temporary file, fsync, rename, fsync of
the folder), and lock them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import ConfigError, FedqcError


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`, durably and in one step. Only the owner can read it before it has `mode`.

    Raises:
        OSError: it cannot be written; the earlier file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> bool:
    """Write `path` durably and in one step, unless it exists: of two writers the first wins.

    The file system must have hard links.

    Returns:
        whether it was written; False leaves the existing file as it is.
    Raises:
        OSError: it cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        written = True
    except FileExistsError:
        written = False
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync_folder(path.parent)
    return written


def make_private(path: Path) -> None:
    """Make an empty file for its owner only, unless there is one; that one is not even opened.

    Whoever closes a file releases all POSIX locks of its process on it, those of an open SQLite connection
    included: another process then removes the log that this connection goes on writing.

    Raises:
        OSError: the file cannot be made.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def append_line(path: Path, line: str) -> None:
    """Add a line to a private file; it is on the disk when this returns. A partial line left by a crash stays
    a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


MAX_LOG_BYTES = 10 << 20


def rotate(log: Path, limit: int = MAX_LOG_BYTES) -> bool:
    """Cap the size of a log that another process writes: once it is larger, its end becomes `log.1`, in place
    of the one before, and the file is emptied. The writer must append (O_APPEND); lines that it writes
    meanwhile are lost.

    Returns:
        whether the log was too large. A log that is missing or cannot be written is not.
    """
    try:
        size = log.stat().st_size
        if size <= limit:
            return False
        with log.open("r+b") as file:
            file.seek(size - limit)
            write_bytes(log.with_name(f"{log.name}.1"), file.read(limit), 0o600)
            file.truncate(0)
    except OSError:
        return False
    return True


def sweep(*folders: Path) -> None:
    """Remove the temporary files of writers that were killed. No process may be writing to these folders."""
    for folder in folders:
        for path in folder.glob(".*"):
            if path.is_file():
                path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, busy: Callable[[], FedqcError] | None = None) -> Iterator[None]:
    """Hold `path` as a lock (flock), alone; the kernel releases it when the process ends, however it ends.

    The file is created for its owner only, and is never removed: two processes could otherwise hold two files
    of one name.

    Args:
        busy: makes the error that is raised where another process holds the lock; None waits for it.
    Raises:
        FedqcError: of `busy`.
        OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            assert busy is not None
            raise busy() from None
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a running process holds `path` by `locked`. A file left by a crash does not count."""
    with suppress(FileNotFoundError), path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def sync_folder(path: Path) -> None:
    """Make names that were added to a folder, or removed from it, durable."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_new(out: Path) -> None:
    """Raise what `whole_folder` would, before work that it would lose.

    Raises:
        ConfigError: `out` exists and is not an empty folder (code `output-exists`).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out.absolute()}: exists and is not an empty folder",
            code="output-exists",
            hint="choose another folder or remove it",
        )


@contextmanager
def whole_folder(out: Path, *, mode: int = 0o755) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes `out` at the end, and is removed after an error.

    Raises:
        ConfigError: `out` exists and is not empty (code `output-exists`), or cannot be written.
    """
    out = out.absolute()
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be created ({error.strerror})", code="not-writable") from None
    try:
        yield staging
        os.chmod(staging, mode)
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_as_owner(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write or replace a file as `write_bytes`; under root it belongs to the owner of its folder.

    So an operator who is root leaves no file that the services cannot read.
    """
    write_bytes(path, content, mode)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
