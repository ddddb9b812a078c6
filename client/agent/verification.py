"""Verify each incoming task; sign and log each answer.

Once a site has joined a federation (`state/coordinator.json`), nothing is done without the coordinator's
signature over the task, the plan and the base model, for this site, with a nonce that was never used here
before. The head of the privacy ledger that the coordinator last received must be an ancestor of the
ledger. Each refusal happens before data is read. Every answer, refusals included, is signed over its final
bytes and recorded in `state/sent.jsonl` before it leaves.

A folder that never joined (a simulation, a rehearsal on phantoms) has no keys, and nothing is verified.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.agent.answer_grid import is_on_grid, wait_for_grid
from client.agent.failures import DISK_FULL, SITE_FAILURE, refusal_for
from client.agent.job import Job, NoAnswer
from client.site.approvals import admit_approved, note_run
from client.site.config import read_site
from client.site.kind import admit_kind
from client.site.policy import SitePolicy, admit_hours, default_policy, read_policy
from client.site.sent_log import note_sent
from common.arms import ARMS
from common.errors import ConfigError, PlanError, RefusedError, RunError
from common.files import append_line, write_bytes
from common.leave_one_out import study_of
from common.plan import RunPlan, parse_plan
from common.signing import Statement, load_key, parse_public, payload_sha256, sign, verify
from common.terminal import print
from common.wire import DescribeTask, Envelope, EvaluateTask, Refusal, TrainTask, WireMessage, type_of

if TYPE_CHECKING:
    from client.agent.tasks import Agent

TASKS: dict[str, type[WireMessage]] = {"Describe": DescribeTask, "Train": TrainTask, "Evaluate": EvaluateTask}
KEPT_NONCES = 100_000
COORDINATOR, SIGNING_KEY, NONCES, MODELS = "coordinator.json", "signing.key", "nonces", "models"


@functools.lru_cache(maxsize=64)
def guard_for(site: str) -> Guard:
    """The guard of a site folder or its site.yaml, made once a process."""
    return Guard(site)


class Guard:
    """Answers tasks for one site. One at a time: the caller (client/agent/server.py) sees to that."""

    def __init__(self, site: str) -> None:
        path = Path(site)
        self._path = path / "site.yaml" if path.is_dir() else path
        self._site, folder = read_site(self._path)
        self._folder, self._state = folder, folder / self._site.state
        self._coordinator: Ed25519PublicKey | None = None
        self._key: Ed25519PrivateKey | None = None
        if (self._state / COORDINATOR).is_file():
            self._coordinator = parse_public(
                json.loads((self._state / COORDINATOR).read_text(encoding="utf-8"))["coordinator_key"]
            )
            self._key = load_key(self._state / SIGNING_KEY)
        self._nonces = _Nonces(self._state / NONCES)
        with suppress(RefusedError):  # looked at now, so that no task opens an image before it is verified
            admit_kind(self._site, folder)

    @property
    def enrolled(self) -> bool:
        return self._key is not None

    def answer(
        self,
        method: str,
        plan_json: str,
        envelope: bytes,
        *,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
        cancelled: threading.Event | None = None,
    ) -> bytes:
        """Carry out a task, or refuse it: an exception leaves as the code of a refusal.

        A hospital's answers about patients leave at the policy's `answer_grid_s`, counted from the question.

        Args:
            method: "Describe", "Train" or "Evaluate".
            plan_json: the run's plan, canonical JSON.
            envelope: `Envelope.to_bytes()` of a task.
            progress: called with (stage, done, total) at public steps.
            cancelled: set when the caller has gone.
        Returns:
            `Envelope.to_bytes()` of the answer, signed where the site is enrolled.
        Raises:
            NoAnswer: work on patients of an enrolled hospital failed; its log says why.
        """
        asked = Statement(kind="", payload_sha256="", nonce="")
        began, cancelled = time.monotonic(), cancelled or threading.Event()
        answer: WireMessage
        try:
            opened = Envelope.from_bytes(envelope)
            if self.enrolled:
                asked = self._verified(opened, method, plan_json)
            job = Job(progress=progress, cancelled=cancelled)
            answer = self._work(method, plan_json, opened.payload, asked, job)
            payload = answer.to_bytes()
        except Exception as failure:
            answer = self._refusal_for(failure, asked.run)
            payload = answer.to_bytes()
        if self.enrolled and self._site.kind == "hospital" and is_on_grid(asked):
            wait_for_grid(began, self._answer_grid_s(), cancelled)
        if self._is_hidden(answer, asked):
            print(f"agent: {method} failed; nothing was sent, see site.log", file=sys.stderr, flush=True)
            raise NoAnswer
        if isinstance(answer, Refusal) and answer.code == DISK_FULL:  # the log is on that disk
            print(
                f"agent: {DISK_FULL}: free some space under {self._state}; nothing was sent",
                file=sys.stderr,
                flush=True,
            )
        try:
            return self._sealed(answer, payload, asked).to_bytes()
        except Exception as failure:  # what cannot be recorded does not leave
            answer = self._refusal_for(failure, asked.run)
            return self._signed(answer, answer.to_bytes(), asked).to_bytes()

    def _is_hidden(self, answer: WireMessage, asked: Statement) -> bool:
        """Whether an answer is a failure that may lie in a hospital's data, which then looks like absence."""
        failed = isinstance(answer, Refusal) and answer.code == SITE_FAILURE
        on_patients = asked.kind in ("TrainTask", "EvaluateTask")
        return failed and on_patients and self.enrolled and self._site.kind == "hospital"

    def _policy(self) -> SitePolicy:
        policy = self._site.policy
        return read_policy(self._folder / policy) if policy else default_policy(self._site.kind)

    def _answer_grid_s(self) -> float:
        """The policy's, or the default where the policy cannot be read, which is a refusal already."""
        try:
            return self._policy().answer_grid_s
        except ConfigError:
            return default_policy("hospital").answer_grid_s

    def _refusal_for(self, failure: Exception, run: str) -> Refusal:
        return refusal_for(failure, site=self._site.name, run=run, state=self._state)

    def _verified(self, envelope: Envelope, method: str, plan_json: str) -> Statement:
        """The statement that the coordinator signed.

        Raises:
            RefusedError: `unsigned-task`, `bad-signature`, `wrong-site`, `wrong-plan`, `replayed-task`.
        """
        assert self._coordinator is not None
        if not envelope.signature:
            raise _refusal("unsigned-task", "the task does not carry the coordinator's signature")
        try:
            verify(envelope.statement, envelope.signature, self._coordinator)
            asked = Statement.parse(envelope.statement)
        except RunError:
            raise _refusal(
                "bad-signature", "the task's signature is not that of the coordinator this site joined"
            ) from None
        expected = TASKS.get(method)
        if (
            expected is None
            or asked.kind != expected.__name__
            or asked.payload_sha256 != payload_sha256(envelope.payload)
        ):
            raise _refusal("bad-signature", "the task is not the one that was signed")
        if asked.site != self._site.name and not (asked.site == "" and method == "Describe"):
            raise _refusal("wrong-site", "the task was signed for another site")
        if asked.plan_sha256 != hashlib.sha256(plan_json.encode()).hexdigest():
            raise _refusal("wrong-plan", "the plan is not the one that was signed")
        if not self._nonces.is_new(asked.nonce):
            raise _refusal(
                "replayed-task",
                "this task was answered before; a coordinator that repeats a task signs it with a new nonce",
            )
        return asked

    def _work(self, method: str, plan_json: str, payload: bytes, asked: Statement, job: Job) -> WireMessage:
        from client.agent.tasks import agent_for

        plan, task = plan_of(plan_json), TASKS[method].from_bytes(payload)
        agent: Agent = agent_for(str(self._path), plan)
        if asked.ledger_head:
            agent.check_ancestor(asked.ledger_head)
        if self.enrolled:
            self._admit(task, asked, plan, plan_json)
        if isinstance(task, DescribeTask):
            return agent.describe(task)
        if self.enrolled:
            print(f"agent: {_step(task, plan)}", file=sys.stderr, flush=True)
        if isinstance(task, TrainTask):
            return agent.train(task, job)
        assert isinstance(task, EvaluateTask)
        if self.enrolled and task.final:
            self._keep_model(task, plan)
        return agent.evaluate(task, job)

    def _admit(self, task: WireMessage, asked: Statement, plan: RunPlan, plan_json: str) -> None:
        """Raises RefusedError: the statement does not describe the task, the plan does not ask for it, or the
        operator does not permit it.

        Introducing itself is always permitted; a rehearsal says whether the plan is approved, at any hour.
        """
        if isinstance(task, DescribeTask) and not task.rehearse:
            return
        if isinstance(task, TrainTask):
            if (asked.run, asked.arm, asked.round, asked.base_sha256) != (
                task.run,
                task.arm,
                task.round,
                task.base_sha256,
            ):
                raise _refusal("bad-signature", "the task is not the one that was signed")
            if (
                task.arm not in plan.arms
                or not plan.trains_at(self._site.name)
                or task.private != ARMS[task.arm].private
                or task.round > plan.training.rounds
            ):
                # who approved it did not approve this
                raise _refusal("wrong-plan", "the plan does not ask for this")
        if isinstance(task, EvaluateTask) and asked.run != task.run:
            raise _refusal("bad-signature", "the task is not the one that was signed")
        policy = self._policy()
        if policy.require_approval:
            run = task.run if isinstance(task, DescribeTask) else asked.run
            study = study_of(plan).canonical_json() if plan.leave_one_site_out else ""
            admit_approved(self._state, plan_json, run, study=study)
        if isinstance(task, DescribeTask):
            return
        admit_hours(policy, datetime.now())
        if policy.require_approval:
            note_run(self._state, plan_json, asked.run)

    def _keep_model(self, task: EvaluateTask, plan: RunPlan) -> None:
        """The run's model stays at the site, for `predict --model latest`, whatever becomes of the
        evaluation.
        """
        from common.model_file import described, save_model
        from common.models import network_of
        from common.weights import manifest_of

        if task.final not in task.models:
            raise RunError(f"final = {task.final!r} is not among the models", code="bad-message")
        manifest = manifest_of(network_of(plan.model).state_dict())
        # the run's name comes from outside: no path is made of it
        name = hashlib.sha256(task.run.encode()).hexdigest()[:16]
        folder = self._state / MODELS
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        flat = task.weights[task.models.index(task.final)]
        about = {"run": task.run, "arm": task.final} | described(plan, task.final)
        save_model(folder / f"{name}.safetensors", flat, manifest, about)
        link = folder / f".latest.{secrets.token_hex(4)}"
        link.symlink_to(f"{name}.safetensors")
        os.replace(link, folder / "latest.safetensors")

    def _sealed(self, answer: WireMessage, payload: bytes, asked: Statement) -> Envelope:
        envelope = self._signed(answer, payload, asked)
        if self.enrolled:
            note = self._note(answer, envelope, asked)
            note_sent(self._state, note)
            if asked.kind in ("TrainTask", "EvaluateTask"):
                print(
                    f"agent: answered ({note['purpose']}), {note['bytes']} bytes", file=sys.stderr, flush=True
                )
        return envelope

    def _signed(self, answer: WireMessage, payload: bytes, asked: Statement) -> Envelope:
        if self._key is None:
            return Envelope(payload=payload)
        statement = asked.model_copy(
            update={
                "site": self._site.name,
                "kind": type(answer).__name__,
                "payload_sha256": payload_sha256(payload),
            }
        ).text()
        return Envelope(payload=payload, statement=statement, signature=sign(statement, self._key))

    def _note(self, answer: WireMessage, envelope: Envelope, asked: Statement) -> dict[str, Any]:
        return {
            "at": datetime.now().astimezone().isoformat(timespec="seconds"),
            "kind": type_of(envelope.payload),
            "class": _crossing(answer),
            "purpose": _purpose(answer, asked),
            "run": asked.run,
            "round": asked.round,
            "bytes": len(envelope.to_bytes()),
            "sha256": payload_sha256(envelope.payload),
        }


class _Nonces:
    """Nonces that were answered, one a line. Read once, appended durably before the work begins.

    The last `KEPT_NONCES` at least are kept: more than a site answers in years. An older task that is sent
    again gets the stored bytes, or is refused by the ledger: it can spend nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[str] | None = None

    def is_new(self, nonce: str) -> bool:
        """Note `nonce`, and say whether it was new."""
        if self._seen is None:
            self._seen = set(self._path.read_text(encoding="ascii").split()) if self._path.exists() else set()
        if not nonce.isalnum() or not nonce.isascii() or nonce in self._seen:
            return False
        if len(self._seen) >= 2 * KEPT_NONCES:
            kept = self._path.read_text(encoding="ascii").split()[-KEPT_NONCES:]
            write_bytes(self._path, "".join(f"{one}\n" for one in kept).encode(), 0o600)
            self._seen = set(kept)
        append_line(self._path, nonce)
        self._seen.add(nonce)
        return True


@functools.lru_cache(maxsize=64)
def plan_of(text: str) -> RunPlan:
    """Decode a plan, once a process. It must be canonical JSON: one plan has one text, which the operator
    approves.

    Raises:
        PlanError: the text is no plan, or is not in canonical form (code `bad-plan`).
    """
    try:
        plan = parse_plan(json.loads(text))
    except (ValueError, RecursionError):
        raise PlanError("the plan is not JSON") from None
    if plan.canonical_json() != text:
        raise PlanError("the plan is not in canonical form")
    return plan


def _crossing(answer: WireMessage) -> str:
    """What the operator should know an answer as: the loosest class among its fields."""
    if type(answer).__name__ == "SiteUpdate":
        return "dp" if getattr(answer, "private", False) else "not private"
    if type(answer).__name__ == "SiteEvaluation":
        return str(getattr(answer, "mode", "disclosed"))
    return "public"


def _step(task: WireMessage, plan: RunPlan) -> str:
    """What the operator's terminal says of a task that begins: public, of plan and task only."""
    if isinstance(task, TrainTask):
        return f"training {task.arm}, round {task.round} of {plan.training.rounds} of run {task.run}"
    assert isinstance(task, EvaluateTask)
    return f"scoring {len(task.models)} models of run {task.run}"


def _purpose(answer: WireMessage, asked: Statement) -> str:
    if isinstance(answer, Refusal):
        return f"refusal: {answer.code}"
    purposes = {"TrainTask": f"train {asked.arm}", "EvaluateTask": "evaluate", "DescribeTask": "introduce"}
    return purposes.get(asked.kind, "introduce")


def _refusal(code: str, reason: str) -> RefusedError:
    return RefusedError(reason, code=code, public_reason=reason)
