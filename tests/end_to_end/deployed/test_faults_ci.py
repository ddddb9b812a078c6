"""Faults on real processes that take seconds; those that take minutes are in test_faults_processes.py.

After each of them: every ledger verifies and has charged each run once, no process is without its parent, no
half-written file is left, and nobody was shown a traceback. What is asked of the work itself is more than
that it goes on: a not private run ends in the very weights of the run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from server.run.control_files import is_being_run
from tests.helpers.faulty import A, B, C, Faulty, one_error, plan_of


@pytest.fixture(autouse=True)
def _invariants(deployment: Faulty) -> Iterator[None]:
    yield
    deployment.check_invariants()


@pytest.fixture(scope="module")
def undisturbed(deployment: Faulty) -> list[str]:
    """The control of all runs here: the model after each round of the run that nothing happened to."""
    deployment.begin(plan_of("federated", rounds=2, epochs=8), "undisturbed")
    deployment.outcome("undisturbed")
    return deployment.hashes("undisturbed")


def test_f1_an_agent_killed_in_mid_training_costs_nothing_but_time(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated", rounds=2, epochs=8), "f1")
    first = deployment.freeze_in_training(B, "f1")
    deployment.kill_pid(first)
    deployment.outcome("f1")
    assert deployment.pid(B, "agent") != first
    assert deployment.hashes("f1") == undisturbed
    assert [record["answered"] for record in deployment.records("f1")] == [[A, B, C]] * 2
    assert "the agent ended with signal 9; it is restarted" in deployment.log(B)


def test_f4_f30_a_run_outlives_its_watcher_and_is_resumed_after_its_serverapp_was_killed(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    """Ctrl-C for `run start`: the run goes on. Then the ServerApp is killed: who watches is told, and
    `resume` goes on from round 1.
    """
    deployment.begin(plan_of("federated", rounds=2, epochs=8), "f4")
    deployment.freeze_in_training(B, "f4")
    deployment.started("run-f4").send_signal(signal.SIGINT)
    said = deployment.outcome("f4", status=130)
    assert "f4: no longer watched; the run continues; fedqc run watch f4 follows it" in said
    assert is_being_run(deployment.fed, "f4")
    one_error(deployment.call("run", "resume", "f4", "--federation", deployment.fed).stderr, "run-running")

    deployment.kill_pid(deployment.server_app())
    os.kill(deployment.pid(B, "agent"), signal.SIGCONT)
    watched = deployment.call("run", "watch", "f4", "--federation", deployment.fed)
    assert watched.returncode == 1
    _, hint = one_error(watched.stderr, "run-interrupted")
    assert "fedqc run resume f4" in hint
    listed = {
        run["run"]: run["status"] for run in deployment.json("run", "list", "--federation", deployment.fed)
    }
    assert listed["f4"] == "interrupted"

    before = deployment.records("f4")
    deployment.resume("f4")
    deployment.outcome("f4")
    assert deployment.records("f4")[: len(before)] == before
    assert deployment.hashes("f4") == undisturbed
