"""An enrolled hospital whose agent is asked directly, and the attacks and accidents around it."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from client.ipc.client import agent_health, ask_agent
from client.site.budget import budgets
from common.signing import Statement, load_key, verify
from common.wire import (
    Envelope,
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    WireMessage,
    type_of,
)
from server.messaging.signatures import Seal
from tests.helpers.consortium import tiny_plan
from tests.helpers.rig import LIMIT_S, Deployment, wait_until

SITE, OTHER = "hospital-a", "hospital-b"
METHODS = {"DescribeTask": "Describe", "TrainTask": "Train", "EvaluateTask": "Evaluate"}
ANSWERS: dict[str, type[WireMessage]] = {
    kind.__name__: kind for kind in (SiteDescription, SiteReadiness, SiteUpdate, SiteEvaluation, Refusal)
}
PLAN = tiny_plan(
    name="honest",
    arms=["federated", "federated_dp"],
    held_out=[],
    training={"rounds": 3},
    privacy={"epsilon": 1.0},
    federation={"quorum": 1},
)
STATE_BYTES = 24 << 20
PAGE = 4096


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of its own under `folder`, with what lay there; False where this system permits no mounts."""
    held = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={STATE_BYTES},mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        for name, content in held.items():
            (folder / name).write_bytes(content)
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody can write to, not even root, who needs no permissions. Skips the test where this
    system permits no mounts.
    """
    for words in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        if subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
            pytest.skip("no read-only folder: this system permits no bind mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def fill(folder: Path, *, leave_pages: int) -> None:
    """Use up the disk under `folder` but for so many pages of 4 KiB."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        with suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        file.truncate(max(0, file.tell() // PAGE - leave_pages) * PAGE)


class Hospital:
    """A site whose agent is asked directly, with the coordinator's key or another."""

    def __init__(self, deployment: Deployment, name: str = SITE) -> None:
        self.deployment, self.name, self.folder = deployment, name, deployment.site(name)
        self.state, self.socket = self.folder / "state", self.folder / "run" / "agent.sock"
        self.coordinator = load_key(deployment.fed / "keys" / "coordinator.key")
        self.key = load_key(self.state / "signing.key").public_key()
        self.pid = 0

    def start_agent(self) -> None:
        self.pid = self.deployment.start_site(self.name, only="agent")
        wait_until(
            lambda: self.socket.exists() and agent_health(self.socket),
            LIMIT_S,
            "the agent",
            self.deployment.tails,
        )

    def question(
        self,
        task: WireMessage,
        plan: str,
        *,
        key: Ed25519PrivateKey | None = None,
        payload: bytes | None = None,
    ) -> bytes:
        """A task signed as the coordinator signs it."""
        seal = Seal(
            plan_sha256=hashlib.sha256(plan.encode("utf-8", "surrogatepass")).hexdigest(),
            key=key or self.coordinator,
        )
        asked = seal.question(
            task,
            task.to_bytes() if payload is None else payload,
            site=self.name,
            run=getattr(task, "run", ""),
            arm=getattr(task, "arm", ""),
            round=getattr(task, "round", 0),
            base_sha256=getattr(task, "base_sha256", ""),
        )
        return seal.envelope(asked).to_bytes()

    def ask(self, task: WireMessage, plan: str | None = None, **how: Any) -> WireMessage:
        text = PLAN.canonical_json() if plan is None else plan
        return self.send(METHODS[type(task).__name__], text, self.question(task, text, **how))

    def send(self, method: str, plan: str, envelope: bytes) -> WireMessage:
        """These bytes over the socket; the answer must carry the site's signature."""
        opened = Envelope.from_bytes(ask_agent(self.socket, method, plan, envelope, deadline_s=LIMIT_S))
        verify(opened.statement, opened.signature, self.key)
        assert Statement.parse(opened.statement).payload_sha256 == hashlib.sha256(opened.payload).hexdigest()
        return ANSWERS[type_of(opened.payload)].from_bytes(opened.payload)

    def rows(self) -> list[dict[str, Any]]:
        (account,) = budgets(self.folder)
        entries: list[dict[str, Any]] = account["entries"]
        return entries

    def log(self) -> str:
        path = self.state / "site.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""


def code_of(answer: WireMessage) -> str:
    return answer.code if isinstance(answer, Refusal) else type(answer).__name__


def memory_of(pid: int) -> int:
    """Address space in bytes."""
    return int(re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10  # type: ignore[index]


class Server:
    """Somebody at the coordinator's address: with a certificate, or without TLS at all; its clock may be
    wrong. Counts who knocks.
    """

    def __init__(self, certificate: tuple[Path, Path] | None, *, clock_s: float = 0.0) -> None:
        self.knocks = 0
        self.clock_s = clock_s
        self._context = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.knocks += 1
            with suppress(OSError), connection:
                connection.settimeout(5)
                with (
                    self._context.wrap_socket(connection, server_side=True)
                    if self._context
                    else connection as spoken
                ):
                    spoken.recv(1 << 16)
                    date = format_datetime(datetime.now(UTC) + timedelta(seconds=self.clock_s), usegmt=True)
                    spoken.sendall(
                        (
                            f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: "
                            "close\r\n\r\n"
                        ).encode()
                    )


class Authority:
    """Makes server certificates: with the federation's own key, or with another."""

    def __init__(self, deployment: Deployment, *, own: bool = True) -> None:
        self._folder = deployment.folder
        real = x509.load_pem_x509_certificate((deployment.fed / "certificates" / "ca.crt").read_bytes())
        self.name = real.subject  # an impostor gives itself the same one
        self._key: Any = serialization.load_pem_private_key(
            (deployment.fed / "keys" / "ca.key").read_bytes(), password=None
        )
        if not own:
            self._key = ec.generate_private_key(ec.SECP256R1())

    def certificate(
        self, *, host: str = "127.0.0.1", days: int = 30, own_issuer: bool = False
    ) -> tuple[Path, Path]:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if own_issuer else self.name)
            .public_key(key.public_key())
        )
        built = built.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=90))
        built = built.not_valid_after(now + timedelta(days=days))
        name: x509.GeneralName
        try:
            name = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        built = built.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        signer = key if own_issuer else self._key
        built = built.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        paths = self._folder / f"{secrets.token_hex(4)}.crt", self._folder / f"{secrets.token_hex(4)}.key"
        paths[0].write_bytes(built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        paths[1].write_bytes(pem)
        return paths


@contextmanager
def at_the_address_of(site: Path, server: Server) -> Iterator[None]:
    """The site's node believes its coordinator to be at this server."""
    path = site / "node" / "node.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"address": f"127.0.0.1:{server.port}"}))
    try:
        yield
    finally:
        path.write_text(before)
        server.close()


def wrong_servers(deployment: Deployment) -> dict[str, tuple[str, Server]]:
    """What may stand at the coordinator's address, and the code for it."""
    real, impostor = Authority(deployment), Authority(deployment, own=False)
    return {
        "expired": ("certificate-expired", Server(real.certificate(days=-1))),
        "another authority": ("wrong-authority", Server(impostor.certificate())),
        "another host": ("wrong-host", Server(real.certificate(host="elsewhere.example"))),
        "the server's key swapped": ("wrong-authority", Server(real.certificate(own_issuer=True))),
        "plaintext": ("no-tls", Server(None)),
    }
