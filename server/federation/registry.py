"""Read a federation's folder; enrol, renew and revoke its sites.

    federation.yaml     the coordinator's settings; the only file to edit
    keys/               0600: ca.key, server.key, coordinator.key (signs tasks and kits), superexec.secret
    certificates/       ca.crt (in every kit), server.crt (of the proxy and, on loopback, of the SuperLink)
    sites/<site>.json   one hospital: its request, until when it is enrolled, its node at the SuperLink
    bundle/             the Flower app that runs are started from; every kit pins bundle.sha256
    proxy/ flwr/ systemd/   written from federation.yaml at every start
    state/ runs/        written by the services

Anyone who can read this folder can act as the coordinator: it has mode 0700 and belongs on a machine of the
coordinator's own.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError, field_validator

from common.enrolment import Endorsement, Kit, Request, federation_fingerprint
from common.errors import ConfigError
from common.files import locked, write_bytes
from common.names import SITE_NAME
from common.signing import load_key, parse_public, public_text
from common.strict import StrictModel, describe_validation, describe_yaml, read_yaml
from server.federation.certificates import SITE_DAYS, WARN_DAYS, certificate_days, today
from server.federation.flower_app import BUNDLE, BUNDLE_HASH
from server.federation.notify import Notify

FEDERATION = "federation.yaml"
CONNECTION = "fedqc"
"""Name of this federation's SuperLink in flwr/config.toml, for Flower's command line."""
SECRET_BYTES = 48
ENDORSEMENTS = "certificates/endorsements.json"
Port = Field(ge=1, le=65535)


class Settings(StrictModel):
    """federation.yaml."""

    name: str = Field(pattern=SITE_NAME)
    # by which hospitals reach the proxy: name or IP
    host: str = Field(pattern=r"^[A-Za-z0-9:]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9:])?$")
    port: int = Port  # of the proxy, the only one that is open
    listen: str = "0.0.0.0"  # address of this machine that the proxy takes connections on
    superlink_port: int = Port  # loopback
    health_port: int = Port  # loopback: gRPC health of the SuperLink
    client_certificates: bool = (
        False  # whether the proxy asks hospitals for a certificate of this federation's authority
    )
    notify: Notify = Notify()
    created: date

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        ipaddress.ip_address(value)
        return value

    @property
    def address(self) -> str:
        """host:port as kits give it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Replaced(StrictModel):
    """Keys that a hospital had before it was revoked and enrolled again. They are never accepted again."""

    node_key: str
    signing_key: str
    node_id: int | None


class Enrolment(StrictModel):
    """sites/<site>.json."""

    request: Request
    status: Literal["active", "revoked"]
    approved: date
    expires: date
    node_id: int | None = None  # at the SuperLink, once it knows the node's key
    replaced: tuple[Replaced, ...] = ()

    @property
    def site(self) -> str:
        return self.request.site

    def may_take_part(self, on: date | None = None) -> bool:
        """Whether the site is enrolled, and its enrolment has not expired."""
        return self.status == "active" and self.expires >= (on or today())

    def all_keys(self) -> set[bytes]:
        """All keys that this site has or had, as bytes that do not depend on how a key is written."""
        pairs = [
            (self.request.node_key, self.request.signing_key),
            *((old.node_key, old.signing_key) for old in self.replaced),
        ]
        return {key for pair in pairs for key in key_bytes(*pair)}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """An existing federation folder."""

    folder: Path
    settings: Settings

    @staticmethod
    def open(folder: Path) -> Federation:
        """Raises ConfigError: `no-such-federation` without a federation.yaml, `bad-federation` if it is
        invalid.
        """
        path = folder.absolute() / FEDERATION
        try:
            values = read_yaml(path)
            return Federation(
                folder=path.parent, settings=Settings.model_validate_json(json.dumps(values, default=str))
            )
        except OSError:
            hint = "make one: fedqc federation init; or name one: --federation DIR, FEDQC_FEDERATION"
            raise ConfigError(
                f"{path}: missing, or cannot be read", code="no-such-federation", hint=hint
            ) from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {describe_validation(error)}", code="bad-federation") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {describe_yaml(error)}", code="bad-federation") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {error}", code="bad-federation") from None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def notify(self) -> Notify:
        return self.settings.notify

    @property
    def ca_certificate(self) -> Path:
        return self.folder / "certificates" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.folder / "keys" / "ca.key"

    @property
    def server_certificate(self) -> Path:
        return self.folder / "certificates" / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "keys" / "server.key"

    @property
    def coordinator_key(self) -> Path:
        return self.folder / "keys" / "coordinator.key"

    @property
    def superexec_secret(self) -> Path:
        return self.folder / "keys" / "superexec.secret"

    @property
    def proxy(self) -> Path:
        return self.folder / "proxy"

    @property
    def bundle(self) -> Path:
        return self.folder / BUNDLE

    @property
    def flower_home(self) -> Path:
        return self.folder / "flwr"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def sites_folder(self) -> Path:
        return self.folder / "sites"

    @property
    def fingerprint(self) -> str:
        """The coordinator gives it to hospitals by telephone or letter; they compare it with their kit's."""
        return federation_fingerprint(
            self.ca_certificate.read_text(encoding="ascii"), public_text(self.signing_key())
        )

    @property
    def bundle_sha256(self) -> str:
        """Raises ConfigError (code `no-bundle`)."""
        path = self.folder / BUNDLE_HASH
        try:
            return path.read_text(encoding="ascii").strip()
        except OSError:
            raise ConfigError(
                f"{path}: missing", code="no-bundle", hint="build the bundle: fedqc federation renew"
            ) from None

    def certificate_days(self) -> int:
        """Whole days until the server's certificate, or the authority behind it, ends; negative once it has.

        Raises:
            ConfigError: one of them cannot be read (code `bad-certificate`).
        """
        days = []
        for path in (self.server_certificate, self.ca_certificate):
            try:
                days.append(certificate_days(path.read_bytes()))
            except (OSError, ValueError) as error:
                hint = "server.crt: fedqc federation renew; ca.crt: restore it from a backup"
                raise ConfigError(
                    f"{path}: not a certificate that can be read ({error})", code="bad-certificate", hint=hint
                ) from None
        return min(days)

    def signing_key(self) -> Ed25519PrivateKey:
        return load_key(self.coordinator_key)

    def sites(self) -> tuple[Enrolment, ...]:
        """All sites that were ever enrolled, by name.

        Raises:
            ConfigError: a site's file is damaged (code `bad-enrolment`).
        """
        return tuple(_read_enrolment(path) for path in sorted(self.sites_folder.glob("*.json")))

    def site(self, name: str) -> Enrolment:
        """Raises ConfigError (code `unknown-site`)."""
        for enrolment in self.sites():
            if enrolment.site == name:
                return enrolment
        known = ", ".join(enrolment.site for enrolment in self.sites()) or "none yet"
        raise ConfigError(
            f"{name!r}: no such site in {self.name}", code="unknown-site", hint=f"known: {known}"
        )

    def enrolments_to_renew(self) -> list[str]:
        """The enrolments that have expired, or will within `WARN_DAYS`: a line each, with the command."""
        lines = []
        for enrolment in self.sites():
            days = (enrolment.expires - today()).days
            if enrolment.status == "active" and days <= WARN_DAYS:
                what = f"expires in {days} days" if days >= 0 else "has expired, and the site takes no part"
                lines.append(
                    f"{enrolment.site}: its enrolment {what}: fedqc federation renew {enrolment.site}"
                )
        return lines

    def set_node(self, site: str, node_key: str, node_id: int) -> None:
        """Store the number of a site's node at the SuperLink, unless the site has another key by now."""
        with self.changing_sites():
            enrolment = self.site(site)
            if enrolment.request.node_key == node_key:
                _write_enrolment(self, enrolment.model_copy(update={"node_id": node_id}))

    @contextmanager
    def changing_sites(self) -> Iterator[None]:
        """One writer at a time: `approve` by hand, and the registration of nodes by `start`."""
        with locked(self.state / "sites.lock"):
            yield


def endorsements(federation: Federation) -> tuple[Endorsement, ...]:
    """What earlier keys of this coordinator signed about those that replaced them, oldest first.

    Raises:
        ConfigError: the file is damaged (code `bad-enrolment`).
    """
    path = federation.folder / ENDORSEMENTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Endorsement.model_validate(one) for one in found)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError) as error:
        why = describe_validation(error) if isinstance(error, ValidationError) else "cannot be read"
        raise ConfigError(f"{path}: {why}", code="bad-enrolment", hint="restore it from a backup") from None


def approve(federation: Federation, request: Request, days: int = SITE_DAYS) -> Kit:
    """Enrol a hospital, and return the kit that answers its request. The same request again gives a kit that
    expires later.

    Writes one file: sites/<site>.json. A revoked site needs new keys: Flower never accepts a revoked key
    again.

    Raises:
        ConfigError: `site-exists` (an active site of this name has other keys), `duplicate-key` (a key is
            another site's), `key-revoked`, `bad-key` (a key is none).
    """
    keys = set(key_bytes(request.node_key, request.signing_key))
    with federation.changing_sites():
        enrolled = {enrolment.site: enrolment for enrolment in federation.sites()}
        for other in enrolled.values():
            if other.site != request.site and keys & other.all_keys():
                hint = "each hospital makes its own keys with `fedqc site init`; ask who made this request"
                raise ConfigError(
                    f"{request.site}: its request has a key of {other.site}", code="duplicate-key", hint=hint
                )
        before = enrolled.get(request.site)
        same = before is not None and keys == set(
            key_bytes(before.request.node_key, before.request.signing_key)
        )
        if before is not None and before.status == "active" and not same:
            hint = (
                f"if the hospital lost its keys: fedqc federation revoke {request.site}, then approve again"
            )
            raise ConfigError(
                f"{request.site}: is already enrolled, with other keys", code="site-exists", hint=hint
            )
        if before is not None and before.status == "revoked" and keys & before.all_keys():
            hint = "the hospital makes new keys with `fedqc site init` in a new folder"
            raise ConfigError(f"{request.site}: its request has a revoked key", code="key-revoked", hint=hint)
        enrolment = Enrolment(
            request=request,
            status="active",
            approved=before.approved if before and same else today(),
            expires=today() + timedelta(days=days),
            node_id=before.node_id if before and same else None,
            replaced=()
            if before is None
            else before.replaced
            if same
            else (*before.replaced, _replaced(before)),
        )
        _write_enrolment(federation, enrolment)
    return _kit(federation, enrolment)


def renew_site(federation: Federation, site: str, days: int = SITE_DAYS) -> Kit:
    """Extend a site's enrolment, and return a kit with the current address and bundle.

    Raises:
        ConfigError: `unknown-site`, `site-revoked`.
    """
    with federation.changing_sites():
        enrolment = federation.site(site)
        if enrolment.status != "active":
            hint = "the hospital can enrol again with new keys: fedqc federation approve"
            raise ConfigError(f"{site}: was revoked", code="site-revoked", hint=hint)
        enrolment = enrolment.model_copy(update={"expires": today() + timedelta(days=days)})
        _write_enrolment(federation, enrolment)
    return _kit(federation, enrolment)


def revoke(federation: Federation, site: str) -> None:
    """Exclude a site permanently: its answers are ignored from now on; `start` removes its node from the
    SuperLink.

    Raises:
        ConfigError: `unknown-site`.
    """
    with federation.changing_sites():
        _write_enrolment(federation, federation.site(site).model_copy(update={"status": "revoked"}))


def site_keys(federation: Federation) -> dict[str, Ed25519PublicKey]:
    """Signing key of each site whose answers are accepted: active, and enrolment not expired."""
    return {
        enrolment.site: parse_public(enrolment.request.signing_key)
        for enrolment in federation.sites()
        if enrolment.may_take_part()
    }


class EnrolledKeys(Mapping[str, Ed25519PublicKey]):
    """`site_keys`, read again at each access: a site that is revoked during a run is excluded at once."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def __getitem__(self, site: str) -> Ed25519PublicKey:
        return site_keys(self._federation)[site]

    def __iter__(self) -> Iterator[str]:
        return iter(site_keys(self._federation))

    def __len__(self) -> int:
        return len(site_keys(self._federation))


def key_bytes(node_key: str, signing_key: str) -> tuple[bytes, bytes]:
    """The two public keys of a site as comparable bytes: the same key may be written in several ways.

    Raises:
        ConfigError: one of them is no key of its kind (code `bad-key`).
    """
    try:
        node = serialization.load_ssh_public_key(node_key.encode())
        point = node.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError):
        raise ConfigError(f"{node_key[:60]!r}: not an ECDSA public key", code="bad-key") from None
    signing = parse_public(signing_key).public_bytes(
        serialization.Encoding.Raw, serialization.PublicFormat.Raw
    )
    return point, signing


def _kit(federation: Federation, enrolment: Enrolment) -> Kit:
    return Kit(
        federation=federation.name,
        site=enrolment.site,
        address=federation.settings.address,
        ca_certificate=federation.ca_certificate.read_text(encoding="ascii"),
        coordinator_key=public_text(federation.signing_key()),
        bundle_sha256=federation.bundle_sha256,
        site_key=enrolment.request.signing_key,
        version=version("fedqc"),
        expires=enrolment.expires,
        endorsements=endorsements(federation),
    )


def _replaced(enrolment: Enrolment) -> Replaced:
    return Replaced(
        node_key=enrolment.request.node_key,
        signing_key=enrolment.request.signing_key,
        node_id=enrolment.node_id,
    )


def _read_enrolment(path: Path) -> Enrolment:
    try:
        enrolment = Enrolment.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", code="bad-enrolment") from None
    except (ValidationError, ValueError) as error:
        why = describe_validation(error) if isinstance(error, ValidationError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {why}", code="bad-enrolment", hint="restore it from a backup") from None
    if enrolment.site != path.stem:
        raise ConfigError(
            f"{path}: is the file of {enrolment.site}", code="bad-enrolment", hint="restore it from a backup"
        )
    return enrolment


def _write_enrolment(federation: Federation, enrolment: Enrolment) -> None:
    write_bytes(
        federation.sites_folder / f"{enrolment.site}.json",
        (enrolment.model_dump_json(indent=1) + "\n").encode(),
        0o600,
    )
