"""What a hospital answered about which patients is kept, and no two exact answers show few of them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.site.evaluations import (
    EVALUATIONS,
    MIN_DIFFERENCE,
    Evaluation,
    admit_question,
    keep_question,
    patients_tested,
    question_of,
    recorded,
)
from client.site.run_data import DataDigests
from common.errors import ConfigError, DataError, RefusedError

EVERYONE = {f"patient-{number}": "as-they-are" for number in range(40)}
DATA = DataDigests(
    images="i", labels={"p": "1", "q": "2", "r": "3"}, split={"p": "test", "q": "train", "r": "test"}
)


def exact(run: str, patients: dict[str, str], **changes: Any) -> Evaluation:
    values = {"mode": "disclosed", "question": run, "models": {"federated": f"of {run}"}}
    return Evaluation(**values | changes, run=run, patients=patients)


@given(st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)))
def test_two_sets_are_the_same_or_differ_in_many(gone: set[int], changed: set[int]) -> None:
    later = {name: label for name, label in EVERYONE.items() if int(name.split("-")[1]) not in gone}
    later |= {f"patient-{number}": "other labels" for number in changed - gone}
    with tempfile.TemporaryDirectory() as folder:
        keep_question(Path(folder), exact("first", EVERYONE))
        if 0 < len(gone | changed) < MIN_DIFFERENCE:
            with pytest.raises(DataError) as caught:
                admit_question(Path(folder), exact("second", later))
            assert caught.value.code == "patients-changed"
        else:
            admit_question(Path(folder), exact("second", later))


def test_every_earlier_set_counts_not_the_last_alone(tmp_path: Path) -> None:
    half = dict(list(EVERYONE.items())[:20])
    for run, patients in (("first", EVERYONE), ("second", half)):
        admit_question(tmp_path, exact(run, patients))
        keep_question(tmp_path, exact(run, patients))
    with pytest.raises(DataError, match="run first"):
        admit_question(tmp_path, exact("third", dict(list(EVERYONE.items())[:39])))


def test_a_model_is_scored_exactly_in_one_run_but_for_the_public_one(tmp_path: Path) -> None:
    models = {"public": "start", "federated": "end"}
    keep_question(tmp_path, exact("first", EVERYONE, models=models))
    again = exact("second", EVERYONE, models={"federated": "end"})
    with pytest.raises(RefusedError) as caught:
        admit_question(tmp_path, again, public="start")
    assert caught.value.code == "evaluation-repeated"
    assert caught.value.public_reason
    admit_question(tmp_path, exact("second", EVERYONE, models={"public": "start"}), public="start")


def test_runs_of_one_study_may_hold_the_same_model_on_the_same_patients(tmp_path: Path) -> None:
    """What a hospital trained for itself is the same in each; the rule of patients holds as before."""
    own = {"local/hospital-a": "mine"}
    keep_question(tmp_path, exact("all", EVERYONE, models=own, study="s"))
    sister = exact("without-b", EVERYONE, models=own, study="s")
    admit_question(tmp_path, sister)
    for other in ("", "t"):
        with pytest.raises(RefusedError):
            admit_question(tmp_path, replace(sister, study=other))
    with pytest.raises(DataError, match="differ"):
        admit_question(tmp_path, replace(sister, patients=dict(list(EVERYONE.items())[:39])))


def test_the_ledger_alone_limits_noised_questions_of_other_runs(tmp_path: Path) -> None:
    noised = Evaluation(run="first", mode="dp", question="q", models={"federated": "m"})
    keep_question(tmp_path, noised)
    admit_question(tmp_path, Evaluation(run="second", mode="dp", question="q", models={"federated": "m"}))
    keep_question(tmp_path, noised)
    with pytest.raises(RefusedError):
        keep_question(tmp_path, Evaluation(run="first", mode="dp", question="other", models={}))
    assert recorded(tmp_path) == [noised]


def test_a_damaged_record_stops_the_site(tmp_path: Path) -> None:
    keep_question(tmp_path, exact("first", EVERYONE))
    (path,) = (tmp_path / EVALUATIONS).iterdir()
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        admit_question(tmp_path, exact("second", EVERYONE))
    assert caught.value.code == "bad-evaluations"


def test_a_question_depends_on_everything_that_its_answer_depends_on() -> None:
    def asked(**changes: Any) -> str:
        values = {"run": "r", "mode": "dp", "models": {"a": "1", "b": "2"}, "query": "q", "data": DATA}
        return question_of(**values | changes)

    others = [
        {"run": "s"},
        {"mode": "disclosed"},
        {"models": {"b": "2", "a": "1"}},
        {"models": {"a": "1", "b": "3"}},
        {"query": "other"},
        *(
            {"data": DataDigests(**{**vars(DATA), name: {**vars(DATA)[name], "p": "x"}})}
            for name in ("labels", "split")
        ),
        {"data": DataDigests(**{**vars(DATA), "images": "x"})},
    ]
    found = [asked(), *(asked(**other) for other in others)]
    assert len(set(found)) == len(found)
    assert asked() == asked()


def test_test_patients_are_named_by_a_key_of_the_site() -> None:
    found = patients_tested(DATA, b"k" * 16)
    assert sorted(found.values()) == ["1", "3"]
    assert not {"p", "r"} & set(found)
    assert not set(found) & set(patients_tested(DATA, b"l" * 16))
