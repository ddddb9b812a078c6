"""A deployed federation on loopback, made and run through the command line as people do it: TLS proxy,
SuperLink, SuperExec, and hospitals of agent and node. Every process of it is real; every one is ended by its
number when the deployment is left.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import yaml

from client.simulation.phantom_sites import write_consortium
from common.cli import SILENT, main
from common.plan import RunPlan
from tests.helpers.command_line import FEDQC
from tests.helpers.consortium import settle, tiny_plan
from tests.helpers.ports import free_port

MARK = "FEDQC_RIG"
"""Set in the environment of everything a deployment starts, and inherited: so each process is found again,
whoever its parent is now.
"""
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
NAME, HOST = "loopback", "127.0.0.1"
LIMIT_S = 600.0
"""How long anything is waited for. Waits end when their condition holds; the limit only ends a test that
hangs, so it allows for a machine that is busy with other work.
"""
PATIENTS, NOMINAL = 10, 50


def deployed_plan(**changes: Any) -> RunPlan:
    """The tiny plan of the other tests for sites that all train: one private arm of three rounds."""
    values: dict[str, Any] = {
        "name": "deployed",
        "arms": ["federated_dp"],
        "held_out": [],
        "training": {"rounds": 3},
        "federation": {"deadline_s": 120},
    }
    return tiny_plan(**(values | changes))


def wait_until(
    is_so: Callable[[], Any], limit_s: float, what: str, tell: Callable[[], str] = lambda: ""
) -> Any:
    """Wait until `is_so` returns something true, and return that; an AssertionError after `limit_s`."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if found := is_so():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {limit_s:g} s\n{tell()}")


def descendants(pid: int) -> list[int]:
    """The process numbers of all children of `pid`, theirs included."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(
                path.read_text(errors="replace").rpartition(")")[2].split()[1]
            )
        except (OSError, IndexError, ValueError):
            continue
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        todo += children
    return found


def born(pid: int) -> str:
    """When a process began, in the kernel's ticks: with the number it names one process for good. "" if there
    is none, or it has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Deployment:
    """A federation in a folder of its own: `fed/` the coordinator's, one folder a hospital beside it,
    `logs/`.

    Args:
        folder: empty.
        sites: how many hospitals.
        running: whether entering brings it up. Otherwise the steps are called one by one: `make_data`,
            `enrol`, `start_federation`, `start_site`.
    """

    def __init__(
        self, folder: Path, *, sites: int = 3, patients: int = PATIENTS, running: bool = True
    ) -> None:
        self.folder, self.fed, self.logs = folder, folder / "fed", folder / "logs"
        self.names = tuple(f"hospital-{chr(ord('a') + number)}" for number in range(sites))
        self.port = free_port()
        self.fingerprint = ""
        self._patients, self._running = patients, running
        self._mark = secrets.token_hex(8)
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._before: dict[str, int] = {}  # length of a log when its process was started
        self._plans = 0
        self.left_behind: list[int] = []
        self.logs.mkdir(parents=True)

    def __enter__(self) -> Deployment:
        try:
            if self._running:
                self.make_data()
                self.init()
                for name in self.names:
                    self.enrol(name)
                self.start_federation()
                for name in self.names:
                    self.start_site(name, wait=False)
                for name in self.names:
                    self.await_site(name)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    # ---- making it

    def site(self, name: str) -> Path:
        return self.folder / name

    def make_data(self) -> None:
        """Phantoms for every hospital: images and labels.csv, and the key that decides the split, so that a
        simulation has the same.
        """
        staging = self.folder / "phantoms"
        write_consortium(
            staging, sites=max(2, len(self.names)), patients=self._patients, seed=7, say=lambda _: None
        )
        for name in self.names:
            (staging / name / "site.yaml").unlink()
            (staging / name).rename(self.site(name))
        shutil.rmtree(staging)

    def init(self) -> None:
        self.do(
            "federation",
            "init",
            NAME,
            "--federation",
            self.fed,
            "--host",
            HOST,
            "--listen",
            HOST,
            "--port",
            self.port,
        )
        # hospitals then reach the SuperLink itself: the same certificate and keys, and no closed doors
        if NGINX is None:
            settings = self.fed / "federation.yaml"
            values = yaml.safe_load(settings.read_text(encoding="utf-8"))
            settings.write_text(yaml.safe_dump(values | {"superlink_port": self.port}), encoding="utf-8")

    def enrol(
        self,
        name: str,
        *,
        level: str = "open",
        kind: str = "synthetic",
        nominal: int = NOMINAL,
        images: Path | None = None,
        labels: Path | None = None,
        **more: str,
    ) -> None:
        """`site init`, `federation approve`, `site join`: what two people do with three files and a
        telephone.
        """
        site = self.site(name)
        words: list[object] = [
            "site",
            "init",
            "--site",
            site,
            "--name",
            name,
            "--kind",
            kind,
            "--level",
            level,
            "--yes",
        ]
        words += ["--images", images or site / "images", "--labels", labels or site / "labels.csv"]
        words += ["--nominal-patients", nominal, "--cohort", more.pop("cohort", f"phantoms-{name}")]
        words += [word for option, value in more.items() for word in (f"--{option.replace('_', '-')}", value)]
        self.do(*words)
        settle(site, split={"train": 0.6, "test": 0.4})  # as the tiny plan's: every site has test patients
        kit = self.folder / f"kit-{name}.zip"
        said = self.do(
            "federation", "approve", site / "request.zip", "--out", kit, "--yes", "--federation", self.fed
        )
        self.fingerprint = said.stdout.strip().splitlines()[-1].split()[-1]
        self.do("site", "join", kit, "--fingerprint", self.fingerprint, "--site", site)

    # ---- running it

    def start_federation(self, *, prefix: Sequence[str] = ()) -> None:
        self.background(
            "federation",
            ["federation", "start", "--federation", self.fed] + (["--no-proxy"] if NGINX is None else []),
            prefix=prefix,
        )
        self._await_word("federation", "listening" if NGINX else "SuperLink on")

    def start_site(
        self, name: str, *, only: str | None = None, prefix: Sequence[str] = (), wait: bool = True
    ) -> int:
        """`fedqc site start`, in the background. Returns the number of its process."""
        words: list[object] = ["site", "start", "--site", self.site(name)] + (
            ["--only", only] if only else []
        )
        started = self.background(f"{name}-{only}" if only else name, words, prefix=prefix)
        if wait and not only:
            self.await_site(name)
        return started.pid

    def await_site(self, name: str) -> None:
        """Until the operator is told that agent and node are connected."""
        self._await_word(name, "connected")

    def stop_site(self, name: str) -> None:
        self.do("site", "stop", "--site", self.site(name))
        self._started.pop(name).wait(LIMIT_S)

    def pid(self, name: str, what: str) -> int:
        """Of a part of a site ("supervisor", "agent", "node") or, with name "federation", of a service."""
        if name == "federation":
            return int((self.fed / "state" / f"{what}.pid").read_text(encoding="ascii").split()[0])
        return int(
            json.loads((self.site(name) / "run" / "supervisor.pid").read_text(encoding="utf-8"))[what][0]
        )

    def kill(self, name: str, what: str, number: int = signal.SIGKILL) -> int:
        """Signal one process as an accident would; returns its number once it is gone (SIGKILL) or was
        told.
        """
        pid = self.pid(name, what)
        os.kill(pid, number)
        if number == signal.SIGKILL:
            wait_until(lambda: not born(pid), LIMIT_S, f"{name} {what} killed")
        return pid

    # ---- using it

    def run_check(self, plan: RunPlan, *, status: int | None = None) -> dict[str, Any]:
        words = ["run", "check", self.write_plan(plan), "--federation", self.fed, "--format", "json"]
        said = self.call(*words, limit_s=LIMIT_S)
        assert said.returncode == status if status is not None else said.returncode in (0, 4, 6), self.told(
            said
        )
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    def run_start(
        self, plan: RunPlan, name: str, *more: object, status: int = 0, limit_s: float = LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        words = ["run", "start", self.write_plan(plan), "--federation", self.fed, "--name", name, *more]
        said = self.call(*words, limit_s=limit_s)
        assert said.returncode == status, self.told(said)
        return said

    def run(self, name: str) -> Path:
        return self.fed / "runs" / name

    def evaluation(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run(run) / "evaluation.json").read_text(encoding="utf-8"))
        return found

    def write_plan(self, plan: RunPlan) -> Path:
        self._plans += 1
        path = self.folder / f"plan-{self._plans}.yaml"
        path.write_text(yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8")
        return path

    def json(self, *words: object) -> Any:
        return json.loads(self.do(*words, "--format", "json").stdout)

    # ---- processes

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | SILENT | {MARK: self._mark, "OMP_NUM_THREADS": "1"}

    def call(
        self,
        *words: object,
        limit_s: float = LIMIT_S,
        env: Mapping[str, str] | None = None,
        program: Path | str = FEDQC,
    ) -> subprocess.CompletedProcess[str]:
        """`fedqc` (or another program) with these words, to its end."""
        command = [str(program), *map(str, words)]
        environment = self.environment | dict(env or {})
        try:
            return subprocess.run(
                command,
                env=environment,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise AssertionError(
                f"{' '.join(command)}: not done in {limit_s:g} "
                f"s\n{late.stdout}\n{late.stderr}\n{self.tails()}"  # type: ignore[str-bytes-safe]
            ) from None

    def do(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`fedqc` with these words in this process, which must succeed. A process of its own costs two
        seconds of imports; `call` starts one.
        """
        out, err, stop = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
        with patch.dict(os.environ, self.environment), redirect_stdout(out), redirect_stderr(err):
            try:
                main([str(word) for word in words])
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 0
            finally:
                signal.signal(signal.SIGTERM, stop)
        said = subprocess.CompletedProcess(["fedqc", *words], status, out.getvalue(), err.getvalue())  # type: ignore[list-item]
        assert said.returncode == 0, self.told(said)
        return said

    def background(
        self, name: str, words: Sequence[object], *, prefix: Sequence[str] = (), program: Path | str = FEDQC
    ) -> subprocess.Popen[bytes]:
        """`fedqc` (or another program) with these words as a process that stays; what it says goes to
        logs/<name>.log.
        """
        with (self.logs / f"{name}.log").open("ab") as sink:
            self._before[name] = sink.tell()
            command = [*prefix, str(program), *map(str, words)]
            started = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self._started[name] = started
        return started

    def end_process(self, name: str) -> int:
        """SIGTERM for what `background` started under this name; its exit status."""
        started = self._started.pop(name)
        started.terminate()
        return started.wait(LIMIT_S)

    def log(self, name: str) -> str:
        """What `background` made of this name has said since it was last started."""
        return (self.logs / f"{name}.log").read_bytes()[self._before[name] :].decode("utf-8", "replace")

    def _await_word(self, name: str, word: str) -> None:
        process = self._started[name]

        def is_so() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"{name} ended with status {process.returncode}\n{self.tails()}")
            return word in self.log(name)

        wait_until(is_so, LIMIT_S, f"{name}: {word}", self.tails)

    def processes(self) -> set[tuple[int, str]]:
        """Every live process that this deployment ever started, directly or not, as number and birth."""
        found = {pid for started in self._started.values() for pid in descendants(started.pid)}
        needle = f"{MARK}={self._mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if needle in path.read_bytes().split(b"\0"):
                    found.add(int(path.parent.name))
            except OSError:
                continue
        return {(pid, began) for pid in found if (began := born(pid))}

    def end(self) -> None:
        """End everything, sites first: politely, then not. Only processes of this deployment are touched."""
        before = self.processes()
        for name in reversed(self._started):
            if self._started[name].poll() is None:
                self._started[name].terminate()
        for started in self._started.values():
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait(10)
        self.left_behind = [pid for pid, began in before | self.processes() if born(pid) == began]
        for pid in self.left_behind:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._started.clear()

    # ---- what happened

    def told(self, said: subprocess.CompletedProcess[str]) -> str:
        command = " ".join(map(str, said.args))
        output = f"{said.stdout[-3000:]}\n{said.stderr[-3000:]}"
        return f"{command}: status {said.returncode}\n{output}\n{self.tails()}"

    def tails(self, lines: int = 25) -> str:
        """The ends of all logs there are."""
        paths = [*sorted(self.logs.glob("*.log")), *sorted((self.fed / "state").glob("*.log"))]
        for name in self.names:
            paths += [
                *sorted((self.site(name) / "node").glob("*.log")),
                *sorted((self.site(name) / "state").glob("*.log")),
            ]
        parts = []
        for path in paths:
            end = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.relative_to(self.folder)}\n" + "\n".join(end))
        return "\n".join(parts)
