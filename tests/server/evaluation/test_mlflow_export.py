"""A run exported to MLflow reads back as it was; nothing is sent; the same run is there once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from server.evaluation.mlflow_export import SWITCHES, export_run, load_mlflow
from server.evaluation.report.page import settings
from server.run_folder import CARD, EVALUATION, MODEL, RunFolder, write_json
from tests.helpers.report_page import MANIFEST, PLAN, evaluation_of

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
WATCH = """
import atexit, json, socket, sys, time
asked = []
def refused(*where, **more):
    asked.append(str(where))
    raise OSError("no network here")
socket.getaddrinfo = socket.socket.connect = socket.create_connection = refused
atexit.register(lambda: print(json.dumps(asked)))
"""
WITHOUT_SWITCHES = """
from server.evaluation import mlflow_export
del mlflow_export.SWITCHES["MLFLOW_DISABLE_TELEMETRY"], mlflow_export.SWITCHES["DO_NOT_TRACK"]
"""
EXPORT = """
from pathlib import Path
from server.evaluation.mlflow_export import export_run
from server.run_folder import RunFolder
export_run(RunFolder.open(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return evaluation_of()


@pytest.fixture
def run(tmp_path: Path, whole: dict[str, Any]) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run", PLAN, MANIFEST)
    write_json(folder.path / EVALUATION, whole)
    (folder.path / MODEL).write_bytes(b"weights")
    (folder.path / CARD).write_text("# Model", encoding="utf-8")
    return folder


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    return load_mlflow().MlflowClient(tracking_uri=(tmp_path / "store").as_uri())


def runs(client: Any) -> list[Any]:
    return client.search_runs([client.get_experiment_by_name(PLAN.name).experiment_id])


@needs_mlflow
def test_what_was_exported_reads_back(
    tmp_path: Path, run: RunFolder, whole: dict[str, Any], client: Any
) -> None:
    found = client.get_run(export_run(run, tmp_path / "store"))
    assert found.info.status == "FINISHED"
    assert found.data.params["plan_sha256"] == MANIFEST["plan_sha256"]
    assert found.data.params["arms"] == ", ".join(PLAN.arms)
    assert found.data.params["training.rounds"] == str(PLAN.training.rounds)
    assert {name for name, _ in settings(PLAN, lambda key: key)} <= set(found.data.params)
    values = {
        f"auroc/{arm}/{site}/{artifact}": row["auroc"]
        for arm, sites in whole["metrics"].items()
        for site, rows in sites.items()
        for artifact, row in rows.items()
    }
    stored = {name: value for name, value in found.data.metrics.items() if name.startswith("auroc/")}
    assert stored == {name: value for name, value in values.items() if value is not None}
    assert None in values.values(), "what could not be computed is no metric"
    history = client.get_metric_history(found.info.run_id, "public/federated/loss")
    assert [(point.step, point.value) for point in history] == [
        (point["round"], point["loss"]) for point in whole["curves"]["federated"]
    ]
    tags = found.data.tags
    assert (tags["fedqc.run"], tags["fedqc.version"]) == (MANIFEST["run"], "0.1.0")
    assert tags["fedqc.privacy.federated"] == "not private"
    assert "NOT PRIVATE" in tags["fedqc.privacy"]
    assert tags["fedqc.privacy.federated_dp"].startswith("ε")
    folder = Path(client.download_artifacts(found.info.run_id, "", str(tmp_path)))
    for name in ("report.html", EVALUATION, MODEL, CARD):
        assert (folder / name).read_bytes() == (run.path / name).read_bytes()


@needs_mlflow
def test_the_same_run_is_there_once(
    tmp_path: Path, run: RunFolder, whole: dict[str, Any], client: Any
) -> None:
    first = export_run(run, tmp_path / "store")
    assert export_run(run, tmp_path / "store") == first
    assert [one.info.run_id for one in runs(client)] == [first]
    assert len(client.get_metric_history(first, "headline/federated/home")) == 1
    write_json(run.path / EVALUATION, whole | {"seconds": 5.0})
    second = export_run(run, tmp_path / "store")
    assert [one.info.run_id for one in runs(client)] == [second] != [first]


@needs_mlflow
def test_an_interrupted_export_is_made_again(
    tmp_path: Path, run: RunFolder, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("server.evaluation.mlflow_export._log_files", stop)
        with pytest.raises(KeyboardInterrupt):
            export_run(run, tmp_path / "store")
    assert [one.info.status for one in runs(client)] == ["RUNNING"]
    whole = export_run(run, tmp_path / "store")
    assert [(one.info.run_id, one.info.status) for one in runs(client)] == [(whole, "FINISHED")]


def connections(program: str, *words: Path) -> list[str]:
    """Where a process tried to connect, outside a test and without a switch of its caller."""
    kept = {"PATH", "HOME", "LANG", "OMP_NUM_THREADS"}
    found = subprocess.run(
        [sys.executable, "-c", WATCH + program, *map(str, words)],
        env={name: value for name, value in os.environ.items() if name in kept},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


@needs_mlflow
def test_nothing_is_sent(tmp_path: Path, run: RunFolder) -> None:
    assert connections(EXPORT, run.path, tmp_path / "store") == []
    assert (tmp_path / "store").is_dir()
    control = connections(WITHOUT_SWITCHES + EXPORT + "time.sleep(5)", run.path, tmp_path / "control")
    assert control, "MLflow by itself reports what it is used for"


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError) as caught:
        load_mlflow()
    assert caught.value.code == "missing-extra"
    assert "\n" not in caught.value.message
    assert "fedqc[mlflow]" in str(caught.value.hint)


def test_the_store_of_a_file_is_refused(tmp_path: Path, run: RunFolder) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        export_run(run, tmp_path / "store")
    assert caught.value.code == "not-writable"
