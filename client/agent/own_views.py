"""Keep the views of a site's training patients for one run: drawn once, in memory only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from client.agent.training import TRAIN, TrainingSlices
from client.data.cohort import Cohort
from client.data.studies import CohortSamples
from client.dp.injected import InjectedRows
from client.dp.sampler import rows_by_patient
from client.site.config import site_key
from client.views.injected import PatientViews, ViewCoins, views_of_patient
from common.devices import on_device
from common.errors import FedqcError
from common.learning import extract_features
from common.models import as_classifier
from common.plan import Inject, RunPlan
from common.preprocess import to_channels
from common.studies import sample_channels

# what one patient's pixels can make of the physics: never a reason to stop the others' training
_FAULTS = (ArithmeticError, FedqcError, IndexError, RuntimeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class SiteViews:
    """Views of training patients, m slices; everything in the same order, patient by patient."""

    images: np.ndarray  # int16 (m, S, S)
    modality: np.ndarray  # int8 (m,)
    labels: np.ndarray  # float32 (m, artifacts), nan = not assessed
    weights: np.ndarray  # float64 (m,), sums to 1 over a patient
    patients: np.ndarray  # int64 (m,), numbers of the cohort

    def of(self, kept: np.ndarray) -> SiteViews:
        """Those where `kept`, bool (m,), is true."""
        return SiteViews(
            images=self.images[kept],
            modality=self.modality[kept],
            labels=self.labels[kept],
            weights=self.weights[kept],
            patients=self.patients[kept],
        )


class PrivateImages(NamedTuple):
    """The rows of a private training of more than the head: slices that were read, or studies; then views, if
    any.
    """

    inputs: Callable[[np.ndarray], Tensor]  # row numbers (m,) -> (m, ..., 2, S, S) float32 channels
    labels: np.ndarray  # float32 (n, artifacts)
    patients: np.ndarray  # int64 (n,)
    injected: InjectedRows | None


class PrivateRows(NamedTuple):
    """The rows of a private training: slices that were read, then views."""

    features: np.ndarray  # float32 (n, F)
    labels: np.ndarray  # float32 (n, artifacts)
    patients: np.ndarray  # int64 (n,)
    injected: InjectedRows


def draw_views(
    cohort: Cohort,
    plan: RunPlan,
    run: str,
    inject: Inject,
    tick: Callable[[], None] = lambda: None,
) -> SiteViews:
    """The views of all training patients, each from their own slices, the site's key and the run.

    Args:
        tick: called before each patient; what it raises ends the work.
    """
    size = cohort.images.shape[-1]
    key = site_key(cohort.folder / cohort.site.state)
    most = plan.privacy.max_slices_per_patient
    made: list[tuple[int, PatientViews]] = []
    for own in rows_by_patient(cohort.patients, np.flatnonzero(cohort.part == TRAIN)):
        tick()
        records = [cohort.records[row] for row in own]
        coins = ViewCoins(key=key, run=run, patient=records[0].patient)
        try:
            views = views_of_patient(
                cohort.images[own],
                records,
                cohort.labels[own],
                coins,
                inject,
                artifacts=cohort.artifacts,
                max_slices=most,
                augment=plan.training.augment,
            )
        except _FAULTS:
            continue
        made.append((int(cohort.patients[own[0]]), views))
    empty = np.zeros((0, size, size), np.int16)
    return SiteViews(
        images=np.concatenate([empty, *(views.images for _, views in made)]),
        modality=np.concatenate([np.zeros(0, np.int8), *(views.modality for _, views in made)]),
        labels=np.concatenate([cohort.labels[:0], *(views.labels for _, views in made)]),
        weights=np.concatenate([np.zeros(0), *(views.weights for _, views in made)]),
        patients=np.concatenate(
            [np.zeros(0, np.int64), *(np.full(len(views.images), number) for number, views in made)]
        ),
    )


class OwnViews:
    """The views of one run at one site, and their features under the frozen backbone."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self.forget()

    def forget(self) -> None:
        """Drop what is in memory; the same views are drawn again when they are needed."""
        self._run = ""
        self._views: SiteViews | None = None
        self._backbone, self._features = "", np.zeros((0, 0), np.float32)

    def leave_out(self, cohort: Cohort) -> None:
        """Drop the views of patients who train no longer."""
        if self._views is None:
            return
        kept = np.isin(self._views.patients, cohort.patients[cohort.part == TRAIN])
        if kept.all():
            return
        if self._backbone:
            self._features = self._features[kept]
        self._views = self._views.of(kept)

    def expanded(
        self, cohort: Cohort, run: str, inject: Inject, tick: Callable[[], None] = lambda: None
    ) -> TrainingSlices:
        """The slices of training patients that were read, then their views, for training without noise.

        A patient's slices weigh among each other as in the private mean (client/dp/injected.py), and as many
        as they are beside other patients.
        """
        views = self._of(cohort, run, inject, tick)
        read = read_rows(cohort)
        injected = self._injected(len(read), views, inject)
        patients = np.concatenate([cohort.patients[read], views.patients])
        weights = np.zeros(len(patients), np.float32)
        rows = np.arange(len(patients))
        for own in rows_by_patient(patients, rows):
            weights[own] = injected.mean_weights(own) * len(own)
        return TrainingSlices(
            images=np.concatenate([cohort.images[read], views.images]),
            modality=np.concatenate([cohort.modality[read], views.modality]),
            labels=np.concatenate([cohort.labels[read], views.labels]),
            rows=rows,
            weights=weights,
        )

    def private(
        self,
        cohort: Cohort,
        run: str,
        inject: Inject,
        model: nn.Module,
        backbone: str,
        read_features: np.ndarray,
        tick: Callable[[], None] = lambda: None,
    ) -> PrivateRows:
        """The same rows as the private head takes them.

        Args:
            backbone: digest of the model's frozen part, of which features are kept.
            read_features: float32 (slices, F), those of `read_rows`.
        """
        views = self._of(cohort, run, inject, tick)
        if self._backbone != backbone:
            width = as_classifier(model).head.in_features
            features = np.zeros((len(views.images), width), np.float32)
            # each patient's by themselves: in one batch with others the last bit may depend on who they are
            with on_device(model):
                for own in rows_by_patient(views.patients, np.arange(len(views.patients))):
                    tick()
                    features[own] = extract_features(model, views.images, views.modality, own)
            self._backbone, self._features = backbone, features
        read = read_rows(cohort)
        return PrivateRows(
            features=np.concatenate([read_features, self._features]),
            labels=np.concatenate([cohort.labels[read], views.labels]),
            patients=np.concatenate([cohort.patients[read], views.patients]),
            injected=self._injected(len(read), views, inject),
        )

    def private_images(
        self, cohort: Cohort, run: str, inject: Inject, tick: Callable[[], None] = lambda: None
    ) -> PrivateImages:
        """The same rows as `private`, as images: features of a network that changes cannot be kept."""
        views, rows = self._of(cohort, run, inject, tick), read_rows(cohort)
        read, count = images_of(cohort, rows), len(rows)

        def inputs(chosen: np.ndarray) -> Tensor:
            is_view = chosen >= count
            own = chosen[is_view] - count
            of_views = torch.from_numpy(to_channels(views.images[own], views.modality[own]))
            found = of_views.new_empty((len(chosen), *of_views.shape[1:]))
            found[is_view], found[~is_view] = of_views, read.inputs(chosen[~is_view])
            return found

        return PrivateImages(
            inputs=inputs,
            labels=np.concatenate([read.labels, views.labels]),
            patients=np.concatenate([read.patients, views.patients]),
            injected=self._injected(count, views, inject),
        )

    def _of(self, cohort: Cohort, run: str, inject: Inject, tick: Callable[[], None]) -> SiteViews:
        if self._views is None or self._run != run:
            self.forget()
            self._run, self._views = run, draw_views(cohort, self._plan, run, inject, tick)
        return self._views

    @staticmethod
    def _injected(num_read: int, views: SiteViews, inject: Inject) -> InjectedRows:
        return InjectedRows(
            weights=np.concatenate([np.zeros(num_read), views.weights]),
            share=inject.share,
            views=inject.views,
        )


def images_of(cohort: Cohort | CohortSamples, rows: np.ndarray) -> PrivateImages:
    """The slices or samples `rows` of a cohort, as a private training of a network takes them; they are read
    as they are asked for.
    """

    def inputs(chosen: np.ndarray) -> Tensor:
        return sample_channels(cohort.images, cohort.modality, rows[chosen])

    return PrivateImages(
        inputs=inputs, labels=cohort.labels[rows], patients=cohort.patients[rows], injected=None
    )


def read_rows(cohort: Cohort) -> np.ndarray:
    """The rows of training patients with a label of the sheet, int64."""
    return np.flatnonzero((cohort.part == TRAIN) & ~np.isnan(cohort.labels).all(axis=1))
