"""Notify the coordinator by webhook or command (for instance one that sends mail)."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from http.client import HTTPException

from common.strict import StrictModel
from common.terminal import print

TIMEOUT_S = 10


class Notify(StrictModel):
    """`notify:` of federation.yaml. Either may be left out."""

    webhook: str | None = None  # gets a JSON object by POST
    command: tuple[str, ...] = ()  # gets the same object on its standard input


def tell(wanted: Notify, *, event: str, run: str, site: str = "", detail: str = "") -> None:
    """Tell of an event; a failure to do so is said on stderr and changes nothing else.

    Args:
        event: `silence` (a site did not answer), `refusal`, `completed`, `partial` or `failed`.
        detail: a code, never a message.
    """
    body = json.dumps({"event": event, "run": run, "site": site, "detail": detail}).encode()
    for way in (_post, _start):  # one that fails does not silence the other
        try:
            way(wanted, body)
        except (OSError, ValueError, HTTPException, subprocess.SubprocessError) as error:
            print(
                f"notify: {event} of {run} could not be sent ({type(error).__name__})",
                file=sys.stderr,
                flush=True,
            )


def _post(wanted: Notify, body: bytes) -> None:
    if wanted.webhook:
        headers = {"Content-Type": "application/json", "User-Agent": "fedqc"}
        request = urllib.request.Request(wanted.webhook, data=body, headers=headers, method="POST")
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()


def _start(wanted: Notify, body: bytes) -> None:
    if wanted.command:
        subprocess.run(wanted.command, input=body, timeout=TIMEOUT_S, check=True, stdout=subprocess.DEVNULL)
