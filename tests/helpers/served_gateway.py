"""A gateway over a fake service behind a real port: uvicorn with the bounds of connections that a process has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from embedq_gateway.http.connections import BoundedProtocol
from tests.helpers.fake_gateway import Door, a_gateway
from tests.helpers.support import wait_until


@asynccontextmanager
async def a_served_gateway(**settings: Any) -> AsyncIterator[tuple[Door, str]]:
    """The gateway's parts, and its address."""
    async with a_gateway(**settings) as door:
        config = uvicorn.Config(
            door.gateway.entrance,
            http=BoundedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            port=0,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        try:
            await wait_until(lambda: server.started or task.done(), what="the server")
            port = server.servers[0].sockets[0].getsockname()[1]
            yield door, f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await task
