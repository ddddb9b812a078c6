from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from client.supervision.systemd import AGENT, NODE, unit_texts, write_units
from common.errors import ConfigError


def site_in(folder: Path, **changes: str) -> Path:
    values = {"name": "hospital-a", "kind": "hospital", "cohort": "c", "nominal_patients": "200"} | changes
    for name in ("state", "node", "run", "images"):
        (folder / name).mkdir(parents=True)
    (folder / "site.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in values.items()), encoding="utf-8"
    )
    (folder / "labels.csv").touch()
    return folder


def lines(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_the_agent_has_no_network_and_the_node_no_data(tmp_path: Path) -> None:
    site = site_in(tmp_path / "site")
    agent, node = (unit_texts(site)[name] for name in (AGENT, NODE))
    assert lines(agent, "PrivateNetwork") == ["yes"]
    assert lines(agent, "ReadWritePaths") == [f'"{site}/state" "{site}/run"']
    assert lines(agent, "User") == ["fedqc-agent"]
    assert lines(node, "PrivateNetwork") == []
    assert lines(node, "InaccessiblePaths") == [f'"{site}/state" "{site}/images" "{site}/labels.csv"']
    assert lines(node, "User") == ["fedqc-node"]
    assert lines(agent, "Group") == lines(node, "Group") == ["fedqc"]
    for text in (agent, node):
        assert [
            lines(text, key)
            for key in ("ProtectSystem", "NoNewPrivileges", "Restart", "RestartSec", "StartLimitIntervalSec")
        ] == [
            ["strict"],
            ["yes"],
            ["always"],
            ["15"],
            ["0"],
        ]
        assert "--require-isolation" in lines(text, "ExecStart")[0]
        # a site keeps its units for years: the module that they start must keep its name
        assert " -m common.cli site start " in lines(text, "ExecStart")[0]


def test_images_elsewhere_are_hidden_from_the_node_too(tmp_path: Path) -> None:
    site = site_in(tmp_path / "site", images="/data/pacs export")
    assert '"/data/pacs export"' in lines(unit_texts(site)[NODE], "InaccessiblePaths")[0]


def test_units_that_the_operator_changed_are_kept(tmp_path: Path) -> None:
    site = site_in(tmp_path / "site")
    folder = write_units(site)
    (folder / AGENT).write_text("mine", encoding="utf-8")
    (folder / NODE).unlink()
    write_units(site)
    assert (folder / AGENT).read_text(encoding="utf-8") == "mine"
    assert (folder / NODE).is_file()


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b", "$HOME"])
def test_a_path_that_systemd_would_misread_is_refused(name: str, tmp_path: Path) -> None:
    site = site_in(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        unit_texts(site)
    assert caught.value.code == "bad-path"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("name", ["site", "my site 5%"])
def test_systemd_accepts_the_units(name: str, tmp_path: Path) -> None:
    folder = write_units(site_in(tmp_path / name))
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(folder.iterdir()))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    about_us = [line for line in said.stderr.splitlines() if "fedqc-" in line]
    assert (said.returncode, about_us) == (0, []), said.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_would_say_what_is_wrong(tmp_path: Path) -> None:
    """The control of the test above."""
    folder = write_units(site_in(tmp_path / "site"))
    path = folder / AGENT
    path.write_text(
        path.read_text(encoding="utf-8").replace("PrivateNetwork=yes", "PrivateNetwork=perhaps"),
        encoding="utf-8",
    )
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "fedqc-agent.service" in said.stderr
