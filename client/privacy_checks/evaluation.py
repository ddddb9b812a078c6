"""Check scores of hospital patients by what the agent answers, and by whom it scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from client.agent import evaluation, tasks
from client.privacy_checks.finding import Finding, Scene
from client.privacy_checks.hospital import (
    NAME,
    hospital,
    opt_out,
    patient_id,
    public_weights,
    site_plan,
    train_task,
    watched,
)
from client.privacy_checks.mechanism import Released
from common.artifacts import DEFAULT_LABELS
from common.counts import EDGES
from common.plan import RunPlan, Split
from common.pricing import EVALUATION, charges
from common.wire import EvaluateTask, Refusal, SiteEvaluation, WireMessage

NOISED_RUNS = 12
SPLIT, OTHER_SPLIT = Split(train=0.6, validation=0, test=0.4), Split(train=0.3, validation=0, test=0.7)


def evaluate_task(run: str, *, everyone: bool = False) -> EvaluateTask:
    """A task to score the public model, with noise in bins around zero where the site asks for noise."""
    return EvaluateTask(
        run=run,
        models=("public",),
        everyone=everyone,
        weights=public_weights()[None],
        edges=np.tile(np.linspace(-3, 3, EDGES, dtype=np.float32), (1, len(DEFAULT_LABELS), 1)),
    )


def evaluations_apart(scene: Scene) -> Finding:
    """Two evaluations whose patients differ by one tell nothing exact about that patient."""
    plan, found, shown = site_plan(scene, split=SPLIT), [], []
    for mode in ("disclosed", "dp"):
        site_yaml = hospital(scene, f"scored-{mode}", policy={"evaluation": mode})
        joined(site_yaml)
        # the least cell hides few patients from an exact answer; here it must not hide the fault as well
        with patch.object(tasks, "MINIMUM_CELL", 0):
            first = tasks.Agent(site_yaml, plan).evaluate(evaluate_task("first"))
            opt_out(site_yaml, patient_id(_patient_of_part(site_yaml, plan, 2)))
            second = tasks.Agent(site_yaml, plan).evaluate(evaluate_task("second"))
        shown.append(f"{mode}: {_words(first)}, then {_words(second)}")
        is_refused = isinstance(first, Refusal) or isinstance(second, Refusal)
        is_exact = _is_exact(first) or _is_exact(second)
        if (is_exact and not is_refused) or "site-failure" in _words(first):
            found.append(shown[-1])
    ratio = _evaluation_noise(scene)
    if ratio is not None:
        shown.append(f"noise {ratio:.2f} of what is charged")
        if not 0.85 <= ratio <= 1.15:
            found.append(shown[-1])
    return Finding(
        check="evaluations apart",
        holds=not found,
        measured="; ".join(found or shown),
        expected="with noise, or the second is refused",
    )


def scores(scene: Scene) -> Finding:
    """One test patient moves the counts before their noise by one for each model and artifact at most; the
    noise covers that, and the ledger is charged for it.
    """
    plan, check = site_plan(scene, split=SPLIT), "scores"
    planned = charges(plan).get(EVALUATION)
    expected = "1 count a model and artifact at most, noise and charge for all of them"
    if planned is None:
        return Finding(check=check, holds=None, measured="the plan scores no hospital", expected=expected)
    site_yaml = hospital(scene, "counted", policy={"evaluation": "dp"})
    patient = _patient_of_part(site_yaml, plan, 2)
    found, counted, patients_before = [], [], 0
    for name in ("counted", "counted-without"):
        if name != "counted":
            opt_out(hospital(scene, name, policy={"evaluation": "dp"}), patient_id(patient))
        agent = tasks.Agent(scene.folder / name / "site.yaml", plan)
        with _counting() as seen, watched() as charged:
            answer = agent.evaluate(evaluate_task("counts"))
        if not isinstance(answer, SiteEvaluation) or len(seen) != 1:
            found.append(f"{len(seen)} releases for one evaluation ({_words(answer)})")
            continue
        counted.append(seen[0].total.reshape(answer.noised.shape))
        patients_before = max(patients_before, int(counted[-1].sum()))
        cells = len(answer.models) * len(DEFAULT_LABELS)
        claimed = max(planned.noise_multiplier, answer.noise_multiplier)
        if not seen[0].deviation >= claimed * np.sqrt(cells) * (1 - 1e-12):
            found.append(f"a noise of {seen[0].deviation:.3f} counts, {claimed * np.sqrt(cells):.3f} charged")
        rows = {(row.noise_multiplier, row.sample_rate, row.steps) for row in charged.reserved}
        if rows != {(answer.noise_multiplier, 1.0, 1)} or answer.noise_multiplier < planned.noise_multiplier:
            found.append(f"noise multiplier {answer.noise_multiplier:g}, reserved {sorted(rows)}")
    most = 0
    if len(counted) == 2:
        # (models, 2, artifacts, bins): over both classes and all bins
        most = int(np.abs(counted[0] - counted[1]).sum(axis=(1, 3)).max())
        if most > 1 or patients_before == 0:
            found.append(f"one patient moves the counts of a model and artifact by {most}")
    return Finding(
        check=check,
        holds=not found,
        measured="; ".join(found) or f"one patient moves {most} count a model and artifact, as charged",
        expected=expected,
    )


@contextmanager
def _counting() -> Iterator[list[Released]]:
    """The counts that an evaluation releases, before their noise."""
    seen: list[Released] = []
    real = vars(evaluation)["release"]

    def spy(total: np.ndarray, deviation: float, *rest: object) -> np.ndarray:
        result: np.ndarray = real(total, deviation, *rest)
        seen.append(Released(total=total.copy(), deviation=deviation, result=result.copy()))
        return result

    with patch.object(evaluation, "release", spy):
        yield seen


def _evaluation_noise(scene: Scene) -> float | None:
    """The deviation of repeated noised scores over what their noise multiplier promises; None where none are
    given.
    """
    plan = site_plan(scene, split=SPLIT)
    agent = tasks.Agent(hospital(scene, "noised", policy={"evaluation": "dp"}), plan)
    drawn, promised = [], 0.0
    for number in range(NOISED_RUNS):
        answer = agent.evaluate(evaluate_task(f"run-{number}"))
        if not isinstance(answer, SiteEvaluation) or answer.mode == "disclosed":
            return None
        drawn.append(answer.noised.astype(np.float64))
        promised = answer.noise_multiplier * np.sqrt(len(answer.models) * len(DEFAULT_LABELS))
    return float(np.std(np.stack(drawn), axis=0, ddof=1).mean() / promised)


def test_patients(scene: Scene) -> Finding:
    """Nobody who trained is scored, in whatever split and role a later plan asks for."""
    found, shown = [], []
    site_yaml = hospital(scene, "parts-apart", policy={"evaluation": "disclosed"})
    joined(site_yaml)
    trained: set[str] = set()
    scored: set[str] = set()
    plans = {
        "the same split": site_plan(scene, split=SPLIT),
        "another split": site_plan(scene, split=OTHER_SPLIT),
        "held out": site_plan(scene, split=SPLIT, held_out=(NAME,)),
    }
    for number, (words, plan) in enumerate(plans.items()):
        agent = tasks.Agent(site_yaml, plan)
        with _training(agent) as rows:
            agent.train(train_task(run=f"r{number}"))
        trained |= {_patient(agent, row) for row in rows}
        for everyone in (False, True):
            with _scoring() as rows:
                answer = agent.evaluate(evaluate_task(f"r{number}", everyone=everyone))
            scored |= {_patient(agent, row) for row in rows}
            shown.append(_words(answer))
            if trained & scored:
                found.append(f"{words}: {len(trained & scored)} patients both train and are scored")
    return Finding(
        check="test patients",
        holds=not found and bool(trained),
        measured="; ".join(found[:2]) or f"{len(trained)} train, {len(scored)} are scored, none does both",
        expected="the same test patients in every run, none of whom ever trains",
    )


def joined(site_yaml: Path) -> None:
    """Let the hospital look as one that joined a federation, whose split is kept."""
    (site_yaml.parent / "state" / "coordinator.json").write_text("{}", encoding="ascii")


def _patient_of_part(site_yaml: Path, plan: RunPlan, part: int) -> int:
    cohort = tasks.Agent(site_yaml, plan).cohort()
    return int(cohort.records[int(np.flatnonzero(cohort.part == part)[0])].file[1:5])


def _patient(agent: tasks.Agent, row: int) -> str:
    return agent.cohort().records[row].file[:5]


@contextmanager
def _training(agent: tasks.Agent) -> Iterator[list[int]]:
    """The rows of the cohort that a training uses."""
    from client.dp import dp_sgd

    rows: list[int] = []
    real = dp_sgd.descend

    def train(*arguments: Any, **named: Any) -> Any:
        patients = named.get("patients", arguments[2] if len(arguments) > 2 else ())
        rows.extend(np.flatnonzero(np.isin(agent.cohort().patients, patients)).tolist())
        return real(*arguments, **named)

    with patch.object(dp_sgd, "descend", train):
        yield rows


@contextmanager
def _scoring() -> Iterator[list[int]]:
    """The rows of the cohort that an evaluation scores."""
    rows: list[int] = []
    real = vars(evaluation)["score"]

    def score(model: Any, images: Any, modality: Any, chosen: np.ndarray) -> np.ndarray:
        rows.extend(np.asarray(chosen).tolist())
        return real(model, images, modality, chosen)

    with patch.object(evaluation, "score", score):
        yield rows


def _is_exact(answer: WireMessage) -> bool:
    return isinstance(answer, SiteEvaluation) and bool(answer.histograms.size)


def _words(answer: WireMessage) -> str:
    if isinstance(answer, Refusal):
        return answer.code
    return "exact scores" if _is_exact(answer) else "noised scores"
