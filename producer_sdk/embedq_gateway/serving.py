"""Runs the gateway: one process or several on one port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.supervisors import Multiprocess

from embedq_gateway.http import logs
from embedq_gateway.http.connections import BoundedProtocol
from embedq_gateway.http.entrance import Entrance
from embedq_gateway.keys import Exposed, KeyFileError, check_exposure, read_keys
from embedq_gateway.operations.metrics import DIRECTORY as METRICS_DIRECTORY
from embedq_gateway.settings import PREFIX, GatewaySettings, SettingsError

log = logging.getLogger("embedq.gateway")

_BACKLOG: Final = 2048
_WORKER_ANSWERS_S: Final = 30
"""A worker that does not answer its parent for this long is replaced; a busy machine must not look like that."""


def serve(settings: GatewaySettings) -> int:
    """Serve until a signal; the exit code. The settings are read again in each process, from the environment.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    logs.configure(settings.log_level)
    check_access(settings)
    check_certificate(settings)
    listener = bind(settings)
    scheme = "https" if settings.tls_certfile else "http"
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info(
        "listening", extra={"url": f"{scheme}://{host}:{port}", "port": port, "workers": settings.workers}
    )
    config = uvicorn.Config(
        "embedq_gateway.app:create",
        factory=True,
        workers=settings.workers,
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=max(1, round(settings.idle_timeout_s)),
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        timeout_worker_healthcheck=_WORKER_ANSWERS_S,
        ssl_certfile=settings.tls_certfile or None,
        ssl_keyfile=settings.tls_keyfile or None,
    )
    # uvicorn raises the signal that ended it once more when it has left; that is no reason for an exit code of its own.
    signal.signal(signal.SIGTERM, _leave)
    if settings.workers > 1:
        with _shared_metrics():
            Multiprocess(config, [listener]).run()
        return 0
    server = uvicorn.Server(config)
    with suppress(SystemExit):
        server.run(sockets=[listener])
    entrance = config.loaded_app
    return 0 if server.started and isinstance(entrance, Entrance) and entrance.fault is None else 1


def check_access(settings: GatewaySettings) -> None:
    """Whether the keys can be read, and whether it may listen where it was told to.

    Raises:
        SettingsError: it may not.
    """
    try:
        if settings.keys_file:
            read_keys(Path(settings.keys_file))
        check_exposure(
            settings.host, has_keys=bool(settings.keys_file), allow_anonymous=settings.allow_anonymous
        )
    except KeyFileError as error:
        raise SettingsError(f"{PREFIX}KEYS_FILE: {error}") from error
    except Exposed as error:
        raise SettingsError(f"{PREFIX}{error}") from error


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """A directory by which the workers share their metrics, unless the environment names one."""
    if METRICS_DIRECTORY in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="embedq-gateway-metrics-") as directory:
        os.environ[METRICS_DIRECTORY] = directory
        try:
            yield
        finally:
            del os.environ[METRICS_DIRECTORY]


def check_certificate(settings: GatewaySettings) -> None:
    """Check that the files of the certificate can be used: uvicorn would say so by a traceback of each process.

    Raises:
        SettingsError: they cannot.
    """
    if not settings.tls_certfile:
        return
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # An encrypted key would ask the terminal for its password.
        context.load_cert_chain(settings.tls_certfile, settings.tls_keyfile or None, password=lambda: "")
    except OSError as error:
        why = error if isinstance(error, ssl.SSLError) else error.strerror
        files = " and ".join(each for each in (settings.tls_certfile, settings.tls_keyfile) if each)
        raise SettingsError(
            f"{PREFIX}TLS_CERTFILE, {PREFIX}TLS_KEYFILE: expected readable PEM files, the key belonging to the certificate and "
            f"not encrypted, got {files} ({why})"
        ) from error


def bind(settings: GatewaySettings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        SettingsError: it cannot.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"{PREFIX}HOST, {PREFIX}PORT: cannot listen on {settings.host} port {settings.port} ({error.strerror})"
        ) from error


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)
