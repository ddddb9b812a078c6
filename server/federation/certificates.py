"""Make the certificates of a federation's authority and server (X.509, P-256); count the days they last."""

from __future__ import annotations

import ipaddress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.processes import LOOPBACK

CA_DAYS, SERVER_DAYS, SITE_DAYS = 3650, 365, 365
WARN_DAYS = 30
"""Days before the end from which every start and every list of sites warns."""


def certificate_days(pem: bytes) -> int:
    """Whole days until a certificate (PEM) ends; negative once it has.

    Raises:
        ValueError: not a certificate.
    """
    return (x509.load_pem_x509_certificate(pem).not_valid_after_utc - now()).days


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


def today() -> date:
    """The date in UTC, on which enrolments begin and end."""
    return now().date()


def new_ec_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes = b"") -> bytes:
    """A private key as PEM (PKCS #8), encrypted where there is a passphrase."""
    sealed = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)


def is_sealed(path: Path) -> bool:
    """Whether a key (PEM) is encrypted; False where there is none."""
    try:
        return b"ENCRYPTED" in path.read_bytes()
    except OSError:
        return False


def load_ec_key(path: Path, passphrase: bytes = b"") -> ec.EllipticCurvePrivateKey:
    """A private key of a file.

    Args:
        passphrase: of an encrypted key; not looked at where the key is not.
    Raises:
        ConfigError: missing, or not a private key on an elliptic curve (code `bad-key`); encrypted, and the
            passphrase is missing or wrong (`wrong-passphrase`).
    """
    sealed = is_sealed(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), passphrase if sealed else None)
    except (OSError, ValueError, TypeError) as error:
        if sealed:
            raise ConfigError(
                f"{path}: the passphrase is missing or wrong",
                code="wrong-passphrase",
                hint="nothing was changed; without the passphrase: fedqc federation rotate --authority",
            ) from None
        raise ConfigError(f"{path}: not a key that can be read ({error})", code="bad-key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not an elliptic-curve key", code="bad-key")
    return key


def ca_certificate(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Certificate (PEM) of a federation's authority, signed by itself, valid for `CA_DAYS`."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedqc federation {name}")])
    built = _certificate(
        f"fedqc federation {name}", subject, key.public_key(), now() + timedelta(days=CA_DAYS)
    )
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    built = built.add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def server_certificate(
    key: ec.EllipticCurvePublicKey,
    host: str,
    days: int,
    *,
    authority: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> bytes:
    """Certificate (PEM) of the server for `host`, localhost and 127.0.0.1; it never outlasts the authority's.

    Args:
        host: name or IP address by which hospitals reach the server.
        days: how long it is valid.
    """
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((host, "localhost", LOOPBACK)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    until = min(now() + timedelta(days=days), authority.not_valid_after_utc)
    built = _certificate(host, authority.subject, key, until)
    built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
    built = built.add_extension(_key_usage("digital_signature"), critical=True)
    built = built.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
    )
    return built.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _certificate(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    """The fields that all certificates share. They are valid from a day ago, for clocks that differ."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    built = (
        built.serial_number(x509.random_serial_number())
        .not_valid_before(now() - timedelta(days=1))
        .not_valid_after(until)
    )
    return built.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*permitted: str) -> x509.KeyUsage:
    names = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
    ]
    names += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{name: name in permitted for name in names})
