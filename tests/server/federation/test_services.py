"""The coordinator's services: nothing starts that would not run, what ends is started again, and all of them
end together.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import FedqcError, RunError
from server.federation import services
from server.federation.configure import configure, renew_server_certificate
from server.federation.registry import Federation, approve, revoke
from server.federation.services import (
    Service,
    environment,
    flower,
    preflight,
    reconcile,
    running,
    serve,
    superlink_answers,
)
from tests.helpers.command_line import ROOT
from tests.helpers.enrolment import a_request
from tests.helpers.quick_federation import quick_federation

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin") is None,
    reason="nginx is not installed",
)
SLEEP = (sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)")


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    return quick_federation(tmp_path / "fed", monkeypatch)


def quiet(_: str) -> None:
    pass


def refused(code: str, call: Callable[..., object], *words: object, **more: object) -> FedqcError:
    with pytest.raises(FedqcError) as caught:
        call(*words, **more)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value


# ---- before anything starts


@needs_nginx
def test_a_sound_federation_passes(federation: Federation) -> None:
    found = preflight(federation, proxy=True, say=quiet)
    assert [service.name for service in found] == ["superlink", "superexec", "proxy"]
    assert [service.name for service in preflight(federation, proxy=False, say=quiet)] == [
        "superlink",
        "superexec",
    ]


@pytest.mark.parametrize("key", ["port", "superlink_port", "health_port"])
@needs_nginx
def test_a_port_in_use_is_named(federation: Federation, key: str) -> None:
    port = getattr(federation.settings, key)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        error = refused("port-in-use", preflight, federation, proxy=True, say=quiet)
    assert key in error.hint
    assert f"{key}: 127.0.0.1:{port}" in error.message
    preflight(federation, proxy=True, say=quiet)


@pytest.mark.parametrize("name", ["flower-superexec", "flower-superlink", "flwr"])
def test_a_missing_part_of_flower_is_named(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda program, **more: None if program == name else which(program, **more)
    )
    assert name in refused("no-program", preflight, federation, proxy=False, say=quiet).message


def test_a_missing_nginx_says_how_to_get_it(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda program, **more: None if program == "nginx" else which(program, **more)
    )
    assert "apt install nginx" in refused("no-nginx", preflight, federation, proxy=True, say=quiet).hint
    preflight(federation, proxy=False, say=quiet)


def test_a_certificate_that_ran_out_is_refused_and_one_that_will_is_told(federation: Federation) -> None:
    renew_server_certificate(federation, days=0)
    assert "renew" in refused("certificate-expired", preflight, federation, proxy=False, say=quiet).hint
    renew_server_certificate(federation, days=20)
    told: list[str] = []
    preflight(federation, proxy=False, say=told.append)
    assert any("expires in 19 days" in line for line in told)
    renew_server_certificate(federation)
    told.clear()
    preflight(federation, proxy=False, say=told.append)
    assert told == []


def test_damaged_parts_are_refused(federation: Federation) -> None:
    federation.server_certificate.write_text("no certificate")
    refused("bad-certificate", preflight, federation, proxy=False, say=quiet)
    renew_server_certificate(federation)
    (federation.folder / "bundle.sha256").unlink()
    refused("no-bundle", preflight, federation, proxy=False, say=quiet)
    (federation.folder / "bundle.sha256").write_text("0" * 64)
    federation.coordinator_key.chmod(0o644)
    refused("bad-key", preflight, federation, proxy=False, say=quiet)


@needs_nginx
def test_a_configuration_that_nginx_refuses_is_told_before_the_start(federation: Federation) -> None:
    federation.server_key.write_text("no key")
    refused("bad-proxy", preflight, federation, proxy=True, say=quiet)


def test_the_superlink_is_closed_to_others(federation: Federation) -> None:
    superlink, superexec = preflight(federation, proxy=False, say=quiet)
    words = superlink.command
    for option, value in {
        "--host": "127.0.0.1",
        "--isolation": "process",
        "--superexec-auth-secret-file": str(federation.superexec_secret),
        "--database": str(federation.state / "superlink.db"),
    }.items():
        assert words[words.index(option) + 1] == value
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(words)
    assert "--insecure" not in words
    assert "--insecure" not in superexec.command


def test_flower_s_programs_are_silent_and_find_each_other(federation: Federation) -> None:
    found = environment(federation)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert found["FLWR_HOME"] == str(federation.flower_home)
    assert float(found["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]) < 1


def test_flower_is_not_started_for_a_superlink_that_is_not_there(federation: Federation) -> None:
    assert not superlink_answers(federation)
    refused("no-superlink", flower, federation, "supernode", "list", "fedqc")


# ---- while they run


@pytest.fixture
def supervised(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def run(*wanted: Service) -> Running:
        monkeypatch.setattr(services, "preflight", lambda *words, **more: list(wanted))
        monkeypatch.setattr(services, "reconcile", lambda *words: None)
        monkeypatch.setattr(services, "BACK_OFF_S", (0.0, 0.0))
        started.append(Running(federation))
        return started[-1]

    yield run
    for one in started:
        one.end()


class Running:
    """`serve` in a thread of its own: signals are for the main thread, so it is stopped by its event."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.told, self.error = federation, [], None  # type: ignore[var-annotated]
        self._stopped = threading.Event()
        self._keeper: Any = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        wanted = services.preflight(self.federation, proxy=True, say=self.told.append)
        self._keeper = services._Keeper(self.federation, wanted, self._stopped, self.told.append)
        try:
            self._keeper.start()
            self._keeper.keep()
        except FedqcError as error:
            self.error = error  # type: ignore[assignment]
        finally:
            self._keeper.end()

    def pid(self, name: str) -> int:
        path = self.federation.state / f"{name}.pid"
        until(path.is_file)
        return int(path.read_text())

    def end(self) -> None:
        self._stopped.set()
        self._thread.join(30)


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(600):
        with suppress(OSError, ValueError):
            if is_true():
                return
        time.sleep(0.05)
    pytest.fail("it never happened")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def up() -> bool:
    return True


def test_what_ends_is_started_again(supervised: Callable[..., Running]) -> None:
    run = supervised(
        Service(name="superlink", command=SLEEP, is_up=up), Service(name="superexec", command=SLEEP, is_up=up)
    )
    first, other = run.pid("superlink"), run.pid("superexec")
    for _ in range(3):
        os.kill(first, signal.SIGKILL)
        until(lambda old=first: run.pid("superlink") != old and alive(run.pid("superlink")))  # type: ignore[misc]
        first = run.pid("superlink")
    assert run.pid("superexec") == other
    assert sum("superlink ended with signal 9" in line for line in run.told) == 3


def test_all_end_together_even_one_that_will_not(
    supervised: Callable[..., Running], federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "GRACE_S", 0.5)
    stubborn = (
        "import os,signal,time; signal.signal(15, signal.SIG_IGN); os.fork(); print('here', "
        "flush=True); time.sleep(600)"
    )
    run = supervised(
        Service(name="superlink", command=SLEEP, is_up=up),
        Service(name="superexec", command=(sys.executable, "-c", stubborn), is_up=up),
    )
    pids = [run.pid("superlink"), run.pid("superexec")]
    log = federation.state / "superexec.log"
    until(lambda: log.read_text().count("here") == 2)
    group = pids[1]
    run.end()
    assert not any(alive(pid) for pid in pids)
    until(lambda: not _members(group))
    assert list(federation.state.glob("*.pid")) == []


def _members(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


def test_a_service_that_does_not_come_up_ends_the_start_and_says_why(
    supervised: Callable[..., Running],
) -> None:
    broken = (sys.executable, "-c", "raise SystemExit('the database is locked')")
    run = supervised(
        Service(name="superlink", command=SLEEP, is_up=up),
        Service(name="superexec", command=broken, is_up=lambda: False),
    )
    first = run.pid("superlink")
    until(lambda: run.error is not None)
    assert run.error.code == "service-failed"
    assert "the database is locked" in run.error.message
    until(lambda: not alive(first))


def test_a_supervisor_that_is_killed_takes_its_services_along(federation: Federation) -> None:
    """Otherwise the next start would find the ports in use, by nobody."""
    script = f"""
import sys, threading
from pathlib import Path
from server.federation import services
from server.federation.registry import Federation
services.reconcile = lambda *words: None
wanted = [services.Service(name="superlink", command={SLEEP!r}, is_up=lambda: True)]
keeper = services._Keeper(Federation.open(Path({str(federation.folder)!r})), wanted, threading.Event(), print)
keeper.start()
keeper.keep()
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        path = federation.state / "superlink.pid"
        until(lambda: alive(int(path.read_text())))
        pid = int(path.read_text())
        until(lambda: "here" in (federation.state / "superlink.log").read_text())
    finally:
        supervisor.kill()
        supervisor.wait(10)
    until(lambda: not alive(pid))


def test_a_second_start_is_refused_and_a_crash_leaves_no_lock(federation: Federation) -> None:
    (federation.state / "federation.pid").write_text(f"{os.getpid()}\n")  # left behind by a crash
    assert running(federation) is None
    with services._only_one(federation):
        assert running(federation) == os.getpid()
        error = refused("already-running", serve, federation, say=quiet)
        assert str(os.getpid()) in error.message
    assert running(federation) is None
    refused("not-running", services.stop, federation)


# ---- who may connect


class FakeSuperLink:
    """`flwr supernode list | register | unregister` as Flower 1.41 answers them."""

    def __init__(self) -> None:
        self.nodes: dict[int, tuple[str, str]] = {}
        self.asked: list[str] = []

    def __call__(self, federation: Federation, *words: str) -> dict[str, Any]:
        self.asked.append(words[1])
        match words[1]:
            case "list":
                return {
                    "success": True,
                    "nodes": [
                        {"node-id": str(node), "status": status} for node, (_, status) in self.nodes.items()
                    ],
                }
            case "register":
                key = Path(words[2]).read_text()
                if key in {known for known, _ in self.nodes.values()}:  # a key that was unregistered included
                    raise RunError("Flower: [code: 23] Public key already in use.", code="flower")
                node = (1 << 63) + len(self.nodes)
                self.nodes[node] = (key, "registered")
                return {"success": True, "node-id": node}
            case "unregister":
                self.nodes[int(words[2])] = (self.nodes[int(words[2])][0], "unregistered")
                return {"success": True}
        raise AssertionError(words)

    def status_of(self, key: str) -> str | None:
        return next((status for known, status in self.nodes.values() if known == f"{key}\n"), None)


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> FakeSuperLink:
    fake = FakeSuperLink()
    monkeypatch.setattr(services, "flower", fake)
    return fake


def test_every_active_site_is_registered_once(federation: Federation, superlink: FakeSuperLink) -> None:
    requests = [a_request(f"hospital-{letter}") for letter in "abc"]
    for request in requests:
        approve(federation, request)
    reconcile(federation, quiet)
    assert {superlink.status_of(request.node_key) for request in requests} == {"registered"}
    assert {enrolment.node_id for enrolment in federation.sites()} == set(superlink.nodes)
    superlink.asked.clear()
    reconcile(federation, quiet)
    assert superlink.asked == ["list"]


def test_a_revoked_site_is_taken_off_and_its_new_keys_are_let_in(
    federation: Federation, superlink: FakeSuperLink
) -> None:
    old, other, new = a_request("hospital-a"), a_request("hospital-b"), a_request("hospital-a")
    approve(federation, old)
    approve(federation, other)
    reconcile(federation, quiet)
    revoke(federation, "hospital-a")
    reconcile(federation, quiet)
    assert [superlink.status_of(key.node_key) for key in (old, other)] == ["unregistered", "registered"]
    approve(federation, new)
    reconcile(federation, quiet)
    assert [superlink.status_of(key.node_key) for key in (old, other, new)] == [
        "unregistered",
        "registered",
        "registered",
    ]


def test_new_keys_before_the_superlink_heard_of_the_end_of_the_old(
    federation: Federation, superlink: FakeSuperLink
) -> None:
    """Revoked and approved anew while the services were down."""
    old, new = a_request("hospital-a"), a_request("hospital-a")
    approve(federation, old)
    reconcile(federation, quiet)
    revoke(federation, "hospital-a")
    approve(federation, new)
    reconcile(federation, quiet)
    assert [superlink.status_of(key.node_key) for key in (old, new)] == ["unregistered", "registered"]


def test_a_site_revoked_before_it_was_ever_registered_never_is(
    federation: Federation, superlink: FakeSuperLink
) -> None:
    approve(federation, a_request("hospital-a"))
    revoke(federation, "hospital-a")
    reconcile(federation, quiet)
    assert superlink.nodes == {}


def test_a_lost_database_is_filled_again(federation: Federation, superlink: FakeSuperLink) -> None:
    request = a_request("hospital-a")
    approve(federation, request)
    reconcile(federation, quiet)
    superlink.nodes.clear()
    reconcile(federation, quiet)
    assert superlink.status_of(request.node_key) == "registered"


def test_a_stop_between_registering_and_noting_it_is_made_good(
    federation: Federation, superlink: FakeSuperLink
) -> None:
    first, second = a_request("hospital-a"), a_request("hospital-b")
    approve(federation, first)
    reconcile(federation, quiet)
    approve(federation, second)
    superlink.nodes[77] = (f"{second.node_key}\n", "registered")
    reconcile(federation, quiet)
    assert federation.site("hospital-b").node_id == 77


def test_nodes_that_cannot_be_told_apart_are_not_guessed(
    federation: Federation, superlink: FakeSuperLink
) -> None:
    request = a_request("hospital-a")
    approve(federation, request)
    superlink.nodes |= {77: (f"{request.node_key}\n", "registered"), 78: ("another's\n", "registered")}
    with pytest.raises(RunError):
        reconcile(federation, quiet)
    assert federation.site("hospital-a").node_id is None


def test_the_derived_files_follow_the_settings_and_the_folder(federation: Federation, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    federation.folder.rename(moved)
    path = moved / "federation.yaml"
    path.write_text(path.read_text().replace(f"port: {federation.settings.port}\n", "port: 9443\n", 1))
    again = Federation.open(moved)
    configure(again)
    texts = [
        (moved / name).read_text()
        for name in ("proxy/nginx.conf", "flwr/config.toml", "systemd/fedqc-proxy.service")
    ]
    assert all(str(moved) in text and str(federation.folder) not in text for text in texts)
    assert "listen 127.0.0.1:9443 ssl;" in texts[0]
