"""Which studies to read first: those about which the current model is least sure, and that differ from one
another (`fedqc data labels --next`). Everything here stays in the hospital.

Only training patients are proposed. What the model finds hard is no sample of a site's patients: test
patients chosen that way would give scores that hold for hard cases only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import assign_parts
from client.dicom.index import PARTS
from client.labels.label_sheet import LabelTable, MatchedLabels, inspect_labels, inspect_match
from client.labels.spreadsheet import SheetProblem
from client.reader_study.labelling import SiteImages, site_images
from client.site.split import split_of_site
from common.artifacts import DEFAULT_LABELS, MODALITIES, columns_of
from common.errors import ConfigError, DataError
from common.learning import extract_features
from common.model_file import load_model
from common.models import as_classifier, build
from common.preprocess import DEFAULT_SIZE
from common.weights import manifest_of, resolve_initial, unflatten

MODEL, PUBLIC = "small_cnn", "package:small_cnn.safetensors"
SLICES = 8  # of a study, evenly spaced
POOL = 4  # times as many studies are ranked by uncertainty before the most different of them are chosen


@dataclass(frozen=True, kw_only=True)
class NextReads:
    """The studies to read, the first one first."""

    ours: SiteImages
    unread: int  # studies of training patients that nobody has read
    studies: tuple[tuple[int, ...], ...]  # positions in `ours` of each one's slices
    uncertainty: tuple[float, ...]  # of each, bits: 0 sure, 1 a coin

    @property
    def positions(self) -> frozenset[int]:
        """All slices of the chosen studies."""
        return frozenset(position for study in self.studies for position in study)

    def report(self) -> dict[str, Any]:
        """File numbers, relative paths and pseudonyms; local."""
        return {
            "unread_studies": self.unread,
            "next": [
                {
                    "study": self.ours.records[study[0]].study,
                    "files": list(dict.fromkeys(self.ours.records[at].number for at in study)),
                    "first_file": self.ours.records[study[0]].file,
                    "uncertainty": round(bits, 4),
                }
                for study, bits in zip(self.studies, self.uncertainty, strict=True)
            ],
        }


def next_reads(
    site_yaml: Path, *, count: int, model: Path | None = None, size: int = DEFAULT_SIZE
) -> NextReads:
    """Choose `count` studies: of the least sure ones those that are farthest apart, greedily.

    A study is as unsure as its slices on average: each the largest entropy of an artifact's probability. Of
    the `POOL` times `count` least sure ones the first is the least sure; each next one is the farthest from
    those before, by the mean of its slices' features (greedy k-center, Sener and Savarese, ICLR 2018).

    Args:
        model: a model file of a run; by default the public model of fedqc.
    Raises:
        ConfigError: `bad-argument`; the model file cannot be used.
        DataError: as `site_images`; about the sheet.
    """
    if count < 1:
        raise ConfigError(f"--next {count}: must be at least 1", code="bad-argument", hint="--next 50")
    ours = site_images(site_yaml, size=size)
    studies = _unread(ours, _matched(ours))
    features, bits = _looked_at(ours, studies, model)
    pool = np.argsort(-bits, kind="stable")[: POOL * count]
    chosen = [int(pool[at]) for at in farthest_first(features[pool], count)]
    return NextReads(
        ours=ours,
        unread=len(studies),
        studies=tuple(studies[at] for at in chosen),
        uncertainty=tuple(float(bits[at]) for at in chosen),
    )


def farthest_first(points: np.ndarray, count: int) -> list[int]:
    """At most `count` rows of `points`, (n, F): row 0, then each time the row farthest from those before."""
    chosen: list[int] = []
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        at = int(np.argmax(distance))
        chosen.append(at)
        distance = np.minimum(distance, np.square(points - points[at]).sum(axis=1))
        distance[chosen] = -1.0
    return chosen


def report_text(found: dict[str, Any]) -> str:
    """The list for a terminal."""
    lines = [f"{len(found['next'])} of {found['unread_studies']} unread studies of training patients:"]
    for rank, study in enumerate(found["next"], start=1):
        files = len(study["files"])
        lines.append(
            f"{rank:4d}  {study['uncertainty']:.2f} bits  {study['first_file']}"
            + (f" and {files - 1} more files" if files > 1 else "")
        )
    return "\n".join([*lines, *(f"written: {path}" for path in found.get("written", []))])


def _matched(ours: SiteImages) -> MatchedLabels:
    """What the sheet says so far; nothing where there is none yet."""
    table, problems = LabelTable.empty(), tuple[SheetProblem, ...]()
    if ours.site.has_sheet and ours.labels_path.exists():
        table, problems = inspect_labels(ours.labels_path, key=ours.key)
    matched, more = inspect_match(table, ours.names, ours.may_occur, ours.site.consensus, key=ours.key)
    if problems or more:
        raise DataError(
            f"{ours.labels_path}: {len(problems) + len(more)} problems",
            code="bad-label",
            hint="fedqc data labels SITE lists them",
        )
    return matched


def _unread(ours: SiteImages, matched: MatchedLabels) -> list[tuple[int, ...]]:
    """Studies of training patients of which nobody has read a slice."""
    names = sorted({record.patient for record in ours.records})
    parts = assign_parts(
        ours.patients,
        names,
        records=ours.records,
        labels=matched,
        key=ours.key,
        split=split_of_site(ours.site, ours.folder, None).shares,
    )[ours.patients]
    is_read = ~np.isnan(matched.answers).all(axis=(0, 2))
    studies: dict[tuple[str, str], list[int]] = defaultdict(list)
    for at, record in enumerate(ours.records):
        if parts[at] == PARTS.index("train"):
            studies[record.patient, record.study].append(at)
    return [tuple(positions) for positions in studies.values() if not is_read[positions].any()]


def _looked_at(
    ours: SiteImages, studies: list[tuple[int, ...]], model: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean features (studies, F) and uncertainty (studies,) of each study under the model."""
    network = build(MODEL)
    manifest = manifest_of(network.state_dict())
    path = resolve_initial(PUBLIC, None) if model is None else model
    flat = load_model(path, manifest, DEFAULT_LABELS)
    network.load_state_dict(unflatten(flat, manifest))
    head = as_classifier(network).head
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    modality = np.array([MODALITIES.index(record.modality) for record in ours.records], np.int8)
    features = np.zeros((len(studies), weight.shape[1]))
    bits = np.zeros(len(studies))
    for number, positions in enumerate(studies):
        spread = np.linspace(0, len(positions) - 1, min(SLICES, len(positions))).round().astype(int)
        rows = np.array(positions)[spread]
        own = extract_features(network, ours.images, modality, rows).astype(np.float64)
        entropy = np.where(
            ours.may_occur[np.ix_(rows, columns_of(DEFAULT_LABELS))], _entropy(own @ weight.T + bias), 0.0
        )
        features[number], bits[number] = own.mean(axis=0), entropy.max(axis=1).mean()
    return features, bits


def _entropy(logits: np.ndarray) -> np.ndarray:
    """Of the probabilities that belong to `logits`, in bits, same shape."""
    p = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
