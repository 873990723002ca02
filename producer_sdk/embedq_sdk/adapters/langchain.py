"""embedq in LangChain: `EmbedqEmbeddings`, wherever LangChain takes `Embeddings`. Comes with `embedq[langchain]`."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings

from embedq_sdk.adapters.retrieval import Retrieval, RetrievalOptions, address
from embedq_sdk.blocking import EmbedClient
from embedq_sdk.client import DEFAULT_TIMEOUT_S
from embedq_shared.messages import Truncate
from embedq_shared.topics import Lane


class EmbedqEmbeddings(Embeddings):
    """Queries and documents as embedq embeds them, for callers with an event loop and without.

    Args:
        servers: Kafka's address, "host:port"; by default that of EMBEDQ_KAFKA_SERVERS.
        client: instead, a blocking client to share; closing it is its owner's matter.
        model: the service's alias, by default its own.
        model_version: the one that must answer, such as that of the vectors in the store; any by default.
        dimensions: the vectors are cut to these and normalized.
        query_instruction: what queries are for, in place of the model's prompt for queries.
        truncate: "end" cuts texts that are too long, which fail otherwise.
        lane: "bulk" for loads that may wait.
        timeout: seconds for a query, and for each job of 32 documents.
        settings: more of `embedq_sdk.blocking.EmbedClient`, such as `topic_prefix` or `security_protocol`.

    Raises:
        InvalidArgument: one of them is wrong.
    """

    # More than six parameters: keyword-only settings of a public class, each with a default.
    def __init__(
        self,
        servers: str | None = None,
        *,
        client: EmbedClient | None = None,
        model: str | None = None,
        model_version: str | None = None,
        dimensions: int | None = None,
        query_instruction: str | None = None,
        truncate: Truncate | None = None,
        lane: Lane = "interactive",
        timeout: float = DEFAULT_TIMEOUT_S,
        **settings: Any,
    ) -> None:
        options = RetrievalOptions(
            model=model,
            model_version=model_version,
            dimensions=dimensions,
            query_instruction=query_instruction,
            truncate=truncate,
            lane=lane,
            timeout=timeout,
        )
        if client is None:
            self.servers = address(servers)
            client = EmbedClient(self.servers, **settings)
        self._retrieval = Retrieval(client, options)

    def embed_query(self, text: str) -> list[float]:
        """A query's vector."""
        return self._retrieval.query(text)[0].tolist()  # type: ignore[no-any-return]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Each document's vector, in order."""
        return self._retrieval.documents(texts).vectors.tolist() if texts else []

    async def aembed_query(self, text: str) -> list[float]:
        """A query's vector."""
        return (await self._retrieval.query_async(text))[0].tolist()  # type: ignore[no-any-return]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Each document's vector, in order."""
        return (await self._retrieval.documents_async(texts)).vectors.tolist() if texts else []
