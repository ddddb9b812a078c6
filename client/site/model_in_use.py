"""Which model this site uses, as its chained log says, and the bytes of that one and of those before.

models.jsonl                  who put which model to use, refused it, took it back or checked it, and when
models/in-use/<sha256>.safetensors
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from client.site.chained_log import ChainedLog
from client.site.run_data import user_name
from common.errors import ConfigError, DataError
from common.files import write_as_owner

Action = Literal["use", "refuse", "rollback", "check"]
LOG = ChainedLog(
    name="models.jsonl",
    label="models v1",
    fields=("at", "by", "user", "action", "model", "former", "cases", "figures", "scores"),
    damaged="models-damaged",
    compare="a backup of the site's state folder",
)
FOLDER = Path("models") / "in-use"


def note(
    state: Path,
    action: Action,
    *,
    by: str,
    model: str,
    former: str = "",
    cases: str = "",
    figures: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Add an entry to the log.

    Args:
        by: who answers for it; the user of this machine is noted beside.
        model, former: SHA-256 of the file; "": none.
        cases: SHA-256 of the frozen cases that it was tested on.
        scores: of these cases, by their pseudonyms.
    Raises:
        OSError: it cannot be written.
    """
    entry = {
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "by": by,
        "user": user_name(),
        "action": action,
        "model": model,
        "former": former,
        "cases": cases,
        "figures": dict(figures or {}),
        "scores": dict(scores or {}),
    }
    LOG.append(state, entry)
    return entry


def entries(state: Path) -> list[dict[str, Any]]:
    """The log, oldest entry first, verified.

    Raises:
        DataError: `models-damaged`.
    """
    return LOG.read(state)


def in_use(state: Path) -> dict[str, Any] | None:
    """The entry that put the present model to use; None where none is.

    Raises:
        DataError: `models-damaged`.
    """
    changes = [entry for entry in entries(state) if entry["action"] in ("use", "rollback")]
    return changes[-1] if changes and changes[-1]["model"] else None


def file_of(state: Path, sha256: str) -> Path:
    """The kept file of a model.

    Raises:
        DataError: `models-damaged`, it is missing or its bytes have changed.
    """
    path = state / FOLDER / f"{sha256}.safetensors"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror})", code=LOG.damaged, hint=f"compare with {LOG.compare}"
        ) from None
    if found != sha256:
        raise DataError(
            f"{path}: its bytes are not those that were put to use",
            code=LOG.damaged,
            hint=f"compare with {LOG.compare}",
        )
    return path


def keep(state: Path, data: bytes) -> str:
    """Keep the bytes of a model; gives their SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    folder = state / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{sha256}.safetensors"
    if not path.is_file():
        write_as_owner(path, data)
    return sha256


def roll_back(state: Path, by: str) -> dict[str, Any]:
    """Use the former model again, byte for byte; a second time returns to the later one.

    Raises:
        ConfigError: `no-model`, none was put to use here.
        DataError: `models-damaged`.
    """
    changes = [entry for entry in entries(state) if entry["action"] in ("use", "rollback")]
    if not changes:
        raise ConfigError(
            "no model was put to use at this site", code="no-model", hint="fedqc site use MODEL tests one"
        )
    last = changes[-1]
    if last["former"]:
        file_of(state, last["former"])
    return note(state, "rollback", by=by, model=last["former"], former=last["model"])
