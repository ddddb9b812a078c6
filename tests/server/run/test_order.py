"""How a run that the ServerApp could not finish is written down for `fedqc run`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.supercore.run import RunNotRunningException

from common.errors import RunError
from common.plan import parse_plan
from server.run import order


@pytest.mark.parametrize(
    ("raised", "code", "status"),
    [
        (httpx.ConnectError("certificate of /secret/path has expired"), "no-superlink", 1),
        (
            httpx.HTTPStatusError(
                "no", request=httpx.Request("POST", "https://x"), response=httpx.Response(500)
            ),
            "internal",
            5,
        ),
        (RunNotRunningException(), "run-ended", 1),
        (RunError("too few", code="no-quorum"), "no-quorum", 1),
        (KeyError("x"), "internal", 5),
    ],
)
def test_each_end_has_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: str, status: int
) -> None:
    written: dict[str, dict[str, Any]] = {}
    told: list[str] = []

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(
        order,
        "read_order",
        lambda *_: SimpleNamespace(mode="start", wait_s=1, accept_missing=False, sites=()),
    )
    monkeypatch.setattr(order, "rehearse", fail)
    monkeypatch.setattr(
        order, "write_outcome", lambda folder, run, kind, value: written.update({kind: value})
    )
    monkeypatch.setattr(
        order, "tell", lambda where, *, event, run, site, detail: told.append(f"{event} {detail}")
    )
    monkeypatch.setattr("server.federation.registry.EnrolledKeys", lambda federation: {})
    monkeypatch.setattr("server.federation.ledger_heads.LedgerHeads", lambda federation: None)
    federation: Any = SimpleNamespace(folder=tmp_path, signing_key=lambda: None, notify=None)
    with pytest.raises(type(raised)):
        order.serve_order(
            SimpleNamespace(), parse_plan({"name": "x", "arms": ["federated"]}), tmp_path / "run", federation
        )  # type: ignore[arg-type]
    assert told == [f"failed {code}"]
    assert written["failure"]["code"] == code
    assert written["failure"]["exit_status"] == status
    assert "/secret/path" not in str(written)
