"""What a topic that is followed holds: documents to embed, or results that have their vectors. Neither does any I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import pyarrow as pa

from embedq_batch.content.columns import Columns, fitted
from embedq_batch.content.documents import DocumentReader, document_of
from embedq_batch.content.inference import following
from embedq_batch.content.rows import Problem, RowBatch, RowId, VectorBatch
from embedq_batch.running.embedding import span_id
from embedq_sdk.embeddings import Embeddings
from embedq_sdk.reply_checks import BadReply, read_checked
from embedq_sdk.result_reader import JobResult, ResultCollector
from embedq_shared import topics as names
from embedq_shared.headers import value_of
from embedq_shared.kafka import Polled, UnreadableRecord


class Taken(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What some records hold."""

    rows: RowBatch | None = None
    """To be embedded; and the ids that are to be deleted."""
    vectors: list[VectorBatch] = []
    """To be written as they are."""
    problems: list[tuple[Polled, Problem]] = []
    """Records of which nothing can be made."""
    origins: dict[RowId, Polled] = {}
    """The record that each row, or vector, is of."""


class Feed(Protocol):
    """Makes rows or vectors of a topic's records."""

    keep: Sequence[str]
    """The columns that go along."""
    there: pa.Schema | None
    """Their types, as far as the store has them."""
    kept: pa.Schema | None
    """Their types in what was taken last; None: none go along."""

    def take(self, records: Sequence[Polled]) -> Taken:
        """What some records hold, in their order."""

    def committable(self) -> dict[int, int]:
        """For each partition the offset to commit, once all that was taken is stored."""

    def forget(self, partitions: Sequence[int]) -> None:
        """These partitions belong to another member now."""


class DocumentFeed:
    """Documents as connectors write them. Of those with one id in a poll the last one counts."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.keep: Sequence[str] = columns.keep
        self.there: pa.Schema | None = None
        self.kept: pa.Schema | None = None
        self._reader = DocumentReader(columns, None)
        self._next: dict[int, int] = {}

    def take(self, records: Sequence[Polled]) -> Taken:
        documents = [document_of(record, self._columns.id) for record in records]
        if self.keep:
            found = [each.record for each in documents if isinstance(each.record, dict)]
            self.kept = following(found, self.keep, self.there)
            self._reader = DocumentReader(self._columns, self.kept)
        for record in records:
            self._next[record.partition] = record.offset + 1
        origins: dict[RowId, Polled] = {
            str(each.id): record for each, record in zip(documents, records, strict=True)
        }
        return Taken(rows=self._reader.batch(documents), origins=origins)

    def committable(self) -> dict[int, int]:
        return dict(self._next)

    def forget(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._next.pop(partition, None)


class ResultFeed:
    """Results of submitted jobs. A job of one text has its id in the store, one of several `ID#0`, `ID#1`, …, and with late chunks each of
    these has its spans; what is kept comes from the job's metadata. Of results with one id in a poll the last one counts.

    With `version` a result of another model version is a problem.
    """

    def __init__(self, columns: Columns, version: str | None = None) -> None:
        self._version = version
        self.keep: Sequence[str] = columns.keep
        self.there: pa.Schema | None = None
        self.kept: pa.Schema | None = None
        # A store is upserted: a repeat changes nothing there, and a text that was submitted again under its id is another one.
        self._collector = ResultCollector(remember=0)

    def take(self, records: Sequence[Polled]) -> Taken:
        problems: list[tuple[Polled, Problem]] = []
        vectors: dict[str, VectorBatch] = {}
        origins: dict[RowId, Polled] = {}
        results: list[tuple[Polled, JobResult]] = []
        for record in records:
            result = self._result(record)
            if isinstance(result, Problem):
                problems.append((record, result))
            elif result is not None:
                results.append((record, result))
        if self.keep:
            self.kept = following([_columns(result.metadata) for _, result in results], self.keep, self.there)
        for record, result in results:
            if result.embeddings is None:
                problems.append((record, Problem(type(result.error).__name__, str(result.error))))
                continue
            for row, error in result.embeddings.errors.items():
                problems.append((record, Problem(type(error).__name__, f"input {row}: {error}")))
            batch = self._batch(str(result.id), result.embeddings, _columns(result.metadata))
            if isinstance(batch, Problem):
                problems.append((record, batch))
                continue
            if not len(batch):
                continue
            if self._version not in (None, batch.model_version):
                message = f"expected a vector of {self._version}, got one of {batch.model_version}"
                problems.append((record, Problem("unknown_model_version", message)))
                continue
            vectors.pop(str(result.id), None)
            vectors[str(result.id)] = batch
            origins.update(dict.fromkeys(batch.rows or batch.ids, record))
        for record in records:
            self._collector.taken(record.partition, record.offset)
        return Taken(vectors=list(vectors.values()), problems=problems, origins=origins)

    def committable(self) -> dict[int, int]:
        return self._collector.committable()

    def forget(self, partitions: Sequence[int]) -> None:
        self._collector.forget(partitions)

    def _result(self, record: Polled) -> JobResult | Problem | None:
        if isinstance(record, UnreadableRecord):
            return Problem("malformed", record.reason)
        try:
            reply = read_checked(record.value, value_of(record.headers, names.CONTENT_TYPE))
            return self._collector.add(record.partition, record.offset, reply, len(record.value or b""))
        except BadReply as bad:
            return Problem("malformed", str(bad))

    def _batch(self, id: str, found: Embeddings, metadata: dict[str, Any]) -> VectorBatch | Problem:
        good = [row for row in range(len(found)) if row not in found.errors]
        rows: list[RowId] = [id if found.count == 1 else f"{id}#{found.inputs[row]}" for row in good]
        ids, spans = rows, None
        if found.spans is not None:
            seen: Counter[RowId] = Counter()
            ids = []
            for row in rows:
                ids.append(span_id(row, seen[row]))
                seen[row] += 1
            spans = found.spans[good].astype(np.int32)
        kept = None
        if self.kept is not None:
            texts: list[str | Problem] = [""] * len(good)
            records = [{name: metadata.get(name) for name in self.keep}] * len(good)
            kept = fitted(records, self.kept, texts)
            for text in texts:
                if isinstance(text, Problem):
                    return text
        return VectorBatch(
            ids=ids,
            vectors=found.vectors[good],
            model_version=str(next((found.model_versions[row] for row in good), "")),
            tokens=found.tokens[good].astype(np.int32),
            rows=None if spans is None else rows,
            spans=spans,
            kept=kept,
        )


def _columns(metadata: Any) -> dict[str, Any]:
    return metadata if isinstance(metadata, dict) else {}
