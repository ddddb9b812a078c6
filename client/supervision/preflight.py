"""Check a site before a run (`fedqc site check`): versions, network, clock, disk, file modes, data, policy.

Sends nothing of the site's, prints no secret.

The network is tested as Flower's client uses it: an httpx client, which takes HTTPS_PROXY, ALL_PROXY and
NO_PROXY from the environment and asks such a proxy for a tunnel (CONNECT); its only trusted authority is the
federation's.
"""

from __future__ import annotations

import base64
import http.client
import os
import platform
import shutil
import socket
import ssl
import stat
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import yaml

from client.data.cohort import admit_quarantine, check_site, holds_index, site_slices
from client.data.inclusion import read_rules
from client.dicom.cache import is_prepared
from client.dicom.index import MAX_QUARANTINED
from client.dicom.provenance import sample, with_real_ids
from client.site.approvals import admit_approved, index_approved
from client.site.config import SiteConfig, next_bucket, read_site, right_bucket
from client.site.enrolment import coordinator_of
from client.site.kind import admit_kind
from client.site.ledger_migration import old_ledgers
from client.site.policy import (
    SitePolicy,
    admit_ethics,
    admit_hours,
    default_policy,
    in_plain_words,
    read_policy,
)
from client.site.site_ledger import has_ledger, open_ledger
from client.site.split import split_of_site
from common.errors import ConfigError, DataError, FedqcError, NetworkError, RefusedError
from common.estimability import estimability, models_scored, nominal_tested, smallest_estimable
from common.leave_one_out import members_of
from common.plan import Model, RunPlan, Training
from common.preprocess import CHANNELS, DEFAULT_SIZE
from common.pricing import EVALUATION, charges, with_noise
from common.privacy import epsilon_of, epsilon_text, gdp_max_mu
from common.progress_bar import progress_shown
from common.strict import read_yaml

if TYPE_CHECKING:
    from common.wire import SiteReadiness

CACHE_BYTES = 2 << 30
WARN_DAYS = 30
LATEST_S, EARLIEST_S = 5.0, -305.0
"""Flower refuses a node whose clock is further ahead or behind than this."""
TIMEOUT_S = 10.0
PROXY_VARIABLES = "HTTPS_PROXY and NO_PROXY; Flower's client uses httpx, which honours them"
_PATH = "/v1/fleet/"  # all that a coordinator's proxy lets through


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check. `ok` is None where it does not apply or cannot be known."""

    check: str
    ok: bool | None
    found: str = ""
    problem: str = ""  # with ok = True or None: nothing that stops a run, but worth knowing
    fix: str = ""


def check(site: Path, plan: RunPlan | None = None, *, timeout_s: float = TIMEOUT_S) -> Iterator[Check]:
    """Run all checks of `fedqc site check [PLAN]`, each when the one before was taken. Writes only the site's
    own image cache.

    Raises:
        ConfigError: site.yaml itself cannot be used (`no-such-site`, `bad-site`).
    """
    config, folder = read_site(site)
    state = folder / config.state
    try:
        pinned, damage = coordinator_of(state), None
    except ConfigError as error:
        pinned, damage = None, Check(check="enrolment", ok=False, problem=error.message, fix=error.hint)
    yield from check_versions(pinned["version"] if pinned else "")
    yield damage or check_enrolment(pinned, date.today())
    yield from _check_network(folder / "node", timeout_s)
    yield check_disk(shutil.disk_usage(state if state.is_dir() else folder).free)
    yield check_device(config.device)
    yield from check_encryption([state, folder / config.images])
    yield check_modes(folder, config)
    yield check_ledger(folder, config)
    yield from check_data(folder, config, plan)
    yield check_ethics(folder, config)
    yield check_kind(folder, config)
    try:
        policy = read_policy(folder / config.policy) if config.policy else default_policy(config.kind)
    except ConfigError as error:
        yield Check(check="policy", ok=False, problem=error.message, fix=error.hint)
        return
    said = f"ε at most {policy.max_epsilon:g} per {config.patients.unit}, δ at most {policy.max_delta:g}"
    yield Check(check="policy", ok=True, found=said)
    if plan:
        yield from check_plan(folder, config, policy, plan)


def exit_status(checks: Sequence[Check]) -> int:
    """0 if nothing failed; else 2 for the site, 3 for the network, 4 for what the policy refuses, in this
    order.
    """
    failed = {_status(found.check) for found in checks if found.ok is False}
    return min(failed, default=0)


def table(checks: Sequence[Check]) -> str:
    """Check, problem, fix: for a terminal of 80 columns."""
    lines = []
    for check in checks:
        mark = "FAIL" if check.ok is False else "note" if check.problem else "-" if check.ok is None else "ok"
        lines += _wrapped(f"{mark:4s}  {check.check:20s}  ", check.problem or check.found)
        if check.problem and check.fix:
            lines += _wrapped(f"{'':28s}fix: ", check.fix)
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    """Lines of at most 80 columns; names and paths are never broken."""
    lines = textwrap.wrap(
        text,
        80,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [head.rstrip()]


def check_versions(kit_version: str) -> Iterator[Check]:
    """Python, fedqc, Flower and torch; fedqc as the coordinator's. "" where the site has not joined."""
    python = platform.python_version()
    yield Check(check="python", ok=True, found=python)
    for name in ("fedqc", "flwr", "torch"):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(
                check=name,
                ok=False,
                problem="not installed",
                fix="reinstall fedqc into its own environment",
            )
            continue
        if name == "fedqc" and kit_version and found != kit_version:
            problem = f"{found} here, {kit_version} at the coordinator"
            yield Check(
                check=name,
                ok=False,
                problem=problem,
                fix=f"install fedqc {kit_version}, or ask for a renewed kit",
            )
        else:
            yield Check(check=name, ok=True, found=found)


def check_enrolment(pinned: dict[str, str] | None, today: date) -> Check:
    """Whether the site joined, and until when."""
    if pinned is None:
        fix = "send request.zip to the coordinator; then fedqc site join kit.zip --fingerprint …"
        return Check(check="enrolment", ok=None, problem="this site has not joined a federation", fix=fix)
    days = (date.fromisoformat(pinned["expires"]) - today).days
    fix = "ask the coordinator for a renewed kit, and join again with it"
    if days < 0:
        return Check(check="enrolment", ok=False, problem=f"expired on {pinned['expires']}", fix=fix)
    found = f"in {pinned['federation']}, {days} days left"
    return Check(
        check="enrolment",
        ok=True,
        found=found,
        problem=found if days <= WARN_DAYS else "",
        fix=fix if days <= WARN_DAYS else "",
    )


@dataclass(frozen=True, kw_only=True)
class Contact:
    """One conversation with the coordinator's proxy."""

    via: str  # "" or the hospital proxy, without its password
    certificate_days: float  # until the server's certificate expires
    skew_s: float | None  # this clock minus the coordinator's; None: the answer had no date
    status: int  # HTTP


def contact(address: str, ca_certificate: Path, *, timeout_s: float = TIMEOUT_S) -> Contact:
    """Reach the coordinator as Flower would, through the hospital's proxy if the environment names one.

    Args:
        address: host:port.
        ca_certificate: the only authority that is trusted, PEM.
    Raises:
        NetworkError: `no-such-host`, `refused-connection`, `timeout`, `unreachable`; `proxy-refused`;
            `wrong-authority`, `wrong-host`, `certificate-expired`, `bad-certificate`, `no-tls`, `tls-failed`,
            `no-answer`.
        ConfigError: the authority's file or the address cannot be used (`bad-node`).
    """
    host, port = _split(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=str(ca_certificate))
    except (OSError, ssl.SSLError):
        raise ConfigError(
            f"{ca_certificate}: no certificate that can be read",
            code="bad-node",
            hint="join again with the kit",
        ) from None
    proxy, headers = _hospital_proxy(host)
    via = "" if proxy is None else f"{proxy[0]}:{proxy[1]}"
    reached = f"the hospital's proxy {via}" if via else f"{host}:{port}"
    connection = http.client.HTTPSConnection(*(proxy or (host, port)), timeout=timeout_s, context=context)
    if via:
        connection.set_tunnel(host, port, headers)
    try:
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            raise _explained(error, reached, f"{host}:{port}", via) from None
        assert isinstance(connection.sock, ssl.SSLSocket)
        expires = ssl.cert_time_to_seconds(str((connection.sock.getpeercert() or {})["notAfter"]))
        try:
            asked = time.time()
            connection.request("GET", _PATH)
            answer = connection.getresponse()
            answered = time.time()
        except (OSError, http.client.HTTPException) as error:
            hint = (
                "is something between here and the coordinator closing connections? else tell the coordinator"
            )
            raise NetworkError(
                f"{host}:{port}: no answer over TLS ({_kind(error)})", code="no-answer", hint=hint
            ) from None
        return Contact(
            via=via,
            certificate_days=(expires - answered) / 86400,
            skew_s=_skew(answer.getheader("Date"), (asked + answered) / 2),
            status=answer.status,
        )
    finally:
        connection.close()


def coordinator_address(node: Path) -> str:
    """host:port that the site was given when it joined.

    Raises:
        ConfigError: `not-joined`, or `bad-node`: node/node.yaml cannot be read.
    """
    path = node / "node.yaml"
    try:
        return str(read_yaml(path)["address"])
    except FileNotFoundError:
        hint = "fedqc site join kit.zip --fingerprint …"
        raise ConfigError(
            f"{node.parent}: has not joined a federation", code="not-joined", hint=hint
        ) from None
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: cannot be read",
            code="bad-node",
            hint="run as the node's user, or join again with the kit",
        ) from None


def check_disk(free_bytes: int) -> Check:
    """Whether image cache and ledger have room."""
    found = f"{free_bytes / (1 << 30):.1f} GiB free"
    if free_bytes >= CACHE_BYTES:
        return Check(check="disk", ok=True, found=found)
    return Check(
        check="disk",
        ok=False,
        problem=f"{found}, the image cache may need 2",
        fix="free space, or move the state folder",
    )


def check_device(choice: str) -> Check:
    """Where the agent will compute, and that it can: two batches of zeros are trained there."""
    import torch

    from common.devices import describe, on_device, use_device
    from common.models import fresh

    found = ""
    try:
        where = use_device(choice)
        found = describe(where)
        network = fresh(Model().name, 0)
        with on_device(network):
            for _ in range(2):
                x = torch.zeros(Training().batch_size, CHANNELS, DEFAULT_SIZE, DEFAULT_SIZE, device=where)
                network(x).sum().backward()
    except ConfigError as refusal:
        return Check(check="device", ok=False, problem=refusal.message, fix=refusal.hint)
    except RuntimeError as failure:  # of the driver, or out of memory
        return Check(
            check="device",
            ok=False,
            found=found,
            problem=f"{choice}: {str(failure).splitlines()[0][:200]}",
            fix="update the driver, end other programs on it, or device: cpu in site.yaml",
        )
    finally:
        use_device("cpu")
    return Check(check="device", ok=True, found=f"training runs on {found}")


def check_encryption(folders: Sequence[Path], mounts: str | None = None) -> Iterator[Check]:
    """Best effort: whether each folder lies on an encrypted device. Not knowing is a note, never a
    failure.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            mounts = ""
    for folder in folders:
        is_encrypted = _is_encrypted(folder.resolve(), mounts)
        name = f"encryption {folder.name}"
        if is_encrypted:
            yield Check(check=name, ok=True, found="at rest")
        else:
            problem = (
                "the device under it is not encrypted"
                if is_encrypted is False
                else "cannot be told from here"
            )
            yield Check(
                check=name,
                ok=None,
                problem=problem,
                fix="ask this machine's administrator whether its disks are encrypted",
            )


def check_modes(folder: Path, config: SiteConfig) -> Check:
    """Who may read the keys and the state, and who may change what the operator decided."""
    state, node, run = folder / config.state, folder / "node", folder / "run"
    secret = [state / "signing.key", state / "site.key", node / "node.key", node / "runtime.secret"]
    decided = [
        folder / "site.yaml",
        folder / "cohort.yaml",
        *([folder / config.policy] if config.policy else []),
    ]
    rules = [
        (state, 0o077),
        (node, 0o077),
        (run, 0o007),
        *((path, 0o077) for path in secret),
        *((path, 0o022) for path in decided),
    ]
    for path, forbidden in rules:
        try:
            held = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return Check(
                check="modes",
                ok=False,
                problem=f"{path}: {error.strerror}",
                fix="run as the user who owns the site",
            )
        mode = stat.S_IMODE(held.st_mode)
        if mode & forbidden:
            fix = f"chmod {mode & ~forbidden:o} {path}"
            return Check(
                check="modes", ok=False, problem=f"{path} has mode {mode:04o}, which lets others in", fix=fix
            )
    for owned in (state, node):
        strangers = [
            path
            for path in owned.glob("*")
            if not path.is_symlink() and path.stat().st_uid != owned.stat().st_uid
        ]
        if strangers:
            fix = f"chown -R --reference={owned} {owned}; run fedqc as that user"
            return Check(
                check="modes",
                ok=False,
                problem=f"{strangers[0]} does not belong to the owner of its folder",
                fix=fix,
            )
    return Check(check="modes", ok=True, found="keys and state are their owner's only")


def check_ledger(folder: Path, config: SiteConfig) -> Check:
    """Whether the privacy ledger is there and intact: without it a hospital refuses all that is charged."""
    state = folder / config.state
    if old_ledgers(state):
        return Check(check="ledger", ok=True, found="of an earlier version, taken over at the first start")
    if config.kind != "hospital" and not has_ledger(state):
        return Check(check="ledger", ok=None, found=f"none yet at this site of kind {config.kind}")
    try:
        with open_ledger(config, folder) as ledger:
            length = len(ledger.rows())
    except FedqcError as error:
        fix = error.hint or "restore the newest copy of the state folder"
        return Check(check="ledger", ok=False, problem=f"{error.code}: {error.message}", fix=fix)
    return Check(check="ledger", ok=True, found=f"intact, entries: {length}")


def check_data(folder: Path, config: SiteConfig, plan: RunPlan | None) -> Iterator[Check]:
    """Images and labels, prepared as the plan wants them (else as fedqc does by default), and the nominal
    number of patients beside them. Images that must be decoded first show their progress.
    """
    try:
        with progress_shown() as progress:
            site_slices(folder, size=plan.image_size if plan else DEFAULT_SIZE, progress=progress)
        if plan is None:
            found = check_site(folder)
        else:
            found = check_site(folder, size=plan.image_size, plan_split=plan.split)
    except FedqcError as error:
        yield Check(
            check="data",
            ok=False,
            problem=f"{error.code}: {error.message}",
            fix=error.hint or "see fedqc data check",
        )
        return
    yield _files(folder, found, plan)
    if plan is None or plan.trains_at(config.name):
        yield check_bucket(config.nominal_patients, found["patients_by_part"]["train"])


def check_bucket(nominal_patients: int, training_patients: int) -> Check:
    """The nominal number of patients against those that would train. A warning: nothing is refused for it,
    because a refusal would tell how many patients there are.
    """
    right = right_bucket(nominal_patients, training_patients)
    said = f"nominal_patients: {nominal_patients}, and {training_patients} training patients"
    if right is None:
        return Check(check="bucket", ok=True, found=said)
    effect = (
        "the site would outweigh the others, and its steps be too small"
        if nominal_patients > training_patients
        else "the site would weigh too little, and its steps be too large"
    )
    fix = f"write nominal_patients: {right} into site.yaml before the first run"
    return Check(check="bucket", ok=True, found=said, problem=f"{said}: {effect}", fix=fix)


def bucket_note(site: Path) -> str:
    """What an operator should know of the nominal number of patients when the site joins: "" where it fits,
    or where the images have not been prepared yet. Decodes nothing.
    """
    config, folder = read_site(site)
    if not is_prepared(folder / config.state / "cache", DEFAULT_SIZE):
        return ""
    found = (one for one in check_data(folder, config, None) if one.check == "bucket" and one.problem)
    return next((f"{one.problem}; {one.fix}" for one in found), "")


def _files(folder: Path, found: Mapping[str, Any], plan: RunPlan | None) -> Check:
    left_out = len(found["quarantined"])
    if left_out > MAX_QUARANTINED * found["found"]:
        try:
            admit_quarantine(
                site_slices(folder, size=plan.image_size if plan else DEFAULT_SIZE), accept=False
            )
        except DataError as refusal:
            return Check(
                check="data", ok=False, problem=f"{refusal.code}: {refusal.message}", fix=refusal.hint
            )
    said = f"{found['used']} of {found['found']} files, {found['patients']} patients"
    if elsewhere := found["patients_left_out"]:
        said += f", of them {elsewhere} in an earlier cohort (left out)"
    said += ", prepared"
    if (missing := next_bucket(found["patients_by_part"]["train"])) is not None:
        more = f"{missing[0]} more training patient" + (" reaches" if missing[0] == 1 else "s reach")
        said += f"; {more} the next bucket ({missing[1]})"
    if left_out:
        return Check(
            check="data",
            ok=True,
            found=said,
            problem=f"{said}; {left_out} cannot be used",
            fix="list them: fedqc data check",
        )
    return Check(check="data", ok=True, found=said)


def check_ethics(folder: Path, config: SiteConfig) -> Check:
    """Ethics approval and consent basis, without which a hospital refuses every task."""
    if config.kind != "hospital":
        return Check(check="ethics", ok=None, found=f"not needed at a site of kind {config.kind}")
    try:
        admit_ethics(config.kind, read_rules(folder).ethics)
    except FedqcError as error:
        return Check(
            check="ethics",
            ok=False,
            problem=f"{error.code}: {error.message}",
            fix=error.hint or "docs/data.md",
        )
    return Check(check="ethics", ok=True, found="approval and consent basis stated in cohort.yaml")


def check_kind(folder: Path, config: SiteConfig) -> Check:
    """What says that a site of another kind is no hospital, and whether its patients look like persons."""
    if config.kind == "hospital":
        return Check(check="kind", ok=None, found="hospital")
    images = folder / config.images
    try:
        said = f"{config.kind}: {admit_kind(config, folder, again=True)}"
    except RefusedError as refusal:
        declared = "no operator has declared that these are no hospital's patients"
        problem = f"{refusal.code}: kind: {config.kind}, and {declared}"
        return Check(check="kind", ok=False, problem=problem, fix=refusal.hint)
    if real := with_real_ids(images):
        looked = len(sample(images))
        problem = f"{said}; {real} of {looked} files that were looked at name a person"
        fix = "kind: hospital in site.yaml, unless these persons agreed that exact results leave"
        return Check(check="kind", ok=True, found=said, problem=problem, fix=fix)
    return Check(check="kind", ok=True, found=said)


def check_frozen(folder: Path, plan: RunPlan, index: str) -> Check:
    """Whether the cache still holds the images that were frozen when the plan was approved."""
    try:
        held = holds_index(folder / "site.yaml", plan.image_size, index)
    except FedqcError as error:
        return Check(check="index", ok=False, problem=f"{error.code}: {error.message}", fix=error.hint)
    if held:
        return Check(check="index", ok=True, found=f"{index}, as it was approved")
    problem = "data-changed: the images changed since the plan was approved"
    return Check(check="index", ok=False, problem=problem, fix="approve it again: fedqc site approve PLAN")


def check_plan(folder: Path, config: SiteConfig, policy: SitePolicy, plan: RunPlan) -> Iterator[Check]:
    """What this site would answer to each part of the plan, and what the plan would cost."""
    from client.agent.tasks import Agent
    from common.wire import DescribeTask, SiteReadiness

    state = folder / config.state
    text = with_noise(plan).canonical_json()
    if policy.require_approval:
        yield _asked("approval", lambda: admit_approved(state, text, run=""), "given")
    else:
        yield Check(check="approval", ok=True, found="not needed")
    if frozen := index_approved(state, with_noise(plan).sha256()):
        yield check_frozen(folder, plan, frozen)
    yield _asked("hours", lambda: admit_hours(policy, datetime.now()), policy.hours or "any")
    ready = Agent(folder / "site.yaml", plan).describe(DescribeTask(run="", rehearse=True))
    if not isinstance(ready, SiteReadiness):
        yield Check(
            check="plan",
            ok=False,
            problem="this site could not compute its answer",
            fix=f"see {state / 'site.log'}",
        )
        return
    trains = plan.trains_at(config.name)
    for arm, answer in ready.arms.items() if trains else ():
        problem = "" if answer == "accept" else f"{answer}: {ready.reasons.get(arm, '')}"
        yield Check(
            check=f"arm {arm}", ok=not problem, found=answer, problem=problem, fix=_REFUSED if problem else ""
        )
    problem = (
        "" if ready.evaluation == "accept" else f"{ready.evaluation}: {ready.reasons.get('evaluation', '')}"
    )
    yield Check(
        check="evaluation",
        ok=not problem,
        found=ready.evaluation,
        problem=problem,
        fix=_REFUSED if problem else "",
    )
    if ready.scoring == "dp" and ready.nominal_tested:
        yield _check_scores(ready, with_noise(plan))
    if asked := charges(plan, trains=trains):
        delta, unit = plan.privacy.delta, config.patients.unit
        runs = members_of(plan)
        epsilon = epsilon_of(
            [one for run in runs for one in charges(run, trains=run.trains_at(config.name)).values()], delta
        )
        whole = f"all {len(runs)} runs of the study" if len(runs) > 1 else "the whole plan"
        parts = "in each run " * (len(runs) > 1) + ", ".join(
            f"{name} {epsilon_text(epsilon_of([one], delta))}" for name, one in asked.items()
        )
        said = (
            f"ε {epsilon_text(epsilon)} per {unit} at δ {delta:g} for {whole} ({parts}): "
            f"{in_plain_words(epsilon, delta, unit)}"
        )
        if ready.rounds_affordable is not None:
            said += (
                f". The remaining budget covers {ready.rounds_affordable} of {plan.training.rounds} rounds"
            )
        yield Check(check="cost", ok=True, found=said)
    if ready.seconds_a_round is not None:
        yield Check(check="time", ok=True, found=f"about {ready.seconds_a_round:g} s of training a round")


def _check_scores(ready: SiteReadiness, plan: RunPlan) -> Check:
    """Whether scores with noise could tell anything of this site, before its patients are charged."""
    noise = plan.privacy.evaluation_noise_multiplier
    assert noise is not None  # else the site is not scored with noise
    found = estimability(ready.nominal_tested, noise, models_scored(plan), len(plan.model.labels))
    said = found.words(f"ε {epsilon_text(epsilon_of([charges(plan)[EVALUATION]], plan.privacy.delta))}")
    if found.is_so:
        return Check(check="scores", ok=True, found=said)
    fix = "they would be charged and tell nothing: fewer models, a larger ε, or more test patients"
    return Check(check="scores", ok=True, found=said, problem=said, fix=fix)


def scores_note(site: Path) -> str:
    """What a hospital that is scored with noise should know when it is set up: whether its scores could tell
    anything at the most that its policy permits a run, all for one model. "" where it is scored otherwise.
    """
    config, folder = read_site(site)
    policy = read_policy(folder / config.policy) if config.policy else default_policy(config.kind)
    if config.kind != "hospital" or policy.evaluation != "dp":
        return ""
    train, _, test = split_of_site(config, folder).shares
    epsilon, delta = policy.epsilon_per_run, policy.max_delta
    noise = 1 / gdp_max_mu(epsilon, delta)
    found = estimability(nominal_tested(config.nominal_patients, train, test), noise, 1)
    said = f"scores with noise: {found.words(f'ε {epsilon:g}, the most that the policy permits a run')}"
    least = smallest_estimable(noise, 1)
    return said if found.is_so or least is None else f"{said}; from about {least} test patients on they are"


def _check_network(node: Path, timeout_s: float) -> Iterator[Check]:
    """Reachability, certificate and clock, from what the node was given when the site joined."""
    try:
        address = coordinator_address(node)
    except ConfigError as error:
        if error.code == "not-joined":
            yield Check(check="coordinator", ok=None, found="not joined yet")
        else:
            yield Check(check="coordinator", ok=False, problem=error.message, fix=error.hint)
        return
    try:
        met = contact(address, node / "ca.crt", timeout_s=timeout_s)
    except FedqcError as error:
        yield Check(check="coordinator", ok=False, problem=f"{error.code}: {error.message}", fix=error.hint)
        return
    way = f"{address} through {met.via} ({PROXY_VARIABLES})" if met.via else f"{address}, directly"
    if met.status in (502, 503, 504):
        problem = f"{address}: the coordinator's proxy answers, Flower behind it does not (HTTP {met.status})"
        yield Check(
            check="coordinator", ok=False, problem=problem, fix="tell the coordinator: fedqc federation start"
        )
    else:
        yield Check(check="coordinator", ok=True, found=way)
    days = met.certificate_days
    said, fix = f"of the coordinator: {days:.0f} days left", "tell the coordinator: fedqc federation renew"
    yield Check(
        check="certificate",
        ok=True,
        found=said,
        problem=said if days <= WARN_DAYS else "",
        fix=fix if days <= WARN_DAYS else "",
    )
    yield check_clock(met.skew_s)


def check_clock(skew_s: float | None) -> Check:
    """This clock against the coordinator's. `skew_s` is positive where this clock is ahead."""
    limits = f"Flower allows {EARLIEST_S:+.0f} to {LATEST_S:+.0f} s"
    if skew_s is None:
        return Check(
            check="clock",
            ok=None,
            problem="the coordinator's answer had no date",
            fix="compare the clocks by hand",
        )
    said = f"{skew_s:+.1f} s against the coordinator's; {limits}"
    if EARLIEST_S < skew_s < LATEST_S:
        return Check(check="clock", ok=True, found=said)
    ahead = "ahead" if skew_s > 0 else "behind"
    return Check(
        check="clock",
        ok=False,
        problem=f"{ahead}: {said}",
        fix="set this machine's clock from a time server (NTP)",
    )


def _explained(error: Exception, reached: str, server: str, via: str) -> NetworkError:
    """What stands in the way, and who can move it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _untrusted(error, server)
    if isinstance(error, ssl.SSLError):
        plaintext = error.reason in (
            "WRONG_VERSION_NUMBER",
            "HTTP_REQUEST",
            "RECORD_LAYER_FAILURE",
            "UNKNOWN_PROTOCOL",
        )
        if plaintext:
            return NetworkError(
                f"{server}: answers without TLS",
                code="no-tls",
                hint="check the port; fedqc requires TLS",
            )
        return NetworkError(f"{server}: TLS failed ({error.reason})", code="tls-failed", hint=_INTERCEPTED)
    if isinstance(error, socket.gaierror):
        hint = f"check the name, the DNS, and {PROXY_VARIABLES}"
        return NetworkError(f"{reached}: the name does not resolve", code="no-such-host", hint=hint)
    if isinstance(error, ConnectionRefusedError):
        hint = (
            "is the proxy running?"
            if via
            else "is the coordinator running? does the firewall let this port out?"
        )
        return NetworkError(f"{reached}: refuses the connection", code="refused-connection", hint=hint)
    if isinstance(error, TimeoutError):
        hint = "a firewall that drops packets looks like this: ask for this one outbound port"
        return NetworkError(f"{reached}: no answer in time", code="timeout", hint=hint)
    if via and isinstance(error, OSError) and "Tunnel connection failed" in str(error):
        status = str(error).partition(":")[2].strip()
        hint = "ask whoever runs the proxy to allow CONNECT to this host and port, unopened"
        return NetworkError(
            f"{reached}: will not connect to {server} ({status})", code="proxy-refused", hint=hint
        )
    if isinstance(error, ConnectionError | http.client.HTTPException):
        return NetworkError(
            f"{server}: the connection ended during the handshake", code="tls-failed", hint=_INTERCEPTED
        )
    return NetworkError(
        f"{reached}: cannot be reached ({_kind(error)})",
        code="unreachable",
        hint="check that this machine is on the network",
    )


def _untrusted(error: ssl.SSLCertVerificationError, server: str) -> NetworkError:
    """By OpenSSL's verify codes: 10 expired, 9 not valid yet, 62 and 64 host and address, 2 and 18 to 21 an
    unknown authority.
    """
    if error.verify_code in (9, 10):
        state = "has expired" if error.verify_code == 10 else "is not valid yet"
        hint = "check this machine's clock; if that is right, tell the coordinator: fedqc federation renew"
        return NetworkError(f"{server}: its certificate {state}", code="certificate-expired", hint=hint)
    if error.verify_code in (62, 64):
        return NetworkError(
            f"{server}: its certificate is for another host",
            code="wrong-host",
            hint="tell the coordinator; do not continue",
        )
    if error.verify_code in (2, 18, 19, 20, 21):
        return NetworkError(
            f"{server}: its certificate is not from the federation's authority",
            code="wrong-authority",
            hint=_INTERCEPTED,
        )
    return NetworkError(
        f"{server}: its certificate cannot be used ({error.verify_message})",
        code="bad-certificate",
        hint=_INTERCEPTED,
    )


def _kind(error: Exception) -> str:
    return (error.strerror or "") if isinstance(error, OSError) and error.strerror else type(error).__name__


def _skew(date_header: str | None, now: float) -> float | None:
    """Seconds by which `now` is ahead of an HTTP date, which is cut to whole seconds."""
    try:
        return now - (parsedate_to_datetime(date_header or "").timestamp() + 0.5)
    except (ValueError, TypeError):
        return None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"{address!r}: not an address host:port", code="bad-node", hint="join again with the kit"
        )
    return host.strip("[]"), int(port)


def _hospital_proxy(host: str) -> tuple[tuple[str, int] | None, dict[str, str]]:
    """Host and port of the proxy that httpx would take for `host`, and the header that opens it; None where
    there is none.
    """
    proxies = getproxies()
    named = proxies.get("https") or proxies.get("all")
    if not named or proxy_bypass(host):
        return None, {}
    parts = urlsplit(named if "://" in named else f"http://{named}")
    try:
        where = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        where = "", 0
    if parts.scheme != "http" or not where[0]:
        hint = "HTTPS_PROXY=http://host:port is the usual form"
        raise ConfigError("unknown kind of proxy in the environment", code="bad-proxy", hint=hint)
    if not parts.username:
        return where, {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return where, {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def _is_encrypted(folder: Path, mounts: str) -> bool | None:
    """Whether dm-crypt or an encrypting file system lies under `folder`; None where that cannot be told."""
    under: tuple[str, str, str] | None = None
    for line in mounts.splitlines():
        device, point, kind, *_ = [*line.split(" "), "", "", ""]
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point or "/nowhere") and (under is None or len(point) >= len(under[1])):
            under = device, point, kind
    if under is None:
        return None
    if under[2] in ("ecryptfs", "fuse.gocryptfs", "fuse.encfs"):
        return True
    lsblk = shutil.which("lsblk")
    if not under[0].startswith("/dev/") or lsblk is None:
        return None
    command = [lsblk, "--inverse", "--noheadings", "--raw", "--output", "TYPE", under[0]]
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
        env={"PATH": os.environ.get("PATH", "")},
    )
    return None if said.returncode else "crypt" in said.stdout.split()


def _asked(name: str, admit: Callable[[], None], otherwise: str) -> Check:
    try:
        admit()
    except RefusedError as refusal:
        return Check(check=name, ok=False, problem=f"{refusal.code}: {refusal.message}", fix=refusal.hint)
    return Check(check=name, ok=True, found=otherwise)


def _status(name: str) -> int:
    if name in ("coordinator", "certificate", "clock"):
        return 3
    return 4 if name in ("approval", "hours", "evaluation") or name.startswith("arm ") else 2


_REFUSED = "a stricter plan, or a decision of the hospital to change policy.yaml"
_INTERCEPTED = (
    "does a firewall or proxy open TLS connections on the way? this address must pass unopened; "
    "else tell the coordinator"
)
