"""`fedqc federation start` and `stop`: proxy, SuperLink and SuperExec as child processes that are kept
running.

    proxy      nginx, the only one that others can reach
    superlink  Flower's server, on loopback, behind TLS of our own; tasks are handed only to who knows the
    secret superexec  starts the ServerApp of a run

Whoever is enrolled is made known to the SuperLink, whoever was revoked is taken off it: at the start, and
whenever sites/ changes.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common.cli import SILENT
from common.errors import ConfigError, FedqcError, NetworkError, RunError
from common.files import is_locked, locked, sweep, write_bytes
from common.processes import die_with_parent
from server.federation.certificates import WARN_DAYS
from server.federation.configure import configure
from server.federation.flower_app import find_program, search_path
from server.federation.registry import CONNECTION, LOOPBACK, Federation

POLL_S = 0.2
UP_S = 90.0
"""How long a service may take to come up: Flower's imports, on a busy machine."""
GRACE_S = 7.0
BACK_OFF_S = (1.0, 2.0, 5.0, 15.0, 30.0)
STEADY_S = 60.0
"""A service that ran this long is started again at once when it ends."""
RETRY_S = 15.0
"""Between two attempts to tell the SuperLink who is enrolled."""
EXEC_POLL_S = "0.5"
"""How often SuperExec asks the SuperLink for a run to start; each time costs the two of them some 10 ms of
CPU.
"""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(128 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""For glibc: otherwise each model that passes through is memory fresh from the kernel, which is a tenth of a
round's CPU.
"""
LOCK = "services.lock"
_GONE = "unregistered"


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process to keep running."""

    name: str
    command: tuple[str, ...]
    is_up: Callable[[], bool]


def serve(federation: Federation, *, proxy: bool = True, say: Callable[[str], None]) -> int:
    """Run the services until SIGTERM or Ctrl-C; then end them all within 10 seconds.

    Args:
        proxy: whether nginx is ours to start, or systemd's.
    Returns:
        143 or 130 after a signal.
    Raises:
        ConfigError: see `preflight`; nothing was started.
        RunError: a service did not come up (code `service-failed`); the others were ended.
    """
    with _only_one(federation):
        sweep(federation.state)
        services = preflight(federation, proxy=proxy, say=say)
        stopped, received = threading.Event(), []

        def on_signal(number: int, frame: FrameType | None) -> None:
            received.append(number)
            stopped.set()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        keeper = _Keeper(federation, services, stopped, say)
        try:
            keeper.start()
            if not stopped.is_set():
                settings = federation.settings
                door = (
                    f"on {settings.listen}:{settings.port} for {settings.address}"
                    if proxy
                    else "on loopback only (--no-proxy)"
                )
                say(
                    f"{federation.name}: listening {door}; SuperLink on "
                    f"{LOOPBACK}:{settings.superlink_port}; Ctrl-C stops"
                )
                keeper.keep()
        finally:
            keeper.end()
            for number, handler in before.items():
                signal.signal(number, handler)
        say("stopped")
        return 128 + received[0]


def stop(federation: Federation) -> None:
    """End what `serve` runs, and wait for it.

    Raises:
        ConfigError: nothing runs (code `not-running`).
        RunError: it does not end (code `not-stopped`).
    """
    pid = running(federation)
    if pid is None:
        hint = "what systemd started is stopped there: systemctl stop fedqc-federation fedqc-proxy"
        raise ConfigError(f"{federation.name}: is not running", code="not-running", hint=hint)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not _wait(lambda: running(federation) is None, GRACE_S + 8):
        raise RunError(f"process {pid} does not end", code="not-stopped", hint=f"kill {pid}")


def running(federation: Federation) -> int | None:
    """The process that runs this federation's services, None if there is none. A file left behind by a crash
    does not count.
    """
    if is_locked(federation.flower_home / LOCK):
        with suppress(OSError, ValueError):
            return int((federation.state / "federation.pid").read_text(encoding="ascii"))
    return None


def preflight(federation: Federation, *, proxy: bool, say: Callable[[str], None]) -> list[Service]:
    """Everything that would keep the services from running, found before the first is started; writes the
    derived configuration.

    Raises:
        ConfigError: `no-program` (part of Flower is missing), `no-nginx`, `certificate-expired`,
            `bad-certificate`, `no-bundle`, `port-in-use` (names which), `port-not-permitted`, `bad-proxy`
            (nginx refuses the configuration), `bad-key`.
    """
    settings = federation.settings
    superlink, superexec = find_program("flower-superlink"), find_program("flower-superexec")
    find_program("flwr")
    nginx = _find_nginx() if proxy else ""
    federation.signing_key()
    federation.bundle_sha256  # noqa: B018  (raises where there is none)
    _check_days(federation, say)
    ports = {
        "superlink_port": (LOOPBACK, settings.superlink_port),
        "health_port": (LOOPBACK, settings.health_port),
    }
    ports |= {"port": (settings.listen, settings.port)} if proxy else {}
    for key, (address, port) in ports.items():
        _check_port(key, address, port)
    configure(federation)
    services = [
        Service(
            name="superlink",
            command=_superlink(federation, superlink),
            is_up=lambda: superlink_answers(federation),
        ),
        Service(name="superexec", command=_superexec(federation, superexec), is_up=lambda: True),
    ]
    if proxy:
        command = (
            nginx,
            "-e",
            "stderr",
            "-p",
            str(federation.proxy),
            "-c",
            str(federation.proxy / "nginx.conf"),
        )
        said = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=60, check=False)
        if said.returncode:
            why = " ".join(said.stderr.split())[:300]
            raise ConfigError(
                f"nginx refuses its configuration: {why}",
                code="bad-proxy",
                hint="nginx 1.20 or newer is needed",
            )
        services.append(Service(name="proxy", command=command, is_up=lambda: proxy_answers(federation)))
    return services


def superlink_answers(federation: Federation, timeout_s: float = 3.0) -> bool:
    """Whether the SuperLink of this federation is there: its health page, over TLS that our authority vouches
    for.
    """
    return _status(federation, LOOPBACK, federation.settings.superlink_port, "/health", timeout_s) == 200


def proxy_answers(federation: Federation, timeout_s: float = 3.0) -> bool:
    """Whether the proxy is there: it turns away what is not for hospitals (with 404, or 400 where it wants a
    certificate first).
    """
    listen = federation.settings.listen
    address = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(listen, listen)
    return _status(federation, address, federation.settings.port, "/", timeout_s) in (404, 400)


def reconcile(federation: Federation, say: Callable[[str], None]) -> None:
    """Tell the SuperLink of every active site's node key it does not know; take off nodes of revoked sites
    and of replaced keys.

    Raises:
        NetworkError: the SuperLink does not answer (code `no-superlink`).
        RunError: Flower refuses (code `flower`).
    """
    nodes = {int(node["node-id"]): str(node["status"]) for node in flower_nodes(federation)}
    known = {node for node, status in nodes.items() if status != _GONE}
    for enrolment in federation.sites():
        gone = {old.node_id for old in enrolment.replaced} | (
            {enrolment.node_id} if enrolment.status == "revoked" else set()
        )
        for node in sorted(node for node in gone if node in known):
            flower(federation, "supernode", "unregister", str(node), CONNECTION)
            say(f"{enrolment.site}: its node was taken off the SuperLink")
        if enrolment.status == "active" and enrolment.node_id not in known:
            node = _register(federation, enrolment.site, enrolment.request.node_key, known)
            federation.set_node(enrolment.site, enrolment.request.node_key, node)
            known.add(node)
            say(f"{enrolment.site}: its node may connect")


def flower_nodes(federation: Federation) -> list[dict[str, Any]]:
    """The SuperLink's nodes as `flwr supernode list` gives them: `node-id`, `status` (registered, online,
    offline, unregistered), times.
    """
    found: list[dict[str, Any]] = flower(federation, "supernode", "list", CONNECTION)["nodes"]
    return found


def flower(federation: Federation, *words: str) -> dict[str, Any]:
    """Flower's command line as the coordinator; its JSON answer.

    Raises:
        NetworkError: the SuperLink does not answer (code `no-superlink`).
        RunError: it refuses (code `flower`).
    """
    if not superlink_answers(federation):
        raise NetworkError(
            "the SuperLink does not answer", code="no-superlink", hint="fedqc federation start"
        )
    command = [find_program("flwr"), *words, "--format", "json"]
    said = subprocess.run(
        command, env=environment(federation), capture_output=True, text=True, timeout=120, check=False
    )
    try:
        found: dict[str, Any] = json.loads(said.stdout[said.stdout.index("{") :])
    except ValueError:
        found = {}
    if said.returncode or found.get("success") is not True:
        why = " ".join(str(found.get("error-message") or said.stderr or said.stdout).split())[:300]
        raise RunError(f"Flower: {why}", code="flower")
    return found


def environment(federation: Federation) -> Mapping[str, str]:
    """For Flower's programs: silent, with a home of their own, able to find each other, and not giving memory
    back between models.
    """
    more = {
        "FLWR_HOME": str(federation.flower_home),
        "PATH": search_path(),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": EXEC_POLL_S,
    }
    return os.environ | SILENT | KEEP_MEMORY | more


class _Keeper:
    """The children, in sessions of their own, so that Ctrl-C reaches only the one who ends them in order.

    A supervisor that is killed takes them with it, so that the next start finds the ports free.
    """

    def __init__(
        self,
        federation: Federation,
        services: list[Service],
        stopped: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        self._federation, self._services, self._stopped, self._say = federation, services, stopped, say
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        self._failures = {service.name: 0 for service in services}
        self._due = {service.name: 0.0 for service in services}
        self._enrolled: object = None  # what the SuperLink was last told
        self._telling: threading.Thread | None = None
        self._retry_at = 0.0

    def start(self) -> None:
        """One after the other, each once the one before it answers. Sites are made known before the door is
        opened.
        """
        write_bytes(self._federation.state / "federation.pid", f"{os.getpid()}\n".encode())
        for service in self._services:
            if service.name == "proxy":
                self._tell()
            self._spawn(service)
            until = time.monotonic() + UP_S
            while not service.is_up() and not self._stopped.is_set():
                if self._children[service.name].poll() is not None or time.monotonic() > until:
                    log = self._log(service.name)
                    raise RunError(
                        f"{service.name} did not come up: {_last_line(log)}",
                        code="service-failed",
                        hint=f"see {log}",
                    )
                self._stopped.wait(POLL_S)
            if self._stopped.is_set():
                return
        if all(service.name != "proxy" for service in self._services):
            self._tell()

    def keep(self) -> None:
        while not self._stopped.wait(POLL_S):
            for service in self._services:
                child = self._children.get(service.name)
                if child is not None and child.poll() is not None:
                    self._note_end(service.name, child)
                if service.name not in self._children and time.monotonic() >= self._due[service.name]:
                    self._spawn(service)
            if (
                not (self._telling and self._telling.is_alive())
                and time.monotonic() >= self._retry_at
                and self._changed()
            ):
                self._telling = threading.Thread(target=self._tell, daemon=True)
                self._telling.start()

    def end(self) -> None:
        """All at once: none can hand work to another any more. What is left after the grace is killed, with
        all it started.
        """
        for child in self._children.values():
            _signal_group(child.pid, signal.SIGTERM)
        _wait(lambda: all(child.poll() is not None for child in self._children.values()), GRACE_S)
        for child in self._children.values():
            _signal_group(child.pid, signal.SIGKILL)
            child.wait()
        for name in ("federation", *self._children):
            (self._federation.state / f"{name}.pid").unlink(missing_ok=True)

    def _spawn(self, service: Service) -> None:
        with self._log(service.name).open("ab") as log:
            child = subprocess.Popen(
                service.command,
                env=environment(self._federation),
                cwd=self._federation.state,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  (one call into a library that is loaded already)
            )
        self._children[service.name], self._began[service.name] = child, time.monotonic()
        write_bytes(self._federation.state / f"{service.name}.pid", f"{child.pid}\n".encode())

    def _note_end(self, name: str, child: subprocess.Popen[bytes]) -> None:
        del self._children[name]
        # its workers would hold the port; ServerApps watch their SuperExec and end by themselves
        if name == "proxy":
            _signal_group(child.pid, signal.SIGKILL)
        if time.monotonic() - self._began[name] >= STEADY_S:
            self._failures[name] = 0
        delay = BACK_OFF_S[min(self._failures[name], len(BACK_OFF_S) - 1)]
        self._failures[name] += 1
        self._due[name] = time.monotonic() + delay
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
        self._say(f"{name} ended with {how}; it is started again in {delay:.0f} s (see {self._log(name)})")

    def _changed(self) -> bool:
        try:
            return self._wanted() != self._enrolled
        except FedqcError as error:
            self._say(f"sites/: {error.message}")
            self._retry_at = time.monotonic() + RETRY_S
            return False

    def _wanted(self) -> object:
        return [
            (site.status, site.request.node_key, site.node_id is None) for site in self._federation.sites()
        ]

    def _tell(self) -> None:
        try:
            reconcile(self._federation, self._say)
            self._enrolled = self._wanted()
        except (FedqcError, subprocess.SubprocessError, OSError) as error:
            self._retry_at = time.monotonic() + RETRY_S
            self._say(
                f"the SuperLink could not be told who is enrolled, trying again in {RETRY_S:.0f} s: {error}"
            )

    def _log(self, name: str) -> Path:
        return self._federation.state / f"{name}.log"


def _superlink(federation: Federation, program: str) -> tuple[str, ...]:
    settings = federation.settings
    return (
        program,
        *("--host", LOOPBACK, "--port", str(settings.superlink_port)),
        *("--ssl-ca-certfile", str(federation.ca_certificate)),
        *("--ssl-certfile", str(federation.server_certificate), "--ssl-keyfile", str(federation.server_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(federation.superexec_secret)),
        "--enable-supernode-auth",
        *("--database", str(federation.state / "superlink.db")),
        "--disable-runtime-dependency-installation",
        *("--health-server-address", f"{LOOPBACK}:{settings.health_port}"),
    )


def _superexec(federation: Federation, program: str) -> tuple[str, ...]:
    return (
        program,
        *("--runtime-api-address", f"{LOOPBACK}:{federation.settings.superlink_port}"),
        *("--root-certificates", str(federation.ca_certificate)),
        *("--superexec-auth-secret-file", str(federation.superexec_secret)),
    )


def _register(federation: Federation, site: str, node_key: str, known: set[int]) -> int:
    """Make a key known; gives the node's number. `known` are the nodes that the SuperLink has."""
    with tempfile.NamedTemporaryFile("w", suffix=".pub", dir=federation.state) as file:
        file.write(f"{node_key}\n")
        file.flush()
        try:
            return int(
                flower(federation, "supernode", "register", file.name, CONNECTION, "--name", site)["node-id"]
            )
        except RunError as error:
            # A stop between registering and writing it down leaves a node that no site's file names. Flower
            # lists nodes without their keys, but sites are registered one by one, so that there is at most
            # one such node.
            sites = federation.sites()
            strays = (
                known
                - {site.node_id for site in sites}
                - {old.node_id for site in sites for old in site.replaced}
            )
            if "already in use" not in error.message or len(strays) != 1:
                raise
            return strays.pop()


@contextmanager
def _only_one(federation: Federation) -> Iterator[None]:
    """Flower's home and the database belong to one process at a time.

    Raises:
        ConfigError: another has them (code `already-running`).
    """

    def busy() -> ConfigError:
        who = f"process {running(federation)}" if running(federation) else "another process"
        hint = "fedqc federation stop; a second federation needs a folder of its own"
        return ConfigError(f"{federation.flower_home}: is used by {who}", code="already-running", hint=hint)

    with locked(federation.flower_home / LOCK, busy=busy):
        yield


def _check_days(federation: Federation, say: Callable[[str], None]) -> None:
    days = federation.certificate_days()
    if days < 0:
        raise ConfigError(
            f"{federation.server_certificate}: has run out",
            code="certificate-expired",
            hint="fedqc federation renew",
        )
    if days <= WARN_DAYS:
        say(f"the server's certificate lasts {days} more days: fedqc federation renew")


def _check_port(key: str, address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            hint = "a port above 1023, or the unit in systemd/ that may take it"
            raise ConfigError(
                f"{key}: {address}:{port} is not permitted to this user", code="port-not-permitted", hint=hint
            ) from None
        except OSError as error:
            hint = f"end what uses it, or change {key} in federation.yaml"
            raise ConfigError(
                f"{key}: {address}:{port} cannot be used ({error.strerror})", code="port-in-use", hint=hint
            ) from None


def _find_nginx() -> str:
    found = shutil.which(
        "nginx", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
    )
    if found is None:
        hint = "apt install nginx (its own service need not run), or --no-proxy if the proxy runs elsewhere"
        raise ConfigError("nginx: no such program", code="no-nginx", hint=hint)
    return found


def _status(federation: Federation, host: str, port: int, path: str, timeout_s: float) -> int | None:
    """HTTP status of a GET over TLS, None where nobody answers whom our authority vouches for."""
    context = ssl.create_default_context(cafile=str(federation.ca_certificate))
    context.check_hostname = False  # an address to listen on need not be one of the certificate's names
    connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _wait(is_done: Callable[[], bool], limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not (done := is_done()) and time.monotonic() < until:
        time.sleep(0.05)
    return done


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"
    return "it said nothing"
