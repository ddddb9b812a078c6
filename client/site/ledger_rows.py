"""The rows of the privacy ledger, and what they mean: accounts, the filter, and whether more is admitted.

Functions of rows and policy only; `ledger.py` keeps the rows on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from common.errors import RefusedError
from common.privacy import FilterKind, GaussianSteps, PrivacyFilter, epsilon_text, merge

RowKind = Literal["open", "migrated", "filter", "cap", "reserve", "commit", "non-private", "declared"]

SHARED = ""
"""The account of every cohort that is not declared disjoint."""


class LedgerError(RefusedError):
    """The ledger cannot vouch for what was spent, so the site refuses: it fails closed.

    `public_reason` says no more than that; the message, for the site's log, says what is wrong with which
    file.
    """

    code = "ledger-damaged"

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(
            message, code=code, hint=hint, public_reason="the site's privacy ledger cannot be used"
        )


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One line of the ledger, as written. What does not apply to its kind is empty or 0."""

    sequence: int
    kind: RowKind
    at: str  # UTC, for a human; the order is that of `sequence`
    account: str = SHARED
    cohort: str = ""
    # which question: run and arm; of a filter its kind; of a migrated ledger its file; of a declaration the
    # kind of the site
    request: str = ""
    part: str = ""  # of a commit: which part of the request was done; of a declaration the images folder
    purpose: str = ""
    fingerprint: str = ""  # of the index at that time; recorded, never a key
    noise_multiplier: float = 0.0
    sample_rate: float = 0.0
    steps: int = 0
    epsilon: float = 0.0  # of a filter, or a raised cap
    delta: float = 0.0  # of a filter
    order: float = 0.0  # of an `rdp` filter
    digest: str = ""  # of a commit: SHA-256 of the stored answer; of a migrated ledger its last HMAC
    members: str = ""  # how many rows the table of patients had, and the last one's HMAC
    by: str = ""  # user of this machine who raised the cap, or declared
    float_noise: bool = False  # migrated: released with noise of floating point numbers

    def as_steps(self) -> GaussianSteps:
        return GaussianSteps(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps
        )


DEFAULTS = {one.name: one.default for one in fields(LedgerRow) if one.default is not MISSING}


@dataclass(frozen=True, kw_only=True)
class Account:
    """What was spent on the patients of one account, and what is guaranteed: numbers for the operator."""

    name: str
    cohorts: tuple[str, ...]
    spent: float  # epsilon of all reservations as the filter adds them up; a running count, no guarantee
    cap: float  # the guarantee: over the lifetime of the installation, per patient
    delta: float
    kind: str  # of the filter; "" before the first reservation
    has_non_private: bool


def charged(rows: Sequence[LedgerRow], account: str) -> list[GaussianSteps]:
    return merge(row.as_steps() for row in rows if row.kind == "reserve" and row.account == account)


def fixed_filter(rows: Sequence[LedgerRow]) -> PrivacyFilter | None:
    """The filter that stands in the ledger, with the cap as it was last raised."""
    found: PrivacyFilter | None = None
    for row in rows:
        if row.kind == "filter":
            kind: FilterKind = "gdp" if row.request == "gdp" else "rdp"
            found = PrivacyFilter(kind=kind, epsilon=row.epsilon, delta=row.delta, order=row.order or None)
        elif row.kind == "cap" and found is not None:
            found = found.with_epsilon(row.epsilon)
    return found


def filter_of(
    rows: Sequence[LedgerRow], max_epsilon: float, max_delta: float, first: GaussianSteps | None = None
) -> PrivacyFilter | None:
    """The ledger's filter, or that which the first reservation fixes; None where there is no reservation yet.

    Reservations before there was a filter come from ledgers of an earlier version: the first of them decides
    the order, and all of them the kind.
    """
    fixed = fixed_filter(rows)
    if fixed is not None:
        return fixed.with_epsilon(min(fixed.epsilon, max_epsilon))
    migrated = [row.as_steps() for row in rows if row.kind == "reserve"]
    if migrated:
        kind: FilterKind = "gdp" if all(one.sample_rate == 1 for one in migrated) else "rdp"
        return PrivacyFilter.for_first(migrated[0], epsilon=max_epsilon, delta=max_delta, kind=kind)
    return None if first is None else PrivacyFilter.for_first(first, epsilon=max_epsilon, delta=max_delta)


def admitted(
    rows: Sequence[LedgerRow],
    account: str,
    request: str,
    steps: GaussianSteps,
    max_epsilon: float,
    max_delta: float,
    *,
    planned: Sequence[GaussianSteps] = (),
) -> PrivacyFilter:
    """The filter that admits `steps` to the account.

    Args:
        planned: what is to be reserved before it, and is not yet.
    Raises:
        RefusedError: `filter-fixed`, `sampling-not-permitted`, `budget-exhausted`.
    """
    found = filter_of(rows, max_epsilon, max_delta, [*planned, steps][0])
    assert found is not None
    if found.delta != max_delta:
        reason = (
            f"the site's privacy budget was begun at delta {found.delta:g}, its policy says {max_delta:g}"
        )
        raise RefusedError(
            f"{request}: {reason}",
            code="filter-fixed",
            public_reason=reason,
            hint=f"policy.yaml: max_delta: {found.delta:g}; it never changes once something was spent",
        )
    if steps.sample_rate < 1 and not found.permits_sampling():
        reason = "the site's privacy budget counts steps with all patients only; the plan samples patients"
        raise RefusedError(
            f"{request}: {reason}",
            code="sampling-not-permitted",
            public_reason=reason,
            hint="privacy.sample_rate: 1 in the plan",
        )
    history = [*charged(rows, account), *planned]
    if not found.admits(history, steps):
        before, after = (epsilon_text(found.cost(spent)) for spent in (history, [*history, steps]))
        raise RefusedError(
            (
                f"{request}: {before} of epsilon {found.epsilon:.4g} at delta {found.delta:g} is spent; "
                f"{steps} would make it {after}"
            ),
            code="budget-exhausted",
            public_reason=(
                f"the site's privacy budget is {found.epsilon:.4g}; this request would make the total {after}"
            ),
            hint="use fewer steps or more noise; see fedqc site budget",
        )
    return found


def account_named(
    rows: Sequence[LedgerRow],
    name: str,
    found: PrivacyFilter | None,
    max_epsilon: float,
    max_delta: float,
    cohort: str,
) -> Account:
    own = [row for row in rows if row.account == name and row.cohort]
    return Account(
        name=name,
        cohorts=tuple(dict.fromkeys(row.cohort for row in own)) or (cohort,),
        spent=found.cost(charged(rows, name)) if found else 0.0,
        cap=found.epsilon if found else max_epsilon,
        delta=found.delta if found else max_delta,
        kind=found.kind if found else "",
        has_non_private=any(row.kind == "non-private" for row in own),
    )
