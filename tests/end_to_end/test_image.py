"""The image of `docker/`, built, and a run of a federation whose every process lives in it.

No engine is needed: `tests/helpers/containers.py` says what builds and starts it, and what differs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.simulation.phantom_sites import write_consortium
from tests.helpers.command_line import ROOT
from tests.helpers.containers import Images, base, compose, why_not
from tests.helpers.ports import free_port
from tests.helpers.rig import LIMIT_S, descendants, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=f"the image: {why_not()}")]

TAG, NGINX = "fedqc:0.1.0", "nginx:1.28.0"
USER = 49999
MAX_BYTES = 2_000_000_000
"""Of the image with PyTorch for CPUs: 1.7 GB on Debian's base."""
COMPILERS = re.compile(
    r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|tcc|ld|ld\.\w+|as|make|rustc|cargo|go|nvcc)(-[\d.]+)?"
)
PLAN = """name: first
question: Do we work together?
arms: [federated_dp]
training: {rounds: 3}
privacy: {epsilon: 2}
federation: {quorum: 1}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """A store with the image in it; gigabytes, so it is removed at the end."""
    store = Images(tmp_path_factory.mktemp("images") / "store")
    try:
        store.make_base()
        store.build(TAG)
        yield store
    finally:
        store.remove()


@pytest.fixture(scope="module")
def container(images: Images) -> str:
    return images.container(TAG)


@pytest.fixture(scope="module")
def config(images: Images) -> dict[str, Any]:
    """What the image says of itself."""
    said = subprocess.run(
        [*images.program, "inspect", "--type", "image", TAG],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(said.stdout)["Docker"]["config"]
    return found


def cuda(root: Path) -> bool:
    return any(root.glob("opt/fedqc/lib/python3*/site-packages/nvidia"))


def test_it_is_small_and_holds_no_compiler_and_no_cache(images: Images, container: str) -> None:
    root = images.root(container)
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    if not cuda(root):  # pip's own index gives CUDA builds, ten times the size
        assert sum(path.stat().st_size for path in files) < MAX_BYTES
    inside = [path.relative_to(root) for path in files]
    assert [path for path in inside if path.parent.name == "bin" and COMPILERS.fullmatch(path.name)] == []
    for cache in ("root/.cache", "tmp", "var/cache/apt", "var/lib/apt/lists", "src", "dist"):
        assert [path for path in inside if path.is_relative_to(cache)] == [], cache
    assert [path for path in inside if path.suffix == ".whl" and "ensurepip" not in path.parts] == []


def test_it_runs_as_a_user_who_owns_nothing_in_it(
    images: Images, container: str, config: dict[str, Any]
) -> None:
    assert config["User"] == f"{USER}:{USER}"
    assert images.in_image(container, "id", "-u", user=config["User"]).split() == [str(USER)]
    find = "find / -xdev ( -type d ! -readable -prune ) -o ( -writable ! -type l -print )"
    writable = images.in_image(container, *find.split(), user=config["User"]).split()
    assert set(writable) <= {"/tmp", "/var/tmp", "/run/lock"}


def test_what_is_installed_is_what_is_tested(images: Images, container: str) -> None:
    """Every package has the version of constraints.txt, and fits the others."""
    pinned = {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(
            r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    installed = json.loads(images.in_image(container, "pip", "list", "--format", "json"))
    assert len(installed) > 50
    ours = {"fedqc", "pip"}
    differing = {
        one["name"]: one["version"]
        for one in installed
        if one["name"].lower() not in ours
        and one["version"].partition("+")[0] != pinned.get(one["name"].lower().replace("_", "-"))
    }
    assert differing == {}
    assert "No broken requirements" in images.in_image(container, "pip", "check")


# ---- the services of the compose files


class Host:
    """One side's machine: its compose file, the folders it names, and what it started."""

    def __init__(
        self,
        images: Images,
        containers: dict[str, str],
        entrypoint: list[str],
        name: str,
        settings: dict[str, str],
    ) -> None:
        self.images, self.containers, self.entrypoint = images, containers, entrypoint
        text = re.sub(
            r"\$\{(\w+)(?::?[?-][^}]*)?\}",
            lambda found: settings.get(found[1], ""),
            json.dumps(compose(name)["services"]),
        )
        self.services: dict[str, Any] = json.loads(text)
        self.started: dict[str, subprocess.Popen[str]] = {}
        self.logs = images.folder / "logs"
        self.logs.mkdir(exist_ok=True)

    def _command(self, service: str, words: list[str]) -> list[str]:
        values = self.services[service]
        return self.images.command(self.containers[values["image"]], values, words)

    def words(self, service: str, *words: str) -> list[str]:
        """The entry point, and these words or the service's own."""
        return [
            *self.services[service].get("entrypoint", self.entrypoint),
            *(words or self.services[service]["command"]),
        ]

    def up(self, *services: str) -> None:
        """`docker compose up --detach`."""
        for name in services:
            with (self.logs / f"{name}.log").open("w") as sink:
                self.started[name] = subprocess.Popen(
                    self._command(name, self.words(name)),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env=self.images.environment,
                    start_new_session=True,
                    text=True,
                )

    def run(self, service: str, *words: str) -> str:
        """`docker compose run --rm SERVICE WORDS`."""
        return self.exec(service, *self.words(service, *words))

    def exec(self, service: str, *words: str) -> str:
        """`docker compose exec SERVICE WORDS`."""
        said = subprocess.run(
            self._command(service, list(words)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.images.environment,
            timeout=LIMIT_S,
            check=False,
        )
        assert said.returncode == 0, f"{service}: {words}\n{said.stdout}\n{said.stderr}\n{self.tell()}"
        return said.stdout

    def healthy(self, service: str) -> bool:
        """Whether the service's health check succeeds, as the engine would ask."""
        said = subprocess.run(
            self._command(service, self.services[service]["healthcheck"]["test"][1:]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.images.environment,
            timeout=LIMIT_S,
            check=False,
        )
        ended = [name for name, started in self.started.items() if started.poll() is not None]
        assert not ended, f"{ended} ended\n{self.tell()}"
        return said.returncode == 0

    def process(self, service: str) -> int:
        """The number of the process that the entry point became."""
        for pid in descendants(self.started[service].pid):
            if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"buildah"):
                return pid
        raise AssertionError(self.tell())

    def stop(self) -> dict[str, int]:
        """`docker compose stop`: a signal to each first process, SIGKILL if it does not end. The exit
        statuses.
        """
        for name, started in reversed(self.started.items()):
            if started.poll() is None:
                os.kill(
                    self.process(name), getattr(signal, self.services[name].get("stop_signal", "SIGTERM"))
                )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(int(self.services[name]["stop_grace_period"].removesuffix("s")))
                for pid in [*descendants(started.pid), started.pid] if started.poll() is None else []:
                    os.kill(pid, signal.SIGKILL)
        return {name: started.wait(30) for name, started in self.started.items()}

    def tell(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.logs.glob("*.log"))
        )


def folder_of(path: Path) -> Path:
    """A folder for a container: its user's, and closed to others."""
    path.mkdir(mode=0o700, parents=True)
    give(path)
    return path


def give(path: Path) -> None:
    for one in (path, *path.rglob("*")):
        os.chown(one, USER, USER)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_run_of_three_rounds_by_the_services_of_the_compose_files(
    images: Images, container: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """The commands of docs/deploy.md, Docker section, in its order."""
    proxy = images.container(base())
    install = "apt-get install -qq --no-install-recommends nginx-light"
    images.in_image(proxy, "sh", "-ec", f"apt-get update -qq; {install}", user="0:0")
    containers = {TAG: container, NGINX: proxy}
    port = str(free_port())
    folder, site = folder_of(tmp_path / "coordinator"), folder_of(tmp_path / "site")
    data = tmp_path / "data"
    write_consortium(data, sites=2, patients=60, seed=7, say=lambda _: None)
    give(data)
    entrypoint = config["Entrypoint"]
    coordinator = Host(
        images,
        containers,
        entrypoint,
        "compose.coordinator.yaml",
        {"FEDQC_COORDINATOR": str(folder), "FEDQC_PORT": port},
    )
    hospital = Host(
        images,
        containers,
        entrypoint,
        "compose.site.yaml",
        {"FEDQC_SITE": str(site), "FEDQC_DATA": str(data / "hospital-a")},
    )
    try:
        coordinator.run(
            *("desk", "federation", "init", "lung-artifacts", "--host", "127.0.0.1", "--listen", "127.0.0.1"),
            *("--port", port, "--dir", "federation"),
        )
        coordinator.up("proxy", "coordinator")
        wait_until(lambda: coordinator.healthy("coordinator"), LIMIT_S, "coordinator", coordinator.tell)
        assert coordinator.healthy("proxy")

        hospital.run(
            *("desk", "site", "init", "--images", "/data/images", "--labels", "/data/labels.csv"),
            *(
                "--name",
                "hospital-a",
                "--kind",
                "synthetic",
                "--cohort",
                "phantoms",
                "--nominal-patients",
                "50",
            ),
            *("--level", "usual", "--yes"),
        )
        shutil.copy(site / "request.zip", folder / "request.zip")
        give(folder / "request.zip")
        said = coordinator.exec(
            "coordinator", *entrypoint, "federation", "approve", "request.zip", "--out", "kit.zip", "--yes"
        )
        fingerprint = said.split()[-1]
        shutil.copy(folder / "kit.zip", site / "kit.zip")
        (site / "first.yaml").write_text(PLAN, encoding="utf-8")
        (folder / "first.yaml").write_text(PLAN, encoding="utf-8")
        give(site)
        give(folder / "first.yaml")
        hospital.run("desk", "site", "join", "kit.zip", "--fingerprint", fingerprint)
        hospital.up("agent", "node")
        for service in ("agent", "node"):
            wait_until(functools.partial(hospital.healthy, service), LIMIT_S, service, hospital.tell)
        hospital.run("desk", "site", "approve", "first.yaml", "--yes")
        coordinator.exec("coordinator", *entrypoint, "run", "start", "first.yaml", "--name", "first")

        evaluation = json.loads(
            (folder / "federation/runs/first/evaluation.json").read_text(encoding="utf-8")
        )
        assert (evaluation["status"], evaluation["rounds"]) == ("completed", 3)
        sent = json.loads(hospital.run("desk", "site", "sent", "--format", "json"))
        assert [line["round"] for line in sent if line["purpose"] == "train federated_dp"] == [1, 2, 3]
        for host, service in ((coordinator, "coordinator"), (hospital, "agent"), (hospital, "node")):
            found = status(host.process(service))
            assert found["Uid"].split() == found["Gid"].split() == [str(USER)] * 4, service
            assert (int(found["CapEff"], 16), found["NoNewPrivs"]) == (0, "1"), service
        assert "agent: already without a network" in hospital.tell()
    finally:
        ends = hospital.stop() | coordinator.stop()
    by_request = (0, 128 + signal.SIGTERM)
    assert set(ends) == {"agent", "node", "proxy", "coordinator"}
    assert all(end in by_request for end in ends.values()), hospital.tell() + coordinator.tell()
