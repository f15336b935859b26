"""Certificate authorities for tests, and the certificates that they sign for 127.0.0.1."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

__all__ = ["certificates", "write_certificates"]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the authority, ``certificate.pem``, and a signed certificate with its key, ``both.pem``."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "certificate.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    return folder


def write_certificates(folder: Path, *names: str) -> None:
    """Write ``ca.pem``, and for each name ``<name>cert.pem`` and ``<name>key.pem`` signed by it."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in names:
        signed = authority.issue_cert("127.0.0.1")
        signed.cert_chain_pems[0].write_to_path(folder / f"{name}cert.pem")
        signed.private_key_pem.write_to_path(folder / f"{name}key.pem")
