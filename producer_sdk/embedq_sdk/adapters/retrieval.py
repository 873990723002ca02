"""What the frameworks' adapters share: a client, and how queries and documents are embedded with it."""

from __future__ import annotations

import asyncio
import os
from typing import Final

import msgspec

from embedq_sdk.blocking import EmbedClient
from embedq_sdk.client import DEFAULT_TIMEOUT_S
from embedq_sdk.embeddings import Embeddings
from embedq_sdk.errors import InvalidArgument
from embedq_sdk.job_options import JobArguments, JobOptions, checked_timeout
from embedq_shared.messages import Truncate
from embedq_shared.topics import Lane

SERVERS: Final = "EMBEDQ_KAFKA_SERVERS"
"""The variable that names Kafka's address, as for the command line and the service."""


class RetrievalOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for each text: see `JobArguments`. Queries are sent as queries, documents as documents, so that a model
    which tells them apart gets each with its own prompt.

    Raises:
        InvalidArgument: an option is wrong.
    """

    model: str | None = None
    model_version: str | None = None
    """The one that must answer, as it made the vectors that are searched."""
    dimensions: int | None = None
    query_instruction: str | None = None
    """What a query is for, in place of the model's own prompt for queries; documents get none."""
    truncate: Truncate | None = None
    lane: Lane = "interactive"
    timeout: float = DEFAULT_TIMEOUT_S
    """Seconds for a query, and for each job of 32 documents."""

    def __post_init__(self) -> None:
        checked_timeout("timeout", self.timeout)
        JobOptions(**self.for_queries)
        JobOptions(**self.for_documents)

    @property
    def for_queries(self) -> JobArguments:
        """The options of a query's job."""
        return self._job() | JobArguments(input_type="query", instruction=self.query_instruction)

    @property
    def for_documents(self) -> JobArguments:
        """The options of a job of documents."""
        return self._job() | JobArguments(input_type="document")

    def _job(self) -> JobArguments:
        return JobArguments(
            model=self.model,
            model_version=self.model_version,
            dimensions=self.dimensions,
            truncate=self.truncate,
            lane=self.lane,
        )


class Retrieval:
    """Embeds queries and documents for callers with an event loop and for those without, over one connection.

    The async calls may be awaited in any event loop: the client lives in its own.
    """

    def __init__(self, client: EmbedClient, options: RetrievalOptions) -> None:
        self.client = client
        self.options = options

    def query(self, text: str) -> Embeddings:
        """One query, as a row."""
        options = self.options
        return self.client.embed_detailed(text, timeout=options.timeout, **options.for_queries)

    def documents(self, texts: list[str]) -> Embeddings:
        """A row for each document; there must be one."""
        options = self.options
        return self.client.embed_many(texts, timeout=options.timeout, **options.for_documents)

    async def query_async(self, text: str) -> Embeddings:
        """As `query`."""
        options = self.options
        return await asyncio.wrap_future(
            self.client.begin(
                lambda client: client.embed_detailed(text, timeout=options.timeout, **options.for_queries)
            )
        )

    async def documents_async(self, texts: list[str]) -> Embeddings:
        """As `documents`."""
        options = self.options
        return await asyncio.wrap_future(
            self.client.begin(
                lambda client: client.embed_many(texts, timeout=options.timeout, **options.for_documents)
            )
        )


def address(servers: str | None) -> str:
    """Kafka's address as it was given, or else as the environment has it.

    Raises:
        InvalidArgument: neither has one.
    """
    found = servers or os.environ.get(SERVERS)
    if not found:
        expected = f"Kafka's address, or {SERVERS} to be set"
        raise InvalidArgument(argument="servers", expected=expected, got="none")
    return found
