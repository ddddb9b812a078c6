"""The worst misses and false alarms of a model on labelled images, for a second, blinded reading.

A reader who sees that the model disagrees agrees with one of the two; so the workbook shows the images in a
random order, and neither the label nor what the model said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client.data.cohort import Cohort, load_cohort
from client.predict.predict import Predictions
from client.reader_study.labelling import hand_out
from common.artifacts import INDEX, NAMES
from common.errors import DataError

WORST = 10
READERS = 2


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image whose label the model contradicts."""

    kind: Literal["miss", "false alarm"]
    study: int
    series: int
    image: int
    artifact: str
    beyond: float  # how far the logit lies on the wrong side of the threshold
    position: int  # of the slice among the site's; local


def worst_mistakes(found: Predictions, site: Path) -> tuple[Mistake, ...]:
    """At most `WORST` misses and `WORST` false alarms at the thresholds for images, the worst first.

    Raises:
        DataError: `labels-missing`, no image that was judged has a label; as `load_cohort`.
    """
    return worst_of(found, load_cohort(site, size=found.model.size, quarantine="ignore", labels=NAMES))


def worst_of(found: Predictions, cohort: Cohort) -> tuple[Mistake, ...]:
    """The same, with labels of all artifacts that are loaded already, at the size of the model."""
    at = {(record.file, record.frame): row for row, record in enumerate(cohort.records)}
    mistakes, labelled = [], 0
    for study in found.studies:
        for series in study.series:
            for image in series.images:
                row = at.get((image.file, image.frame))
                for finding in image.findings if row is not None else ():
                    assert row is not None
                    label = cohort.labels[row, INDEX[finding.artifact]]
                    labelled += label in (0, 1)
                    if finding.positive is None or finding.point is None or label not in (0, 1):
                        continue
                    if finding.positive is not bool(label):
                        mistakes.append(
                            Mistake(
                                kind="miss" if label else "false alarm",
                                study=study.number,
                                series=series.number,
                                image=image.number,
                                artifact=finding.artifact,
                                beyond=abs(finding.logit - finding.point.threshold),
                                position=row,
                            )
                        )
    if not labelled:
        raise DataError(
            f"{cohort.folder}: no judged image has a label",
            code="labels-missing",
            hint="fedqc data labels SITE --sheets 2",
        )
    mistakes.sort(key=lambda one: (-one.beyond, one.position, one.artifact))
    return tuple(
        one
        for kind in ("miss", "false alarm")
        for one in [mistake for mistake in mistakes if mistake.kind == kind][:WORST]
    )


def adjudicate(mistakes: tuple[Mistake, ...], site: Path, out: Path) -> list[Path]:
    """Write workbooks of these images for `READERS` readers, to be merged by `fedqc data labels --merge`.

    Raises:
        ConfigError: as `client.reader_study.labelling.hand_out`.
    """
    positions = {one.position for one in mistakes}
    return hand_out(site, readers=READERS, out=out, per="image", only=positions) if positions else []


def public(mistakes: tuple[Mistake, ...]) -> list[dict[str, Any]]:
    """For programs: by number, without file names."""
    return [
        {name: value for name, value in vars(one).items() if name != "position"}
        | {"beyond": round(one.beyond, 4)}
        for one in mistakes
    ]


def mistakes_text(mistakes: tuple[Mistake, ...]) -> str:
    """One line a mistake."""
    lines = [
        f"{one.kind:12s}{one.artifact:16s}study {one.study}, series {one.series}, image {one.image}"
        f"  {one.beyond:.2f} beyond the threshold"
        for one in mistakes
    ]
    return "\n".join(lines) or "no judged image contradicts its label"
