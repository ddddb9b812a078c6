"""Progress lines and time spans."""

from __future__ import annotations

import pytest

from common.progress_bar import ProgressLine, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (65, "1 min 05 s"), (7500, "2 h 05 min")],
)
def test_a_time_span_has_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_skipped_units_do_not_count_towards_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("common.progress_bar.time.monotonic", lambda: clock[0])
    progress = ProgressLine(10)
    progress.skip(4)
    clock[0] = 30.0
    progress.advance("round 5")
    assert capsys.readouterr().err == "[5/10] round 5, about 2 min 30 s left\n"
