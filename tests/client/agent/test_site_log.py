"""The site log: for an operator's terminal, and of bounded size."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.agent import site_log
from client.agent.site_log import SITE_LOG, append_site_log
from common import files


def test_foreign_words_in_the_log_move_no_cursor(tmp_path: Path) -> None:
    assert append_site_log(tmp_path, "incident ab: run \x1b[2J\u202e of ε")
    line = (tmp_path / SITE_LOG).read_text(encoding="utf-8")
    assert line.endswith(" incident ab: run \\u001b[2J\\u202e of ε\n")


def test_the_log_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_log, "rotate", lambda log: files.rotate(log, 2000))
    for number in range(500):
        assert append_site_log(tmp_path, f"incident {number}")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5000
    assert "incident 499" in (tmp_path / SITE_LOG).read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 2
