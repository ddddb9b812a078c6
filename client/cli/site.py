"""The `fedqc site` commands: set up, check, run and audit a hospital's site."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from common.arms import ARMS
from common.cli import Format, FormatOption
from common.errors import ConfigError, DataError, RefusedError
from common.names import SITE_KINDS
from common.progress_bar import say

if TYPE_CHECKING:
    from client.site.config import SiteConfig
    from client.site.ledger import Ledger
    from client.site.policy import SitePolicy
    from common.names import Unit
    from common.plan import RunPlan

site = typer.Typer(add_completion=False, no_args_is_help=True)

SiteOption = Annotated[
    Path | None,
    typer.Option("--site", help="Site folder. Default: $FEDQC_SITE, then the current directory."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not prompt.")]


@site.callback()
def _site_group() -> None:
    """Take part in a federation as a hospital: set up, approve plans, run, audit."""


@site.command()
def init(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--site", help="Folder of the new site. Default: $FEDQC_SITE, then the current directory."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name that the coordinator sees: lower case, digits, hyphens.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder with the DICOM files.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Label sheet (CSV).")] = None,
    nominal_patients: Annotated[
        int | None, typer.Option(min=1, help="Size bucket: 50, 100, 200, 500 …; never an exact count.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="hospital, public or synthetic.")] = None,
    cohort: Annotated[
        str | None,
        typer.Option(help="Name of this group of patients; the privacy ledger keeps one account for it."),
    ] = None,
    level: Annotated[str | None, typer.Option(help="Privacy level: cautious, usual or open.")] = None,
    ethics_approval: Annotated[
        str | None, typer.Option(help="Number of the ethics approval; stays at the site.")
    ] = None,
    consent_basis: Annotated[
        str | None, typer.Option(help="Legal basis for using these images; stays at the site.")
    ] = None,
    stand_in: Annotated[str, typer.Option(help="If the patients are not persons: what they are.")] = "",
    assessed: Annotated[
        str | None,
        typer.Option(help="Artifacts that your readers assessed, separated by commas; none: do not train."),
    ] = None,
    yes: YesOption = False,
) -> None:
    """Make a site: site.yaml, cohort.yaml, policy.yaml, keys, ledger, request.zip. Overwrites nothing.

    A site.yaml in the folder is adopted: only what it lacks is asked for, and its site key is kept.
    """
    from client.site.enrolment import LEVELS, NewSite, existing_cohort, existing_site, init_site
    from common.enrolment import read_request

    def asked(option: str, given: str | None, question: str, default: str | None = None) -> str:
        if given is not None:
            return given
        if yes:
            if default is None:
                raise ConfigError(
                    f"--{option} is missing", code="bad-argument", hint="omit --yes to be asked for it"
                )
            return default
        return str(typer.prompt(question, default=default, err=True))

    folder = folder or Path(os.environ.get("FEDQC_SITE", "."))
    adopted = existing_site(folder)
    if adopted is not None:
        say(f"{folder / 'site.yaml'}: adopted; only missing keys are added")
        name, kind, cohort = name or adopted.name, kind or adopted.kind, cohort or adopted.cohort
        images, labels = images or folder / adopted.images, labels or folder / adopted.labels
        nominal_patients = nominal_patients or adopted.nominal_patients
        stand_in = stand_in or adopted.stand_in or ""
    legal = existing_cohort(folder)
    ethics_approval = ethics_approval or legal.get("ethics_approval") or None
    consent_basis = consent_basis or legal.get("consent_basis") or None
    has_policy = (folder / ((adopted and adopted.policy) or "policy.yaml")).is_file()
    chosen_kind = asked("kind", kind, "Kind of site (hospital, public, synthetic)", "hospital")
    if chosen_kind not in SITE_KINDS:
        raise ConfigError(
            f"--kind {chosen_kind!r}: not a kind of site",
            code="bad-argument",
            hint="known: hospital, public, synthetic",
        )
    chosen = {
        "name": asked("name", name, "Name of the site, which the coordinator sees"),
        "images": asked("images", str(images) if images else None, "Folder with the DICOM files"),
        "labels": asked("labels", str(labels) if labels else None, "Label sheet (CSV)"),
        "cohort": asked("cohort", cohort, "Name of this group of patients"),
    }
    given = str(nominal_patients) if nominal_patients else None
    bucket = asked("nominal-patients", given, "About how many patients: 50, 100, 200, 500, 1000 …")
    if not bucket.isdigit() or int(bucket) < 1:
        raise ConfigError(f"--nominal-patients {bucket!r}: not a number of patients", code="bad-argument")
    if level is None and not yes and not has_policy:
        for word, known in LEVELS.items():
            say(f"\n{word}\n  " + known.explanation.replace("\n", "\n  "))
    chosen_level = (
        "" if has_policy else asked("level", level, f"Privacy level ({', '.join(LEVELS)})", "usual")
    )
    is_hospital = chosen_kind == "hospital"
    ethics = (
        asked("ethics-approval", ethics_approval, "Reference of the ethics approval (stays at the site)")
        if is_hospital
        else ""
    )
    consent = (
        asked("consent-basis", consent_basis, "Legal basis for using these images (stays at the site)")
        if is_hospital
        else ""
    )
    declared = adopted.assessed if adopted else None
    if declared is None:
        declared = _declared(assessed, Path(chosen["labels"]), asked)
    new = NewSite(
        **chosen,
        nominal_patients=int(bucket),
        kind=chosen_kind,
        level=chosen_level,
        ethics_approval=ethics_approval or ethics,
        consent_basis=consent_basis or consent,
        stand_in=stand_in,
        assessed=declared,
    )
    request = init_site(folder, new, warn=lambda text: say(f"note: {text}"))
    if has_policy:
        say(f"{folder}: the existing policy is kept" + (f"; --level {level} is not applied" if level else ""))
    else:
        say(f"{folder}: privacy level {chosen_level}")
        say("  " + LEVELS[chosen_level].explanation.replace("\n", "\n  "))
    say(f"send {request} to the coordinator, and its fingerprint another way (telephone, letter):")
    print(read_request(request).fingerprint)


def _declared(
    given: str | None, labels: Path, asked: Callable[[str, str | None, str, str | None], str]
) -> tuple[str, ...] | None:
    """The artifacts that the operator declares as assessed; None where there is no answer yet.

    Those that have an answer in the label sheet are proposed.
    """
    from client.labels.label_sheet import inspect_labels
    from common.artifacts import NAMES

    proposed: list[str] = []
    if given is None:
        try:
            rows = inspect_labels(labels)[0].rows
        except DataError:
            return None
        proposed = [
            name for place, name in enumerate(NAMES) if any(row.present[place] in (0, 1) for row in rows)
        ]
        if not proposed:
            return None
    text = asked("assessed", given, "Artifacts that your readers assessed", ", ".join(proposed))
    return tuple(word.strip() for word in text.split(",") if word.strip() and word.strip() != "none")


@site.command()
def join(
    kit: Annotated[Path, typer.Argument(help="kit.zip from the coordinator.")],
    fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the federation, received another way than the kit.")
    ],
    folder: SiteOption = None,
    leave: Annotated[
        bool, typer.Option("--leave", help="Leave the present federation for this one.")
    ] = False,
) -> None:
    """Join a federation with the coordinator's kit; or renew the enrolment with a renewed kit."""
    from client.site.enrolment import join as take_kit
    from client.supervision.systemd import write_units

    where = site_folder(folder)
    taken = take_kit(where, kit, fingerprint, leave=leave)
    say(f"{taken.site} joined the federation {taken.federation} at {taken.address} until {taken.expires}")
    try:
        units = f", or the systemd units in {write_units(where)}"
    except ConfigError as error:
        units = f"; no systemd units: {error.message}"
    say(f"next: fedqc site check; then fedqc site start{units}")


@site.command()
def check(
    plan: Annotated[Path | None, typer.Argument(help="Plan from the coordinator.")] = None,
    folder: SiteOption = None,
    format: FormatOption = Format.text,
) -> int:
    """Check versions, clock, certificates, network, disk, GPU, encryption, file modes and data.

    With PLAN, also whether this site's policy permits it.
    """
    from client.supervision import preflight
    from common.plan import read_plan

    where = site_folder(folder)
    checks = preflight.check(where, read_plan(plan) if plan else None)
    print(
        json.dumps([asdict(found) for found in checks], ensure_ascii=False)
        if format is Format.json
        else preflight.table(checks)
    )
    return preflight.exit_status(checks)


@site.command()
def approve(
    plan: Annotated[Path, typer.Argument(help="Plan from the coordinator.")],
    folder: SiteOption = None,
    changed_data: Annotated[
        str | None,
        typer.Option(
            "--changed-data",
            metavar="RUN",
            help="Accept that images, labels or split changed since the first round of this run.",
        ),
    ] = None,
    yes: YesOption = False,
) -> int:
    """Show a plan in plain words, and approve exactly this plan; or accept changed data in a run of it."""
    from client.data.inclusion import read_rules
    from client.site.approvals import approve as note_approval
    from client.site.approvals import is_approved
    from client.site.config import read_site
    from client.site.policy import admit_ethics
    from common.plan import read_plan

    where = site_folder(folder)
    read = read_plan(plan)
    config, _ = read_site(where)
    if changed_data is not None:
        return _accept_change(where / config.state, changed_data, read, yes=yes)
    ethics = read_rules(where).ethics
    admit_ethics(config.kind, ethics)
    say(plan_text(read, config, where))
    if is_approved(where / config.state, read.sha256()):
        say("this plan is already approved")
        return 0
    if not yes and not typer.confirm("Approve exactly this plan?", err=True):
        say("not approved; nothing was changed")
        return 4
    note_approval(where, read, ethics=ethics)
    say("approved")
    return 0


def _accept_change(state: Path, run: str, plan: RunPlan, *, yes: bool) -> int:
    from client.site.run_data import accept_changed_data, runs_refused

    pending = next((one for one in runs_refused(state) if one.run == run), None)
    if pending is not None:
        say(
            f"run {run}, begun {pending.since}: other {' and '.join(pending.changes)} than in its first round"
        )
        say("the report will say that data of this site changed during the run, and not what changed")
        if not yes and not typer.confirm("Continue this run with the present data?", err=True):
            say("not accepted; nothing was changed")
            return 4
    accept_changed_data(state, run, plan.sha256())
    say("accepted; the coordinator can resume the run")
    return 0


@site.command()
def start(
    folder: SiteOption = None,
    only: Annotated[
        str | None,
        typer.Option(help="Run only this process: agent or node. For systemd and containers."),
    ] = None,
    require_isolation: Annotated[
        bool,
        typer.Option("--require-isolation", help="Do not start unless agent and node can be isolated."),
    ] = False,
) -> int:
    """Run the agent and the node until Ctrl-C; restart either if it ends."""
    from client.supervision.supervisor import start as run

    where = site_folder(folder, _one_of(only))
    return run(
        where, only=cast(Literal["agent", "node"] | None, only), require_isolation=require_isolation, say=say
    )


@site.command()
def status(
    folder: SiteOption = None,
    only: Annotated[
        str | None, typer.Option(help="Only this process: agent or node. For containers.")
    ] = None,
    format: FormatOption = Format.text,
) -> int:
    """Show whether the agent answers, the node is connected, and when the enrolment expires.

    Exit status 3: agent or node is not up.
    """
    from client.site.config import read_site
    from client.site.enrolment import coordinator_of
    from client.site.run_data import runs_refused
    from client.supervision.supervisor import AFTER_ROUND, is_running, state_of

    where = site_folder(folder, _one_of(only))
    if only is not None:
        part = state_of(where)
        print(json.dumps(part) if format is Format.json else f"{only}  {'up' if part[only] else 'not up'}")
        return 0 if part[only] else 3
    config, _ = read_site(where)
    pinned = coordinator_of(where / config.state)
    try:
        sent = _sent(where / config.state / "sent.jsonl")
    except DataError as error:
        say(f"{error.message}; see fedqc site sent")
        sent = []
    try:
        refused = runs_refused(where / config.state)
    except DataError as error:
        say(error.message)
        refused = []
    found: dict[str, Any] = {
        "site": config.name,
        "federation": pinned["federation"] if pinned else None,
        "days_left": (date.fromisoformat(pinned["expires"]) - date.today()).days if pinned else None,
        "supervised": is_running(where),
        "stopping": (where / "run" / AFTER_ROUND).exists(),
        "last_sent": sent[-1] if sent else None,
        "data_changed": [{"run": one.run, "changes": list(one.changes)} for one in refused],
    } | state_of(where)
    if format is Format.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(_status_text(found))
    return 0 if found["agent"] and found["node"] else 3


@site.command()
def stop(
    folder: SiteOption = None,
    after_round: Annotated[
        bool, typer.Option("--after-round", help="Finish the current job first; start no other.")
    ] = False,
) -> None:
    """Stop the agent and the node that `fedqc site start` runs."""
    from client.supervision.supervisor import stop as end

    say(end(site_folder(folder), after_round=after_round))


@site.command()
def budget(
    folder: SiteOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Report that every entry was recomputed under the site's key.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Show each cohort's privacy budget: spent, on what, and left."""
    found = budgets(site_folder(folder))
    if format is Format.json:
        print(json.dumps([account | {"verified": verify} for account in found], ensure_ascii=False))
        return
    for account in found:
        print(_budget_text(account))
        if verify:
            print(
                f"  verified: {account['rows']} entries, each chained to the one before under the site's key"
            )


@site.command()
def sent(
    run: Annotated[str | None, typer.Argument(help="Only messages of this run.")] = None,
    folder: SiteOption = None,
    format: FormatOption = Format.text,
) -> None:
    """List every message that left this site: time, kind, class, purpose, size, hash."""
    from client.site.config import read_site

    where = site_folder(folder)
    config, _ = read_site(where)
    lines = _sent(where / config.state / "sent.jsonl")
    if run is not None:
        lines = [line for line in lines if line["run"] == run or line["run"].startswith(f"{run}-")]
    if format is Format.json:
        print(json.dumps(lines, ensure_ascii=False))
        return
    for line in lines:
        details = [line["run"], f"round {line['round']}" if line["round"] else "", f"{line['bytes']} bytes"]
        print(f"{line['at']:25s}  {line['kind']:16s} {line['class']:12s} {line['purpose']}")
        print(_wrapped(f"  {', '.join(filter(None, details))}"))
        print(f"  sha256 {line['sha256']}")
    print(f"{len(lines)} messages, {sum(int(line['bytes']) for line in lines)} bytes")


def site_folder(given: Path | None, only: str | None = None) -> Path:
    """Folder named by --site or FEDQC_SITE, else the current directory.

    Args:
        only: the process to run; a node may see only node/ and run/ of a site.
    Raises:
        ConfigError: it is not a site (code `no-such-site`).
    """
    folder = given or Path(os.environ.get("FEDQC_SITE", "."))
    if not (folder / "site.yaml").is_file() and not (only == "node" and (folder / "node").is_dir()):
        hint = "use --site DIR or $FEDQC_SITE; make one: fedqc site init"
        raise ConfigError(f"{folder.absolute()}: no site.yaml in this folder", code="no-such-site", hint=hint)
    return folder.absolute()


def _one_of(only: str | None) -> str | None:
    if only not in (None, "agent", "node"):
        raise ConfigError(f"--only {only!r}: not a process", code="bad-argument", hint="known: agent, node")
    return only


def plan_text(plan: RunPlan, config: SiteConfig, folder: Path) -> str:
    """A plan for an approver: who asks, what for, which models, how many rounds, the cost to a patient."""
    from client.site.enrolment import coordinator_of
    from client.site.policy import in_plain_words, private_schedule
    from common.privacy import rdp_epsilon

    unit = config.patients.unit
    pinned = coordinator_of(folder / config.state)
    asks = (
        f"the federation {pinned['federation']} (fingerprint {pinned['fingerprint']})"
        if pinned
        else "unknown: this site has not joined a federation"
    )
    lines = [
        f"plan       {plan.name}, hash {plan.sha256()}",
        f"who asks   {asks}",
        f"question   {plan.question or '(none stated)'}",
        f"model      {plan.model.name}, from {plan.model.initial}; arms: {', '.join(plan.arms)}",
        (
            f"rounds     {plan.training.rounds}; passes over the training patients in each: "
            f"{plan.training.local_epochs}"
        ),
    ]
    if config.name in plan.held_out:
        lines.append("training   none at this site: it only scores the finished models, on all its patients")
        return "\n".join(lines)
    for arm in plan.arms:
        if ARMS[arm].private:
            epsilon, delta = rdp_epsilon([private_schedule(plan)], plan.privacy.delta), plan.privacy.delta
            lines.append(
                f"{arm:10s} costs each {unit} ε {epsilon:.2f} at δ {delta:g}: "
                f"{in_plain_words(epsilon, delta, unit)}"
            )
        elif ARMS[arm].at_hospitals:
            lines.append(
                f"{arm:10s} NOT PRIVATE: trained without noise; {in_plain_words(math.inf, 0.0, unit)}"
            )
    lines.append(
        "scores     of the finished models on this site's test patients, as far as policy.yaml permits"
    )
    return "\n".join(lines)


def budgets(folder: Path) -> list[dict[str, Any]]:
    """One account for each cohort that this site has a ledger for, the present cohort first.

    Every entry's MAC is recomputed as the ledger is opened.
    Raises:
        LedgerError: a ledger cannot vouch for what was spent. ConfigError: there is no site key or no policy.
    """
    from client.site.config import read_site, site_key
    from client.site.ledger import Ledger, ledger_file_name
    from client.site.policy import default_policy, read_policy

    config, _ = read_site(folder)
    state = folder / config.state
    if not (state / "site.key").is_file():
        raise ConfigError(
            f"{state / 'site.key'}: missing",
            code="bad-site-key",
            hint="if privacy was spent at this site, restore it from a backup",
        )
    policy = read_policy(folder / config.policy) if config.policy else default_policy(config.kind)
    key = site_key(state)
    found = []
    for cohort in [config.cohort, *sorted(_cohorts(state) - {config.cohort})]:
        path = state / ledger_file_name(cohort)
        # nothing was ever spent; make no ledger by looking
        if not path.exists() and not path.with_name(f"{path.name}.head").exists():
            found.append(_account(cohort, None, policy, config.patients.unit))
            continue
        with Ledger.open(path, cohort=cohort, key=key) as ledger:
            found.append(_account(cohort, ledger, policy, config.patients.unit))
    return found


def _account(cohort: str, ledger: Ledger | None, policy: SitePolicy, unit: Unit) -> dict[str, Any]:
    from common.privacy import rdp_epsilon

    rows = ledger.rows() if ledger else []
    delta = policy.max_delta
    spent = ledger.spent(delta) if ledger else 0.0
    return {
        "cohort": cohort,
        "spent": spent,
        "left": max(0.0, policy.max_epsilon - spent),
        "max_epsilon": policy.max_epsilon,
        "delta": delta,
        "unit": unit,
        "rows": len(rows),
        "has_non_private": any(row.kind == "non-private" for row in rows),
        "entries": [
            {
                "at": row.at,
                "request": _request(row.request),
                "purpose": row.purpose,
                "epsilon": rdp_epsilon([row.as_steps()], delta)
                if row.kind == "reserve"
                else None,  # None: not private, no limit
            }
            for row in rows
            if row.kind in ("reserve", "non-private")
        ],
    }


def _cohorts(state: Path) -> set[str]:
    """Cohorts of every ledger file in the state folder, by its first entry; each is verified when it is
    opened.
    """
    import sqlite3

    cohorts = set()
    for path in sorted(state.glob("ledger-*.sqlite3")):
        try:
            connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
            try:
                first = connection.execute("SELECT content FROM rows ORDER BY sequence LIMIT 1").fetchone()
            finally:
                connection.close()
            cohorts.add(str(json.loads(first[0])["request"]))
        except (sqlite3.Error, ValueError, KeyError, TypeError):
            raise RefusedError(
                f"{path}: not a ledger that can be read",
                code="ledger-damaged",
                hint="restore the newest intact copy",
            ) from None
    return cohorts


def _request(text: str) -> str:
    """Run and arm of a reservation, as people write them."""
    try:
        return " ".join(str(part) for part in json.loads(text))
    except (ValueError, TypeError):
        return text


def _budget_text(account: dict[str, Any]) -> str:
    from client.site.policy import in_plain_words

    spent, most = account["spent"], account["max_epsilon"]
    lines = [
        (
            f"cohort {account['cohort']}: ε {spent:.2f} of {most:g} spent, {account['left']:.2f} left, per "
            f"{account['unit']}, at δ {account['delta']:g}"
        )
    ]
    if spent:
        lines.append(_wrapped(f"  in words: {in_plain_words(spent, account['delta'], account['unit'])}"))
    if account["has_non_private"]:
        lines.append(
            _wrapped(
                "  NOT PRIVATE: a model was trained on this cohort without noise; its patients have no "
                "privacy guarantee"
            )
        )
    for entry in account["entries"]:
        cost = "not private" if entry["epsilon"] is None else f"ε {entry['epsilon']:.2f}"
        lines.append(_wrapped(f"  {entry['at']}  {cost:11s} {entry['request']}"))
    return "\n".join(lines)


def _status_text(found: dict[str, Any]) -> str:
    agent = "; ".join(filter(None, ("answers" if found["agent"] else "does not answer", found["isolation"])))
    node = {
        True: f"connected since {found['since']}",
        False: "not connected",
        None: "unknown: this user may not read node/",
    }[found["node"]]
    lines = [
        f"site        {found['site']}",
        f"federation  {found['federation']}, {found['days_left']} days left"
        if found["federation"]
        else "federation  none joined",
        f"agent       {agent}",
        f"node        {node}",
    ]
    if found["last_error"]:
        lines.append(f"last error  {found['last_error']}")
    if found["stopping"]:
        lines.append("stopping    after the current job")
    lines += [
        f"refused     run {one['run']}: {' and '.join(one['changes'])} changed since its first round; "
        f"restore the data, or fedqc site approve PLAN --changed-data {one['run']}"
        for one in found["data_changed"]
    ]
    if found["last_sent"]:
        last = found["last_sent"]
        lines.append(f"last sent   {last['at']}, {last['purpose']}, {last['bytes']} bytes")
    return "\n".join(_wrapped(line, indent=12) for line in lines)


def _wrapped(line: str, indent: int = 4) -> str:
    """A line in at most 80 columns; names and paths are never broken."""
    kept = len(line) - len(line.lstrip())
    return textwrap.fill(
        line.lstrip(),
        80,
        initial_indent=line[:kept],
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )


def _sent(path: Path) -> list[dict[str, Any]]:
    """The lines of sent.jsonl; [] where nothing was ever sent.

    Raises:
        DataError: a line cannot be read (code `sent-damaged`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror})", code="sent-damaged", hint="run as the agent's user"
        ) from None
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            value = json.loads(line)
            lines.append(
                {
                    name: value[name]
                    for name in ("at", "kind", "class", "purpose", "run", "round", "bytes", "sha256")
                }
            )
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: line {number} is damaged",
                code="sent-damaged",
                hint="compare with a backup",
            ) from None
    return lines
