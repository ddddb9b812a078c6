"""Find the ledger of an installation: `state/ledger.sqlite3`, made once, or migrated from earlier versions.

At a hospital only `fedqc site init` makes it, and not where the state folder shows that something was spent
before: a ledger that is gone is no fresh budget. Folders of `fedqc data phantom` and `inject`, which never
ran `site init` and hold no patients, get theirs at first use.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from client.site.config import SiteConfig, site_key
from client.site.ledger import Ledger, head_path
from client.site.ledger_migration import SET_ASIDE, migrate, old_ledgers
from client.site.ledger_rows import LedgerError
from client.site.sent_log import SENT
from common.files import locked

LEDGER = "ledger.sqlite3"


def open_ledger(site: SiteConfig, folder: Path) -> Ledger:
    """The ledger of a site, on behalf of the cohort of its site.yaml; ledgers of an earlier version are
    migrated first.

    Args:
        folder: that of site.yaml.
    Raises:
        LedgerError: `ledger-missing` at a hospital without one; others as `Ledger.open`.
    """
    state = folder / site.state
    path = state / LEDGER
    if not has_ledger(state) and site.kind == "hospital":
        _refuse_second(state, also_answers=True)
        raise LedgerError(
            f"{path} is missing, and nothing shows that privacy was spent here",
            code="ledger-missing",
            hint="a new site makes one: fedqc site init; if privacy was spent, restore the newest backup",
        )
    if not path.exists() and not old_ledgers(state):
        _refuse_second(state, also_answers=site.kind == "hospital")
    return _opened(site, state, create=site.kind != "hospital")


def init_ledger(site: SiteConfig, folder: Path) -> None:
    """Make the ledger of a new site. One that is there, or that an earlier version made, is kept.

    Raises:
        LedgerError: something was spent in this state folder before, and its ledger is gone (code
            `ledger-missing`).
    """
    state = folder / site.state
    if not has_ledger(state):
        _refuse_second(state, also_answers=True)
    _opened(site, state, create=True).close()


def has_ledger(state: Path) -> bool:
    """Whether a state folder holds a ledger, of this version or to be migrated."""
    return (state / LEDGER).exists() or bool(old_ledgers(state))


def found_elsewhere(site: SiteConfig, folder: Path, patients: Mapping[str, Collection[str]]) -> set[str]:
    """The patients of this cohort whom a run leaves out, because the ledger found them in a cohort of another
    budget before. For the operator; it leaves the hospital nowhere, and notes nothing.

    Args:
        patients: as `Ledger.admit_patients`.
    Raises:
        ConfigError, LedgerError: as `Ledger.admit_patients`.
    """
    state = folder / site.state
    if not (state / LEDGER).exists() or old_ledgers(state):  # a report migrates nothing
        return set()
    with open_ledger(site, folder) as ledger:
        return ledger.found_elsewhere(patients)


def _opened(site: SiteConfig, state: Path, *, create: bool) -> Ledger:
    key = site_key(state)
    if not old_ledgers(state):
        return Ledger.open(
            state / LEDGER, key=key, cohort=site.cohort, disjoint=site.cohort_disjoint, create=create
        )
    with locked(state / "ledger.lock"):
        ledger = Ledger.open(
            state / LEDGER, key=key, cohort=site.cohort, disjoint=site.cohort_disjoint, create=True
        )
        try:
            migrate(state, ledger, key)
        except BaseException:
            ledger.close()
            raise
    return ledger


def _refuse_second(state: Path, *, also_answers: bool) -> None:
    """Raises LedgerError (code `ledger-missing`) where the state folder shows that something was spent."""
    traces = [head_path(state / LEDGER), *state.glob(f"ledger-*{SET_ASIDE}")]
    if also_answers:
        traces += [*(state / "outbox").glob("*.answer"), *_noised_answers(state / SENT)]
    found = next((path for path in traces if path.exists()), None)
    if found is not None:
        raise LedgerError(
            f"{state / LEDGER} is missing, but {found.name} shows that privacy was spent here",
            code="ledger-missing",
            hint="restore the ledger with its head file from the newest backup; there is no second budget",
        )


def _noised_answers(sent: Path) -> list[Path]:
    """The log of what left the site, if it holds a noised answer."""
    try:
        lines = sent.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            if json.loads(line).get("class") == "dp":
                return [sent]
        except (ValueError, AttributeError):  # torn by a crash: it says nothing
            continue
    return []
