"""A hospital answers what its policy admits, once, and nothing of what it knows leaves beside the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.agent.tasks import Agent, agent_for
from client.data.cohort import load_cohort
from client.site.config import read_site
from client.site.ledger import ledger_file_name
from common.learning import score
from common.models import build
from common.plan import RunPlan, parse_plan
from common.privacy import rdp_epsilon
from common.weights import digest, manifest_of, unflatten
from common.wire import (
    DescribeTask,
    EvaluateTask,
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteUpdate,
    TrainTask,
    WireMessage,
    message_type,
)
from tests.helpers.consortium import HELD_OUT, SITES, Consortium, settle, tiny_plan
from tests.helpers.site_agent import BASE, HEAD, MARKER, A, ledger, rows, spellings

PLAN = tiny_plan(name="private", arms=["federated", "federated_dp"])


def agent(data: Path, name: str = A, plan: RunPlan = PLAN) -> Agent:
    return Agent(data / name / "site.yaml", plan)


def train_task(**changes: Any) -> TrainTask:
    return TrainTask(
        **({"run": "r", "arm": "federated_dp", "round": 1, "private": True, "base": BASE} | changes)
    )


def non_private(**changes: Any) -> TrainTask:
    return train_task(**({"arm": "federated", "private": False} | changes))


def evaluate_task(everyone: bool = False) -> EvaluateTask:
    return EvaluateTask(run="r", models=("public",), everyone=everyone, weights=BASE[None])


def update_of(answer: WireMessage) -> SiteUpdate:
    assert isinstance(answer, SiteUpdate), answer
    return answer


def refusal_of(answer: WireMessage) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer


def test_it_describes_itself_by_what_the_operator_wrote(data: Path) -> None:
    said = agent(data).describe()
    assert isinstance(said, SiteDescription)
    assert (said.site, said.kind, said.nominal_patients, said.members) == (A, "synthetic", 50, ())
    assert "phantom" in said.stand_in


def test_describing_touches_no_patient(data: Path) -> None:
    for name in ("images", "labels.csv", "state"):
        (data / A / name).rename(data / A / f"{name}-gone")
    assert isinstance(agent(data).describe(), SiteDescription)


def test_a_repeated_private_question_gets_the_same_bytes_and_is_charged_once(data: Path) -> None:
    asked = agent(data)
    first = update_of(asked.train(train_task()))
    spent = rows(data)
    assert asked.train(train_task()).to_bytes() == first.to_bytes()
    assert agent(data).train(train_task()).to_bytes() == first.to_bytes()
    assert rows(data) == spent == [("reserve", "", 2), ("commit", "round 1", 1)]


def test_the_question_asked_with_another_model_gets_the_first_answer(data: Path) -> None:
    """Else a coordinator could look at the same patients twice under one charge."""
    first = update_of(agent(data).train(train_task()))
    second = update_of(agent(data).train(train_task(base=BASE + 1)))
    assert second.to_bytes() == first.to_bytes()
    assert second.base_sha256 == digest(BASE)


def test_the_ledger_survives_a_restart_of_the_agent(data: Path) -> None:
    update_of(agent(data).train(train_task()))
    with ledger(data) as opened:
        spent = opened.spent(1e-5)
    update_of(agent(data).train(train_task(round=2)))
    with ledger(data) as opened:
        assert opened.spent(1e-5) == spent > 7
    assert rows(data) == [("reserve", "", 2), ("commit", "round 1", 1), ("commit", "round 2", 1)]
    update_of(agent(data).train(train_task(run="another")))
    with ledger(data) as opened:
        assert opened.spent(1e-5) > spent


def test_two_questions_never_share_one_charge(data: Path) -> None:
    """Run "r", arm "x/y" and run "r/x", arm "y" read alike where a ledger row joins them by a slash."""
    answers = [agent(data).train(train_task(run=run, arm=arm)) for run, arm in (("r", "x/y"), ("r/x", "y"))]
    assert sum(isinstance(answer, SiteUpdate) for answer in answers) == sum(
        kind == "reserve" for kind, _, _ in rows(data)
    )


def test_a_round_beyond_the_plan_is_refused(data: Path) -> None:
    asked = agent(data)
    for number in (1, 2):
        update_of(asked.train(train_task(round=number)))
    refusal_of(asked.train(train_task(round=3)))
    assert sum(steps for kind, _, steps in rows(data) if kind == "commit") == 2


def test_an_exhausted_budget_refuses_and_charges_nothing(data: Path) -> None:
    settle(data / A, policy={"max_epsilon": 12.0, "max_epsilon_per_run": 8.0})
    asked = agent(data)
    update_of(asked.train(train_task()))
    before = rows(data)
    said = refusal_of(asked.train(train_task(run="second")))
    assert said.code == "budget-exhausted"
    assert rows(data) == before


def test_a_private_update_is_the_head_alone_and_says_what_it_costs(data: Path) -> None:
    said = update_of(agent(data).train(train_task()))
    assert said.update.shape == (HEAD.stop - HEAD.start,)
    assert said.update.dtype == np.int32
    assert said.update.any()
    assert (said.private, said.round, said.weight, said.base_sha256) == (True, 1, 50, digest(BASE))
    assert said.delta == 1e-5
    assert said.epsilon is not None
    assert 7 < said.epsilon <= 8
    with ledger(data) as opened:
        assert said.epsilon == rdp_epsilon(opened.history(), 1e-5)
        assert opened.history()[0].noise_multiplier == said.noise_multiplier


def test_two_sites_with_the_same_patients_send_different_private_updates(data: Path) -> None:
    """Noise comes from the operating system: nothing in plan or data reproduces it."""
    first = update_of(agent(data).train(train_task()))
    second = update_of(agent(data).train(train_task(run="another")))
    assert (first.update != second.update).mean() > 0.99


def test_a_non_private_update_is_reproducible_and_says_that_it_is_not_private(data: Path) -> None:
    first, second = (update_of(agent(data).train(non_private())) for _ in range(2))
    assert np.array_equal(first.update, second.update)
    assert (first.private, first.epsilon, first.delta, first.noise_multiplier) == (False, None, None, 0.0)
    assert first.update.shape == BASE.shape
    assert rows(data) == []


def test_another_round_shuffles_otherwise(data: Path) -> None:
    asked = agent(data)
    first, second = (update_of(asked.train(non_private(round=number))) for number in (1, 2))
    assert not np.array_equal(first.update, second.update)


def test_only_training_patients_train(data: Path) -> None:
    """Changing every label of the test patients changes no bit of the update."""
    before = update_of(agent(data).train(non_private()))
    cohort = load_cohort(data / A, size=PLAN.image_size, plan_split=PLAN.split)
    others = {record.file for record, part in zip(cohort.records, cohort.part, strict=True) if part != 0}
    assert others
    sheet = data / A / "labels.csv"
    head, *lines = sheet.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split(",")[0] not in others]
    sheet.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
    after = update_of(agent(data).train(non_private(run="another")))  # the same run would refuse other labels
    assert np.array_equal(after.update, before.update)


def test_hospital_patients_are_not_trained_on_without_privacy_unless_permitted(data: Path) -> None:
    settle(data / A, kind="hospital")
    said = refusal_of(agent(data).train(non_private()))
    assert said.code == "non-private-not-permitted"
    assert rows(data) == []
    settle(data / A, kind="hospital", policy={"allow_non_private": True})
    update_of(agent(data).train(non_private()))
    with ledger(data) as opened:
        assert opened.has_non_private
    update_of(agent(data).train(non_private(round=2)))
    assert rows(data) == [("non-private", "", 0)]


def test_a_hospital_shows_no_exact_scores_unless_permitted(data: Path) -> None:
    settle(data / A, kind="hospital")
    said = refusal_of(agent(data).evaluate(evaluate_task()))
    assert said.code == "evaluation-not-permitted"
    assert "disclosed" in said.reason
    settle(data / A, kind="hospital", policy={"evaluation": "disclosed"})
    answer = agent(data).evaluate(evaluate_task())
    assert isinstance(answer, SiteEvaluation)
    assert answer.mode == "disclosed"


def test_a_site_that_evaluates_nothing_says_so(data: Path) -> None:
    settle(data / A, policy={"evaluation": "none"})
    assert refusal_of(agent(data).evaluate(evaluate_task())).code == "evaluation-not-permitted"


def test_scores_are_of_test_patients_only_and_match_the_model(data: Path) -> None:
    answer = agent(data).evaluate(evaluate_task())
    assert isinstance(answer, SiteEvaluation)
    assert answer.mode == "synthetic"
    cohort = load_cohort(data / A, size=PLAN.image_size, plan_split=PLAN.split)
    test = np.flatnonzero(cohort.part == 2)
    assessed = ~np.isnan(cohort.labels[test])
    patients = [
        len(set(cohort.patients[test][assessed[:, column]].tolist())) for column in range(assessed.shape[1])
    ]
    assert answer.histograms[0].sum(axis=(0, 2)).tolist() == patients
    model = build("small_cnn")
    model.load_state_dict(unflatten(BASE, manifest_of(model.state_dict())))
    positive = cohort.labels[test, 0] == 1
    best = score(model, cohort.images, cohort.modality, test)[positive, 0].max()
    assert abs(np.flatnonzero(answer.histograms[0, 0, 0]).max() * 0.05 - 12 - best) <= 0.05


def test_a_held_out_site_scores_everyone(data: Path) -> None:
    answers = [agent(data, HELD_OUT).evaluate(evaluate_task(everyone)) for everyone in (True, False)]
    everyone, test = (answer.histograms.sum() for answer in answers if isinstance(answer, SiteEvaluation))
    assert everyone > test > 0


def test_a_site_that_trains_never_scores_everyone(data: Path) -> None:
    assert refusal_of(agent(data).evaluate(evaluate_task(everyone=True))).code == "evaluation-not-permitted"


def test_an_agent_is_kept_between_messages(data: Path) -> None:
    path = str(data / A / "site.yaml")
    again = parse_plan(json.loads(PLAN.canonical_json()))
    assert agent_for(path, PLAN) is agent_for(path, again)
    assert agent_for(path, PLAN) is not agent_for(path, tiny_plan(name="another"))


# --- nothing leaves beside the answer
# ---------------------------------------------------------------------------------------------------


def everything_in(message: Message) -> bytes:
    """All bytes of a reply that a coordinator could look at."""
    parts = [repr(message.metadata).encode()]
    if message.has_error():
        return b"".join([*parts, repr(message.error.reason).encode()])
    for record in message.content.values():
        parts.append(repr(dict(record)).encode())
    for name, records in message.content.array_records.items():
        parts += [name.encode(), *(array.data for array in records.values())]
    return b"".join(parts)


def ask(data: Path, kind: str, task: WireMessage | None, name: str = A) -> Message:
    consortium = Consortium(data=data, names=(name,))
    grid = consortium.grid(PLAN, data)
    content = (task or DescribeTask()).to_record()
    (answer,) = grid.send_and_receive([Message(content=content, dst_node_id=1, message_type=kind)])
    return answer


def broken_sheet(site: Path) -> None:
    (site / "labels.csv").write_text(f"file,metal\n{MARKER}.dcm,{MARKER}\n", encoding="utf-8")


def broken_policy(site: Path) -> None:
    settle(site, policy={MARKER: 1})


def broken_site(site: Path) -> None:
    settle(site, **{MARKER: MARKER})


def missing_images(site: Path) -> None:
    settle(site, images=MARKER)


def damaged_images(site: Path) -> None:
    for number, path in enumerate(sorted((site / "images").iterdir())):
        path.unlink()
        (site / "images" / f"{MARKER}_{number}.dcm").write_bytes(b"\0" * 128 + b"DICM" + MARKER.encode())


def damaged_ledger(site: Path) -> None:
    (site / "state" / ledger_file_name(read_site(site)[0].cohort)).write_text(MARKER, encoding="utf-8")


def state_in_the_way(site: Path) -> None:
    settle(site, state=f"{MARKER}.txt")
    (site / f"{MARKER}.txt").write_text("a file", encoding="utf-8")


BREAKS = (
    broken_sheet,
    broken_policy,
    broken_site,
    missing_images,
    damaged_images,
    damaged_ledger,
    state_in_the_way,
)


@pytest.mark.parametrize("kind", ["train", "private", "evaluate", "query.describe"])
@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_no_path_no_name_and_no_exception_text_leaves(damage: Any, kind: str, data: Path) -> None:
    (data / A).rename(data / f"site-{MARKER}")
    damage(data / f"site-{MARKER}")
    task = {
        "train": non_private(),
        "private": train_task(),
        "evaluate": evaluate_task(),
        "query.describe": None,
    }[kind]
    agent_for.cache_clear()
    answer = ask(data, "train" if kind == "private" else kind, task, f"site-{MARKER}")
    assert not answer.has_error(), "Flower's error reply carries the text of the exception"
    said = everything_in(answer)
    for hidden in (MARKER, "Traceback", str(data), "labels.csv", "site.yaml"):
        assert not [spelling for spelling in spellings(hidden) if spelling in said]
    if message_type(answer.content) == "Refusal":
        assert Refusal.from_record(answer.content).code in {
            "site-failure",
            "ledger-damaged",
            "ledger-unwritable",
        }


def test_a_raising_agent_says_one_code_and_logs_the_rest(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(f"{data}/{MARKER}")

    monkeypatch.setattr("client.agent.tasks.train_epochs", fail)
    agent_for.cache_clear()
    answer = ask(data, "train", non_private())
    said = Refusal.from_record(answer.content)
    assert (said.code, said.site, said.run) == ("site-failure", A, "r")
    log = (data / A / "state" / "site.log").read_text(encoding="utf-8")
    assert said.incident in log
    assert MARKER in log
    assert not any(spelling in everything_in(answer) for spelling in spellings(MARKER))


def test_different_failures_cannot_be_told_apart(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that depended on what went wrong could depend on a patient."""
    answers = []
    for error in (ValueError("x"), MemoryError(), OSError(28, "No space"), RuntimeError("NaN in patient 7")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("client.agent.tasks.train_epochs", fail)
        answers.append(refusal_of(agent(data).train(non_private())).model_dump(exclude={"incident"}))
    assert all(answer == answers[0] for answer in answers), answers


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"fields": ConfigRecord({"json": f'{{"{MARKER}": 1}}'})})]
)
def test_a_malformed_question_is_refused_in_general_words(kind: str, content: RecordDict, data: Path) -> None:
    grid = Consortium(data=data).grid(PLAN, data)
    (answer,) = grid.send_and_receive([Message(content=content, dst_node_id=1, message_type=kind)])
    assert Refusal.from_record(answer.content).code == "site-failure"
    assert MARKER.encode() not in everything_in(answer)


def test_an_update_of_another_model_is_refused_and_nothing_leaves(data: Path) -> None:
    for task in (non_private(base=np.zeros(7, np.float32)), train_task(base=np.zeros(7, np.float32))):
        assert refusal_of(agent(data).train(task)).code == "crafted-model"


def test_weights_that_are_not_finite_train_nothing(data: Path) -> None:
    for value in (np.nan, np.inf, 3e38):
        assert (
            refusal_of(agent(data).train(non_private(base=np.full_like(BASE, value)))).code == "crafted-model"
        )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=st.text(max_size=600), arm=st.text(max_size=40))
def test_any_words_in_a_question_name_no_file(run: str, arm: str, data: Path) -> None:
    before = {path for path in data.rglob("*") if "state" not in path.parts}
    assert isinstance(agent(data).train(train_task(run=run, arm=arm)), SiteUpdate | Refusal)
    assert {path for path in data.rglob("*") if "state" not in path.parts} == before
    assert all(
        path.parent.name in {"outbox", "cache", "state", "runs"}
        for site in SITES
        for path in (data / site / "state").rglob("*")
    )


def test_a_broken_site_yaml_leaves_a_trace_for_the_operator(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply says that the operator finds the cause in the site log."""
    settle(data / A, unknown_key=1)
    grid = Consortium(data=data).grid(PLAN, data)
    grid.send_and_receive(
        [Message(content=DescribeTask().to_record(), dst_node_id=1, message_type="query.describe")]
    )
    log = data / A / "state" / "site.log"
    assert "unknown_key" in caplog.text or (
        log.is_file() and "unknown_key" in log.read_text(encoding="utf-8")
    )
