"""The `fedqc site` commands: set up, check, run and audit a hospital's site."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from common.arms import ARMS
from common.cli import Format, FormatOption, show
from common.errors import ConfigError, DataError, RefusedError
from common.names import SITE_KINDS
from common.progress_bar import say, speaking
from common.terminal import print, wrapped

if TYPE_CHECKING:
    from client.cli.answers import Questions
    from client.site.approvals import Approval
    from client.site.config import SiteConfig
    from client.site.enrolment import NewSite
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
        typer.Option(help="Name of this group of patients; it stands in each entry of the privacy ledger."),
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
    declare: Annotated[
        str | None,
        typer.Option(
            help="If --kind is not hospital: why these are no hospital's patients; stays at the site."
        ),
    ] = None,
    yes: YesOption = False,
    format: FormatOption = Format.text,
) -> None:
    """Make a site: site.yaml, cohort.yaml, policy.yaml, keys, ledger, request.zip. Overwrites nothing.

    A site.yaml in the folder is adopted: only what it lacks is asked for, and its site key is kept.
    """
    from client.cli.answers import Questions
    from client.site.enrolment import LEVELS
    from client.supervision.preflight import scores_note
    from common.enrolment import read_request

    folder = folder or Path(os.environ.get("FEDQC_SITE", "."))
    asking = Questions(yes=yes)
    with asking.kept():
        new, request = _new_site(
            folder,
            asking,
            {
                "name": name,
                "images": images,
                "labels": labels,
                "nominal-patients": nominal_patients,
                "kind": kind,
                "cohort": cohort,
                "level": level,
                "ethics-approval": ethics_approval,
                "consent-basis": consent_basis,
                "assessed": assessed,
                "declare": declare,
            },
            stand_in,
        )
    if not new.level:
        say(f"{folder}: the existing policy is kept" + (f"; --level {level} is not applied" if level else ""))
    else:
        say(f"{folder}: privacy level {new.level}")
        say("  " + LEVELS[new.level].explanation.replace("\n", "\n  "))
    if note := scores_note(folder):
        say(f"note: {note}")
    say(f"send {request} to the coordinator, and its fingerprint another way (telephone, letter):")
    found = read_request(request).fingerprint
    show(format, {"site": new.name, "request": str(request), "fingerprint": found}, found)


def _new_site(
    folder: Path, asking: Questions, options: dict[str, Any], stand_in: str
) -> tuple[NewSite, Path]:
    """Ask for what neither an option nor a site.yaml gives, and make the site; gives its request, too."""
    from client.cli import answers
    from client.site.enrolment import (
        LEVELS,
        NewSite,
        existing_cohort,
        existing_site,
        init_site,
        is_no_hospital,
    )

    adopted = existing_site(folder)
    known: dict[str, Any] = {}
    if adopted is not None:
        say(f"{folder / 'site.yaml'}: adopted; only missing keys are added")
        known = {
            "name": adopted.name,
            "kind": adopted.kind,
            "cohort": adopted.cohort,
            "images": folder / adopted.images,
            "labels": folder / adopted.labels,
            "nominal-patients": adopted.nominal_patients,
        }
        stand_in = stand_in or adopted.stand_in or ""
    legal = existing_cohort(folder)
    known |= {"ethics-approval": legal.get("ethics_approval"), "consent-basis": legal.get("consent_basis")}
    has_policy = (folder / ((adopted and adopted.policy) or "policy.yaml")).is_file()

    def asked(option: str, question: str, check: answers.Check, default: str | None = None) -> str:
        given = options[option] or known.get(option)
        return asking.ask(option, str(given) if given else None, question, default, check=check)

    kinds = answers.one_of(SITE_KINDS)
    kind = asked("kind", "Kind of site (hospital, public, synthetic)", kinds, "hospital")
    if kind not in SITE_KINDS:
        raise ConfigError(
            f"--kind {kind!r}: not a kind of site",
            code="bad-argument",
            hint="known: hospital, public, synthetic",
        )
    name = asked("name", "Name of the site, which the coordinator sees", answers.a_name)
    images = answers.a_path(asked("images", "Folder with the DICOM files", answers.a_folder))
    labels = answers.a_path(asked("labels", "Label sheet (CSV)", answers.a_sheet))
    cohort = asked("cohort", "Name of this group of patients", answers.a_cohort)
    bucket = asked("nominal-patients", "About how many patients: 50, 100, 200, 500, 1000 …", answers.a_bucket)
    level = ""
    if not has_policy:
        if options["level"] is None and asking.asks:
            for word, one in LEVELS.items():
                say(f"\n{word}\n  " + one.explanation.replace("\n", "\n  "))
        level = asked("level", f"Privacy level ({', '.join(LEVELS)})", answers.one_of(LEVELS), "usual")
    ethics = consent = ""
    if kind == "hospital":
        ethics = asked(
            "ethics-approval",
            "Reference of the ethics approval (stays at the site)",
            answers.stated("ethics_approval"),
        )
        consent = asked(
            "consent-basis",
            "Legal basis for using these images (stays at the site)",
            answers.stated("consent_basis"),
        )
    assessed = adopted.assessed if adopted else None
    if assessed is None:
        assessed = _declared(options["assessed"], Path(labels), asking)
    declare = options["declare"]
    if declare is None and not is_no_hospital(adopted, kind, Path(images)):
        declare = asked("declare", f"Kind {kind}: why are these no hospital's patients", answers.a_text)
    new = NewSite(
        name=name,
        kind=kind,
        cohort=cohort,
        images=images,
        labels=labels,
        nominal_patients=int(bucket),
        level=level,
        ethics_approval=ethics or str(options["ethics-approval"] or known["ethics-approval"] or ""),
        consent_basis=consent or str(options["consent-basis"] or known["consent-basis"] or ""),
        stand_in=stand_in,
        assessed=assessed,
        declare=declare or "",
    )
    return new, init_site(folder, new, warn=lambda text: say(f"note: {text}"))


def _declared(given: str | None, labels: Path, asking: Questions) -> tuple[str, ...] | None:
    """The artifacts that the operator declares as assessed; None where there is no answer yet.

    Those that have an answer in the label sheet are proposed.
    """
    from client.cli.answers import artifacts
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
    question = "Artifacts that your readers assessed"
    text = asking.ask("assessed", given, question, ", ".join(proposed), check=artifacts)
    return tuple(word.strip() for word in text.split(",") if word.strip() and word.strip() != "none")


@site.command()
def declare(
    why: Annotated[str, typer.Argument(help="Why the images of this site are no hospital's patients.")],
    folder: SiteOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Declare that a site of kind public or synthetic holds no hospital's patients; noted in site.yaml."""
    from client.site.enrolment import declare_not_hospital

    where = site_folder(folder)
    declare_not_hospital(where, why)
    say(f"declared in {where / 'site.yaml'}: from now on exact scores may leave, without noise")
    if format is Format.json:
        show(format, {"declared_in": str(where / "site.yaml")})


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
    format: FormatOption = Format.text,
) -> None:
    """Join a federation with the coordinator's kit; or renew the enrolment with a renewed kit."""
    from client.site.enrolment import join as take_kit
    from client.supervision.preflight import bucket_note, scores_note
    from client.supervision.systemd import write_units

    where = site_folder(folder)
    taken = take_kit(where, kit, fingerprint, leave=leave)
    say(f"{taken.site} joined the federation {taken.federation} at {taken.address} until {taken.expires}")
    for note in filter(None, (bucket_note(where), scores_note(where))):
        say(f"note: {note}")
    try:
        units = f", or the systemd units in {write_units(where)}"
    except ConfigError as error:
        units = f"; no systemd units: {error.message}"
    say(f"next: fedqc site check; then fedqc site start{units}")
    if format is Format.json:
        said = {"site": taken.site, "federation": taken.federation, "address": taken.address}
        show(format, said | {"expires": taken.expires.isoformat()})


@site.command()
def check(
    plan: Annotated[Path | None, typer.Argument(help="Plan from the coordinator.")] = None,
    folder: SiteOption = None,
    format: FormatOption = Format.text,
) -> int:
    """Check versions, clock, network, disk, GPU, encryption, file modes, privacy ledger and data.

    With PLAN, also whether this site's policy permits it.
    """
    from client.supervision import preflight
    from common.plan import read_plan
    from common.pricing import with_noise

    where = site_folder(folder)
    checks = []
    for found in preflight.check(where, with_noise(read_plan(plan)) if plan else None):
        checks.append(found)
        if format is Format.text:
            print(preflight.table([found]), flush=True)
    if format is Format.json:
        print(json.dumps([asdict(found) for found in checks], ensure_ascii=False))
    return preflight.exit_status(checks)


@site.command()
def approve(
    plan: Annotated[Path | None, typer.Argument(help="Plan from the coordinator.")] = None,
    folder: SiteOption = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="How many runs of the plan may begin. Default: 1.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=0, max=3650, help="For how many days the approval holds. Default: 90.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day of the approval.")
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List what was approved, by whom, until when, runs used and left.")
    ] = False,
    withdraw: Annotated[
        str | None,
        typer.Option(
            "--withdraw", metavar="PLAN|HASH", help="Withdraw an approval; a run that has begun stops, too."
        ),
    ] = None,
    changed_data: Annotated[
        str | None,
        typer.Option(
            "--changed-data",
            metavar="RUN",
            help="Accept that images, labels or split changed since the first round of this run.",
        ),
    ] = None,
    yes: YesOption = False,
    format: FormatOption = Format.text,
) -> int:
    """Show a plan in plain words and approve exactly this plan; list or withdraw approvals; or accept
    changed data in a run of it.
    """
    from client.data.inclusion import read_rules
    from client.site import approvals
    from client.site.config import read_site
    from client.site.policy import admit_ethics
    from common.leave_one_out import members_of, study_of
    from common.plan import read_plan
    from common.pricing import with_noise

    where = site_folder(folder)
    config, _ = read_site(where)
    state = where / config.state
    if listing:
        return _list_approvals(state, format)
    if withdraw is not None:
        given = Path(withdraw)
        sha256 = study_of(with_noise(read_plan(given))).sha256() if given.is_file() else withdraw
        found = approvals.withdraw(state, sha256)
        say(f"withdrawn: {found.plan}, hash {found.plan_sha256}; nothing of it is carried out from now on")
        return _show_approval(state, found.plan_sha256, format)
    if plan is None:
        raise ConfigError("PLAN is missing", code="bad-argument", hint="or --list, or --withdraw PLAN|HASH")
    if days is not None and until is not None:
        raise ConfigError("--days and --until: give one of them", code="bad-argument")
    read = read_plan(plan)
    if changed_data is not None:
        return _accept_change(state, changed_data, read, yes=yes)
    read = study_of(with_noise(read))
    ethics = read_rules(where).ethics
    admit_ethics(config.kind, ethics)
    say(plan_text(read, config, where))
    known = approvals.approval_of(state, read.sha256())
    is_open = known is not None and known.state(date.today()) == "open"
    if known is not None and is_open and runs is None and days is None and until is None:
        approvals.freeze(state, read.sha256(), _frozen_index(where, read, known.index))
        say(f"this plan is already approved: {known.runs_left} runs left, until {known.until}")
        return _show_approval(state, read.sha256(), format)
    last = (
        until.date()
        if until
        else date.today() + timedelta(days=approvals.DEFAULT_DAYS if days is None else days)
    )
    number = runs or approvals.DEFAULT_RUNS
    of_each = f" of each of its {len(members_of(read))} members" if read.leave_one_site_out else ""
    terms = f"for {number} new run{'s' * (number != 1)}{of_each}, until {last}"
    if not yes and not typer.confirm(f"Approve exactly this plan {terms}?", err=True):
        say("not approved; nothing was changed")
        return 4
    index = _frozen_index(where, read, approvals.index_approved(state, read.sha256()))
    approvals.approve(where, read, runs=number, until=last, ethics=ethics, index=index)
    say(f"approved {terms}")
    return _show_approval(state, read.sha256(), format)


def _show_approval(state: Path, plan_sha256: str, format: Format) -> int:
    """For programs, what became of one approval; people have read it."""
    from client.site.approvals import approvals

    if format is Format.json:
        (found,) = (one for one in approvals(state) if one.plan_sha256 == plan_sha256)
        show(format, _approval_row(found))
    return 0


def _approval_row(one: Approval) -> dict[str, Any]:
    return {
        "plan": one.plan,
        "plan_sha256": one.plan_sha256,
        "by": one.by,
        "at": one.at,
        "until": one.until.isoformat() if one.text else None,
        "runs_left": one.runs_left if one.text else None,
        "index": one.index or None,
        "begun": list(one.begun),
        "state": one.state(date.today()),
    }


def _frozen_index(where: Path, plan: RunPlan, before: str) -> str:
    """The index version that runs of a plan begin with. Where the data cannot be used, that is said, and the
    one of an earlier approval stays: `before`, or "".
    """
    from client.data.prepare import index_to_freeze

    try:
        index = index_to_freeze(where / "site.yaml", plan)
    except (ConfigError, DataError, RefusedError) as error:
        say(f"note: the images are not frozen for this plan [{error.code}]: {error.message}")
        say("correct that and approve the plan again; else the first round decides whether this site answers")
        return before
    say(f"index {index}: every run that begins under this approval uses these images")
    return index


def _list_approvals(state: Path, format: Format) -> int:
    from client.site.approvals import approvals

    found = approvals(state)
    rows = [_approval_row(one) for one in found]
    if format is Format.json:
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    for row, one in zip(rows, found, strict=True):
        print(f"{row['state']:16s}{one.plan}  {one.plan_sha256}")
        terms = (
            f", until {row['until']}, {len(one.begun)} runs begun, {one.runs_left} left" if one.text else ""
        )
        print(_wrapped(f"    approved {one.at} by {one.by}{terms}"))
        for run in one.begun:
            print(_wrapped(f"    run {run}"))
    if not found:
        say("no plan was approved at this site")
    return 0


def _accept_change(state: Path, run: str, plan: RunPlan, *, yes: bool) -> int:
    from client.site.approvals import freeze, index_approved
    from client.site.run_data import accept_changed_data, index_of_run, plan_of_run, runs_refused
    from common.leave_one_out import members_of, study_of
    from common.pricing import with_noise

    pending = next((one for one in runs_refused(state) if one.run == run), None)
    if pending is not None:
        say(
            f"run {run}, begun {pending.since}: other {' and '.join(pending.changes)} than in its first round"
        )
        say("the report will say that data of this site changed during the run, and not what changed")
        if not yes and not typer.confirm("Continue this run with the present data?", err=True):
            say("not accepted; nothing was changed")
            return 4
    # a run of an earlier version bears the hash of the plan as it was written, one of a study its member's
    hashes = {plan.sha256(), *(member.sha256() for member in members_of(with_noise(plan)))}
    approved, begun = study_of(with_noise(plan)).sha256(), plan_of_run(state, run)
    accept_changed_data(state, run, begun if begun in hashes else approved)
    if index_approved(state, approved):  # other runs of the plan begin with what was accepted
        freeze(state, approved, index_of_run(state, run))
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
    from client.site.sent_log import read_sent
    from client.supervision.supervisor import AFTER_ROUND, is_running, state_of

    where = site_folder(folder, _one_of(only))
    if only is not None:
        part = state_of(where)
        print(json.dumps(part) if format is Format.json else f"{only}  {'up' if part[only] else 'not up'}")
        return 0 if part[only] else 3
    config, _ = read_site(where)
    pinned = coordinator_of(where / config.state)
    try:
        sent = read_sent(where / config.state)
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

    where = site_folder(folder)
    with speaking(f"{where}: stopping"):
        ended = end(where, after_round=after_round)
    say(ended)


@site.command()
def budget(
    folder: SiteOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Report that every entry was recomputed under the site's key.")
    ] = False,
    raised: Annotated[
        float | None,
        typer.Option(
            "--raise",
            metavar="EPSILON",
            help="Raise the cap to this ε from now on. Never because of what models or scores look like.",
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why the cap is raised; stays in the ledger.")] = "",
    format: FormatOption = Format.text,
) -> None:
    """Show the privacy budget: spent, on what, and what is guaranteed."""
    from client.site.budget import budget_text, budgets, raise_cap

    where = site_folder(folder)
    if raised is not None:
        raise_cap(where, raised, reason)
        say(f"the cap is ε {raised:g}; max_epsilon of policy.yaml counts where it is lower")
    found = budgets(where)
    if format is Format.json:
        print(json.dumps([account | {"verified": verify} for account in found], ensure_ascii=False))
        return
    for account in found:
        for line in budget_text(account):
            print(_wrapped(line))
    if verify:
        print(f"verified: {found[0]['rows']} entries, each chained to the one before under the site's key")


@site.command()
def sent(
    run: Annotated[str | None, typer.Argument(help="Only messages of this run.")] = None,
    folder: SiteOption = None,
    format: FormatOption = Format.text,
) -> None:
    """List every message that left this site: time, kind, class, purpose, size, hash; verify each line."""
    from client.site.config import read_site
    from client.site.sent_log import read_sent

    where = site_folder(folder)
    config, _ = read_site(where)
    lines = read_sent(where / config.state)
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


@site.command()
def use(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="latest|RUN|FILE", help="Model; latest: the last one that the site received."),
    ] = None,
    folder: SiteOption = None,
    approver: Annotated[
        str | None, typer.Option(help="Name of the person who answers for it; stands in the site's log.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Repeat the test of the model in use (monthly constancy test).")
    ] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Use the former model again.")] = False,
    new_cases: Annotated[
        bool, typer.Option("--new-cases", help="Freeze the present labelled test patients as cases.")
    ] = False,
    log: Annotated[bool, typer.Option("--log", help="List who did what with which model, and when.")] = False,
    yes: YesOption = False,
    format: FormatOption = Format.text,
) -> int:
    """Test a model on frozen cases of this site, and let `fedqc predict` use it. A worse one is refused.

    The cases are labelled test patients. Exit status: 1 where --check finds another answer, 4 where the
    model is worse than the one in use.
    """
    from client.predict import acceptance
    from client.predict.acceptance_text import comparison_text, constancy_text, log_text
    from client.site.config import read_site
    from client.site.model_in_use import entries, roll_back

    if model and len(model) > 1:
        raise ConfigError(
            f"a site uses one model, not {len(model)}",
            code="bad-argument",
            hint="test one after the other; fedqc predict --model A --model B lets several judge together",
        )
    if sum((bool(model), check, rollback, log)) != 1:
        raise ConfigError("give one of MODEL, --check, --rollback, --log", code="bad-argument")
    where = site_folder(folder)
    state = where / read_site(where)[0].state
    if log:
        found = entries(state)
        print(json.dumps(found, ensure_ascii=False) if format is Format.json else log_text(found))
        return 0
    if approver is None and yes:
        raise ConfigError("--approver is missing", code="bad-argument", hint="the name of a person")
    by = (approver or str(typer.prompt("Who answers for this (name)", err=True))).strip()
    if not by:
        raise ConfigError("--approver: no name", code="bad-argument", hint="the name of a person")
    if rollback:
        if not yes and not typer.confirm("Use the former model again?", err=True):
            say("nothing was changed")
            return 4
        entry = roll_back(state, by)
        say(f"in use: {entry['model'] or 'no model of a run: the public start'}")
        return 0
    if check:
        constancy = acceptance.check_constancy(where, by, say)
        print(
            json.dumps(asdict(constancy) | {"constant": constancy.is_constant})
            if format is Format.json
            else constancy_text(constancy)
        )
        return 0 if constancy.is_constant else 1
    assert model
    tested = acceptance.examine(model[0], where, by, new_cases=new_cases, say=say)
    print(json.dumps(tested.comparison.public()) if format is Format.json else comparison_text(tested))
    asked = not tested.comparison.reasons and not yes
    if asked and not typer.confirm(f"{by}: put this model to use?", err=True):
        say("not put to use; nothing was changed")
        return 4
    entry = acceptance.put_to_use(tested, where, by)
    say(f"in use since {entry['at']}: {entry['model']}; fedqc site use --rollback returns to the former one")
    return 0


@site.command()
def report(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SITE.yaml]", help="Site. Default: --site, $FEDQC_SITE, then the current directory."
        ),
    ] = None,
    folder: SiteOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="latest|RUN|FILE",
            help="Model: latest (that this site put to use: fedqc site use), the folder of a run, or a file. "
            "Default: latest where there is one, else fedqc's public start.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for report.html and report.json.")] = None,
    show_identifiers: Annotated[
        bool, typer.Option("--show-identifiers", help="Also show file names, which may name patients.")
    ] = False,
    lang: Annotated[str, typer.Option("--lang", help="Language of text and page: en or zh.")] = "en",
    format: FormatOption = Format.text,
) -> None:
    """Show this hospital its cohort, a model's figures at its test patients, and the worst mistakes there.

    Stays here: nothing is sent. Patients of training and validation are not scored.
    """
    from client.predict import exported
    from client.predict.model import find_model
    from client.predict.operating_point import operating_points
    from client.predict.site_report import public, site_report
    from client.predict.site_report_page import render, report_text
    from client.predict.words import LANGUAGES
    from client.site.config import read_site
    from common.files import check_new, whole_folder, write_bytes
    from common.i18n import speaker
    from common.progress_bar import progress_shown

    speaker(lang, LANGUAGES)
    if path is not None and folder is not None:
        raise ConfigError(
            "give SITE.yaml or --site, not both", code="bad-argument", hint="fedqc site report SITE.yaml"
        )
    where = site_folder(path.parent if path is not None and path.name == "site.yaml" else path or folder)
    config, _ = read_site(where)
    state = where / config.state
    if out is not None:
        if out.resolve().is_relative_to((where / config.images).resolve()):
            raise ConfigError(
                f"{out}: lies in the folder of images", code="bad-argument", hint="--out DIR, anywhere else"
            )
        check_new(out)
    found_model = find_model(model, state, exports=exported.folder(state))
    if found_model.origin == "start":
        say(f"no model of a run: using fedqc's public start {found_model.start}")
    with progress_shown() as progress:
        found = site_report(
            where,
            found_model,
            lambda: operating_points(found_model, site=where, cache=state / "operating-points", say=say),
            progress=progress,
        )
    content = public(found, names=show_identifiers)
    if out is not None:
        page = render(found, lang, names=show_identifiers)
        with whole_folder(out, mode=0o700) as staging:
            for name, text in (
                ("report.html", page),
                ("report.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n"),
            ):
                write_bytes(staging / name, text.encode("utf-8", "surrogateescape"), 0o600)
        say(f"written: {out} (shows patient images: keep it in the hospital)")
    if format is Format.json:
        print(json.dumps(content, ensure_ascii=False))
    else:
        print(report_text(found, lang, names=show_identifiers))


@site.command()
def dossier(folder: SiteOption = None) -> None:
    """Print one page for a data protection officer: what leaves, ε in words, consent, signatures."""
    from client.cli.dossier import dossier as page

    for line in page(site_folder(folder), date.today()):
        print(_wrapped(line))


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
    from client.site.policy import in_plain_words
    from common.leave_one_out import members_of
    from common.pricing import EVALUATION, charges, plan_epsilon, schedule
    from common.privacy import ADJACENCY, epsilon_of, epsilon_text

    unit = config.patients.unit
    pinned = coordinator_of(folder / config.state)
    asks = (
        f"the federation {pinned['federation']} (fingerprint {pinned['fingerprint']})"
        if pinned
        else "unknown: this site has not joined a federation"
    )
    given = ", ".join(f"{name}: {value}" for name, value in plan.model.args.items())
    network = f"{plan.model.name} ({given})" if given else plan.model.name
    lines = [
        f"plan       {plan.name}, hash {plan.sha256()}",
        f"who asks   {asks}",
        f"question   {plan.question.strip() or '(none stated)'}",
        f"model      {network}, from {plan.model.initial}; arms: {', '.join(plan.scored_arms)}",
    ]
    trains = plan.trains_at(config.name)
    delta = plan.privacy.delta
    if plan.evaluate is None:
        lines.append(
            f"rounds     {plan.training.rounds}; passes over the training patients in each: "
            f"{plan.training.local_epochs}"
        )
    else:
        lines.append(f"evaluates  models that run {plan.evaluate.run} released; nothing is trained")
        lines += [f"           {model.name}, digest {model.sha256[:16]}" for model in plan.evaluate.models]
    if not trains and plan.evaluate is None:
        lines.append("training   none at this site: it only scores the finished models")
    for arm in plan.arms if trains else ():
        if ARMS[arm].at_hospitals and not ARMS[arm].private:
            lines.append(
                f"{arm:10s} NOT PRIVATE: trained without noise; {in_plain_words(math.inf, 0.0, unit)}"
            )
    for name, steps in charges(plan, trains=trains).items():
        once = "once, if scored with noise" if name == EVALUATION else f"{steps.steps} steps"
        once += " in each run" if plan.leave_one_site_out else ""
        lines.append(f"{name:10s} ε {epsilon_text(epsilon_of([steps], delta))} ({once})")
    if plan.leave_one_site_out:
        members = members_of(plan)
        lines.append(
            f"study      {len(members)} runs, which are approved together: one with all sites, and one "
            f"without each of {', '.join(plan.leave_one_site_out)}"
        )
        lines += [
            f"           without {', '.join(one.held_out) or 'none'}: hash {one.sha256()}" for one in members
        ]
        asked = [one for plan in members for one in schedule(plan, trains=plan.trains_at(config.name))]
        total, what = epsilon_of(asked, delta) if asked else 0.0, "all runs together"
    else:
        total, what = plan_epsilon(plan, trains=trains), "all together"
    if total:
        lines.append(
            f"cost       {what}, to each {unit} ({ADJACENCY}): ε {epsilon_text(total)} at δ {delta:g}: "
            f"{in_plain_words(total, delta, unit)}"
        )
    lines.append(
        "scores     of the finished models on this site's test patients, as far as policy.yaml permits"
    )
    # behind the column of the names, so that no text of the plan looks like a line of this table
    return "\n".join(wrapped(line[11:], start=line[:11], indent=11) for line in lines)


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
    return "\n".join(wrapped(line[12:], start=line[:12], indent=12) for line in lines)


def _wrapped(line: str) -> str:
    """A line in at most 80 columns, behind the blanks that it begins with."""
    return wrapped(line, start=line[: len(line) - len(line.lstrip())])
