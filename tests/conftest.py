"""A tiny consortium of generated hospitals, and a grid to run plans on it in this process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}

from hypothesis import settings

from tests.helpers.command_line import fedqc, simulate_words
from tests.helpers.consortium import PATIENTS, SITES, Consortium, Finished, settle, tiny_plan, write_plan

settings.register_profile("fedqc", deadline=None)  # other work on the machine is no finding
settings.load_profile("fedqc")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    from common.learning import set_threads

    set_threads(1)


@pytest.fixture(scope="session")
def tiny_consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four generated hospitals of 14 patients with warm caches. Read only: tests that write or spend take
    `consortium`.
    """
    from client.agent.tasks import prepare
    from client.simulation.phantom_sites import write_consortium

    data = tmp_path_factory.mktemp("tiny") / "data"
    write_consortium(data, sites=len(SITES), patients=PATIENTS, seed=7, say=lambda _: None)
    for name in SITES:
        # the public bucket is the operator's word: enough for a private arm
        settle(data / name, nominal_patients=50)
        prepare(data / name / "site.yaml", tiny_plan())
    return data


@pytest.fixture
def data(tiny_consortium: Path, tmp_path: Path) -> Path:
    """A copy of the tiny consortium, caches included, for a test that writes to it or spends its budget."""
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


@pytest.fixture
def consortium(data: Path) -> Consortium:
    return Consortium(data=data)


@pytest.fixture(scope="session")
def finished(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    data = Path(shutil.copytree(tiny_consortium, folder / "data"))
    plan = write_plan(folder / "tiny.yaml", arms=["public", "local", "federated", "federated_dp", "pooled"])
    said = fedqc(*simulate_words(plan, data, folder / "runs" / "tiny", "--format", "json"), cwd=folder)
    return Finished(data=data, plan=plan, out=folder / "runs" / "tiny", said=said)
