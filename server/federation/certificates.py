"""TODO."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import ConfigError

CA_DAYS, SERVER_DAYS, SITE_DAYS = 3650, 365, 365


WARN_DAYS = 30
"""From here on every start and every list of sites says that something runs out."""


def certificate_days(pem: bytes) -> int:
    """Whole days until a certificate (PEM) ends; negative once it has."""
    return (x509.load_pem_x509_certificate(pem).not_valid_after_utc - _now()).days


def _ca_certificate(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedqc federation {name}")])
    built = _certificate(
        f"fedqc federation {name}", subject, key.public_key(), _now() + timedelta(days=CA_DAYS)
    )
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    built = built.add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _certificate(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    """What all certificates have in common. They begin a day ago, for clocks that differ."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    built = (
        built.serial_number(x509.random_serial_number())
        .not_valid_before(_now() - timedelta(days=1))
        .not_valid_after(until)
    )
    return built.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*wanted: str) -> x509.KeyUsage:
    names = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
    ]
    names += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{name: name in wanted for name in names})


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_ec_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a key that can be read ({error})", code="bad-key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not an elliptic-curve key", code="bad-key")
    return key


def _now() -> datetime:
    return datetime.now(UTC)
