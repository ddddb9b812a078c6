"""The bundle that every node pins: of an installation there is one, byte for byte."""

from __future__ import annotations

import compileall
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from common.cli import SILENT
from common.errors import ConfigError, InternalError
from server.federation import flower_app
from server.federation.flower_app import bundle_files, find_program, is_current, write_bundle
from tests.helpers.command_line import ROOT


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("federation")
    return folder, write_bundle(folder)


def test_the_same_installation_makes_the_same_bundle(written: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = written
    assert write_bundle(tmp_path) == digest
    assert (folder / "bundle.sha256").read_text() == f"{digest}\n"
    assert is_current(folder)


def test_the_hash_is_that_of_the_file_flower_makes(written: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = written
    environment = os.environ | SILENT | {"FLWR_HOME": str(tmp_path)}
    command = [Path(sys.executable).with_name("flwr"), "build", "--app", folder / "bundle"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    (made,) = tmp_path.glob("*.fab")
    assert hashlib.sha256(made.read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(made) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info")}
    assert names == set(bundle_files())


def test_the_bundle_names_what_is_installed_and_carries_no_code_of_its_own() -> None:
    files = bundle_files()
    assert set(files) == {
        "pyproject.toml",
        *(f"fedqc_bundle/{name}.py" for name in ("__init__", "coordinator", "hospital")),
    }
    assert (
        files["fedqc_bundle/coordinator.py"]
        == b"from server import app as installed\n\napp = installed.app\n"
    )
    assert (
        files["fedqc_bundle/hospital.py"] == b"from client import app as installed\n\napp = installed.app\n"
    )


def test_its_run_config_is_that_of_the_checkout() -> None:
    made, ours = (
        tomllib.loads(text)
        for text in (bundle_files()["pyproject.toml"].decode(), (ROOT / "pyproject.toml").read_text())
    )
    assert made["project"]["version"] == version("fedqc")
    for section in ("publisher", "config"):
        assert made["tool"]["flwr"]["app"][section] == ours["tool"]["flwr"]["app"][section]


def test_other_code_makes_another_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in flower_app.ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text("")
    monkeypatch.setattr(flower_app, "INSTALLED", tmp_path)
    before = bundle_files()
    (tmp_path / "client" / "a.py").write_text("x = 1\n")
    assert bundle_files() != before
    (tmp_path / "client" / "a.py").write_text("")
    assert bundle_files() == before


def test_another_installation_is_noticed_and_replaces_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_bundle(tmp_path)
    changed = bundle_files() | {"fedqc_bundle/new.py": b"x = 1\n"}
    monkeypatch.setattr(flower_app, "bundle_files", lambda: changed)
    assert not is_current(tmp_path)
    assert write_bundle(tmp_path) != first
    assert is_current(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.sha256"]


def test_a_bundle_that_flower_refuses_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_bundle(tmp_path)
    broken = bundle_files() | {"pyproject.toml": b"[project]\n"}
    monkeypatch.setattr(flower_app, "bundle_files", lambda: broken)
    with pytest.raises(InternalError) as caught:
        write_bundle(tmp_path)
    assert caught.value.code == "bundle-refused"
    assert (tmp_path / "bundle.sha256").read_text().strip() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.sha256"]


def test_byte_code_beside_the_sources_is_not_another_installation(
    written: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an operator's machine, where Python writes byte code wherever it imports from."""
    folder, digest = written
    copy = tmp_path / "federation"
    shutil.copytree(folder, copy)
    assert compileall.compile_dir(copy / "bundle", quiet=1)
    assert list((copy / "bundle").rglob("*.pyc"))
    assert is_current(copy)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    assert write_bundle(copy) == digest
    assert list((copy / "bundle").rglob("*.pyc")) == []
    (copy / "bundle" / "fedqc_bundle" / "hospital.py").write_text("app = None\n")
    assert not is_current(copy)


def test_byte_code_is_not_part_of_the_digest_of_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in flower_app.ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(flower_app, "INSTALLED", tmp_path)
    before = flower_app.installed_sha256()
    assert compileall.compile_dir(tmp_path, quiet=1)
    assert flower_app.installed_sha256() == before


def test_a_missing_program_is_named() -> None:
    with pytest.raises(ConfigError, match="flower-nothing") as caught:
        find_program("flower-nothing")
    assert caught.value.code == "no-program"
