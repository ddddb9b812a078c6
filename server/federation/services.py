"""Run the coordinator's services as child processes: `fedqc federation start` and `stop`.

    proxy      nginx, the only service that others can reach
    superlink  Flower's server, on loopback, with TLS; gives tasks only to clients that know its secret
    superexec  starts the ServerApp of a run

Enrolled sites are registered at the SuperLink and revoked sites are removed from it: at the start, and
whenever sites/ changes.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import SILENT
from common.errors import ConfigError, FedqcError, NetworkError, RunError
from common.files import is_locked, locked, rotate, sweep, write_bytes
from common.processes import LOOPBACK, Child, Ended, Supervisor, port_error, stop_requests, wait_for
from common.progress_bar import speaking
from server.federation.certificates import WARN_DAYS
from server.federation.configure import configure
from server.federation.flower_app import find_program, search_path
from server.federation.registry import CONNECTION, Federation

POLL_S = 0.2
UP_S = 90.0
"""How long a service may take to come up: Flower's imports on a busy machine."""
GRACE_S = 7.0
LEFTOVER_S = 30.0
"""How long services whose `federation start` was killed may take to end: they notice it at once."""
BACK_OFF_S = (1.0, 2.0, 5.0, 15.0, 30.0)
STEADY_S = 60.0
"""A service that ran this long is restarted without a longer delay."""
LOOK_AT_LOGS_S = 1.0
"""A log may outgrow its limit by what is written in this time."""
RETRY_S = 15.0
"""Between two attempts to register sites at the SuperLink."""
FLOWER_S = 120.0
"""How long a command of Flower may take; on a busy machine its imports alone take ten seconds."""
EXEC_POLL_S = "0.5"
"""How often SuperExec asks the SuperLink for a run to start; each request costs both about 10 ms of CPU."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(128 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""For glibc: reuse memory between models; fresh pages from the kernel cost a tenth of a round's CPU."""
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
        proxy: whether to start nginx, which systemd does otherwise.
    Returns:
        143 or 130 after a signal.
    Raises:
        ConfigError: see `preflight`; nothing was started.
        RunError: a service did not come up (code `service-failed`); the others were ended.
    """
    with _only_one(federation):
        sweep(federation.state)
        services = preflight(federation, proxy=proxy, say=say)
        with stop_requests() as request:
            keeper = _Keeper(federation, services, request.event, say)
            try:
                with speaking(f"starting {', '.join(service.name for service in services)}", say):
                    keeper.start()
                if not request.event.is_set():
                    settings = federation.settings
                    where = (
                        f"on {settings.listen}:{settings.port} for {settings.address}"
                        if proxy
                        else "on loopback only (--no-proxy)"
                    )
                    say(
                        f"{federation.name}: listening {where}; SuperLink on "
                        f"{LOOPBACK}:{settings.superlink_port}; Ctrl-C stops"
                    )
                    keeper.keep()
            finally:
                keeper.end()
        say("stopped")
        return 128 + (request.number or 0)


def stop(federation: Federation) -> None:
    """End what `serve` runs, and wait for its end.

    Raises:
        ConfigError: it is not running (code `not-running`).
        RunError: it does not end (code `not-stopped`).
    """
    pid = running(federation)
    if pid is None:
        hint = "under systemd: systemctl stop fedqc-federation fedqc-proxy"
        raise ConfigError(
            f"{federation.name}: is not running under `fedqc federation start`", code="not-running", hint=hint
        )
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not wait_for(lambda: running(federation) is None, GRACE_S + 8):
        raise RunError(f"process {pid} does not end", code="not-stopped", hint=f"kill {pid}")


def running(federation: Federation) -> int | None:
    """Number of the process that runs this federation's services, None if there is none. A file left by a
    crash does not count.
    """
    if is_locked(federation.flower_home / LOCK):
        with suppress(OSError, ValueError):
            return int((federation.state / "federation.pid").read_text(encoding="ascii"))
    return None


def preflight(federation: Federation, *, proxy: bool, say: Callable[[str], None]) -> list[Service]:
    """Check all that the services need before the first is started, and write the derived configuration.

    Returns:
        the services in the order of their start.
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
    if (federation.state / "federation.pid").exists():  # a start was killed, and its services are ending
        _await_ports(ports.values(), say)
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
        test = subprocess.run(
            [*command, "-t"], capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False
        )
        if test.returncode:
            why = " ".join(test.stderr.split())[:300]
            raise ConfigError(
                f"nginx refuses its configuration: {why}",
                code="bad-proxy",
                hint="nginx 1.20 or newer is needed",
            )
        services.append(Service(name="proxy", command=command, is_up=lambda: proxy_answers(federation)))
    return services


def logs(federation: Federation) -> list[Path]:
    """Every log that a service writes; `serve` caps the size of each."""
    return [*federation.state.glob("*.log"), *federation.proxy.glob("*.log")]


def superlink_answers(federation: Federation, timeout_s: float = 3.0) -> bool:
    """Whether the SuperLink of this federation answers: its health page, over TLS with a certificate of this
    federation's authority.
    """
    return _status(federation, LOOPBACK, federation.settings.superlink_port, "/health", timeout_s) == 200


def proxy_answers(federation: Federation, timeout_s: float = 3.0) -> bool:
    """Whether the proxy answers: 404 for a path that is not for hospitals, 400 where it asks for a client
    certificate first.
    """
    listen = federation.settings.listen
    address = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(listen, listen)
    return _status(federation, address, federation.settings.port, "/", timeout_s) in (404, 400)


def reconcile(federation: Federation, say: Callable[[str], None]) -> None:
    """Register node keys of active sites that the SuperLink does not know; remove the nodes of revoked sites
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
            say(f"{enrolment.site}: its node was removed from the SuperLink")
        if enrolment.status == "active" and enrolment.node_id not in known:
            node = _register(federation, enrolment.site, enrolment.request.node_key, known)
            federation.set_node(enrolment.site, enrolment.request.node_key, node)
            known.add(node)
            say(f"{enrolment.site}: its node may connect")


def flower_nodes(federation: Federation) -> list[dict[str, Any]]:
    """The SuperLink's nodes as `flwr supernode list` gives them: `node-id`, `status` (registered, online,
    offline, unregistered), times.
    """
    nodes: list[dict[str, Any]] = flower(federation, "supernode", "list", CONNECTION)["nodes"]
    return nodes


def flower(federation: Federation, *words: str) -> dict[str, Any]:
    """Run Flower's command line as the coordinator; gives its JSON answer.

    Raises:
        NetworkError: the SuperLink does not answer (code `no-superlink`).
        RunError: it refuses (code `flower`).
    """
    if not superlink_answers(federation):
        raise NetworkError(
            "the SuperLink does not answer", code="no-superlink", hint="fedqc federation start"
        )
    command = [find_program("flwr"), *words, "--format", "json"]
    try:
        result = subprocess.run(
            command,
            env=environment(federation),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=FLOWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NetworkError(
            f"the SuperLink gave no answer in {FLOWER_S:g} s",
            code="no-superlink",
            hint="read state/superlink.log; stop and start the services, then again",
        ) from None
    try:
        answer: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])
    except ValueError:
        answer = {}
    if result.returncode or answer.get("success") is not True:
        why = " ".join(str(answer.get("error-message") or result.stderr or result.stdout).split())[:300]
        raise RunError(f"Flower: {why}", code="flower")
    return answer


def environment(federation: Federation) -> Mapping[str, str]:
    """Environment of Flower's programs: no telemetry, their own home, this environment's programs first on
    PATH, memory reused between models.
    """
    more = {
        "FLWR_HOME": str(federation.flower_home),
        "PATH": search_path(),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": EXEC_POLL_S,
    }
    return os.environ | SILENT | KEEP_MEMORY | more


class _Keeper:
    """The services as child processes, and the list of enrolled sites that the SuperLink was given."""

    def __init__(
        self,
        federation: Federation,
        services: Sequence[Service],
        stopped: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        self._federation, self._services, self._stopped, self._say = federation, services, stopped, say
        self._supervisor = Supervisor(
            [self._child(service) for service in services],
            on_end=self._report_end,
            on_change=self._write_pids,
            steady_s=STEADY_S,
        )
        self._reconciled: object = None  # the enrolments that the SuperLink knows
        self._reconciling: threading.Thread | None = None
        self._retry_at = self._logs_at = 0.0

    def start(self) -> None:
        """Start one service after the other, each once the one before it answers. Sites are registered before
        the proxy opens its port.

        Raises:
            RunError: a service did not come up (code `service-failed`).
        """
        write_bytes(self._federation.state / "federation.pid", f"{os.getpid()}\n".encode())
        for service in self._services:
            if service.name == "proxy":
                self._reconcile()
            self._supervisor.start(service.name)
            until = time.monotonic() + UP_S
            while not service.is_up() and not self._stopped.is_set():
                if self._supervisor.has_ended(service.name) or time.monotonic() > until:
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
            self._reconcile()

    def keep(self) -> None:
        """Restart what ends, and register sites at the SuperLink when sites/ changes, until stopped."""
        while not self._stopped.wait(POLL_S):
            self._supervisor.tend()
            if time.monotonic() >= self._logs_at:
                self._logs_at = time.monotonic() + LOOK_AT_LOGS_S
                for log in logs(self._federation):
                    rotate(log)
            if (
                not (self._reconciling and self._reconciling.is_alive())
                and time.monotonic() >= self._retry_at
                and self._enrolment_changed()
            ):
                self._reconciling = threading.Thread(target=self._reconcile, daemon=True)
                self._reconciling.start()

    def end(self) -> None:
        """End all services at once. After the grace period kill them and all that they started."""
        self._supervisor.end(GRACE_S)
        for name in ("federation", *(service.name for service in self._services)):
            (self._federation.state / f"{name}.pid").unlink(missing_ok=True)

    def _child(self, service: Service) -> Child:
        return Child(
            name=service.name,
            command=service.command,
            back_off_s=BACK_OFF_S,
            environment=environment(self._federation),
            folder=self._federation.state,
            log=self._log(service.name),
            signals_group=True,
            # nginx's workers would hold the port; ServerApps watch their SuperExec and end by themselves
            takes_group_along=service.name == "proxy",
        )

    def _report_end(self, ended: Ended) -> None:
        name = ended.child.name
        self._say(
            f"{name} ended with {ended.how}; restarting in {ended.delay_s:.0f} s (see {self._log(name)})"
        )

    def _write_pids(self, children: Mapping[str, int]) -> None:
        with suppress(OSError):  # a full disk stops no service
            for name, pid in children.items():
                write_bytes(self._federation.state / f"{name}.pid", f"{pid}\n".encode())

    def _enrolment_changed(self) -> bool:
        try:
            return self._enrolment() != self._reconciled
        except FedqcError as error:
            self._say(f"sites/: {error.message}")
            self._retry_at = time.monotonic() + RETRY_S
            return False

    def _enrolment(self) -> object:
        return [
            (site.status, site.request.node_key, site.node_id is None) for site in self._federation.sites()
        ]

    def _reconcile(self) -> None:
        try:
            reconcile(self._federation, self._say)
            self._reconciled = self._enrolment()
        except (FedqcError, subprocess.SubprocessError, OSError) as error:
            self._retry_at = time.monotonic() + RETRY_S
            self._say(f"sites could not be registered at the SuperLink, retry in {RETRY_S:.0f} s: {error}")

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
    """Register a node's key and return the node's number. `known` are the nodes that the SuperLink has."""
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
        return ConfigError(f"{federation.flower_home}: is in use by {who}", code="already-running", hint=hint)

    with locked(federation.flower_home / LOCK, busy=busy):
        yield


def _check_days(federation: Federation, say: Callable[[str], None]) -> None:
    days = federation.certificate_days()
    if days < 0:
        raise ConfigError(
            f"{federation.server_certificate}: has expired",
            code="certificate-expired",
            hint="fedqc federation renew",
        )
    if days <= WARN_DAYS:
        say(f"the server's certificate expires in {days} days: fedqc federation renew")


def _await_ports(ports: Collection[tuple[str, int]], say: Callable[[str], None]) -> None:
    """Wait until no service of an earlier start holds a port, for at most `LEFTOVER_S`."""

    def is_free() -> bool:
        return all(port_error(address, port) is None for address, port in ports)

    if not is_free():
        say(f"waiting for the services of a start that was killed to end, for at most {LEFTOVER_S:.0f} s")
        wait_for(is_free, LEFTOVER_S)


def _check_port(key: str, address: str, port: int) -> None:
    error = port_error(address, port)
    if isinstance(error, PermissionError):
        hint = "use a port above 1023, or the unit in systemd/, which has the permission"
        raise ConfigError(
            f"{key}: {address}:{port} is not permitted to this user", code="port-not-permitted", hint=hint
        )
    if error is not None:
        hint = f"stop the program that uses it, or change {key} in federation.yaml"
        raise ConfigError(
            f"{key}: {address}:{port} cannot be used ({error.strerror})", code="port-in-use", hint=hint
        )


def _find_nginx() -> str:
    path = shutil.which(
        "nginx", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
    )
    if path is None:
        hint = "apt install nginx (its own service need not run), or --no-proxy if the proxy runs elsewhere"
        raise ConfigError("nginx: program not found", code="no-nginx", hint=hint)
    return path


def _status(federation: Federation, host: str, port: int, path: str, timeout_s: float) -> int | None:
    """HTTP status of a GET over TLS, None without an answer under a certificate of this federation's
    authority.
    """
    context = ssl.create_default_context(cafile=str(federation.ca_certificate))
    context.check_hostname = False  # the listening address need not be one of the certificate's names
    connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "no output"
    return "no output"
