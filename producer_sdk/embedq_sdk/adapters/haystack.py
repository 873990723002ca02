"""embedq in Haystack: `EmbedqTextEmbedder` for queries, `EmbedqDocumentEmbedder` for documents. Comes with `embedq[haystack]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self, TypedDict, Unpack

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret, deserialize_secrets_inplace

from embedq_sdk.adapters.retrieval import Retrieval, RetrievalOptions, address
from embedq_sdk.blocking import EmbedClient
from embedq_sdk.embeddings import Embeddings
from embedq_sdk.errors import InvalidArgument
from embedq_shared.messages import Truncate
from embedq_shared.topics import Lane


class EmbedderSettings(TypedDict, total=False):
    """Parameters of both components.

    `model` is the service's alias, by default its own, and `model_version` the one that must answer, by default any; vectors are
    cut to `dimensions` and normalized; `prefix` and `suffix` are put around each text; `truncate="end"` cuts texts that are too long, which fail otherwise; `lane="bulk"` is for loads that
    may wait; `timeout` are seconds for a query, and for each job of 32 documents. `sasl_plain_password` is written into a
    pipeline's file as the name of its variable; `settings` are more of `embedq_sdk.blocking.EmbedClient`, such as
    `topic_prefix` or `security_protocol`, and written as they are.
    """

    model: str | None
    model_version: str | None
    dimensions: int | None
    prefix: str
    suffix: str
    truncate: Truncate | None
    lane: Lane
    timeout: float
    sasl_plain_password: Secret | None
    settings: Mapping[str, Any] | None


class _Embedder:
    """What both components have: a client, and how they are written into a pipeline's file.

    Raises:
        InvalidArgument: a parameter is wrong.
    """

    def __init__(self, servers: str | None, query_instruction: str | None, given: EmbedderSettings) -> None:
        options = {name: value for name, value in given.items() if name in RetrievalOptions.__struct_fields__}
        settings = dict(given.get("settings") or {})
        if "sasl_plain_password" in settings:  # it would be written into a file as it is
            raise InvalidArgument(
                argument="settings", expected="the password as a Secret, in `sasl_plain_password`", got="one"
            )
        if (password := given.get("sasl_plain_password")) is not None:
            settings["sasl_plain_password"] = password.resolve_value()
        self._retrieval = Retrieval(
            EmbedClient(address(servers), **settings),
            RetrievalOptions(query_instruction=query_instruction, **options),  # type: ignore[arg-type]
        )
        self._prefix = given.get("prefix", "")
        self._suffix = given.get("suffix", "")
        self._parameters: dict[str, Any] = {"servers": servers, **given}

    def warm_up(self) -> None:
        """Connect now instead of at the first run."""
        self._retrieval.client.open()

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline's file holds it."""
        parameters = dict(self._parameters)
        if (password := parameters.get("sasl_plain_password")) is not None:
            parameters["sasl_plain_password"] = password.to_dict()
        if (settings := parameters.get("settings")) is not None:
            parameters["settings"] = dict(
                settings
            )  # each component's own, as YAML would refer to one that is shared
        return default_to_dict(self, **parameters)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The component of a pipeline's file."""
        deserialize_secrets_inplace(data["init_parameters"], keys=["sasl_plain_password"])
        return default_from_dict(cls, data)

    def _around(self, text: str) -> str:
        return f"{self._prefix}{text}{self._suffix}"


@component
class EmbedqTextEmbedder(_Embedder):
    """A query's vector, for a retriever.

    `servers` is Kafka's address, by default that of EMBEDQ_KAFKA_SERVERS; `query_instruction` says what queries are for, in
    place of the model's own prompt for queries. The other parameters are `EmbedderSettings`.
    """

    def __init__(
        self,
        servers: str | None = None,
        *,
        query_instruction: str | None = None,
        **settings: Unpack[EmbedderSettings],
    ) -> None:
        # `@component` makes the class anew, which `super()` without arguments does not survive.
        _Embedder.__init__(self, servers, query_instruction, settings)
        self._parameters["query_instruction"] = query_instruction

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a query: `embedding`, and in `meta` the model, its version and the tokens.

        Raises:
            TypeError: it is not a string.
        """
        return _of_text(self._retrieval.query(self._around(_checked_text(text))))

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """As `run`."""
        return _of_text(await self._retrieval.query_async(self._around(_checked_text(text))))


@component
class EmbedqDocumentEmbedder(_Embedder):
    """Documents with their vectors, for a writer.

    `servers` is Kafka's address, by default that of EMBEDQ_KAFKA_SERVERS; `meta_fields_to_embed` are put before a document's text,
    separated by `embedding_separator`. The other parameters are `EmbedderSettings`.
    """

    def __init__(
        self,
        servers: str | None = None,
        *,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        **settings: Unpack[EmbedderSettings],
    ) -> None:
        _Embedder.__init__(self, servers, None, settings)
        self._fields, self._separator = meta_fields_to_embed or [], embedding_separator
        self._parameters["meta_fields_to_embed"] = self._fields
        self._parameters["embedding_separator"] = embedding_separator

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents: copies with their vectors, in order, and in `meta` the model, its version and the tokens.

        Raises:
            TypeError: they are no list of documents.
        """
        texts = self._texts(documents)
        return _of_documents(documents, self._retrieval.documents(texts)) if texts else _nothing()

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """As `run`."""
        texts = self._texts(documents)
        return _of_documents(documents, await self._retrieval.documents_async(texts)) if texts else _nothing()

    def _texts(self, documents: list[Document]) -> list[str]:
        if not isinstance(documents, list) or not all(isinstance(each, Document) for each in documents):
            raise TypeError(
                "EmbedqDocumentEmbedder takes a list of documents; for a text there is EmbedqTextEmbedder"
            )
        return [self._around(self._separator.join(self._parts(document))) for document in documents]

    def _parts(self, document: Document) -> list[str]:
        fields = [document.meta.get(name) for name in self._fields]
        return [*(str(field) for field in fields if field is not None), document.content or ""]


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError("EmbedqTextEmbedder takes a string; for documents there is EmbedqDocumentEmbedder")
    return text


def _of_text(found: Embeddings) -> dict[str, Any]:
    return {"embedding": found[0].tolist(), "meta": _meta(found)}


def _of_documents(documents: list[Document], found: Embeddings) -> dict[str, Any]:
    vectors = found.vectors.tolist()
    embedded = [replace(each, embedding=vector) for each, vector in zip(documents, vectors, strict=True)]
    return {"documents": embedded, "meta": _meta(found)}


def _nothing() -> dict[str, Any]:
    return {"documents": [], "meta": {}}


def _meta(found: Embeddings) -> dict[str, Any]:
    tokens = found.total_tokens
    return {
        "model": found.model,
        "model_version": found.model_version,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
