"""Qdrant: the points of a collection, by their payload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qdrant_client import QdrantClient
from qdrant_client.http.exceptions import ApiException

from embedq_batch.clients.qdrant import connected, let_go
from embedq_batch.content.addresses import without_password
from embedq_batch.content.columns import Columns
from embedq_batch.content.inference import LOOKED_AT
from embedq_batch.content.rows import BATCH_ROWS, RowBatch
from embedq_batch.content.stored import StoredRecords
from embedq_batch.errors import BadSource


class QdrantSource(StoredRecords):
    """A collection, or what an alias means. A point's id is the `id` of its payload, or else its own."""

    def __init__(self, address: str, collection: str, columns: Columns) -> None:
        super().__init__(columns)
        self._address = address
        self._collection = collection
        self._client: QdrantClient | None = None

    @property
    def name(self) -> str:
        return f"qdrant:{without_password(self._address)}#{self._collection}"

    def open(self) -> None:
        self._look(next(self._pages(LOOKED_AT)), self.name)

    def count(self) -> int | None:
        found = self._call(lambda client: client.count(self._collection, exact=True))
        return int(found.count)

    def batches(self) -> Iterator[RowBatch]:
        return self._rows(self._pages(BATCH_ROWS, self._columns.names))

    def close(self) -> None:
        if self._client is not None:
            let_go(self._address, self._client)
            self._client = None

    def _pages(self, rows: int, names: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
        """The payloads, so many at a time; at least one page."""
        after: Any = None
        while True:
            points, after = self._call(
                lambda client, after=after: client.scroll(
                    self._collection, limit=rows, offset=after, with_payload=names or True, with_vectors=False
                )
            )
            yield [{"id": point.id} | (point.payload or {}) for point in points]
            if after is None:
                return

    def _call(self, function: Any) -> Any:
        try:
            if self._client is None:
                self._client = connected(self._address)
            return function(self._client)
        except (ApiException, ValueError, RuntimeError, OSError) as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadSource(source=self.name, reason=said) from None
