"""Sign each request, and verify the signature of each answer.

An answer counts for a site only if it carries that site's enrolled signature over the payload, this run,
round, plan and base model, and the nonce drawn for this very question. Flower's own sender id proves nothing
of the kind: a node can name another as its sender.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import RunError
from common.plan import RunPlan
from common.signing import Statement, payload_sha256, sign, verify
from common.wire import Envelope, Refusal, WireMessage, ledger_head_of, site_of, type_of


@dataclass(frozen=True, kw_only=True)
class Question:
    """One task for one site, as it was signed."""

    payload: bytes
    statement: Statement


class Witness(Protocol):
    """Keeps the last head of each site's privacy ledger, and reminds the site of it."""

    def of_site(self, site: str) -> str:
        """The head last reported; "" where none was."""

    def of_node(self, node: int) -> str:
        """The head last reported by the site behind a node; "" where none was, or the node is not known."""

    def keep(self, site: str, head: str) -> None:
        """Take note of a head that carries the site's signature."""


class _NoWitness:
    """Of a simulation: nobody is reminded."""

    def of_site(self, site: str) -> str:
        return ""

    def of_node(self, node: int) -> str:
        return ""

    def keep(self, site: str, head: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The keys of a federation; without them (a simulation) nothing is signed and nothing verified."""

    plan_sha256: str
    key: Ed25519PrivateKey | None = None
    sites: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    witness: Witness = field(default_factory=_NoWitness)

    @staticmethod
    def none(plan: RunPlan) -> Seal:
        return Seal(plan_sha256=plan.sha256())

    def question(
        self,
        task: WireMessage,
        payload: bytes,
        *,
        site: str = "",
        node: int | None = None,
        run: str = "",
        arm: str = "",
        round: int = 0,
        base_sha256: str = "",
    ) -> Question:
        """`payload` is `task.to_bytes()`, made once for all sites; nonce and ledger head are the site's own.

        Args:
            node: whom a question without a site is sent to.
        """
        head = self.witness.of_site(site) if site else "" if node is None else self.witness.of_node(node)
        statement = Statement(
            site=site,
            kind=type(task).__name__,
            run=run,
            arm=arm,
            round=round,
            plan_sha256=self.plan_sha256,
            base_sha256=base_sha256,
            payload_sha256=payload_sha256(payload) if self.key else "",
            nonce=secrets.token_hex(16),
            ledger_head=head,
        )
        return Question(payload=payload, statement=statement)

    def envelope(self, question: Question) -> Envelope:
        if self.key is None:
            return Envelope(payload=question.payload)
        text = question.statement.text()
        return Envelope(payload=question.payload, statement=text, signature=sign(text, self.key))

    def counts(self, site: str) -> bool:
        """Whether an answer of this site could be opened; "" is whoever answers."""
        return self.key is None or site == "" or site in self.sites

    def open(self, envelope: Envelope, asked: Question) -> bytes:
        """The payload of an answer to `asked`, known to be the site's.

        Raises:
            RunError: `unsigned-answer`, `bad-signature`, `unknown-site` (not enrolled, revoked, or its
                enrolment has run out), or, for a refusal of the node in front of the agent, which holds no
                key, the refusal's own code.
        """
        if self.key is None:
            return envelope.payload
        if not envelope.signature:
            raise RunError(
                "the answer is not signed", code=_node_refusal(envelope.payload) or "unsigned-answer"
            )
        said = Statement.parse(envelope.statement)
        name = asked.statement.site or said.site
        key = self.sites.get(name)
        if key is None:
            raise RunError(f"{name!r} is not enrolled, or no longer", code="unknown-site")
        verify(envelope.statement, envelope.signature, key)
        wanted = asked.statement.model_copy(
            update={
                "site": name,
                "kind": type_of(envelope.payload),
                "payload_sha256": payload_sha256(envelope.payload),
            }
        )
        if said != wanted:
            if said.kind == "Refusal" and said.payload_sha256 == wanted.payload_sha256 and said.nonce == "":
                raise RunError(
                    f"{name} did not accept the question", code=Refusal.from_bytes(envelope.payload).code
                )
            raise RunError(f"{name}: the answer is not one to this question", code="bad-signature")
        if site_of(envelope.payload) != name:
            raise RunError(f"{name}: the answer is in the name of another site", code="bad-signature")
        if head := ledger_head_of(envelope.payload):
            self.witness.keep(name, head)
        return envelope.payload


NODE_CODES = (
    "agent-unreachable",
    "agent-busy",
    "agent-deadline",
    "agent-failed",
    "wrong-bundle",
    "site-failure",
)


def _node_refusal(payload: bytes) -> str:
    """The code of a refusal that the node itself made, where there is no key; nothing but the code is taken
    from it.
    """
    try:
        code = Refusal.from_bytes(payload).code
    except RunError:
        return ""
    return code if code in NODE_CODES else ""
