"""The baselines of a simulation: what a site gets from metrics of its slices, without a network.

Each training site's baseline is fitted to the metrics (common/iqm.py) of the slices that its network trains
on, and scored like its network: logits of slices, from them scores of patients. A model is fitted where it is
scored, in the process of the simulation, and never sent. No hospital loads this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logit
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from client.agent.evaluation import patients_scored
from client.agent.job import Job
from client.agent.tasks import Agent, agent_for
from common.arms import ARMS, Classifier
from common.counts import per_patient
from common.iqm import slice_metrics
from common.learning import seed_for
from common.plan import RunPlan
from common.wire import EvaluateTask

TREES = 200
CLASSIFIERS: dict[Classifier, Callable[[int], Any]] = {
    "logistic regression": lambda seed: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    "random forest": lambda seed: RandomForestClassifier(
        TREES, min_samples_leaf=2, random_state=seed % 2**32
    ),
}
"""scikit-learn's, with its defaults but for the leaves: a tree that grows to single slices says 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A classifier an artifact; None where the site has one class only, and every slice gets logit 0."""

    classifiers: Sequence[Any]

    @staticmethod
    def fit(
        kind: Classifier,
        features: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        weights: np.ndarray | None = None,
    ) -> Baseline:
        """Fit to slices.

        Args:
            features: (n, F). labels: (n, A), nan where not assessed. weights: (n,), None: all 1.
        """
        found: list[Any] = []
        for column in labels.T:
            rows = np.flatnonzero(~np.isnan(column))
            present = column[rows] > 0.5
            if present.all() or not present.any():
                found.append(None)
                continue
            of = None if weights is None else weights[rows]
            classifier = CLASSIFIERS[kind](seed)
            if kind == "logistic regression":
                classifier.fit(features[rows], present, logisticregression__sample_weight=of)
            else:
                classifier.fit(features[rows], present, sample_weight=of)
            found.append(classifier)
        return Baseline(classifiers=found)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Of slices, (n, A): of a forest with half a tree for and half against, so that all are finite."""
        found = np.zeros((len(features), len(self.classifiers)))
        for artifact, classifier in enumerate(self.classifiers):
            if classifier is None or not len(features):
                continue
            if isinstance(classifier, RandomForestClassifier):
                share = classifier.predict_proba(features)[:, 1]
                found[:, artifact] = logit((TREES * share + 0.5) / (TREES + 1))
            else:
                found[:, artifact] = classifier.decision_function(features)
        return found


def features_of(images: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """The metrics of slices and their modality, float64 (n, len(METRICS) + 1)."""
    return np.column_stack([slice_metrics(images, modality), modality])


@functools.lru_cache(maxsize=64)
def fitted(site_yaml: str, plan: RunPlan, run: str) -> dict[str, Baseline]:
    """The baselines of a site's training slices by name, `arm/site`; fitted once a run in each process.

    Raises:
        FedqcError: as the training of the site's network without noise.
    """
    agent = agent_for(site_yaml, plan)
    arms = [arm for arm in plan.arms if ARMS[arm].baseline]
    agent.renew_consent()
    agent.admit(private=False)
    agent.admit_data(run)
    for arm in arms:
        agent.record_non_private(run, arm)
    slices = agent.training_slices(run, Job())
    assert isinstance(slices.images, np.ndarray)  # the plan's network is one of single slices
    rows = slices.rows
    features = features_of(slices.images[rows], slices.modality[rows])
    weights = None if slices.weights is None else slices.weights[rows]
    return {
        f"{arm}/{agent.name}": Baseline.fit(
            kind,
            features,
            slices.labels[rows],
            weights=weights,
            seed=seed_for(plan.seed, agent.name, 0) % 2**32,
        )
        for arm in arms
        if (kind := ARMS[arm].baseline)
    }


def baseline_scores(
    agent: Agent, plan: RunPlan, training: Sequence[str], task: EvaluateTask
) -> list[np.ndarray]:
    """Scores of the baselines that a task names, for the patients that the site of `agent` is scored on.

    Args:
        training: the site.yaml of each site that trains.
    Returns:
        of each baseline (P, A), patients as in `client.agent.evaluation.score_patients`.
    """
    models: dict[str, Baseline] = {}
    for site_yaml in training:
        models |= fitted(site_yaml, plan, task.run)
    cohort = agent.cohort(task.run)
    rows = patients_scored(cohort, everyone=task.everyone)
    features = features_of(cohort.images[rows], cohort.modality[rows])
    return [
        per_patient(models[name].logits(features), cohort.labels[rows], cohort.patients[rows])[0]
        for name in task.models[len(task.weights) :]
    ]
