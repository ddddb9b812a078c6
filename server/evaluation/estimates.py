"""Compute every number of the report from the sums that sites sent: metrics, matrix, headline, contrasts.

A score is the macro AUROC of a model at a site: the mean over the artifacts that every model can estimate
there, that is with at least two patients with and two without. Every headline figure is a linear combination
of AUROCs at several sites; patients of different sites are independent, so its variance is the sum over
sites of w' C w, with C the covariance each site sent (common.counts.auroc_covariance), raised where a class
has few patients. A site that was scored with noise sends none: the variances then come from the noise and
the estimated numbers of patients (server/evaluation/noised.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from common.any_artifact import ANY, combined
from common.arms import (
    ARMS,
    BASELINES,
    FEDERATED,
    FEDERATED_CLIPPED,
    FEDERATED_DP,
    FEDERATED_FROZEN,
    LOCAL,
    LOCAL_CLIPPED,
    LOCAL_DP,
    LOCAL_FROZEN,
    POOLED,
    PUBLIC,
)
from common.artifacts import DEFAULT_LABELS
from common.counts import Counts, hanley_mcneil
from server.evaluation.inference import (
    LEVEL,
    Z,
    below_half,
    expected_minimum,
    expit,
    holm,
    two_sided,
)
from server.evaluation.noised import NoisedCounts
from server.evaluation.subgroups import subgroup_differences, subgroup_rows

Cell = tuple[str, str]
"""(site, model)"""


@dataclass(frozen=True, kw_only=True)
class SiteScores:
    """What one site sent: counts a model, exact or with noise, and the covariance of all AUROCs, (K*A, K*A)
    in the order of `counts`.

    Of sums with noise the covariance is that of the noise; how the AUROCs vary together with the patients is
    unknown, and bounded by `sampling`, their standard deviations from that, (K*A,).
    """

    counts: Mapping[str, Counts] | Mapping[str, NoisedCounts]
    covariance: np.ndarray
    sampling: np.ndarray | None = None
    scoring: Mapping[str, Any] = field(
        default_factory=lambda: {"mode": "synthetic"}
    )  # mode; of noise, its price
    # of one row: patients with and without any artifact; none where the site was not asked
    any_counts: Mapping[str, Counts] = field(default_factory=dict)
    # (2, A, levels, DISCLOSED_BINS) of each model, see `server/evaluation/subgroups.py`; none where not asked
    subgroups: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def upper_covariance(self) -> np.ndarray:
        """The covariance, of sums with noise as if all AUROCs rose and fell together with the patients: an
        upper bound for sums with weights of one sign.
        """
        return self.covariance if self.sampling is None else self.covariance + np.outer(*[self.sampling] * 2)


def trained_at(model: str, site: str, training: Sequence[str]) -> bool:
    """Whether a site's patients trained a model, so that its score there is no score of an unseen hospital.

    A shared model trained at all training sites; a run in which it did not leaves one hospital out, and is
    another run.
    """
    arm, _, owner = model.partition("/")
    if arm in ARMS and not ARMS[arm].is_trained:
        return False
    return owner == site if owner else site in training


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of scores with its standard error; the interval is Wald's, 95 %, on the scale of AUROC.

    It has no bound near which a difference lies, and a logit of it does not exist.
    """

    value: float
    standard_error: float

    @property
    def p(self) -> float:
        """Two-sided, by the normal distribution; 1 between models that rank every pair alike."""
        return two_sided(self.value, self.standard_error)

    def to_json(self) -> dict[str, float]:
        half = Z * self.standard_error
        return {
            "value": self.value,
            "low": self.value - half,
            "high": self.value + half,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean of AUROCs with its standard error; the 95 % interval is Wald's on the logit scale.

    `centre` is the same mean with every AUROC of 0 or 1 moved by half a pair, since a logit needs it inside.
    The interval is widened to hold the value where that lies outside. Where the variance is that of few
    patients, Wald's interval on the scale of AUROC covers too seldom, and this one does not
    (docs/performance.md#intervals-of-few-patients).
    """

    value: float
    standard_error: float
    centre: float

    @property
    def logit(self) -> float:
        return math.log(self.centre / (1 - self.centre)) if 0 < self.centre < 1 else math.nan

    @property
    def logit_standard_error(self) -> float:
        """By the delta method."""
        inside = self.centre * (1 - self.centre)
        return self.standard_error / inside if inside > 0 else math.nan

    def to_json(self) -> dict[str, float]:
        half = Z * self.logit_standard_error
        low, high = expit(self.logit - half), expit(self.logit + half)
        return {
            "value": self.value,
            "low": min(low, self.value) if math.isfinite(low) else math.nan,
            "high": max(high, self.value) if math.isfinite(high) else math.nan,
            "standard_error": self.standard_error,
            "logit": self.logit,
            "logit_standard_error": self.logit_standard_error,
        }


FEW = 20
"""Patients of a class below which the variance that follows from them alone is not believed."""
NO_SCORE = Score(value=np.nan, standard_error=np.nan, centre=np.nan)
NO_DIFFERENCE = Difference(value=np.nan, standard_error=np.nan)


@dataclass(frozen=True, kw_only=True)
class _Aurocs:
    """The AUROCs of a site, computed once: shape (K, A), rows in the order of `row`."""

    row: Mapping[str, int]
    value: np.ndarray
    moved: np.ndarray  # those of 0 and 1 by half a pair
    estimable: np.ndarray  # (A,), by every model
    covariance: np.ndarray  # (K*A, K*A)
    sampling: np.ndarray | None  # (K*A,)


@dataclass(frozen=True, kw_only=True)
class Study:
    """All sites' scores of one run. A model is named after its arm, `local/<site>` after its arm and its only
    site.
    """

    sites: Mapping[str, SiteScores]
    training: Sequence[str]
    held_out: Sequence[str]
    models: Sequence[str]
    artifacts: Sequence[str] = DEFAULT_LABELS  # the outputs of the models

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.models)

    @cached_property
    def aurocs(self) -> Mapping[str, _Aurocs]:
        """Site -> what all else is combined from."""
        return {site: _aurocs(scores, len(self.artifacts)) for site, scores in self.sites.items()}

    @cached_property
    def averaged(self) -> Mapping[str, tuple[int, ...]]:
        """Site -> the artifacts in its macro AUROC, by number: those that every model can estimate there, so
        that models are compared on the same ones.
        """
        return {site: tuple(np.flatnonzero(found.estimable)) for site, found in self.aurocs.items()}

    def arm_models(self, arm: str) -> list[str]:
        return [model for model in self.models if model == arm or model.startswith(f"{arm}/")]

    def model_at_home(self, arm: str, site: str) -> str | None:
        return next((model for model in (f"{arm}/{site}", arm) if model in self._names), None)

    def combine(self, weights: Mapping[Cell, float], artifacts: Sequence[int] | None = None) -> Score:
        """The weighted sum of macro AUROCs; nan where a cell has no score.

        Args:
            artifacts: by number, the same at every site; None: at each site those that it averages.
        """
        value, centre, variance = 0.0, 0.0, 0.0
        by_site: dict[str, list[tuple[str, float]]] = {}
        for (site, model), weight in weights.items():
            by_site.setdefault(site, []).append((model, weight))
        for site, cells in by_site.items():
            used = list(self.averaged[site] if artifacts is None else artifacts)
            if not used:
                return NO_SCORE
            found = self.aurocs[site]
            vector = np.zeros(found.value.shape)
            for model, weight in cells:
                vector[found.row[model], used] += weight / len(used)
            flat = vector.ravel()
            places = np.flatnonzero(flat)
            value += float(flat[places] @ found.value.ravel()[places])
            centre += float(flat[places] @ found.moved.ravel()[places])
            variance += float(flat[places] @ found.covariance[np.ix_(places, places)] @ flat[places])
            if found.sampling is not None:
                variance += float(np.abs(flat[places]) @ found.sampling[places]) ** 2
        error = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        return Score(value=value, standard_error=error, centre=centre)

    def cells(self, arm: str, where: str) -> dict[Cell, float]:
        """The weights that make `home`, `elsewhere`, `unseen` or the score at one site; empty where it does
        not exist.

        `elsewhere` is the score at training sites of models that did not train there: of local models at the
        other sites. A shared model trained at all of them and has none in a run of its own.
        """
        if where == "unseen":
            cells = [
                (site, model)
                for site in self.held_out
                if self._scored(site)
                for model in self.arm_models(arm)
            ]
        elif where == "elsewhere":
            cells = [
                (site, model)
                for model in self.arm_models(arm)
                for site in self._scored_training
                if not trained_at(model, site, self.training)
            ]
        elif where == "home":
            cells = [
                (site, model) for site in self._scored_training if (model := self.model_at_home(arm, site))
            ]
        elif not self._scored(where):
            cells = []
        elif home := self.model_at_home(arm, where):
            cells = [(where, home)]
        else:
            cells = [(where, model) for model in self.arm_models(arm) if where in self.held_out]
        return {cell: 1 / len(cells) for cell in cells}

    @cached_property
    def _scored_training(self) -> list[str]:
        return [site for site in self.training if self._scored(site)]

    def _scored(self, site: str) -> bool:
        return bool(self.averaged.get(site))

    def estimate(self, arm: str, where: str, artifacts: Sequence[int] | None = None) -> Score:
        cells = self.cells(arm, where)
        return self.combine(cells, artifacts) if cells else NO_SCORE

    def difference(self, arm: str, other: str, where: str) -> Difference:
        """`arm` less `other`, paired over patients: both were scored on the same ones, over the same
        artifacts.
        """
        plus, minus = self.cells(arm, where), self.cells(other, where)
        if not plus or not minus:
            return NO_DIFFERENCE
        found = self.combine({cell: plus.get(cell, 0.0) - minus.get(cell, 0.0) for cell in plus | minus})
        return Difference(value=found.value, standard_error=found.standard_error)

    def half_pair(self, site: str, artifacts: Sequence[int]) -> float:
        """Half of one pair's share of the macro AUROC at a site, the mean over artifacts."""
        every: list[Counts | NoisedCounts] = list(self.sites[site].counts.values())
        counts = every[0]
        pairs = np.maximum(np.asarray(counts.n_pos, float) * np.asarray(counts.n_neg, float), 1.0)
        return float((0.5 / pairs[list(artifacts)]).mean())

    def common_artifacts(self, sites: Sequence[str]) -> list[int]:
        """Those that every scored one of some sites averages, by number."""
        sets = [set(self.averaged[site]) for site in sites if self._scored(site)]
        return sorted(set.intersection(*sets)) if sets else []


def _aurocs(scores: SiteScores, artifacts: int) -> _Aurocs:
    every: list[Counts | NoisedCounts] = list(scores.counts.values())
    value = np.stack([counts.auroc() for counts in every]) if every else np.zeros((0, artifacts))
    sizes = [(np.asarray(counts.n_pos, float), np.asarray(counts.n_neg, float)) for counts in every]
    pairs = np.stack([pos * neg for pos, neg in sizes]) if sizes else np.zeros((0, artifacts))
    half = 0.5 / np.maximum(pairs, 1.0)
    variance = np.diagonal(scores.upper_covariance).reshape(value.shape)
    moved = np.clip(value, half, 1 - half)
    return _Aurocs(
        row={model: number for number, model in enumerate(scores.counts)},
        value=value,
        moved=moved,
        estimable=np.isfinite(value).all(axis=0) & np.isfinite(variance).all(axis=0),
        covariance=_of_few(scores, moved),
        sampling=scores.sampling,
    )


def _of_few(scores: SiteScores, moved: np.ndarray) -> np.ndarray:
    """The covariance `raised` where a class has few patients; that of sums with noise has it already."""
    sizes = np.full((2, *moved.shape), np.nan)
    for row, counts in enumerate(scores.counts.values()):
        if isinstance(counts, Counts):
            sizes[:, row] = counts.n_pos, counts.n_neg
    return raised(scores.covariance, moved.ravel(), *sizes.reshape(2, -1))


def raised(covariance: np.ndarray, aurocs: np.ndarray, n_pos: np.ndarray, n_neg: np.ndarray) -> np.ndarray:
    """The covariance of AUROCs with standard deviations of at least Hanley and McNeil's where a class has
    fewer than `FEW` patients, and the correlations as they were sent.

    DeLong's variance is then a sample variance of so few components, and often far too small: with 3 of 200
    patients a logit interval from it holds the true AUROC in 80 % (docs/performance.md#intervals-of-few-
    patients).

    Args:
        covariance: (C, C).
        aurocs: (C,), those of 0 and 1 moved by half a pair.
        n_pos, n_neg: (C,); nan: not raised.
    """
    factor = np.ones(len(aurocs))
    for cell, (theta, m, n) in enumerate(zip(aurocs, n_pos, n_neg, strict=True)):
        variance = covariance[cell, cell]
        if min(m, n) < FEW and variance > 0:
            least = hanley_mcneil(float(theta), float(m), float(n))
            factor[cell] = math.sqrt(max(1.0, least / variance))
    return covariance if (factor == 1).all() else factor[:, None] * covariance * factor


COMPARISONS: tuple[tuple[str, str], ...] = (
    (FEDERATED, LOCAL),
    (FEDERATED, PUBLIC),
    (FEDERATED_DP, PUBLIC),
    (FEDERATED_DP, FEDERATED),
    (FEDERATED_DP, LOCAL_DP),
    (FEDERATED_DP, FEDERATED_CLIPPED),  # what the noise cost: all else is the same
    (FEDERATED_CLIPPED, FEDERATED),  # what the rest of a private arm's training cost,
    (FEDERATED_FROZEN, FEDERATED),  # of it the layers that are frozen,
    (FEDERATED_CLIPPED, FEDERATED_FROZEN),  # and clipping in other steps
    (LOCAL_DP, LOCAL),
    (LOCAL_DP, LOCAL_CLIPPED),
    (LOCAL_CLIPPED, LOCAL),
    (LOCAL_FROZEN, LOCAL),
    (LOCAL_CLIPPED, LOCAL_FROZEN),
    (POOLED, FEDERATED),
    # does a network pay? Of the local one all but the method is the same
    *((network, baseline) for network in (FEDERATED, FEDERATED_DP, LOCAL) for baseline in BASELINES),
)
OVERALL = ("home", "elsewhere", "unseen")


def headline(study: Study, arms: Sequence[str]) -> dict[str, dict[str, float] | None]:
    """arm -> home, elsewhere, unseen, worst; None for an arm that has no model."""
    return {
        arm: {where: study.estimate(arm, where).value for where in OVERALL}
        | {"worst": worst_of(study, arm)["value"]}
        if study.arm_models(arm)
        else None
        for arm in arms
    }


def worst_of(study: Study, arm: str) -> dict[str, Any]:
    """The lowest score over training sites, on the artifacts that all of them average, and beside it what the
    lowest of as many equal sites would show on average: the minimum of k estimates lies below their mean.

    nan where the training sites have no artifact in common.
    """
    artifacts = study.common_artifacts(study.training)
    found = {
        site: study.combine(cells, artifacts)
        for site in study.training
        if artifacts and (cells := study.cells(arm, site))
    }
    if not found:
        return NO_SCORE.to_json() | {"site": None, "of": 0, "artifacts": [], "if_equal": math.nan}
    site = min(found, key=lambda name: (found[name].value, name))
    values = np.array([score.value for score in found.values()])
    errors = np.array([score.standard_error for score in found.values()])
    return found[site].to_json() | {
        "site": site,
        "of": len(found),
        "artifacts": [study.artifacts[number] for number in artifacts],
        "if_equal": expected_minimum(values, errors),
    }


def gaps(study: Study) -> list[dict[str, Any]]:
    """The artifacts in no macro score of a site, and why: no patient assessed, one class, a single patient
    of a class, or hidden by noise.
    """
    found = []
    for site, scores in study.sites.items():
        every: list[Counts | NoisedCounts] = list(scores.counts.values())
        first = every[0] if every else None
        for number in range(len(study.artifacts)):
            if first is None or number in study.averaged[site]:
                continue
            sizes: tuple[int | None, int | None] = (int(first.n_pos[number]), int(first.n_neg[number]))
            if not isinstance(first, Counts):
                reason, sizes = "noise", (None, None)
            else:
                reason = "n0" if not any(sizes) else "one_patient" if all(sizes) else "one_class"
            row = {"site": site, "artifact": study.artifacts[number], "reason": reason}
            found.append(row | {"n_pos": sizes[0], "n_neg": sizes[1]})
    return found


def below_chance(study: Study) -> tuple[list[dict[str, Any]], int]:
    """The AUROCs significantly below 0.5, as exchanged labels would give, and how many were tested.

    One-sided, Holm over all models, sites and artifacts of the run. With exact counts the variance is that
    of the Mann-Whitney statistic where a score tells nothing; with noise, that of the estimate.
    """
    rows: list[dict[str, Any]] = []
    for site, found in study.aurocs.items():
        scores = study.sites[site]
        for model, row in found.row.items():
            counts = scores.counts[model]
            variances = None if isinstance(counts, Counts) else counts.auroc_variance()
            for number, value in enumerate(found.value[row]):
                if not math.isfinite(value):
                    continue
                m, n = float(counts.n_pos[number]), float(counts.n_neg[number])
                p = below_half(float(value), m, n, None if variances is None else float(variances[number]))
                about = {"site": site, "model": model, "artifact": study.artifacts[number]}
                rows.append(about | {"auroc": float(value), "p": p})
    adjusted = holm([row["p"] for row in rows])
    found_below = [row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True) if p < 1 - LEVEL]
    return found_below, len(rows)


def contrasts(study: Study) -> list[dict[str, Any]]:
    """Every comparison of arms that have models, at every place where it is defined; two families of Holm's
    correction, of the places overall and of the single sites.
    """
    several = study.held_out if len(study.held_out) > 1 else []  # one alone is `unseen`
    found: dict[str, list[tuple[dict[str, Any], Difference]]] = {"overall": [], "sites": []}
    for arm, other in COMPARISONS:
        if not (study.arm_models(arm) and study.arm_models(other)):
            continue
        for where in (*OVERALL, *study.training, *several):
            if where == "elsewhere" and not (study.cells(arm, where) and study.cells(other, where)):
                continue
            family = "overall" if where in OVERALL else "sites"
            row = {"arm": arm, "other": other, "where": where, "family": family}
            found[family].append((row, study.difference(arm, other, where)))
    rows = []
    for pairs in found.values():
        adjusted = holm([difference.p for _, difference in pairs])
        rows += [
            row | difference.to_json() | {"p": difference.p, "p_holm": p}
            for (row, difference), p in zip(pairs, adjusted, strict=True)
        ]
    return rows


def common_scores(study: Study, arms: Sequence[str]) -> dict[str, Any] | None:
    """Scores over the artifacts that every site averages; None where all average the same, and where there
    is no common one the list is empty.
    """
    scored = [site for site in study.sites if study.averaged[site]]
    if len({study.averaged[site] for site in scored}) < 2:
        return None
    artifacts = study.common_artifacts(scored)
    return {
        "artifacts": [study.artifacts[number] for number in artifacts],
        "scores": {
            arm: {where: study.estimate(arm, where, artifacts).to_json() for where in OVERALL}
            for arm in arms
            if artifacts and study.arm_models(arm)
        },
    }


def generalization_gap(study: Study, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """arm -> how much worse it is where it did not train: unseen less home, over the artifacts that every
    place with a score averages; and what to expect at the next hospital, where three or more were held out.
    """
    from server.evaluation.next_hospital import prediction_interval, to_logit

    found = {}
    for arm in arms:
        at = {where: study.cells(arm, where) for where in ("home", "unseen")}
        sites = sorted({site for cells in at.values() for site, _ in cells})
        artifacts = study.common_artifacts(sites)
        if not at["home"] or not at["unseen"] or not artifacts:
            continue
        home, unseen = (study.combine(at[where], artifacts) for where in ("home", "unseen"))
        weights = at["unseen"] | {cell: -weight for cell, weight in at["home"].items()}
        gap = study.combine(weights, artifacts)
        held_out = [site for site in study.held_out if study.averaged.get(site)]
        scores = [study.combine(study.cells(arm, site), artifacts).value for site in held_out]
        half_pairs = [study.half_pair(site, artifacts) for site in held_out]
        ends = prediction_interval(to_logit(np.array(scores), np.array(half_pairs)))
        found[arm] = Difference(value=gap.value, standard_error=gap.standard_error).to_json() | {
            "artifacts": [study.artifacts[number] for number in artifacts],
            "home": home.value,
            "unseen": unseen.value,
            "held_out": len(held_out),
            "next_low": expit(float(ends[0])),
            "next_high": expit(float(ends[1])),
        }
    return found


def site_metrics(
    counts: Counts | NoisedCounts, artifacts: Sequence[str] = DEFAULT_LABELS
) -> dict[str, dict[str, Any]]:
    """artifact -> auroc, low, high, n_pos, n_neg.

    Numbers of patients under noise are estimates and have other names, `n_pos_estimate` and `n_neg_estimate`;
    an AUROC that the noise hides has a `reason`. Where coarse bins hold much of a class in one, the row has
    `crowded`.
    """
    auroc, (low, high), crowded = counts.auroc(), counts.interval(), counts.crowded()
    found: dict[str, dict[str, Any]] = {}
    for a, name in enumerate(artifacts):
        row: dict[str, Any] = {"auroc": float(auroc[a]), "low": float(low[a]), "high": float(high[a])}
        if crowded[a]:
            row["crowded"] = True
        n_pos, n_neg = int(counts.n_pos[a]), int(counts.n_neg[a])
        if isinstance(counts, Counts):
            found[name] = row | {"n_pos": n_pos, "n_neg": n_neg}
            continue
        found[name] = row | {
            "n_pos": None,
            "n_neg": None,
            "n_pos_estimate": n_pos,
            "n_neg_estimate": n_neg,
            "n_deviation": counts.n_deviation,
        }
        if np.isnan(auroc[a]):
            found[name]["reason"] = counts.missing_reason
    return found


def any_numbers(study: Study) -> dict[str, Any]:
    """Any artifact: which are combined, and of each site that counted patients with any of them the counts
    and the row of each model. It is no artifact, and in no mean over artifacts.
    """
    sites = {site: scores.any_counts for site, scores in study.sites.items() if scores.any_counts}
    return {
        "artifacts": [study.artifacts[place] for place in combined(study.artifacts)],
        "counts": {
            site: {model: counts.to_json([ANY])[ANY] for model, counts in of_models.items()}
            for site, of_models in sites.items()
        },
        "matrix": {
            model: {site: site_metrics(of_models[model], [ANY])[ANY] for site, of_models in sites.items()}
            for model in study.models
            if all(model in of_models for of_models in sites.values())  # baselines are not
        },
    }


def subgroup_numbers(study: Study, arms: Sequence[str]) -> dict[str, Any]:
    """By arm the AUROCs in subgroups at each site, with the model that the site would use, and of a shared
    model at the training and at the held-out sites together; there also the differences between levels.
    """
    sums = {site: scores.subgroups for site, scores in study.sites.items() if scores.subgroups}
    found: dict[str, Any] = {"sites": list(sums), "rows": {}, "differences": {}}
    for arm in arms:
        places = {
            site: [(site, model)] for site in sums if (model := study.model_at_home(arm, site)) is not None
        }
        groups = {"home": study.training, "unseen": study.held_out}
        together = {
            where: cells
            for where, sites in groups.items()
            if arm in study.models and (cells := [(site, arm) for site in sites if site in sums])
        }
        if places:
            found["rows"][arm] = subgroup_rows(together | places, sums, study.artifacts)
            found["differences"][arm] = subgroup_differences(together, sums, study.artifacts)
    return found


def report_numbers(study: Study, arms: Sequence[str]) -> dict[str, Any]:
    """The parts of evaluation.json that follow from the counts alone."""
    everywhere = [*study.training, *study.held_out]
    matrix = {
        model: {
            site: site_metrics(study.sites[site].counts[model], study.artifacts)
            for site in everywhere
            if site in study.sites
        }
        for model in study.models
    }
    metrics = {
        arm: {
            site: matrix[model][site]
            for site in everywhere
            if (model := study.model_at_home(arm, site)) and site in study.sites
        }
        for arm in arms
    }
    scores = {
        arm: {where: study.estimate(arm, where).to_json() for where in (*OVERALL, *everywhere)}
        for arm in arms
        if study.arm_models(arm)
    }
    model_scores = {
        model: {
            site: study.combine({(site, model): 1.0}).to_json() for site in everywhere if site in study.sites
        }
        for model in study.models
    }
    differences = contrasts(study)
    below, tested = below_chance(study)
    families = {
        family: sum(row["family"] == family and math.isfinite(row["p"]) for row in differences)
        for family in ("overall", "sites")
    }
    return {
        "scoring": {site: dict(scores_at.scoring) for site, scores_at in study.sites.items()},
        "counts": {
            site: {model: counts.to_json(study.artifacts) for model, counts in scores_at.counts.items()}
            for site, scores_at in study.sites.items()
        },
        "covariance": {
            site: {
                "models": list(scores_at.counts),
                "artifacts": list(study.artifacts),
                "matrix": np.round(scores_at.upper_covariance, 12),
            }
            for site, scores_at in study.sites.items()
        },
        "averaged": {
            site: [study.artifacts[number] for number in found] for site, found in study.averaged.items()
        },
        "missing": gaps(study),
        "metrics": metrics,
        "matrix": matrix,
        "model_scores": model_scores,
        "scores": scores,
        "headline": headline(study, arms),
        "worst": {arm: worst_of(study, arm) for arm in arms if study.arm_models(arm)},
        "common": common_scores(study, arms),
        "contrasts": differences,
        "below_chance": below,
        "generalization_gap": generalization_gap(study, arms),
        "looks": families | {"below_chance": tested},
        "any_artifact": any_numbers(study),
        "subgroups": subgroup_numbers(study, arms),
    }
