"""Qdrant: a collection whose points are upserted by id. A server, or a folder of its client's local mode."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from embedq_batch.clients.qdrant import connected, let_go
from embedq_batch.content.addresses import without_password
from embedq_batch.content.payloads import payloads
from embedq_batch.content.rows import RowId, Shape, VectorBatch, VectorType
from embedq_batch.errors import BadTarget, RowsRefused, TargetAway
from embedq_batch.manifest.place import of_collection
from embedq_batch.sinks.arrow import arrow_schema
from embedq_batch.sinks.sink import PartsRecord

_NAMES: Final = uuid.UUID("9b0f6f0e-6f0f-5d0e-8f5c-2f6d1c0b7a11")
"""In which ids that are text become UUIDs, the only other ids that Qdrant has."""
_BUSY: Final = 429


class QdrantSink:
    """A collection with cosine distance. Its payload has `id`, `model_version`, `tokens`, what is kept, and with spans `row`,
    `start` and `end`. Ids that are not integers from 0 on become UUIDs, always the same ones.

    The key of a server that asks for one is in QDRANT_API_KEY.
    """

    dtypes = frozenset[VectorType]({"float32", "float16"})

    def __init__(self, address: str, collection: str) -> None:
        self._address = address
        self._collection = collection
        self._client: QdrantClient | None = None
        self._shape: Shape | None = None
        self._rows_indexed = False

    @property
    def name(self) -> str:
        return f"qdrant:{without_password(self._address)}#{self._collection}"

    @property
    def manifest(self) -> Path:
        return of_collection(self._address, self._collection, self.name)

    def open(self, shape: Shape, record: PartsRecord, *, force: bool) -> None:
        arrow_schema(shape)  # kept columns have other names than ours
        self._shape = shape
        try:
            client = self._connected()
            if not client.collection_exists(self._collection):
                kind = models.Datatype.FLOAT16 if shape.dtype == "float16" else models.Datatype.FLOAT32
                client.create_collection(
                    self._collection,
                    vectors_config=models.VectorParams(
                        size=shape.width, distance=models.Distance.COSINE, datatype=kind
                    ),
                )
            found = client.get_collection(self._collection).config.params.vectors
        except (ApiException, ValueError, RuntimeError, OSError) as error:
            raise BadTarget(target=self.name, reason=_said(error)) from None
        if not isinstance(found, models.VectorParams) or found.size != shape.width:
            there = f"{found.size}" if isinstance(found, models.VectorParams) else "vectors with names"
            raise BadTarget(target=self.name, reason=f"expected vectors of {shape.width}, got {there}")

    def write(self, batch: VectorBatch) -> int:
        if self._shape is None:
            raise RuntimeError("a collection is written before it is opened. This is a bug.")
        if batch.vectors.shape[1] != self._shape.width:
            raise BadTarget(
                target=self.name,
                reason=f"expected vectors of {self._shape.width}, got {batch.vectors.shape[1]} from another model",
            )
        points = models.Batch(
            ids=[point_id(id) for id in batch.ids],
            vectors=batch.vectors.astype(np.float32, copy=False).tolist(),
            payloads=payloads(batch),
        )
        self._call(lambda client: client.upsert(self._collection, points, wait=True))
        return 0

    def flush(self) -> int:
        return 0

    def delete(self, ids: Sequence[RowId]) -> None:
        chosen = models.PointIdsList(points=[point_id(id) for id in ids])
        self._call(lambda client: client.delete(self._collection, chosen, wait=True))

    def kept_types(self, names: Sequence[str]) -> None:
        return None  # what is kept has no types here

    def delete_spans(self, rows: Sequence[RowId], but: Sequence[RowId]) -> None:
        if not self._rows_indexed and "://" in self._address:  # the local mode has no indexes
            kind = models.PayloadSchemaType.KEYWORD
            self._call(lambda client: client.create_payload_index(self._collection, "row", kind))
        self._rows_indexed = True
        surplus = models.Filter(
            must=[models.FieldCondition(key="row", match=models.MatchAny(any=list(map(str, rows))))],
            must_not=[models.HasIdCondition(has_id=[point_id(id) for id in but])],
        )
        chosen = models.FilterSelector(filter=surplus)
        self._call(lambda client: client.delete(self._collection, chosen, wait=True))

    def finish(self, record: PartsRecord) -> None:
        pass

    def complete(self) -> bool:
        return True

    def fetch(self, ids: Sequence[RowId]) -> dict[RowId, npt.NDArray[np.float32]]:
        points = self._asked(
            lambda client: client.retrieve(
                self._collection, [point_id(id) for id in ids], with_payload=True, with_vectors=True
            )
        )
        return {(point.payload or {})["id"]: np.asarray(point.vector, np.float32) for point in points}

    def point(self, alias: str) -> str | None:
        """An alias of the collection, moved in one request."""
        try:
            client = self._connected()
            known = {each.alias_name: each.collection_name for each in client.get_aliases().aliases}
            operations: list[Any] = []
            if alias in known:
                operations.append(
                    models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
                )
            operations.append(
                models.CreateAliasOperation(
                    create_alias=models.CreateAlias(collection_name=self._collection, alias_name=alias)
                )
            )
            client.update_collection_aliases(operations)
        except (ApiException, ValueError, RuntimeError, OSError) as error:
            raise BadTarget(target=self.name, reason=_said(error)) from None
        return known.get(alias)

    def close(self) -> None:
        if self._client is not None:
            let_go(self._address, self._client)
            self._client = None

    def _connected(self) -> QdrantClient:
        if self._client is None:
            self._client = connected(self._address)
        return self._client

    def stored(self, version: str | None = None) -> int:
        chosen = None
        if version is not None:
            match = models.FieldCondition(key="model_version", match=models.MatchValue(value=version))
            chosen = models.Filter(must=[match])
        found = self._asked(lambda client: client.count(self._collection, count_filter=chosen, exact=True))
        return int(found.count)

    def _asked(self, function: Any) -> Any:
        """What the store says to a question."""
        try:
            return self._call(function)
        except RowsRefused as refused:
            raise BadTarget(target=self.name, reason=refused.reason) from None

    def _call(self, function: Any) -> Any:
        try:
            return function(self._connected())
        except ResponseHandlingException as error:  # no connection, or it broke
            raise TargetAway(target=self.name, reason=_said(error)) from None
        except UnexpectedResponse as error:
            if error.status_code is None or error.status_code >= 500 or error.status_code == _BUSY:
                raise TargetAway(target=self.name, reason=_said(error)) from None
            raise RowsRefused(target=self.name, reason=_said(error)) from None
        except ValueError as error:  # of the local mode
            raise RowsRefused(target=self.name, reason=_said(error)) from None


def point_id(id: RowId) -> int | str:
    """An id as Qdrant has it."""
    return id if isinstance(id, int) and id >= 0 else str(uuid.uuid5(_NAMES, str(id)))


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
