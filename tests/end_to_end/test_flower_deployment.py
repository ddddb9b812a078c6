"""The same two app objects on a real SuperLink with two SuperNodes: plain HTTP on loopback, one round."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.simulation.phantom_sites import write_consortium
from common.plan import parse_plan
from common.weights import resolve_initial
from tests.helpers.ports import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def _environment(home: Path) -> dict[str, str]:
    home.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def _service(command: list[str], home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=_environment(home),
            cwd=home,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait(10)


def test_flwr_run_completes_one_round_on_two_supernodes(tmp_path):
    data = tmp_path / "data"
    write_consortium(data, sites=2, patients=16, seed=3, say=lambda text: None)
    plan = parse_plan(
        {
            "name": "loopback",
            "arms": ["federated"],
            "image_size": 64,
            "model": {"initial": str(resolve_initial("package:small_cnn.safetensors", None))},
            "split": {"train": 0.6, "test": 0.4},
            "training": {"rounds": 1},
            "public_set": {"patients": 6},
        }
    )
    run = tmp_path / "run"
    app = tmp_path / "fedqc-app"  # what a coordinator submits: the bundle is built from this folder
    shutil.copytree(
        ROOT,
        app,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "data", "runs", "*.egg-info", "__pycache__", ".mypy_cache", ".*_cache"
        ),
    )
    config = tmp_path / "run.toml"
    config.write_text(f"plan = '{plan.canonical_json()}'\nrun-dir = '{run}'\n", encoding="utf-8")
    link_port, home = free_port(), tmp_path / "link"
    _environment(home)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = '
        f'"127.0.0.1:{link_port}"\ninsecure = true\n'
    )
    link = [
        str(BIN / "flower-superlink"),
        "--insecure",
        "--host",
        "127.0.0.1",
        "--port",
        str(link_port),
        "--disable-runtime-dependency-installation",
    ]
    with _service(link, home, tmp_path / "link.log"):
        nodes = []
        for site in sorted(data.iterdir()):
            node = [
                str(BIN / "flower-supernode"),
                "--insecure",
                "--superlink",
                f"127.0.0.1:{link_port}",
                "--port",
                str(free_port()),
            ]
            node += ["--node-config", f'site-config="{site / "site.yaml"}"']
            nodes.append(_service(node, tmp_path / f"home-{site.name}", tmp_path / f"{site.name}.log"))
        with nodes[0], nodes[1]:
            until = time.monotonic() + 120
            while (tmp_path / "link.log").read_text(errors="replace").count("Activated node") < len(nodes):
                assert time.monotonic() < until, "the nodes did not connect"
                time.sleep(0.1)
            submitted = subprocess.run(
                [str(BIN / "flwr"), "run", str(app), "loopback", "--stream", "--run-config", str(config)],
                env=_environment(home),
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
            logs = "\n".join(
                path.read_text(errors="replace")[-3000:] for path in sorted(tmp_path.glob("*.log"))
            )
            assert (run / "evaluation.json").exists(), (
                submitted.stdout[-3000:] + submitted.stderr[-3000:] + logs
            )
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["status"] == "completed"
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [record["answered"] for record in records] == [["hospital-a", "hospital-b"]]
    assert (
        evaluation["metrics"]["federated"]["hospital-a"].keys()
        == evaluation["metrics"]["federated"]["hospital-b"].keys()
    )
