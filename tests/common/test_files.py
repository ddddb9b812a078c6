from __future__ import annotations

from pathlib import Path

import pytest

from common import files
from common.files import sweep, write_bytes


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
