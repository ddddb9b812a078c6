"""Keep which models a hospital scored in which run, and refuse a second look at the same patients.

One file a run in state/evaluations/, written once, before a patient is scored. A run asks one question: its
models, its bins, the data that the run was bound to. Asked again it gets the stored answer; another question
in the same run is refused. For exact scores, which no budget limits, two more rules hold: a model of one run
is not scored in another (but for the public one, which every run may hold, and in runs of one study that
leaves out each site once, where a hospital's own model is the same), and the patients are either those of
every earlier exact evaluation or differ from each in at least `MIN_DIFFERENCE`, so that no difference of two
answers shows few patients.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from client.site.run_data import DataDigests
from common.errors import ConfigError, DataError, RefusedError, RunError
from common.files import write_new
from common.names import EvaluationMode

EVALUATIONS = "evaluations"
MIN_DIFFERENCE = 10
"""Patients in which two sets must differ, unless they are the same."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One question of a run: state/evaluations/*.json."""

    run: str
    mode: EvaluationMode
    question: str  # digest of all that the answer depends on
    models: dict[str, str]  # name -> digest of its weights
    # of exact scores: keyed digest of each scored patient -> of the patient's images and labels
    patients: dict[str, str] = field(default_factory=dict)
    study: str = ""  # hash of the study that the run is a member of


def question_of(
    *, run: str, mode: EvaluationMode, models: Mapping[str, str], query: str, data: DataDigests
) -> str:
    """The digest of a question.

    Args:
        models: name -> digest, in the order of the answer.
        query: digest of the bins and the noise.
        data: what the run was bound to at its first use.
    """
    index = [data.images, sorted(data.labels.items()), sorted(data.split.items())]
    asked = [run, mode, list(models.items()), query, index]
    return hashlib.sha256(json.dumps(asked).encode("utf-8", "surrogatepass")).hexdigest()


def patients_tested(data: DataDigests, key: bytes) -> dict[str, str]:
    """The test patients of a site as keyed digests -> what is scored of each."""
    return {
        hmac.digest(key, f"evaluated:{patient}".encode("utf-8", "surrogatepass"), "sha256").hex()[:32]: labels
        for patient, labels in data.labels.items()
        if data.split[patient] == "test"
    }


def admit_released(state: Path, run: str, models: Mapping[str, str]) -> None:
    """Refuse models under the name of a run that this site scored, unless they are what that run scored.

    A site that took no part in the run knows of its models what the plan says.

    Args:
        run: the run that is said to have released them.
        models: name -> digest.
    Raises:
        RefusedError: `foreign-model`; ConfigError: as `recorded`.
    """
    for known in recorded(state):
        if known.run == run and any(known.models.get(name) != one for name, one in models.items()):
            reason = f"run {run} scored other models at this site"
            raise RefusedError(reason, code="foreign-model", public_reason=reason)


def admit_question(state: Path, asked: Evaluation, *, public: str = "") -> None:
    """Admit a question that may be answered, or refuse it. Changes nothing.

    Args:
        public: digest of the public starting weights, which several runs may have scored; "" if unknown.
    Raises:
        RefusedError: `evaluation-repeated`; a function of what was asked, not of patients.
        DataError: `patients-changed`; never sent anywhere: it tells that few patients changed.
        ConfigError: a record is damaged (code `bad-evaluations`).
    """
    for known in recorded(state):
        if known.run == asked.run and known.question != asked.question:
            raise _repeated("another question was answered in this run: a run is scored once")
        if not known.mode == asked.mode == "disclosed":
            continue
        sisters = known.run == asked.run or (asked.study != "" and known.study == asked.study)
        if not sisters and set(known.models.values()) & set(asked.models.values()) - {public}:
            raise _repeated("a model of this run was scored on the same patients in another run")
        differing = sum(
            known.patients.get(patient) != asked.patients.get(patient)
            for patient in {*known.patients, *asked.patients}
        )
        if 0 < differing < MIN_DIFFERENCE:
            raise DataError(
                f"{differing} test patients differ from those scored in run {known.run}; both answers "
                f"together would show them, so at least {MIN_DIFFERENCE} must differ",
                code="patients-changed",
                hint="restore the data, wait for more patients, or set evaluation: dp in policy.yaml",
            )


def keep_question(state: Path, asked: Evaluation) -> None:
    """Keep an admitted question, durably, before the first patient is scored.

    Raises:
        RefusedError: another process kept another question of this run meanwhile (`evaluation-repeated`).
        RunError: it cannot be written (`not-writable`): nothing of a patient decides that.
    """
    path = _path(state, asked.run)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = write_new(path, json.dumps(asdict(asked)).encode())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})", code="not-writable") from error
    if not written and _read(path).question != asked.question:
        raise _repeated("another question was answered in this run: a run is scored once")


def recorded(state: Path) -> list[Evaluation]:
    """Every question that this site has kept.

    Raises:
        ConfigError: a record is damaged (code `bad-evaluations`).
    """
    return [_read(path) for path in sorted((state / EVALUATIONS).glob("*.json"))]


def _path(state: Path, run: str) -> Path:
    # the run's name comes from outside: no path is made of it
    return (
        state / EVALUATIONS / f"{hashlib.sha256(run.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.json"
    )


def _read(path: Path) -> Evaluation:
    try:
        return Evaluation(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            f"{path}: cannot be read: what was scored before is unknown",
            code="bad-evaluations",
            hint="run as the agent's user; restore the file from the backup",
        ) from None


def _repeated(reason: str) -> RefusedError:
    return RefusedError(reason, code="evaluation-repeated", public_reason=reason)
