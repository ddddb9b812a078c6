"""A hospital answers what its policy admits, once, and nothing of what it knows leaves beside the answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.agent.tasks import agent_for
from client.data.cohort import load_cohort
from client.dp.dp_sgd import train_private_head
from client.site.approvals import approve
from client.site.site_ledger import LEDGER
from common.learning import extract_features, score
from common.models import build
from common.names import MAX_RUN
from common.plan import parse_plan
from common.pricing import plan_epsilon, with_noise
from common.privacy import epsilon_of
from common.weights import digest, manifest_of, unflatten
from common.wire import (
    DescribeTask,
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    WireMessage,
    message_type,
)
from tests.helpers.consortium import HELD_OUT, SITES, Consortium, settle, tiny_plan
from tests.helpers.site_agent import (
    BASE,
    HEAD,
    MARKER,
    PLAN,
    A,
    agent,
    evaluate_task,
    ledger,
    non_private,
    refusal_of,
    rows,
    spellings,
    train_task,
    update_of,
)


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
    spent = spent_of(data)
    update_of(agent(data).train(train_task(round=2)))
    assert spent_of(data) == spent > 1.8
    assert rows(data) == [("reserve", "", 2), ("commit", "round 1", 1), ("commit", "round 2", 1)]
    update_of(agent(data).train(train_task(run="another")))
    assert spent_of(data) > spent


def spent_of(data: Path) -> float:
    with ledger(data) as opened:
        return opened.accounts(max_epsilon=8.0, max_delta=1e-5)[0].spent


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
    settle(data / A, policy={"max_epsilon": 2.5, "max_epsilon_per_run": 2.0})
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
    assert 1.8 < said.epsilon <= 2
    with ledger(data) as opened:
        assert said.epsilon == epsilon_of(opened.history(), 1e-5)
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
    best = np.clip(score(model, cohort.images, cohort.modality, test)[positive, 0].max(), -12, 12)
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
    (site / "state" / LEDGER).write_text(MARKER, encoding="utf-8")


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

    monkeypatch.setattr("client.agent.training.train_epochs", fail)
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

        monkeypatch.setattr("client.agent.training.train_epochs", fail)
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


WORDS = st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Those that a message may have: the others are refused where it is read."""


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=st.text(WORDS, max_size=MAX_RUN), arm=st.text(WORDS, max_size=32))
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


# consent


def patient_ids(data: Path) -> dict[str, str]:
    """PatientID of each file of a site, by its path below the images folder."""
    images = data / A / "images"
    return {
        path.relative_to(images).as_posix(): str(pydicom.dcmread(path, stop_before_pixels=True).PatientID)
        for path in sorted(images.rglob("*.dcm"))
    }


def opt_out(data: Path, *patients: str) -> None:
    (data / A / "cohort.yaml").write_text("opt_out_file: out.csv\n")
    (data / A / "out.csv").write_text("PatientID;Date\n" + "".join(f"{one};2024\n" for one in patients))


def test_who_opts_out_between_two_rounds_is_in_no_further_step(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[np.ndarray, np.ndarray]] = []

    def spy(
        weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray, *rest: Any, **how: Any
    ) -> Any:
        trained.append((features.copy(), rest[0].copy()))
        return train_private_head(weight, bias, features, labels, *rest, **how)

    monkeypatch.setattr("client.dp.dp_sgd.train_private_head", spy)
    one = agent(data)
    first = update_of(one.train(train_task()))
    cohort = one.cohort()
    ids = patient_ids(data)
    number = int(cohort.patients[np.flatnonzero(cohort.part == 0)[0]])
    gone = cohort.patients == number
    (patient,) = {ids[cohort.records[row].file] for row in np.flatnonzero(gone)}
    opt_out(data, patient.lower() + " ")
    with ledger(data) as opened:
        fingerprints = {row.fingerprint for row in opened.rows()}
    update_of(one.train(train_task(round=2)))
    features, patients = trained[1]
    rows_before = np.flatnonzero(cohort.part == 0)
    np.testing.assert_array_equal(features, trained[0][0][~gone[rows_before]])
    assert number not in patients
    assert len(patients) < len(trained[0][1])
    assert len(one._features[2]) == len(features), "no feature of the patient stays in memory"
    with ledger(data) as opened:
        assert {row.fingerprint for row in opened.rows()} == fingerprints
    assert update_of(one.train(train_task())).to_bytes() == first.to_bytes(), "a stored answer stays"
    opt_out(data)  # a list that shrinks gives nobody back while the agent runs
    one.renew_consent()
    assert (one.cohort().part[gone] == -1).all()
    assert (
        load_cohort(data / A, size=PLAN.image_size, plan_split=PLAN.split).fingerprint == cohort.fingerprint
    )
    opt_out(data, patient)
    fresh = load_cohort(data / A, size=PLAN.image_size, plan_split=PLAN.split)
    assert (fresh.fingerprint, len(fresh.records)) == (cohort.fingerprint, int((~gone).sum()))


def test_who_opts_out_is_not_scored(data: Path) -> None:
    one = agent(data)
    before = one.evaluate(evaluate_task())
    assert isinstance(before, SiteEvaluation)
    cohort = one.cohort()
    opt_out(data, *{patient_ids(data)[cohort.records[row].file] for row in np.flatnonzero(cohort.part == 2)})
    after = one.evaluate(evaluate_task())
    assert isinstance(after, SiteEvaluation)
    assert (before.histograms.sum() > 0, after.histograms.sum()) == (True, 0)


def test_a_list_that_is_damaged_meanwhile_stops_the_site(data: Path) -> None:
    one = agent(data)
    update_of(one.train(non_private()))
    opt_out(data, "P1")
    (data / A / "out.csv").write_bytes(f"{MARKER}\n\xff\xff\n".encode("latin-1"))
    for answer in (one.train(non_private(round=2)), one.evaluate(evaluate_task())):
        assert refusal_of(answer).code == "site-failure"
        assert not any(spelling in answer.to_bytes() for spelling in spellings(MARKER))
    assert "the opt-out list" in (data / A / "state" / "site.log").read_text()


@pytest.mark.parametrize(
    "text",
    [None, "", "ethics_approval: E1\n", "consent_basis: broad\n", "ethics_approval: '-'\nconsent_basis: b\n"],
)
def test_a_hospital_without_ethics_or_consent_refuses_every_task(data: Path, text: str | None) -> None:
    settle(data / A, kind="hospital", policy={"allow_non_private": True, "evaluation": "disclosed"})
    (data / A / "cohort.yaml").unlink()
    if text is not None:
        (data / A / "cohort.yaml").write_text(text)
    one = agent(data)
    for answer in (one.train(train_task()), one.train(non_private()), one.evaluate(evaluate_task())):
        assert refusal_of(answer).code == "ethics-missing"
        assert "ethics approval" in refusal_of(answer).reason
    ready = one.describe(DescribeTask(rehearse=True))
    assert isinstance(ready, SiteReadiness)
    assert {*ready.arms.values(), ready.evaluation} == {"ethics-missing"}
    assert not rows(data)
    settle(data / A, kind="synthetic")
    assert isinstance(agent(data).evaluate(evaluate_task()), SiteEvaluation)


def test_reference_and_approval_leave_as_a_keyed_hash_only(data: Path) -> None:
    settle(data / A, kind="hospital", patients={"fallback": "study"})
    ethics = {"ethics_approval": MARKER, "consent_basis": "broad consent"}
    (data / A / "cohort.yaml").write_text(yaml.safe_dump(ethics))
    hashes = []
    plan = with_noise(PLAN)
    for _ in range(2):
        described = agent(data, plan=plan).describe()
        assert isinstance(described, SiteDescription)
        assert described.unit == "study"
        assert not any(spelling in described.to_bytes() for spelling in spellings(MARKER))
        hashes.append(described.ethics)
        assert approve(data / A, plan, ethics=ethics).ethics == ethics
    assert hashes[0] != hashes[1], "who approved, and when, is part of the record"
    assert all(len(one) == 64 for one in hashes)
    settle(data / A, kind="synthetic")
    described = agent(data).describe()
    assert isinstance(described, SiteDescription)
    assert described.ethics == ""


# one budget, one release


PRIVATE = tiny_plan(name="private", arms=["federated_dp"])


def private_hospital(data: Path, **policy: object) -> None:
    settle(data / A, kind="hospital", policy=policy)


def test_lost_answers_are_refused_and_never_drawn_again(data: Path) -> None:
    private_hospital(data)
    update_of(agent(data, plan=PRIVATE).train(train_task()))
    spent = rows(data)
    shutil.rmtree(data / A / "state" / "outbox")
    for _ in range(5):
        said = refusal_of(agent(data, plan=PRIVATE).train(train_task()))
        assert said.code == "answer-missing"
    assert rows(data) == spent
    update_of(agent(data, plan=PRIVATE).train(train_task(round=2)))
    update_of(agent(data, plan=PRIVATE).train(train_task(run="new")))
    assert sum(kind == "reserve" for kind, _, _ in rows(data)) == 2, "a new release is a new charge"


def test_a_crash_between_store_and_commit_sends_what_was_stored(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_hospital(data)
    with monkeypatch.context() as patch:
        patch.setattr("client.site.ledger.Ledger.commit", lambda *_, **__: 1 / 0)
        refusal_of(agent(data, plan=PRIVATE).train(train_task()))
    (stored,) = (data / A / "state" / "outbox").iterdir()
    assert [kind for kind, _, _ in rows(data)] == ["reserve"]
    assert stored.read_bytes().endswith(update_of(agent(data, plan=PRIVATE).train(train_task())).to_bytes())
    assert [kind for kind, _, _ in rows(data)] == ["reserve", "commit"]


def test_a_hospital_without_a_ledger_takes_part_in_nothing_private(data: Path) -> None:
    private_hospital(data)
    for path in (data / A / "state").glob("ledger*"):
        path.unlink()
    asked = agent(data, plan=PRIVATE)
    assert refusal_of(asked.train(train_task())).code == "ledger-missing"
    ready = asked.describe(DescribeTask(rehearse=True))
    assert isinstance(ready, SiteReadiness)
    assert ready.arms == {"federated_dp": "ledger-missing"}
    described = asked.describe()
    assert isinstance(described, SiteDescription)
    assert described.ledger_head == ""
    assert not list((data / A / "state").glob("ledger*"))


def test_another_name_of_the_cohort_is_no_fresh_budget(data: Path) -> None:
    private_hospital(data, max_epsilon=2.5)
    update_of(agent(data, plan=PRIVATE).train(train_task()))
    settle(data / A, cohort="renamed")
    said = refusal_of(agent(data, plan=PRIVATE).train(train_task(run="second")))
    assert said.code == "budget-exhausted"


def test_the_plans_delta_moves_nothing_in_the_ledger(data: Path) -> None:
    private_hospital(data, max_epsilon=50.0)
    for number, delta in enumerate((1e-6, 1e-7, 1e-5)):
        plan = tiny_plan(name="private", arms=["federated_dp"], privacy={"delta": delta})
        update_of(agent(data, plan=plan).train(train_task(run=f"run-{number}")))
    with ledger(data) as opened:
        (found,) = [row for row in opened.rows() if row.kind == "filter"]
    assert (found.request, found.epsilon, found.delta) == ("gdp", 50.0, 1e-5)


def test_a_policy_that_changes_its_delta_is_refused(data: Path) -> None:
    private_hospital(data)
    update_of(agent(data, plan=PRIVATE).train(train_task()))
    private_hospital(data, max_delta=1e-4)
    assert refusal_of(agent(data, plan=PRIVATE).train(train_task(run="second"))).code == "filter-fixed"
    ready = agent(data, plan=PRIVATE).describe(DescribeTask(rehearse=True))
    assert isinstance(ready, SiteReadiness)
    assert ready.arms == {"federated_dp": "filter-fixed"}


def test_answers_carry_the_head_of_the_ledger(data: Path) -> None:
    private_hospital(data)
    asked = agent(data, plan=PRIVATE)
    heads = []
    for said in (asked.describe(), asked.train(train_task()), asked.describe()):
        assert isinstance(said, SiteDescription | SiteUpdate)
        heads.append(said.ledger_head)
    with ledger(data) as opened:
        assert [int(head.partition(":")[0]) for head in heads] == [1, 3, 4]
        for head in heads:
            opened.check_ancestor(head)
        assert opened.head() == heads[-1]


def test_a_plan_that_also_trains_without_noise_is_refused_before_it_is_charged(data: Path) -> None:
    private_hospital(data, allow_non_private=True)
    said = refusal_of(agent(data).train(train_task()))
    assert (said.code, rows(data)) == ("cohort-void", [])
    ready = agent(data).describe(DescribeTask(rehearse=True))
    assert isinstance(ready, SiteReadiness)
    assert ready.arms == {"federated": "accept", "federated_dp": "cohort-void"}
    update_of(agent(data).train(non_private()))
    # and from then on in every plan
    assert refusal_of(agent(data, plan=PRIVATE).train(train_task(run="later"))).code == "cohort-void"
    private_hospital(data)
    assert refusal_of(agent(data, plan=PRIVATE).train(train_task(run="later"))).code == "cohort-void"


def test_an_arm_that_the_policy_refuses_voids_nothing(data: Path) -> None:
    private_hospital(data)
    refusal_of(agent(data).train(non_private()))
    assert not update_of(agent(data).train(train_task())).void


def test_where_the_operator_accepts_it_the_update_says_that_no_claim_holds(data: Path) -> None:
    private_hospital(data, allow_non_private=True, after_non_private="void")
    assert update_of(agent(data).train(train_task())).void
    update_of(agent(data).train(non_private()))
    assert update_of(agent(data, plan=PRIVATE).train(train_task(run="later"))).void


def test_a_patient_of_an_older_cohort_is_silently_left_out_of_a_disjoint_one(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[np.ndarray] = []

    def spy(weight: Any, bias: Any, features: np.ndarray, *rest: Any, **how: Any) -> Any:
        trained.append(features)
        return train_private_head(weight, bias, features, *rest, **how)

    monkeypatch.setattr("client.dp.dp_sgd.train_private_head", spy)
    private_hospital(data)
    older, newer = data / A / "images", data / A / "newer"
    files = sorted(older.rglob("*.dcm"))
    ids = patient_ids(data)
    names = sorted(set(ids.values()))
    in_both, only_newer = set(names[:4]), set(names[8:])
    newer.mkdir()
    for path in files:
        name = ids[path.relative_to(older).as_posix()]
        if name in in_both | only_newer:
            shutil.copy(path, newer / path.name)
        if name in only_newer:
            path.unlink()
    first = update_of(agent(data, plan=PRIVATE).train(train_task()))
    with ledger(data) as opened:
        before = opened.accounts(max_epsilon=8.0, max_delta=1e-5)[0].spent
    settle(data / A, cohort="newer", cohort_disjoint=True, images="newer")
    one = agent(data, plan=PRIVATE)
    second = update_of(one.train(train_task(run="second")))
    cohort = one.cohort()
    used = {
        patient_of(newer / record.file)
        for record, part in zip(cohort.records, cohort.part, strict=True)
        if part >= 0
    }
    assert used == only_newer
    assert {patient_of(newer / record.file) for record in cohort.records} == in_both | only_newer
    assert len(trained[1]) == int((cohort.part == 0).sum())
    assert (second.epsilon, second.noise_multiplier) == (first.epsilon, first.noise_multiplier)
    with ledger(data) as opened:
        own, shared = opened.accounts(max_epsilon=8.0, max_delta=1e-5)
        assert (own.name, own.spent, shared.spent) == ("newer", before, before)


def patient_of(path: Path) -> str:
    return str(pydicom.dcmread(path, stop_before_pixels=True).PatientID)


def test_the_features_of_a_patient_are_computed_without_the_others(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch the last bit of a feature may depend on who else is in it, and then one patient more or
    less would move the clipped gradients of others.
    """
    asked: list[np.ndarray] = []

    def spy(model: Any, images: np.ndarray, modality: np.ndarray, rows: np.ndarray) -> np.ndarray:
        asked.append(rows)
        return extract_features(model, images, modality, rows)

    monkeypatch.setattr("client.agent.tasks.extract_features", spy)
    one = agent(data)
    update_of(one.train(train_task()))
    cohort = one.cohort()
    assert [len(set(cohort.patients[rows])) for rows in asked] == [1] * len(asked)
    assert len(asked) == len(set(cohort.patients[cohort.part == 0])) > 3
    network = build("small_cnn")
    network.load_state_dict(unflatten(BASE, manifest_of(network.state_dict())))
    together = extract_features(network, cohort.images, cohort.modality, np.flatnonzero(cohort.part == 0))
    np.testing.assert_allclose(one._features[2], together, atol=1e-4)


def test_a_claim_follows_the_noise_that_was_reserved_not_that_of_another_plan(data: Path) -> None:
    """Asked again under a plan with more noise, a request keeps its reservation, and says what that costs."""
    settle(data / A, policy={"max_epsilon": 1000.0, "allow_non_private": True, "evaluation": "synthetic"})
    little, much = (PLAN.privacy.model_copy(update={"noise_multiplier": noise}) for noise in (1.0, 50.0))
    reserved, asked = (PLAN.model_copy(update={"privacy": privacy}) for privacy in (little, much))
    first = update_of(agent(data, plan=reserved).train(train_task()))
    second = update_of(agent(data, plan=asked).train(train_task(round=2)))
    assert (first.noise_multiplier, second.noise_multiplier) == (1.0, 1.0)
    assert first.epsilon == second.epsilon == plan_epsilon(reserved)
    assert plan_epsilon(reserved) > 2 * plan_epsilon(asked)
