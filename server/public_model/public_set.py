"""The coordinator's own images: phantoms of public appearances, generated from the plan's seed, or a file of
real ones.

Curves over rounds and every choice (epoch, hyper-parameters) come from here, never from a hospital.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from common.any_artifact import any_label, any_score, combined, possible
from common.artifacts import DEFAULT_LABELS, MODALITIES
from common.counts import Counts, auroc, per_patient, quantile_edges
from common.learning import score
from common.losses import PerSampleLoss
from common.measures import public_vectors
from common.physics.appearance import PUBLIC_APPEARANCES
from common.physics.ct import projector
from common.plan import Model, PublicSet
from common.public_phantoms import draw
from common.public_slices import Slices, load_slices
from common.series import Series
from common.studies import Samples, decisions, samples_of, series_of_patients, studies_of_patients


def public_set(settings: PublicSet, size: int, artifacts: Sequence[str] = DEFAULT_LABELS) -> Slices:
    """The public set of a plan, its slices `size` pixels wide, with labels of `artifacts`.

    Raises:
        ConfigError: as `common.public_slices.load_slices`.
    """
    if settings.file is not None and settings.sha256 is not None:
        return load_slices(Path(settings.file), settings.sha256, size, artifacts)
    slices = draw(PUBLIC_APPEARANCES, settings.patients, settings.seed, size, artifacts)
    projector.cache_clear()  # the scanner's matrices hold a hundred MiB, and nothing else in a run needs them
    return slices


def public_measures(settings: PublicSet, artifacts: Sequence[str]) -> Slices:
    """The public set of a plan whose network sees metrics: vectors of nobody, without labels."""
    count = settings.patients
    return Slices(
        images=public_vectors(count, settings.seed),
        modality=np.full(count, MODALITIES.index("MR"), np.int8),
        labels=np.full((count, len(artifacts)), np.nan, np.float32),
        patients=np.arange(count),
    )


def public_samples(slices: Slices, model: Model) -> Samples:
    """A public set as the samples of a plan's network; where it knows no series, as phantoms, a patient's
    slices of one modality are one, in their order.
    """

    def series() -> Series:
        if slices.series is None:
            return series_of_patients(slices.patients, slices.modality)
        study = studies_of_patients(slices.patients, slices.modality)
        return Series(slices.series, np.arange(len(study)), study)

    return samples_of(
        model,
        slices.images,
        slices.modality,
        slices.labels,
        slices.patients,
        series,
    )


def measure(model: nn.Module, samples: Slices | Samples, loss: PerSampleLoss) -> dict[str, float]:
    """Mean loss a slice or study, and macro AUROC a patient."""
    import torch

    rows = np.arange(len(samples.images))
    logits = score(model, samples.images, samples.modality, rows)
    losses = loss(torch.from_numpy(logits), torch.from_numpy(samples.labels))
    found = auroc(*per_patient(*decisions(logits, samples, rows)))
    defined = found[~np.isnan(found)]
    return {"loss": float(losses.mean()), "auroc": float(defined.mean()) if len(defined) else float("nan")}


@dataclass(frozen=True, kw_only=True)
class PublicBins:
    """The bins in which sites count, and the public patients in them."""

    # float32 (artifacts, common.counts.EDGES): quantiles of the model's scores of public patients, with and
    # without each artifact alike
    edges: np.ndarray
    counts: Counts  # how many lie in which of the fine bins
    any_edges: np.ndarray  # float32 (EDGES,), of `common.any_artifact.any_score`; (0,) where there is none
    any_counts: Counts  # of one row, or none


def public_bins(
    model: nn.Module, samples: Slices | Samples, labels: Sequence[str] = DEFAULT_LABELS
) -> PublicBins:
    """The bins of a model's scores.

    Args:
        labels: the outputs of the model.
    """
    rows = np.arange(len(samples.images))
    logits = score(model, samples.images, samples.modality, rows)
    if isinstance(samples.images, np.ndarray) and samples.images.ndim == 2:
        # vectors of nobody: a patient each, of whom nothing is known
        scores, truth = logits, np.full(logits.shape, np.nan)
    else:
        scores, truth = per_patient(*decisions(logits, samples, rows))
    edges = quantile_edges(scores)
    counts, places = Counts.of(scores, truth, edges), combined(labels)
    if not len(places):
        return PublicBins(
            edges=edges, counts=counts, any_edges=np.zeros(0, np.float32), any_counts=Counts.empty(0)
        )
    could = possible(samples.patients, samples.modality, labels)[:, places]
    of_any = any_score(scores[:, places], could, edges[places])[:, None]
    with_any = any_label(truth[:, places], could)[:, None]
    any_edges = quantile_edges(np.where(np.isnan(with_any), np.nan, of_any))
    any_counts = Counts.of(of_any, with_any, any_edges)
    return PublicBins(edges=edges, counts=counts, any_edges=any_edges[0], any_counts=any_counts)
