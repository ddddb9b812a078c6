"""Write site.yaml and key of a site that fedqc makes: of phantoms, or of a public collection."""

from __future__ import annotations

import os
from pathlib import Path

from common.strict import dump_yaml


def write_site_yaml(folder: Path, fields: dict[str, object], *, key: bytes) -> None:
    """site.yaml, and a site key that follows from the arguments of the command: no hospital's patient is
    behind it, and the split is the same everywhere.
    """
    (folder / "site.yaml").write_text(
        dump_yaml(fields, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    state = folder / "state"
    state.mkdir(mode=0o700)
    descriptor = os.open(state / "site.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")
