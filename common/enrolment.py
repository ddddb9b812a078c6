"""Read and write the two files of an enrolment: a hospital's `request.zip` and the coordinator's `kit.zip`.

A request holds public keys and the operator's description of the site. A kit holds the federation's address,
its certificate authority and the coordinator's public key. Neither holds a private key. Both are signed by
their maker; a kit is trusted because the operator compares its fingerprint with one that reached the hospital
another way (telephone, letterhead).
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import lzma
import zipfile
import zlib
from datetime import date
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from common.errors import ConfigError, RunError
from common.names import MAX_PATIENTS, ONE_LINE, SITE_NAME, SiteKind
from common.signing import fingerprint, parse_public, public_text, sign, verify
from common.strict import StrictModel, describe_validation

MAX_BYTES = 1 << 20
MAX_ENDORSEMENTS = 100
_ENDORSEMENT = b"fedqc endorsement v1\0"
_REQUEST, _KIT, _SIGNATURE = "request.json", "kit.json", "signature"
P = TypeVar("P", bound="StrictModel")
_DOMAINS = {_REQUEST: b"fedqc request v1\0", _KIT: b"fedqc kit v1\0"}


class Request(StrictModel):
    """A hospital asks to take part."""

    site: str = Field(pattern=SITE_NAME)
    kind: SiteKind
    nominal_patients: int = Field(ge=1, le=MAX_PATIENTS)
    stand_in: str = Field(default="", max_length=500, pattern=ONE_LINE)
    # OpenSSH public key of the network side
    node_key: str = Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+$", max_length=500)
    signing_key: str = Field(max_length=64, pattern=ONE_LINE)  # Ed25519 public key of the agent, base64
    version: str = Field(max_length=32, pattern=ONE_LINE)

    @property
    def fingerprint(self) -> str:
        """The operator reads it to the coordinator: covers both keys and the name."""
        return fingerprint(json.dumps([self.site, self.node_key, self.signing_key]).encode())


class Endorsement(StrictModel):
    """A coordinator's key vouches for the one that replaces it."""

    previous_key: str = Field(max_length=64, pattern=ONE_LINE)  # Ed25519 public keys, base64
    key: str = Field(max_length=64, pattern=ONE_LINE)
    fingerprint: str = Field(max_length=100, pattern=ONE_LINE)  # of the federation with the new key
    signature: str = Field(max_length=100, pattern=ONE_LINE)  # base64, of the previous key

    @staticmethod
    def by(previous: Ed25519PrivateKey, key: str, fingerprint: str) -> Endorsement:
        """Sign that `key` replaces the key `previous`."""
        signature = sign(f"{key} {fingerprint}", previous, _ENDORSEMENT)
        return Endorsement(
            previous_key=public_text(previous),
            key=key,
            fingerprint=fingerprint,
            signature=base64.b64encode(signature).decode(),
        )

    def holds(self) -> bool:
        """Whether the previous key signed this."""
        try:
            signature = base64.b64decode(self.signature, validate=True)
            verify(f"{self.key} {self.fingerprint}", signature, parse_public(self.previous_key), _ENDORSEMENT)
        except (RunError, ConfigError, ValueError):
            return False
        return True


class Kit(StrictModel):
    """A coordinator lets a hospital take part."""

    federation: str = Field(pattern=SITE_NAME)
    site: str = Field(pattern=SITE_NAME)
    # host:port of the proxy
    address: str = Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}$", max_length=300)
    ca_certificate: str = Field(max_length=20_000, pattern=r"^[ -~\r\n]*$")  # PEM
    coordinator_key: str = Field(max_length=64, pattern=ONE_LINE)  # Ed25519 public key, base64
    # of the only Flower app that this site's node will serve
    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    site_key: str = Field(max_length=64, pattern=ONE_LINE)  # the site's own signing key, as enrolled
    version: str = Field(max_length=32, pattern=ONE_LINE)
    expires: date  # of the enrolment; a renewed kit moves it
    # by earlier keys of this coordinator, oldest first
    endorsements: tuple[Endorsement, ...] = Field(default=(), max_length=MAX_ENDORSEMENTS)

    @property
    def fingerprint(self) -> str:
        """The coordinator publishes it: the same for every site of a federation, as long as its keys last."""
        return federation_fingerprint(self.ca_certificate, self.coordinator_key)

    def succeeds(self, coordinator_key: str) -> bool:
        """Whether the federation of an earlier coordinator's key says, from key to key, that it is this."""
        key, found = coordinator_key, ""
        for endorsement in self.endorsements:
            if endorsement.previous_key == key and endorsement.holds():
                key, found = endorsement.key, endorsement.fingerprint
        return key == self.coordinator_key and same_fingerprint(found, self.fingerprint)


def federation_fingerprint(ca_certificate: str, coordinator_key: str) -> str:
    """Fingerprint of a federation's certificate authority (PEM) and coordinator key (base64)."""
    return fingerprint(json.dumps([ca_certificate, coordinator_key]).encode())


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are equal as people write them: hyphens, spaces, colons and case do not
    count.
    """
    return hmac.compare_digest(_digits(one), _digits(other))


def write_request(path: Path, request: Request, key: Ed25519PrivateKey) -> None:
    """Raises ConfigError (code `output-exists`) rather than overwrite."""
    _write(path, _REQUEST, request, key)


def write_kit(path: Path, kit: Kit, key: Ed25519PrivateKey) -> None:
    """Raises ConfigError (code `output-exists`) rather than overwrite."""
    _write(path, _KIT, kit, key)


def read_request(path: Path) -> Request:
    """Raises ConfigError (code `bad-request-file`): not a request, altered, or not signed by the key it
    names.
    """
    text, signature = _read(path, _REQUEST, "bad-request-file")
    request = _parse(Request, text, path, "bad-request-file")
    _check(path, text, signature, request.signing_key, _REQUEST, "bad-request-file")
    return request


def read_kit(path: Path) -> Kit:
    """Raises ConfigError (code `bad-kit`): not a kit, altered, or not signed by the coordinator it names.

    This does not identify the coordinator: compare `Kit.fingerprint`.
    """
    text, signature = _read(path, _KIT, "bad-kit")
    kit = _parse(Kit, text, path, "bad-kit")
    _check(path, text, signature, kit.coordinator_key, _KIT, "bad-kit")
    return kit


def _digits(fingerprint: str) -> bytes:
    return "".join(fingerprint.split()).replace("-", "").replace(":", "").lower().encode()


def _write(path: Path, name: str, paper: StrictModel, key: Ed25519PrivateKey) -> None:
    text = paper.model_dump_json(indent=1, exclude_defaults=True)
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
        archive.writestr(
            _SIGNATURE,
            base64.b64encode(sign(text, key, _DOMAINS[name])).decode() + "\n" + public_text(key) + "\n",
        )
    try:
        with path.open("xb") as file:
            file.write(held.getvalue())
    except FileExistsError:
        raise ConfigError(
            f"{path}: exists already", code="output-exists", hint="name another file, or move it away"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})", code="not-writable") from None


def _read(path: Path, name: str, code: str) -> tuple[str, bytes]:
    """Text and signature of a request or kit; sizes are checked before anything is unpacked."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes", code=code)
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if (
                sorted(info.filename for info in infos) != [name, _SIGNATURE]
                or sum(info.file_size for info in infos) > MAX_BYTES
            ):
                raise ConfigError(f"{path}: must hold {name} and {_SIGNATURE}, nothing else", code=code)
            text = archive.read(name).decode("utf-8")
            return text, base64.b64decode(archive.read(_SIGNATURE).split()[0], validate=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", code=code) from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, IndexError, RuntimeError):
        raise ConfigError(f"{path}: damaged, or not a file that fedqc made", code=code) from None


def _parse(kind: type[P], text: str, path: Path, code: str) -> P:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation(error)}", code=code) from None


def _check(path: Path, text: str, signature: bytes, key: str, name: str, code: str) -> None:
    try:
        verify(text, signature, parse_public(key), _DOMAINS[name])
    except (RunError, ConfigError):
        raise ConfigError(
            f"{path}: was altered after it was signed", code=code, hint="ask for it again"
        ) from None
