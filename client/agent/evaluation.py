"""Score models on a site's patients: only sums leave, exact or with noise.

With noise: one patient is counted at most once for each model and artifact, so that all counts together
change by at most sqrt(models * artifacts) in L2 where one patient is added or removed, whatever the models,
the bins, the scores and the labels are. One draw of Gaussian noise covers them all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from client.agent.model_check import check_base
from client.data.cohort import Cohort
from client.data.studies import CohortSamples
from client.dicom.index import PARTS
from client.dp.coins import Coins
from client.dp.release import noise_deviation, release
from client.dp.sampler import rows_by_patient
from common.any_artifact import any_label, any_score, combined
from common.arms import ARMS, PUBLIC, is_baseline
from common.counts import (
    BINS,
    DISCLOSED_BINS,
    EDGES,
    Counts,
    auroc_covariance,
    count_between,
    per_patient,
    to_bins,
)
from common.errors import RefusedError, RunError
from common.learning import score
from common.model_file import load_model
from common.models import network_of
from common.names import SITE_NAME
from common.plan import Model, RunPlan
from common.studies import decisions
from common.trainable import private_part
from common.weights import Manifest, digest, manifest_of, outside, resolve_initial, unflatten
from common.wire import EvaluateTask

MAX_SITE_MODELS = 32
"""Models of single sites that a hospital scores exactly in one run: how many sites train, it cannot know."""


def patients_scored(cohort: Cohort | CohortSamples, *, everyone: bool) -> np.ndarray:
    """The rows of a cohort, or of its samples, that are scored: of its test patients, or of all."""
    return np.flatnonzero(cohort.part >= 0 if everyone else cohort.part == PARTS.index("test"))


def score_patients(
    cohort: Cohort | CohortSamples,
    model: Model,
    weights: np.ndarray,
    rows: np.ndarray,
    *,
    alone: bool = False,
    tick: Callable[[int], None] = lambda models: None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of several models for the same patients.

    Args:
        cohort: slices, or the samples of the model's network.
        weights: float32 (K, parameters).
        rows: of these.
        alone: compute each patient's scores by themselves. In one batch with others the last bit of a score
            may depend on who they are, and one patient could move another across an edge.
        tick: called before each model with the number already scored; what it raises ends the scoring.
    Returns:
        K arrays (P, A) of logits, and the labels (P, A); nan where a patient was not assessed. P may be 0.
    """
    empty = np.zeros((0, len(model.labels)))
    scores, truth = [empty] * len(weights), empty
    if not len(rows):
        return scores, truth
    network = network_of(model)
    manifest = manifest_of(network.state_dict())
    groups = rows_by_patient(cohort.patients, rows) if alone else [rows]
    rows = np.concatenate(groups)
    for k, flat in enumerate(weights):
        tick(k)
        network.load_state_dict(unflatten(flat, manifest))
        logits = np.concatenate([score(network, cohort.images, cohort.modality, group) for group in groups])
        scores[k], truth = per_patient(*decisions(logits, cohort, rows))
    return scores, truth


def exact_sums(
    scores: Sequence[np.ndarray],
    truth: np.ndarray,
    edges: np.ndarray | None = None,
    *,
    minimum_cell: int = 0,
    coarse: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Patient-level histograms and the covariance of the AUROCs.

    Args:
        scores, truth: as `score_patients` gives them, of A artifacts.
        edges: (K, A, EDGES), public; without, 480 equal bins between -12 and 12.
        minimum_cell: artifacts with fewer patients of either class are treated as not assessed, so that no
            small count leaves.
        coarse: in `DISCLOSED_BINS` bins, each counted in the middle of its place among the fine ones; no
            edges make them more, or finer than a union of fine ones.
    Returns:
        int64 (K, 2, A, BINS) with positives first, and float64 (K*A, K*A).
    """
    artifacts = truth.shape[1]
    cells = len(scores) * artifacts
    if not len(truth):
        return np.zeros((len(scores), 2, artifacts, BINS), np.int64), np.full((cells, cells), np.nan)
    small = np.minimum((truth == 1).sum(0), (truth == 0).sum(0)) < minimum_cell
    truth = np.where(small, np.nan, truth)
    bins = DISCLOSED_BINS if coarse else BINS
    rows = [None] * len(scores) if edges is None else edges
    counted = [Counts.of(one, truth, row, bins=bins) for one, row in zip(scores, rows, strict=True)]
    histograms = np.stack([np.stack([counts.positives, counts.negatives]) for counts in counted])
    return histograms, auroc_covariance(scores, truth, edges, bins=bins)


def any_sums(
    scores: Sequence[np.ndarray],
    truth: np.ndarray,
    could: np.ndarray,
    edges: np.ndarray,
    any_edges: np.ndarray,
    *,
    minimum_cell: int = 0,
    coarse: bool = False,
) -> np.ndarray:
    """Histograms of patients with and without any artifact (`common.any_artifact`), int64 (K, 2, BINS).

    Args:
        scores, truth: as `score_patients` gives them, of the A artifacts that are combined.
        could: bool (P, A) of `common.any_artifact.possible`.
        edges: (K, A, EDGES) and any_edges (K, EDGES), public.
        minimum_cell, coarse: as in `exact_sums`. Nobody is counted, too, where a difference to the counts of
            an artifact would show fewer: of the patients with, without or in all, or of those with several
            artifacts.
    """
    labels = any_label(truth, could)
    if _shows_few(truth, labels, minimum_cell):
        labels = np.full(len(labels), np.nan)
    bins = DISCLOSED_BINS if coarse else BINS
    found = []
    for one, row, any_row in zip(scores, edges, any_edges, strict=True):
        counts = Counts.of(any_score(one, could, row)[:, None], labels[:, None], any_row[None], bins=bins)
        found.append(np.concatenate([counts.positives, counts.negatives]))
    return np.stack(found)


def subgroup_sums(
    scores: Sequence[np.ndarray], truth: np.ndarray, member: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Patients in `DISCLOSED_BINS` bins by subgroup, int32 (K, 2, A, levels, bins), positives first.

    Args:
        scores, truth: as `score_patients` gives them.
        member: bool (P, A, levels) of `client.data.subgroups.subgroups_of`.
        edges: (K, A, EDGES), public.
    """
    found = np.zeros((len(scores), 2, *member.shape[1:], DISCLOSED_BINS), np.int32)
    for model, (one, row) in enumerate(zip(scores, edges, strict=True)):
        places = to_bins(one, row, bins=DISCLOSED_BINS)
        for number, value in enumerate((1, 0)):
            patient, artifact, level = np.nonzero(member & (truth == value)[:, :, None])
            np.add.at(found[model, number], (artifact, level, places[patient, artifact]), 1)
    return found


def _shows_few(truth: np.ndarray, labels: np.ndarray, minimum_cell: int) -> bool:
    """Whether the numbers of patients with and without any artifact, alone or with those of the artifacts,
    tell of fewer than `minimum_cell` patients.
    """
    own, each = ([np.nansum(one == value, axis=0) for value in (1, 0)] for one in (labels, truth))
    pairs = [(own[0], each[0]), (own[1], each[1]), (own[0] + own[1], each[0] + each[1])]
    differences = np.concatenate([*(one - every for one, every in pairs), [each[0].sum() - own[0]]])
    hides = (differences == 0) | (np.abs(differences) >= minimum_cell)
    return min(own) < minimum_cell or not hides.all()


def noised_counts(
    scores: Sequence[np.ndarray], truth: np.ndarray, edges: np.ndarray, noise_multiplier: float
) -> np.ndarray:
    """Patients between the edges with noise on every count, int64 (K, 2, A, NOISED_BINS): one release.

    Args:
        scores, truth: as `score_patients` gives them.
        edges: (K, A, EDGES), public.
    """
    counted = [count_between(logits, truth, bins) for logits, bins in zip(scores, edges, strict=True)]
    counts = np.stack(counted).astype(np.int64)
    return _with_noise(counts, noise_deviation(noise_multiplier, len(scores) * truth.shape[1]))


def _with_noise(counts: np.ndarray, deviation: float) -> np.ndarray:
    """Whole counts plus exactly drawn noise of this standard deviation, once for all of them."""
    return release(counts.ravel(), deviation, Coins()).reshape(counts.shape)


def admit_models(plan: RunPlan, task: EvaluateTask) -> None:
    """Refuse models that are not of the plan's network, or not those that an evaluation by itself names.

    Raises:
        RefusedError: `crafted-model`, `foreign-model`.
    """
    networks = [name for name in task.models if not is_baseline(name)]
    baselines = task.models[len(networks) :]
    if not all(name.partition("/")[0] in plan.arms for name in baselines if is_baseline(name)):
        raise _foreign("the plan has no such arm")
    if tuple(networks) + baselines != task.models:
        raise _foreign("a baseline has no weights and comes last")
    if task.weights.shape != (len(networks), _manifest(plan).size) or not np.isfinite(task.weights).all():
        raise RefusedError(
            "models of another shape",
            code="crafted-model",
            public_reason="the models are not of the plan's network",
        )
    if plan.evaluate is None:
        return
    named = {model.name: model.sha256 for model in plan.evaluate.models}
    if list(model_digests(task).items()) != list(named.items()):
        raise _foreign("the plan names others, by their digests")


def admit_run_models(plan: RunPlan, task: EvaluateTask) -> None:
    """Refuse models that the run does not have, before a hospital scores them exactly.

    Each name is that of the public starting weights, of a shared arm of the plan, or `arm/site` of an arm
    that every site trains for itself, at most `MAX_SITE_MODELS` of these. The public model must be the
    plan's, so must the frozen part of a private one, and any other what honest training leads to
    (client/agent/model_check.py). What other sites and the coordinator made of a model in the last round a
    site cannot know.

    Raises:
        RefusedError: `foreign-model`, `crafted-model`.
    """
    manifest, model = _manifest(plan), plan.model
    initial = (
        load_model(resolve_initial(model.initial, model.sha256), manifest, model.labels)
        if model.initial.startswith("package:")
        else None
    )
    frozen = outside(private_part(plan), manifest.size)
    if len(set(task.models)) < len(task.models):
        raise _foreign("a model is named twice")
    if sum("/" in name for name in task.models) > MAX_SITE_MODELS:
        raise _foreign(f"more than {MAX_SITE_MODELS} models of single sites")
    for name, flat in zip(task.models, task.weights, strict=True):
        arm, slash, owner = name.partition("/")
        if arm not in (PUBLIC, *plan.scored_arms):
            raise _foreign("the plan has no such arm")
        if bool(slash) != (ARMS[arm].owner == "site") or (slash and not re.fullmatch(SITE_NAME, owner)):
            raise _foreign("an arm's model is named after the arm, that of a single site after both")
        if arm == PUBLIC:
            if initial is not None and not np.array_equal(flat, initial):
                raise _foreign("the public model is not the plan's")
        elif ARMS[arm].trains_part:
            if initial is not None and not np.array_equal(flat[frozen], initial[frozen]):
                raise _foreign("the private model's frozen part is not the plan's")
            if plan.privacy.trainable != "head":
                check_base(flat, initial, manifest, frozen=frozen, rounds_done=plan.training.rounds)
        else:
            check_base(flat, initial, manifest, frozen=None)


def admit_edges(task: EvaluateTask, artifacts: int) -> None:
    """Refuse edges of bins that do not fit the models and their outputs, or are missing.

    Raises:
        RunError: `bad-message`.
    """
    edges, shape = task.edges, (len(task.models), artifacts, EDGES)
    if edges.shape != shape or edges.dtype != np.float32:
        raise RunError(f"edges of shape {edges.shape}, expected float32 {shape}", code="bad-message")
    if not np.isfinite(edges).all() or (np.diff(edges, axis=2) < 0).any():
        raise RunError("edges are not finite, or decrease", code="bad-message")


def given_any(task: EvaluateTask, labels: Sequence[str]) -> np.ndarray | None:
    """The outputs to be combined for the row of any artifact that a task asks for; None where it asks for
    none.

    Raises:
        RunError: `bad-message`.
    """
    edges, places = task.any_edges, combined(labels)
    if not edges.size:
        return None
    if edges.shape != (len(task.weights), EDGES) or edges.dtype != np.float32:
        raise RunError(f"edges of shape {edges.shape} for any artifact", code="bad-message")
    if not np.isfinite(edges).all() or (np.diff(edges, axis=1) < 0).any():
        raise RunError("edges for any artifact are not finite, or decrease", code="bad-message")
    if not len(places) or not task.edges.size:
        raise RunError("any artifact of fewer than two, or without their edges", code="bad-message")
    return places


def given_edges(task: EvaluateTask, artifacts: int) -> np.ndarray | None:
    """The admitted edges of a task; None where it has none, and bins are equal ones (`to_bins`).

    Raises:
        RunError: `bad-message`.
    """
    if not task.edges.size:
        return None
    admit_edges(task, artifacts)
    return task.edges


def query_digest(edges: np.ndarray, noise_multiplier: float | None) -> str:
    """The digest of how patients are counted."""
    asked = f"{noise_multiplier!r} {edges.shape} ".encode() + np.ascontiguousarray(edges).tobytes()
    return hashlib.sha256(asked).hexdigest()


def model_digests(task: EvaluateTask) -> dict[str, str]:
    """Name -> digest of the weights, in the order of the task."""
    return {name: digest(flat) for name, flat in zip(task.models, task.weights, strict=True)}


def public_digest(plan: RunPlan) -> str:
    """The digest of the plan's public starting weights; "" where only the coordinator has them."""
    if not plan.model.initial.startswith("package:"):
        return ""
    path = resolve_initial(plan.model.initial, plan.model.sha256)
    return digest(load_model(path, _manifest(plan), plan.model.labels))


def _manifest(plan: RunPlan) -> Manifest:
    return manifest_of(network_of(plan.model).state_dict())


def _foreign(reason: str) -> RefusedError:
    reason = f"this site scores only the models of the run: {reason}"
    return RefusedError(reason, code="foreign-model", public_reason=reason)
