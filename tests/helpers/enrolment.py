"""Enrolment requests for tests."""

from __future__ import annotations

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.enrolment import Request
from common.signing import public_text


def a_request(
    site: str, node: ec.EllipticCurvePrivateKey | None = None, signing: Ed25519PrivateKey | None = None
) -> Request:
    node, signing = node or ec.generate_private_key(ec.SECP384R1()), signing or Ed25519PrivateKey.generate()
    return Request(
        site=site,
        kind="synthetic",
        nominal_patients=100,
        node_key=node.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode(),
        signing_key=public_text(signing),
        version="0.1.0",
    )
