"""Clients of Qdrant. A folder of its local mode can be opened once at a time, so whoever asks for it later shares what is open."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from qdrant_client import QdrantClient

TIMEOUT_S: Final = 60

_turn: Final = threading.Lock()
_local: Final[dict[Path, tuple[QdrantClient, int]]] = {}
"""The folders that are open in this process, and how many have each."""


def connected(address: str) -> QdrantClient:
    """A client of a server, whose key is in QDRANT_API_KEY, or of a folder. It goes back with `let_go`.

    A folder's client may be used from several threads as long as one alone writes to each collection.
    """
    if "://" in address:
        return QdrantClient(url=address, api_key=os.environ.get("QDRANT_API_KEY"), timeout=TIMEOUT_S)
    folder = Path(address).resolve()
    with _turn:
        client, holders = _local.get(folder, (None, 0))
        if client is None:
            # Its SQLite would otherwise serve the thread alone that opened it.
            client = QdrantClient(path=str(folder), force_disable_check_same_thread=True)
        _local[folder] = (client, holders + 1)
    return client


def let_go(address: str, client: QdrantClient) -> None:
    """Close a client, once nobody else has it."""
    folder = Path(address).resolve()
    with _turn:
        shared, holders = _local.get(folder, (None, 0))
        if shared is client and holders > 1:
            _local[folder] = (client, holders - 1)
            return
        if shared is client:
            del _local[folder]
        client.close()
