"""`fedqc site dossier`: one page of text for a data protection officer's file. It stays at the hospital."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

from client.data.inclusion import read_admission, read_rules
from client.site.approvals import approvals
from client.site.budget import budgets
from client.site.config import read_site, site_key
from client.site.policy import default_policy, in_plain_words, missing_ethics, read_policy
from client.site.sent_log import read_sent
from common.privacy import epsilon_text
from common.wire import OUTGOING, Crossing, crossings

CLASSES = {
    Crossing.PUBLIC: "public: what the operator wrote, or a function of plan and policy; of no patient",
    Crossing.DP: "covered by noise: its influence of one patient is bounded by ε and δ",
    Crossing.DISCLOSED: "exact: sums over patients, outside the guarantee",
}


def dossier(folder: Path, today: date) -> list[str]:
    """The page, one paragraph a line.

    Raises:
        ConfigError, DataError, LedgerError: site.yaml, policy, cohort.yaml, log or ledger cannot be used; a
            page with a gap would mislead.
    """
    return [
        *_head(folder, today),
        "",
        *_messages(folder),
        "",
        *_guarantee(folder),
        "",
        *_retention(folder),
        "",
        *_consent(folder),
        "",
        *_signatures(folder, today),
    ]


def _head(folder: Path, today: date) -> Iterator[str]:
    config, _ = read_site(folder)
    yield f"DOSSIER of site {config.name} ({config.kind}), cohort {config.cohort}, {today.isoformat()}"
    yield f"fedqc {version('fedqc')}: federated quality control of CT and MRI images. For internal use."
    yield "No image, label, identifier, path or date leaves this hospital; messages hold these fields alone."


def _messages(folder: Path) -> Iterator[str]:
    config, _ = read_site(folder)
    yield "WHAT LEAVES, by message and class"
    for message in OUTGOING:
        yield f"  {message.__name__}"
        classes = crossings(message)
        for crossing in CLASSES:
            names = [name for name, found in classes.items() if found is crossing]
            if names:
                yield f"    {crossing.name}: {', '.join(names)}"
    for crossing, meaning in CLASSES.items():
        yield f"  {crossing.name} is {meaning}."
    sent = read_sent(folder / config.state)
    if sent:
        since = sent[0]["at"][:10]
        yield f"  {len(sent)} messages left since {since}; fedqc site sent lists them, each verified."
    else:
        yield "  Nothing has left so far."


def _guarantee(folder: Path) -> Iterator[str]:
    config, _ = read_site(folder)
    policy = read_policy(folder / config.policy) if config.policy else default_policy(config.kind)
    unit = config.patients.unit
    per_run, delta = policy.epsilon_per_run, policy.max_delta
    yield "GUARANTEE (differential privacy)"
    yield (
        f"  Policy: ε at most {epsilon_text(policy.max_epsilon)} over the lifetime, "
        f"{epsilon_text(per_run)} a run, at δ {delta:g}, per {unit}."
    )
    yield f"  Lifetime, in words: {in_plain_words(policy.max_epsilon, delta, unit)}."
    yield f"  One run, in words: {in_plain_words(per_run, delta, unit)}."
    for account in budgets(folder):
        spent, cap = epsilon_text(account["spent"]), epsilon_text(account["cap"])
        yield f"  Spent by cohort {', '.join(account['cohorts'])}: ε {spent} of {cap}."
        yield f"  Spent, in words: {in_plain_words(account['spent'], account['delta'], unit)}."
        if account["has_non_private"]:
            yield "  NOT PRIVATE: these patients were used without noise; nothing is guaranteed."
    yield f"  Training without noise: {'permitted' if policy.allow_non_private else 'refused'}."
    yield f"  Scores over patients: {policy.evaluation}."
    yield "  Evidence for the installed version: fedqc verify --privacy. It is no proof."


def _retention(folder: Path) -> Iterator[str]:
    config, _ = read_site(folder)
    yield "RETENTION"
    yield f"  {config.state}/ keeps decoded images (cache), answers, approvals, log and ledger."
    yield "  The ledger and its head file are never deleted: they are the record of what was spent."
    yield "  The cache may be deleted at any time. What has left cannot be withdrawn."


def _consent(folder: Path) -> Iterator[str]:
    config, _ = read_site(folder)
    rules = read_rules(folder)
    yield "ETHICS AND OPT-OUTS"
    yield f"  Ethics approval: {rules.ethics_approval or 'not stated'}"
    yield f"  Consent basis: {rules.consent_basis or 'not stated'}"
    if missing_ethics(config.kind, rules.ethics):
        yield "  Every task is refused until both are stated in cohort.yaml."
    listed = read_admission(folder, site_key(folder / config.state), config.patients).listed
    yield f"  {listed} on the opt-out list, which is read before every task. Updates sent before stay sent."


def _signatures(folder: Path, today: date) -> Iterator[str]:
    config, _ = read_site(folder)
    joined = folder / config.state / "coordinator.json"
    yield "SIGNATURES AND APPROVALS"
    if joined.is_file():
        known = json.loads(joined.read_text(encoding="utf-8"))
        yield f"  Federation {known['federation']}, joined until {known['expires']}."
        yield f"  Coordinator's key: {known['coordinator_key']}"
        yield "  Every task is signed by the coordinator, every answer by this site."
    else:
        yield "  Not joined: nothing is signed, and no task comes from outside."
    for approval in approvals(folder / config.state):
        yield (
            f"  Plan {approval.plan} ({approval.plan_sha256[:16]}): {approval.state(today)}, by "
            f"{approval.by} at {approval.at}, {len(approval.begun)} of {approval.runs} runs begun"
        )
