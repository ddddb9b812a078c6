"""The run folder: read and write plan, manifest, rounds, checkpoints, models and evaluation.

    runs/<run>/  plan.yaml  manifest.json  evaluation.json  model.safetensors  model_card.md  report.html
                 [tuning.json]  [simulation.json]  [cohorts.json]
                 answers/evaluation/<site>.answer
                 [arms/<arm>[/<site>]/]  rounds.jsonl  checkpoints/round-0007.safetensors  model.safetensors
                                         answers/round-0007/<site>.answer

A plan with several arms keeps rounds, checkpoints and model of each under `arms/`; a single-arm run has no
`arms/`. Every file is written to a temporary file, flushed, and renamed: a reader sees the old one or the
new one. A strategy that carries state between rounds stores it as checkpoints/state-0007.safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from common.arms import clips
from common.cohort_table import CohortTable, checked_tables
from common.errors import ConfigError
from common.files import write_bytes
from common.model_file import load_model, save_model
from common.plan import RunPlan, read_plan
from common.strict import dump_yaml, hidden_text
from common.weights import Manifest
from server.evaluation_file import Evaluation, checked
from server.run_records import checked_manifest, checked_round, damaged

PLAN, MANIFEST, EVALUATION, MODEL, CARD, REPORT, SIMULATION = (
    "plan.yaml",
    "manifest.json",
    "evaluation.json",
    "model.safetensors",
    "model_card.md",
    "report.html",
    "simulation.json",
)


def write_json(path: Path, values: object) -> None:
    """JSON with null for what is not a number."""
    write_bytes(
        path, (json.dumps(without_nan(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def without_nan(values: object) -> Any:
    """The same tree with not-a-number as None and NumPy scalars and arrays as Python's own."""
    if isinstance(values, Mapping):
        return {str(key): without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_nan(value) for value in values]
    if isinstance(values, np.ndarray):
        return without_nan(values.tolist())
    if isinstance(values, np.generic):
        return without_nan(values.item())
    if isinstance(values, float) and not np.isfinite(values):
        return None
    return values


COHORTS = "cohorts.json"
"""Table 1 and flow of the sites of a simulation that are no hospitals, by name."""

TUNING = "tuning.json"
"""How the settings of the private arms were chosen, where the plan left them to `auto`."""


def tuning_digest(tuning: Mapping[str, Any]) -> str:
    """SHA-256 of everything that `auto` tried, whose first digits stand in `privacy.origin` of the plan."""
    return hashlib.sha256(json.dumps(tuning, sort_keys=True).encode()).hexdigest()


def plan_text(plan: RunPlan) -> str:
    """A plan as YAML, all its keys."""
    return dump_yaml(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class RoundMean:
    """How the models after the rounds of an arm are combined into its model. Post-processing: it costs no
    privacy.
    """

    last: int = 1  # the mean of the last so many
    ema: float = 0.0  # or, above 0, of all: each round counts this much of the next one

    @property
    def is_mean(self) -> bool:
        """Whether the model is another than the last of its rounds."""
        return self.last > 1 or self.ema > 0

    def rounds(self, last_round: int) -> range:
        """The rounds that take part, as far as there are so many, oldest first."""
        return range(1 if self.ema else max(1, last_round - self.last + 1), last_round + 1)

    def of(self, models: Iterable[np.ndarray]) -> np.ndarray:
        """The mean of float32 (parameters,) models, oldest first; of one it is that model itself."""
        keeps = self.ema or 1.0
        total, weight, count = np.zeros(1), 0.0, 0
        for model in models:
            total, weight, count = keeps * total + model, keeps * weight + 1.0, count + 1
        return model if count == 1 else (total / weight).astype(np.float32)

    def words(self, last_round: int) -> str:
        """What the model is made of, up to a round."""
        if self.ema:
            return f"the exponential mean ({self.ema:g}) of the rounds up to {last_round}"
        if self.last > 1:
            return f"the mean of {self.last} rounds up to {last_round}"
        return f"round {last_round}"


ONE_ROUND = RoundMean()


def mean_of(plan: RunPlan, arm: str) -> RoundMean:
    """How a plan combines the rounds of an arm."""
    return RoundMean(last=plan.privacy.average_rounds) if clips(arm) else RoundMean(ema=plan.training.ema)


@dataclass(frozen=True, kw_only=True)
class ArmFolder:
    """Where one arm keeps its rounds, checkpoints and model."""

    path: Path

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    def checkpoint_path(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_number:04d}.safetensors"

    def save_checkpoint(self, round_number: int, flat: np.ndarray, manifest: Manifest) -> None:
        save_model(self.checkpoint_path(round_number), flat, manifest, {"round": str(round_number)})

    def model_of(
        self,
        last_round: int,
        manifest: Manifest,
        mean: RoundMean = ONE_ROUND,
        *,
        newest: np.ndarray | None = None,
    ) -> np.ndarray:
        """The mean of the models up to `last_round`, float32 (parameters,).

        Args:
            newest: the model of the last round, where it has no checkpoint yet.
        """
        return mean.of(
            newest
            if newest is not None and number == last_round
            else load_model(self.checkpoint_path(number), manifest)
            for number in mean.rounds(last_round)
        )

    def save_state(self, round_number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Store a strategy's state after a round; nothing where it has none. To be called before
        `save_checkpoint`, whose file says that the round is complete.
        """
        if arrays:
            contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
            write_bytes(self._state_path(round_number), safetensors.numpy.save(contiguous))

    def load_state(self, round_number: int) -> dict[str, np.ndarray]:
        """What `save_state` stored after a round; empty where it stored nothing.

        Raises:
            ConfigError: the file is damaged (code `wrong-model`).
        """
        path = self._state_path(round_number)
        try:
            return safetensors.numpy.load_file(path) if path.is_file() else {}
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{path}: not a state of a strategy ({error})", code="wrong-model") from None

    def _state_path(self, round_number: int) -> Path:
        return self.path / "checkpoints" / f"state-{round_number:04d}.safetensors"

    def keep_answer(self, round_number: int, site: str, envelope: bytes) -> None:
        """Store a site's answer to a round as it was signed, for `fedqc verify`."""
        write_bytes(self._answers(round_number) / f"{site}.answer", envelope)

    def kept_answers(self, round_number: int) -> dict[str, bytes]:
        """Site -> its answer to a round, as it was signed."""
        return {path.stem: path.read_bytes() for path in sorted(self._answers(round_number).glob("*.answer"))}

    def _answers(self, round_number: int) -> Path:
        return self.path / "answers" / f"round-{round_number:04d}"

    def last_round(self) -> int:
        """The newest round with a checkpoint, 0 where there is none."""
        return max(
            (int(path.stem.rpartition("-")[2]) for path in self.path.glob("checkpoints/round-*.safetensors")),
            default=0,
        )

    def append_round(self, record: Mapping[str, object]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rounds(self) -> list[dict[str, Any]]:
        """Complete records, oldest first; a line torn by a crash is left out.

        Raises:
            ConfigError: a line is no record of a round (code `damaged-run`).
        """
        path = self.path / "rounds.jsonl"
        records = []
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            records.append(checked_round(values, f"{path}: line {number}"))
        return records

    def forget_rounds_after(self, last: int) -> None:
        """Drop records and answers of rounds that have no checkpoint; they are about to be repeated."""
        for path in self.path.glob("answers/round-*"):
            if int(path.name.rpartition("-")[2]) > last:
                shutil.rmtree(path)
        kept = [record for record in self.rounds() if record["round"] <= last]
        if (self.path / "rounds.jsonl").exists():
            write_bytes(
                self.path / "rounds.jsonl",
                "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept).encode(),
            )


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    path: Path
    plan: RunPlan

    @staticmethod
    def create(
        path: Path,
        plan: RunPlan,
        manifest: Mapping[str, object],
        simulation: Mapping[str, str] | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Make a run folder that appears whole or not at all.

        Args:
            tuning: how the plan's settings were chosen.
        Raises:
            ConfigError: something is there already (code `run-exists`), or its parent cannot be written.
        """
        path = path.absolute()
        refuse_existing(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be created ({error.strerror})", code="not-writable") from None
        write_bytes(
            staging / PLAN,
            plan_text(plan).encode(),
        )
        write_json(staging / MANIFEST, manifest)
        if simulation:
            write_json(staging / SIMULATION, simulation)
        if tuning:
            write_json(staging / TUNING, tuning)
        os.chmod(staging, 0o755)
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
        return RunFolder(path=path, plan=plan)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            ConfigError: `path` is no run folder (code `no-such-run`).
        """
        path = path.absolute()
        if not (path / PLAN).is_file() or not (path / MANIFEST).is_file():
            raise ConfigError(
                f"{path}: not a run folder",
                code="no-such-run",
                hint="name a folder that `fedqc simulate --out` made",
            )
        return RunFolder(path=path, plan=read_plan(path / PLAN))

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json.

        Raises:
            ConfigError: it is damaged (code `damaged-run`).
        """
        path = self.path / MANIFEST
        return checked_manifest(_json_of(path), str(path))

    @property
    def simulation(self) -> dict[str, str]:
        """Where a simulation found its data; empty for a run on real nodes. Local, not for sharing.

        Raises:
            ConfigError: the file is damaged (code `damaged-run`).
        """
        path = self.path / SIMULATION
        found = _json_of(path) if path.is_file() else {}
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise damaged(f"{path}: must be words under names")
        return found

    @property
    def tuning(self) -> dict[str, Any] | None:
        """How `auto` chose the plan's settings; None where the plan stated them, and in a run of an earlier
        version.

        Raises:
            ConfigError: the file is damaged (code `bad-tuning`).
        """
        path = self.path / TUNING
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise bad_tuning(f"{path}: not JSON, or no mapping")
        if hidden := hidden_text(found):
            raise bad_tuning(f"{path}: {hidden}")
        return found

    @property
    def cohorts(self) -> dict[str, CohortTable]:
        """Site -> its Table 1 and flow; empty for a run on real nodes, and for a run of an earlier version.

        Raises:
            ConfigError: the file is damaged (code `damaged-run`).
        """
        path = self.path / COHORTS
        return checked_tables(_json_of(path), str(path)) if path.is_file() else {}

    def update_manifest(self, **values: object) -> None:
        write_json(self.path / MANIFEST, self.manifest | values)

    def arm(self, arm: str, site: str | None = None) -> ArmFolder:
        if self.plan.arms == (arm,) and site is None:
            return ArmFolder(path=self.path)
        folder = self.path / "arms" / arm
        return ArmFolder(path=folder / site if site else folder)

    def keep_scores(self, site: str, envelope: bytes) -> None:
        """Store a site's scores as it signed them, for `fedqc verify`."""
        write_bytes(self.path / "answers" / "evaluation" / f"{site}.answer", envelope)

    def kept_scores(self) -> dict[str, bytes]:
        """Site -> its scores, as it signed them."""
        paths = sorted((self.path / "answers" / "evaluation").glob("*.answer"))
        return {path.stem: path.read_bytes() for path in paths}

    @property
    def evaluation(self) -> Evaluation:
        """The content of evaluation.json.

        Raises:
            ConfigError: the run has none yet (code `not-finished`), or as
                `server.evaluation_file.checked`.
        """
        path = self.path / EVALUATION
        if not path.is_file():
            raise ConfigError(
                f"{self.path}: the run has no evaluation yet",
                code="not-finished",
                hint="fedqc run resume finishes it",
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not JSON ({error})",
                code="wrong-evaluation",
                hint="restore the file as fedqc wrote it",
            ) from None
        return checked(found, str(path))


def _json_of(path: Path) -> Any:
    """The content of a JSON file of a run folder; raises ConfigError (code `damaged-run`)."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise damaged(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path}: not JSON ({str(error)[:100]})") from None


@contextmanager
def intact(*runs: Path) -> Iterator[None]:
    """Whoever computes with what finished runs noted: values that contradict one another are damage.

    Raises:
        ConfigError: code `damaged-run`, for an error of Python or NumPy over such values.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        names = ", ".join(str(run) for run in runs)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise damaged(f"{names}: its files contradict one another ({what})") from error


def bad_tuning(what: str) -> ConfigError:
    hint = "restore the file as fedqc wrote it; without it the report says nothing of the choice"
    return ConfigError(what, code="bad-tuning", hint=hint)


def refuse_existing(path: Path) -> None:
    """Raises ConfigError (code `run-exists`) unless `path` is free or an empty folder."""
    if (path / PLAN).exists():
        raise ConfigError(
            f"{path}: already holds a run",
            code="run-exists",
            hint=f"fedqc run resume {path}, or choose another --out",
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path}: exists and is not an empty folder", code="run-exists", hint="choose another --out"
        )
