"""An installation has one ledger: made once, migrated once, and never a second time."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.site.answer_store import Outbox
from client.site.config import SiteConfig, site_key
from client.site.ledger import Ledger, head_path
from client.site.ledger_rows import LedgerError
from client.site.releases import released
from client.site.site_ledger import LEDGER, has_ledger, init_ledger, open_ledger
from common.errors import RefusedError
from common.privacy import GaussianSteps, PrivacyFilter, gdp_epsilon, gdp_mu
from tests.helpers.old_ledger import old_row, write_old_ledger

DELTA = 1e-5
UNSAMPLED = GaussianSteps(noise_multiplier=5.0, sample_rate=1.0, steps=10)
SAMPLED = GaussianSteps(noise_multiplier=3.0, sample_rate=0.25, steps=20)


def site(kind: str = "hospital", **changes: Any) -> SiteConfig:
    values = {"name": "hospital-a", "kind": kind, "cohort": "radiology", "nominal_patients": 50}
    return SiteConfig.model_validate(values | changes)


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises(RefusedError) as caught:
        act()
    return caught.value.code


def reserve(ledger: Ledger, request: str, steps: GaussianSteps = UNSAMPLED, max_epsilon: float = 8.0) -> Any:
    return ledger.reserve(
        request=request,
        steps=steps,
        purpose="federated_dp",
        fingerprint="",
        max_epsilon=max_epsilon,
        max_delta=DELTA,
    )


def spent(ledger: Ledger) -> float:
    return ledger.accounts(max_epsilon=8.0, max_delta=DELTA)[0].spent


# ---- made once


def test_a_hospital_gets_its_ledger_from_site_init_only(tmp_path: Path) -> None:
    with pytest.raises(LedgerError) as caught:
        open_ledger(site(), tmp_path)
    assert (caught.value.code, "fedqc site init" in caught.value.hint) == ("ledger-missing", True)
    assert not has_ledger(tmp_path / "state")
    init_ledger(site(), tmp_path)
    with open_ledger(site(), tmp_path) as ledger:
        reserve(ledger, "run-1")
    init_ledger(site(), tmp_path)  # a second time keeps it
    with open_ledger(site(), tmp_path) as ledger:
        assert spent(ledger) > 0


@pytest.mark.parametrize("kind", ["public", "synthetic"])
def test_a_folder_without_patients_gets_its_ledger_at_first_use(tmp_path: Path, kind: str) -> None:
    with open_ledger(site(kind), tmp_path) as ledger:
        reserve(ledger, "run-1")
    with open_ledger(site(kind), tmp_path) as ledger:
        assert spent(ledger) > 0


def sent(state: Path, crossing: str) -> None:
    (state / "sent.jsonl").write_text('{"torn\n' + json.dumps({"class": crossing}) + "\n")


def stored(state: Path) -> None:
    (state / "outbox").mkdir()
    (state / "outbox" / "0.answer").write_bytes(b"x")


def spend_and_delete(state: Path, *left: str) -> None:
    init_ledger(site(), state.parent)
    with open_ledger(site(), state.parent) as ledger:
        reserve(ledger, "run-1")
    for path in state.glob("ledger.sqlite3*"):
        if path.name not in left:
            path.unlink()


TRACES: dict[str, Callable[[Path], None]] = {
    "a noised answer was sent": lambda state: sent(state, "dp"),
    "an answer is stored": stored,
    "a head file": lambda state: spend_and_delete(state, head_path(state / LEDGER).name),
    "a migrated ledger": lambda state: (state / "ledger-0123.sqlite3.migrated").touch(),
}


@pytest.mark.parametrize("trace", TRACES)
def test_there_is_no_second_budget_where_something_was_spent(tmp_path: Path, trace: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    TRACES[trace](state)
    assert refused(lambda: init_ledger(site(), tmp_path)) == "ledger-missing"
    assert refused(lambda: open_ledger(site(), tmp_path)) == "ledger-missing"
    assert not (state / LEDGER).exists()


def test_answers_that_are_not_noised_are_no_trace(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    sent(tmp_path / "state", "public")
    init_ledger(site(), tmp_path)


def test_a_moved_state_folder_is_no_fresh_budget(tmp_path: Path) -> None:
    init_ledger(site(), tmp_path)
    assert refused(lambda: open_ledger(site(state="elsewhere"), tmp_path)) == "ledger-missing"


# ---- migrated once


def old_state(folder: Path, *rows: dict[str, Any], cohort: str = "radiology") -> Path:
    return write_old_ledger(folder / "state", site_key(folder / "state"), rows, cohort)


def test_every_row_of_an_earlier_ledger_is_taken_over_and_the_original_kept(tmp_path: Path) -> None:
    old = old_state(
        tmp_path,
        old_row("reserve", "run-1", UNSAMPLED),
        old_row("commit", "run-1", purpose="federated_dp", part="round 1", steps=5),
        old_row("non-private", "run-2", purpose="federated", at="2026-03-02T10:00:00+00:00"),
    )
    original = old.read_bytes()
    with open_ledger(site(), tmp_path) as ledger:
        assert [(row.kind, row.request, row.cohort, row.float_noise) for row in ledger.rows()] == [
            ("open", "", "", False),
            ("reserve", "run-1", "radiology", True),
            ("commit", "run-1", "radiology", True),
            ("non-private", "run-2", "radiology", True),
            ("migrated", old.name, "", False),
        ]
        assert ledger.rows()[1].at == "2026-03-01T10:00:00+00:00"
        assert ledger.has_non_private
        committed = ledger.committed("run-1", "round 1")
        assert committed is not None
        assert committed.digest == "", "answers stored by an earlier version stay valid"
        ledger.commit(ledger.reservation("run-1"), steps_done=5, part="round 2", digest="ab" * 32)
    kept = old.with_name(old.name + ".migrated")
    assert (old.exists(), kept.read_bytes() == original, kept.stat().st_mode & 0o777) == (False, True, 0o400)
    with open_ledger(site(), tmp_path) as ledger:
        assert len(ledger.rows()) == 6


def test_answers_that_an_earlier_version_stored_are_given_again(tmp_path: Path) -> None:
    old_state(
        tmp_path,
        old_row("reserve", "run-1", UNSAMPLED),
        old_row("commit", "run-1", part="round 1", steps=5),
        old_row("commit", "run-1", part="round 2", steps=5),
    )
    outbox = Outbox(tmp_path / "state" / "outbox")
    outbox.put(("run-1", "federated_dp", 1, "train"), b"stored by the earlier version")
    with open_ledger(site(), tmp_path) as ledger:

        def asked(number: int) -> bytes | None:
            key = "run-1", "federated_dp", number, "train"
            return released(outbox, ledger, key, request="run-1", part=f"round {number}", steps_done=5)

        assert asked(1) == b"stored by the earlier version"
        assert refused(lambda: asked(2)) == "answer-missing"


def test_what_is_over_the_cap_is_shown_and_nothing_more_admitted(tmp_path: Path) -> None:
    loud = GaussianSteps(noise_multiplier=1.0, sample_rate=1.0, steps=50)
    old_state(tmp_path, old_row("reserve", "run-1", loud))
    with open_ledger(site(), tmp_path) as ledger:
        assert spent(ledger) == gdp_epsilon(gdp_mu([loud]), DELTA) > 8
        assert refused(lambda: reserve(ledger, "run-2")) == "budget-exhausted"


def test_unsampled_history_becomes_gdp_and_admits_what_rdp_did(tmp_path: Path) -> None:
    old_state(tmp_path, old_row("reserve", "run-1", UNSAMPLED))
    with open_ledger(site(), tmp_path) as ledger:
        reserve(ledger, "run-2")
        (found,) = [row for row in ledger.rows() if row.kind == "filter"]
        assert found.request == "gdp"
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED] * 2), DELTA)
        assert refused(lambda: reserve(ledger, "run-3", SAMPLED)) == "sampling-not-permitted"


def test_sampled_history_becomes_rdp_at_the_order_of_its_first_reservation(tmp_path: Path) -> None:
    old_state(
        tmp_path,
        old_row("reserve", "run-1", UNSAMPLED),
        old_row("reserve", "run-2", SAMPLED, at="2026-03-02T10:00:00+00:00"),
    )
    with open_ledger(site(), tmp_path) as ledger:
        reserve(ledger, "run-3", SAMPLED)
        (found,) = [row for row in ledger.rows() if row.kind == "filter"]
        gate = PrivacyFilter.for_first(UNSAMPLED, epsilon=8.0, delta=DELTA, kind="rdp")
        assert (found.request, found.order) == ("rdp", gate.order)


def test_several_cohorts_are_composed_in_the_order_of_time(tmp_path: Path) -> None:
    early = "2026-01-01T00:00:00+00:00"
    old_state(tmp_path, old_row("reserve", "run-2", UNSAMPLED))
    old_state(tmp_path, old_row("reserve", "run-1", UNSAMPLED, at=early), cohort="earlier")
    with open_ledger(site(), tmp_path) as ledger:
        assert [row.cohort for row in ledger.rows() if row.kind == "reserve"] == ["earlier", "radiology"]
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED] * 2), DELTA)
    with (
        open_ledger(site(cohort="new", cohort_disjoint=True), tmp_path) as ledger,
        pytest.raises(Exception, match="never noted"),
    ):
        ledger.admit_patients({"a": []})


def edit(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a row was edited": (
        lambda path: edit(path, "UPDATE rows SET content = replace(content, '5.0', '50.0')"),
        "ledger-damaged",
    ),
    "a row is gone": (lambda path: edit(path, "DELETE FROM rows WHERE sequence = 3"), "ledger-rolled-back"),
    "no head file": (lambda path: head_path(path).unlink(), "ledger-head-missing"),
    "another name": (
        lambda path: path.rename(path.with_name("ledger-0000000000000000.sqlite3")),
        "ledger-foreign",
    ),
    "no ledger": (Path.unlink, "ledger-missing"),
    "no database": (lambda path: path.write_bytes(b"x" * 5000), "ledger-damaged"),
    "another site": (
        lambda path: (path.parent / "site.key").write_text("11" * 32 + "\n"),
        "ledger-damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_earlier_ledger_that_cannot_be_verified_is_refused(tmp_path: Path, damage: str) -> None:
    path = old_state(tmp_path, old_row("reserve", "run-1", UNSAMPLED), old_row("reserve", "run-2", UNSAMPLED))
    spoil, code = DAMAGES[damage]
    spoil(path)
    for _ in range(2):  # it does not get better by asking again
        assert refused(lambda: open_ledger(site(), tmp_path)) == code
    assert not list((tmp_path / "state").glob("*.migrated"))


@pytest.mark.parametrize("left", ["", ".head"])
def test_a_crash_while_the_originals_are_set_aside_is_made_good(tmp_path: Path, left: str) -> None:
    old = old_state(tmp_path, old_row("reserve", "run-1", UNSAMPLED))
    with open_ledger(site(), tmp_path) as ledger:
        rows = ledger.rows()
    part = old.with_name(old.name + left)
    part.with_name(part.name + ".migrated").rename(part)
    with open_ledger(site(), tmp_path) as ledger:
        assert ledger.rows() == rows
    assert not list((tmp_path / "state").glob("ledger-*.sqlite3"))


def test_an_earlier_version_that_wrote_after_the_migration_is_found(tmp_path: Path) -> None:
    old_state(tmp_path, old_row("reserve", "run-1", UNSAMPLED))
    open_ledger(site(), tmp_path).close()
    old_state(tmp_path, old_row("reserve", "run-9", UNSAMPLED))
    assert refused(lambda: open_ledger(site(), tmp_path)) == "ledger-foreign"


def test_a_ledger_of_an_earlier_version_serves_a_site_that_is_adopted(tmp_path: Path) -> None:
    old_state(tmp_path, old_row("reserve", "run-1", UNSAMPLED))
    init_ledger(site(), tmp_path)
    with open_ledger(site(), tmp_path) as ledger:
        assert spent(ledger) > 0
    for path in (tmp_path / "state").glob("ledger.sqlite3*"):
        path.unlink()
    assert refused(lambda: init_ledger(site(), tmp_path)) == "ledger-missing"


def test_the_fixture_is_what_the_earlier_version_wrote(tmp_path: Path) -> None:
    """A folder copied from an installation of the earlier version, migrated."""
    recorded = Path(__file__).parent / "recorded_ledger"
    shutil.copytree(recorded, tmp_path / "state")
    with open_ledger(site(), tmp_path) as ledger:
        assert [row.kind for row in ledger.rows()] == [
            *("open", "reserve", "commit", "commit", "reserve", "non-private", "migrated")
        ]
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED] * 2), DELTA)
