"""Fixtures of all tests, and how the tests are spread over processes.

Helpers that are not fixtures are in tests/helpers/.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored, and every process started from here would inherit
    # that: tests that press Ctrl-C would wait for nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.command_line import fedqc, simulate_words
from tests.helpers.consortium import PATIENTS, SITES, Consortium, Finished, settle, tiny_plan, write_plan
from tests.helpers.ports import keep_apart

settings.register_profile("fedqc", deadline=None)  # other work on the machine is no finding
settings.load_profile("fedqc")
keep_apart()

LONG_FIRST = (
    "tests/end_to_end/deployed/test_deployed_run.py",
    "tests/end_to_end/deployed/test_faults_ci.py",
    "tests/end_to_end/test_egress.py",
    "tests/end_to_end/test_resume.py",
    "tests/server/run/test_signed_run.py",
    "tests/end_to_end/test_faults_identity_ci.py",
)
"""Modules that take longest, begun first so that no process is left alone with one of them at the end."""


FEDERATION = "tests/end_to_end/deployed/"
"""Modules that share one federation, kept in one process so that it is started once."""


IN_ORDER = ("tests/end_to_end/test_faults_identity.py",)
"""Modules whose tests tell one story of one federation: what one test revokes or fills stays so."""


class ModuleScheduling(LoadScopeScheduling):
    """Keep each module in one process, so that its fixtures are made once, and FEDERATION in one."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return FEDERATION if module.startswith(FEDERATION) else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ModuleScheduling:
    """Distribute by ModuleScheduling, in the order of collection."""
    config.option.loadscopereorder = False
    return ModuleScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Begin the longest modules first; the order inside a module stays that of pytest-randomly."""
    yield
    ranks = {name: number for number, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
    for module in IN_ORDER:
        places = [place for place, item in enumerate(items) if item.nodeid.partition("::")[0] == module]
        story = sorted((items[place] for place in places), key=lambda item: item.location[1] or 0)
        for place, item in zip(places, story, strict=True):
            items[place] = item


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all processes of a test run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / ".complete").touch()
    return folder


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change of every file and folder below `folder`."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    from common.learning import set_threads

    set_threads(1)


@pytest.fixture(scope="session")
def _public_sets_drawn_once() -> Iterator[None]:
    """Runs in one test process share the coordinator's images, which depend on three numbers of the plan.
    Drawing them was a quarter of the CPU of such a run; `fedqc simulate` draws them as always.
    """
    from server.run import conduct

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conduct, "public_set", functools.cache(conduct.public_set))
        yield


@pytest.fixture(scope="session")
def tiny_consortium(
    tmp_path_factory: pytest.TempPathFactory, _public_sets_drawn_once: None
) -> Iterator[Path]:
    """Four generated hospitals of 14 patients with warm caches, for all processes of a test run. Read only,
    and checked to be: whoever opens an agent there writes to its ledger while another process copies it.
    Tests that write or spend take `consortium`.
    """

    def make(folder: Path) -> None:
        from client.agent.tasks import prepare
        from client.simulation.phantom_sites import write_consortium

        data = folder / "data"
        write_consortium(data, sites=len(SITES), patients=PATIENTS, seed=7, say=lambda _: None)
        for name in SITES:
            # the public bucket is the operator's word: enough for a private arm
            settle(data / name, nominal_patients=50)
            prepare(data / name / "site.yaml", tiny_plan())

    folder = once(tmp_path_factory, "tiny", make) / "data"
    before = written(folder)
    yield folder
    assert written(folder) == before, "a test wrote to the shared hospitals: take `consortium` or a copy"


@pytest.fixture
def data(tiny_consortium: Path, tmp_path: Path) -> Path:
    """A copy of the tiny consortium, caches included, for a test that writes to it or spends its budget."""
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


@pytest.fixture
def consortium(data: Path) -> Consortium:
    return Consortium(data=data)


@pytest.fixture(scope="session")
def finished(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run of all arms through the console script. Read only."""

    def make(folder: Path) -> None:
        data = Path(shutil.copytree(tiny_consortium, folder / "data"))
        arms = ["public", "local", "federated", "federated_dp", "pooled"]
        plan = write_plan(folder / "tiny.yaml", arms=arms)
        words = simulate_words(plan, data, folder / "runs" / "tiny", "--format", "json")
        ended = fedqc(*words, cwd=folder)
        (folder / "ended.json").write_text(
            json.dumps([ended.returncode, ended.stdout, ended.stderr]), encoding="utf-8"
        )

    folder = once(tmp_path_factory, "finished", make)
    status, out, err = json.loads((folder / "ended.json").read_text(encoding="utf-8"))
    return Finished(
        data=folder / "data",
        plan=folder / "tiny.yaml",
        out=folder / "runs" / "tiny",
        said=subprocess.CompletedProcess(["fedqc", "simulate"], status, out, err),
    )
