from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.files import make_private, rotate, sweep, whole_folder, write_bytes, write_new


def test_what_a_killed_writer_left_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(tmp_path / "kept.json", b"old")

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        patch.setattr(files.Path, "unlink", killed)  # a killed process cleans up nothing
        with pytest.raises(SystemExit):
            write_bytes(tmp_path / "kept.json", b"new")
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".folder").mkdir()
    sweep(tmp_path, tmp_path / "absent")
    assert {path.name for path in tmp_path.iterdir()} == {"kept.json", ".folder"}
    assert (tmp_path / "kept.json").read_bytes() == b"old"


def test_a_new_file_is_complete_private_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert write_new(path, b"first")
    assert not write_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_new(tmp_path / "key", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_folder_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "private", mode=0o700) as staging:
        (staging / "file").touch()
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "private" / "file").exists()


def test_making_a_file_that_exists_leaves_the_locks_on_it(tmp_path: Path) -> None:
    """Closing a second handle would release them: another process then takes the file for its own."""
    path = tmp_path / "store.sqlite3"
    make_private(path)
    assert path.stat().st_mode & 0o777 == 0o600
    other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def takes_it() -> bool:
        run = subprocess.run(
            [sys.executable, "-c", other, str(path)], check=False, capture_output=True, timeout=60
        )
        return run.returncode == 0

    with path.open("r+b") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        make_private(path)
        assert not takes_it()
        path.read_bytes()  # the control: it opens and closes the file
        assert takes_it()


def test_a_log_is_capped_while_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    with log.open("ab", buffering=0) as writer:
        for number in range(1000):
            writer.write(b"line %06d\n" % number)
            if rotate(log, 1000):
                assert (tmp_path / "superlink.log.1").stat().st_size == 1000
                assert (tmp_path / "superlink.log.1").read_bytes().endswith(b"line %06d\n" % number)
            assert log.stat().st_size <= 1100
        assert log.read_bytes().endswith(b"line 000999\n"), "the writer goes on at the new end"
        assert b"\0" not in log.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["superlink.log", "superlink.log.1"]


def test_a_log_that_grew_at_once_leaves_its_end(tmp_path: Path) -> None:
    log = tmp_path / "proxy.log"
    log.write_bytes(b"a" * 5000 + b"the end")
    assert rotate(log, 100)
    assert (tmp_path / "proxy.log.1").read_bytes() == b"a" * 93 + b"the end"
    assert not rotate(log, 100)
    assert not rotate(tmp_path / "missing.log", 100)
