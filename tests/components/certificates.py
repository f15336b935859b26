"""An authority of certificates for tests, and what it signs for 127.0.0.1."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from components import missing

__all__ = ["write_certificates"]


def write_certificates(folder: Path, *names: str) -> None:
    """Write ``ca.pem``, and for each name ``<name>cert.pem`` and ``<name>key.pem`` that it vouches for."""
    if importlib.util.find_spec("cryptography") is None:
        missing("cryptography", "pip install cryptography")
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, authority = _make("an authority of the tests", None, None)
    (folder / "ca.pem").write_bytes(_pem(authority))
    for name in names:
        key, certificate = _make("127.0.0.1", authority_key, authority)
        (folder / f"{name}cert.pem").write_bytes(_pem(certificate))
        (folder / f"{name}key.pem").write_bytes(_private_pem(key))


def _make(common_name: str, authority_key: Any, authority: Any) -> tuple[Any, Any]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if authority is None else authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    )
    return key, builder.sign(authority_key or key, hashes.SHA256())


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _private_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
