"""Certificates for brokers and clients, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from embedq_sdk.dev.ports import HOST


def make_certificates(directory: Path) -> Path:
    """`ca.pem`, and `.pem` and `.key` of `broker` and `client`, which it signed; `broker.store` is the broker's both."""
    if shutil.which("openssl") is None:
        pytest.skip("the certificates are made by openssl, which is not installed")
    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl(
        "req", "-x509", *key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem", directory=directory
    )
    (directory / "san").write_text(f"subjectAltName=IP:{HOST}\n")
    for name in ("broker", "client"):
        openssl(
            *("req", *key[:3], "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr"),
            directory=directory,
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "san", "-out", f"{name}.pem"),
            directory=directory,
        )
    (directory / "broker.store").write_text(
        (directory / "broker.key").read_text() + (directory / "broker.pem").read_text()
    )
    return directory


def openssl(*arguments: str, directory: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)
