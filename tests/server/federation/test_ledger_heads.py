"""The coordinator is the witness of each site's ledger."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import ConfigError
from common.signing import payload_sha256, sign
from common.wire import DescribeTask, Envelope, Refusal, SiteDescription, WireMessage
from server.federation.configure import init_federation
from server.federation.ledger_heads import LedgerHeads
from server.federation.registry import Federation, approve, revoke
from server.messaging.signatures import Seal
from tests.helpers.consortium import tiny_plan
from tests.helpers.enrolment import a_request
from tests.helpers.quick_federation import spare_bundle

KEY = Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32)
HEADS = [f"{length}:{digit * 64}" for length, digit in ((3, "a"), (7, "b"), (12, "c"))]


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    spare_bundle(monkeypatch)
    made = init_federation(tmp_path / "fed", name="loop", host="qc.example.org", port=8443)
    request = a_request("hospital-a", signing=KEY)
    approve(made, request)
    made.set_node("hospital-a", request.node_key, 17)
    approve(made, a_request("hospital-b"))
    return made


def test_the_longest_head_of_a_site_is_kept_beside_the_others(federation: Federation) -> None:
    heads = LedgerHeads(federation)
    assert (heads.of_site("hospital-a"), heads.of_node(17), heads.of_site("nobody")) == ("", "", "")
    for head in (HEADS[0], HEADS[2], HEADS[1]):  # a stored answer that is sent again carries an earlier one
        heads.keep("hospital-a", head)
    again = LedgerHeads(Federation.open(federation.folder))
    assert again.of_site("hospital-a") == again.of_node(17) == HEADS[2]
    assert (again.of_site("hospital-b"), again.of_node(18)) == ("", "")
    path = federation.state / "ledger-heads" / "hospital-a.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_site_with_new_keys_is_a_new_installation(federation: Federation) -> None:
    heads = LedgerHeads(federation)
    heads.keep("hospital-a", HEADS[2])
    revoke(federation, "hospital-a")
    approve(federation, a_request("hospital-a"))
    assert heads.of_site("hospital-a") == ""
    heads.keep("hospital-a", HEADS[0])
    assert heads.of_site("hospital-a") == HEADS[0]


@pytest.mark.parametrize("text", ["", "[]", '{"head": "x"}', '{"head": "", "signing_key": "k"}'])
def test_a_damaged_note_stops_the_run(federation: Federation, text: str) -> None:
    heads = LedgerHeads(federation)
    heads.keep("hospital-a", HEADS[0])
    (federation.state / "ledger-heads" / "hospital-a.json").write_text(text)
    for act in (lambda: heads.of_site("hospital-a"), lambda: heads.keep("hospital-a", HEADS[1])):
        with pytest.raises(ConfigError) as caught:
            act()
        assert caught.value.code == "bad-ledger-head"


def answered(seal: Seal, said: WireMessage, *, node: int | None = None) -> str:
    """The head that the question reminded of; its answer is opened."""
    task = DescribeTask()
    asked = seal.question(task, task.to_bytes(), node=node)
    payload = said.to_bytes()
    text = asked.statement.model_copy(
        update={
            "site": "hospital-a",
            "kind": type(said).__name__,
            "payload_sha256": payload_sha256(payload),
        }
    ).text()
    seal.open(Envelope(payload=payload, statement=text, signature=sign(text, KEY)), asked)
    return asked.statement.ledger_head


def description(head: str) -> SiteDescription:
    return SiteDescription(
        site="hospital-a", kind="hospital", nominal_patients=50, version="0.1.0", ledger_head=head
    )


def test_what_a_site_signed_is_what_the_next_question_says(federation: Federation) -> None:
    seal = Seal(
        plan_sha256=tiny_plan().sha256(),
        key=KEY,
        sites={"hospital-a": KEY.public_key()},
        witness=LedgerHeads(federation),
    )
    assert answered(seal, description(HEADS[0]), node=17) == ""
    assert answered(seal, description(HEADS[1]), node=17) == HEADS[0]
    assert answered(seal, Refusal(site="hospital-a", code="c", reason="r"), node=17) == HEADS[1]
    assert answered(seal, description(""), node=17) == HEADS[1]
    assert answered(seal, description(""), node=18) == "", "nobody is reminded of another site's ledger"
    for_site = seal.question(DescribeTask(), b"", site="hospital-a").statement
    assert for_site.ledger_head == HEADS[1]
    assert json.loads(for_site.text())["ledger_head"] == HEADS[1]
    assert "ledger_head" not in seal.question(DescribeTask(), b"", site="hospital-b").statement.text()
