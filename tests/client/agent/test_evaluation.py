"""An evaluation of a hospital is one release: bounded by one patient, noised once, charged once, stored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.agent import evaluation
from client.agent.evaluation import MAX_SITE_MODELS, any_sums, exact_sums, noised_counts
from client.agent.tasks import Agent
from client.data.cohort import load_cohort
from client.site.enrolment import LEVELS
from client.site.ledger import Ledger
from common.artifacts import DEFAULT_LABELS
from common.counts import (
    BINS,
    DISCLOSED_BINS,
    EDGES,
    NOISED_BINS,
    count_between,
    noise_deviation,
    per_patient,
    quantile_edges,
)
from common.errors import RunError
from common.plan import RunPlan
from common.pricing import EVALUATION, charges
from common.privacy import epsilon_of
from common.subgroups import PLACE, SUBGROUPS
from common.wire import DescribeTask, EvaluateTask, SiteEvaluation, SiteReadiness, WireMessage
from tests.helpers.consortium import HELD_OUT, settle, tiny_plan
from tests.helpers.site_agent import BASE, HEAD, A, agent, ledger, refusal_of, rows

ARTIFACTS = len(DEFAULT_LABELS)
SPLIT = {"train": 0.6, "test": 0.4}


def dp_plan(noise: float = 6.0, **changes: Any) -> RunPlan:
    return tiny_plan(
        **{"name": "scored", "arms": ["federated_dp"], "privacy": {"evaluation_noise_multiplier": noise}}
        | changes
    )


def moved(amount: float) -> np.ndarray:
    """Weights that differ from the public ones in the head alone."""
    weights = BASE.copy()
    weights[HEAD] += np.float32(amount)
    return weights


def evaluate_task(run: str = "r", everyone: bool = False, **models: np.ndarray) -> EvaluateTask:
    named = models or {"public": BASE, "federated_dp": moved(0.1)}
    edges = np.sort(np.random.default_rng(1).normal(0, 2, (len(named), ARTIFACTS, EDGES)))
    return EvaluateTask(
        run=run,
        models=tuple(named),
        everyone=everyone,
        weights=np.stack(list(named.values())),
        edges=edges.astype(np.float32),
    )


def hospital(data: Path, name: str = A, evaluation: str = "dp", **policy: Any) -> None:
    settle(data / name, kind="hospital", nominal_patients=500, policy={"evaluation": evaluation, **policy})


def scored(answer: WireMessage) -> SiteEvaluation:
    assert isinstance(answer, SiteEvaluation), answer
    return answer


def log_of(data: Path, name: str = A) -> str:
    return (data / name / "state" / "site.log").read_text(encoding="utf-8")


# --- one patient, and the noise


PATIENT = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=ARTIFACTS, max_size=ARTIFACTS),
        st.lists(st.floats(width=32), min_size=2 * ARTIFACTS, max_size=2 * ARTIFACTS),
    ),
    min_size=1,
    max_size=6,
)
"""Slices of one patient: labels, and scores of two models."""


def counted(patients: list[list[Any]], edges: np.ndarray) -> np.ndarray:
    """The integer vector that is noised, for two models."""
    slices = [(number, *each) for number, patient in enumerate(patients) for each in patient]
    owners = np.array([number for number, _, _ in slices], np.int64)
    labels = np.array([row for _, row, _ in slices], np.float32).reshape(-1, ARTIFACTS)
    logits = np.array([row for _, _, row in slices], np.float32).reshape(-1, 2, ARTIFACTS)
    vectors = [
        count_between(*per_patient(logits[:, model], labels, owners), edges[model]) for model in range(2)
    ]
    return np.stack(vectors)


@given(st.lists(PATIENT, max_size=5), PATIENT, st.integers(0, 2**32 - 1))
def test_one_patient_more_or_less_changes_the_counts_by_at_most_the_sensitivity(
    others: list[Any], one: Any, seed: int
) -> None:
    """Whatever the labels, the scores, the slices and the bins are."""
    edges = np.sort(np.random.default_rng(seed).normal(0, 3, (2, ARTIFACTS, EDGES)))
    change = counted([*others, one], edges) - counted(others, edges)
    assert (change**2).sum() <= 2 * ARTIFACTS
    assert noise_deviation(1.0, 2, ARTIFACTS) == pytest.approx(np.sqrt(2 * ARTIFACTS))


def empty_release(noise: float = 2.0, models: int = 10) -> np.ndarray:
    """The answer about nobody: noise alone."""
    none = np.zeros((0, ARTIFACTS))
    edges = np.zeros((models, ARTIFACTS, EDGES), np.float32)
    return noised_counts([none] * models, none, edges, noise)


def test_an_empty_test_set_gives_noise_of_the_stated_deviation_everywhere() -> None:
    drawn = np.stack([empty_release() for _ in range(60)])
    expected = noise_deviation(2.0, 10, ARTIFACTS) ** 2 + 1 / 12  # rounding to whole counts
    relative = drawn.astype(float).var() / expected
    assert drawn.dtype == np.int64
    assert abs(relative - 1) < 5 * np.sqrt(2 / drawn.size)
    each = drawn.astype(float).var(axis=0, ddof=1) / expected  # of every count, chi-square with 59 degrees
    assert 0.35 < each.min() < each.max() < 2.3


def test_counts_and_calls_have_noise_of_their_own() -> None:
    drawn = np.stack([empty_release().ravel() for _ in range(400)]).astype(float)
    correlation = np.corrcoef(drawn[:, :100].T)
    assert np.abs(correlation - np.eye(100)).max() < 6 / np.sqrt(400)
    between_calls = np.corrcoef(drawn)
    assert np.abs(between_calls - np.eye(400)).max() < 6 / np.sqrt(drawn.shape[1])


def test_one_draw_covers_all_models_and_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[tuple[int, ...], float]] = []
    real = evaluation._with_noise

    def spy(counts: np.ndarray, deviation: float) -> np.ndarray:
        drawn.append((counts.shape, deviation))
        return real(counts, deviation)

    monkeypatch.setattr(evaluation, "_with_noise", spy)
    empty_release(2.0, models=3)
    assert drawn == [((3, 2, ARTIFACTS, NOISED_BINS), pytest.approx(2.0 * np.sqrt(15)))]


def test_a_score_that_is_no_number_is_counted_like_any_other() -> None:
    edges = np.tile(np.linspace(-3, 3, EDGES), (1, 1))
    found = count_between(np.full((3, 1), np.nan), np.ones((3, 1)), edges)
    assert found[0, 0].sum() == 3


def test_quantile_edges_put_equally_many_public_patients_in_each_bin() -> None:
    scores = np.random.default_rng(3).normal(size=(800, 2))
    scores[:, 1] = np.nan
    edges = quantile_edges(scores)
    assert (edges.shape, edges.dtype) == ((2, EDGES), np.dtype(np.float32))
    assert count_between(scores, np.ones_like(scores), edges)[0, 0] == pytest.approx(
        [100] * NOISED_BINS, abs=3
    )
    assert np.array_equal(quantile_edges(scores * (1 + 1e-9)), edges)
    assert (edges[1, 0], edges[1, -1]) == pytest.approx((-11.4, 11.4)), "of nobody: equal bins"


# --- one question, one charge, one answer


def test_a_hospital_is_scored_with_noise_and_charged_for_it(data: Path) -> None:
    hospital(data)
    plan = dp_plan()
    answer = scored(agent(data, plan=plan).evaluate(evaluate_task()))
    assert answer.mode == "dp"
    assert (answer.histograms.size, answer.covariance.size) == (0, 0)
    assert answer.noised.shape == (2, 2, ARTIFACTS, NOISED_BINS)
    steps = charges(plan)[EVALUATION]
    assert (answer.noise_multiplier, answer.delta) == (6.0, plan.privacy.delta)
    assert answer.epsilon == epsilon_of([steps], plan.privacy.delta)
    assert rows(data) == [("reserve", "", 1), ("commit", EVALUATION, 1)]
    with ledger(data) as opened:
        row = next(row for row in opened.rows() if row.kind == "reserve")
    assert (row.request, row.purpose, row.as_steps()) == (json.dumps(["r", EVALUATION]), "evaluate", steps)


def test_but_for_the_noise_the_counts_are_those_of_the_test_patients(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(data)
    monkeypatch.setattr(evaluation, "_with_noise", lambda counts, deviation: counts)
    plan, task = dp_plan(), evaluate_task()
    answer = scored(agent(data, plan=plan).evaluate(task))
    cohort = load_cohort(data / A, size=plan.image_size, plan_split=plan.split)
    test = np.flatnonzero(cohort.part == 2)
    scores, truth = evaluation.score_patients(cohort, plan.model, task.weights, test)
    expected = [count_between(logits, truth, edges) for logits, edges in zip(scores, task.edges, strict=True)]
    assert np.array_equal(answer.noised, np.stack(expected))
    assert answer.noised.sum() == 2 * np.isfinite(truth).sum() > 10


def test_asked_again_it_gives_the_same_bytes_and_charges_nothing(data: Path) -> None:
    """Also where the images have gone: the answer was given, and no patient is looked at again."""
    hospital(data)
    first = scored(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    spent = rows(data)
    (data / A / "images").rename(data / A / "gone")
    for asked in (agent(data, plan=dp_plan()), agent(data, plan=dp_plan())):
        assert scored(asked.evaluate(evaluate_task())).to_bytes() == first.to_bytes()
    assert rows(data) == spent


@pytest.mark.parametrize("mode", ["dp", "disclosed"])
def test_an_opt_out_after_the_answer_does_not_change_it(data: Path, mode: str) -> None:
    hospital(data, evaluation=mode)
    first = scored(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    opt_out(data, a_test_patient(data)[0])
    assert scored(agent(data, plan=dp_plan()).evaluate(evaluate_task())).to_bytes() == first.to_bytes()


@pytest.mark.parametrize("mode", ["dp", "disclosed"])
@pytest.mark.parametrize("change", ["weights", "fewer", "order", "edges"])
def test_another_question_in_the_same_run_is_refused_and_not_charged(
    data: Path, mode: str, change: str
) -> None:
    hospital(data, evaluation=mode)
    asked = agent(data, plan=dp_plan())
    task = evaluate_task()
    scored(asked.evaluate(task))
    spent = rows(data)
    other = {
        "weights": lambda: evaluate_task(public=BASE, federated_dp=moved(0.2)),
        "fewer": lambda: evaluate_task(public=BASE),
        "order": lambda: evaluate_task(federated_dp=moved(0.1), public=BASE),
        "edges": lambda: task.model_copy(update={"edges": task.edges + np.float32(1)}),
    }[change]()
    assert refusal_of(asked.evaluate(other)).code == "evaluation-repeated"
    assert rows(data) == spent


def test_another_run_is_another_charge(data: Path) -> None:
    hospital(data)
    asked = agent(data, plan=dp_plan())
    first, second = (scored(asked.evaluate(evaluate_task(run))) for run in ("r", "s"))
    assert (first.noised != second.noised).any()
    assert [kind for kind, _, _ in rows(data)] == ["reserve", "commit"] * 2


def test_an_exhausted_budget_refuses_and_scores_nobody(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital(data, max_epsilon=2.5)
    plan = dp_plan(0.8, arms=["public"])
    monkeypatch.setattr("client.agent.tasks.score_patients", never)
    settle(data / A, policy={"evaluation": "dp", "max_epsilon": 0.5})
    assert refusal_of(agent(data, plan=plan).evaluate(evaluate_task())).code == "epsilon-over-policy"
    settle(data / A, policy={"evaluation": "dp", "max_epsilon": 8.0})
    with ledger(data) as opened:
        opened.reserve(
            request="x",
            steps=charges(dp_plan(0.7))[EVALUATION],
            purpose="evaluate",
            fingerprint="",
            max_epsilon=1000.0,
            max_delta=1e-5,
        )
    spent = rows(data)
    assert refusal_of(agent(data, plan=plan).evaluate(evaluate_task())).code == "budget-exhausted"
    assert rows(data) == spent


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("patients were scored")


def test_a_small_hospital_at_cautious_is_refused_uncharged(data: Path) -> None:
    policy = LEVELS["cautious"].policy.model_dump(exclude_none=True)
    plan = dp_plan(6.0, arms=["public"], privacy={"evaluation_noise_multiplier": 6.0, "delta": 1e-6})
    settle(data / A, kind="hospital", nominal_patients=50, policy=policy)
    assert refusal_of(agent(data, plan=plan).evaluate(evaluate_task())).code == "too-few-patients"
    assert rows(data) == []
    settle(data / A, kind="hospital", nominal_patients=500, policy=policy)
    assert scored(agent(data, plan=plan).evaluate(evaluate_task())).mode == "dp"


def test_a_plan_without_noise_for_the_evaluation_is_refused_and_says_what_it_lacks(data: Path) -> None:
    settle(data / A, kind="hospital")  # the default policy
    asked = agent(data, plan=tiny_plan(arms=["federated_dp"]))
    said = refusal_of(asked.evaluate(evaluate_task()))
    assert said.code == "evaluation-not-permitted"
    assert "evaluation_noise_multiplier" in said.reason
    assert rows(data) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda edges: edges[:, :, :-1],
        lambda edges: edges.astype(np.float64),
        lambda edges: edges[:, :, ::-1],
        lambda edges: np.where(edges == edges.max(), np.inf, edges).astype(np.float32),
        lambda edges: edges[:0],
    ],
    ids=["shape", "dtype", "decreasing", "infinite", "none"],
)
@pytest.mark.parametrize("mode", ["dp", "disclosed"])
def test_bins_that_do_not_fit_are_refused_uncharged(data: Path, mode: str, spoil: Any) -> None:
    hospital(data, evaluation=mode)
    task = evaluate_task()
    task = task.model_copy(update={"edges": spoil(task.edges)})
    answer = agent(data, plan=dp_plan()).evaluate(task)
    if mode == "disclosed" and not task.edges.size:
        assert scored(answer).mode == "disclosed", "in equal bins"
    else:
        assert refusal_of(answer).code == "bad-message"
    assert rows(data) == []


def test_a_crash_before_the_commit_sends_the_stored_answer_and_commits_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(data)
    with monkeypatch.context() as crash:
        crash.setattr(Ledger, "commit", never)
        assert refusal_of(agent(data, plan=dp_plan()).evaluate(evaluate_task())).code == "site-failure"
    assert [kind for kind, _, _ in rows(data)] == ["reserve"]
    monkeypatch.setattr("client.agent.tasks.score_patients", never)
    scored(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    assert [kind for kind, _, _ in rows(data)] == ["reserve", "commit"]


def test_a_committed_answer_that_is_gone_is_not_drawn_again(data: Path) -> None:
    hospital(data)
    scored(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    for path in (data / A / "state" / "outbox").iterdir():
        path.unlink()
    spent = rows(data)
    assert refusal_of(agent(data, plan=dp_plan()).evaluate(evaluate_task())).code == "answer-missing"
    assert rows(data) == spent


def test_a_crash_while_scoring_is_one_charge(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital(data)
    with monkeypatch.context() as crash:
        crash.setattr("client.agent.tasks.score_patients", never)
        refusal_of(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    scored(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    assert rows(data) == [("reserve", "", 1), ("commit", EVALUATION, 1)]


# --- whose patients


@pytest.mark.parametrize("mode", ["dp", "disclosed"])
@pytest.mark.parametrize("name", [A, HELD_OUT])
def test_a_hospital_never_scores_everyone(data: Path, mode: str, name: str) -> None:
    """Its patients may train later."""
    hospital(data, name, evaluation=mode)
    said = refusal_of(agent(data, name, dp_plan()).evaluate(evaluate_task(everyone=True)))
    assert said.code == "evaluation-not-permitted"
    assert rows(data, name) == []


def test_a_site_whose_others_train_in_sister_runs_scores_the_test_patients_of_the_plan(data: Path) -> None:
    """A held-out site of a study, kind synthetic: the split is the one by which it trains elsewhere."""
    split = {"train": 0.6, "test": 0.4}
    left_out, trains = dp_plan(split=split, held_out_patients="test"), dp_plan(split=split, held_out=[])
    said = refusal_of(agent(data, HELD_OUT, left_out).evaluate(evaluate_task(everyone=True)))
    assert said.code == "evaluation-not-permitted"
    sums = [
        scored(agent(data, HELD_OUT, plan).evaluate(evaluate_task(run))).histograms
        for run, plan in (("r", left_out), ("s", trains))
    ]
    assert np.array_equal(*sums)
    everyone = agent(data, HELD_OUT, dp_plan()).evaluate(evaluate_task("t", everyone=True))
    assert 0 < sums[0].sum() < scored(everyone).histograms.sum()


@pytest.mark.parametrize("name", [A, HELD_OUT])
def test_the_test_split_is_that_of_the_first_run_in_every_run(
    data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits .80 and .82 would differ by few patients."""
    hospital(data, name)
    used: list[np.ndarray] = []
    real = evaluation.patients_scored

    def spy(cohort: Any, *, everyone: bool) -> np.ndarray:
        used.append(real(cohort, everyone=everyone))
        assert (cohort.part[used[-1]] == 2).all()
        return used[-1]

    monkeypatch.setattr("client.agent.tasks.patients_scored", spy)
    first = {"train": 0.8, "test": 0.2}
    scored(agent(data, name, dp_plan(split=first)).evaluate(evaluate_task("r")))
    kept = json.loads((data / name / "state" / "split.json").read_text())
    other = dp_plan(split={"train": 0.82, "test": 0.18})
    answer = agent(data, name, other).evaluate(evaluate_task("s"))
    if name == A:
        assert (refusal_of(answer).code, kept["test"]) == ("split-differs", 0.2)
    else:  # a held-out hospital has its own split, whatever the plan's is
        scored(answer)
        assert np.array_equal(used[0], used[1])


def test_a_rehearsal_says_whether_the_hospital_could_be_scored(data: Path) -> None:
    def said(plan: RunPlan, name: str = A) -> SiteReadiness:
        found = agent(data, name, plan).describe(DescribeTask(run="", rehearse=True))
        assert isinstance(found, SiteReadiness)
        return found

    hospital(data)
    assert said(dp_plan()).evaluation == "accept"
    older = said(tiny_plan(arms=["federated_dp"]))
    assert older.evaluation == "evaluation-not-permitted"
    assert "evaluation_noise_multiplier" in older.reasons["evaluation"]
    hospital(data, max_epsilon=3.5)
    with ledger(data) as opened:  # the training still fits, the evaluation after it does not
        opened.reserve(
            request="x",
            steps=charges(dp_plan(1.9))[EVALUATION],
            purpose="evaluate",
            fingerprint="",
            max_epsilon=3.5,
            max_delta=1e-5,
        )
    before = rows(data)
    short = said(dp_plan(1.9))
    assert (short.arms["federated_dp"], short.evaluation) == ("accept", "budget-exhausted")
    assert rows(data) == before


# --- exact scores


def opt_out(data: Path, patient: str, name: str = A) -> None:
    (data / name / "out.csv").write_text(f"{patient}\n", encoding="utf-8")
    cohort = data / name / "cohort.yaml"
    cohort.write_text(cohort.read_text() + "opt_out_file: out.csv\n", encoding="utf-8")


def a_test_patient(data: Path, name: str = A) -> tuple[str, set[str]]:
    """PatientID and files of one."""
    cohort = load_cohort(data / name, size=dp_plan().image_size, plan_split=dp_plan().split)
    patient = min(cohort.records[row].patient for row in np.flatnonzero(cohort.part == 2))
    files = {record.file for record in cohort.records if record.patient == patient}
    return pydicom.dcmread(data / name / "images" / min(files), stop_before_pixels=True).PatientID, files


def relabel_one(data: Path, name: str = A) -> None:
    """Turn round the labels of one test patient."""
    _, files = a_test_patient(data, name)
    sheet = data / name / "labels.csv"
    with sheet.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        for artifact in DEFAULT_LABELS if row["file"] in files else ():
            row[artifact] = {"0": "1", "1": "0"}.get(row[artifact], row[artifact])
            row[f"{artifact}_severity"] = ""
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def test_exact_scores_of_sets_that_differ_by_few_patients_do_not_leave(data: Path) -> None:
    hospital(data, evaluation="disclosed")
    scored(agent(data, plan=dp_plan()).evaluate(evaluate_task("r")))
    later = evaluate_task("s", public=BASE, federated_dp=moved(0.2))
    assert scored(agent(data, plan=dp_plan()).evaluate(later)).mode == "disclosed", "the same patients"
    relabel_one(data)
    latest = evaluate_task("t", public=BASE, federated_dp=moved(0.3))
    said = refusal_of(agent(data, plan=dp_plan()).evaluate(latest))
    assert said.code == "site-failure", "that few patients changed is not for the coordinator"
    assert "1 test patients differ" in log_of(data)


def test_one_who_opted_out_is_not_shown_by_the_difference_of_two_exact_answers(data: Path) -> None:
    hospital(data, evaluation="disclosed")
    scored(agent(data, plan=dp_plan()).evaluate(evaluate_task("r")))
    opt_out(data, a_test_patient(data)[0])
    later = evaluate_task("s", public=BASE, federated_dp=moved(0.2))
    assert refusal_of(agent(data, plan=dp_plan()).evaluate(later)).code == "site-failure"


def test_a_model_of_one_run_is_not_scored_exactly_in_another(data: Path) -> None:
    hospital(data, evaluation="disclosed")
    asked = agent(data, plan=dp_plan())
    scored(asked.evaluate(evaluate_task("r")))
    assert refusal_of(asked.evaluate(evaluate_task("s"))).code == "evaluation-repeated"
    scored(asked.evaluate(evaluate_task("t", public=BASE)))


@pytest.mark.parametrize(
    "models",
    [
        {"public": moved(0.1)},
        {"federated_dp": np.concatenate([BASE[:1] + np.float32(0.1), BASE[1:]])},
        {"local/hospital-a": BASE},
        {"federated_dp/hospital-a": BASE},
        {"model-7": BASE},
        {"federated_dp/": BASE},
    ],
    ids=["not-the-public-one", "not-its-backbone", "no-such-arm", "shared-arm", "any", "slash"],
)
def test_a_model_that_is_none_of_the_run_is_not_scored_exactly(
    data: Path, models: dict[str, np.ndarray]
) -> None:
    hospital(data, evaluation="disclosed")
    said = refusal_of(agent(data, plan=dp_plan()).evaluate(evaluate_task(**models)))
    assert said.code == "foreign-model"


def test_twenty_models_of_any_name_are_not_scored_exactly(data: Path) -> None:
    hospital(data, evaluation="disclosed")
    plan = dp_plan(arms=["local", "federated_dp"])
    many = {f"local/site-{number}": BASE for number in range(MAX_SITE_MODELS + 1)}
    assert refusal_of(agent(data, plan=plan).evaluate(evaluate_task(**many))).code == "foreign-model"


CRAFTED = {
    "public quantiles": quantile_edges,
    "around one patient": lambda scores: scores[0][:, None] + np.linspace(-1e-6, 1e-6, EDGES)[None],
    "all alike": lambda scores: np.zeros((ARTIFACTS, EDGES)),
    "far away": lambda scores: np.full((ARTIFACTS, EDGES), 3e38),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_disclosed_histograms_have_twenty_bins_and_no_small_cell_whatever_the_edges(crafted: str) -> None:
    """A coordinator who chooses where they lie gets no finer ones, in the covariance neither."""
    rng = np.random.default_rng(5)
    scores = [rng.normal(0, 4, (500, ARTIFACTS)) for _ in range(2)]
    truth = (rng.random((500, ARTIFACTS)) < 0.3).astype(float)
    truth[9:, 0] = 0
    edges = np.stack([CRAFTED[crafted](one) for one in scores]).astype(np.float32)
    histograms, covariance = exact_sums(scores, truth, edges, minimum_cell=10, coarse=True)
    assert histograms.shape == (2, 2, ARTIFACTS, BINS)
    assert np.count_nonzero(histograms.sum(1), axis=-1).max() <= DISCLOSED_BINS
    assert len(np.flatnonzero(histograms.sum((0, 1, 2)))) <= DISCLOSED_BINS
    assert not histograms[:, :, 0].any()
    fine, _ = exact_sums(scores, truth, edges, minimum_cell=10)
    assert np.array_equal(fine.sum(-1), histograms.sum(-1))
    assert np.isfinite(np.diag(covariance)[1:ARTIFACTS]).all()
    in_bin = edges[0, :, 1::2].astype(float)
    for artifact in range(1, ARTIFACTS):
        order = np.argsort(scores[0][:, artifact])
        places = np.searchsorted(in_bin[artifact], scores[0][order, artifact], side="right")
        for one, present in zip(histograms[0, :, artifact], (1, 0), strict=True):
            counted_in = np.bincount(places[truth[order, artifact] == present], minlength=DISCLOSED_BINS)
            assert np.array_equal(one.reshape(DISCLOSED_BINS, -1).sum(1), counted_in)


def with_any(task: EvaluateTask) -> EvaluateTask:
    """The same task, which asks for any artifact, too."""
    between = np.linspace(-1, 4, EDGES, dtype=np.float32)
    return task.model_copy(update={"any_edges": np.tile(between, (len(task.models), 1))})


def any_of(data: Path, name: str, plan: RunPlan, part: int | None = None) -> list[int]:
    """How many patients of a folder of sites have any artifact, and none, counted from the cohort."""
    cohort = load_cohort(data / name, size=plan.image_size, plan_split=plan.split_at(name))
    rows = np.flatnonzero(cohort.part >= 0 if part is None else cohort.part == part)
    found = {
        patient: np.nansum(cohort.labels[rows[cohort.patients[rows] == patient]]) > 0
        for patient in set(cohort.patients[rows].tolist())
    }
    return [sum(found.values()), len(found) - sum(found.values())]


def test_a_public_site_counts_those_with_any_artifact_in_every_model_alike(data: Path) -> None:
    plan = dp_plan()
    answer = scored(agent(data, HELD_OUT, plan).evaluate(with_any(evaluate_task(everyone=True))))
    assert answer.any_histograms.shape == (2, 2, BINS)
    expected = any_of(data, HELD_OUT, plan)
    assert min(expected) > 0
    assert answer.any_histograms.sum(-1).tolist() == [expected, expected]
    plain = scored(agent(data, HELD_OUT, plan).evaluate(evaluate_task("s", everyone=True)))
    assert plain.any_histograms.size == 0, "an earlier coordinator does not ask"
    assert np.array_equal(plain.histograms, answer.histograms)


def test_who_is_not_assessed_for_one_artifact_is_left_out_of_any(data: Path) -> None:
    plan, sheet = dp_plan(), data / HELD_OUT / "labels.csv"
    with sheet.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        row["motion"] = row["motion_severity"] = ""
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    before = sum(any_of(data, HELD_OUT, plan))
    cohort = load_cohort(data / HELD_OUT, size=plan.image_size, plan_split=plan.split_at(HELD_OUT))
    of_mr = set(cohort.patients[cohort.modality == 1].tolist())
    assert of_mr
    answer = scored(agent(data, HELD_OUT, plan).evaluate(with_any(evaluate_task(everyone=True))))
    assert answer.any_histograms[0].sum() == before - len(of_mr)


def test_with_noise_any_artifact_is_not_counted_whoever_asks(data: Path) -> None:
    """A further row would raise the noise of all others; the charge and the vector are those without it."""
    hospital(data)
    answer = scored(agent(data, plan=dp_plan()).evaluate(with_any(evaluate_task())))
    assert (answer.mode, answer.any_histograms.size) == ("dp", 0)
    assert answer.noised.shape == (2, 2, ARTIFACTS, NOISED_BINS)
    assert rows(data) == [("reserve", "", 1), ("commit", EVALUATION, 1)]


def test_any_artifact_is_in_no_question_so_that_an_earlier_answer_stays_valid(data: Path) -> None:
    hospital(data, evaluation="disclosed")
    asked = agent(data, plan=dp_plan())
    first = scored(asked.evaluate(evaluate_task()))
    again = scored(asked.evaluate(with_any(evaluate_task())))
    assert again.to_bytes() == first.to_bytes()


def few(patients: int = 200) -> dict[str, tuple[np.ndarray, bool]]:
    """Labels of two artifacts of as many patients, and whether any artifact may be counted."""
    none, nan = np.zeros((patients, 2)), np.nan
    none[:60, 0], none[40:100, 1] = 1, 1  # 20 have both
    overlap, within, missing, rare = none.copy(), none.copy(), none.copy(), none.copy()
    overlap[40:53, 0] = 0  # 7 have both
    within[57:100, 1] = 0  # ... and 40 .. 57 stay within the first
    within[60:65, 1] = 1  # 5 have the second alone
    missing[195:, 1] = nan  # 5 are not whole
    rare[:, 0] = rare[:, 1] = 0
    rare[:9] = 1
    alike = none.copy()
    alike[:, 1] = alike[:, 0]
    return {
        "many": (none, True),
        "nobody has both": (np.where(np.arange(patients)[:, None] < 60, [1.0, 0.0], none * [0, 1]), True),
        "few have both": (overlap, False),
        "few have the second alone": (within, False),
        "few are not whole": (missing, False),
        "few have any": (rare, False),
        "the same": (alike, True),
    }


@pytest.mark.parametrize("case", few())
def test_any_artifact_tells_of_no_few_patients(case: str) -> None:
    """Neither by itself nor as a difference to what the artifacts' own counts say."""
    truth, may = few()[case]
    rng = np.random.default_rng(6)
    scores, could = [rng.normal(truth == 1)], np.ones(truth.shape, bool)
    edges = np.stack([quantile_edges(scores[0])])
    any_edges = np.linspace(-1, 4, EDGES)[None]
    found = any_sums(scores, truth, could, edges, any_edges, minimum_cell=10, coarse=True)
    assert bool(found.any()) == may
    assert len(np.flatnonzero(found.sum((0, 1)))) <= DISCLOSED_BINS
    assert any_sums(scores, truth, could, edges, any_edges).any(), "exact sites have no smallest cell"


def with_subgroups(task: EvaluateTask) -> EvaluateTask:
    return task.model_copy(update={"subgroups": True})


def test_a_public_site_counts_its_patients_by_subgroup(data: Path) -> None:
    plan = dp_plan()
    cohort = load_cohort(data / HELD_OUT, size=plan.image_size, plan_split=plan.split_at(HELD_OUT))
    answer = scored(agent(data, HELD_OUT, plan).evaluate(with_subgroups(evaluate_task(everyone=True))))
    found = answer.subgroups
    assert found.shape == (2, 2, ARTIFACTS, len(PLACE), DISCLOSED_BINS)
    total = answer.histograms.sum(-1)
    by_level = found.sum(-1)
    assert (by_level <= total[..., None]).all()
    assert all(record.manufacturer for record in cohort.records)
    vendors = [PLACE["vendor", level] for level in SUBGROUPS["vendor"]]
    assert np.array_equal(by_level[..., vendors].sum(-1), total), "each patient has one vendor"
    severities = [PLACE["severity", level] for level in SUBGROUPS["severity"]]
    assert np.array_equal(by_level[:, 0][..., severities].sum(-1), total[:, 0]), "each present one has one"
    assert (by_level[:, 1][..., severities] == total[:, 1][..., None]).all(), "all have those without"


@pytest.mark.parametrize("mode", ["dp", "disclosed"])
def test_a_hospital_sends_no_subgroups_whoever_asks(data: Path, mode: Any) -> None:
    hospital(data, evaluation=mode)
    answer = scored(agent(data, plan=dp_plan()).evaluate(with_subgroups(evaluate_task())))
    assert (answer.mode, answer.subgroups.size) == (mode, 0)
    with pytest.raises(ValueError, match="subgroups of a hospital"):
        SiteEvaluation(
            site="a", run="r", models=("m",), mode=mode, subgroups=np.ones((1, 2, 5, 3, 20), np.int32)
        )


def test_edges_of_any_artifact_that_do_not_fit_are_refused(data: Path) -> None:
    hospital(data, evaluation="disclosed")
    asked = with_any(evaluate_task())
    for update in (
        {"any_edges": asked.any_edges[:, :-1]},
        {"any_edges": asked.any_edges[:1]},
        {"any_edges": asked.any_edges[:, ::-1]},
        {"any_edges": asked.any_edges * np.float32(np.nan)},
        {"any_edges": asked.any_edges.astype(np.float64)},
        {"edges": np.zeros((0, 0, 0), np.float32)},
    ):
        said = refusal_of(agent(data, plan=dp_plan()).evaluate(asked.model_copy(update=update)))
        assert said.code == "bad-message", update


def test_a_public_site_is_scored_as_before(data: Path) -> None:
    answer = scored(agent(data, HELD_OUT, dp_plan()).evaluate(evaluate_task(everyone=True)))
    assert (answer.mode, answer.noised.size) == ("synthetic", 0)
    assert answer.histograms.sum() > 0
    assert not (data / HELD_OUT / "state" / "evaluations").exists()


def test_an_answer_cannot_hold_exact_sums_beside_noised_ones() -> None:
    values = {"site": "a", "run": "r", "models": ("m",)}
    with pytest.raises(ValueError, match="beside"):
        SiteEvaluation(**values, mode="dp", histograms=np.ones((1, 2, 5, 4), np.int64))
    with pytest.raises(ValueError, match="beside"):
        SiteEvaluation(**values, mode="disclosed", noised=np.ones((1, 2, 5, 8), np.int64))
    with pytest.raises(RunError):
        SiteEvaluation.from_bytes(
            SiteEvaluation.model_construct(
                **values, mode="dp", histograms=np.ones((1, 2, 5, 4), np.int64)
            ).to_bytes()
        )


def test_the_agent_of_a_hospital_keeps_nothing_of_the_coordinators_names(data: Path) -> None:
    """The run's name is no path."""
    hospital(data)
    scored(Agent(data / A / "site.yaml", dp_plan()).evaluate(evaluate_task("../../escape")))
    assert all(
        path.parent.name in ("evaluations", "runs", "outbox") or "escape" not in path.name
        for path in data.rglob("*")
    )
    assert [path.suffix for path in (data / A / "state" / "evaluations").iterdir()] == [".json"]


def test_the_scores_of_a_patient_do_not_depend_on_any_bit_of_another(data: Path) -> None:
    """Whoever else is in the cohort: leaving one patient out changes no bit of the others' scores."""
    plan, weights = dp_plan(), np.stack([BASE])
    cohort = load_cohort(data / A, size=plan.image_size, plan_split=plan.split)
    rows_of_all = np.flatnonzero(cohort.part >= 0)
    (everyone,), _ = evaluation.score_patients(cohort, plan.model, weights, rows_of_all, alone=True)
    names = np.unique(cohort.patients[rows_of_all])
    for gone in names[:4]:
        left = rows_of_all[cohort.patients[rows_of_all] != gone]
        (others,), _ = evaluation.score_patients(cohort, plan.model, weights, left, alone=True)
        assert np.array_equal(others, everyone[names != gone], equal_nan=True)
    (together,), _ = evaluation.score_patients(cohort, plan.model, weights, rows_of_all)
    assert np.allclose(together, everyone, atol=1e-3, equal_nan=True)


def test_a_noised_release_scores_each_patient_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital(data)
    batches: list[set[int]] = []
    real = evaluation.score

    def spy(model: Any, images: np.ndarray, modality: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        batches.append(set(cohort.patients[chosen].tolist()))
        return real(model, images, modality, chosen)

    cohort = load_cohort(data / A, size=dp_plan().image_size, plan_split=dp_plan().split)
    monkeypatch.setattr(evaluation, "score", spy)
    scored(agent(data, plan=dp_plan()).evaluate(evaluate_task()))
    assert {len(batch) for batch in batches} == {1}
