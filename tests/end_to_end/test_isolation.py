"""The wall inside a hospital: the agent has the data and no network, the node has the network and no data.

Each trial is made where the real process lives (inside the agent's own network namespace; in a child of the
real node), and made again with the wall down, where it must succeed: so a trial that could never succeed
proves nothing here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from client.supervision.supervisor import state_of
from tests.helpers.rig import LIMIT_S, Deployment, descendants, wait_until

pytestmark = [
    pytest.mark.skipif(
        shutil.which("nsenter") is None, reason="nsenter is not installed: nobody can look into a namespace"
    ),
]

SITE = "hospital-a"

# Tries to reach every address it is given on stdin; says of each whether it was reached, else the error.
NETWORK_PROBE = """
import json, socket, sys
said = {}
for name, family, kind, address in json.load(sys.stdin):
    where = "\\0" + address if family == "AF_UNIX" else tuple(address)
    try:
        with socket.socket(getattr(socket, family), getattr(socket, kind)) as probe:
            probe.settimeout(5)
            probe.connect(where)
            probe.send(b"hello")
            said[name] = "reached" if probe.recv(5) == b"hello" else "no echo"
    except OSError as error:
        said[name] = type(error).__name__ + f" {error.errno}"
print(json.dumps(said))
"""

# Stands in for the SuperNode, so it is a child of the node. Tries to open every file and list every folder
# that probe.json names, directly and by what else leads there; writes what it found out to answer.json.
FILE_PROBE = """
import errno, json, os, subprocess, sys
from pathlib import Path
node = Path(sys.argv[1])

def attempt(work):
    try:
        return work() or "opened"
    except OSError as error:
        return "denied" if error.errno in (errno.EACCES, errno.EPERM, errno.EXDEV) else repr(error)

def through_link(path):
    link = node / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    link.read_bytes()

def hard_link(path):
    other = node / "other"
    other.unlink(missing_ok=True)
    os.link(path, other)
    other.read_bytes()

def by_program(path):
    return "opened" if subprocess.run(["cat", path], capture_output=True).returncode == 0 else "denied"

wanted = json.loads((node / "probe.json").read_text())
said = {path: attempt(lambda: os.listdir(path) and None) for path in wanted["folders"]}
said |= {path: attempt(lambda: open(path, "rb").close()) for path in wanted["files"]}
one = wanted["files"][0]
said |= {"symbolic link": attempt(lambda: through_link(one)), "hard link": attempt(lambda: hard_link(one))}
said |= {"another program": attempt(lambda: by_program(one))}
said |= {"another root": attempt(lambda: open("/proc/self/root" + one, "rb").close())}
said |= {"a new file": attempt(lambda: open(wanted["new"], "wb").close())}
other = "/proc/%d/" % wanted["other"]
said |= {"the root of another": attempt(lambda: open(other + "root" + one, "rb").close())}
said |= {"the memory of another": attempt(lambda: open(other + "mem", "rb").close())}
said |= {"a file of another": attempt(lambda: open(other + "fd/%d" % wanted["fd"], "rb").close())}
(node / "answer.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One hospital that has joined. The coordinator's services are not needed: neither wall waits for
    them.
    """
    with Deployment(tmp_path_factory.mktemp("wall"), sites=1, running=False) as made:
        made.make_data()
        made.init()
        made.enrol(SITE)
        yield made


# ---- the agent has no network


@pytest.fixture(scope="module")
def listeners() -> Iterator[list[list[Any]]]:
    """What really answers on this machine: TCP and UDP on both loopbacks and on the machine's own addresses,
    and an abstract socket.
    """
    with ExitStack() as stack:
        targets = []
        for family, address in [
            ("AF_INET", "127.0.0.1"),
            ("AF_INET6", "::1"),
            *(("AF_INET", own) for own in own_addresses()),
        ]:
            for kind in ("SOCK_STREAM", "SOCK_DGRAM"):
                try:
                    port = stack.enter_context(echo(family, kind, (address, 0)))[1]
                except OSError:
                    continue  # this machine has no such family
                targets.append([f"{kind} {address}", family, kind, [address, port]])
        name = f"fedqc-wall-{os.getpid()}"
        stack.enter_context(echo("AF_UNIX", "SOCK_STREAM", f"\0{name}"))
        targets.append(["abstract socket", "AF_UNIX", "SOCK_STREAM", name])
        yield targets


@contextmanager
def echo(family: str, kind: str, address: Any) -> Iterator[Any]:
    """A socket that sends back what it gets; yields its address."""
    server = socket.socket(getattr(socket, family), getattr(socket, kind))

    def serve() -> None:
        while True:
            try:
                if kind == "SOCK_DGRAM":
                    content, sender = server.recvfrom(64)
                    if sender is None:  # it was shut down
                        return
                    server.sendto(content, sender)
                else:
                    caller, _ = server.accept()
                    with caller:
                        caller.sendall(caller.recv(64))
            except OSError:
                return

    try:
        server.bind(address)
        if kind == "SOCK_STREAM":
            server.listen()
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()
    finally:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()


def own_addresses() -> list[str]:
    """This machine's addresses besides loopback; none is needed for the test to mean something."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return []
        return [probe.getsockname()[0]]


def try_network(targets: list[list[Any]], inside: int | None) -> dict[str, str]:
    """Try to reach `targets` from here, or from inside the network of process `inside`."""
    prefix: list[str] = []
    if inside is not None:
        prefix = ["nsenter", "-t", str(inside), "-n"]
        if os.readlink(f"/proc/{inside}/ns/user") != os.readlink("/proc/self/ns/user"):
            prefix += ["-U", "--preserve-credentials"]
    said = subprocess.run(
        [*prefix, sys.executable, "-c", NETWORK_PROBE],
        input=json.dumps(targets),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    found: dict[str, str] = json.loads(said.stdout)
    return found


def agent_pid(deployment: Deployment) -> int:
    site = deployment.site(SITE)
    wait_until(lambda: state_of(site)["agent"], LIMIT_S, "the agent answers", deployment.tails)
    return int(json.loads((site / "run" / "agent.json").read_text(encoding="utf-8"))["pid"])


def test_the_agent_reaches_no_address(deployment: Deployment, listeners: list[list[Any]]) -> None:
    assert set(try_network(listeners, inside=None).values()) == {"reached"}
    deployment.start_site(SITE, only="agent")
    try:
        pid = agent_pid(deployment)
        note = json.loads((deployment.site(SITE) / "run" / "agent.json").read_text(encoding="utf-8"))
        if not note["holds"]:
            pytest.skip(
                f"this system lets nobody give up the network, and the agent says so: {note['isolation']}"
            )
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        found = try_network(listeners, inside=pid)
        assert found.keys() == {name for name, *_ in listeners}
        assert not [name for name, said in found.items() if said in ("reached", "no echo")], found
        for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()
            assert len(lines) == 1, table  # the heading
    finally:
        assert deployment.end_process(f"{SITE}-agent") == 143


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may enter the network of the machine")
def test_the_trial_sees_an_agent_whose_wall_is_down(
    deployment: Deployment, listeners: list[list[Any]]
) -> None:
    """The control: the same agent with isolation switched off is in the machine's network, and all is reached
    from there.
    """
    call = "import sys; from pathlib import Path; from client.agent.server import run_agent; "
    call += "sys.exit(run_agent(Path(sys.argv[1]), require_isolation=False, isolate=False))"
    deployment.background("open-agent", ["-c", call, deployment.site(SITE)], program=sys.executable)
    try:
        pid = agent_pid(deployment)
        note = json.loads((deployment.site(SITE) / "run" / "agent.json").read_text(encoding="utf-8"))
        assert note["holds"] is False
        assert set(try_network(listeners, inside=pid).values()) == {"reached"}
    finally:
        assert deployment.end_process("open-agent") == 143


# ---- the node has no data


def data_of(site: Path) -> tuple[list[str], list[str]]:
    """Every file and folder of a hospital that is not the node's; the first file is an image."""
    closed = [path for path in site.rglob("*") if path.relative_to(site).parts[0] not in ("node", "run")]
    files = [path for path in closed if path.is_file()]
    assert {"site.key", "signing.key", "coordinator.json", "policy.yaml", "labels.csv"} <= {
        path.name for path in files
    }
    images = sorted(path for path in files if path.suffix == ".dcm")
    assert len(images) > 10
    return [str(path) for path in [*images, *(set(files) - set(images))]], [
        str(site),
        *(str(path) for path in closed if path.is_dir()),
    ]


def probe_files(deployment: Deployment, *, isolate: bool) -> dict[str, str]:
    """Run the real node with the probe in the SuperNode's place, while another process holds an image
    open.
    """
    site = deployment.site(SITE)
    files, folders = data_of(site)
    new = site / "state" / "from-the-node"
    with open(files[0], "rb") as held:  # this process is the one that holds it
        wanted = {
            "files": files,
            "folders": folders,
            "new": str(new),
            "other": os.getpid(),
            "fd": held.fileno(),
        }
        (site / "node" / "probe.json").write_text(json.dumps(wanted), encoding="utf-8")
        (site / "node" / "answer.json").unlink(missing_ok=True)
        call = "import sys; from pathlib import Path; import client.node.process as node; "
        call += (
            "node.supernode_command = lambda folder, config: [sys.executable, '-c', sys.argv[2], "
            "str(folder)]; "
        )
        call += (
            "sys.exit(node.run_node(Path(sys.argv[1]), require_isolation=False, isolate=sys.argv[3] == "
            "'yes'))"
        )
        words = ["-c", call, site, FILE_PROBE, "yes" if isolate else "no"]
        node = deployment.background("probed-node", words, program=sys.executable)
        assert node.wait(LIMIT_S) == 3, deployment.tails()  # its SuperNode has ended
    status = json.loads((site / "node" / "status.json").read_text(encoding="utf-8"))
    if isolate and not status["holds"]:
        pytest.skip(
            f"this system cannot confine a process to files, and the node says so: {status['isolation']}"
        )
    assert status["holds"] is isolate
    found: dict[str, str] = json.loads((site / "node" / "answer.json").read_text(encoding="utf-8"))
    assert {*files, *folders} < found.keys()
    new.unlink(missing_ok=True)
    return found


def test_the_node_opens_nothing_of_the_data(deployment: Deployment) -> None:
    found = probe_files(deployment, isolate=True)
    assert not {path: said for path, said in found.items() if said != "denied"}


def test_the_trial_sees_a_node_whose_wall_is_down(deployment: Deployment) -> None:
    """The control: the same node with isolation switched off opens everything."""
    found = probe_files(deployment, isolate=False)
    assert not {path: said for path, said in found.items() if said != "opened"}


def test_a_node_that_runs_holds_nothing_of_the_data(deployment: Deployment) -> None:
    """The real one, with its SuperNode: confined, and no open file of the hospital's besides its own."""
    site = deployment.site(SITE)
    (site / "node" / "status.json").unlink(missing_ok=True)
    deployment.start_site(SITE, only="node")
    try:
        status = wait_until(
            lambda: status_with_error(site), LIMIT_S, "the node has tried to connect", deployment.tails
        )
        if not status["holds"]:
            pytest.skip(
                f"this system cannot confine a process to files, and the node says so: {status['isolation']}"
            )
        assert status["last_error"] == "unreachable"  # nobody runs the federation here
        pids = [status["pid"], *descendants(status["pid"])]
        assert len(pids) >= 2
        for pid in pids:
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            held = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
            inside = [Path(path) for path in held if path.startswith(str(site))]
            assert all(
                path.is_relative_to(site / "node") or path.is_relative_to(site / "run") for path in inside
            ), inside
    finally:
        assert deployment.end_process(f"{SITE}-node") == 143


def status_with_error(site: Path) -> dict[str, Any] | None:
    try:
        status: dict[str, Any] = json.loads((site / "node" / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if status["last_error"] else None


def test_a_hospital_that_insists_is_refused_without_a_wall(deployment: Deployment) -> None:
    """`--require-isolation` does not start where the wall cannot be put up: here, because threads are running
    already.
    """
    for module, function in (("client.agent.server", "run_agent"), ("client.node.process", "run_node")):
        call = "import sys, threading; from pathlib import Path; import " + module + " as it; "
        call += (
            "threading.Thread(target=threading.Event().wait, daemon=True).start(); it.as_first_thing = "
            "lambda *a, **k: None; "
        )
        call += "from common.errors import ConfigError\n"
        call += f"try: it.{function}(Path(sys.argv[1]), require_isolation=True)\n"
        call += "except ConfigError as error: print(error.code, flush=True)\nelse: print('started')"
        said = deployment.call("-c", call, deployment.site(SITE), program=sys.executable)
        assert said.stdout.strip() == "not-isolated", deployment.told(said)
