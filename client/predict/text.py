"""Predictions in words: what the terminal and the page share, and the terminal's table (80 columns)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version

from client.data_check.text import table
from client.predict.operating_point import MAX_ALARMS, PHANTOMS, Point
from client.predict.predict import Finding, Predictions, Series, Study
from client.predict.severity import GRADES
from client.predict.words import ENGLISH, SKIPPED
from common.artifacts import ARTIFACTS, INDEX, NAMES
from common.i18n import Say
from common.operating_point import LEAST_FOUND
from common.privacy import epsilon_text
from common.remedies import Remedy, remedies

WIDTH = 80
SHOWN_SERIES, SHOWN_FILES, SHOWN_STUDIES = 40, 8, 12


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """What to do about an artifact, and about which studies."""

    artifact: str
    studies: tuple[int, ...]
    remedy: Remedy
    is_ct: bool
    doses: dict[int, float]  # study -> CTDIvol in mGy, where the header says it

    def advice(self, say: Say) -> str:
        """Whether to repeat, in a sentence."""
        if self.remedy.repeat is None:
            return say("repeat-depends")
        if self.remedy.repeat:
            return say("repeat")
        return say("no-repeat-dose" if self.is_ct else "no-repeat")

    def dose(self, say: Say) -> str:
        """The dose of the scans, in a sentence; "" for MR."""
        if not self.is_ct:
            return ""
        if not self.doses:
            return say("no-dose")
        return say(
            "dose",
            doses=_first(f"{dose:.3g}" for dose in self.doses.values()),
            studies=_first(map(str, self.doses)),
        )

    def where(self, say: Say) -> str:
        """The studies, in words."""
        return say(
            "in-study" if len(self.studies) == 1 else "in-studies", studies=_first(map(str, self.studies))
        )


def _first(words: Iterable[str]) -> str:
    """Some of them, and how many there are; the table and predictions.json have all."""
    every = list(words)
    return ", ".join(every[:SHOWN_STUDIES]) + (f", … ({len(every)})" if len(every) > SHOWN_STUDIES else "")


def next_steps(studies: Sequence[Study]) -> list[NextStep]:
    """For each artifact that a study is called positive for."""
    found = []
    for artifact in ARTIFACTS:
        own = [study for study in studies if artifact.name in study.positive]
        if own:
            found.append(
                NextStep(
                    artifact=artifact.name,
                    studies=tuple(study.number for study in own),
                    remedy=remedies()[artifact.name],
                    is_ct="CT" in artifact.modalities
                    and any(one.modality == "CT" for study in own for one in study.series),
                    doses={
                        study.number: study.ctdi_vol_mgy for study in own if study.ctdi_vol_mgy is not None
                    },
                )
            )
    return found


def artifact_text(name: str, say: Say) -> str:
    """Its name in the report's language."""
    return ARTIFACTS[INDEX[name]].chinese if say("artifact") != "artifact" else name


def value_text(finding: Finding) -> str:
    """A probability, or a logit where there is none."""
    probability = finding.probability
    return f"{finding.logit:+.2f}" if probability is None else f"{probability:.2f}"


def decision_text(finding: Finding, say: Say) -> str:
    """Its grade or just present, absent, or open."""
    if finding.positive is None:
        return say("open")
    return say((finding.grade or "yes") if finding.positive else "no")


def presence_texts(say: Say) -> tuple[str, ...]:
    """What `decision_text` says of something present."""
    return (say("yes"), *map(say, GRADES))


def reason_text(reason: str, say: Say) -> str:
    """Why an image is not judged."""
    if reason == "field modality":
        return say("modality-unseen")
    field = reason.removeprefix("field ")
    return say("unseen", field=field) if field != reason else say(reason)


def unjudged_text(series: Series, say: Say) -> str:
    """How many images of a series are not judged and why; "" where all are."""
    reasons = Counter(image.outside for image in series.images if image.outside)
    return "; ".join(
        say("unjudged-images", count=count, why=reason_text(reason, say)) for reason, count in reasons.items()
    )


def summary_text(found: Predictions, say: Say) -> str:
    """One line for the top."""
    if not found.judged:
        return say("nothing")
    if not found.decides:
        return say("summary-open", studies=len(found.studies))
    positive = sum(bool(study.positive) for study in found.studies)
    unjudged = sum(not study.findings for study in found.studies)
    return say(
        "summary",
        positive=positive,
        studies=len(found.studies),
        none=len(found.studies) - positive - unjudged,
        unjudged=unjudged,
    )


def open_text(found: Predictions, say: Say) -> str:
    """Which artifacts that can occur here are not decided; "" where all are, or none is."""
    left = {
        one.artifact
        for study in found.studies
        for series in study.series
        for one in series.findings
        if one.positive is None
    }
    names = ", ".join(artifact_text(name, say) for name in NAMES if name in left)
    return say("summary-undecided", artifacts=names) if names and found.decides else ""


def basis_rows(found: Predictions, say: Say) -> list[tuple[str, str]]:
    """Which model, what it cost, where thresholds come from, how long it took."""
    rows = []
    if members := found.model.members:
        rows.append((say("model"), say("origin.ensemble", count=len(members))))
    for model in members or (found.model,):
        of_start = {"start": model.start} if model.start else {}
        said = f"{model.name}, {say(f'origin.{model.origin}', **of_start)}"
        if model.run:
            said += ", " + say("of-run", run=model.run, arm=model.arm)
        rows += [(say("model"), said), ("sha256", model.sha256)]
    privacy = found.model.privacy
    values = (
        {}
        if privacy.epsilon is None
        else {"epsilon": epsilon_text(privacy.epsilon), "delta": f"{privacy.delta:g}"}
    )
    rows.append((say("epsilon"), say(f"privacy.{privacy.basis}", **values)))
    for origin, own in found.points.origins.items():
        where = say(f"on.{origin}", **({"count": PHANTOMS} if origin == "phantoms" else {}))
        rows.append(
            (
                say("thresholds"),
                say("origin-of", artifacts=", ".join(artifact_text(name, say) for name in own), origin=where),
            )
        )
    if missing := [name for name in found.model.learned if name not in found.points.patients]:
        names = ", ".join(artifact_text(name, say) for name in missing)
        rows.append((say("thresholds"), say("uncalibrated", artifacts=names)))
    if weak := [name for name, point in found.points.patients.items() if not point.decides]:
        names = ", ".join(artifact_text(name, say) for name in weak)
        rows.append((say("thresholds"), say("undecided", artifacts=names, share=f"{100 * MAX_ALARMS:g}")))
    rows += severity_rows(found, say)
    seconds = say("seconds.said", read=f"{found.seconds.read:.1f}", score=f"{found.seconds.score:.1f}")
    made = say("made.said", time=f"{datetime.now():%Y-%m-%d %H:%M}", version=version("fedqc"))
    return [*rows, (say("seconds"), seconds), (say("made"), made)]


def severity_rows(found: Predictions, say: Say) -> list[tuple[str, str]]:
    """Of each artifact that can occur here: how far its severity may be off, and where that was found."""
    occur = {one.modality for study in found.studies for one in study.series}
    rows = []
    for artifact in ARTIFACTS:
        known = found.points.severities.get(artifact.name)
        point = found.points.patients.get(artifact.name)
        if occur.intersection(artifact.modalities) and point is not None and point.decides:
            name = artifact_text(artifact.name, say)
            if known is None:
                said = say("severity.unknown", artifact=name)
            else:
                said = say(
                    "severity.error" if known.grades else "severity.none",
                    artifact=name,
                    error=f"{known.error:.2f}",
                    mean=f"{known.mean_error:.2f}",
                    right=f"{100 * known.right:.0f}",
                    usual=f"{100 * known.usual_right:.0f}",
                    where=say(f"severity.{known.origin}", slices=known.slices, people=known.people),
                )
            rows.append((say("severity"), said))
    if rows:
        rows.append((say("severity"), say("severity.thirds")))
    return rows


def point_rows(found: Predictions, say: Say) -> list[tuple[str, ...]]:
    """Of each artifact that can occur here: its thresholds, and what they did on the patients they are of."""
    occur = {one.modality for study in found.studies for one in study.series}
    rows = []
    for artifact in ARTIFACTS:
        for of, points in (("patient", found.points.patients), ("image", found.points.images)):
            if occur & set(artifact.modalities) and artifact.name in points:
                rows.append((artifact_text(artifact.name, say), say(of), *_point(points[artifact.name])))
    return rows


def _point(point: Point) -> tuple[str, ...]:
    return (
        f"{point.threshold:+.2f}",
        f"{point.sensitivity:.0%}",
        f"{100 * (1 - point.specificity):.0f}",
        f"{point.positives} / {point.negatives}",
    )


def skipped_rows(found: Predictions, say: Say, *, names: bool) -> list[tuple[str, str, str]]:
    """Code, what it means, and the files that are left out for it, by number or, with `names`, by path; or
    how many slices are, of files of which others are used.
    """
    codes: dict[str, list[str]] = {}
    for problem in found.skipped:
        said = problem.detail.partition(": ")[0] if names else str(problem.number)
        codes.setdefault(problem.code, []).append(said)
    rows = []
    for code, own in sorted(codes.items()):
        numbers = ", ".join(own[:SHOWN_FILES]) + (", …" if len(own) > SHOWN_FILES else "")
        rows.append((code, _why(code, say), say("skipped-files", count=len(own), numbers=numbers)))
    rows += [
        (code, _why(code, say), f"{count} {say('skipped-slices')}")
        for code, count in sorted(found.skipped_slices.items())
    ]
    return rows


def _why(code: str, say: Say) -> str:
    """What a code means; a worker that a file has taken over may answer with one that is not ours."""
    return say(SKIPPED + (code if SKIPPED + code in ENGLISH else "other"))


def limits(found: Predictions, say: Say) -> list[str]:
    """What the model does not do."""
    learned = found.model.learned
    names = ", ".join(artifact_text(name, say) for name in learned)
    others = [artifact_text(name, say) for name in NAMES if name not in learned]
    return [
        say("limit.1", artifacts=names, others="".join(f"{name}{say('and-then')}" for name in others)),
        say("limit.2", size=found.model.size),
        say("limit.3"),
        say("limit.4"),
    ]


def series_rows(found: Predictions, say: Say) -> list[list[tuple[str, ...]]]:
    """For each series, and each study of several, its rows: study, series, modality, images, artifact, value,
    decision, images above.
    """
    groups: list[list[tuple[str, ...]]] = []
    for study in found.studies:
        number = str(study.number)
        for one in study.series:
            head: tuple[str, ...] = (number, _numbered(one), one.modality, str(len(one.images)))
            rows = _rows(found, head, one.findings, (one,), say)
            groups.append(rows or [(*head, say("not-judged"), "", "", "")])
        if len(study.series) > 1 and study.findings:
            images = str(sum(len(one.images) for one in study.series))
            whole = (number, say("whole"), "", images)
            groups.append(_rows(found, whole, study.findings, study.series, say))
    return groups


def _numbered(series: Series) -> str:
    """Its number here and, in brackets, at the scanner."""
    return str(series.number) if series.at_scanner is None else f"{series.number} ({series.at_scanner})"


def _rows(
    found: Predictions,
    head: tuple[str, ...],
    findings: Sequence[Finding],
    series: Sequence[Series],
    say: Say,
) -> list[tuple[str, ...]]:
    """One row a finding; what they share stands in the first. A logit does not stand among probabilities."""
    only_probabilities = _calibrated(found)
    return [
        (
            *(head if place == 0 else ("",) * len(head)),
            artifact_text(finding.artifact, say),
            "–" if only_probabilities and finding.probability is None else value_text(finding),
            decision_text(finding, say),
            str(sum(one.positive_images(finding.artifact) for one in series)),
        )
        for place, finding in enumerate(findings)
    ]


def no_step_text(found: Predictions, say: Say) -> str:
    """Why there is no next step."""
    if not found.judged:
        return say("no-images")
    return say("no-next" if found.decides else "no-threshold")


def _calibrated(found: Predictions) -> bool:
    return any(point.slope > 0 for point in found.points.patients.values())


def columns(found: Predictions, say: Say) -> tuple[str, ...]:
    """The head of `series_rows`."""
    value = say("probability" if _calibrated(found) else "logit")
    names = ("study", "series", "modality", "images", "artifact")
    return (*map(say, names), value, say("present"), say("images-above"))


def report_text(found: Predictions, say: Say, *, names: bool = False) -> str:
    """What the terminal shows.

    Args:
        names: show paths of files that are left out.
    """
    lines = [summary_text(found, say)]
    lines += wrapped(open_text(found, say), "")
    lines += wrapped(say("not-a-device"), "")
    lines.append("")
    rows = series_rows(found, say)
    if rows:
        shown = [row for one in rows[:SHOWN_SERIES] for row in one]
        lines += table([columns(found, say), *shown], indent="")
        if len(rows) > SHOWN_SERIES:
            lines.append(say("more-series", count=len(rows) - SHOWN_SERIES))
        lines += wrapped(say("reading"), "  ")
        for study in found.studies[:SHOWN_SERIES]:
            for series in study.series:
                if said := unjudged_text(series, say):
                    place = f"{say('study')} {study.number}, {say('series')} {series.number}"
                    lines += wrapped(f"{place}: {said}", "  ")
        lines.append("")
    lines.append(say("next"))
    steps = next_steps(found.studies)
    for step in steps:
        lines += wrapped(
            f"{artifact_text(step.artifact, say)} ({step.where(say)}): {step.advice(say)} {step.dose(say)}",
            "  ",
        )
        for one in step.remedy.steps("en" if say("artifact") == "artifact" else "zh"):
            lines += wrapped(f"- {one}", "    ")
    if not steps:
        lines += wrapped(no_step_text(found, say), "  ")
    if found.judged:
        lines += ["", say("basis")]
        for name, said in basis_rows(found, say):
            lines += wrapped(f"{name}: {said}", "  ")
        if points := point_rows(found, say):
            head = tuple(map(say, ("artifact", "of", "threshold", "found", "alarms", "numbers")))
            lines += table([head, *points])
            lines += wrapped(say("rule", share=f"{LEAST_FOUND:.0%}".rstrip("%")), "  ")
        lines += wrapped(say("profile" if found.has_profile else "no-profile"), "  ")
    lines += [
        "",
        say("files.said", files=found.files, images=found.images, duplicates=found.duplicates),
    ]
    for code, meaning, said in skipped_rows(found, say, names=names):
        lines += wrapped(f"{say('skipped')}: {code}, {said}: {meaning}", "  ")
    return "\n".join(line.rstrip() for line in lines)


def wrapped(text: str, indent: str) -> list[str]:
    """Lines of at most `WIDTH` columns; a Chinese character takes two, and a line may end after each."""
    lines, line, width = [], indent, len(indent)
    more = indent + "  "
    for word in _words(text.strip()):
        size = columns_of(word)
        if width + size > WIDTH and line.strip():
            lines.append(line)
            line, width, word = more, len(more), word.lstrip()
            size = columns_of(word)
        line, width = line + word, width + size
    return [*lines, line] if line.strip() else lines


def _words(text: str) -> list[str]:
    """Pieces between which a line may end; each begins with its space."""
    pieces: list[str] = []
    for letter in text:
        wide = unicodedata.east_asian_width(letter) in "WF"
        closes = wide and unicodedata.category(letter) in ("Po", "Pe")  # no line begins with it
        if not pieces or (not closes and (letter == " " or wide or columns_of(pieces[-1][-1]) == 2)):
            pieces.append(letter)
        else:
            pieces[-1] += letter
    return pieces


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
