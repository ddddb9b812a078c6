"""A federation on loopback without the bundle for Flower, which takes seconds to build."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.federation.configure import init_federation
from server.federation.registry import Federation
from tests.helpers.ports import free_port


def quick_federation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(
        "server.federation.configure.write_bundle",
        lambda at: (at / "bundle.sha256").write_text("0" * 64),
    )
    return init_federation(folder, name="loop", host="127.0.0.1", port=free_port(), listen="127.0.0.1")
