"""The node before and beside its SuperNode: its file, its wall, what it makes of Flower's words. The rest is
in tests/end_to_end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.node.process import Status, read_node, supernode_command
from client.site.isolation import Isolation
from common.errors import ConfigError
from tests.helpers.kernel import needs_landlock
from tests.helpers.ports import free_port

WALL = Isolation(holds=True, how="files confined")


@pytest.fixture
def values() -> dict[str, Any]:
    ports = {"runtime_port": free_port(), "health_port": free_port()}
    nobody = f"127.0.0.1:{free_port()}"
    return {
        "site": "hospital-a",
        "address": nobody,
        "bundle_sha256": "ab" * 32,
        "agent_socket": "/srv/site/run/agent.sock",
    } | ports


@pytest.fixture
def site(tmp_path: Path, values: dict[str, Any]) -> Path:
    folder = tmp_path / "site"
    for name in ("node", "run", "images"):
        (folder / name).mkdir(parents=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", folder / "node" / "node.key"],
        check=True,
    )
    (folder / "node" / "runtime.secret").write_bytes(b"s" * 48)
    (folder / "node" / "ca.crt").write_text("")
    (folder / "images" / "1.dcm").write_bytes(b"PATIENT")
    write(folder, values)
    return folder


def write(site: Path, values: dict[str, Any]) -> None:
    (site / "node" / "node.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def node(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client.node.process", str(site), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_file_that_join_writes_is_read(site: Path, values: dict[str, Any]) -> None:
    assert read_node(site / "node").model_dump() == values | {"federation": ""}
    write(site, values | {"federation": "north"})
    assert read_node(site / "node").federation == "north"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"runtime_port": "9094"}, "runtime_port"),
        ({"runtime_port": 70_000}, "runtime_port"),
        ({"bundle_sha256": "AB" * 32}, "bundle_sha256"),
        ({"bundle_sha256": "ab"}, "bundle_sha256"),
        ({"address": "https://coordinator:8443"}, "address"),
        ({"address": "--insecure"}, "address"),
        ({"agent_socket": "run/agent.sock"}, "agent_socket"),
        ({"insecure": True}, "insecure"),
        ({"site": "../other"}, "site"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    site: Path, values: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    write(site, values | change)
    with pytest.raises(ConfigError) as caught:
        read_node(site / "node")
    assert caught.value.code == "bad-node"
    assert told in caught.value.message


def test_a_site_that_never_joined_is_told_how(site: Path) -> None:
    (site / "node" / "node.yaml").unlink()
    said = node(site)
    assert said.returncode == 2
    assert said.stderr.startswith("fedqc: error [not-joined]")
    assert "fedqc site join" in said.stderr


@pytest.mark.parametrize("which", ["runtime_port", "health_port"])
def test_a_taken_port_is_said_before_anything_starts(site: Path, values: dict[str, Any], which: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", values[which]))
        other.listen()
        said = node(site)
    assert said.returncode == 2
    assert said.stderr.splitlines()[0].startswith(f"fedqc: error [port-in-use]: 127.0.0.1:{values[which]}")
    assert not (site / "node" / "node.log").exists()


@pytest.mark.parametrize("name", ["node.key", "ca.crt", "runtime.secret"])
def test_a_missing_piece_is_named(site: Path, name: str) -> None:
    (site / "node" / name).unlink()
    said = node(site)
    assert said.returncode == 2
    assert f"{name}: cannot be read" in said.stderr


@needs_landlock
def test_the_node_cannot_open_an_image_and_the_control_can(site: Path, tmp_path: Path) -> None:
    code = """
    import subprocess, sys
    from pathlib import Path
    from client.node.process import _confine
    site = Path(sys.argv[1])
    if sys.argv[2] == "wall":
        found = _confine(site)
        assert found.holds, found.how
    def tried(path):
        try:
            return str(len(path.read_bytes()))
        except OSError as error:
            return type(error).__name__
    (site / "node" / "new").write_bytes(b"x")
    (site / "run" / "new").write_bytes(b"x")
    print(tried(site / "images" / "1.dcm"), tried(Path(sys.argv[3])), tried(site / "node" / "new"))
    loading = "import flwr, grpc, client.app, client.node.supernode; print('loads')"
    print(subprocess.run([sys.executable, "-c", loading],
                         cwd=site / "node", capture_output=True, text=True).stdout)
    """
    (tmp_path / "home").write_text("mine")
    arguments = [str(site), "wall", str(tmp_path / "home")]
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    behind = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=True
    ).stdout.split()
    assert behind == ["PermissionError", "PermissionError", "1", "loads"]
    arguments[1] = "none"
    control = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=True
    ).stdout.split()
    assert control == ["7", "4", "1", "loads"]


def test_a_coordinator_that_does_not_answer_is_waited_for_and_a_second_node_is_refused(site: Path) -> None:
    (site / "node" / "ca.crt").write_bytes(_authority(site))
    log = (site.parent / "said").open("w+")
    with log:
        process = subprocess.Popen([sys.executable, "-m", "client.node.process", str(site)], stderr=log)
        try:
            end = time.monotonic() + 90
            status = site / "node" / "status.json"
            while not (status.exists() and json.loads(status.read_text())["last_error"]):
                assert process.poll() is None, (site / "node" / "node.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
            said = json.loads(status.read_text())
            assert (said["connected"], said["last_error"], said["pid"]) == (False, "unreachable", process.pid)
            second = node(site)
            assert second.returncode == 2
            assert "error [node-running]" in second.stderr
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = log.read()
    assert "node: [unreachable]" in lines
    assert "Traceback" not in lines
    assert oct((site / "node" / "flwr").stat().st_mode & 0o777) == "0o700"


def test_a_node_that_is_killed_leaves_no_supernode(site: Path, values: dict[str, Any]) -> None:
    (site / "node" / "ca.crt").write_bytes(_authority(site))
    process = subprocess.Popen(
        [sys.executable, "-m", "client.node.process", str(site)], stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 90
    try:
        while socket.socket().connect_ex(("127.0.0.1", values["runtime_port"])) != 0:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    while socket.socket().connect_ex(("127.0.0.1", values["runtime_port"])) == 0:
        assert time.monotonic() < end
        time.sleep(0.1)


def _authority(site: Path) -> bytes:
    words = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    out = site.parent / "ca.crt"
    subprocess.run(
        ["openssl", "req", "-x509", *words, "-keyout", os.devnull, "-out", out],
        check=True,
        capture_output=True,
    )
    return out.read_bytes()


def heard(tmp_path: Path, *lines: str) -> dict[str, Any]:
    status = Status(tmp_path / "status.json", WALL)
    for line in lines:
        status.hear(line)
    return dict(json.loads((tmp_path / "status.json").read_text()))


TLS = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        (
            "wrong-authority",
            [
                "SSL/TLS handshake error detected.",
                "Exit Code: 305",
                TLS + "unable to get local issuer certificate",
            ],
        ),
        (
            "wrong-host",
            [
                "SSL/TLS handshake error detected.",
                "Exit Code: 305",
                TLS + "Hostname mismatch, certificate is not valid for 'x'",
            ],
        ),
        ("certificate-expired", ["Exit Code: 305", TLS + "certificate has expired (_ssl.c:1006)"]),
        (
            "no-tls",
            [
                "SSL/TLS handshake error detected.",
                "Exit Code: 305",
                "[SSL: WRONG_VERSION_NUMBER] wrong version number",
            ],
        ),
        ("key-not-accepted", ["Exit Code: 305", "[code: 2004] Failed to activate SuperNode."]),
        ("not-authenticated", ["SuperNode ID: 160529", "SuperNode terminated gracefully."]),
        ("other-version", ["Exit Code: 606"]),
        ("superlink-error", ["Exit Code: 305", "Client error '404 Not Found' for url"]),
        (
            "port-in-use",
            ["RuntimeError: Failed to bind to address 127.0.0.1:20118; set GRPC_VERBOSITY"],
        ),
        ("unreachable", ["Connection attempt failed, retrying in 0.96 seconds"]),
    ],
)
def test_flowers_words_become_a_code(tmp_path: Path, code: str, lines: list[str]) -> None:
    found = heard(tmp_path, "Starting Flower SuperNode", *lines)
    assert (found["connected"], found["last_error"]) == (False, code)
    assert found["message"]
    assert found["hint"]


def test_what_is_over_is_no_longer_said(tmp_path: Path) -> None:
    lost = "Connection attempt failed, retrying in 0.96 seconds"
    found = heard(tmp_path, lost, "Connection successful after 3.20 seconds and 4 tries.", "SuperNode ID: 77")
    assert (found["connected"], found["last_error"], found["message"]) == (True, None, "")
    assert heard(tmp_path, "SuperNode ID: 77", lost)["connected"] is False
    assert (
        heard(tmp_path, "SuperNode ID: 77", lost, "Connection successful after 3.20 seconds and 4 tries.")[
            "connected"
        ]
        is True
    )
    assert found["isolation"] == "files confined"


STUB = """
import sys, types
from pathlib import Path
import client.node.process as node
from common.errors import NetworkError

def serve(address, secret, bundle_sha256, *, stop):
    if sys.argv[3] == "lost":
        while "ready" not in (Path(sys.argv[1]) / "node" / "node.log").read_text():
            pass
        raise NetworkError("the SuperNode took an answer by halves", code="task-lost", hint="")
    stop.wait()

sys.modules["client.node.executor"] = types.SimpleNamespace(serve=serve)
node.supernode_command = lambda folder, config: [sys.executable, "-c", sys.argv[2]]
sys.exit(node.run_node(Path(sys.argv[1]), require_isolation=False, isolate=False))
"""
"""A node whose SuperNode is the program of the second argument; the third says what becomes of a task."""


@pytest.mark.parametrize(
    ("code", "message", "supernode"),
    [
        (
            "superlink-error",
            "the SuperNode ended with signal 9; its last line: nothing",
            "import os; os.kill(os.getpid(), 9)",
        ),
        (
            "superlink-error",
            "the SuperNode ended with status 1; its last line: ValueError: of a kind that nobody knows",
            "raise ValueError('of a kind that nobody knows')",
        ),
        (
            "key-not-accepted",
            "the coordinator does not accept this node's key",
            "print('a line\\n' * 50_000 + 'Exit Code: 600\\n[code: 2004] Failed to activate SuperNode.')",
        ),
    ],
)
def test_how_a_supernode_ended_is_reported_when_all_of_its_output_was_heard(
    site: Path, code: str, message: str, supernode: str
) -> None:
    said = subprocess.run(
        [sys.executable, "-c", STUB, site, supernode, "stays"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 3, said.stderr
    status = json.loads((site / "node" / "status.json").read_text())
    assert (status["connected"], status["last_error"]) == (False, code)
    assert status["message"].startswith(message)
    assert said.stderr.splitlines()[-1].startswith(f"node: [{code}] {message}")


def test_what_a_supernode_says_because_it_is_told_to_end_is_no_diagnosis(site: Path) -> None:
    """Flower's farewell is the same where the coordinator no longer accepts the node's signature."""
    supernode = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(print('SuperNode terminated gracefully.', flush=True)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    said = subprocess.run(
        [sys.executable, "-c", STUB, site, supernode, "lost"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 3, said.stderr
    assert "terminated gracefully" in (site / "node" / "node.log").read_text()
    assert json.loads((site / "node" / "status.json").read_text())["last_error"] == "task-lost"


def test_no_secret_stands_on_the_command_line(site: Path) -> None:
    words = supernode_command(site / "node", read_node(site / "node"))
    assert "--insecure" not in words
    assert not any("ssss" in word for word in words)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[-1] == 'agent-socket="/srv/site/run/agent.sock"'
