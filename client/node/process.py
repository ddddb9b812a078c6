"""Run a site's node: it has the network and no data, confines itself to its folder, and runs a SuperNode.

Flower's SuperNode is a child process (client/node/supernode.py); this process takes its tasks
(client/node/executor.py) and asks the agent through the socket in run/. node/status.json holds whether the
coordinator is reached, since when, and the last error, in plain words for Flower's; node/node.log has all of
Flower's output.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml
from pydantic import Field, ValidationError

import common
from client.site.isolation import Isolation, as_first_thing, confine_files, main
from common.cli import SILENT
from common.errors import ConfigError, NetworkError
from common.files import locked, sweep, write_bytes
from common.names import SITE_NAME
from common.processes import LOOPBACK, described_status, keep_memory_private, port_error
from common.strict import StrictModel, describe_validation, read_yaml
from common.terminal import escaped, print

READABLE = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc",
    "/proc",
    "/dev/null",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
)
READABLE_TOO = (
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/nscd",
)
"""Paths that the node may read, besides Python, this program, node/ and run/."""
GRACE_S = 7.0
LOG_BYTES = 5 << 20

_CONNECTED, _AGAIN = re.compile(r"SuperNode ID: [0-9]+"), re.compile(r"Connection successful")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_INTERCEPTED = (
    "another machine answers in the coordinator's place; tell both networks' administrators, and do not "
    "continue"
)
_TROUBLES: tuple[tuple[str, str, str, str], ...] = (
    (
        r"Hostname mismatch|IP address mismatch",
        "wrong-host",
        "the certificate is for another host",
        "tell the coordinator; do not continue",
    ),
    (
        r"certificate has expired|not yet valid",
        "certificate-expired",
        "the certificate is not valid today",
        "tell the coordinator",
    ),
    (
        r"local issuer|self.signed",
        "wrong-authority",
        "the certificate is not from the federation's authority",
        _INTERCEPTED,
    ),
    (
        r"WRONG_VERSION_NUMBER|record layer",
        "no-tls",
        "no TLS at that address",
        "check the port; fedqc requires TLS",
    ),
    (r"CERTIFICATE_VERIFY_FAILED", "bad-certificate", "the certificate cannot be used", _INTERCEPTED),
    (r"\[SSL|SSL/TLS handshake", "tls-failed", "TLS failed", _INTERCEPTED),
    (
        r"code: 2004\]",
        "key-not-accepted",
        "the coordinator does not accept this node's key, or still counts it as connected",
        "after a crash this ends within 60 s; otherwise ask the coordinator whether this site is approved",
    ),
    (
        r"Exit Code: 606",
        "other-version",
        "the coordinator runs another version of Flower",
        "upgrade when the coordinator says so",
    ),
    (
        r"Exit Code: 302",
        "bad-node-key",
        "node.key is not a key that Flower can use",
        "restore it from a backup, or make a new site",
    ),
    (
        r"address already in use|Failed to bind to address",
        "port-in-use",
        "one of the node's two loopback ports is taken",
        "is another node of this folder running?",
    ),
    (r"Exit Code: ", "superlink-error", "the SuperNode ended", "see node/node.log"),
    (
        r"terminated gracefully",
        "not-authenticated",
        "the coordinator no longer accepts this node's signature: revoked, or this machine's clock is wrong",
        "compare the clocks with fedqc site check: at most 5 s ahead, 305 s behind",
    ),
    (
        r"Connection attempt failed",
        "unreachable",
        "the coordinator does not answer; trying again",
        "find the cause with fedqc site check",
    ),
)
"""Pattern of Flower's output, error code, message, hint. The first match counts."""
MAX_SHOWN = 200
"""Characters of the SuperNode's last line that are shown where none of its lines is a known trouble."""

log = logging.getLogger("fedqc.node")


class NodeConfig(StrictModel):
    """node/node.yaml, as `fedqc site join` writes it."""

    site: str = Field(pattern=SITE_NAME)
    federation: str = ""
    address: str = Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}$", max_length=300)
    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    runtime_port: int = Field(ge=1, le=65535)
    health_port: int = Field(ge=1, le=65535)
    agent_socket: str = Field(pattern=r"^/.+$", max_length=4096)


def read_node(folder: Path) -> NodeConfig:
    """Raises ConfigError: `not-joined`, or `bad-node` with what is wrong in node.yaml."""
    path = folder / "node.yaml"
    hint = "run as the node's user, or join again with the kit"
    try:
        return NodeConfig.model_validate(read_yaml(path))
    except FileNotFoundError:
        hint = "fedqc site join kit.zip --fingerprint …"
        raise ConfigError(
            f"{folder.parent}: has not joined a federation", code="not-joined", hint=hint
        ) from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation(error)}", code="bad-node", hint=hint) from None
    except (OSError, yaml.YAMLError, ConfigError):
        raise ConfigError(f"{path}: cannot be read", code="bad-node", hint=hint) from None


def run_node(site: Path, *, require_isolation: bool, isolate: bool = True) -> int:
    """Confine this process to its folder, then run a SuperNode and answer its tasks until SIGTERM or Ctrl-C.

    node/status.json holds {"connected", "since", "pid", "last_error": code, "message", "hint", "isolation",
    "holds"}.

    Args:
        site: the site's folder, of which only node/ and run/ are used.
        require_isolation: refuse to start where the data cannot be put out of reach; otherwise that is only
            reported.
        isolate: False leaves the files alone, for tests.
    Returns:
        exit status: 3 where the SuperNode ended (network, key, certificate), to be started again; 128 +
        number of the signal.
    Raises:
        ConfigError: `not-joined`, `bad-node`, `node-running`, `port-in-use`, `not-isolated`: nothing was
            started.
    """
    if isolate:
        as_first_thing("client.node.process", site, require_isolation=require_isolation)
    site = site.absolute()
    folder = site / "node"
    config = read_node(folder)
    with _only_one(folder):
        sweep(folder)
        for name in ("node.key", "ca.crt", "runtime.secret"):
            if not os.access(folder / name, os.R_OK):
                raise ConfigError(
                    f"{folder / name}: cannot be read",
                    code="bad-node",
                    hint="run as the node's user, or join again",
                )
        for port in (config.runtime_port, config.health_port):
            _require_free(port)
        for name in ("flwr", "tmp"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        isolation = _confine(site) if isolate else Isolation(holds=False, how="file confinement is off")
        print(f"node: {isolation.how}", file=sys.stderr, flush=True)
        if require_isolation and not isolation.holds:
            raise ConfigError(
                f"the node can read the data: {isolation.how}", code="not-isolated", hint=isolation.hint
            )
        if isolate:
            keep_memory_private()
        os.environ.update(_environment(folder))
        return _Node(folder, config, isolation).run()


def _confine(site: Path) -> Isolation:
    python: list[str | Path] = [
        sys.prefix,
        sys.base_prefix,
        Path(__file__).parents[2],
        Path(str(common.__file__)).parent,
    ]
    python += [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return confine_files(
        read=[Path(path) for path in (*python, *READABLE, *READABLE_TOO)],
        write=[site / "node", site / "run", Path("/dev/null")],
    )


def _environment(folder: Path) -> dict[str, str]:
    """Flower silent and at home in node/; the loopback past any proxy."""
    kept = ",".join(
        filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy", ""), "127.0.0.1", "localhost"])
    )
    return SILENT | {
        "FLWR_HOME": str(folder / "flwr"),
        "HOME": str(folder),
        "TMPDIR": str(folder / "tmp"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": kept,
        "no_proxy": kept,
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    def busy() -> ConfigError:
        return ConfigError(
            f"{folder}: a node is already running", code="node-running", hint="fedqc site stop"
        )

    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / "node.lock", busy=busy))
        except OSError as error:
            hint = "run as the node's user"
            raise ConfigError(
                f"{folder}: cannot be written ({error.strerror})", code="bad-node", hint=hint
            ) from None
        yield


def _require_free(port: int) -> None:
    if error := port_error(LOOPBACK, port):
        raise ConfigError(
            f"{LOOPBACK}:{port} cannot be used ({error.strerror})",
            code="port-in-use",
            hint=(
                "stop the program that uses it, or choose another runtime_port and health_port in "
                "node/node.yaml"
            ),
        )


def supernode_command(folder: Path, config: NodeConfig) -> list[str]:
    """How the SuperNode is started. Nothing secret stands in it."""
    return [
        *(sys.executable, "-P", "-m", "client.node.supernode", str(os.getpid())),
        *("--superlink", config.address, "--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / "node.key")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder / "runtime.secret")),
        *("--host", "127.0.0.1", "--port", str(config.runtime_port)),
        *("--health-server-address", f"127.0.0.1:{config.health_port}"),
        *("--node-config", f"agent-socket={json.dumps(config.agent_socket, ensure_ascii=False)}"),
    ]


class Status:
    """State of the connection, read from the SuperNode's output and written to node/status.json."""

    def __init__(self, path: Path, isolation: Isolation) -> None:
        self._path, self._isolation = path, isolation
        self._rank = len(_TROUBLES)
        self.connected = False
        self.code = ""
        self._message, self._hint = "", ""
        self._last = ""
        self._since = _now()
        self._write()

    def hear(self, line: str) -> None:
        """One line of the SuperNode."""
        self._last = line
        if _CONNECTED.search(line) or (_AGAIN.search(line) and self._rank == len(_TROUBLES) - 1):
            self._rank, self.code, self._message, self._hint = len(_TROUBLES), "", "", ""
            self._turn(connected=True)
            return
        for rank, (sign, code, message, hint) in enumerate(_TROUBLES[: self._rank]):
            if re.search(sign, line, re.IGNORECASE):
                self._rank = rank
                self.say(code, message, hint)
                return

    def say(self, code: str, message: str, hint: str) -> None:
        """Not connected, for this reason."""
        self.code, self._message, self._hint = code, message, hint
        self._turn(connected=False)

    def end(self, *, asked: bool, how: str) -> None:
        """The SuperNode has ended, because it was asked to or by itself; all of its lines were heard.

        Args:
            how: with which status or signal.
        """
        if not asked and not self.code:
            last = self._last[:MAX_SHOWN] or "nothing"
            self.say(
                "superlink-error",
                f"the SuperNode ended with {how}; its last line: {last}",
                "see node/node.log",
            )
        self._turn(connected=False)

    def line(self) -> str:
        return "node: connected" if self.connected else f"node: [{self.code}] {self._message}; {self._hint}"

    def _turn(self, *, connected: bool) -> None:
        if connected != self.connected:
            self.connected, self._since = connected, _now()
        self._write()

    def _write(self) -> None:
        values: dict[str, Any] = {"connected": self.connected, "since": self._since, "pid": os.getpid()}
        values |= {"last_error": self.code or None, "message": self._message, "hint": self._hint}
        values |= {"isolation": self._isolation.how, "holds": self._isolation.holds}
        with suppress(OSError):  # a full disk stops no node
            write_bytes(self._path, (json.dumps(values, ensure_ascii=False) + "\n").encode())


class _Node:
    """The SuperNode and the loop that answers its tasks."""

    def __init__(self, folder: Path, config: NodeConfig, isolation: Isolation) -> None:
        self._folder, self._config = folder, config
        self._status = Status(folder / "status.json", isolation)
        self._stop, self._drained = threading.Event(), threading.Event()
        self._signal = 0
        self._is_dismissed = False

    def run(self) -> int:
        handler = logging.handlers.RotatingFileHandler(
            self._folder / "node.log", maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8"
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root = logging.getLogger("fedqc")
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        command = supernode_command(self._folder, self._config)
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        child = subprocess.Popen(
            command,
            cwd=self._folder,
            stdin=nothing,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        assert child.stdout is not None
        pump = threading.Thread(target=self._pump, args=(child.stdout,), name="supernode", daemon=True)
        pump.start()
        try:
            from client.node.executor import serve

            secret = (self._folder / "runtime.secret").read_bytes()
            serve(
                f"127.0.0.1:{self._config.runtime_port}", secret, self._config.bundle_sha256, stop=self._stop
            )
        except NetworkError as error:
            self._status.say(error.code, error.message, error.hint)
        finally:
            how = self._end(child)
        self._status.end(asked=self._signal != 0, how=how)
        if self._signal:
            return 128 + self._signal
        print(self._status.line(), file=sys.stderr, flush=True)
        return NetworkError.exit_status

    def _pump(self, lines: IO[str]) -> None:
        try:
            for line in lines:
                plain = escaped(_COLOURS.sub("", line).rstrip())
                if not plain:
                    continue
                log.info("flower: %s", plain)
                before = self._status.line()
                if not self._signal and not self._is_dismissed:
                    self._status.hear(plain)
                if self._status.line() != before:
                    print(self._status.line(), file=sys.stderr, flush=True)
        finally:
            self._drained.set()
            self._stop.set()

    def _end(self, child: subprocess.Popen[str]) -> str:
        """End the SuperNode unless it has ended by itself, and hear the rest of its output.

        What it says because it is told to end is no diagnosis: Flower says the same where its signature is no
        longer accepted.

        Returns:
            the status or signal that it ended with.
        """
        if self._drained.is_set():  # it closed its output: it is ending
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
        if child.poll() is None:
            self._is_dismissed = True
            child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._drained.wait(GRACE_S)
        return described_status(child.returncode)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._stop.set()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main(run_node))
