"""Record which plans this hospital has approved: one small file each, named by the plan's hash."""

from __future__ import annotations

import getpass
import hmac
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from client.site.config import read_site
from common.errors import ConfigError
from common.files import write_as_owner
from common.plan import RunPlan

APPROVALS = "approvals"


def approve(site: Path, plan: RunPlan, *, ethics: Mapping[str, str] | None = None) -> Path:
    """Record that exactly this plan is approved, when, and by which user of this machine. A second approval
    changes nothing.

    Args:
        site: the site folder.
        ethics: reference of the ethics approval and consent basis, as cohort.yaml states them.
    Raises:
        ConfigError: `no-such-site`, or `not-writable`.
    """
    config, folder = read_site(site)
    state = folder / config.state
    path = _path(state, plan.sha256())
    if is_approved(state, plan.sha256()):
        return path
    note = {
        "plan": plan.name,
        "plan_sha256": plan.sha256(),
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "by": _user(),
    } | dict(ethics or {})
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_as_owner(path, json.dumps(note, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror})",
            code="not-writable",
            hint="run as the agent's user",
        ) from None
    return path


def is_approved(state: Path, plan_sha256: str) -> bool:
    """Whether the plan of that hash was approved here. A damaged note, or one of another plan, is none."""
    return bool(approval_of(state, plan_sha256))


def approval_of(state: Path, plan_sha256: str) -> dict[str, str]:
    """Who approved the plan of that hash here, when, and on which ethical basis; empty where nobody did."""
    if not re.fullmatch(r"[0-9a-f]{64}", plan_sha256):
        return {}
    try:
        note = json.loads(_path(state, plan_sha256).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(note, dict) or note.get("plan_sha256") != plan_sha256:
        return {}
    return {str(name): str(value) for name, value in note.items()}


def ethics_hash(record: Mapping[str, str], key: bytes) -> str:
    """The hash of an ethics record that may leave the hospital: 64 hexadecimal digits.

    It is keyed, so that the record cannot be guessed from it; with the site key the hospital can show later
    which record it was.
    """
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False)
    return hmac.digest(key, b"ethics:" + text.encode("utf-8", "surrogatepass"), "sha256").hex()


def _path(state: Path, plan_sha256: str) -> Path:
    return state / APPROVALS / f"{plan_sha256}.json"


def _user() -> str:
    """Who did it: under sudo the person, not root."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"
