"""Make a site folder and its request (`init_site`); join a federation with the coordinator's kit (`join`).

    site.yaml cohort.yaml policy.yaml     the operator's, never overwritten; missing keys are added
    state/    0700, the agent's           signing.key, site.key, ledger; coordinator.json once it has joined
    node/     0700, the network side's    node.key, runtime.secret; node.yaml and ca.crt once it has joined
    run/      0750                        the socket between the two
    request.zip                           public keys, for the coordinator

Private keys are made here and stay here. A kit is trusted if its fingerprint equals the one that reached the
hospital another way.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from client.dicom.patients import NEW_SITE_JOIN
from client.dicom.provenance import is_generated
from client.ipc.protocol import MAX_SOCKET_PATH_BYTES
from client.site.config import SiteConfig, read_site
from client.site.policy import SitePolicy, in_plain_words, missing_ethics, read_policy
from client.site.run_data import user_name
from client.site.site_ledger import init_ledger
from common.enrolment import Kit, Request, read_kit, same_fingerprint, write_request
from common.errors import ConfigError
from common.files import write_as_owner
from common.names import SiteKind
from common.plan import Split
from common.processes import free_ports
from common.signing import load_key, new_key, public_text, write_secret
from common.strict import describe_validation, dump_yaml, read_yaml, strict_yaml

RUNTIME_SECRET_BYTES = 48


@dataclass(frozen=True, kw_only=True)
class Level:
    """A policy that an operator can choose by name, and its purpose."""

    policy: SitePolicy
    purpose: str

    @property
    def explanation(self) -> str:
        """Description for an operator who chooses a level."""
        policy = self.policy
        per_run = (
            ""
            if policy.max_epsilon_per_run is None
            else f", at most {policy.max_epsilon_per_run:g} in one run"
        )
        lines = [
            self.purpose,
            (
                f"ε at most {policy.max_epsilon:g} over the lifetime of this installation{per_run}; "
                f"δ at most {policy.max_delta:g}."
            ),
            f"In words, with all of it spent: {in_plain_words(policy.max_epsilon, policy.max_delta)}.",
            f"δ: with a probability of at most {policy.max_delta:g} this guarantee fails.",
            "Training without noise is "
            + ("permitted; it gives patients no guarantee." if policy.allow_non_private else "refused."),
            {
                "none": "The model is not scored on your patients.",
                "disclosed": (
                    "Exact scores over your test patients may be sent; they are outside the guarantee."
                ),
            }.get(
                policy.evaluation,
                "Scores over your patients only with noise, charged as ε; exact ones are refused.",
            ),
            "Each plan needs your approval." if policy.require_approval else "Plans need no approval.",
        ]
        return "\n".join(lines)


LEVELS: dict[str, Level] = {
    "cautious": Level(
        purpose="For a first run, for rare diseases, for small or recognizable groups of patients.",
        policy=SitePolicy(
            max_epsilon=2.0,
            max_epsilon_per_run=1.0,
            max_delta=1e-6,
            min_nominal_patients=100,
            allow_non_private=False,
            evaluation="dp",
            max_rounds=100,
            require_approval=True,
        ),
    ),
    "usual": Level(
        purpose="For a hospital's own patients.",
        policy=SitePolicy(
            max_epsilon=8.0,
            max_epsilon_per_run=2.0,
            max_delta=1e-5,
            min_nominal_patients=50,
            allow_non_private=False,
            evaluation="dp",
            require_approval=True,
        ),
    ),
    "open": Level(
        purpose="For public or generated images, or patients who consented to this.",
        policy=SitePolicy(
            max_epsilon=50.0,
            max_delta=1e-5,
            min_nominal_patients=50,
            allow_non_private=True,
            evaluation="disclosed",
            require_approval=False,
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class NewSite:
    """An operator's description of a new site."""

    name: str  # lower case, digits, hyphens; the coordinator sees it
    kind: SiteKind
    cohort: str  # stands in each row of the ledger
    images: Path | str  # folder; relative paths are relative to the working directory
    labels: Path | str  # label sheet, likewise
    nominal_patients: int  # a public bucket the operator picks, never a count
    level: str  # a name in `LEVELS`; "" where there is a policy already
    assessed: tuple[str, ...] | None = None  # artifacts that the readers assessed; None: not declared
    stand_in: str = ""  # where "patients" are not persons, what they are
    ethics_approval: str = ""  # these two go into cohort.yaml, which stays here
    consent_basis: str = ""
    declare: str = ""  # why the images are no hospital's patients, where the kind is not hospital


def init_site(folder: Path, new: NewSite, *, warn: Callable[[str], None] = lambda text: None) -> Path:
    """Make a site folder: configuration, policy, keys, ledger and `request.zip`.

    A site.yaml, cohort.yaml, policy or site key that is there already is kept: reader workbooks and the split
    of the patients depend on the key.

    Args:
        folder: created if it does not exist; may already hold images, labels and a site.yaml.
        warn: called with each unusual value, one line each.
    Returns:
        the request's path.
    Raises:
        ConfigError: `site-exists` (this folder has its keys: `site init` has been here), `bad-argument`
            (site.yaml has another value), `no-such-folder`, `unknown-level`, `ethics-missing`,
            `kind-undeclared`, `bad-site`, `not-writable`. Nothing is left behind.
        LedgerError: privacy was spent in this state folder, and its ledger is gone (code `ledger-missing`).
    """
    from client.site.config import BUCKETS

    folder, images, labels = folder.absolute(), Path(new.images).absolute(), Path(new.labels).absolute()
    adopted = existing_site(folder)
    state, node, run = folder / (adopted.state if adopted else "state"), folder / "node", folder / "run"
    policy_path = folder / (adopted.policy if adopted and adopted.policy else "policy.yaml")
    keys = [folder / "request.zip", state / "signing.key", state / "coordinator.json"]
    keys += [node / "node.key", node / "runtime.secret"]
    existing = next((path for path in keys if path.exists()), None)
    if existing is not None:
        raise ConfigError(
            f"{existing}: already exists",
            code="site-exists",
            hint="nothing was changed: this site has been set up; fedqc site check shows what is left to do",
        )
    if new.level not in LEVELS and not (new.level == "" and policy_path.is_file()):
        raise ConfigError(
            f"unknown privacy level {new.level!r}", code="unknown-level", hint=f"known: {', '.join(LEVELS)}"
        )
    if adopted is not None:
        _refuse_other_values(folder, adopted, new, images, labels)
    operators = [folder / "site.yaml", folder / "cohort.yaml", policy_path]
    made = [*keys, *(path for path in operators if not path.exists())]
    if not images.is_dir():
        raise ConfigError(
            f"{images}: no such folder",
            code="no-such-folder",
            hint="--images is the folder with the DICOM files",
        )
    if state.resolve().is_relative_to(images.resolve()):
        raise ConfigError(
            f"{state}: would be inside the images folder",
            code="bad-site",
            hint="choose a folder beside the images: --site",
        )
    if new.nominal_patients not in BUCKETS:
        warn(
            f"{new.nominal_patients} patients is not one of {', '.join(map(str, BUCKETS))}: an exact count "
            "reveals who is in it"
        )
    neighbour = None if new.kind == "synthetic" else _site_beside(folder, images, labels)
    if neighbour is not None and not (state / "site.key").exists():
        warn(
            f"{state}: gets a new site key; the split of the patients and reader workbooks of the site in "
            f"{neighbour} depend on its own key: fedqc site init --site {neighbour} adopts that site"
        )
    if not labels.is_file():
        warn(f"{labels}: does not exist yet; a site without labels cannot train")
    if len(os.fsencode(run / "agent.sock")) > MAX_SOCKET_PATH_BYTES:
        warn(
            f"{run}: too long a path for a unix socket ({MAX_SOCKET_PATH_BYTES} bytes); the site cannot start"
        )
    stated = {"ethics_approval": new.ethics_approval, "consent_basis": new.consent_basis}
    kept = {name: value for name, value in existing_cohort(folder).items() if name in stated and value}
    legal = kept | {name: value for name, value in stated.items() if value}
    if missing := missing_ethics(new.kind, {name: str(legal.get(name, "")) for name in stated}):
        raise ConfigError(
            f"{' and '.join(missing)}: must be stated at a hospital",
            code="ethics-missing",
            hint="--ethics-approval and --consent-basis; both stay at the site",
        )
    values: dict[str, Any] = {
        "name": new.name,
        "kind": new.kind,
        "cohort": new.cohort,
        "images": _from(folder, images),
        "labels": _from(folder, labels),
        "nominal_patients": new.nominal_patients,
        "policy": "policy.yaml",
        "patients": {"join": list(NEW_SITE_JOIN)},
        "split": _split_of(state),
    }
    values |= {"stand_in": new.stand_in} if new.stand_in else {}
    if new.declare and new.kind != "hospital":
        values["declared_not_hospital"] = declaration(new.declare, values["images"])
    elif not is_no_hospital(adopted, new.kind, images):
        raise ConfigError(
            f"--kind {new.kind}: no operator has declared that the images in {images} are no hospital's "
            "patients",
            code="kind-undeclared",
            hint="--declare WHY (one sentence, which stays at the site), or --kind hospital",
        )
    values |= {} if new.assessed is None else {"assessed": list(new.assessed)}
    try:
        config = SiteConfig.model_validate(values)
        Request.model_validate(
            {
                "site": new.name,
                "kind": new.kind,
                "nominal_patients": new.nominal_patients,
                "stand_in": new.stand_in,
            }
            | _NO_KEYS,
            strict=True,
        )
    except ValidationError as error:
        raise ConfigError(f"site.yaml: {describe_validation(error)}", code="bad-site") from None
    known = existing_cohort(folder)
    unset = {"policy", "split", "assessed", "declared_not_hospital"} - (
        adopted.model_fields_set if adopted else set()
    )
    lacking = {
        folder / "site.yaml": {name: value for name, value in values.items() if name in unset},
        folder / "cohort.yaml": {name: text for name, text in legal.items() if not known.get(name)},
    }
    additions = {
        path: _with_keys(path, keys_of) for path, keys_of in lacking.items() if keys_of and path.exists()
    }
    if policy_path.exists():
        read_policy(policy_path)
    try:
        for path, mode in (
            (folder, 0o755),
            (state, 0o700),
            (state / "approvals", 0o700),
            (node, 0o700),
            (run, 0o750),
        ):
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        for path, mode in ((state, 0o700), (node, 0o700), (run, 0o750)):
            path.chmod(mode)
        if not (folder / "cohort.yaml").exists():
            cohort_values = {
                "name": new.cohort,
                "ethics_approval": new.ethics_approval,
                "consent_basis": new.consent_basis,
            }
            write_yaml(
                folder / "cohort.yaml",
                cohort_values,
                comment="Stays here. The legal basis for using these patients' images.",
            )
        if not policy_path.exists():
            level = LEVELS[new.level]
            write_yaml(
                policy_path,
                level.policy.model_dump(exclude_none=True),
                comment="Stays here. What this site permits. "
                f"Privacy level: {new.level}.\n{level.explanation}",
            )
        request = Request(
            site=new.name,
            kind=new.kind,
            nominal_patients=new.nominal_patients,
            stand_in=new.stand_in,
            node_key=_new_node_key(node / "node.key"),
            signing_key=public_text(new_key(state / "signing.key")),
            version=version("fedqc"),
        )
        write_secret(node / "runtime.secret", secrets.token_bytes(RUNTIME_SECRET_BYTES))
        init_ledger(adopted or config, folder)
        write_request(folder / "request.zip", request, load_key(state / "signing.key"))
        if adopted is None:
            write_yaml(  # last: a folder with a site.yaml is complete
                folder / "site.yaml",
                values,
                comment="Stays here; only name, kind, nominal_patients, stand_in and the unit of privacy\n"
                "(patient or study) are sent to the coordinator.",
            )
        for path, text in additions.items():
            write_as_owner(path, text.encode(), mode=stat.S_IMODE(path.stat().st_mode))
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"{folder}: cannot be written ({error.strerror})", code="not-writable"
            ) from None
        raise
    return folder / "request.zip"


def is_no_hospital(site: SiteConfig | None, kind: SiteKind, images: Path) -> bool:
    """Whether images need no declaration: they are a hospital's, an operator declared them, fedqc made them,
    or there are none yet.
    """
    declared = site is not None and site.declared_not_hospital is not None
    return kind == "hospital" or declared or is_generated(images) is not False


def declare_not_hospital(folder: Path, why: str) -> None:
    """Note in site.yaml, with time and user, why its images are no hospital's patients.

    Raises:
        ConfigError: `bad-argument` (a hospital, or no reason), `already-declared`, `no-such-site`,
            `bad-site` (site.yaml is not written as one key a line), `not-writable`.
    """
    site, _ = read_site(folder)
    path = folder / "site.yaml"
    if site.kind == "hospital" or not why.strip():
        raise ConfigError(
            f"{path}: kind: {site.kind}; nothing to declare"
            if site.kind == "hospital"
            else "the reason is missing",
            code="bad-argument",
            hint="one sentence: why the images are no hospital's patients",
        )
    if site.declared_not_hospital is not None:
        raise ConfigError(
            f"{path}: declared_not_hospital is there, for {site.declared_not_hospital.images}",
            code="already-declared",
            hint="for other images remove the key first",
        )
    text = _with_keys(path, {"declared_not_hospital": declaration(why, site.images)})
    try:
        write_as_owner(path, text.encode(), mode=stat.S_IMODE(path.stat().st_mode))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})", code="not-writable") from None
    read_site(folder)


def declaration(why: str, images: str) -> dict[str, str]:
    """`declared_not_hospital` of site.yaml, by this user, now."""
    at = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"by": user_name(), "at": at, "why": " ".join(why.split()), "images": images}


def existing_site(folder: Path) -> SiteConfig | None:
    """The site.yaml that an operator wrote before `site init`; None where there is none.

    Raises:
        ConfigError: it has a wrong value (code `bad-site`).
    """
    return read_site(folder)[0] if (folder / "site.yaml").is_file() else None


def existing_cohort(folder: Path) -> dict[str, Any]:
    """The keys of an existing cohort.yaml; {} where there is none, or it cannot be read."""
    try:
        values = read_yaml(folder / "cohort.yaml", limit=1 << 20)
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _refuse_other_values(folder: Path, adopted: SiteConfig, new: NewSite, images: Path, labels: Path) -> None:
    """Raises ConfigError (code `bad-argument`) where an argument contradicts the existing site.yaml."""
    pairs = {
        "name": (new.name, adopted.name),
        "kind": (new.kind, adopted.kind),
        "cohort": (new.cohort, adopted.cohort),
        "nominal_patients": (new.nominal_patients, adopted.nominal_patients),
        "images": (images.resolve(), (folder / adopted.images).resolve()),
        "labels": (labels.resolve(), (folder / adopted.labels).resolve()),
        "stand_in": (new.stand_in or (adopted.stand_in or ""), adopted.stand_in or ""),
        "assessed": (adopted.assessed if new.assessed is None else new.assessed, adopted.assessed),
    }
    for name, (given, written) in pairs.items():
        if given != written and name in adopted.model_fields_set | {"images", "labels"}:
            raise ConfigError(
                f"--{name.replace('_', '-')} {given}: {folder / 'site.yaml'} says {written}",
                code="bad-argument",
                hint="nothing was changed; leave the option out, or edit site.yaml",
            )


def _site_beside(folder: Path, *paths: Path) -> Path | None:
    """Another site's folder that the images or labels lie in, if it has a key."""
    for path in paths:
        for parent in path.parents:
            if (
                parent != folder
                and (parent / "site.yaml").is_file()
                and (parent / "state" / "site.key").is_file()
            ):
                return parent
    return None


def _split_of(state: Path) -> dict[str, float]:
    """The split for a new site.yaml: that of the site's first run, else the default."""
    try:
        kept = json.loads((state / "split.json").read_text(encoding="ascii"))
        return {name: kept[name] for name in ("train", "validation", "test") if kept[name]}
    except (OSError, ValueError, KeyError, TypeError):
        return {name: share for name, share in Split().model_dump().items() if share}


def _with_keys(path: Path, values: Mapping[str, Any]) -> str:
    """The text of an operator's YAML file with keys added at its end; every line that is there stays.

    Raises:
        ConfigError: the file is not written as one key a line (code `bad-site`).
    """
    lines = "".join(
        dump_yaml(
            {name: value},
            allow_unicode=True,
            default_flow_style=None if isinstance(value, dict | list) else False,
            sort_keys=False,
            width=1000,
        )
        for name, value in values.items()
    )
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip("\n")
        added = f"{text}\n\n# added by fedqc site init\n{lines}"
        if strict_yaml(added) == strict_yaml(text) | dict(values):
            return added
    except (UnicodeDecodeError, yaml.YAMLError, TypeError):
        pass
    raise ConfigError(
        f"{path}: keys cannot be added to it",
        code="bad-site",
        hint="add by hand, one key a line: " + "; ".join(lines.splitlines()),
    )


def join(
    folder: Path, kit_path: Path, fingerprint: str, *, leave: bool = False, today: date | None = None
) -> Kit:
    """Join with a coordinator's kit: its key, certificate authority and address are pinned from now on.

    A renewed kit of the same federation replaces node/node.yaml, node/ca.crt and state/coordinator.json, each
    atomically, and nothing else. The loopback ports once chosen are kept.

    Args:
        fingerprint: of the federation, as it reached the hospital another way than the kit.
        leave: whether the site may leave another federation for this one. Ledger, keys and stored answers
            stay: spent privacy stays spent.
    Raises:
        ConfigError: `no-such-site`, `bad-kit`, `wrong-fingerprint`, `wrong-kit`, `kit-expired`,
            `other-federation`, `bad-key`.
    """
    site, _ = read_site(folder)
    folder = folder.absolute()
    state, node = folder / site.state, folder / "node"
    kit = read_kit(kit_path)
    if not same_fingerprint(kit.fingerprint, fingerprint):
        raise ConfigError(
            f"{kit_path}: its fingerprint differs from --fingerprint",
            code="wrong-fingerprint",
            hint="nothing was changed; ask the coordinator by telephone, never take it from the kit's sender",
        )
    if kit.site != site.name or kit.site_key != public_text(load_key(state / "signing.key")):
        raise ConfigError(
            f"{kit_path}: made for site {kit.site!r} and another key than this folder's ({site.name!r})",
            code="wrong-kit",
            hint="ask for the kit that answers this folder's request.zip",
        )
    if kit.expires < (today or date.today()):
        raise ConfigError(
            f"{kit_path}: expired on {kit.expires}", code="kit-expired", hint="ask for a renewed one"
        )
    pinned = coordinator_of(state)
    is_same = pinned is None or (
        same_fingerprint(pinned["fingerprint"], kit.fingerprint) or kit.succeeds(pinned["coordinator_key"])
    )
    if pinned is not None and not is_same and not leave:
        raise ConfigError(
            (
                f"{kit_path}: of the federation {kit.federation!r} with another fingerprint; this site "
                f"joined {pinned['federation']!r}"
            ),
            code="other-federation",
            hint="nothing was changed; --leave leaves the present federation permanently",
        )
    runtime_port, health_port = _ports(node / "node.yaml")
    reached = {
        "site": site.name,
        "address": kit.address,
        "bundle_sha256": kit.bundle_sha256,
        "runtime_port": runtime_port,
        "health_port": health_port,
        "agent_socket": str(folder / "run" / "agent.sock"),
    }
    trusted = {
        "federation": kit.federation,
        "coordinator_key": kit.coordinator_key,
        "fingerprint": kit.fingerprint,
        "expires": kit.expires.isoformat(),
        "version": kit.version,
    }
    write_as_owner(node / "ca.crt", kit.ca_certificate.encode())
    write_as_owner(node / "node.yaml", dump_yaml(reached, sort_keys=False).encode())
    # last: the agent trusts when all is there
    write_as_owner(state / "coordinator.json", json.dumps(trusted, indent=1).encode())
    return kit


def coordinator_of(state: Path) -> dict[str, str] | None:
    """The pinned coordinator: federation, coordinator_key, fingerprint, expires, version. None if the site
    has not joined.

    Raises:
        ConfigError: state/coordinator.json is damaged (code `bad-coordinator`).
    """
    path = state / "coordinator.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: str(values[name]) for name in ("federation", "coordinator_key", "fingerprint", "expires")
        } | {"version": str(values.get("version", ""))}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror})",
            code="bad-coordinator",
            hint="run as the agent's user",
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"{path}: damaged", code="bad-coordinator", hint="join again with the kit: fedqc site join"
        ) from None


def write_yaml(path: Path, values: Mapping[str, Any], *, comment: str) -> None:
    """Write a YAML file with a comment at its top, readable by its owner and group."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    text = dump_yaml(dict(values), sort_keys=False, allow_unicode=True, width=1000)
    write_as_owner(path, (head + text).encode(), mode=0o640)


def _new_node_key(path: Path) -> str:
    """Make the node's key, ECDSA P-384 in OpenSSH's format as Flower requires, and return the public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_secret(path, private)
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )


def _ports(node_yaml: Path) -> tuple[int, int]:
    """The loopback ports of an earlier join, else two that are free now.

    Raises:
        ConfigError: there are no two (code `port-in-use`).
    """
    try:
        before = read_yaml(node_yaml)
        return int(before["runtime_port"]), int(before["health_port"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        pass
    free = free_ports(2)
    if len(free) < 2:
        raise ConfigError("no two free ports on loopback", code="port-in-use", hint="end other programs")
    return free[0], free[1]


def _from(folder: Path, path: Path) -> str:
    """Relative to the site folder if the path is inside it, so that the folder can be moved."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


_NO_KEYS = {"node_key": "ecdsa-sha2-nistp384 AAAA", "signing_key": "", "version": ""}
