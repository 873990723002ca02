"""Runs the gateway: one process or several on one port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.supervisors import Multiprocess

from embedq_gateway.http import logs
from embedq_gateway.http.entrance import Entrance
from embedq_gateway.settings import PREFIX, GatewaySettings, SettingsError

log = logging.getLogger("embedq.gateway")

_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 75
"""Longer than clients keep a connection that they do not use, so that it is they who close it, and no request meets a closing one."""
_WORKER_ANSWERS_S: Final = 30
"""A worker that does not answer its parent for this long is replaced; a busy machine must not look like that."""


def serve(settings: GatewaySettings) -> int:
    """Serve until a signal; the exit code. The settings are read again in each process, from the environment.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    logs.configure(settings.log_level)
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
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        timeout_worker_healthcheck=_WORKER_ANSWERS_S,
        ssl_certfile=settings.tls_certfile or None,
        ssl_keyfile=settings.tls_keyfile or None,
    )
    # uvicorn raises the signal that ended it once more when it has left; that is no reason for an exit code of its own.
    signal.signal(signal.SIGTERM, _leave)
    if settings.workers > 1:
        Multiprocess(config, [listener]).run()
        return 0
    server = uvicorn.Server(config)
    with suppress(SystemExit):
        server.run(sockets=[listener])
    entrance = config.loaded_app
    return 0 if server.started and isinstance(entrance, Entrance) and entrance.fault is None else 1


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
