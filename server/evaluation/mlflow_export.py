"""Export a finished run into a local MLflow file store (`fedqc report RUN --mlflow DIR`, extra `mlflow`).

One MLflow run a run folder, in the experiment named after the plan. Parameters are the plan's keys; metrics
the AUROCs by arm, site and artifact, the headline, and loss and AUROC on the public set by round; tags say
what is private. Nothing is sent: the store is a folder, and MLflow's telemetry is switched off before it is
loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.i18n import speaker
from server.evaluation.report import findings
from server.evaluation.report.export import reading_of
from server.evaluation.report.page import settings, write_report
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.evaluation_file import Evaluation
from server.run_folder import CARD, EVALUATION, MODEL, RunFolder

RUN, KEY, CONTENT = "fedqc.run", "fedqc.run_sha256", "fedqc.evaluation_sha256"
SWITCHES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3.7 and later ask for it
}


def load_mlflow() -> Any:
    """MLflow, without its telemetry.

    Raises:
        ConfigError: `missing-extra`, with the command that installs it.
    """
    os.environ |= SWITCHES
    try:
        import mlflow
    except ImportError:
        raise ConfigError(
            "--mlflow needs mlflow-skinny, which is not installed",
            code="missing-extra",
            hint="pip install 'fedqc[mlflow]'; in a checkout: .venv/bin/pip install -e '.[mlflow]'",
        ) from None
    return mlflow


def export_run(folder: RunFolder, store: Path) -> str:
    """Write a run into the store and return the id of the MLflow run.

    Exported again it is the same one. Where its evaluation changed, or the export was interrupted, there is a
    new one, and the old one is among MLflow's deleted runs.

    Raises:
        ConfigError: `missing-extra`; `not-writable`; as `RunFolder.evaluation`.
    """
    mlflow = load_mlflow()
    evaluation = folder.evaluation
    digest = hashlib.sha256((folder.path / EVALUATION).read_bytes()).hexdigest()
    key = hashlib.sha256(evaluation["run"].encode()).hexdigest()
    page = write_report(folder)
    try:
        client = mlflow.MlflowClient(tracking_uri=store.absolute().as_uri())
        experiment = client.get_experiment_by_name(evaluation["plan"])
        number = experiment.experiment_id if experiment else client.create_experiment(evaluation["plan"])
        for run in client.search_runs([number], f"tags.`{KEY}` = '{key}'"):
            if run.info.status == "FINISHED" and run.data.tags.get(CONTENT) == digest:
                _log_files(client, run.info.run_id, folder, page)
                return str(run.info.run_id)
            client.delete_run(run.info.run_id)
        tags = _tags(folder, reading_of(evaluation, "en")) | {KEY: key, CONTENT: digest}
        run_id = client.create_run(number, tags=tags, run_name=evaluation["run"]).info.run_id
        for name, text in _parameters(folder).items():
            client.log_param(run_id, name, text)
        for name, value, step in metrics_of(evaluation):
            client.log_metric(run_id, name, value, step=step)
        _log_files(client, run_id, folder, page)
        client.set_terminated(run_id)
    except (OSError, mlflow.MlflowException) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{store}: cannot be written: {why}", code="not-writable", hint="--mlflow DIR names a folder"
        ) from None
    return str(run_id)


def metrics_of(evaluation: Evaluation) -> Iterator[tuple[str, float, int]]:
    """Name, value and step of each number that could be computed; a step is a round, else 0."""
    for arm, places in evaluation["headline"].items():
        for place, value in (places or {}).items():
            if value is not None:
                yield f"headline/{arm}/{place}", value, 0
    for arm, sites in evaluation["metrics"].items():
        for site, artifacts in sites.items():
            for artifact, row in artifacts.items():
                for name in ("auroc", "low", "high"):
                    if (value := row[name]) is not None:
                        yield f"{name}/{arm}/{site}/{artifact}", value, 0
    for model, points in evaluation["curves"].items():
        for point in points:
            for name in ("loss", "auroc"):
                if (value := point[name]) is not None:  # type: ignore[literal-required]
                    yield f"public/{model}/{name}", value, point["round"]


def _parameters(folder: RunFolder) -> dict[str, str]:
    """The plan's keys, its hash, that of the starting weights, and the seed."""
    manifest = folder.manifest
    return dict(settings(folder.plan, speaker("en", LANGUAGES))) | {
        "plan_sha256": str(manifest["plan_sha256"]),
        "initial_sha256": str(manifest["initial_sha256"] or "not stated"),
    }


def _tags(folder: RunFolder, reading: Reading) -> dict[str, str]:
    """What the run is, and what of it is private: every arm without a guarantee is called not private."""
    banner = findings.privacy_banner(reading)
    return {
        RUN: reading.evaluation["run"],
        "fedqc.version": str(folder.manifest["versions"].get("fedqc", "")),
        "fedqc.status": reading.evaluation["status"],
        "fedqc.privacy": " ".join([banner.title, *banner.lines]),
        **{f"fedqc.privacy.{arm}": reading.privacy_tag(arm) for arm in reading.arms},
    }


def _log_files(client: Any, run_id: str, folder: RunFolder, page: Path) -> None:
    for path in (page, *(folder.path / name for name in (EVALUATION, MODEL, CARD))):
        if path.is_file():  # an evaluation by itself hands no model on
            client.log_artifact(run_id, str(path))
