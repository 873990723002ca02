"""The client for code that does not await: `from embedq_sdk.blocking import EmbedClient`."""

from __future__ import annotations

from embedq_sdk.blocking.client import EmbedClient

__all__ = ["EmbedClient"]
