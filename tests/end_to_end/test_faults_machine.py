"""Faults of the machines on which a federation runs: disks that are full or read-only, clocks that jump, few
file descriptors. Each is said in a line, nothing is lost, and the model is that of the run that nothing
happened to.

`make test-slow`. The mounts need root: what cannot be had here is skipped by its name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date, timedelta
from pathlib import Path

import pytest

from tests.helpers.faulty import A, B, Faulty, one_error, plan_of
from tests.helpers.hospital import fill, read_only
from tests.helpers.rig import LIMIT_S, NGINX, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
DISK_BYTES = 256 << 20  # all runs of this module take about 80 MiB
MOST_RESUMED = 3
HOUR_S = 3600


def mount(*words: object) -> bool:
    """Whether this system permits the mount."""
    ended = subprocess.run(["mount", *map(str, words)], capture_output=True, timeout=30, check=False)
    return ended.returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


class Machine(Faulty):
    """A federation of two hospitals whose coordinator has a small disk, and whose clocks can be set."""

    has_small_disk = False

    def clock(self, role: str) -> Path:
        """How far the clock of a hospital or of the coordinator ("federation") is off, for libfaketime."""
        # where a node may read under Landlock
        return self.fed / "clock" if role == "federation" else self.site(role) / "run" / "clock"

    def set_clock(self, role: str, ahead_s: int) -> None:
        path = self.clock(role)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{ahead_s:+d}\n", encoding="ascii")

    def with_clock(self, role: str) -> list[str]:
        """The words before a command whose processes follow that clock, its jumps included."""
        self.set_clock(role, 0)
        more = {
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": self.clock(role),
            "FAKETIME_CACHE_DURATION": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,  # as a clock that is set: the monotonic one goes on
            "FAKETIME_DISABLE_SHM": 1,
        }
        return ["env", *(f"{name}={value}" for name, value in more.items())]

    def finished(self, run: str) -> str:
        """Follow a run to its end, resumed as often as it says so; all that was said of it."""
        said = ""
        for _ in range(1 + MOST_RESUMED):
            process = self.started(f"run-{run}")
            wait_until(lambda: process.poll() is not None, LIMIT_S, f"{run}: the end", self.tails)  # noqa: B023
            said += self.log(f"run-{run}")
            if process.returncode == 0:
                return said
            assert "fedqc: hint:" in said, said
            assert "Traceback" not in said
            self.make_whole()
            self.resume(run)
        pytest.fail(f"{run}: not finished after {MOST_RESUMED} resumptions:\n{said}")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("machine"), sites=2, running=False)
    with ExitStack() as stack:
        disk = made.folder / "disk"
        disk.mkdir()
        made.fed = disk / "fed"
        made.has_small_disk = mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", disk)
        if made.has_small_disk:
            stack.callback(unmount, disk)
        stack.enter_context(made)
        made.make_data()
        made.init()
        for name in made.names:
            made.enrol(name)
        made.make_whole()
        yield made
    assert made.left_behind == []


@pytest.fixture(autouse=True)
def _whole_before_and_sound_after(deployment: Machine) -> Iterator[None]:
    deployment.make_whole()
    yield
    deployment.check_invariants()


PLAN = plan_of("federated", rounds=3, epochs=8, deadline_s=200, patience_s=150)


@pytest.fixture(scope="module")
def undisturbed(deployment: Machine) -> list[str]:
    deployment.make_whole()
    deployment.begin(PLAN, "undisturbed")
    deployment.outcome("undisturbed")
    return deployment.hashes("undisturbed")


def told(fault: str, *lines: str) -> None:
    """For `pytest -s`: what the operator saw."""
    print(f"\n{fault}:", *lines, sep="\n  ")


def errors_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("fedqc: error", "fedqc: hint"))]


def test_a_full_disk_under_the_coordinator_ends_the_run_by_its_name_and_loses_nothing(
    deployment: Machine, undisturbed: list[str]
) -> None:
    if not deployment.has_small_disk:
        pytest.skip("no small disk: this system permits no mount of a tmpfs")
    deployment.begin(PLAN, "full")
    agent = deployment.freeze_in_training(B, "full")
    before = deployment.records("full")
    try:
        fill(deployment.fed, leave_pages=0)
        os.kill(agent, signal.SIGCONT)
        said = deployment.outcome("full", status=1)
        error, hint = one_error(said, "disk-full")
        assert "fedqc run resume full" in hint
        refused = deployment.call("run", "resume", "full", "--federation", deployment.fed, "--wait", 5)
        told("full disk", error, hint, *errors_of(refused.stderr))
        one_error(refused.stderr, "disk-full")
    finally:  # else every later test fails of it
        (deployment.fed / "ballast").unlink()
    assert deployment.records("full")[: len(before)] == before
    deployment.make_whole()
    deployment.resume("full")
    deployment.outcome("full")
    assert deployment.hashes("full") == undisturbed


def test_a_read_only_run_folder_is_named_and_the_run_is_resumed_once_it_can_be_written(
    deployment: Machine, undisturbed: list[str]
) -> None:
    run = "closed"
    deployment.begin(PLAN, run)
    agent = deployment.freeze_in_training(B, run)
    before = deployment.records(run)
    with read_only(deployment.run(run)):
        os.kill(agent, signal.SIGCONT)
        error, hint = one_error(deployment.outcome(run, status=1), "not-writable")
        deployment.make_whole()
        again = deployment.call("run", "resume", run, "--federation", deployment.fed, "--wait", 60)
        told("read-only run folder", error, hint, *errors_of(again.stderr))
        one_error(again.stderr, "not-writable")
    assert deployment.records(run)[: len(before)] == before
    deployment.make_whole()
    deployment.resume(run)
    deployment.outcome(run)
    assert deployment.hashes(run) == undisturbed


def restarted(deployment: Machine, role: str, prefix: list[str]) -> None:
    """End the processes of a role, and start them anew behind these words."""
    if role == "federation":
        deployment.end_process("federation")
        deployment.start_federation(prefix=prefix)
    else:
        deployment.stop_site(role)
        deployment.start_site(role, prefix=prefix)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
@pytest.mark.parametrize("role", ["federation", A])
def test_with_64_file_descriptors_a_role_works(
    role: str, deployment: Machine, undisturbed: list[str]
) -> None:
    restarted(deployment, role, ["prlimit", "--nofile=64:64"])
    try:
        deployment.begin(PLAN, f"few-{role}")
        said = deployment.finished(f"few-{role}")
        assert deployment.hashes(f"few-{role}") == undisturbed
        told(f"64 file descriptors: {role}", *errors_of(said), *deployment.log(role).splitlines()[-4:])
    finally:
        restarted(deployment, role, [])


def test_an_enrolment_that_has_expired_is_told_on_both_sides_until_it_is_renewed(
    deployment: Machine, undisturbed: list[str]
) -> None:
    """Its end is set to yesterday in the coordinator's list and at the hospital."""
    yesterday = (date.today() - timedelta(days=1)).isoformat()
    for path in (deployment.fed / "sites" / f"{B}.json", deployment.site(B) / "state" / "coordinator.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | {"expires": yesterday}), encoding="utf-8")
    listed = deployment.do("federation", "sites", "--federation", deployment.fed)
    check = deployment.call("run", "check", deployment.write_plan(PLAN), "--federation", deployment.fed)
    deployment.stop_site(B)
    deployment.start_site(B)
    said = f"{B}: its enrolment has expired"
    assert said in listed.stderr
    assert said in check.stderr
    assert check.returncode == 4, "the quorum is not there"
    assert f"enrolment: expired on {yesterday}" in deployment.log(B)
    kit = deployment.folder / "kit-renewed.zip"
    deployment.do("federation", "renew", B, "--out", kit, "--federation", deployment.fed)
    deployment.do("site", "join", kit, "--fingerprint", deployment.fingerprint, "--site", deployment.site(B))
    restarted(deployment, B, [])
    assert "enrolment" not in deployment.log(B)
    deployment.begin(PLAN, "renewed")
    deployment.outcome("renewed")
    assert deployment.hashes("renewed") == undisturbed
    told("expired enrolment", *(line for line in listed.stderr.splitlines() if "enrolment" in line))


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
@pytest.mark.parametrize("role", ["federation", A])
def test_a_clock_that_jumps_by_an_hour_is_said_and_loses_nothing(
    role: str, jump_s: int, deployment: Machine, undisturbed: list[str]
) -> None:
    """In mid-run, and back again once somebody has read what is wrong."""
    run = f"clock-{role}-{'ahead' if jump_s > 0 else 'behind'}"
    restarted(deployment, role, deployment.with_clock(role))
    try:
        deployment.begin(PLAN, run)
        agent = deployment.freeze_in_training(A, run)
        deployment.set_clock(role, jump_s)
        os.kill(agent, signal.SIGCONT)
        wait_until(
            lambda: "clock" in deployment.log(A) or len(deployment.records(run)) == 3,
            LIMIT_S,
            "a word of the clock, or the end",
            deployment.tails,
        )
        deployment.set_clock(role, 0)
        said = deployment.finished(run)
        assert deployment.hashes(run) == undisturbed
        lines = [line for line in deployment.log(A).splitlines() if "clock" in line]
        told(f"clock of {role} {jump_s:+d} s", *errors_of(said), *dict.fromkeys(lines))
    finally:
        restarted(deployment, role, [])
