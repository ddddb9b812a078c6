"""TODO."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import ValidationError

from common.errors import ConfigError
from common.files import sync_folder, write_bytes
from common.signing import new_key, write_secret
from common.strict import describe_validation
from server.federation.certificates import (
    SERVER_DAYS,
    _ca_certificate,
    _certificate,
    _key_usage,
    _load_ec_key,
    _now,
    _pem,
)
from server.federation.flower_app import write_bundle
from server.federation.nginx import nginx_configuration
from server.federation.notify import Notify
from server.federation.registry import (
    CONNECTION,
    FEDERATION,
    LOOPBACK,
    LOOPBACK_PORTS,
    SECRET_BYTES,
    Federation,
    Settings,
    _today,
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
) -> Federation:
    """Make a federation: keys, certificates, bundle, configuration. The folder appears whole, or not at all.

    Args:
        folder: absent or empty.
        host: name or IP address by which hospitals reach this machine; goes into the server's certificate and
            into every kit.
        port: of the proxy.
        superlink_port, health_port: on loopback; by default two that are free now.
    Raises:
        ConfigError: `output-exists`, `not-writable`, `bad-path`, `bad-federation` (a value out of range),
            `no-program` (Flower is missing).
    """
    folder = folder.absolute()
    if re.search(r"[^\w /.,+@=~-]", str(folder)):
        raise ConfigError(
            f"{str(folder)!r}: nginx and systemd cannot be given this path",
            code="bad-path",
            hint="choose a plainer name",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: exists already and is not empty",
            code="output-exists",
            hint="nothing was changed; choose another",
        )
    if superlink_port is None or health_port is None:
        free = _free_ports(avoid=port)
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
        settings = Settings.model_validate(values | {"notify": notify or Notify(), "created": _today()})
    except ValidationError as error:
        raise ConfigError(describe_validation(error), code="bad-federation") from None
    made = Federation(folder=folder, settings=settings)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        growing = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # mode 0700
    except OSError as error:
        raise ConfigError(
            f"{folder.parent}: cannot be written ({error.strerror})", code="not-writable"
        ) from None
    try:
        _fill(Federation(folder=growing, settings=settings), made)
        os.rename(growing, folder)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return made


def _fill(at: Federation, final: Federation) -> None:
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
    ca_key = ec.generate_private_key(ec.SECP256R1())
    write_secret(at.ca_key, _pem(ca_key))
    write_secret(at.server_key, _pem(ec.generate_private_key(ec.SECP256R1())))
    new_key(at.coordinator_key)
    write_secret(at.superexec_secret, secrets.token_bytes(SECRET_BYTES))
    write_bytes(at.ca_certificate, _ca_certificate(ca_key, at.name))
    renew_server_certificate(at)
    write_bundle(at.folder)
    configure(final, at.folder)
    text = (
        "# What may be changed here: host, port, listen, client_certificates, notify. A change of host "
        "or port needs new kits.\n"
    )
    text += yaml.safe_dump(at.settings.model_dump(mode="json"), sort_keys=False)
    write_bytes(at.folder / FEDERATION, text.encode())


def configure(federation: Federation, at: Path | None = None) -> None:
    """Write what follows from federation.yaml and from where the folder lies: proxy/nginx.conf,
    flwr/config.toml, systemd/.

    Args:
        at: where to write, if not into the federation's own folder.
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


def renew_server_certificate(federation: Federation, days: int = SERVER_DAYS) -> None:
    """A new certificate for the server's key, for the host that federation.yaml names now. Kits stay valid:
    they hold the authority's.

    Services take it at their next start.

    Raises:
        ConfigError: `bad-key` (a key in keys/ cannot be read), `bad-certificate` (ca.crt likewise),
            `certificate-expired` (the authority itself has run out).
    """
    try:
        authority = x509.load_pem_x509_certificate(federation.ca_certificate.read_bytes())
    except (OSError, ValueError) as error:
        hint = "restore it from a backup: every kit holds it"
        raise ConfigError(
            f"{federation.ca_certificate}: cannot be read ({error})", code="bad-certificate", hint=hint
        ) from None
    if authority.not_valid_after_utc < _now():
        hint = "make a new federation; every hospital needs its kit"
        raise ConfigError(
            "the federation's certificate authority has run out", code="certificate-expired", hint=hint
        )
    key, ca_key = _load_ec_key(federation.server_key), _load_ec_key(federation.ca_key)
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((federation.settings.host, "localhost", LOOPBACK)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    until = min(_now() + timedelta(days=days), authority.not_valid_after_utc)
    built = _certificate(federation.settings.host, authority.subject, key.public_key(), until)
    built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    built = built.add_extension(_key_usage("digital_signature"), critical=True)
    built = built.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
    )
    write_bytes(
        federation.server_certificate,
        built.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
    )


def _free_ports(*, avoid: int) -> Sequence[int]:
    free: list[int] = []
    for port in secrets.SystemRandom().sample(LOOPBACK_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        if port != avoid:
            free.append(port)
        if len(free) == 2:
            return free
    raise ConfigError(
        "no two free ports on loopback", code="port-in-use", hint="--superlink-port and --health-port"
    )
