"""Check the private training of more than the head, `client.dp.dp_sgd.train_private_network`, with every
engine, on the plan's network and generated images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from client.dp import dp_sgd
from client.dp.dp_sgd import PrivateSteps
from client.dp.engines import ENGINES
from client.dp.release import grid_of
from client.privacy_checks.finding import Finding, Scene
from client.privacy_checks.mechanism import half_views, releases, steps_of
from common.artifacts import DEFAULT_LABELS
from common.models import fresh
from common.trainable import trainable_names

SIDE = 32  # pixels
SMALLEST_TENSOR = 5  # values, the bias of the head
SCALES = (1.0, 1.0, 1e12, np.nan, 1.0)
MANY, BLANK = 0, 4  # the patient with more slices than a step uses, and the one without labels
CASES = (("norms", False), ("all", False), ("all", True))  # what is trained, and with views
SLACK = 1e-3  # grid steps that float64 may lose where a start is not zero


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images of generated patients."""

    images: Tensor  # (n, 2, SIDE, SIDE)
    labels: np.ndarray  # (n, A)
    patients: np.ndarray  # (n,)

    def of(self, kept: np.ndarray) -> Images:
        """The slices where `kept` is true."""
        return Images(images=self.images[kept], labels=self.labels[kept], patients=self.patients[kept])


def patients(max_slices: int) -> Images:
    """Ordinary patients, one of huge and one of infinite values, one without labels, one with many slices."""
    generator = np.random.default_rng(3)
    counts = [
        3 * max_slices if number == MANY else min(max_slices, 1 + number) for number in range(len(SCALES))
    ]
    owner = np.repeat(np.arange(len(SCALES)), counts)
    images = generator.random((len(owner), 2, SIDE, SIDE)) * np.array(SCALES)[owner][:, None, None, None]
    labels = generator.integers(0, 2, (len(owner), len(DEFAULT_LABELS))).astype(np.float32)
    labels[owner == BLANK] = np.nan
    return Images(images=torch.as_tensor(images.astype(np.float32)), labels=labels, patients=owner)


def moved(
    scene: Scene, site: Images, request: PrivateSteps, trainable: str, *, with_views: bool = False
) -> tuple[np.ndarray, bool]:
    """As `mechanism.moved`, for the plan's network from weights of a seed; and whether any other weight
    moved.
    """
    model = fresh(scene.plan.model.name, 0, scene.plan.model.args)
    names = trainable_names(model, trainable)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    injected = half_views(site.patients) if with_views else None
    after = dp_sgd.train_private_network(
        model, names, lambda rows: site.images[rows], site.labels, site.patients, request, injected=injected
    )
    start = np.concatenate([before[name].numpy().ravel() for name in names]).astype(np.float64)
    others = [name for name in before if name not in names]
    strayed = any(not torch.equal(before[name], model.state_dict()[name]) for name in others)
    return (start - after) * (request.sample_rate * request.nominal_patients), strayed


def network(scene: Scene) -> Finding:
    """One patient moves the sum over a network's parameters by exactly their own steps, and by the clip at
    most, with views of their slices as without; every trained parameter carries the noise, and no other
    moves.
    """
    found: list[str] = []
    longest, spreads = 0.0, []
    clip_norm = scene.plan.privacy.clip_norm
    everyone = patients(steps_of(scene).max_slices_per_patient)
    known = everyone.of(everyone.patients != MANY)  # whose slices are not drawn at random
    for (trainable, with_views), engine in itertools.product(CASES, ENGINES):
        request = steps_of(scene, engine=engine)
        where = f"{trainable}, {engine}{', views' * with_views}: "
        total = _totals(scene, request, trainable, found, with_views=with_views)
        size = total(known).size
        most = Fraction(clip_norm / grid_of(clip_norm, size)) ** 2
        together = total(known)
        for number in range(len(SCALES)):
            own = total(everyone.of(everyone.patients == number))
            if number == MANY:
                gone = total(everyone) - together
            else:
                gone = together - total(known.of(known.patients != number))
                if not np.array_equal(gone, own):
                    found.append(f"{where}one patient changes what others contribute")
            squared = sum(int(step) ** 2 for step in gone)
            longest = max(longest, float(squared / most) ** 0.5)
            if squared > most:
                found.append(f"{where}one patient moves the sum by {float(squared / most) ** 0.5:.3f} clip")
            if number in (3, BLANK) and gone.any():
                found.append(f"{where}a patient without a finite gradient counts")
        if with_views:
            continue
        alone, _ = moved(scene, everyone.of(everyone.patients < 0), request, trainable)
        spread = alone / (scene.noise_multiplier * clip_norm)
        spreads.append(float(spread.std()))
        # noise rounds to nothing on one value of a large network now and then; a tensor has 5 at least
        uncovered = np.count_nonzero(spread == 0) >= SMALLEST_TENSOR
        if uncovered or not abs(spread.std() - 1) <= 5.5 / np.sqrt(2 * spread.size):
            found.append(f"{where}the noise on an empty step is {spread.std():.3f} of what is charged")
    return Finding(
        check="network",
        holds=not found,
        measured="; ".join(dict.fromkeys(found))[:300]
        or f"one patient moves the sum by {longest:.4f} clip at most; noise {min(spreads):.4f} to "
        f"{max(spreads):.4f} of z·C on norms and all",
        expected="their own steps and at most 1 clip, with each engine; noise on all that is trained",
    )


def _totals(
    scene: Scene, request: PrivateSteps, trainable: str, found: list[str], *, with_views: bool
) -> Callable[[Images], np.ndarray]:
    """What a step releases before its noise, in whole grid steps, int64, and that it is what moves the
    network; faults go to `found`.
    """

    def total(site: Images) -> np.ndarray:
        with releases(lambda total: total) as seen:
            change, strayed = moved(scene, site, request, trainable, with_views=with_views)
        change = change / grid_of(request.clip_norm, change.size)
        if len(seen) != 1 or not np.allclose(change, seen[0].total, rtol=0, atol=SLACK):
            found.append(f"{trainable}, {request.engine}: a step moves other than what it releases")
        if strayed:
            found.append(f"{trainable}, {request.engine}: a part moves that is not trained")
        return np.rint(np.nan_to_num(change)).astype(np.int64)

    return total
