"""What does a round cost beyond the training itself, on real processes, beside Flower as it comes?

    python benchmarks/deployment_round.py [--quick] [--format json] [--update docs/performance.md]

Three sites on one machine, TLS on loopback, registered node keys, a model of ResNet18's 62 arrays (--quick: a
quarter of its channels). Nothing is trained, so that all that is measured is time and CPU beyond training.
One warm-up round, then the rounds that count.

    default   Flower's own way: SuperLink and SuperNodes that start a new process a message, an app that
              imports PyTorch and sends one array a layer, FedAvg's loop with its poll of 3 s; no evaluation,
              which would double it (benchmarks/round_apps/flower_default.py).
    fedqc     nginx, SuperLink and SuperExec as `fedqc federation start` runs them; each site as `fedqc site
              start` does, the agent without a network and the node confined to its files; folders, keys, kits
              and bundle as the commands make them. Questions, signatures, nonces, codec, checks of the model
              and of the answers, mean, checkpoint and records are the product's. Put in by this file: a
              ServerApp that runs rounds only (round_apps/fedqc_rounds.py), and an agent that answers with a
              fixed update of Gaussian steps of 1e-3 where it would train. There is no final evaluation, no
              scoring of the public set, no outbox (private arms only).
    floor     one process: encodes, decodes and averages the same arrays as fedqc does, and nothing else.

Then a whole small run: loop_overhead's plan (32 images a site, five rounds, the final evaluation) from `fedqc
run start` to its end on a deployment made and started by the commands, beside loop_overhead's floor; the
final weights must be equal bit for bit. `running` counts from `fedqc run start` on, with services up as they
are in a hospital; `from nothing` counts the start of every process too.

CPU is that of all processes of a deployment. Sides take turns within one run; the machine's other work
disturbs wall time, so look at ratios. Bytes are the lengths of payloads, summed over the sites. Needs Linux;
nginx, or the proxy is left out and that is said.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    PR_SET_CHILD_SUBREAPER,
    BenchmarkError,
    Ratio,
    environment,
    ratio,
    run,
    to_json,
    update_table,
)

if TYPE_CHECKING:
    from client.agent.verification import Guard
    from server.federation.registry import Federation

SITES = ("hospital-a", "hospital-b", "hospital-c")
CHANNELS, QUICK_CHANNELS = 64, 16
AIM_WALL, AIM_CPU = 0.3, 4.0
UPDATE = 1e-3
"""Standard deviation of an update's values, in weight units."""
NOMINAL = 50
IMAGES = 32
APPS = Path(__file__).parent / "round_apps"
COORDINATOR = "fedqc_bundle/coordinator.py"
HERE = Path(__file__).absolute()
HOST = "127.0.0.1"
LIMIT_S = 900

Layers = list[tuple[str, list[int]]]


def resnet18_layers(channels: int = CHANNELS) -> Layers:
    """Names and shapes of a ResNet18's 62 weights (He et al., CVPR 2016) with this many channels after the
    first layer.
    """
    found: Layers = [("conv1.weight", [channels, 3, 7, 7]), *_norm("bn1", channels)]
    before = channels
    for stage in range(4):
        width = channels * 2**stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            found += [(f"{name}.conv1.weight", [width, before, 3, 3]), *_norm(f"{name}.bn1", width)]
            found += [(f"{name}.conv2.weight", [width, width, 3, 3]), *_norm(f"{name}.bn2", width)]
            if before != width:
                found += [
                    (f"{name}.downsample.0.weight", [width, before, 1, 1]),
                    *_norm(f"{name}.downsample.1", width),
                ]
            before = width
    return [*found, ("fc.weight", [1000, before]), ("fc.bias", [1000])]


def _norm(name: str, width: int) -> Layers:
    return [(f"{name}.weight", [width]), (f"{name}.bias", [width])]


def count(layers: Layers) -> int:
    """Number of weights."""
    total = 0
    for _, shape in layers:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


# ---- counting


def tree_cpu_s(root: int | None = None) -> float:
    """CPU seconds of all descendants of a process, living, dead and waited for, or dead and not waited for;
    the process itself left out.

    What a descendant waited for stands in its own account; what nobody waited for is still listed, as this
    process adopts orphans.
    """
    root = root or os.getpid()
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            pid = int(path.parent.name)
            # own and waited-for, user and system
            parents[pid], used[pid] = (
                int(fields[1]),
                sum(map(int, fields[11:15])),
            )
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    total, todo = 0.0, list(children.get(root, ()))
    while todo:
        pid = todo.pop()
        total += used[pid] / os.sysconf("SC_CLK_TCK")
        todo += children.get(pid, ())
    if root == os.getpid():
        times = os.times()
        total += times.children_user + times.children_system
    return total


def measure_rounds(marks: Path, rounds: int, alive: Callable[[], None]) -> dict[str, Any]:
    """Follow the marks that a ServerApp writes, one before the first round and one after each; the first
    round is not counted.

    Args:
        alive: raises BenchmarkError when a process has ended that should not.
    Returns:
        {"wall_s": of each round, "cpu_s": of each round, "bytes": {"down", "up"} of the last}
    """
    cpu: list[float] = []
    until = time.monotonic() + LIMIT_S
    while len(cpu) < rounds + 2:
        lines = marks.read_bytes().count(b"\n") if marks.exists() else 0
        if lines > len(cpu):
            cpu += [tree_cpu_s()] * (lines - len(cpu))
        alive()
        if time.monotonic() > until:
            raise BenchmarkError(f"{len(cpu)} of {rounds + 2} marks within {LIMIT_S} s")
        time.sleep(0.02)
    found = [json.loads(line) for line in marks.read_text(encoding="utf-8").splitlines()]
    at = [mark["at"] for mark in found]
    return {
        "wall_s": [after - before for before, after in pairwise(at[1:])],
        "cpu_s": [after - before for before, after in pairwise(cpu[1:])],
        "bytes": found[-1]["bytes"],
    }


# ---- processes


class Processes:
    """Background processes of one side, each with a log; all ended, last started first, when it is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started.values()):
            process.terminate()
        for process in self._started.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, command: Sequence[object], more: Mapping[str, str] | None = None) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                [str(word) for word in command],
                env=as_shipped(more),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> None:
        """Raises BenchmarkError where one has ended."""
        for name, process in self._started.items():
            if process.poll() is not None:
                raise BenchmarkError(f"{name} ended with status {process.returncode}\n{self.tails()}")

    def until(self, is_so: Callable[[], object], what: str, limit_s: float = 120) -> None:
        end = time.monotonic() + limit_s
        while not is_so():
            self.alive()
            if time.monotonic() > end:
                raise BenchmarkError(f"{what}: not within {limit_s:g} s\n{self.tails()}")
            time.sleep(0.1)

    def says(self, name: str, word: str) -> bool:
        return word in (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def tails(self) -> str:
        logs = [
            *sorted(self._folder.glob("*.log")),
            *sorted(self._folder.glob("fed/state/*.log")),
            *sorted(self._folder.glob("*/node/*.log")),
        ]
        return "\n".join(
            f"--- {path}\n{path.read_text(encoding='utf-8', errors='replace')[-1500:]}" for path in logs
        )


@contextmanager
def adopted() -> Iterator[None]:
    """Orphans among our descendants become our children (Linux), stay countable, and are ended at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        for path in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, path.read_text().split()):
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def as_shipped(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what `measuring.run` decides for the allocator; Flower silent, its
    programs on the path.
    """
    from common.cli import SILENT

    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, **SILENT, "PATH": path, **(more or {})}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def has_proxy() -> bool:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") is not None


# ---- enrolment, as the commands do it


def enrol(folder: Path, app: Path | None, settings: Sequence[str] = ()) -> Federation:
    """A federation in FOLDER/fed and three sites beside it that have joined.

    Args:
        app: a ServerApp to put into the bundle in place of the product's, with these run config keys. None
            leaves the bundle as it is.
    """
    import server.federation.flower_app
    from client.site.enrolment import NewSite, init_site, join
    from common.enrolment import read_request, write_kit
    from server.federation.configure import init_federation
    from server.federation.registry import approve

    if app:
        files = bundle_with(server.federation.flower_app.bundle_files(), app, settings)
        vars(server.federation.flower_app)["bundle_files"] = lambda: files
    port = _free_port()
    federation = init_federation(
        folder / "fed",
        name="loopback",
        host=HOST,
        port=port,
        listen=HOST,
        superlink_port=None if has_proxy() else port,
    )
    for name in SITES:
        images, labels = folder / name / "images", folder / name / "labels.csv"
        images.mkdir(parents=True, exist_ok=True)
        new = NewSite(
            name=name,
            images=images,
            labels=labels,
            nominal_patients=NOMINAL,
            kind="synthetic",
            cohort=f"phantoms-{name}",
            level="open",
        )
        request = init_site(folder / name, new)
        kit = approve(federation, read_request(request))
        write_kit(folder / f"kit-{name}.zip", kit, federation.signing_key())
        join(folder / name, folder / f"kit-{name}.zip", kit.fingerprint)
    return federation


def bundle_with(files: Mapping[str, bytes], app: Path, settings: Sequence[str]) -> dict[str, bytes]:
    """The product's bundle, whose runs are served by `app`."""
    keys = "".join(f'{key} = ""\n' for key in settings)
    if COORDINATOR not in files:
        raise BenchmarkError(f"the bundle holds no {COORDINATOR}: it is made in another way now")
    return {**files, COORDINATOR: app.read_bytes(), "pyproject.toml": files["pyproject.toml"] + keys.encode()}


def toml(values: Mapping[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


# ---- the sides, each a process of its own


def flower_side(folder: Path, layers: Layers, rounds: int) -> dict[str, Any]:
    """Flower as it comes; only keys and certificates are borrowed from a federation of ours."""
    federation = enrol(folder, None)
    port, home, app = _free_port(), folder / "home", folder / "app"
    programs = Path(sys.executable).parent
    home.mkdir()
    app.mkdir()
    shutil.copy(APPS / "flower_default.py", app / "flower_default.py")
    (app / "pyproject.toml").write_text(
        '[project]\nname = "quickstart"\nversion = "1.0.0"\ndependencies = ["flwr>=1.41,<1.42"]\n'
        '[tool.flwr.app]\npublisher = "benchmark"\nfab-include = ["*.py"]\n'
        '[tool.flwr.app.components]\nserverapp = "flower_default:server"\nclientapp = '
        '"flower_default:client"\n'
        '[tool.flwr.app.config]\nlayers = ""\nmarks = ""\nrounds = 1\n',
        encoding="utf-8",
    )
    authority = federation.ca_certificate
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{HOST}:{port}"\nroot-certificates = '
        f'"{authority}"\n',
        encoding="utf-8",
    )

    def flwr(*words: object) -> None:
        command = [str(word) for word in (programs / "flwr", *words)]
        env = as_shipped({"FLWR_HOME": str(home)})
        said = subprocess.run(
            command, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        if said.returncode:
            raise BenchmarkError(f"{' '.join(command)}\n{said.stdout[-1000:]}{said.stderr[-2000:]}")

    marks, config = folder / "marks.jsonl", folder / "run.toml"
    config.write_text(
        toml({"layers": json.dumps(layers), "marks": str(marks), "rounds": rounds + 1}), encoding="utf-8"
    )
    with Processes(folder) as processes:
        certificates = (
            "--ssl-ca-certfile",
            authority,
            "--ssl-certfile",
            federation.server_certificate,
            "--ssl-keyfile",
            federation.server_key,
        )
        link = [
            programs / "flower-superlink",
            "--host",
            HOST,
            "--port",
            port,
            *certificates,
            "--enable-supernode-auth",
        ]
        processes.start(
            "superlink", [*link, "--disable-runtime-dependency-installation"], {"FLWR_HOME": str(home)}
        )
        processes.until(lambda: _connects(port), "SuperLink")
        for number, enrolment in enumerate(federation.sites()):
            key = folder / f"{enrolment.site}.pub"
            key.write_text(f"{enrolment.request.node_key}\n", encoding="utf-8")
            flwr("supernode", "register", key, "here")
            node = [
                programs / "flower-supernode",
                "--superlink",
                f"{HOST}:{port}",
                "--root-certificates",
                authority,
            ]
            node += [
                "--auth-supernode-private-key",
                folder / enrolment.site / "node" / "node.key",
                "--port",
                str(_free_port()),
            ]
            own = folder / f"home-{enrolment.site}"
            own.mkdir()
            processes.start(
                enrolment.site, [*node, "--node-config", f"partition-id={number}"], {"FLWR_HOME": str(own)}
            )
        for name in SITES:
            processes.until(lambda name=name: processes.says(name, "SuperNode ID"), f"{name} connected")  # type: ignore[misc]
        flwr("run", app, "here", "--run-config", config)
        try:
            return measure_rounds(marks, rounds, processes.alive)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{processes.tails()}") from None


def fedqc_side(folder: Path, layers: Layers, rounds: int) -> dict[str, Any]:
    from common.plan import parse_plan
    from server.federation.registry import CONNECTION
    from server.federation.services import flower

    federation = enrol(folder, APPS / "fedqc_rounds.py", ("layers", "marks", "federation"))
    plan = parse_plan(
        {
            "name": "deployment-round",
            "arms": ["federated"],
            "training": {"rounds": rounds + 1},
            "federation": {"quorum": 3},
        }
    )
    marks, config = folder / "marks.jsonl", folder / "run.toml"
    values = {
        "plan": plan.canonical_json(),
        "run-dir": str(folder / "run"),
        "federation": str(federation.folder),
    }
    config.write_text(toml(values | {"layers": json.dumps(layers), "marks": str(marks)}), encoding="utf-8")
    with Processes(folder) as processes:
        processes.start("federation", [sys.executable, HERE, "--side", "services", federation.folder])
        processes.until(lambda: processes.says("federation", "listening"), "services")
        for name in SITES:
            processes.start(
                f"{name}-agent", [sys.executable, HERE, "--side", "agent", folder / name, layers[0][1][0]]
            )
            node = [
                sys.executable,
                "-P",
                "-m",
                "common.cli",
                "site",
                "start",
                "--site",
                folder / name,
                "--only",
                "node",
            ]
            processes.start(f"{name}-node", node)
        _await_sites(processes, folder)
        flower(federation, "run", str(federation.bundle), CONNECTION, "--run-config", str(config))
        try:
            return measure_rounds(marks, rounds, processes.alive)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{processes.tails()}") from None


def _await_sites(processes: Processes, folder: Path) -> None:
    from client.supervision.supervisor import state_of

    for name in SITES:
        processes.until(
            lambda name=name: all(state_of(folder / name)[part] for part in ("agent", "node")),
            f"{name} connected",
        )  # type: ignore[misc]


def services_side(federation: Path) -> int:
    """`fedqc federation start`, but for the check that the bundle is the product's own."""
    from server.federation.registry import Federation
    from server.federation.services import serve

    return serve(Federation.open(federation), proxy=has_proxy(), say=say)


def agent_side(site: Path, layers: Layers) -> int:
    """The agent's process: all of it but the training."""
    from client.agent.server import run_agent

    return run_agent(site, require_isolation=False, guard=lambda site: untrained_guard(site, layers).answer)


def untrained_guard(site: Path, layers: Layers) -> Guard:
    """A site's guard, whose agent decodes and checks the model as ever, and then knows its update
    beforehand.
    """
    import numpy as np

    from client.agent.model_check import check_base, decode_base
    from client.agent.verification import TASKS, Guard
    from client.site.config import read_site
    from common.plan import RunPlan
    from common.weights import GRID, Manifest, digest, encode_steps
    from common.wire import DescribeTask, SiteDescription, SiteUpdate, TrainTask, WireMessage

    about, _ = read_site(site)
    manifest = Manifest(
        names=tuple(name for name, _ in layers), shapes=tuple(tuple(shape) for _, shape in layers)
    )
    seed = SITES.index(about.name)
    steps = np.rint(np.random.default_rng(seed).standard_normal(manifest.size) * UPDATE / GRID).astype(
        np.int32
    )
    held: dict[str, np.ndarray] = {}

    def work(method: str, plan: RunPlan, payload: bytes, asked: object, job: object) -> WireMessage:
        task = TASKS[method].from_bytes(payload)
        guard._admit(task, asked, plan)  # type: ignore[arg-type]
        if isinstance(task, DescribeTask):
            return SiteDescription(
                site=about.name, kind=about.kind, nominal_patients=about.nominal_patients, version="0"
            )
        assert isinstance(task, TrainTask)
        base = decode_base(task, manifest.size, slice(0, manifest.size), held)
        check_base(base, None, manifest, frozen=None)
        held.clear()
        held[digest(base)] = base
        return SiteUpdate(
            site=about.name,
            run=task.run,
            arm=task.arm,
            round=task.round,
            base_sha256=digest(base),
            weight=about.nominal_patients,
            private=False,
            update=encode_steps(steps),
        )

    guard = Guard(str(site))
    vars(guard)["_work"] = work
    return guard


def floor_side(layers: Layers, rounds: int) -> dict[str, Any]:
    """The arithmetic of a round in one process: the step of the last round is encoded once and decoded by
    each site, and so on.
    """
    import numpy as np

    from common.weights import GRID, advance, decode_steps, encode_steps
    from server.aggregation import FederatedMean

    size = count(layers)
    flat = (0.02 * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    updates = [
        np.rint(np.random.default_rng(seed).standard_normal(size) * UPDATE / GRID).astype(np.int32)
        for seed in range(len(SITES))
    ]
    at_sites = [flat.copy() for _ in SITES]
    step = updates[0]
    wall: list[float] = []
    cpu: list[float] = []
    down = up = 0
    for _ in range(rounds + 1):
        began, used = time.perf_counter(), time.process_time()
        frame = encode_steps(step)
        answers = []
        for number, update in enumerate(updates):
            at_sites[number] = advance(at_sites[number], decode_steps(frame, size))
            answers.append(encode_steps(update))
        mean = FederatedMean(size)
        for answer in answers:
            mean.add(decode_steps(answer, size), NOMINAL)
        step = mean.steps()
        flat = advance(flat, step)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        down, up = len(SITES) * frame.nbytes, sum(answer.nbytes for answer in answers)
    return {"wall_s": wall[1:], "cpu_s": cpu[1:], "bytes": {"down": down, "up": up}}


def small_side(folder: Path) -> dict[str, Any]:
    """A whole run of loop_overhead's plan on a deployment, from its making to its end; beside it lies what
    the floor needs.
    """
    from loop_overhead import write_plan

    plan = folder / "plan.yaml"
    write_plan(plan)
    run(
        [
            sys.executable,
            HERE.with_name("loop_overhead.py"),
            "--side",
            "sites",
            plan,
            folder / "whole",
            str(len(SITES)),
            str(IMAGES),
        ]
    )
    for name in SITES:
        made = folder / "whole" / "data" / name
        (made / "site.yaml").unlink()
        made.rename(folder / name)
    federation = enrol(folder, None)
    fedqc = Path(sys.executable).with_name("fedqc")
    nothing_cpu, nothing_at = tree_cpu_s(), time.monotonic()
    with Processes(folder) as processes:
        processes.start(
            "federation",
            [
                fedqc,
                "federation",
                "start",
                "--federation",
                federation.folder,
                *([] if has_proxy() else ["--no-proxy"]),
            ],
        )
        processes.until(lambda: processes.says("federation", "listening"), "services")
        for name in SITES:
            processes.start(name, [fedqc, "site", "start", "--site", folder / name])
        _await_sites(processes, folder)
        running_cpu, running_at = tree_cpu_s(), time.monotonic()
        command = [
            str(fedqc),
            "run",
            "start",
            str(plan),
            "--federation",
            str(federation.folder),
            "--name",
            "small",
        ]
        said = subprocess.run(
            command, env=as_shipped(), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if said.returncode:
            raise BenchmarkError(
                f"{' '.join(command)}\n{said.stdout[-2000:]}{said.stderr[-2000:]}\n{processes.tails()}"
            )
        end_cpu, end_at = tree_cpu_s(), time.monotonic()
    return {
        "running": {"wall_s": end_at - running_at, "cpu_s": end_cpu - running_cpu},
        "from nothing": {"wall_s": end_at - nothing_at, "cpu_s": end_cpu - nothing_cpu},
    }


# ---- all of it


def measure_turns(folder: Path, channels: int, rounds: int, turns: int) -> list[dict[str, Any]]:
    """Each side once a turn, in alternating order."""
    found = []
    order = ["default", "fedqc", "floor"]
    for turn in range(turns):
        this: dict[str, Any] = {}
        for name in order:
            this[name] = _side(folder / f"{name}-{turn}", name, str(channels), str(rounds))
            say(
                f"turn {turn + 1}/{turns} {name}: {_seconds(this[name]['wall_s'])} s, "
                f"{_seconds(this[name]['cpu_s'])} CPU-s a round"
            )
        found.append(this)
        order.reverse()
    return found


def measure_small(folder: Path, turns: int) -> list[dict[str, Any]]:
    """The small run and its floor.

    Raises:
        BenchmarkError: their final weights differ.
    """
    import safetensors.numpy
    from loop_overhead import difference

    found = []
    for turn in range(turns):
        at = folder / f"small-{turn}"
        this = _side(at, "small")
        floor = run(
            [
                sys.executable,
                HERE.with_name("loop_overhead.py"),
                "--side",
                "floor",
                at / "plan.yaml",
                at,
                at / "floor",
            ]
        )
        this["floor"] = {"wall_s": floor.wall_s, "cpu_s": floor.cpu_s}
        weights = [
            safetensors.numpy.load_file(at / path / "model.safetensors")
            for path in ("fed/runs/small", "floor")
        ]
        if difference(*weights):
            raise BenchmarkError("the deployment's final weights are not the floor's: no ratio counts")
        say(
            f"small run {turn + 1}/{turns}: "
            + ", ".join(f"{name} {_cost(cost)}" for name, cost in this.items())
        )
        found.append(this)
        shutil.rmtree(at)
    return found


def _side(folder: Path, *words: str) -> dict[str, Any]:
    """A side in a process of its own; what it found."""
    folder.mkdir()
    out = folder / "found.json"
    run([sys.executable, HERE, "--side", words[0], folder, *words[1:]])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if words[0] != "small":
        shutil.rmtree(folder)
    return found


def run_side(side: str, arguments: list[str]) -> int:
    """What a child process does. A signal ends what it started, too."""
    if side == "services":
        return services_side(Path(arguments[0]))
    if side == "agent":
        return agent_side(Path(arguments[0]), resnet18_layers(int(arguments[1])))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(arguments[0])
    try:
        with adopted():
            if side == "small":
                found = small_side(folder)
            else:
                layers, rounds = resnet18_layers(int(arguments[1])), int(arguments[2])
                if side == "floor":
                    found = floor_side(layers, rounds)
                else:
                    found = {"default": flower_side, "fedqc": fedqc_side}[side](folder, layers, rounds)
    except BenchmarkError as error:
        say(str(error))
        return 1
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def summary(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of each side over all rounds, and ratios turn by turn: of the median round's wall time, of the
    mean CPU of a round.
    """
    sides = {
        name: {
            "wall_s": statistics.median(value for turn in turns for value in turn[name]["wall_s"]),
            "cpu_s": statistics.mean(value for turn in turns for value in turn[name]["cpu_s"]),
            "bytes": turns[-1][name]["bytes"],
        }
        for name in ("default", "fedqc", "floor")
    }

    def over(side: str, reference: str) -> dict[str, Ratio]:
        wall = [[statistics.median(turn[name]["wall_s"]) for turn in turns] for name in (side, reference)]
        cpu = [[statistics.mean(turn[name]["cpu_s"]) for turn in turns] for name in (side, reference)]
        return {"wall": ratio(*wall), "cpu": ratio(*cpu)}

    return {
        "sides": sides,
        "fedqc / default": over("fedqc", "default"),
        "fedqc / floor": over("fedqc", "floor"),
    }


def small_summary(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of the whole run to its floor."""
    found: dict[str, Any] = {}
    for name in ("running", "from nothing"):
        found[name] = {
            what: ratio([turn[name][what] for turn in turns], [turn["floor"][what] for turn in turns])
            for what in ("wall_s", "cpu_s")
        }
        found[name]["seconds"] = {
            what: statistics.median(turn[name][what] for turn in turns) for what in ("wall_s", "cpu_s")
        }
    found["floor"] = {
        "seconds": {
            what: statistics.median(turn["floor"][what] for turn in turns) for what in ("wall_s", "cpu_s")
        }
    }
    return found


def measure_all(folder: Path, *, channels: int, rounds: int, turns: int, small: bool) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment()
    layers = resnet18_layers(channels)
    found = measure_turns(folder, channels, rounds, turns)
    runs = measure_small(folder, turns) if small else []
    return {
        "benchmark": "deployment_round",
        "environment": started_with | {"load_1min_after": round(os.getloadavg()[0], 2)},
        "work": {
            "sites": len(SITES),
            "weights": count(layers),
            "arrays": len(layers),
            "rounds": rounds,
            "turns": turns,
            "proxy": has_proxy(),
        },
        "summary": summary(found),
        "small": small_summary(runs) if runs else None,
        "samples": {"rounds": found, "small": runs},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: seconds and bytes of each side, ratios beside their aims."""
    work, found, small = result["work"], result["summary"], result["small"]
    lines = ["| a round without training | wall, s | CPU-s | MB down | MB up |", "|---|---|---|---|---|"]
    for name, side in found["sides"].items():
        moved = [f"{side['bytes'][way] / 1e6:.1f}" for way in ("down", "up")]
        lines.append(f"| {name} | {side['wall_s']:.2f} | {side['cpu_s']:.2f} | {' | '.join(moved)} |")
    lines += ["", "| | wall | CPU | aim |", "|---|---|---|---|"]
    beside = found["fedqc / default"]
    aim = (
        f"wall {_verdict(beside['wall'], AIM_WALL)}"
        if work["weights"] == count(resnet18_layers())
        else "none at this size"
    )
    lines.append(f"| fedqc / default | {beside['wall']} | {beside['cpu']} | {aim} |")
    beside = found["fedqc / floor"]
    lines.append(f"| fedqc / floor | {beside['wall']} | {beside['cpu']} |  |")
    if small:
        for name in ("running", "from nothing"):
            aim = f"CPU {_verdict(small[name]['cpu_s'], AIM_CPU)}"
            lines.append(
                f"| small run, {name} / its floor | {small[name]['wall_s']} | {small[name]['cpu_s']} | "
                f"{aim} |"
            )
        costs = "; ".join(f"{name} {_cost(side['seconds'])}" for name, side in small.items())
        lines += [
            "",
            f"Small run, {len(SITES)} sites, 32 images a site, five rounds: {costs}. Final weights: equal "
            "bit for bit.",
        ]
    env = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    lines += [
        "",
        f"{work['sites']} sites, {work['weights'] / 1e6:.1f} M float32 weights in {work['arrays']} arrays, "
        "TLS, registered keys, "
        f"{'nginx in front of fedqc' if work['proxy'] else 'no nginx here: fedqc without its proxy'}. "
        f"{work['turns']} turns of {work['rounds']} rounds after a warm-up; ratios are median (min–max) "
        f"over the turns. {env['date']}, {env['cores']} cores, {env['machine']}, load {env['load_1min']} "
        f"before and {env['load_1min_after']} after; Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _verdict(found: Ratio, aim: float) -> str:
    return f"≤ {aim:g}: {'met' if found.median <= aim else 'missed'}"


def _cost(cost: Mapping[str, float]) -> str:
    return f"{cost['wall_s']:.1f} s and {cost['cpu_s']:.1f} CPU-s"


def _seconds(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, one turn of one round")
    parser.add_argument("--turns", type=int, help="instead of 2, or 1 with --quick")
    parser.add_argument(
        "--rounds", type=int, help="a turn, after the warm-up: instead of 3, or 1 with --quick"
    )
    parser.add_argument("--no-small", action="store_true", help="leave out the whole small run")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="also rewrite the table in this Markdown page"
    )
    arguments = parser.parse_args()
    turns, rounds = (
        arguments.turns or (1 if arguments.quick else 2),
        arguments.rounds or (1 if arguments.quick else 3),
    )
    channels = QUICK_CHANNELS if arguments.quick else CHANNELS
    try:
        with tempfile.TemporaryDirectory(prefix="fedqc-round-") as folder:
            result = measure_all(
                Path(folder), channels=channels, rounds=rounds, turns=turns, small=not arguments.no_small
            )
        if arguments.update:
            update_table(arguments.update, "deployment_round", table(result))
    except BenchmarkError as error:
        say(f"deployment_round: {error}")
        return 1
    print(to_json(result) if arguments.format == "json" else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_side(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--side"] else main())
