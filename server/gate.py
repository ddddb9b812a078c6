"""What is refused before it is averaged. A bad answer costs its site the round, never the run."""

from __future__ import annotations

import numpy as np

from common.errors import RunError
from common.weights import LIMIT
from common.wire import SiteDescription, SiteUpdate, TrainTask


def check_update(answer: SiteUpdate, task: TrainTask, base_sha256: str, site: SiteDescription, size: int) -> None:
    """Refuse an update that is not the answer to `task` from `site` with `size` trainable parameters.

    Raises:
        RunError: code `bad-update`, saying which claim does not hold.
    """
    claims = {
        "site": (answer.site, site.site),
        "run": (answer.run, task.run),
        "arm": (answer.arm, task.arm),
        "round": (answer.round, task.round),
        "base": (answer.base_sha256, base_sha256),
        "weight": (answer.weight, site.nominal_patients),
        "private": (answer.private, task.private),
        "shape": (answer.update.shape, (size,)),
        "dtype": (str(answer.update.dtype), "int32"),
    }
    if task.private and (answer.epsilon is None or answer.delta is None or answer.noise_multiplier <= 0):
        raise RunError(f"{site.site}: a private update without its epsilon, delta and noise", code="bad-update")
    for claim, (found, expected) in claims.items():
        if found != expected:
            raise RunError(f"{site.site}: {claim} is {found!r}, expected {expected!r}", code="bad-update")
    if np.abs(answer.update.astype(np.int64)).max(initial=0) > LIMIT:
        raise RunError(f"{site.site}: the update leaves the public grid", code="bad-update")
