"""The walls between the rooms are checked by lint-imports, and lint-imports is checked here: a planted import makes it fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LINT = Path(sys.executable).with_name("lint-imports")

PLANTED = {
    "server in client": ("client/evaluate.py", "import server.app", "server and client never meet"),
    "client in server": ("server/compare.py", "import client.policy", "server and client never meet"),
    "client in common": ("common/counts.py", "import client.agent", "common imports neither side"),
    "Flower in common": ("common/counts.py", "import flwr", "Flower stays at its doors"),
    "Opacus in common": ("common/losses.py", "import opacus", "Opacus stays in client.dp"),
    "pydicom in client": ("client/cohort.py", "import pydicom", "pydicom stays in the DICOM modules of common.imaging"),
    "torch in the policy": ("client/policy.py", "import torch", "what a hospital's door loads is free of torch"),
    "a layer upwards": ("common/plan.py", "import common.wire", "rooms inside common"),
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
        text.replace("from __future__ import annotations\n", f"from __future__ import annotations\n\n{line}\n", 1), encoding="utf-8"
    )
    try:
        said = lint(checkout)
    finally:
        path.write_text(text, encoding="utf-8")
    assert said.returncode != 0
    broken = [row for row in said.stdout.splitlines() if "BROKEN" in row]
    assert any(contract in row for row in broken), said.stdout


def test_a_new_module_of_common_needs_a_place(checkout: Path) -> None:
    path = checkout / "common" / "novelty.py"
    path.write_text('"""New."""\n', encoding="utf-8")
    try:
        said = lint(checkout)
    finally:
        path.unlink()
    assert said.returncode != 0
    assert "novelty" in said.stdout
