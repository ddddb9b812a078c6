"""The privacy budget of a site as an operator reads it: what was spent on what, and what is guaranteed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.site.config import read_site
from client.site.ledger_rows import Account, LedgerRow
from client.site.policy import SitePolicy, default_policy, in_plain_words, read_policy
from client.site.run_data import user_name
from client.site.site_ledger import has_ledger, open_ledger
from common.errors import ConfigError
from common.privacy import ADJACENCY, epsilon_of, epsilon_text

BAR = 40


def budgets(folder: Path) -> list[dict[str, Any]]:
    """One entry for each account, that of the present cohort first: all cohorts that share a budget, and each
    cohort that is disjoint.

    Every row's HMAC is recomputed as the ledger is opened.
    Raises:
        LedgerError: the ledger cannot vouch for what was spent. ConfigError: there is no site key or no
            policy.
    """
    config, _ = read_site(folder)
    state = folder / config.state
    if not (state / "site.key").is_file():
        raise ConfigError(
            f"{state / 'site.key'}: missing",
            code="bad-site-key",
            hint="if privacy was spent at this site, restore it from a backup",
        )
    policy = read_policy(folder / config.policy) if config.policy else default_policy(config.kind)
    unit = config.patients.unit
    if not has_ledger(state) and config.kind != "hospital":  # make no ledger by looking
        return [_entry(_unspent(config.cohort, policy), [], unit)]
    with open_ledger(config, folder) as ledger:
        rows = ledger.rows()
        accounts = ledger.accounts(max_epsilon=policy.max_epsilon, max_delta=policy.max_delta)
    return [_entry(account, rows, unit) for account in accounts]


def raise_cap(folder: Path, epsilon: float, reason: str) -> None:
    """Raise the cap of a site's ledger, in the name of the user of this machine.

    Raises:
        ConfigError: code `bad-cap`. LedgerError: the ledger cannot be used.
    """
    config, _ = read_site(folder)
    with open_ledger(config, folder) as ledger:
        ledger.raise_cap(epsilon, reason=reason, by=user_name())


def budget_text(entry: dict[str, Any]) -> list[str]:
    """An entry of `budgets` for a terminal, one paragraph a line."""
    cohorts, unit, cap = ", ".join(entry["cohorts"]), entry["unit"], epsilon_text(entry["cap"])
    where = f"cohort {cohorts}, disjoint" if entry["account"] else f"cohorts {cohorts}"
    lines = [
        f"{where}: ε {epsilon_text(entry['spent'])} spent; guaranteed: at most ε {cap} over the lifetime of "
        f"this installation, per {unit} ({entry['adjacency']} one {unit}), at δ {entry['delta']:g}",
        "  " + _bar(entry["spent"] / entry["cap"]),
        f"  in words: {in_plain_words(entry['cap'], entry['delta'], unit)}",
    ]
    if entry["spent"] > entry["cap"]:
        lines.append("  OVER the cap: more was spent than is permitted now; nothing more is admitted")
    if entry["has_non_private"]:
        lines.append(
            "  NOT PRIVATE: these patients were used without noise, as listed; they have no guarantee"
        )
    for row in entry["entries"]:
        cost = "not private" if row["epsilon"] is None else f"ε {epsilon_text(row['epsilon'])}"
        noise = ", float noise" if row["float_noise"] else ""
        lines.append(f"  {row['at']}  {cost:11s} {row['request']} ({row['cohort']}{noise})")
    for row in entry["declared"]:
        said = f"{row['images']}: no hospital's patients (kind {row['kind']})"
        lines.append(f"  {row['at']}  {said}, declared by {row['by']}: {row['why']}")
    for row in entry["raised"]:
        lines.append(f"  {row['at']}  cap raised to ε {row['epsilon']:g} by {row['by']}: {row['reason']}")
    return lines


def _bar(share: float) -> str:
    filled = min(BAR, round(BAR * share) if share < 1 else BAR)
    if share > 0:
        filled = max(1, filled)
    return f"[{'#' * filled}{'.' * (BAR - filled)}]"


def _unspent(cohort: str, policy: SitePolicy) -> Account:
    return Account(
        name="",
        cohorts=(cohort,),
        spent=0.0,
        cap=policy.max_epsilon,
        delta=policy.max_delta,
        kind="",
        has_non_private=False,
    )


def _entry(account: Account, rows: Sequence[LedgerRow], unit: str) -> dict[str, Any]:
    values = asdict(account)
    name, kind = values.pop("name"), values.pop("kind")
    charges = [row for row in rows if row.kind in ("reserve", "non-private") and row.account == account.name]
    return {
        "account": name,
        **values,
        "filter": kind or None,
        "unit": unit,
        "adjacency": ADJACENCY,
        "rows": len(rows),
        "entries": [
            {
                "at": row.at,
                "cohort": row.cohort,
                "request": _request(row.request),
                "purpose": row.purpose,
                # None: not private, no limit
                "epsilon": epsilon_of([row.as_steps()], account.delta) if row.kind == "reserve" else None,
                "float_noise": row.float_noise,
            }
            for row in charges
        ],
        "declared": [
            {"at": row.at, "kind": row.request, "images": row.part, "by": row.by, "why": row.purpose}
            for row in rows
            if row.kind == "declared"
        ],
        "raised": [
            {"at": row.at, "epsilon": row.epsilon, "by": row.by, "reason": row.purpose}
            for row in rows
            if row.kind == "cap"
        ],
    }


def _request(text: str) -> str:
    """Run and arm of a reservation, as people write them."""
    try:
        return " ".join(str(part) for part in json.loads(text))
    except (ValueError, TypeError):
        return text
