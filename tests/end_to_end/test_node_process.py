"""A hospital's two processes against a real SuperLink: TLS, enrolled key, the node confined to its folder,
the agent without a network.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from client.ipc.client import agent_health
from client.site.isolation import _in_a_child, _leave_the_network
from common.cli import SILENT
from tests.helpers.ports import free_port

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent

SERVER_APP = """
import json, time
from flwr.app import Message
from flwr.serverapp import ServerApp
from common.wire import Envelope, Refusal, type_of

app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    answers = []
    for number in range(int(context.run_config["messages"])):
        payload = f"question {number}".encode()
        question = Envelope(payload=payload, statement="from the coordinator", signature=b"s").to_record()
        (reply,) = grid.send_and_receive([Message(question, dst_node_id=nodes[0], message_type="train")])
        if reply.has_error():
            answers.append({"error": str(reply.error)})
            continue
        payload = Envelope.from_record(reply.content).payload
        refused = type_of(payload) == "Refusal"
        code = Refusal.from_bytes(payload).code if refused else ""
        answers.append({"refused": code} if refused else {"answer": payload.decode()})
    with open(context.run_config["out"], "w") as file:
        json.dump(answers, file)
"""
CLIENT_APP = """
from pathlib import Path
Path({marker!r}).touch()  # what a site must never run
from flwr.clientapp import ClientApp
app = ClientApp()
"""
PROJECT = """
[project]
name = "{name}"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "probe.server:app"
clientapp = "probe.client:app"
[tool.flwr.app.config]
plan = '{{"federation": {{"deadline_s": 60}}}}'
messages = 1
out = ""
"""
AGENT = """
import sys
from pathlib import Path
from client.agent.server import run_agent
from common.wire import Envelope

def answer(method, plan_json, envelope, *, progress, cancelled):
    asked = Envelope.from_bytes(envelope)
    assert (asked.statement, asked.signature) == ("from the coordinator", b"s")
    return Envelope(payload=b"answer to " + asked.payload).to_bytes()

sys.exit(run_agent(Path(sys.argv[1]), require_isolation=False, guard=lambda site: answer))
"""


def until(is_so: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def landlock_is_there() -> bool:
    return int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))) > 0


def namespaces_are_there() -> bool:
    return _in_a_child(_leave_the_network) == 0


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


class Rig:
    """A coordinator with its SuperLink, and one site folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.site = folder / "site"
        self.log = folder / "link.log"
        self.env = os.environ | SILENT | {"FLWR_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        self.env["PATH"] = f"{BIN}{os.pathsep}{self.env['PATH']}"
        (folder / "home").mkdir()
        self._certificates()
        connection = (
            '[superlink]\ndefault = "it"\n[superlink.it]\naddress = '
            f'"127.0.0.1:{self.port}"\nroot-certificates = "{folder}/ca.crt"\n'
        )
        (folder / "home" / "config.toml").write_text(connection)
        for name, mode in (("node", 0o700), ("run", 0o750), ("state", 0o700)):
            (self.site / name).mkdir(mode=mode, parents=True)
        key = self.site / "node" / "node.key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", key], check=True)
        (self.site / "node" / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
        (self.site / "node" / "runtime.secret").write_bytes(secrets.token_bytes(48))
        (self.site / "image.dcm").write_bytes(b"PATIENT")

    def _certificates(self) -> None:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        at = self.folder
        authority = (
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        )
        openssl(
            "req",
            "-x509",
            *curve,
            "-days",
            2,
            "-keyout",
            at / "ca.key",
            "-out",
            at / "ca.crt",
            "-subj",
            "/CN=test CA",
            *authority,
        )
        openssl(
            "req", *curve, "-keyout", at / "server.key", "-out", at / "server.csr", "-subj", "/CN=localhost"
        )
        (at / "ext").write_text(
            "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n"
        )
        signed = (
            "-CA",
            at / "ca.crt",
            "-CAkey",
            at / "ca.key",
            "-CAcreateserial",
            "-days",
            2,
            "-extfile",
            at / "ext",
        )
        openssl("x509", "-req", "-in", at / "server.csr", *signed, "-out", at / "server.pem")

    def app(self, name: str) -> tuple[Path, str]:
        """A Flower app, and the hash of the bundle that Flower builds from it."""
        folder = self.folder / name
        (folder / "probe").mkdir(parents=True)
        (folder / "probe" / "__init__.py").touch()
        (folder / "probe" / "server.py").write_text(SERVER_APP)
        (folder / "probe" / "client.py").write_text(
            CLIENT_APP.format(marker=str(self.folder / "ran-foreign-code"))
        )
        (folder / "pyproject.toml").write_text(PROJECT.format(name=name))
        subprocess.run(
            [BIN / "flwr", "build", "--app", folder],
            cwd=self.folder,
            env=self.env,
            check=True,
            capture_output=True,
        )
        (bundle,) = self.folder.glob(f"*{name}*.fab")
        return folder, hashlib.sha256(bundle.read_bytes()).hexdigest()

    def enrol(self, bundle_sha256: str) -> None:
        values = {"site": "hospital-a", "address": f"127.0.0.1:{self.port}", "bundle_sha256": bundle_sha256}
        values |= {
            "runtime_port": free_port(),  # type: ignore[dict-item]
            "health_port": free_port(),  # type: ignore[dict-item]
            "agent_socket": str(self.site / "run" / "agent.sock"),
        }
        (self.site / "node" / "node.yaml").write_text(yaml.safe_dump(values))
        self.flwr("supernode", "register", str(self.site / "node" / "node.key.pub"), "it")

    def flwr(self, *words: str, timeout: float = 240) -> str:
        command = [str(BIN / "flwr"), *words]
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, app: Path, messages: int = 1) -> list[dict[str, object]]:
        """What the site answered to a run of this app."""
        out = self.folder / f"{app.name}.json"
        said = self.flwr(
            "run", str(app), "it", "--stream", "--run-config", f'messages={messages} out="{out}"'
        )
        assert out.exists(), said[-3000:] + self.logs()
        return list(json.loads(out.read_text()))

    def status(self) -> dict[str, object]:
        path = self.site / "node" / "status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def logs(self) -> str:
        return "\n".join(
            path.read_text(errors="replace")[-4000:]
            for path in (*self.folder.glob("*.log"), *self.site.glob("node/*.log"))
        )

    @contextmanager
    def link(self) -> Iterator[None]:
        words = [
            BIN / "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--ssl-ca-certfile",
            self.folder / "ca.crt",
        ]
        words += [
            "--ssl-certfile",
            self.folder / "server.pem",
            "--ssl-keyfile",
            self.folder / "server.key",
            "--enable-supernode-auth",
        ]
        words += ["--database", self.folder / "state.db", "--disable-runtime-dependency-installation"]
        with self.running(words, "link") as process:
            until(
                lambda: "startup complete" in self.log.read_text() or process.poll() is not None,
                90,
                self.logs,
            )
            yield

    @contextmanager
    def running(self, words: list[object], name: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / f"{name}.log").open("wb") as sink:
            process = subprocess.Popen(
                [*map(str, words)],
                env=self.env,
                cwd=self.folder,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()

    def agent(self) -> list[object]:
        return [sys.executable, "-c", textwrap.dedent(AGENT), self.site]

    def node(self) -> list[object]:
        return [sys.executable, "-m", "client.node.process", self.site]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="fedqc-") as name:
        found = Rig(Path(name))
        with found.link():
            yield found


def connected(rig: Rig, node: subprocess.Popen[bytes]) -> Callable[[], bool]:
    return lambda: rig.status().get("connected") is True or node.poll() is not None


def test_a_node_from_its_first_message_to_its_end(rig: Rig) -> None:
    """One story of one key: it is used, its SuperNode is killed, it is online still, it is accepted again."""
    a_message_reaches_the_agent_and_only_under_the_pinned_bundle(rig)
    a_key_that_is_online_already_or_unknown_is_said(rig)
    sigterm_ends_node_and_supernode(rig)


def a_message_reaches_the_agent_and_only_under_the_pinned_bundle(rig: Rig) -> None:
    pinned, bundle_sha256 = rig.app("pinned")
    other, _ = rig.app("other")
    rig.enrol(bundle_sha256)
    with rig.running(rig.agent(), "agent"), rig.running(rig.node(), "node") as node:
        until(connected(rig, node), 90, rig.logs)
        until(lambda: agent_health(rig.site / "run" / "agent.sock"), 60, rig.logs)
        answers = rig.ask(pinned, messages=3)
        assert [answer.get("answer") for answer in answers] == [
            f"answer to question {number}" for number in range(3)
        ], rig.logs()
        assert rig.ask(other) == [{"refused": "wrong-bundle"}]
        assert not (rig.folder / "ran-foreign-code").exists()
        assert rig.ask(pinned) == [{"answer": "answer to question 0"}]
        held = rig.status()["holds"], json.loads((rig.site / "run" / "agent.json").read_text())["holds"]
        assert held == (landlock_is_there(), namespaces_are_there())

        children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)  # the SuperNode alone: the supervisor starts the node again
        assert node.wait(60) == 3
    assert rig.status()["connected"] is False
    assert rig.status()["last_error"] == "superlink-error"


def a_key_that_is_online_already_or_unknown_is_said(rig: Rig) -> None:
    """Flower believes the SuperNode that was killed above to be online for up to a minute, and says the same
    of an unknown key.
    """
    (rig.site / "node" / "status.json").unlink()
    with rig.running(rig.node(), "again") as node:
        assert node.wait(90) == 3
    assert rig.status()["last_error"] == "key-not-accepted"
    said = (rig.folder / "again.log").read_text()
    assert "[key-not-accepted]" in said
    assert "Traceback" not in said


def sigterm_ends_node_and_supernode(rig: Rig) -> None:
    def once_accepted() -> bool:
        with rig.running(rig.node(), "last") as node:
            until(connected(rig, node), 90, rig.logs)
            if node.poll() is not None:
                return False
            children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
            node.send_signal(signal.SIGTERM)
            assert node.wait(60) == 128 + signal.SIGTERM
            assert not any(Path(f"/proc/{child}").exists() for child in children)
            return True

    until(once_accepted, 150, rig.logs)
    assert rig.status()["connected"] is False
    assert rig.status()["last_error"] is None
