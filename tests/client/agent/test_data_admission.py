"""A site that would teach nothing, or whose data changed during a run, does not train; only the common code
tells the coordinator.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from client.data.cohort import load_cohort
from client.data.prepare import index_to_freeze
from client.site.approvals import approve, index_approved, withdraw
from client.site.ledger import Ledger
from client.site.run_data import accept_changed_data, index_of_run
from common.errors import DataError
from common.pricing import with_noise
from common.wire import Refusal, TrainTask
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
    settle(data / A, kind="hospital", policy={"allow_non_private": True, "after_non_private": "void"})
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


@pytest.mark.parametrize("task", [non_private, train_task], ids=["federated", "private"])
def test_a_record_that_is_lost_during_a_run_stops_it_until_the_operator_accepts(
    data: Path, task: Callable[..., TrainTask]
) -> None:
    settle(data / A, kind="hospital", policy={"allow_non_private": True, "after_non_private": "void"})
    update_of(agent(data).train(task()))
    shutil.rmtree(data / A / "state" / "runs")
    for _ in range(2):
        assert refusal_of(agent(data).train(task(round=2))).code == "site-failure"
    assert "record of its data in state/runs is gone" in (data / A / "state" / "site.log").read_text()
    assert accept_changed_data(data / A / "state", "r", PLAN.sha256()) == ("record",)
    assert update_of(agent(data).train(task(round=2))).data_changed is True
    relabel(data / A / "labels.csv", {"1": "0", "0": "1"}.get)
    assert refusal_of(agent(data).train(task(round=3))).code == "site-failure", "bound again"


def test_a_run_of_an_earlier_version_which_kept_no_record_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows were migrated; it is bound to the data of its first use from now on."""
    update_of(agent(data).train(train_task()))
    shutil.rmtree(data / A / "state" / "runs")
    rows = Ledger.rows
    monkeypatch.setattr(
        Ledger, "rows", lambda ledger: [replace(row, float_noise=True) for row in rows(ledger)]
    )
    assert update_of(agent(data).train(train_task(round=2))).data_changed is False
    relabel(data / A / "labels.csv", {"1": "0", "0": "1"}.get)
    assert refusal_of(agent(data).train(train_task(round=3))).code == "site-failure"


def test_a_site_that_joins_late_is_bound_to_its_own_first_round(data: Path) -> None:
    assert update_of(agent(data).train(non_private(round=5))).data_changed is False


def test_a_run_goes_on_with_the_index_that_it_began_with(data: Path) -> None:
    """One patient with many files would else decide whether the site answers."""
    control = update_of(agent(data).train(non_private(run="control", round=2))).update
    update_of(agent(data).train(non_private()))
    images = sorted((data / A / "images").glob("*.dcm"))
    for path in images[: len(images) // 4]:  # far above what stops a site
        path.write_bytes(b"damaged")
    for path in images[-3:]:
        path.unlink()
    assert (update_of(agent(data).train(non_private(round=2))).update == control).all()
    assert not isinstance(agent(data).evaluate(evaluate_task()), Refusal)
    goes_on = agent(data)
    update_of(goes_on.train(non_private(round=2)))
    assert refusal_of(goes_on.train(non_private(run="new"))).code == "site-failure", "a new run looks again"


APPROVED = with_noise(PLAN)


def approved(data: Path, runs: int = 2) -> str:
    """As `fedqc site approve` does: the index is frozen, and kept with the approval."""
    index = index_to_freeze(data / A / "site.yaml", APPROVED)
    approve(data / A, APPROVED, runs=runs, index=index)
    return index


def damage(data: Path) -> None:
    """Far more than what stops a site."""
    images = sorted((data / A / "images").glob("*.dcm"))
    for path in images[: len(images) // 4]:
        path.write_bytes(b"damaged")
    for path in images[-3:]:
        path.unlink()


def test_the_index_is_frozen_at_approval_and_every_run_under_it_begins_with_it(data: Path) -> None:
    """Whether the site answers in the first round does not depend on its data at that moment."""
    index = approved(data)
    control = update_of(agent(data, plan=APPROVED).train(non_private(run="control"))).update
    damage(data)
    for run in ("first", "second"):
        one = agent(data, plan=APPROVED)
        assert (update_of(one.train(non_private(run=run))).update == control).all()
        assert one.cohort(run).fingerprint == index == index_of_run(data / A / "state", run)
        assert not isinstance(one.evaluate(evaluate_task()), Refusal)
    without = agent(data, plan=with_noise(PLAN.model_copy(update={"name": "other"})))
    assert refusal_of(without.train(non_private(run="third"))).code == "site-failure", "no index was frozen"


def test_who_opts_out_after_the_approval_is_left_out_and_the_index_stays(data: Path) -> None:
    index = approved(data)
    header = pydicom.dcmread(sorted((data / A / "images").glob("*.dcm"))[0])
    (data / A / "cohort.yaml").write_text(f"opt_out: [{header.PatientID}]\n")
    one = agent(data, plan=APPROVED)
    update_of(one.train(non_private()))
    cohort = one.cohort("r")
    assert cohort.fingerprint == index
    assert len(cohort.opted_out) == 1


def test_an_approved_index_that_the_cache_lost_is_a_failure_until_the_plan_is_approved_again(
    data: Path,
) -> None:
    approved(data)
    warm = agent(data, plan=APPROVED)
    update_of(warm.train(non_private(run="first")))
    sorted((data / A / "images").glob("*.dcm"))[0].unlink()
    load_cohort(data / A, size=APPROVED.image_size)  # as `data check` or another run brings it up to date
    fresh = agent(data, plan=APPROVED)
    assert refusal_of(fresh.train(non_private(run="second"))).code == "site-failure"
    log = (data / A / "state" / "site.log").read_text(encoding="utf-8")
    assert "changed since plan private was approved" in log
    index = approved(data)
    for one in (warm, fresh):
        update_of(one.train(non_private(run="second")))
        assert one.cohort("second").fingerprint == index


def test_a_site_without_labels_approves_a_plan_that_injects_artifacts(data: Path) -> None:
    settle(data / A, labels="none")
    injecting = with_noise(tiny_plan(name="injecting", training={"rounds": 1, "inject": {}}))
    assert index_to_freeze(data / A / "site.yaml", injecting)
    with pytest.raises(DataError) as caught:
        index_to_freeze(data / A / "site.yaml", APPROVED)
    assert caught.value.code == "nothing-assessed"


def test_a_withdrawn_approval_freezes_nothing(data: Path) -> None:
    approved(data)
    withdraw(data / A / "state", APPROVED.sha256())
    assert index_approved(data / A / "state", APPROVED.sha256()) == ""


def test_images_that_were_prepared_anew_during_a_run_are_a_change(data: Path) -> None:
    update_of(agent(data).train(non_private()))
    images = sorted((data / A / "images").glob("*.dcm"))
    images[0].rename(data / A / "elsewhere.dcm")
    update_of(agent(data).train(non_private(run="new")))  # brings the cache up to date
    assert refusal_of(agent(data).train(non_private(round=2))).code == "site-failure"
    assert "the images and labels of this site changed" in (data / A / "state" / "site.log").read_text()


def test_who_opts_out_leaves_the_frozen_index_too(data: Path) -> None:
    update_of(agent(data).train(non_private()))
    whole = agent(data).cohort("r")
    header = pydicom.dcmread(sorted((data / A / "images").glob("*.dcm"))[0])
    (data / A / "cohort.yaml").write_text(f"opt_out: [{header.PatientID}]\n")
    asked = agent(data)
    update_of(asked.train(non_private(round=2)))
    left = asked.cohort("r")
    assert left.fingerprint == whole.fingerprint
    assert len(set(left.patients[left.part >= 0])) == len(set(whole.patients)) - 1


def test_a_message_without_the_flag_reads_and_is_written_as_before(data: Path) -> None:
    update = update_of(agent(data).train(non_private()))
    assert b"data_changed" not in update.to_bytes()
    changed = update.model_copy(update={"data_changed": True})
    assert type(update).from_bytes(changed.to_bytes()).data_changed is True
