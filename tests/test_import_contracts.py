"""The walls between the rooms are checked by lint-imports, and lint-imports is checked here: a planted import
makes it fail.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import ROOT

LINT = Path(sys.executable).with_name("lint-imports")

PLANTED = {
    "server in client": ("client/agent/evaluation.py", "import server.app", "server and client never meet"),
    "client in server": (
        "server/evaluation/compare.py",
        "import client.site.policy",
        "server and client never meet",
    ),
    "client in common": ("common/counts.py", "import client.agent.tasks", "common imports neither side"),
    "upwards in common": ("common/plan.py", "import common.wire", "floors of common"),
    "upwards in client": ("client/labels/spreadsheet.py", "import client.site.policy", "floors of client"),
    "sideways in client": ("client/dicom/mosaic.py", "import client.ipc.protocol", "floors of client"),
    "upwards in server": ("server/aggregation.py", "import server.run_folder", "floors of server"),
    "simulated hospitals in the agent": (
        "client/agent/evaluation.py",
        "import client.simulation.phantom_sites",
        "nothing that runs at a hospital needs the simulated hospitals",
    ),
    "Flower in common": ("common/counts.py", "import flwr", "Flower stays at its doors"),
    "Flower in a run": ("server/run/conduct.py", "import flwr", "Flower stays at its doors"),
    "the pooled baseline in the agent": (
        "client/agent/evaluation.py",
        "import client.pooled",
        "nothing that runs at a hospital needs the simulated hospitals",
    ),
    "Opacus in common": ("common/losses.py", "import opacus", "Opacus stays in client.dp"),
    "pydicom in a cohort": ("client/data/cohort.py", "import pydicom", "pydicom stays in client.dicom"),
    "gRPC in the agent's tasks": ("client/agent/tasks.py", "import grpc", "gRPC stays"),
    "torch in the policy": (
        "client/site/policy.py",
        "import torch",
        "what a hospital's door loads is free of torch",
    ),
    "torch in the socket": (
        "client/ipc/protocol.py",
        "import torch",
        "what a hospital's door loads is free of torch",
    ),
    "a network where images are judged": (
        "client/predict/predict.py",
        "import http.client",
        "what judges patients' images has no network",
    ),
    "a circle": ("client/dicom/codecs.py", "import client.dicom.dicom", "no circle between modules or rooms"),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for room in ("server", "client", "common"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LINT], cwd=checkout, capture_output=True, text=True, timeout=300, check=False)


def test_the_rooms_keep_their_walls(checkout: Path) -> None:
    said = lint(checkout)
    assert said.returncode == 0, said.stdout
    assert "0 broken" in said.stdout


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_import_is_found(name: str, checkout: Path) -> None:
    file, line, contract = PLANTED[name]
    path = checkout / file
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace(
            "from __future__ import annotations\n", f"from __future__ import annotations\n\n{line}\n", 1
        ),
        encoding="utf-8",
    )
    try:
        said = lint(checkout)
    finally:
        path.write_text(text, encoding="utf-8")
    assert said.returncode != 0
    broken = [row for row in said.stdout.splitlines() if "BROKEN" in row]
    assert any(contract in row for row in broken), said.stdout


@pytest.mark.parametrize("room", ["server", "client", "common"])
def test_a_new_module_needs_a_place(room: str, checkout: Path) -> None:
    path = checkout / room / "novelty.py"
    path.write_text('"""New."""\n', encoding="utf-8")
    try:
        said = lint(checkout)
    finally:
        path.unlink()
    assert said.returncode != 0
    assert "novelty" in said.stdout


def test_no_test_module_imports_another() -> None:
    """What several tests use lies in tests/helpers/."""
    pattern = re.compile(r"^\s*(from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)
    importing = [
        path for path in ROOT.glob("tests/**/*.py") if pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert importing == []
