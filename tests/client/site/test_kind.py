"""A kind that takes noise and ledger away must be declared, or be seen in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.tasks import Agent
from client.agent.verification import Guard
from client.simulation.phantom_sites import write_consortium
from client.site.budget import budget_text, budgets
from client.site.config import Declaration, read_site
from client.site.kind import admit_kind
from client.site.ledger_rows import LedgerRow
from client.site.site_ledger import open_ledger
from common.errors import RefusedError
from common.lineage import NO_DATA
from common.weights import advance
from common.wire import DescribeTask, EvaluateTask, Refusal, SiteEvaluation, SiteReadiness, TrainTask
from tests.helpers.consortium import TRAINING, settle, tiny_plan
from tests.helpers.own_slices import write
from tests.helpers.site_agent import BASE as WEIGHTS
from tests.helpers.site_agent import (
    agent,
    evaluate_task,
    non_private,
    refusal_of,
    rows,
    train_task,
    update_of,
)

DECLARED = {"by": "li", "at": "2026-01-01", "why": "a public collection", "images": "images"}
PLAN = tiny_plan(name="kinds", arms=["federated"], held_out=[])
BASE = np.zeros(4, np.float32)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Images of a hospital, and the word public in site.yaml."""
    text = "name: hospital-a\nkind: public\ncohort: c\nnominal_patients: 200\n"
    (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
    write(tmp_path / "images" / "1.dcm", "4711", ours=False)
    return tmp_path


def admitted(site: Path, **fields: Any) -> str:
    settle(site, **fields)
    return admit_kind(*read_site(site))


def test_hospital_images_under_another_kind_are_refused_until_somebody_declares_them(site: Path) -> None:
    for kind in ("public", "synthetic"):
        with pytest.raises(RefusedError) as caught:
            admitted(site, kind=kind)
        assert caught.value.code == "kind-undeclared"
        assert caught.value.public_reason
    assert "a public collection" in admitted(site, declared_not_hospital=DECLARED)
    assert admitted(site, kind="hospital") == ""


def test_a_declaration_holds_for_its_folder_of_images_only(site: Path) -> None:
    (site / "images").rename(site / "others")
    with pytest.raises(RefusedError):
        admitted(site, declared_not_hospital=DECLARED, images="others")
    assert Declaration(**DECLARED)


def test_what_fedqc_generated_needs_no_word(tmp_path: Path) -> None:
    write_consortium(tmp_path / "data", sites=2, patients=3, seed=1, say=lambda text: None)
    assert "fedqc" in admit_kind(*read_site(tmp_path / "data" / "hospital-a"))
    write(tmp_path / "data" / "hospital-b" / "images" / "scan.dcm", ours=False)
    with pytest.raises(RefusedError):
        admit_kind(*read_site(tmp_path / "data" / "hospital-b"))


def test_no_task_touches_images_of_an_undeclared_kind(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.agent.tasks.load_cohort", lambda *_, **__: pytest.fail("data was read"))
    agent = Agent(site / "site.yaml", PLAN)
    train = TrainTask(run="r", arm="federated", round=1, private=False, base=BASE)
    score = EvaluateTask(run="r", models=("federated",), everyone=False, weights=BASE[None])
    for answer in (agent.train(train), agent.evaluate(score)):
        assert isinstance(answer, Refusal)
        assert answer.code == "kind-undeclared"
    ready = agent.describe(DescribeTask(rehearse=True))
    assert isinstance(ready, SiteReadiness)
    assert (ready.arms, ready.evaluation) == ({"federated": "kind-undeclared"}, "kind-undeclared")


def test_a_task_opens_no_image_before_the_cohort_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard looks when the agent starts: a task that is refused for its model has opened nothing."""
    write_consortium(tmp_path / "data", sites=2, patients=3, seed=1, say=lambda text: None)
    site = tmp_path / "data" / "hospital-a"
    Guard(str(site))
    monkeypatch.setattr("client.site.kind.is_generated", lambda images: pytest.fail("an image was opened"))
    said = Agent(site / "site.yaml", PLAN).train(
        TrainTask(run="r", arm="federated", round=1, private=False, base=BASE)
    )
    assert isinstance(said, Refusal)
    assert said.code == "crafted-model"


def test_images_that_were_exchanged_are_seen_when_the_cohort_is_read(tmp_path: Path) -> None:
    write_consortium(tmp_path / "data", sites=2, patients=3, seed=1, say=lambda text: None)
    site = tmp_path / "data" / "hospital-a"
    agent = Agent(site / "site.yaml", PLAN)
    agent.renew_consent()
    write(site / "images" / "scan.dcm", ours=False)
    with pytest.raises(RefusedError) as caught:
        agent.cohort()
    assert caught.value.code == "kind-undeclared"


PRIVATE = tiny_plan(name="private", arms=["federated_dp"])


def corrected_to_hospital(data: Path) -> None:
    settle(data / TRAINING[0], {"max_epsilon": 8.0}, kind="hospital", declared_not_hospital=None)


@pytest.mark.parametrize("done", ["trained", "scored"])
def test_what_was_done_without_noise_under_a_false_declaration_voids_later_claims(
    done: str, data: Path
) -> None:
    settle(data / TRAINING[0], kind="public", declared_not_hospital=DECLARED)
    if done == "trained":
        update_of(agent(data, plan=PLAN).train(non_private()))
    else:
        assert isinstance(agent(data, plan=PLAN).evaluate(evaluate_task()), SiteEvaluation)
    assert rows(data) == [("non-private", "", 0)]
    corrected_to_hospital(data)
    assert refusal_of(agent(data, plan=PRIVATE).train(train_task(run="later"))).code == "cohort-void"
    assert rows(data) == [("non-private", "", 0)]


def test_a_model_trained_under_a_false_declaration_is_known_later(data: Path) -> None:
    settle(data / TRAINING[0], kind="public", declared_not_hospital=DECLARED)
    update = update_of(agent(data, plan=PLAN).train(non_private()))
    corrected_to_hospital(data)
    settle(data / TRAINING[0], {"max_epsilon": 8.0, "after_non_private": "void"})
    model = {"initial": "/coordinator/own.safetensors", "sha256": "5" * 64}
    plan = tiny_plan(name="private", arms=["federated_dp"], model=model)
    lineage = NO_DATA.child("pretrain", weights="0" * 64, kinds=["public"], private=False).text()
    task = train_task(run="later", base=advance(WEIGHTS, update.update), lineage=lineage)
    assert refusal_of(agent(data, plan=plan).train(task)).code == "non-private-ancestor"


def test_nothing_is_recorded_where_fedqc_generated_the_images(data: Path) -> None:
    update_of(agent(data, plan=PLAN).train(non_private()))
    agent(data, plan=PLAN).evaluate(evaluate_task())
    assert rows(data) == []


def test_the_operators_log_says_what_took_the_noise_away(site: Path) -> None:
    settle(site, declared_not_hospital=DECLARED)
    agent = Agent(site / "site.yaml", PLAN)
    for _ in range(2):
        agent.renew_consent()
    log = (site / "state" / "site.log").read_text()
    said = "kind public: no noise, no budget; declared on 2026-01-01 by li: a public collection"
    assert log.count(said) == 1


def declared_rows(site: Path) -> list[LedgerRow]:
    with open_ledger(*read_site(site)) as ledger:
        return [row for row in ledger.rows() if row.kind == "declared"]


def test_a_declaration_is_a_row_of_the_ledger_before_it_is_first_used(site: Path) -> None:
    settle(site, declared_not_hospital=DECLARED)
    agent = Agent(site / "site.yaml", PLAN)
    agent.describe(DescribeTask(rehearse=True))
    assert declared_rows(site) == [], "a rehearsal uses nothing"
    for one in (agent, agent, Agent(site / "site.yaml", PLAN)):
        one.renew_consent()
    (row,) = declared_rows(site)
    assert (row.request, row.part, row.purpose, row.by) == ("public", "images", "a public collection", "li")
    settle(site, declared_not_hospital=DECLARED | {"why": "volunteers"})
    Agent(site / "site.yaml", PLAN).renew_consent()
    assert [row.purpose for row in declared_rows(site)] == ["a public collection", "volunteers"]


def test_the_budget_shows_what_was_declared_and_charges_nothing_for_it(site: Path) -> None:
    settle(site, declared_not_hospital=DECLARED)
    with open_ledger(*read_site(site)):
        (before,) = budgets(site)  # as an earlier version left it
    assert before["declared"] == []
    Agent(site / "site.yaml", PLAN).renew_consent()
    (account,) = budgets(site)
    assert (account["spent"], account["entries"], account["rows"]) == (0.0, [], before["rows"] + 1)
    assert account["has_non_private"] is False
    (declared,) = account["declared"]
    assert declared.items() >= {"kind": "public", "images": "images", "by": "li"}.items()
    text = "\n".join(budget_text(account))
    assert "images: no hospital's patients (kind public), declared by li: a public collection" in text


def test_a_task_is_refused_where_the_declaration_cannot_be_recorded(site: Path) -> None:
    settle(site, declared_not_hospital=DECLARED)
    (site / "state").mkdir(exist_ok=True)
    (site / "state" / "ledger.sqlite3").write_bytes(b"no ledger")
    said = Agent(site / "site.yaml", PLAN).evaluate(
        EvaluateTask(run="r", models=("federated",), everyone=False, weights=BASE[None])
    )
    assert isinstance(said, Refusal)
    assert said.code == "ledger-damaged"


def test_a_hospital_and_generated_images_have_no_such_row(site: Path, tmp_path: Path) -> None:
    write_consortium(tmp_path / "data", sites=2, patients=3, seed=1, say=lambda text: None)
    made = tmp_path / "data" / "hospital-a"
    Agent(made / "site.yaml", PLAN).renew_consent()
    assert not (made / "state" / "ledger.sqlite3").exists()
    settle(site, kind="hospital", declared_not_hospital=DECLARED)
    Agent(site / "site.yaml", PLAN).renew_consent()
    assert declared_rows(site) == []
