"""The cheap baseline: it learns from metrics, is at chance where labels mean nothing, and is scored as any
arm on the same patients, in simulations only.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.evaluation import patients_scored
from client.agent.tasks import Agent
from client.baselines import CLASSIFIERS, Baseline, features_of, fitted
from common.arms import ARMS, BASELINES, FINAL_ARMS
from common.counts import PROBABILITY_EDGES, Counts, auroc, per_patient
from common.errors import ConfigError, PlanError
from common.i18n import speaker
from common.physics.appearance import SITE_APPEARANCES
from common.plan import RunPlan
from common.public_phantoms import draw
from common.wire import EvaluateTask
from server.evaluation.report import findings
from server.evaluation.report.page import render
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.evaluation.tables import table
from server.run.conduct import check_controls
from server.run.recompute import recompute
from server.run_folder import RunFolder
from server.simulation import simulate
from server.simulation.simulate import check_extra, node_configs
from tests.helpers.consortium import HELD_OUT, TRAINING, Consortium, settle, tiny_plan
from tests.helpers.site_agent import BASE, MANIFEST, A, agent, refusal_of

KINDS = tuple(CLASSIFIERS)
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def phantoms() -> Parts:
    """Features, labels and patients of slices of one hospital."""
    slices = draw(SITE_APPEARANCES[:1], 110, 11, 64)
    return features_of(slices.images, slices.modality), slices.labels, slices.patients


def score(kind: str, parts: Parts, labels: np.ndarray) -> float:
    """Fit to the first half of the patients with `labels`, macro AUROC of the second."""
    features, truth, patients = parts
    first = patients < np.median(patients)
    model = Baseline.fit(kind, features[first], labels[first], seed=1)
    scores, known = per_patient(model.logits(features[~first]), truth[~first], patients[~first])
    return float(np.nanmean(auroc(scores, known)))


def exchanged(parts: Parts, seed: int) -> np.ndarray:
    """The labels of slices, exchanged among the slices in which the artifact was assessed."""
    rng, labels = np.random.default_rng(seed), parts[1].copy()
    for column in labels.T:
        known = np.flatnonzero(~np.isnan(column))
        column[known] = column[rng.permutation(known)]
    return labels


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_from_metrics_and_shuffled_labels_leave_it_at_chance(kind: str, phantoms: Parts) -> None:
    learned = score(kind, phantoms, phantoms[1])
    shuffled = float(np.mean([score(kind, phantoms, exchanged(phantoms, seed)) for seed in range(5)]))
    assert learned > 0.75
    assert abs(shuffled - 0.5) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_of_one_class_is_not_learned_and_tells_nothing(kind: str, phantoms: Parts) -> None:
    features, labels, _ = phantoms
    labels = labels.copy()
    labels[:, 0] = np.where(np.isnan(labels[:, 0]), np.nan, 0.0)
    labels[:, 1] = np.nan
    logits = Baseline.fit(kind, features, labels, seed=1).logits(features)
    assert np.isfinite(logits).all()
    assert (logits[:, :2] == 0).all()
    assert (logits[:, 2:].std(axis=0) > 0).all()
    assert Baseline.fit(kind, features, labels, seed=1).logits(features[:0]).shape == (0, labels.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_weight_zero_is_not_there(kind: str, phantoms: Parts) -> None:
    features, labels, _ = phantoms
    used = np.arange(len(labels)) % 2 == 0
    wrong = np.where(used[:, None], labels, 1 - labels)
    weighted = Baseline.fit(kind, features, wrong, seed=1, weights=used.astype(np.float32)).logits(features)
    counted = Baseline.fit(kind, features, wrong, seed=1).logits(features)
    truth = labels[:, 2] == 1
    known = ~np.isnan(labels[:, 2])
    apart = [float(x[known & truth, 2].mean() - x[known & ~truth, 2].mean()) for x in (weighted, counted)]
    assert apart[0] > 4 * abs(apart[1])


def baseline_plan(**changes: Any) -> RunPlan:
    arms = ["public", "local", "federated", *BASELINES]
    return tiny_plan(**{"name": "cheap", "arms": arms, "training": {"rounds": 1}} | changes)


@pytest.fixture(scope="module")
def run(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("cheap")
    data = Path(shutil.copytree(tiny_consortium, folder / "data"))
    return Consortium(data=data).conduct(baseline_plan(), folder / "run")


def test_each_training_site_has_its_baselines_and_every_site_scores_them(run: RunFolder) -> None:
    found = run.evaluation
    expected = [f"{arm}/{site}" for arm in BASELINES for site in TRAINING]
    assert [name for name in found["matrix"] if name.partition("/")[0] in BASELINES] == expected
    for site, models in found["counts"].items():
        every = [Counts.from_json(counts) for counts in models.values()]
        assert len(models) == len(found["matrix"]), site
        assert all((counts.n_pos == every[0].n_pos).all() for counts in every)  # the same patients
        assert all((counts.n_neg == every[0].n_neg).all() for counts in every)
    assert set(found["scores"]["iqm_forest"]) == set(found["scores"]["local"])
    assert "iqm_forest" not in FINAL_ARMS
    assert not (run.path / "arms" / "iqm_forest").exists()


def test_a_patients_score_is_made_from_logits_of_slices_as_that_of_a_network(
    run: RunFolder, data: Path
) -> None:
    plan, owner, site = run.plan, TRAINING[0], TRAINING[1]
    model = fitted(str(data / owner / "site.yaml"), plan, "by-hand")[f"iqm_forest/{owner}"]
    cohort = Agent(data / site / "site.yaml", plan).cohort()
    rows = patients_scored(cohort, everyone=False)
    logits = model.logits(features_of(cohort.images[rows], cohort.modality[rows]))
    scores, truth = per_patient(logits, cohort.labels[rows], cohort.patients[rows])
    edges = np.tile(PROBABILITY_EDGES, (truth.shape[1], 1))
    assert Counts.of(scores, truth, edges).to_json() == run.evaluation["counts"][site][f"iqm_forest/{owner}"]


def test_a_run_with_baselines_is_recomputed_from_what_the_sites_sent(run: RunFolder) -> None:
    found = {finding.check: finding.holds for finding in recompute(run)}
    assert all(holds is not False for holds in found.values())
    assert found["evaluation"] is True
    assert not [check for check in found if check.startswith("iqm")]


def test_the_table_gives_the_paired_difference_to_each_network(run: RunFolder) -> None:
    pairs = {(row["arm"], row["other"]) for row in run.evaluation["contrasts"]}
    assert {(network, one) for network in ("local", "federated") for one in BASELINES} <= pairs
    text = table(run.evaluation)
    assert "local - iqm_forest, unseen" in text
    assert "federated - iqm_logistic, unseen" in text


def said(run: RunFolder, language: str, value: float, p: float) -> str:
    """The sentences of a report where every difference to a baseline is this one."""
    values = copy.deepcopy(run.evaluation)
    for row in values["contrasts"]:
        if row["other"] in BASELINES:
            row |= {"value": value, "low": value - 0.01, "high": value + 0.01, "p_holm": p}
    return "\n".join(findings.against_baseline(Reading(values, speaker(language, LANGUAGES))))


def test_the_report_says_whether_the_network_beats_the_baseline(run: RunFolder) -> None:
    for language, better, not_shown, worse in (
        ("en", "beats a cheap baseline", "is not shown to beat a cheap baseline", "is worse than"),
        ("zh", "优于简单基线", "未显示", "劣于简单基线"),
    ):
        assert better in said(run, language, 0.2, 0.001)
        assert not_shown in said(run, language, 0.005, 0.4)
        assert worse in said(run, language, -0.2, 0.001)
        lines = findings.against_baseline(Reading(run.evaluation, speaker(language, LANGUAGES)))
        assert len(lines) == 2  # federated, local
        page = render(run.evaluation, run.manifest, run.plan, language=language)
        assert all(line[:20] in page for line in lines)


def test_a_hospital_refuses_the_whole_plan(data: Path) -> None:
    settle(data / A, {"allow_non_private": True, "evaluation": "synthetic"}, kind="hospital")
    task = EvaluateTask(run="r", models=("public",), everyone=False, weights=BASE[None])
    refusal = refusal_of(agent(data, plan=baseline_plan()).evaluate(task))
    assert refusal.code == "simulation-only"
    assert "baseline" in refusal.reason


def test_it_is_refused_in_a_deployment_and_where_nothing_simulates_it(data: Path) -> None:
    with pytest.raises(PlanError) as refused:
        check_controls(baseline_plan())
    assert refused.value.code == "simulation-only"
    names = ("public", f"iqm_forest/{A}")
    task = EvaluateTask(run="r", models=names, everyone=False, weights=BASE[None])
    assert refusal_of(agent(data, plan=baseline_plan()).evaluate(task)).code == "simulation-only"
    assert refusal_of(agent(data, plan=tiny_plan()).evaluate(task)).code == "foreign-model"
    first = EvaluateTask(run="r", models=names[::-1], everyone=False, weights=BASE[None])
    assert refusal_of(agent(data, plan=baseline_plan()).evaluate(first)).code == "foreign-model"
    assert MANIFEST.size == BASE.size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": list(BASELINES)}, "baselines"),
        ({"model": {"name": "study"}}, "single slices"),
        ({"model": {"args": {"neighbours": True}}}, "single slices"),
        ({"model": {"name": "iqm_linear", "initial": "random", "labels": ["quality"]}}, "single slices"),
    ],
)
def test_a_plan_that_it_cannot_serve_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        baseline_plan(**changes)


def test_without_scikit_learn_the_simulation_says_so_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="scikit-learn") as missing:
        check_extra(baseline_plan())
    assert missing.value.code == "missing-extra"
    check_extra(tiny_plan())


def test_only_nodes_of_such_a_plan_are_told_who_trains() -> None:
    paths, names = [Path("/a/site.yaml"), Path("/d/site.yaml")], ["hospital-a", HELD_OUT]
    assert all("baseline-sites" not in one for one in node_configs(tiny_plan(), paths, names=names).values())
    found = node_configs(baseline_plan(), paths, names=names)
    assert [one["baseline-sites"] for one in found.values()] == ["/a/site.yaml"] * 2


def test_baselines_are_trained_by_each_site_and_by_no_rounds() -> None:
    for arm in BASELINES:
        kind = ARMS[arm]
        assert (kind.is_trained, kind.owner, kind.simulated) == (True, "site", True)
        assert not kind.by_rounds
        assert not kind.at_hospitals
