"""A process that answers question after question, for tests that kill it: `release_loop FOLDER NAME`.

For each it prints its number and the digest of the answer, once that may be sent.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from client.site.answer_store import AnswerKey, Outbox
from client.site.ledger import Ledger, Reservation, head_path
from client.site.releases import release, released
from common.privacy import GaussianSteps

KEY = b"a site key that nobody else has."
ROUNDS = 50
STEPS = GaussianSteps(noise_multiplier=100.0, sample_rate=1.0, steps=ROUNDS)


def opened(folder: Path) -> Ledger:
    path = folder / "ledger.sqlite3"
    return Ledger.open(path, key=KEY, cohort="brain-mri", create=not head_path(path).exists())


def question(name: str, number: int) -> tuple[AnswerKey, str, str]:
    """The key of a stored answer, and request and part of its charge: runs of 50 rounds."""
    run, round_number = f"{name}-{number // ROUNDS}", number % ROUNDS + 1
    return (run, "federated_dp", round_number, "train"), run, f"round {round_number}"


def reserve(ledger: Ledger, request: str) -> Reservation:
    how: dict[str, Any] = {"purpose": "federated_dp", "fingerprint": "", "max_epsilon": 1000.0}
    return ledger.reserve(request=request, steps=STEPS, max_delta=1e-5, **how)


def main(folder: Path, name: str, rounds: int | None, pragma: str) -> None:
    outbox = Outbox(folder / "outbox")
    with opened(folder) as ledger:
        if pragma:
            ledger._connection.execute(f"PRAGMA {pragma}")
        for number in itertools.count() if rounds is None else range(rounds):
            key, request, part = question(name, number)
            answer = released(outbox, ledger, key, request=request, part=part, steps_done=1)
            if answer is None:
                reservation = reserve(ledger, request)
                noise = os.urandom(64)  # fresh, as of a release that is computed
                answer = release(outbox, ledger, key, noise, reservation=reservation, part=part, steps_done=1)
            print(number, hashlib.sha256(answer).hexdigest(), flush=True)


if __name__ == "__main__":
    options = dict(word.split("=") for word in sys.argv[3:])
    chosen = "synchronous = OFF" if options.get("synchronous") == "OFF" else ""
    main(Path(sys.argv[1]), sys.argv[2], int(options["rounds"]) if "rounds" in options else None, chosen)
