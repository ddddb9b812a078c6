"""Record which plans this hospital has approved, and admit the runs that it approved them for.

    approvals/<hash>.json   written by the operator: the plan's signed text, who, when, how many runs, until,
                            and the index version of the images, with which its runs begin
    approvals/<hash>.runs   written by the agent: the runs that began of the plan of that hash, one a line

The approval of a study that leaves out each site once is of its member plans too, which follow from it
(common/leave_one_out.py): each may begin as often as the study was approved.

An approval is of the text that the coordinator signs, kept as it is: the agent compares what it receives with
it, and never with a plan that it would write itself.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

from client.site.config import read_site
from client.site.policy import ETHICS_FIELDS
from client.site.run_data import plan_of_run, user_name
from common.errors import ConfigError, RefusedError
from common.files import append_line, write_as_owner
from common.leave_one_out import members_of
from common.plan import RunPlan
from common.pricing import with_noise

APPROVALS = "approvals"
DEFAULT_RUNS, DEFAULT_DAYS = 1, 90
MIN_HASH_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Approval:
    """One approval, and the runs that began under it."""

    plan: str  # the plan's name
    plan_sha256: str
    text: str  # what the coordinator signs; "" in an approval of an earlier version
    at: str
    by: str
    runs: int = (
        0  # how many may begin under it, those that have begun included; of a study those of all members
    )
    members: Mapping[str, int] = field(
        default_factory=dict
    )  # of a study: hash of each member -> how many of it
    until: date = date.min  # the last day on which it holds
    ethics: Mapping[str, str] = field(default_factory=dict)
    withdrawn: str = ""  # when
    begun: tuple[str, ...] = ()
    index: str = ""  # the index version that was frozen with it; "": frozen at the first use of each run

    @property
    def runs_left(self) -> int:
        """How many more runs may begin."""
        return max(0, self.runs - len(self.begun))

    def runs_of(self, plan_sha256: str) -> int:
        """How many runs of a plan may begin, those that have begun included: of the approved one, or of a
        member of the study.
        """
        return self.members.get(plan_sha256, 0) if self.members else self.runs

    def state(self, today: date) -> str:
        """A word for the operator: open, used, expired, withdrawn, or of an earlier version."""
        if self.withdrawn:
            return "withdrawn"
        if not self.text:
            return "earlier version"
        if today > self.until:
            return "expired"
        return "open" if self.runs_left else "used"


def approve(
    site: Path,
    plan: RunPlan,
    *,
    runs: int = DEFAULT_RUNS,
    until: date | None = None,
    ethics: Mapping[str, str] | None = None,
    index: str = "",
) -> Approval:
    """Record that exactly this plan is approved, as the coordinator signs it, when, and by which user of this
    machine. An earlier approval of it is renewed: `runs` more may begin, of a study of each member.

    Args:
        site: the site folder.
        plan: as its author wrote it, no member of a study; the noise multipliers are filled in.
        until: the last day; default in `DEFAULT_DAYS` days.
        ethics: reference of the ethics approval and consent basis, as cohort.yaml states them.
        index: the index version that runs under it begin with.
    Raises:
        ConfigError: `no-such-site`, `not-writable`, `bad-argument` (no run, or a day that has passed).
    """
    config, folder = read_site(site)
    today = date.today()
    until = until or today + timedelta(days=DEFAULT_DAYS)
    if runs < 1 or until < today:
        raise ConfigError(
            f"an approval of {runs} runs until {until}: nothing would be approved",
            code="bad-argument",
            hint="--runs 1 or more, --until a day to come",
        )
    signed = with_noise(plan)
    text, sha256 = signed.canonical_json(), signed.sha256()
    state = folder / config.state
    granted = {one.sha256(): len(_begun(state, one.sha256())) + runs for one in members_of(signed)}
    note = {
        "plan": plan.name,
        "plan_sha256": sha256,
        "text": text,
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "by": user_name(),
        "runs": sum(granted.values()),
        **({"members": granted} if len(granted) > 1 else {}),
        "until": until.isoformat(),
        "index": index,
    } | dict(ethics or {})
    _write(state, sha256, note)
    approved = approval_of(state, sha256)
    assert approved is not None
    return approved


def freeze(state: Path, plan_sha256: str, index: str) -> None:
    """Let the runs of an approved plan that have not begun use another index version; without an approval
    nothing is written.

    Raises:
        ConfigError: `not-writable`.
    """
    if approval_of(state, plan_sha256) is not None:
        note = json.loads(_path(state, plan_sha256).read_text(encoding="utf-8"))
        _write(state, plan_sha256, note | {"index": index})


def index_approved(state: Path, plan_sha256: str) -> str:
    """The index version that was frozen when a plan was approved; "" where none was."""
    approval = approval_of(state, plan_sha256)
    return "" if approval is None or approval.withdrawn else approval.index


def withdraw(state: Path, plan_sha256: str) -> Approval:
    """Withdraw an approval: from now on nothing of that plan is carried out, a run that has begun included.

    Args:
        plan_sha256: or its first digits, at least `MIN_HASH_DIGITS`.
    Raises:
        ConfigError: `no-such-approval`, `not-writable`.
    """
    found = [
        one
        for one in approvals(state)
        if not one.withdrawn
        and one.plan_sha256.startswith(plan_sha256)
        and len(plan_sha256) >= MIN_HASH_DIGITS
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{plan_sha256}: {'more than one plan' if found else 'no plan'} of this hash is approved here",
            code="no-such-approval",
            hint="fedqc site approve --list shows each approval",
        )
    sha256 = found[0].plan_sha256
    note = json.loads(_path(state, sha256).read_text(encoding="utf-8"))
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    _write(state, sha256, note | {"withdrawn": now, "withdrawn_by": user_name()})
    return found[0]


def approvals(state: Path) -> list[Approval]:
    """Every approval of this site that can be read, the newest first."""
    found = (approval_of(state, path.stem) for path in (state / APPROVALS).glob("*.json"))
    return sorted((one for one in found if one is not None), key=lambda one: one.at, reverse=True)


def approval_of(state: Path, plan_sha256: str) -> Approval | None:
    """The approval of the plan of that hash, whether or not it still holds. A damaged note, or one of another
    plan, is none.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", plan_sha256):
        return None
    try:
        note = json.loads(_path(state, plan_sha256).read_text(encoding="utf-8"))
        members = {str(member): int(number) for member, number in note.get("members", {}).items()}
        approval = Approval(
            plan=str(note["plan"]),
            plan_sha256=note["plan_sha256"],
            text=note.get("text", ""),
            at=str(note["at"]),
            by=str(note["by"]),
            runs=int(note.get("runs", 0)),
            members=members,
            until=date.fromisoformat(note["until"]) if "until" in note else date.min,
            ethics={name: str(note[name]) for name in ETHICS_FIELDS if name in note},
            withdrawn=str(note.get("withdrawn", "")),
            index=str(note.get("index", "")),
            begun=tuple(run for one in members or (plan_sha256,) for run in _begun(state, one)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    of_another = approval.plan_sha256 != plan_sha256 or (
        approval.text and hashlib.sha256(approval.text.encode()).hexdigest() != plan_sha256
    )
    return None if of_another else approval


def admit_approved(state: Path, text: str, run: str, *, study: str = "", today: date | None = None) -> None:
    """Admit a run of a plan that somebody at the hospital approved, or whose study was approved.

    A run that has begun goes on until the approval expires or is withdrawn. An approval of an earlier
    version, which kept no text, holds for the runs that began under it, and for no other.

    Args:
        text: the plan, as the coordinator signed it.
        run: its name; "" asks whether a new run could begin.
        study: the text of the study that the plan is a member of, which is what was approved.
    Raises:
        RefusedError: `not-approved`, `approval-expired`, `approval-used`.
    """
    sha256, approved = _sha256(text), study or text
    approval = approval_of(state, _sha256(approved))
    if approval is not None and not approval.withdrawn and not approval.text:
        if run and plan_of_run(state, run) == sha256:
            return
        approval = None
    if approval is None or approval.withdrawn or approval.text != approved:
        raise _refusal("not-approved", "this plan has not been approved at this site")
    if (today or date.today()) > approval.until:
        raise _refusal("approval-expired", "this site's approval of this plan has expired")
    begun, may_begin = _begun(state, sha256), approval.runs_of(sha256)
    if run not in begun and len(begun) >= may_begin:
        raise _refusal(
            "approval-used", f"approved runs of this plan: {may_begin}; they have begun, and no other may"
        )


def note_run(state: Path, text: str, run: str) -> None:
    """Note that a run has begun under its approval; durable when this returns."""
    sha256 = _sha256(text)
    if run not in _begun(state, sha256):
        append_line(_runs_path(state, sha256), json.dumps(run))


def ethics_hash(record: Mapping[str, str], key: bytes) -> str:
    """The hash of an ethics record that may leave the hospital: 64 hexadecimal digits.

    It is keyed, so that the record cannot be guessed from it; with the site key the hospital can show later
    which record it was.
    """
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False)
    return hmac.digest(key, b"ethics:" + text.encode("utf-8", "surrogatepass"), "sha256").hex()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _refusal(code: str, reason: str) -> RefusedError:
    return RefusedError(
        reason, code=code, public_reason=reason, hint="approve exactly this plan: fedqc site approve PLAN"
    )


def _begun(state: Path, plan_sha256: str) -> tuple[str, ...]:
    """The runs that began under an approval, in their order. A torn line is no run: it was never answered."""
    try:
        lines = _runs_path(state, plan_sha256).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ()
    found: list[str] = []
    for line in lines:
        try:
            run = json.loads(line)
        except ValueError:
            continue
        if isinstance(run, str) and run not in found:
            found.append(run)
    return tuple(found)


def _path(state: Path, plan_sha256: str) -> Path:
    return state / APPROVALS / f"{plan_sha256}.json"


def _runs_path(state: Path, plan_sha256: str) -> Path:
    return state / APPROVALS / f"{plan_sha256}.runs"


def _write(state: Path, plan_sha256: str, note: Mapping[str, object]) -> None:
    path = _path(state, plan_sha256)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_as_owner(path, json.dumps(note, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror})",
            code="not-writable",
            hint="run as the agent's user",
        ) from None
