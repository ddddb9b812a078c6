"""Append to the site log, state/site.log: details of failures, for the operator only."""

from __future__ import annotations

import time
from pathlib import Path

from common.files import rotate
from common.terminal import escaped

SITE_LOG = "site.log"


def append_site_log(state: Path, text: str) -> bool:
    """Append a time stamp and `text` to `<state>/site.log`.

    Returns:
        whether it was written: on a full disk there is no log either.
    """
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        state.mkdir(parents=True, exist_ok=True)
        rotate(state / SITE_LOG)
        with (state / SITE_LOG).open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {escaped(text)}\n")
    except OSError:
        return False
    return True
