"""Write files that are whole or absent, also after a power cut (temporary file, fsync, rename, fsync of the
folder), and lock them.
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
    """Replace `path` by `data`, durably and in one step; nobody but the owner can read it before it has
    `mode`.
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


def append_line(path: Path, line: str) -> None:
    """Add a line to a private file; it is on the disk when this returns. Half a line that a crash left stays
    a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sweep(*folders: Path) -> None:
    """Remove what writers that were killed left half-written in these folders, which nobody else may be
    writing to now.
    """
    for folder in folders:
        for path in folder.glob(".*"):
            if path.is_file():
                path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, busy: Callable[[], FedqcError] | None = None) -> Iterator[None]:
    """Hold `path` as a lock (flock), alone; the kernel releases it when the process ends, however it ends.

    The file is made where it is missing, for its owner only, and is never removed: two processes could
    otherwise hold two files of one name.

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
    """Whether a living process holds `path` by `locked`. A file that a crash left behind does not count."""
    with suppress(FileNotFoundError), path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def sync_folder(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when all went well, and leaves nothing when it did not.

    Raises:
        ConfigError: `out` exists and is not empty (code `output-exists`), or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists and is not an empty folder",
            code="output-exists",
            hint="choose another folder or remove it",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be created ({error.strerror})", code="not-writable") from None
    try:
        yield staging
        os.chmod(staging, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_as_owner(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write or replace a file, whole or not at all. It belongs to whoever owns its folder.

    So an operator who is root leaves nothing that the services cannot read.
    """
    write_bytes(path, content, mode)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
