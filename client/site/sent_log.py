"""The log of every message that left a site: one line each, chained under the site key
(`client.site.chained_log`). The coordinator keeps what it received in the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.site.chained_log import ChainedLog

SENT = "sent.jsonl"
FIELDS = ("at", "kind", "class", "purpose", "run", "round", "bytes", "sha256")
_LOG = ChainedLog(
    name=SENT,
    label="sent v1",
    fields=FIELDS,
    damaged="sent-damaged",
    compare="a backup, and with the run folders of the coordinator",
    plain_first=True,
)


def note_sent(state: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry with `FIELDS`, durably; to be called before the message leaves.

    Raises:
        OSError: it cannot be written, and the message must not leave.
    """
    _LOG.append(state, entry)


def read_sent(state: Path) -> list[dict[str, Any]]:
    """The entries, oldest first, verified; [] where nothing was ever sent.

    Raises:
        DataError: a line was changed, or cannot be read (code `sent-damaged`).
    """
    return _LOG.read(state)
