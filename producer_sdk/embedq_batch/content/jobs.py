"""Jobs that were submitted, as documents: the texts of which `embedq sink --from results` stored the vectors. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from embedq_batch.content.documents import Document
from embedq_shared.codec import BadJob, decode_job, format_of
from embedq_shared.headers import parse
from embedq_shared.kafka import Polled, UnreadableRecord

TEXT: Final = "text"
"""The column that a job's text is; the others are those of its metadata."""


def documents_of(record: Polled) -> list[Document]:
    """A job's texts under the ids that their vectors have: the job's own for one text, `ID#0`, `ID#1`, … for several.

    A job with a reply address is somebody's question and has no place in a store. One that cannot be read never had a vector.
    """
    if isinstance(record, UnreadableRecord):
        return []
    headers = parse(record.headers)
    format = format_of(headers.content_type)
    if headers.address_header is not None or format is None:
        return []
    try:
        job = decode_job(record.value, format)
    except BadJob:
        return []
    id = job.id or f"{record.topic}-{record.partition}-{record.offset}"
    if isinstance(job.input, str):
        return [Document(id, _columns(job.metadata, format, job.input))]
    names = [id] if len(job.input) == 1 else [f"{id}#{n}" for n in range(len(job.input))]
    return [
        Document(name, _columns(job.metadata, format, text))
        for name, text in zip(names, job.input, strict=True)
    ]


def _columns(metadata: msgspec.Raw, format: str, text: str) -> dict[str, Any]:
    found: Any = None
    if bytes(metadata):
        found = msgspec.json.decode(metadata) if format == "json" else msgspec.msgpack.decode(metadata)
    return {**(found if isinstance(found, dict) else {}), TEXT: text}
