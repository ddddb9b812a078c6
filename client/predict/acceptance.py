"""Test a model on frozen cases of this site before it is used, and again every month (constancy).

The cases are labelled test patients of the site, which train no model. They are frozen at the first test:
which images and with which labels; the site's log names their hash, so that every model answers the same
questions. What is compared is what `fedqc predict` would say: whether a patient is called positive at the
model's operating point of this site. An artifact that a model does not decide is not found by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import load_cohort
from client.dicom.index import PARTS
from client.predict.model import Model, find_model, score
from client.predict.operating_point import OperatingPoints, operating_points
from client.site import model_in_use
from client.site.config import read_site
from common.artifacts import NAMES, columns_of
from common.counts import per_patient
from common.errors import ConfigError, DataError, RefusedError
from common.files import write_as_owner

CASES = "acceptance-cases.json"
FORMAT = 1
LEAST_CASES = 10
MAX_CASES, IMAGES_OF_A_CASE = 300, 20
MARGIN = 0.05
"""How much lower the sensitivity of an accepted model may be, and how many more alarms a negative raises."""
MARGIN_OF_ONE, LEAST_OF_ONE = 0.2, 5
"""The same for one artifact that at least so many cases have."""
DRIFT = 0.01
"""A constant model gives each case its old score, up to the last digits of another processor (logits)."""
MONTH_DAYS = 31


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Frozen cases at one size: n slices of P patients."""

    sha256: str
    names: tuple[str, ...]  # pseudonym of each patient
    images: np.ndarray  # int16 (n, S, S)
    modality: np.ndarray  # (n,)
    labels: np.ndarray  # (n, A), as they were frozen
    patients: np.ndarray  # (n,), positions in `names`
    missing: int  # cases that are gone: removed, changed, or opted out


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says of the cases: scores and calls, (P, A); nan and False where an artifact was not
    assessed.
    """

    scores: np.ndarray
    calls: np.ndarray
    truth: np.ndarray  # 1, 0, nan

    def figures(self) -> dict[str, dict[str, int]]:
        """Of each artifact, and of all: cases with and without it, those found, false alarms."""
        found = {}
        for name in (*NAMES, "all"):
            own = slice(None) if name == "all" else NAMES.index(name)
            truth, calls = self.truth[:, own], self.calls[:, own]
            found[name] = {
                "with": int((truth == 1).sum()),
                "without": int((truth == 0).sum()),
                "found": int(((truth == 1) & calls).sum()),
                "alarms": int(((truth == 0) & calls).sum()),
            }
        return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate beside the model in use, on the same cases."""

    candidate: dict[str, dict[str, int]]  # `Answers.figures`
    present: dict[str, dict[str, int]]
    agreement: float  # share of assessed (case, artifact) that both call alike
    only_candidate_right: int
    only_present_right: int
    better_cases: int  # cases of which the candidate calls more artifacts rightly
    worse_cases: int

    @property
    def p(self) -> float:
        """McNemar's exact test, two-sided, of whether the models are right about as many cases.

        A case counts once, whichever number of its artifacts differs: those of one patient are no
        independent pairs. With one artifact it is McNemar's test of the calls.

        Reference: McNemar, Psychometrika 12:153, 1947; of matched cases with several answers each, the sign
        test of their differences.
        """
        from scipy.stats import binomtest  # needed only here

        differing = self.better_cases + self.worse_cases
        return float(binomtest(self.better_cases, differing).pvalue) if differing else 1.0

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the candidate is worse; () where it is not."""
        found = []
        for name in ("all", *NAMES):
            new, old = self.candidate[name], self.present[name]
            margin, least = (MARGIN, 1) if name == "all" else (MARGIN_OF_ONE, LEAST_OF_ONE)
            if new["with"] >= least and rate(new, "found") < rate(old, "found") - margin:
                found.append(f"{name}: finds {new['found']} of {new['with']}, not {old['found']}")
            if new["without"] >= least and rate(new, "alarms") > rate(old, "alarms") + margin:
                found.append(
                    f"{name}: {new['alarms']} alarms at {new['without']} without it, not {old['alarms']}"
                )
        if not self.candidate["all"]["found"]:
            found.append("it finds nothing")
        return tuple(found)

    def public(self) -> dict[str, Any]:
        """For the log and for programs."""
        return {
            "model": self.candidate,
            "in_use": self.present,
            "agreement": round(self.agreement, 4),
            "only_model_right": self.only_candidate_right,
            "only_in_use_right": self.only_present_right,
            "better_cases": self.better_cases,
            "worse_cases": self.worse_cases,
            "p": round(self.p, 6),
            "worse": list(self.reasons),
        }


def rate(figures: Mapping[str, int], what: str) -> float:
    """Share found of those with an artifact, or share of alarms of those without; 0 of none."""
    return figures[what] / max(1, figures["with" if what == "found" else "without"])


def freeze_cases(site: Path, by: str, *, size: int) -> None:
    """Write which labelled test patients of a site are its cases, with which labels, and note who froze them.

    Raises:
        DataError: `too-few-cases`, fewer than `LEAST_CASES` labelled test patients, or none with an artifact
            or none without; or as `client.data.cohort.load_cohort`.
    """
    config, folder = read_site(site)
    cohort = load_cohort(site, size=size, quarantine="ignore", labels=NAMES)
    chosen = (cohort.part == PARTS.index("test")) & ~np.isnan(cohort.labels).all(axis=1)
    of_patient: dict[str, list[int]] = {}
    for row in np.flatnonzero(chosen).tolist():
        of_patient.setdefault(cohort.records[row].patient, []).append(row)
    known = cohort.labels[chosen]
    if len(of_patient) < LEAST_CASES or not (known == 1).any() or not (known == 0).any():
        raise DataError(
            f"{site}: {len(of_patient)} labelled test patients; an acceptance test needs {LEAST_CASES}, with "
            "and without artifacts",
            code="too-few-cases",
            hint="label some once: fedqc data labels SITE --sheets 2 (docs/labels.md)",
        )
    cases = {}
    for patient in sorted(of_patient)[:MAX_CASES]:
        rows = of_patient[patient]
        spread = np.unique(
            np.linspace(0, len(rows) - 1, min(len(rows), IMAGES_OF_A_CASE)).round().astype(int)
        )
        cases[patient] = [
            {
                "image": _identity(cohort.records[row]),
                "labels": [None if np.isnan(one) else int(one) for one in cohort.labels[row]],
            }
            for row in (rows[place] for place in spread)
        ]
    text = json.dumps(
        {
            "format": FORMAT,
            "artifacts": NAMES,
            "by": by,
            "at": datetime.now().astimezone().isoformat(timespec="seconds"),
            "cases": cases,
        },
        indent=0,
    )
    write_as_owner(folder / config.state / CASES, text.encode("ascii"))


def read_cases(site: Path, *, size: int) -> Cases:
    """The frozen cases, with their images at a size.

    Raises:
        DataError: `no-cases`, none were frozen; `cases-changed`, they are not those of the last test in the
            log; `too-few-cases`, too few of them are left.
    """
    config, folder = read_site(site)
    state = folder / config.state
    try:
        data = (state / CASES).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{state / CASES}: no cases are frozen", code="no-cases", hint="fedqc site use MODEL freezes them"
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    tested = [entry for entry in model_in_use.entries(state) if entry["cases"]]
    if tested and tested[-1]["cases"] != sha256:
        raise DataError(
            f"{state / CASES}: not the cases of the test of {tested[-1]['at']}",
            code="cases-changed",
            hint="restore the file, or fedqc site use MODEL --new-cases",
        )
    frozen = json.loads(data)
    own = [frozen["artifacts"].index(name) if name in frozen["artifacts"] else -1 for name in NAMES]
    cohort = load_cohort(site, size=size, quarantine="ignore", labels=NAMES)
    at = {
        _identity(record): row
        for row, record in enumerate(cohort.records)
        if record.patient not in cohort.opted_out
    }
    rows: list[int] = []
    labels: list[list[float]] = []
    patients: list[int] = []
    names: list[str] = []
    for patient, images in frozen["cases"].items():
        here = [one for one in images if one["image"] in at]
        if len(here) < len(images):
            continue  # part of a case would have another score
        for one in here:
            rows.append(at[one["image"]])
            values = [one["labels"][place] if place >= 0 else None for place in own]
            labels.append([np.nan if value is None else float(value) for value in values])
            patients.append(len(names))
        names.append(patient)
    if len(names) < LEAST_CASES:
        raise DataError(
            f"{state / CASES}: {len(names)} of {len(frozen['cases'])} frozen cases are left",
            code="too-few-cases",
            hint="restore their images, or fedqc site use MODEL --new-cases",
        )
    return Cases(
        sha256=sha256,
        names=tuple(names),
        images=cohort.images[rows],
        modality=cohort.modality[rows],
        labels=np.array(labels, np.float32),
        patients=np.array(patients, np.int64),
        missing=len(frozen["cases"]) - len(names),
    )


def answers(model: Model, points: OperatingPoints, cases: Cases) -> Answers:
    """What a model calls of each case, at its points."""
    own = score(model, cases.images, cases.modality, np.arange(len(cases.images)))
    logits = np.zeros((len(own), len(NAMES)), own.dtype)
    logits[:, columns_of(model.labels)] = own
    scores, truth = per_patient(logits, cases.labels, cases.patients)
    scores[:, [name not in model.learned for name in NAMES]] = np.nan
    calls = np.zeros(scores.shape, bool)
    for place, name in enumerate(NAMES):
        point = points.patients.get(name)
        if point is not None and point.decides:
            calls[:, place] = scores[:, place] >= point.threshold
    return Answers(scores=scores, calls=calls & ~np.isnan(truth), truth=truth)


def compare(candidate: Answers, present: Answers) -> Comparison:
    """Two models on the same cases."""
    known = ~np.isnan(candidate.truth)
    truth = candidate.truth == 1
    right, other = candidate.calls == truth, present.calls == truth
    gained = ((right & known).sum(axis=1) - (other & known).sum(axis=1)).astype(int)
    return Comparison(
        candidate=candidate.figures(),
        present=present.figures(),
        agreement=float((candidate.calls == present.calls)[known].mean()),
        only_candidate_right=int((right & ~other)[known].sum()),
        only_present_right=int((other & ~right)[known].sum()),
        better_cases=int((gained > 0).sum()),
        worse_cases=int((gained < 0).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A candidate with the result of its test."""

    model: Model
    data: bytes  # of its file
    present: Model  # what `fedqc predict` uses now
    cases: Cases
    answers: Answers
    comparison: Comparison


def examine(
    wanted: str,
    site: Path,
    by: str,
    *,
    new_cases: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Tested:
    """Compare a model with the one in use; without one, with fedqc's public start, which is used then.

    Args:
        wanted: `latest`: the last one that the site received; else as `--model` of `fedqc predict`.
        by: who asks for the test.
        new_cases: freeze the present labelled test patients in place of the former cases.
    Raises:
        ConfigError: as `find_model`.
        DataError: as `freeze_cases` and `read_cases`.
    """
    config, folder = read_site(site)
    state = folder / config.state
    path = _file_of(wanted, state)
    model, data = find_model(str(path), None), path.read_bytes()
    present = find_model(None, state)
    if new_cases or not (state / CASES).is_file():
        freeze_cases(site, by, size=model.size)
        if new_cases and model_in_use.entries(state):
            sha256 = hashlib.sha256((state / CASES).read_bytes()).hexdigest()
            model_in_use.note(state, "check", by=by, model="", cases=sha256, figures={"new_cases": True})
    cases = read_cases(site, size=model.size)
    same = cases if present.size == model.size else read_cases(site, size=present.size)
    points = {
        one.sha256: operating_points(one, site=site, cache=state / "operating-points", say=say)
        for one in (model, present)
    }
    own = answers(model, points[model.sha256], cases)
    return Tested(
        model=model,
        data=data,
        present=present,
        cases=cases,
        answers=own,
        comparison=compare(own, answers(present, points[present.sha256], same)),
    )


def put_to_use(tested: Tested, site: Path, by: str) -> dict[str, Any]:
    """Use a tested model from now on, or refuse it; either is noted in the site's log.

    Args:
        by: the approver, who answers for it.
    Returns:
        the entry of the log.
    Raises:
        RefusedError: `worse-model`.
    """
    config, folder = read_site(site)
    state = folder / config.state
    about: dict[str, Any] = {
        "by": by,
        "model": tested.model.sha256,
        "cases": tested.cases.sha256,
        "figures": tested.comparison.public(),
    }
    if reasons := tested.comparison.reasons:
        model_in_use.note(state, "refuse", **about)
        raise RefusedError(
            f"worse than the model in use: {'; '.join(reasons)}",
            code="worse-model",
            hint="nothing was changed; fedqc predict --model FILE applies it without putting it to use",
        )
    now = model_in_use.in_use(state)
    model_in_use.keep(state, tested.data)
    former = "" if now is None else str(now["model"])
    return model_in_use.note(state, "use", former=former, scores=_kept(tested.answers, tested.cases), **about)


@dataclass(frozen=True, kw_only=True)
class Constancy:
    """The model in use on the frozen cases, beside its answers when it was accepted."""

    model: str
    accepted_at: str
    cases: int
    missing: int
    largest_change: float  # of a score, logit
    changed_calls: int

    @property
    def is_constant(self) -> bool:
        """Whether every case has its score and call."""
        return self.largest_change <= DRIFT and self.changed_calls == 0


def check_constancy(site: Path, by: str, say: Callable[[str], None] = lambda text: None) -> Constancy:
    """Repeat the acceptance test of the model in use, and note the result in the site's log.

    Raises:
        ConfigError: `no-model`, none was put to use here.
        DataError: as `read_cases`; `models-damaged`.
    """
    config, folder = read_site(site)
    state = folder / config.state
    now = model_in_use.in_use(state)
    if now is None:
        raise ConfigError(
            "no model was put to use at this site", code="no-model", hint="fedqc site use MODEL tests one"
        )
    accepted = next(
        entry
        for entry in reversed(model_in_use.entries(state))
        if entry["action"] == "use" and entry["model"] == now["model"]
    )
    model = find_model(None, state)
    cases = read_cases(site, size=model.size)
    own = answers(model, operating_points(model, site=site, cache=state / "operating-points", say=say), cases)
    kept, differences, changed = accepted["scores"], [0.0], 0
    for name, scores, calls in zip(cases.names, own.scores, own.calls, strict=True):
        for artifact, value, call in zip(NAMES, scores, calls, strict=True):
            before = kept.get(name, {}).get(artifact)
            if before is not None and not np.isnan(value):
                differences.append(abs(float(value) - before[0]))
                changed += bool(call) != bool(before[1])
    found = Constancy(
        model=model.sha256,
        accepted_at=accepted["at"],
        cases=len(cases.names),
        missing=cases.missing,
        largest_change=max(differences),
        changed_calls=changed,
    )
    model_in_use.note(
        state,
        "check",
        by=by,
        model=model.sha256,
        cases=cases.sha256,
        figures={
            "constant": found.is_constant,
            "largest_change": round(found.largest_change, 6),
            "changed_calls": found.changed_calls,
            "missing": found.missing,
        }
        | own.figures(),
    )
    return found


def check_is_due(state: Path) -> str:
    """When the model in use was last tested or checked, if that is more than a month ago; else ""."""
    now = model_in_use.in_use(state)
    if now is None:
        return ""
    last = [entry["at"] for entry in model_in_use.entries(state) if entry["model"] == now["model"]][-1]
    age = datetime.now().astimezone() - datetime.fromisoformat(last)
    return str(last)[:10] if age.days >= MONTH_DAYS else ""


def _kept(own: Answers, cases: Cases) -> dict[str, dict[str, list[float]]]:
    """Case -> artifact -> score and call, for `check_constancy`."""
    return {
        case: {
            name: [round(float(score_), 4), int(call)]
            for name, score_, call in zip(NAMES, scores, calls, strict=True)
            if not np.isnan(score_)
        }
        for case, scores, calls in zip(cases.names, own.scores, own.calls, strict=True)
    }


def _identity(record: Any) -> str:
    """An image by its bytes, wherever its file lies."""
    return f"{record.content or record.file}:{record.frame}"


def _file_of(wanted: str, state: Path) -> Path:
    """The file of a model that is to be tested."""
    from common.weights import resolve_initial

    if wanted == "latest":
        path = state / "models" / "latest.safetensors"
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file", code="no-model", hint="a site receives a model at the end of a run"
            )
        return path.resolve()
    if wanted.startswith("package:"):
        return resolve_initial(wanted, None)
    path = Path(wanted)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: no such model file", code="no-model", hint="latest, RUN or FILE")
    return path
