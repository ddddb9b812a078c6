"""The walls hold, as tried from inside; each trial has a control that shows it would see a wall that is
down.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from client.site.isolation import _in_a_child, _leave_the_network
from tests.helpers.command_line import ROOT
from tests.helpers.kernel import landlock, needs_landlock, said

OUTSIDE = 1234
"""A user that the machine need not know."""


needs_namespaces = pytest.mark.skipif(
    _in_a_child(_leave_the_network) != 0, reason="this system allows no network namespace"
)
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become another user"
)

NETWORK = """
import os, socket, sys
from client.site.isolation import isolate_network

def tried():
    try:
        with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10):
            print("connected")
    except OSError as error:
        print(os.strerror(error.errno).replace(" ", "_"))

tried()
first = isolate_network()
print(first.holds)
tried()
again = isolate_network()
print(again.holds, again.how.replace(" ", "_"))
print(",".join(name for _, name in socket.if_nameindex()))
"""


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@needs_namespaces
def test_no_address_is_reached_from_behind_the_wall(listener: int) -> None:
    before, holds, after, still, how, names = said(NETWORK, listener)
    assert (before, holds, after) == ("connected", "True", "Network_is_unreachable")
    assert (still, how) == ("True", "already_without_a_network")
    assert "lo" in names


@needs_namespaces
def test_a_child_is_behind_the_wall_too(listener: int) -> None:
    code = """
    import subprocess, sys
    from client.site.isolation import isolate_network
    code = "import socket, sys; print(socket.socket().connect_ex(('127.0.0.1', int(sys.argv[1]))))"
    child = [sys.executable, "-c", code, sys.argv[1]]
    subprocess.run(child)
    sys.stdout.flush()
    assert isolate_network().holds
    subprocess.run(child)
    """
    before, after = said(code, listener)
    assert before == "0"
    assert after != "0"


@needs_namespaces
def test_abstract_sockets_do_not_cross_the_wall_and_path_sockets_do(tmp_path: Path) -> None:
    name, path = f"\0fedqc-test-{os.getpid()}", tmp_path / "s"
    code = """
    import socket, sys
    from client.site.isolation import isolate_network
    names = ["\\0" + sys.argv[1], sys.argv[2]]
    tried = lambda: print(*[socket.socket(socket.AF_UNIX).connect_ex(name) for name in names])
    tried()
    assert isolate_network().holds
    tried()
    """
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as with_path:
        for server, where in ((abstract, name), (with_path, str(path))):
            server.bind(where)
            server.listen()
        before_abstract, before_path, after_abstract, after_path = said(code, name[1:], path)
    assert (before_abstract, before_path) == ("0", "0")
    assert after_abstract != "0"
    assert after_path == "0"  # how the agent is asked


@needs_namespaces
@needs_root
def test_root_cannot_walk_back() -> None:
    code = """
    import ctypes, os
    from client.site.isolation import isolate_network
    libc = ctypes.CDLL(None)
    host = os.open(f"/proc/{os.getppid()}/ns/net", os.O_RDONLY)
    print(libc.setns(host, 0))
    assert isolate_network().holds
    print(libc.setns(host, 0))
    """
    assert said(code) == ["0", "-1"]


@pytest.fixture
def readable():
    """The wall's code where every user may read it."""
    with tempfile.TemporaryDirectory() as name:
        for file in (
            "client/__init__.py",
            "client/site/isolation.py",
            "common/__init__.py",
            "common/errors.py",
            "common/terminal.py",
        ):
            (Path(name) / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, Path(name, file))
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o755)
        yield Path(name)


@needs_namespaces
@needs_root
def test_an_ordinary_user_leaves_the_network_without_becoming_another(readable: Path, listener: int) -> None:
    python = shutil.which("python3", path="/usr/bin")
    become = ["setpriv", f"--reuid={OUTSIDE}", f"--regid={OUTSIDE}", "--clear-groups"]
    new_enough = [
        *become,
        "unshare",
        "-Un",
        str(python),
        "-c",
        "import sys; sys.exit(sys.version_info < (3, 11))",
    ]
    if python is None or subprocess.run(new_enough, check=False).returncode != 0:
        pytest.skip("no user namespaces for everybody, or no python that everybody may run")
    code = f"import sys\nsys.path.insert(0, {str(readable)!r})\n{NETWORK}"
    code += "\nprint(os.getuid(), open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
    done = subprocess.run(
        [*become, python, "-c", code, str(listener)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    words = done.stdout.split()
    assert words[:3] == ["connected", "True", "Network_is_unreachable"], done.stderr
    assert words[-2:] == [str(OUTSIDE), "0" * 16]


@needs_root
def test_it_says_so_where_the_system_refuses() -> None:
    code = """
    import socket
    from client.site.isolation import isolate_network
    found = isolate_network()
    print(found.holds, found.how[:12].replace(" ", "_"), bool(found.hint), len(socket.if_nameindex()))
    """
    if not any(name != "lo" for _, name in socket.if_nameindex()):
        pytest.skip("this machine has no network to lose")
    command = [
        "setpriv",
        "--bounding-set=-sys_admin",
        "--inh-caps=-sys_admin",
        sys.executable,
        "-c",
        textwrap.dedent(code),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["False", "NOT_ISOLATED", "True", str(len(socket.if_nameindex()))], (
        done.stderr
    )


@needs_namespaces
@pytest.mark.parametrize("wall", ["isolate_network()", "confine_files([], [])"])
def test_too_late_is_said(wall: str) -> None:
    code = f"""
    import threading, time
    from client.site.isolation import confine_files, isolate_network
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    found = {wall}
    print(found.holds, "threads" in found.how)
    """
    assert said(code) == ["False", "True"]


BEGINNING = """
import sys, threading, time
from pathlib import Path
from client.site.isolation import as_first_thing
if sys.argv[1] == "late":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
as_first_thing("anew", Path("/site"), require_isolation=True)
print("goes on")
"""


def test_a_process_with_threads_begins_anew(tmp_path: Path) -> None:
    module = "import os, sys\nprint(len(os.listdir('/proc/self/task')), os.getppid(), *sys.argv[1:])\n"
    (tmp_path / "anew.py").write_text(module, encoding="utf-8")
    late = said(BEGINNING, "late", environment={"PYTHONPATH": str(tmp_path)})
    assert late == ["1", str(os.getpid()), "/site", "--require-isolation"]
    assert said(BEGINNING, "early", environment={"PYTHONPATH": str(tmp_path)}) == ["goes", "on"]


FILES = """
import os, subprocess, sys
from pathlib import Path
from client.site.isolation import confine_files

allowed, denied, readable = map(Path, sys.argv[1:4])
python = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/bin", "/etc"]

def tried():
    for work in (
        lambda: (denied / "image.dcm").read_bytes(),
        lambda: os.listdir(denied),
        lambda: (denied / "new").write_bytes(b"x"),
        lambda: os.truncate(denied / "image.dcm", 0),
        lambda: os.rename(denied / "other", allowed / "stolen"),
        lambda: os.link(denied / "image.dcm", allowed / "linked"),
        lambda: (readable / "new").write_bytes(b"x"),
        lambda: (readable / "text").read_bytes(),
        lambda: (allowed / "mine").write_bytes(b"x"),
        lambda: (allowed / "mine").read_bytes(),
        lambda: subprocess.run(
            [sys.executable, "-c", f"open({str(denied / 'image.dcm')!r})"],
            check=True,
            stderr=subprocess.DEVNULL,
        ),
        lambda: (allowed / "way" / "image.dcm").read_bytes(),
    ):
        try:
            work()
            print("yes", end=" ")
        except (OSError, subprocess.CalledProcessError):
            print("no", end=" ")
    print()

if sys.argv[4] == "wall":
    found = confine_files([*map(Path, python), readable], [allowed, Path("/dev/null")])
    assert found.holds, found.how
tried()
"""


def _three(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("allowed", "denied", "readable")]
    for folder in folders:
        folder.mkdir()
    for file in ("denied/image.dcm", "denied/other", "readable/text"):
        (tmp_path / file).write_bytes(b"PATIENT")
    (tmp_path / "allowed" / "way").symlink_to(tmp_path / "denied")
    return folders


@needs_landlock
def test_only_what_is_listed_can_be_opened(tmp_path: Path) -> None:
    answers = said(FILES, *_three(tmp_path), "wall")
    assert answers == ["no"] * 7 + ["yes"] * 3 + ["no"] * 2
    assert (tmp_path / "denied" / "image.dcm").read_bytes() == b"PATIENT"


@needs_landlock
def test_the_same_trials_succeed_where_the_wall_is_down(tmp_path: Path) -> None:
    assert said(FILES, *_three(tmp_path), "no wall") == ["yes"] * 12


@needs_landlock
def test_another_process_cannot_be_used_to_read(tmp_path: Path) -> None:
    """The way through /proc: the root folder, the memory and the open files of a process that is outside."""
    folders = _three(tmp_path)
    code = f"""
    import os, signal, sys
    from pathlib import Path
    from client.site.isolation import confine_files
    other, secret = int(sys.argv[1]), Path(sys.argv[2])
    def tried():
        ways = (f"/proc/{{other}}/root{{secret}}", f"/proc/{{other}}/cwd/image.dcm")
        for way in (*ways, f"/proc/{{other}}/fd/0", f"/proc/{{other}}/mem"):
            try:
                open(way, "rb").close()
                print("yes")
            except OSError:
                print("no")
        try:
            os.kill(other, 0)
            print("yes")
        except OSError:
            print("no")
    tried()
    readable = [Path(path) for path in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc")]
    assert confine_files(readable, [Path({str(folders[0])!r})]).holds
    tried()
    """
    with (folders[1] / "image.dcm").open("rb") as held:
        other = subprocess.Popen(["sleep", "100"], cwd=folders[1], stdin=held)
        try:
            answers = said(code, other.pid, folders[1] / "image.dcm")
        finally:
            other.kill()
            other.wait()
    assert answers[:3] == ["yes"] * 3
    assert answers[5:9] == ["no"] * 4
    if landlock() >= 6:
        assert (answers[4], answers[9]) == ("yes", "no")


@needs_landlock
def test_a_unix_socket_with_a_path_is_reached_without_rights_to_files(tmp_path: Path) -> None:
    """How the node asks the agent."""
    path = tmp_path / "agent.sock"
    code = """
    import socket, sys
    from pathlib import Path
    from client.site.isolation import confine_files
    assert confine_files([Path("/usr")], []).holds
    print(socket.socket(socket.AF_UNIX).connect_ex(sys.argv[1]))
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert said(code, path) == ["0"]
