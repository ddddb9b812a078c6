"""Sign and verify messages between coordinator and hospitals; write and read the keys for that.

The sender signs a *statement* about the payload's final bytes: which site, kind of message, run, arm, round,
plan, base model and payload (as SHA-256), and the nonce that the coordinator drew for this request. The
signature (Ed25519, RFC 8032) covers a domain tag and the statement's exact text, so that no signature made
here is valid for another purpose.

The coordinator signs tasks with the key whose fingerprint a hospital pinned when it joined. A hospital signs
answers inside its agent, with a key that never leaves the site. Transport authenticates the connection; only
this authenticates the message.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from common.errors import ConfigError, RunError
from common.names import MAX_RUN, ONE_LINE
from common.strict import StrictModel

DOMAIN = b"fedqc wire statement v1\0"


class Statement(StrictModel):
    """The content that a signature covers."""

    # the task's recipient, or the sender of an answer; empty in the first request to an unknown site
    site: str = Field(default="", max_length=32, pattern=ONE_LINE)
    kind: str = Field(max_length=32, pattern=ONE_LINE)  # name of the message
    run: str = Field(default="", max_length=MAX_RUN, pattern=ONE_LINE)
    arm: str = Field(default="", max_length=32, pattern=ONE_LINE)
    round: int = Field(default=0, ge=0)
    plan_sha256: str = Field(default="", max_length=64, pattern=ONE_LINE)
    base_sha256: str = Field(default="", max_length=64, pattern=ONE_LINE)
    payload_sha256: str = Field(max_length=64, pattern=ONE_LINE)
    # drawn by the coordinator for one question; an answer repeats it
    nonce: str = Field(max_length=64, pattern=ONE_LINE)
    # the last head of its privacy ledger that this site reported; "": none yet. It stands here and not in the
    # task, whose bytes are the same for all sites
    ledger_head: str = Field(default="", max_length=80, pattern=ONE_LINE)

    def text(self) -> str:
        """The exact text that is signed. A field that came later is there only where it says something."""
        return self.model_dump_json(exclude=None if self.ledger_head else {"ledger_head"})

    @staticmethod
    def parse(text: str) -> Statement:
        """Raises RunError (code `bad-signature`) for text that is no statement."""
        try:
            return Statement.model_validate_json(text)
        except (ValidationError, ValueError, RecursionError):
            raise RunError("not a signed statement", code="bad-signature") from None


def payload_sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def sign(text: str | bytes, key: Ed25519PrivateKey, domain: bytes = DOMAIN) -> bytes:
    return key.sign(domain + (text.encode() if isinstance(text, str) else text))


def verify(text: str | bytes, signature: bytes, key: Ed25519PublicKey, domain: bytes = DOMAIN) -> None:
    """Raises RunError (code `bad-signature`) unless `signature` is the key owner's over this domain and
    text.
    """
    try:
        key.verify(signature, domain + (text.encode() if isinstance(text, str) else text))
    except InvalidSignature:
        raise RunError("the signature is not that of the key on file", code="bad-signature") from None


def new_key(path: Path) -> Ed25519PrivateKey:
    """Make a signing key, PEM (PKCS #8), readable by its owner only.

    Raises:
        ConfigError: there is one already (code `key-exists`): replacing it would disown everything signed so
            far.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(path, pem)
    return key


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file of mode 0600, complete or not at all.

    Raises:
        ConfigError: it exists already (code `key-exists`), or cannot be written (`not-writable`).
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        hint = "keys are never overwritten; move it away first"
        raise ConfigError(f"{path}: already exists", code="key-exists", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})", code="not-writable") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # else half a key would stand in the way of a whole one
        raise ConfigError(f"{path}: cannot be written ({error.strerror})", code="not-writable") from None


def load_key(path: Path) -> Ed25519PrivateKey:
    """Raises ConfigError (code `bad-key`): missing, open to others than its owner, or not an Ed25519 key."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a signing key that can be read ({error})", code="bad-key") from None
    if mode & 0o077:
        raise ConfigError(
            f"{path}: has mode {mode:04o}, others may read it", code="bad-key", hint=f"chmod 600 {path}"
        )
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 key", code="bad-key")
    return key


def public_text(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The public key as base64 of its 32 bytes."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return base64.b64encode(
        public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    ).decode()


def parse_public(text: str) -> Ed25519PublicKey:
    """Raises ConfigError (code `bad-key`)."""
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error):
        raise ConfigError(f"{text[:60]!r}: not an Ed25519 public key in base64", code="bad-key") from None


def fingerprint(content: bytes) -> str:
    """SHA-256 as people compare it: sixteen groups of four hexadecimal digits."""
    digits = hashlib.sha256(content).hexdigest()
    return "-".join(digits[start : start + 4] for start in range(0, 64, 4))
