"""What is installed is what was built: the wheel, in an environment of its own, from another folder than the
checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import ROOT
from tests.helpers.consortium import write_plan

pytestmark = pytest.mark.slow

WHERE = """
import json
from importlib.metadata import packages_distributions
import client, common, server
import client.app, client.agent.tasks, server.app, server.evaluation.report.page
from common.weights import resolve_initial
rooms = {module.__name__: list(module.__path__)[0] for module in (client, common, server)}
owners = {name: sorted(set(packages_distributions()[name])) for name in rooms}
print(json.dumps([rooms, owners, str(resolve_initial("package:small_cnn.safetensors", None))]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in ("pyproject.toml", "README.md", "LICENSE", "server", "client", "common"):
        if (ROOT / path).is_dir():
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / path, folder / "checkout" / path, ignore=without)
        else:
            (folder / "checkout").mkdir(exist_ok=True)
            shutil.copy(ROOT / path, folder / "checkout" / path)
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "checkout"),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    shutil.rmtree(folder / "checkout")
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=300)
    (packages,) = environment.glob("lib/python3*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(environment / "bin" / "python"),
        "install",
        "--no-deps",
        "--quiet",
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    (packages / "libraries.pth").write_text(
        "\n".join(libraries(folder / "libraries")) + "\n", encoding="utf-8"
    )
    return environment


def libraries(links: Path) -> list[str]:
    """Folders with the installed packages of this environment, without fedqc and without what makes it
    editable.
    """
    links.mkdir()
    for found in map(Path, site.getsitepackages()):
        for entry in found.iterdir():
            if "fedqc" not in entry.name and entry.suffix != ".pth" and not (links / entry.name).exists():
                (links / entry.name).symlink_to(entry)
    return [str(links)]


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}


def run(installed: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(installed / "bin" / str(words[0])), *map(str, words[1:])]
    return subprocess.run(
        command, cwd=cwd, env=clean(), capture_output=True, text=True, timeout=300, check=False
    )


def test_the_modules_are_the_wheels_and_nobody_else_claims_their_names(
    installed: Path, tmp_path: Path
) -> None:
    said = run(installed, "python", "-c", WHERE, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    rooms, owners, weights = json.loads(said.stdout.splitlines()[-1])
    for name, place in rooms.items():
        assert Path(place).is_relative_to(installed), f"{name} is {place}"
    assert owners == {name: ["fedqc"] for name in rooms}
    assert Path(weights).is_relative_to(installed)


def test_the_wheel_holds_the_three_rooms_and_no_test(installed: Path) -> None:
    (record,) = installed.glob("lib/python3*/site-packages/fedqc-*.dist-info/RECORD")
    files = [line.split(",")[0] for line in record.read_text(encoding="utf-8").splitlines()]
    assert {name.split("/")[0] for name in files if not name.startswith(("..", "fedqc-"))} == {
        "server",
        "client",
        "common",
    }
    for needed in (
        "server/evaluation/report/page.html.j2",
        "server/evaluation/report/page.css",
        "common/models/small_cnn_phantoms.safetensors",
        "common/models/small_cnn_phantoms.md",
        "common/models/small_cnn_real.safetensors",
        "common/models/small_cnn_real.md",
    ):
        assert needed in files


def test_the_installed_command_makes_data_runs_a_plan_and_reports(installed: Path, tmp_path: Path) -> None:
    said = run(installed, "fedqc", "data", "phantom", "data", "--sites", 3, "--patients", 8, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    write_plan(tmp_path / "plan.yaml", held_out=["hospital-c"], training={"rounds": 1})
    said = run(
        installed,
        "fedqc",
        "simulate",
        "plan.yaml",
        "--data",
        "data",
        "--out",
        "run",
        "--jobs",
        1,
        "--format",
        "json",
        cwd=tmp_path,
    )
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["status"] == "completed"
    said = run(installed, "fedqc", "report", "run", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "run" / "report.html").is_file()
