"""Milvus: the entities of a collection, with their dynamic fields."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import grpc
from pymilvus import MilvusClient, MilvusException

from embedq_batch.content.addresses import without_password
from embedq_batch.content.columns import Columns
from embedq_batch.content.inference import LOOKED_AT
from embedq_batch.content.rows import BATCH_ROWS, RowBatch
from embedq_batch.content.stored import StoredRecords
from embedq_batch.errors import BadSource


class MilvusSource(StoredRecords):
    """A collection, or what an alias means."""

    def __init__(self, address: str, collection: str, columns: Columns) -> None:
        super().__init__(columns)
        self._address = address
        self._collection = collection
        self._client: MilvusClient | None = None

    @property
    def name(self) -> str:
        return f"milvus:{without_password(self._address)}#{self._collection}"

    def open(self) -> None:
        self._call(lambda client: client.load_collection(self._collection))
        found = self._call(
            lambda client: client.query(
                self._collection,
                limit=LOOKED_AT,
                output_fields=["*"],
                consistency_level="Strong",
            )
        )
        self._look([dict(each) for each in found], self.name)

    def count(self) -> int | None:
        found = self._call(
            lambda client: client.query(
                self._collection, output_fields=["count(*)"], consistency_level="Strong"
            )
        )
        return int(found[0]["count(*)"])

    def batches(self) -> Iterator[RowBatch]:
        return self._rows(self._pages())

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _pages(self) -> Iterator[list[dict[str, Any]]]:
        pages = self._call(
            lambda client: client.query_iterator(
                self._collection,
                batch_size=BATCH_ROWS,
                output_fields=self._columns.names,
                consistency_level="Strong",
            )
        )
        try:
            while page := self._call(lambda _: pages.next()):
                yield [dict(each) for each in page]
        finally:
            pages.close()

    def _call(self, function: Any) -> Any:
        try:
            if self._client is None:
                self._client = MilvusClient(self._address, token=os.environ.get("MILVUS_TOKEN", ""))
            return function(self._client)
        except (MilvusException, grpc.RpcError, OSError, ValueError) as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadSource(source=self.name, reason=said) from None
