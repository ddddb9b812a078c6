"""Make a federation's folder, and write the configuration of its services from federation.yaml."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from common.enrolment import MAX_ENDORSEMENTS, Endorsement, federation_fingerprint
from common.errors import ConfigError
from common.files import whole_folder, write_bytes
from common.processes import LOOPBACK, free_ports
from common.signing import new_key, public_text, write_secret
from common.strict import describe_validation, dump_yaml
from server.federation.certificates import (
    SERVER_DAYS,
    ca_certificate,
    key_pem,
    load_ec_key,
    new_ec_key,
    now,
    server_certificate,
    today,
)
from server.federation.flower_app import write_bundle
from server.federation.nginx import nginx_configuration
from server.federation.notify import Notify
from server.federation.registry import (
    CONNECTION,
    ENDORSEMENTS,
    FEDERATION,
    SECRET_BYTES,
    Federation,
    Settings,
    endorsements,
)
from server.federation.systemd import unit_texts


def init_federation(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    superlink_port: int | None = None,
    health_port: int | None = None,
    listen: str = "0.0.0.0",
    notify: Notify | None = None,
    passphrase: bytes = b"",
) -> Federation:
    """Make a federation: keys, certificates, bundle, configuration. The folder appears complete or not at
    all.

    Args:
        folder: absent or empty.
        name: lower case, digits, hyphens.
        host: name or IP address by which hospitals reach this machine; goes into the server's certificate and
            into every kit.
        port: of the proxy.
        superlink_port, health_port: on loopback; by default two that are free now.
        listen: address of this machine that the proxy listens on.
        notify: whom to notify, and how; by default nothing is sent.
        passphrase: encrypts the key of the certificate authority; empty: it is not encrypted.
    Raises:
        ConfigError: `output-exists`, `not-writable`, `bad-path`, `bad-federation` (a value out of range),
            `port-in-use` (no free ports), `no-program` (Flower is missing).
    """
    folder = folder.absolute()
    if re.search(r"[^\w /.,+@=~-]", str(folder)):
        raise ConfigError(
            f"{str(folder)!r}: cannot be written into the configuration of nginx and systemd",
            code="bad-path",
            hint="choose a folder of letters, digits, spaces and / . , + @ = ~ -",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: exists and is not an empty folder",
            code="output-exists",
            hint="nothing was changed; choose another",
        )
    if superlink_port is None or health_port is None:
        free = free_ports(2, avoid=[port])
        if len(free) < 2:
            raise ConfigError(
                "no two free ports on loopback", code="port-in-use", hint="--superlink-port and --health-port"
            )
        superlink_port, health_port = superlink_port or free[0], health_port or free[1]
    if len({port, superlink_port, health_port}) != 3:
        raise ConfigError(
            f"ports {port}, {superlink_port}, {health_port}: must differ", code="bad-federation"
        )
    values = {
        "name": name,
        "host": host,
        "port": port,
        "listen": listen,
        "superlink_port": superlink_port,
        "health_port": health_port,
    }
    try:
        settings = Settings.model_validate(values | {"notify": notify or Notify(), "created": today()})
    except ValidationError as error:
        raise ConfigError(describe_validation(error), code="bad-federation") from None
    federation = Federation(folder=folder, settings=settings)
    with whole_folder(folder, mode=0o700) as staging:
        _fill(Federation(folder=staging, settings=settings), federation, passphrase)
    return federation


def _fill(at: Federation, final: Federation, passphrase: bytes) -> None:
    for path in (
        at.proxy,
        at.flower_home,
        at.state,
        at.runs,
        at.sites_folder,
        at.ca_certificate.parent,
        at.ca_key.parent,
    ):
        path.mkdir(mode=0o700)
    ca_key = new_ec_key()
    write_secret(at.ca_key, key_pem(ca_key, passphrase))
    write_secret(at.server_key, key_pem(new_ec_key()))
    new_key(at.coordinator_key)
    write_secret(at.superexec_secret, secrets.token_bytes(SECRET_BYTES))
    write_bytes(at.ca_certificate, ca_certificate(ca_key, at.name))
    renew_server_certificate(at, passphrase=passphrase)
    write_bundle(at.folder)
    configure(final, at.folder)
    text = (
        "# You may change host, port, listen, client_certificates and notify. A new host or port needs new "
        "kits.\n"
    )
    text += dump_yaml(at.settings.model_dump(mode="json"), sort_keys=False)
    write_bytes(at.folder / FEDERATION, text.encode())


def rotate(federation: Federation, *, authority: bool, passphrase: bytes = b"") -> None:
    """Replace the coordinator's signing key, and with `authority` the certificate authority and the server's
    key, too. Enrolments stay; each site joins with a renewed kit, which the old key vouches for.

    The services must not run. What was signed before stays verifiable by the copies in run folders and kits.

    Args:
        passphrase: encrypts the new key of the authority.
    Raises:
        ConfigError: `bad-key`, `bad-enrolment`.
    """
    old, new = federation.signing_key(), Ed25519PrivateKey.generate()
    certificate = federation.ca_certificate.read_bytes()
    ca_key = new_ec_key()
    if authority:
        certificate = ca_certificate(ca_key, federation.name)
    fingerprint = federation_fingerprint(certificate.decode("ascii"), public_text(new))
    known = endorsements(federation)
    added = Endorsement.by(old, public_text(new), fingerprint)
    kept = [*known, added][-MAX_ENDORSEMENTS:]
    text = json.dumps([one.model_dump() for one in kept], indent=1)
    write_bytes(federation.folder / ENDORSEMENTS, text.encode())  # first: it says nothing of the old key
    if authority:
        write_bytes(federation.ca_key, key_pem(ca_key, passphrase), 0o600)
        write_bytes(federation.ca_certificate, certificate)
        write_bytes(federation.server_key, key_pem(new_ec_key()), 0o600)
        renew_server_certificate(federation, passphrase=passphrase)
    pem = new.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_bytes(federation.coordinator_key, pem, 0o600)


def configure(federation: Federation, at: Path | None = None) -> None:
    """Write the files that depend on federation.yaml and on the folder's path: proxy/nginx.conf,
    flwr/config.toml, systemd/.

    Args:
        at: folder to write to; by default the federation's own.
    """
    folder = at or federation.folder
    lines = ["[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]"]
    lines += [
        f'address = "{LOOPBACK}:{federation.settings.superlink_port}"',
        f'root-certificates = "{federation.ca_certificate}"',
        "",
    ]
    write_bytes(folder / "proxy" / "nginx.conf", nginx_configuration(federation).encode())
    write_bytes(folder / "flwr" / "config.toml", "\n".join(lines).encode())
    for name, text in unit_texts(federation).items():
        write_bytes(folder / "systemd" / name, text.encode())


def renew_server_certificate(
    federation: Federation, days: int = SERVER_DAYS, *, passphrase: bytes = b""
) -> None:
    """Write a new certificate for the server's key and the present host. Kits stay valid: they hold the
    authority's certificate.

    Services use it from their next start.

    Args:
        passphrase: of the authority's key, where that is encrypted.
    Raises:
        ConfigError: `bad-key` (a key in keys/ cannot be read), `wrong-passphrase`, `bad-certificate` (ca.crt
            likewise), `certificate-expired` (the authority itself has expired).
    """
    try:
        authority = x509.load_pem_x509_certificate(federation.ca_certificate.read_bytes())
    except (OSError, ValueError) as error:
        hint = "restore it from a backup: every kit holds it"
        raise ConfigError(
            f"{federation.ca_certificate}: cannot be read ({error})", code="bad-certificate", hint=hint
        ) from None
    if authority.not_valid_after_utc < now():
        hint = "make a new federation; every hospital needs a new kit"
        raise ConfigError(
            "the federation's certificate authority has expired", code="certificate-expired", hint=hint
        )
    key, ca_key = load_ec_key(federation.server_key), load_ec_key(federation.ca_key, passphrase)
    host = federation.settings.host
    pem = server_certificate(key.public_key(), host, days, authority=authority, ca_key=ca_key)
    write_bytes(federation.server_certificate, pem)
