"""A deployment to which faults happen, and what must hold after each of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from client.supervision.supervisor import state_of
from common.plan import RunPlan
from server.federation.registry import Federation
from server.federation.services import proxy_answers, superlink_answers
from server.run.control_files import is_being_run
from server.run_folder import RunFolder
from tests.helpers.rig import LIMIT_S, NGINX, Deployment, born, deployed_plan, descendants, wait_until

A, B, C = "hospital-a", "hospital-b", "hospital-c"
EPOCHS = 20
"""A round that takes seconds, so that something can happen in the middle of it."""


def plan_of(arm: str, *, rounds: int = 3, epochs: int = EPOCHS, **federation: object) -> RunPlan:
    """One arm on all sites. Nobody hurries: what is awaited is awaited for minutes."""
    waits = {"quorum": 2, "deadline_s": 600, "patience_s": 300} | federation
    return deployed_plan(arms=[arm], training={"rounds": rounds, "local_epochs": epochs}, federation=waits)


def one_error(said: str, code: str) -> tuple[str, str]:
    """The error and the hint that somebody was shown: one line each."""
    errors = [line for line in said.splitlines() if line.startswith("fedqc: error")]
    hints = [line for line in said.splitlines() if line.startswith("fedqc: hint")]
    assert len(errors) == len(hints) == 1, said
    assert errors[0].startswith(f"fedqc: error [{code}]: "), said
    assert "Traceback" not in said
    return errors[0], hints[0]


class Faulty(Deployment):
    """A deployment to which things happen."""

    def started(self, name: str) -> subprocess.Popen[bytes]:
        return self._started[name]

    # ---- runs

    def begin(self, plan: RunPlan, run: str, *more: object) -> None:
        """`fedqc run start` in the background."""
        words = [
            "run",
            "start",
            self.write_plan(plan),
            "--federation",
            self.fed,
            "--name",
            run,
            "--wait",
            120,
            *more,
        ]
        self.background(f"run-{run}", words)

    def resume(self, run: str, *more: object) -> None:
        self.background(f"run-{run}", ["run", "resume", run, "--federation", self.fed, "--wait", 120, *more])

    def outcome(self, run: str, *, status: int = 0) -> str:
        """What `run start` or `resume` said, once it has ended with this status."""
        process = self.started(f"run-{run}")
        wait_until(lambda: process.poll() is not None, LIMIT_S, f"{run}: the end", self.tails)
        said = self.log(f"run-{run}")
        assert process.returncode == status, f"status {process.returncode}\n{said}\n{self.tails()}"
        assert "Traceback" not in said
        return said

    def records(self, run: str) -> list[dict[str, Any]]:
        """Finished rounds of a run of one arm, oldest first."""
        folder = self.run(run)
        if not (folder / "plan.yaml").is_file():
            return []
        found = RunFolder.open(folder)
        return found.arm(found.plan.arms[0]).rounds()

    def hashes(self, run: str) -> list[str]:
        """Of the model after each round."""
        return [record["model_sha256"] for record in self.records(run)]

    def await_rounds(self, run: str, number: int) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]]:
            assert self.started(f"run-{run}").poll() is None or len(self.records(run)) >= number, self.tails()
            return self.records(run)

        wait_until(lambda: len(look()) >= number, LIMIT_S, f"{run}: round {number}", self.tails)
        return self.records(run)

    def freeze_in_training(self, name: str, run: str, *, after_round: int = 1) -> int:
        """Stop a site's agent (SIGSTOP) in the middle of a round's work; its number."""
        if after_round:
            self.await_rounds(run, after_round)
        else:  # rehearsal and introduction are work too
            live = self.run(run) / "live.json"
            wait_until(
                lambda: live.exists() and '"start"' not in live.read_text(),
                LIMIT_S,
                f"{run}: its first round",
                self.tails,
            )
        busy, agent = self.site(name) / "run" / "busy", self.pid(name, "agent")
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            if busy.exists():
                os.kill(agent, signal.SIGSTOP)
                time.sleep(0.05)
                if busy.exists():  # and it cannot go away any more
                    return agent
                os.kill(agent, signal.SIGCONT)
            time.sleep(0.005)
        raise AssertionError(f"{name}: never busy in {run}\n{self.tails()}")

    def server_app(self) -> int:
        """The process that conducts the run under way."""

        def look() -> list[int]:
            mine = descendants(self.pid("federation", "superexec"))
            return [pid for pid in mine if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes()]

        return int(wait_until(look, LIMIT_S, "a ServerApp", self.tails)[0])

    def kill_pid(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not born(pid), LIMIT_S, f"the end of {pid}")

    # ---- everything up

    def is_up(self, name: str) -> bool:
        state = state_of(self.site(name))
        return bool(state["agent"] and state["node"])

    def make_whole(self) -> None:
        """Start what is not running, and wait until all of it works."""
        federation = Federation.open(self.fed)
        if "federation" not in self._started or self.started("federation").poll() is not None:
            self.start_federation()
        for answers in (superlink_answers, proxy_answers) if NGINX else (superlink_answers,):
            wait_until(partial(answers, federation), LIMIT_S, "services up", self.tails)
        for name in self.names:
            if name not in self._started or self.started(name).poll() is not None:
                self.start_site(name, wait=False)
        for name in self.names:
            wait_until(partial(self.is_up, name), LIMIT_S, f"{name} up", self.tails)
        runs = [folder.name for folder in (self.fed / "runs").glob("[!.]*")]
        wait_until(
            lambda: not any(is_being_run(self.fed, run) for run in runs),
            LIMIT_S,
            "no run under way",
            self.tails,
        )

    # ---- what must hold after everything

    def orphans(self) -> set[int]:
        """Processes of ours that nobody who is still there has started."""
        owned = {
            pid
            for started in self._started.values()
            if started.poll() is None
            for pid in (started.pid, *descendants(started.pid))
        }
        return {pid for pid, _ in self.processes()} - owned

    def check_invariants(self) -> None:
        wait_until(
            lambda: not self.orphans(), LIMIT_S, "no process without its parent", lambda: str(self.orphans())
        )
        for name in self.names:
            for account in self.json("site", "budget", "--verify", "--site", self.site(name)):
                assert account["verified"]
                requests = [entry["request"] for entry in account["entries"]]
                assert len(requests) == len(set(requests)), f"{name}: charged twice"
        kept = [self.fed / part for part in ("state", "sites", "runs", "keys", "certificates")]
        kept += [self.site(name) / part for name in self.names for part in ("state", "run", "node")]

        def half() -> list[Path]:
            return [
                path
                for root in kept
                for path in root.rglob(".*")
                if not {"flwr", "tmp"} & set(path.relative_to(root).parts)
            ]

        wait_until(lambda: not half(), LIMIT_S, "no half-written file", lambda: str(half()))
        for log in self.logs.glob("*.log"):
            text = log.read_text(encoding="utf-8", errors="replace")
            assert "Traceback" not in text, f"{log.name}\n{text[-3000:]}"
            for line in text.splitlines():
                assert not line.startswith("fedqc: error") or re.match(
                    r"fedqc: error \[[a-z-]+\]: \S", line
                ), line
