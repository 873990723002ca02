"""Certificates for brokers and clients, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from embedq_sdk.dev.ports import HOST


def make_certificates(directory: Path) -> Path:
    """`ca.pem`, and `.pem` and `.key` of `broker` and `client`, which it signed; `broker.store` is the broker's both.

    `expired` has one of yesterday, and `stranger` is an authority of its own.
    """
    if shutil.which("openssl") is None:
        pytest.skip("the certificates are made by openssl, which is not installed")
    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    for name in ("ca", "stranger"):
        openssl(
            *("req", "-x509", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            directory=directory,
        )
    (directory / "san").write_text(f"subjectAltName=IP:{HOST}\n")
    for name, days in (("broker", 2), ("client", 2), ("expired", -1)):
        openssl(
            *("req", *key[:3], "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr"),
            directory=directory,
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", str(days), "-extfile", "san", "-out", f"{name}.pem"),
            directory=directory,
        )
    for name in ("broker", "expired"):
        (directory / f"{name}.store").write_text(
            (directory / f"{name}.key").read_text() + (directory / f"{name}.pem").read_text()
        )
    return directory


def openssl(*arguments: str, directory: Path) -> bytes:
    """What it printed."""
    done = subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)
    return done.stdout
