"""A site that would teach nothing, or whose data changed during a run, does not train; only the common code
tells the coordinator.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from client.site.run_data import accept_changed_data
from tests.helpers.consortium import settle, tiny_plan
from tests.helpers.site_agent import (
    PLAN,
    A,
    agent,
    evaluate_task,
    non_private,
    refusal_of,
    rows,
    train_task,
    update_of,
)


def relabel(sheet: Path, cell: object) -> None:
    """Give every cell of an artifact another value: `cell` of the value before."""
    head, *lines = list(csv.reader(sheet.open(encoding="utf-8")))
    changed = [[line[0], *(cell(one) if callable(cell) else cell for one in line[1:6])] for line in lines]
    with sheet.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head[:6], *changed])


@pytest.mark.parametrize("task", [non_private(), train_task()], ids=["federated", "private"])
def test_a_site_without_a_label_refuses_by_the_common_code(data: Path, task: object) -> None:
    settle(data / A, kind="hospital", policy={"allow_non_private": True})
    relabel(data / A / "labels.csv", "")
    answer = refusal_of(agent(data).train(task))  # type: ignore[arg-type]
    assert (answer.code, answer.reason) == ("site-failure", "the site failed; see its log")
    assert rows(data) == [], "refused before the ledger, and before the first round"
    log = (data / A / "state" / "site.log").read_text(encoding="utf-8")
    assert "would teach nothing" in log
    assert "fedqc data labels SITE" in log


def test_an_artifact_that_is_declared_and_not_labelled_is_a_contradiction(data: Path) -> None:
    settle(data / A, assessed=["metal", "motion"])
    update_of(agent(data).train(non_private()))
    relabel(data / A / "labels.csv", "")
    assert refusal_of(agent(data).train(non_private(run="s"))).code == "site-failure"
    assert "declares metal, motion" in (data / A / "state" / "site.log").read_text(encoding="utf-8")


def test_a_site_that_declares_nothing_says_so_before_its_data_are_read(data: Path) -> None:
    settle(data / A, assessed=[])
    (data / A / "images").rename(data / A / "gone")
    answer = refusal_of(agent(data).train(non_private()))
    assert answer.code == "nothing-assessed"
    assert "no artifact was assessed" in answer.reason


def test_a_plan_with_another_split_is_refused_before_the_data_are_read(data: Path) -> None:
    settle(data / A, split={"train": 0.8, "test": 0.2})
    (data / A / "images").rename(data / A / "gone")
    answer = refusal_of(agent(data).train(non_private()))
    assert (answer.code, "train 0.8, test 0.2" in answer.reason) == ("split-differs", True)


def test_one_split_of_the_site_for_every_plan(data: Path) -> None:
    """Two plans, of which one names no split, train on the same patients."""
    settle(data / A, split={"train": 0.6, "test": 0.4})
    same = tiny_plan(name="private", split={}, arms=["federated", "federated_dp"])
    first = update_of(agent(data).train(non_private())).update
    assert (update_of(agent(data, plan=same).train(non_private(run="s"))).update == first).all()
    settle(data / A, split={"train": 0.5, "test": 0.5})
    assert refusal_of(agent(data).train(non_private(run="t"))).code == "site-failure"
    assert "split-fixed" not in (data / A / "labels.csv").read_text()
    assert "restore split: {train: 0.6, test: 0.4}" in (data / A / "state/site.log").read_text()


def test_labels_that_change_during_a_run_stop_it_until_the_operator_accepts(data: Path) -> None:
    sheet = data / A / "labels.csv"
    before = sheet.read_bytes()
    assert update_of(agent(data).train(non_private())).data_changed is False
    relabel(sheet, {"1": "0", "0": "1"}.get)
    changed = agent(data)
    for answer in (changed.train(non_private(round=2)), changed.evaluate(evaluate_task())):
        assert (refusal_of(answer).code, "label" in refusal_of(answer).reason) == ("site-failure", False)
    log = (data / A / "state" / "site.log").read_text(encoding="utf-8")
    assert "the labels of this site changed" in log
    assert "fedqc site approve PLAN --changed-data r" in log
    sheet.write_bytes(before)
    assert update_of(changed.train(non_private(round=2))).data_changed is False, "restored, and read again"
    relabel(sheet, {"1": "0", "0": "1"}.get)
    refusal_of(agent(data).train(non_private(round=3)))
    accept_changed_data(data / A / "state", "r", PLAN.sha256())
    assert update_of(agent(data).train(non_private(round=3))).data_changed is True
    assert update_of(agent(data).train(train_task(round=3))).data_changed is True


def test_an_image_that_is_added_or_replaced_is_a_change(data: Path) -> None:
    update_of(agent(data).train(non_private()))
    images = sorted((data / A / "images").glob("*.dcm"))
    images[0].rename(data / A / "elsewhere.dcm")
    assert refusal_of(agent(data).train(non_private(round=2))).code == "site-failure"
    assert "the images and labels of this site changed" in (data / A / "state" / "site.log").read_text()


def test_a_message_without_the_flag_reads_and_is_written_as_before(data: Path) -> None:
    update = update_of(agent(data).train(non_private()))
    assert b"data_changed" not in update.to_bytes()
    changed = update.model_copy(update={"data_changed": True})
    assert type(update).from_bytes(changed.to_bytes()).data_changed is True
