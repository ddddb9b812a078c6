"""A federation without the bundle for Flower, which takes seconds to build and has tests of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.federation.configure import init_federation
from server.federation.registry import Federation
from tests.helpers.ports import free_port

BUNDLE_SHA = "ab" * 32


def spare_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `write_bundle` notes, without the build."""

    def write(folder: Path) -> str:
        (folder / "bundle.sha256").write_text(f"{BUNDLE_SHA}\n")
        return BUNDLE_SHA

    monkeypatch.setattr("server.federation.configure.write_bundle", write)


def quick_federation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """One on loopback."""
    spare_bundle(monkeypatch)
    return init_federation(folder, name="loop", host="127.0.0.1", port=free_port(), listen="127.0.0.1")
