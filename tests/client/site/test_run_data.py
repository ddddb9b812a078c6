"""A run goes on with the data it began with, or with a change that the operator accepted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client.site.run_data import (
    RUNS,
    DataDigests,
    accept_changed_data,
    bind_data,
    changes_between,
    check_data,
    runs_refused,
)
from common.errors import ConfigError, DataError

FIRST = DataDigests(images="i", labels={"p": "1", "q": "2"}, split={"p": "train", "q": "test"})
RUN = "north-2026/../../x"


def refused(state: Path, data: DataDigests) -> DataError:
    with pytest.raises(DataError) as caught:
        bind_data(state, RUN, "plan", data)
    assert caught.value.code == "data-changed"
    return caught.value


def test_the_first_round_binds_and_later_rounds_compare(tmp_path: Path) -> None:
    assert bind_data(tmp_path, RUN, "plan", FIRST) is False
    assert bind_data(tmp_path, RUN, "plan", FIRST) is False
    assert bind_data(tmp_path, "another run", "plan", replace(FIRST, images="j")) is False
    assert runs_refused(tmp_path) == []
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / RUNS}


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (replace(FIRST, images="j"), ("images",)),
        (replace(FIRST, labels={"p": "1", "q": "3"}), ("labels",)),
        (replace(FIRST, split={"p": "train", "q": "train"}), ("split",)),
        (replace(FIRST, labels={"p": "1"}, split={"p": "train"}), ("images",)),
        (
            replace(FIRST, labels={**FIRST.labels, "r": "4"}, split={**FIRST.split, "r": "train"}),
            ("images",),
        ),
        (
            DataDigests(images="j", labels={"p": "0", "q": "2"}, split={"p": "test", "q": "test"}),
            ("images", "labels", "split"),
        ),
    ],
)
def test_each_change_is_refused_named_and_accepted_once(
    tmp_path: Path, data: DataDigests, changes: tuple[str, ...]
) -> None:
    bind_data(tmp_path, RUN, "plan", FIRST)
    error = refused(tmp_path, data)
    assert " and ".join(changes) in error.message
    assert f"--changed-data {RUN}" in error.hint
    (pending,) = runs_refused(tmp_path)
    assert (pending.run, pending.changes) == (RUN, changes)
    for run, plan in ((RUN, "another plan"), ("another run", "plan")):
        with pytest.raises(ConfigError) as caught:
            accept_changed_data(tmp_path, run, plan)
        assert caught.value.code == "no-changed-data"
    assert accept_changed_data(tmp_path, RUN, "plan") == changes
    assert bind_data(tmp_path, RUN, "plan", data) is True
    assert runs_refused(tmp_path) == []
    refused(tmp_path, replace(data, images="k"))  # what was accepted is this change, not any


def test_data_that_are_restored_need_no_acceptance(tmp_path: Path) -> None:
    bind_data(tmp_path, RUN, "plan", FIRST)
    refused(tmp_path, replace(FIRST, images="j"))
    assert bind_data(tmp_path, RUN, "plan", FIRST) is False
    assert runs_refused(tmp_path) == []


def test_a_patient_who_opted_out_is_no_change(tmp_path: Path) -> None:
    without = replace(FIRST, labels={"p": "1"}, split={"p": "train"})
    assert changes_between(FIRST, without, opted_out={"q", "z"}) == ()
    assert changes_between(FIRST, without, opted_out={"p"}) == ("images",)


def test_a_damaged_record_stops_the_run(tmp_path: Path) -> None:
    bind_data(tmp_path, RUN, "plan", FIRST)
    (path,) = (tmp_path / RUNS).glob("*.json")
    for text in ("", "[]", '{"run": "x"}', '{"refused": 1}'):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            check_data(tmp_path, RUN, FIRST)
        assert caught.value.code == "data-changed"
