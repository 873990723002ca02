"""embedq in LlamaIndex: `EmbedqEmbedding`, as `Settings.embed_model` or wherever an embedding model goes. Comes with
`embedq[llama-index]`."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from embedq_sdk.adapters.retrieval import Retrieval, RetrievalOptions, address
from embedq_sdk.blocking import EmbedClient
from embedq_sdk.client import DEFAULT_TIMEOUT_S
from embedq_shared.messages import DEFAULT_MAX_INPUTS, Truncate
from embedq_shared.topics import Lane


class EmbedqEmbedding(BaseEmbedding):
    """Queries and nodes as embedq embeds them, for callers with an event loop and without.

    `settings` are more of `embedq_sdk.blocking.EmbedClient`, such as `topic_prefix` or `security_protocol`; a password is among
    them, so they are in nothing that is stored or reported.
    """

    servers: str | None = Field(
        default=None, description="Kafka's address; None: that of EMBEDQ_KAFKA_SERVERS."
    )
    model: str | None = Field(default=None, description="The service's alias; None: its own.")
    model_version: str | None = Field(
        default=None,
        description="The one that must answer, such as that of the vectors in the store; None: any.",
    )
    dimensions: int | None = Field(default=None, description="The vectors are cut to these and normalized.")
    query_instruction: str | None = Field(
        default=None, description="What queries are for, in place of the model's prompt for queries."
    )
    truncate: Truncate | None = Field(
        default=None, description="'end' cuts texts that are too long, which fail otherwise."
    )
    lane: Lane = Field(default="interactive", description="'bulk' for loads that may wait.")
    timeout: float = Field(
        default=DEFAULT_TIMEOUT_S, description="Seconds for a query, and for each job of 32 nodes."
    )
    settings: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    embed_batch_size: int = Field(
        default=256,
        gt=0,
        le=DEFAULT_MAX_INPUTS,
        description="Nodes of one call, whose jobs are all under way at once.",
    )
    _retrieval: Retrieval = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        options = RetrievalOptions(
            model=self.model,
            model_version=self.model_version,
            dimensions=self.dimensions,
            query_instruction=self.query_instruction,
            truncate=self.truncate,
            lane=self.lane,
            timeout=self.timeout,
        )
        self._retrieval = Retrieval(EmbedClient(address(self.servers), **self.settings), options)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex stores."""
        return "EmbedqEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._retrieval.query(query)[0].tolist()  # type: ignore[no-any-return]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._retrieval.query_async(query))[0].tolist()  # type: ignore[no-any-return]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._retrieval.documents(texts).vectors.tolist()  # type: ignore[no-any-return]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return (await self._retrieval.documents_async(texts)).vectors.tolist()  # type: ignore[no-any-return]
