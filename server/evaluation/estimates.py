"""Compute every number of the report from the sums that sites sent: metrics, matrix, headline, contrasts.

A score is the macro AUROC of a model at a site: the mean over the artifacts that have patients with and
without them. Every headline figure is a linear combination of AUROCs at several sites; patients of different
sites are independent, so its variance is the sum over sites of w' C w, with C the covariance each site sent
(common.counts.auroc_covariance). A site that was scored with noise sends none: the variances then come from
the noise and the estimated numbers of patients (server/evaluation/noised.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from common.arms import (
    FEDERATED,
    FEDERATED_CLIPPED,
    FEDERATED_DP,
    LOCAL,
    LOCAL_CLIPPED,
    LOCAL_DP,
    POOLED,
    PUBLIC,
)
from common.artifacts import NAMES
from common.counts import Counts
from server.evaluation.noised import NOT_ESTIMABLE, NoisedCounts

Cell = tuple[str, str]
"""(site, model)"""


@dataclass(frozen=True, kw_only=True)
class SiteScores:
    """What one site sent: counts a model, exact or with noise, and the covariance of all AUROCs, (K*A, K*A)
    in the order of `counts`.
    """

    counts: Mapping[str, Counts] | Mapping[str, NoisedCounts]
    covariance: np.ndarray
    scoring: Mapping[str, Any] = field(
        default_factory=lambda: {"mode": "synthetic"}
    )  # mode; of noise, its price


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its standard error; the interval is Wald's, 95 %."""

    value: float
    standard_error: float

    def to_json(self) -> dict[str, float]:
        half = NormalDist().inv_cdf(0.975) * self.standard_error
        return {
            "value": self.value,
            "low": self.value - half,
            "high": self.value + half,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True, kw_only=True)
class Study:
    """All sites' scores of one run. A model is named after its arm, `local/<site>` after its arm and its only
    site.
    """

    sites: Mapping[str, SiteScores]
    training: Sequence[str]
    held_out: Sequence[str]
    models: Sequence[str]

    def arm_models(self, arm: str) -> list[str]:
        return [model for model in self.models if model == arm or model.startswith(f"{arm}/")]

    def model_at_home(self, arm: str, site: str) -> str | None:
        return next((model for model in (f"{arm}/{site}", arm) if model in self.models), None)

    def combine(self, weights: Mapping[Cell, float]) -> Estimate:
        """The weighted sum of macro AUROCs; nan where a cell has no score."""
        value, variance = 0.0, 0.0
        for site in dict.fromkeys(site for site, _ in weights):
            scores = self.sites[site]
            order = list(scores.counts)
            vector = np.zeros((len(order), len(NAMES)))
            for (where, model), weight in weights.items():
                if where != site:
                    continue
                auroc = scores.counts[model].auroc()
                defined = ~np.isnan(auroc)
                if not defined.any():
                    return Estimate(value=np.nan, standard_error=np.nan)
                value += weight * float(auroc[defined].mean())
                vector[order.index(model), defined] += weight / defined.sum()
            used = vector.ravel() != 0
            variance += float(
                vector.ravel()[used] @ scores.covariance[np.ix_(used, used)] @ vector.ravel()[used]
            )
        return Estimate(
            value=value,
            standard_error=float(np.sqrt(max(variance, 0.0))) if np.isfinite(variance) else np.nan,
        )

    def cells(self, arm: str, where: str) -> dict[Cell, float]:
        """The weights that make `home`, `elsewhere`, `unseen` or the score at one site; empty where it does
        not exist.
        """
        models = self.arm_models(arm)
        scored = [site for site in self.training if self._scored(site)]
        if where == "unseen":
            cells = [(site, model) for site in self.held_out if self._scored(site) for model in models]
        elif where == "elsewhere" and models != [arm]:
            cells = [(site, model) for model in models for site in scored if model != f"{arm}/{site}"]
        elif where in ("home", "elsewhere"):
            cells = [(site, model) for site in scored if (model := self.model_at_home(arm, site))]
        else:
            home = self.model_at_home(arm, where)
            used = [home] if home else models if where in self.held_out else []
            cells = [(where, model) for model in used if self._scored(where)]
        return {cell: 1 / len(cells) for cell in cells}

    def _scored(self, site: str) -> bool:
        return site in self.sites and any(
            np.isfinite(counts.auroc()).any() for counts in self.sites[site].counts.values()
        )

    def estimate(self, arm: str, where: str) -> Estimate:
        cells = self.cells(arm, where)
        return self.combine(cells) if cells else Estimate(value=np.nan, standard_error=np.nan)

    def difference(self, arm: str, other: str, where: str) -> Estimate:
        """`arm` less `other`, paired over patients: both were scored on the same ones."""
        plus, minus = self.cells(arm, where), self.cells(other, where)
        if not plus or not minus:
            return Estimate(value=np.nan, standard_error=np.nan)
        return self.combine({cell: plus.get(cell, 0.0) - minus.get(cell, 0.0) for cell in plus | minus})


COMPARISONS: tuple[tuple[str, str], ...] = (
    (FEDERATED, LOCAL),
    (FEDERATED, PUBLIC),
    (FEDERATED_DP, PUBLIC),
    (FEDERATED_DP, FEDERATED),
    (FEDERATED_DP, LOCAL_DP),
    (FEDERATED_DP, FEDERATED_CLIPPED),  # what the noise cost: all else is the same
    (LOCAL_DP, LOCAL_CLIPPED),
    (POOLED, FEDERATED),
)


def headline(study: Study, arms: Sequence[str]) -> dict[str, dict[str, float] | None]:
    """arm -> home, elsewhere, unseen, worst; None for an arm that has no model."""
    found: dict[str, dict[str, float] | None] = {}
    for arm in arms:
        if not study.arm_models(arm):
            found[arm] = None
            continue
        at_sites = [study.estimate(arm, site).value for site in study.training]
        found[arm] = {where: study.estimate(arm, where).value for where in ("home", "elsewhere", "unseen")}
        found[arm]["worst"] = float(np.nanmin(at_sites)) if np.isfinite(at_sites).any() else np.nan  # type: ignore[index]
    return found


def site_metrics(counts: Counts | NoisedCounts) -> dict[str, dict[str, Any]]:
    """artifact -> auroc, low, high, n_pos, n_neg.

    Numbers of patients under noise are estimates and have other names, `n_pos_estimate` and `n_neg_estimate`;
    an AUROC that the noise hides has a `reason`. Where coarse bins hold much of a class in one, the row has
    `crowded`.
    """
    auroc, (low, high), crowded = counts.auroc(), counts.interval(), counts.crowded()
    found: dict[str, dict[str, Any]] = {}
    for a, name in enumerate(NAMES):
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
            found[name]["reason"] = NOT_ESTIMABLE
    return found


def report_numbers(study: Study, arms: Sequence[str]) -> dict[str, Any]:
    """The parts of evaluation.json that follow from the counts alone."""
    everywhere = [*study.training, *study.held_out]
    matrix = {
        model: {
            site: site_metrics(study.sites[site].counts[model]) for site in everywhere if site in study.sites
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
        arm: {
            where: study.estimate(arm, where).to_json()
            for where in ("home", "elsewhere", "unseen", *everywhere)
        }
        for arm in arms
        if study.arm_models(arm)
    }
    model_scores = {
        model: {
            site: study.combine({(site, model): 1.0}).to_json() for site in everywhere if site in study.sites
        }
        for model in study.models
    }
    several = study.held_out if len(study.held_out) > 1 else []  # one alone is `unseen`
    contrasts = [
        {"arm": arm, "other": other, "where": where} | study.difference(arm, other, where).to_json()
        for arm, other in COMPARISONS
        if study.arm_models(arm) and study.arm_models(other)
        for where in ("home", "elsewhere", "unseen", *study.training, *several)
    ]
    return {
        "scoring": {site: dict(scores_at.scoring) for site, scores_at in study.sites.items()},
        "counts": {
            site: {model: counts.to_json() for model, counts in scores_at.counts.items()}
            for site, scores_at in study.sites.items()
        },
        "covariance": {
            site: {
                "models": list(scores_at.counts),
                "artifacts": list(NAMES),
                "matrix": np.round(scores_at.covariance, 12),
            }
            for site, scores_at in study.sites.items()
        },
        "metrics": metrics,
        "matrix": matrix,
        "model_scores": model_scores,
        "scores": scores,
        "headline": headline(study, arms),
        "contrasts": contrasts,
    }
