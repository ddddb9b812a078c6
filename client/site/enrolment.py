"""How a hospital takes part: `init_site` makes its folder and a request, `join` takes the coordinator's kit.

    site.yaml cohort.yaml policy.yaml     the operator's, never overwritten
    state/    0700, the agent's           signing.key, site.key, ledger; coordinator.json once it has joined
    node/     0700, the network side's    node.key, runtime.secret; node.yaml and ca.crt once it has joined
    run/      0750                        where the two meet
    request.zip                           public keys, for the coordinator

Private keys are made here and stay here. A kit is believed when its fingerprint equals the one that reached
the hospital another way.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from client.site.config import SiteConfig, read_site, site_key
from client.site.ledger import Ledger, ledger_file_name
from client.site.policy import SitePolicy, in_plain_words
from common.enrolment import Kit, Request, read_kit, write_request
from common.errors import ConfigError
from common.files import write_as_owner
from common.names import SiteKind
from common.signing import load_key, new_key, public_text, write_secret
from common.strict import describe_validation, strict_yaml

RUNTIME_SECRET_BYTES = 48
SOCKET_PATH_BYTES = 107  # what Linux allows
PORTS = range(20_000, 30_000)
"""Where the node's own loopback services are put: below what Linux hands out to outgoing connections."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A policy that an operator can pick by name, and why one would."""

    policy: SitePolicy
    purpose: str

    @property
    def explanation(self) -> str:
        """The level for somebody who has to choose one."""
        policy = self.policy
        per_run = (
            ""
            if policy.max_epsilon_per_run is None
            else f", at most {policy.max_epsilon_per_run:g} in one run"
        )
        lines = [
            self.purpose,
            (
                f"ε at most {policy.max_epsilon:g} over the lifetime of the cohort{per_run}; δ at most "
                f"{policy.max_delta:g}."
            ),
            f"In words, with all of it spent: {in_plain_words(policy.max_epsilon, policy.max_delta)}.",
            f"δ: with a chance of at most {policy.max_delta:g} that promise fails altogether.",
            "Training without noise is "
            + ("permitted, and promises the patients nothing." if policy.allow_non_private else "refused."),
            {
                "none": "The model is not scored on your patients.",
                "disclosed": (
                    "Exact scores over your test patients may be told; they lie outside the promise."
                ),
            }.get(policy.evaluation, "Scores over your patients only with noise; exact ones are refused."),
            "Each plan waits for a yes from here."
            if policy.require_approval
            else "Plans need no yes from here.",
        ]
        return "\n".join(lines)


LEVELS: dict[str, Level] = {
    "cautious": Level(
        purpose="For a first time, for rare diseases, for small or recognizable groups of patients.",
        policy=SitePolicy(
            max_epsilon=2.0,
            max_epsilon_per_run=1.0,
            max_delta=1e-6,
            min_nominal_patients=100,
            allow_non_private=False,
            evaluation="none",
            max_rounds=100,
            require_approval=True,
        ),
    ),
    "usual": Level(
        purpose="For a hospital's own patients.",
        policy=SitePolicy(
            max_epsilon=8.0,
            max_delta=1e-5,
            min_nominal_patients=50,
            allow_non_private=False,
            evaluation="dp",
            require_approval=True,
        ),
    ),
    "open": Level(
        purpose="For images that are public or generated, or of patients who agreed to that.",
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


def init_site(
    folder: Path,
    *,
    name: str,
    images: Path | str,
    labels: Path | str,
    nominal_patients: int,
    kind: SiteKind,
    cohort: str,
    level: str,
    ethics_approval: str = "",
    consent_basis: str = "",
    stand_in: str = "",
    warn: Callable[[str], None] = lambda text: None,
) -> Path:
    """Make a site folder: configuration, policy, keys, ledger and `request.zip`.

    Args:
        folder: made where it does not exist; may hold images and labels already.
        images, labels: the folder and the sheet; relative paths are relative to the working directory.
        nominal_patients: a public bucket the operator picks, never a count.
        level: a name in `LEVELS`.
        ethics_approval, consent_basis: free text for cohort.yaml, which stays here.
        stand_in: where "patients" are not persons, what they are.
        warn: told what is unusual, a line each.
    Returns:
        the request's path.
    Raises:
        ConfigError: `site-exists` (nothing of the operator's is ever overwritten), `no-such-folder`,
            `unknown-level`, `bad-site`, `not-writable`. Nothing is left behind.
    """
    from client.site.config import BUCKETS

    folder, images, labels = folder.absolute(), Path(images).absolute(), Path(labels).absolute()
    if level not in LEVELS:
        raise ConfigError(
            f"unknown privacy level {level!r}", code="unknown-level", hint=f"known: {', '.join(LEVELS)}"
        )
    state, node, run = folder / "state", folder / "node", folder / "run"
    made = [folder / file for file in ("site.yaml", "cohort.yaml", "policy.yaml", "request.zip")]
    made += [state / "signing.key", state / "coordinator.json", node / "node.key", node / "runtime.secret"]
    existing = next((path for path in made if path.exists()), None)
    if existing is not None:
        raise ConfigError(
            f"{existing}: exists already",
            code="site-exists",
            hint="nothing was changed; choose another folder",
        )
    if not images.is_dir():
        raise ConfigError(
            f"{images}: no such folder",
            code="no-such-folder",
            hint="--images = the folder with the DICOM files",
        )
    if state.resolve().is_relative_to(images.resolve()):
        raise ConfigError(
            f"{state}: would lie inside the images folder",
            code="bad-site",
            hint="--site: a folder beside the images",
        )
    if nominal_patients not in BUCKETS:
        warn(
            f"{nominal_patients} patients is not in the usual series {', '.join(map(str, BUCKETS))}: a "
            "count would say who is in it"
        )
    if not labels.is_file():
        warn(f"{labels}: is not there yet; a site without labels cannot train")
    if len(os.fsencode(run / "agent.sock")) > SOCKET_PATH_BYTES:
        warn(
            f"{run}: is so far from the root that no unix socket can be made in it; the site cannot start "
            "here"
        )
    if kind == "hospital" and not (ethics_approval and consent_basis):
        warn("cohort.yaml: ethics approval or consent basis is empty; fill it in before the first run")
    values: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "cohort": cohort,
        "images": _from(folder, images),
        "labels": _from(folder, labels),
        "nominal_patients": nominal_patients,
        "policy": "policy.yaml",
    } | ({"stand_in": stand_in} if stand_in else {})
    try:
        SiteConfig.model_validate(values)
        Request.model_validate(
            {"site": name, "kind": kind, "nominal_patients": nominal_patients, "stand_in": stand_in}
            | _NO_KEYS,
            strict=True,
        )
    except ValidationError as error:
        raise ConfigError(f"site.yaml: {describe_validation(error)}", code="bad-site") from None
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
        cohort_values = {"name": cohort, "ethics_approval": ethics_approval, "consent_basis": consent_basis}
        write_yaml(
            folder / "cohort.yaml",
            cohort_values,
            comment="Stays here. What allows these patients' images to be used.",
        )
        said = f"Stays here. What you permit. Privacy level: {level}.\n{LEVELS[level].explanation}"
        write_yaml(folder / "policy.yaml", LEVELS[level].policy.model_dump(exclude_none=True), comment=said)
        request = Request(
            site=name,
            kind=kind,
            nominal_patients=nominal_patients,
            stand_in=stand_in,
            node_key=_new_node_key(node / "node.key"),
            signing_key=public_text(new_key(state / "signing.key")),
            version=version("fedqc"),
        )
        write_secret(node / "runtime.secret", secrets.token_bytes(RUNTIME_SECRET_BYTES))
        Ledger.open(state / ledger_file_name(cohort), cohort=cohort, key=site_key(state)).close()
        write_request(folder / "request.zip", request, load_key(state / "signing.key"))
        write_yaml(  # last: a folder with a site.yaml is whole
            folder / "site.yaml",
            values,
            comment="Stays here; only name, kind, nominal_patients and stand_in are ever told.",
        )
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"{folder}: cannot be written ({error.strerror})", code="not-writable"
            ) from None
        raise
    return folder / "request.zip"


def join(
    folder: Path, kit_path: Path, fingerprint: str, *, leave: bool = False, today: date | None = None
) -> Kit:
    """Take a coordinator's kit: from here on its key, its certificate authority and its address are pinned.

    A renewed kit of the same federation replaces node/node.yaml, node/ca.crt and state/coordinator.json, each
    whole or not at all, and nothing else. The loopback ports once chosen are kept.

    Args:
        fingerprint: of the federation, as it reached the hospital another way than the kit.
        leave: whether another federation may be left for this one. Ledger, keys and outbox stay: what was
            spent stays spent.
    Raises:
        ConfigError: `no-such-site`, `bad-kit`, `wrong-fingerprint`, `wrong-kit`, `kit-expired`,
            `other-federation`, `bad-key`.
    """
    site, _ = read_site(folder)
    folder = folder.absolute()
    state, node = folder / site.state, folder / "node"
    kit = read_kit(kit_path)
    if not hmac.compare_digest(_digits(kit.fingerprint), _digits(fingerprint)):
        raise ConfigError(
            f"{kit_path}: its fingerprint is not the one you gave",
            code="wrong-fingerprint",
            hint=(
                "nothing was changed; ask the coordinator by telephone, and do not take the fingerprint "
                "from where the kit came from"
            ),
        )
    if kit.site != site.name or kit.site_key != public_text(load_key(state / "signing.key")):
        raise ConfigError(
            f"{kit_path}: made for site {kit.site!r}, and not for the key of this folder ({site.name!r})",
            code="wrong-kit",
            hint="ask for the kit that answers this folder's request.zip",
        )
    if kit.expires < (today or date.today()):
        raise ConfigError(
            f"{kit_path}: expired on {kit.expires}", code="kit-expired", hint="ask for a renewed one"
        )
    pinned = coordinator_of(state)
    if (
        pinned is not None
        and not hmac.compare_digest(_digits(pinned["fingerprint"]), _digits(kit.fingerprint))
        and not leave
    ):
        raise ConfigError(
            (
                f"{kit_path}: of the federation {kit.federation!r} with another fingerprint; this site "
                f"joined {pinned['federation']!r}"
            ),
            code="other-federation",
            hint="nothing was changed; --leave leaves the present one for good",
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
    write_as_owner(node / "node.yaml", yaml.safe_dump(reached, sort_keys=False).encode())
    # last: the agent trusts when all is there
    write_as_owner(state / "coordinator.json", json.dumps(trusted, indent=1).encode())
    return kit


def coordinator_of(state: Path) -> dict[str, str] | None:
    """What was pinned when the site joined: federation, coordinator_key, fingerprint, expires, version. None
    where it never did.

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
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: damaged", code="bad-coordinator", hint="fedqc site join with the kit writes it anew"
        ) from None


def write_yaml(path: Path, values: Mapping[str, Any], *, comment: str) -> None:
    """A YAML file for people, under a comment. Readable by its owner and group."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)
    write_as_owner(path, (head + text).encode(), mode=0o640)


def _new_node_key(path: Path) -> str:
    """Make the network side's key, ECDSA P-384 in OpenSSH's format as Flower wants it; give back the public
    half.
    """
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
    """The loopback ports of an earlier join, else two that nobody uses now."""
    try:
        before = strict_yaml(node_yaml.read_text(encoding="utf-8"))
        return int(before["runtime_port"]), int(before["health_port"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        pass
    free: list[int] = []
    while len(free) < 2:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            if port not in free and probe.connect_ex(("127.0.0.1", port)) != 0:
                free.append(port)
    return free[0], free[1]


def _digits(fingerprint: str) -> bytes:
    """As people write it: with hyphens, spaces or colons, in either case."""
    return "".join(fingerprint.split()).replace("-", "").replace(":", "").lower().encode()


def _from(folder: Path, path: Path) -> str:
    """Relative to the site folder where it lies in it, so that the folder can be moved."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


_NO_KEYS = {"node_key": "ecdsa-sha2-nistp384 AAAA", "signing_key": "", "version": ""}
