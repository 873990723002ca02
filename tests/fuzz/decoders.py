"""Every decoder of bytes that others write, as a fuzzer calls it: how inputs are drawn, and what may come of them.

A `Decoder` is made for a seed; `run(number)` draws the input of that number, hands it to the decoder, and checks what came
out. It raises only what nobody documented: an exception of another kind, or a `Finding` for a wrong outcome.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Final, get_args
from zlib import crc32

import msgspec
import numpy as np
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from embedq_consumer.cache.entries import CachedVector, EntryCodec, cache_key
from embedq_consumer.engine import ModelError, Text
from embedq_consumer.engine.model_directory import read_directory
from embedq_consumer.shapes import BadRow, Embeddable, FlatAnswer
from embedq_sdk.embeddings import FinishedJob, ReadFailure, assemble, job_failed
from embedq_sdk.errors import EmbedError
from embedq_sdk.reply_checks import Asked, BadReply, check_whole, read_checked
from embedq_shared import headers
from embedq_shared.codec import (
    BadJob,
    decode_control,
    decode_job,
    decode_result,
    decode_status,
    encode,
    encode_record,
    format_of,
)
from embedq_shared.fleet import Splits
from embedq_shared.kafka.reading.record_batches import BoundedRecords, Unreadable
from embedq_shared.messages import ErrorCode
from embedq_shared.vectors import quantize
from tests.fuzz.mutator import Mutator, damaged
from tests.helpers.shapes import mapping, reading
from tests.helpers.tiny_models import make_tiny_gemma3

_MOST_MESSAGE: Final = 1000
"""Characters of an error's message: it names a field and what was expected, and quotes nothing long."""
_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoders of control, status and result records say that they raise."""
_CODES: Final = frozenset(get_args(ErrorCode))
_VERSION: Final = "sha256:" + "ab" * 32


class Finding(Exception):
    """The decoder did not raise, and what it returned is wrong."""


class Decoder(ABC):
    """One decoder under a fuzzer."""

    name: ClassVar[str]

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def input(self, number: int) -> Any:
        """The input of this number; equal for equal seeds."""

    @abstractmethod
    def decode(self, given: Any) -> str:
        """Decode it; what came of it, in a word.

        Raises:
            Exception: anything is a finding.
        """

    def close(self) -> None:
        """Take away what it made."""
        return


class _Trees(Decoder):
    """Inputs are changed trees, in some formats."""

    examples: ClassVar[list[Any]]
    formats: ClassVar[tuple[str, ...]] = ("json",)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._mutator = Mutator(seed, self.examples, self.formats)

    def input(self, number: int) -> tuple[bytes, str]:
        return self._mutator.input(number)


class JobDecoder(_Trees):
    """`decode_job`, both formats."""

    name = "job"
    formats = ("json", "msgpack")
    examples: ClassVar[list[Any]] = [
        {"input": "a text"},
        {"input": ["one", "two", ""], "id": "j-1", "dimensions": 64, "dtype": "int8"},
        {
            "input": "x",
            "id": "ä",
            "model": "default",
            "input_type": "query",
            "instruction": "find it",
            "truncate": "end",
            "metadata": {"a": [1, 2.5, None, {"b": "c"}]},
            "user": "someone",
            "encoding_format": "base64",
        },
        {"input": ["long " * 50], "chunk": {"mode": "late", "tokens": 64}, "dtype": "float16"},
        {
            "input": "x",
            "chunk": {"mode": "mean"},
            "metadata": {"deep": {"er": {"still": []}}},
            "dtype": "binary",
        },
    ]

    def decode(self, given: Any) -> str:
        data, format = given
        try:
            job = decode_job(data, format)
        except BadJob as bad:
            _check_error(bad)
            return bad.error.code
        written = encode(job, format)
        if encode(decode_job(written, format), format) != written:
            raise Finding("a job that is encoded and decoded is another one")
        return "job"


def _check_error(bad: BadJob) -> None:
    if bad.error.code not in _CODES:
        raise Finding(f"code {bad.error.code}")
    if len(bad.error.message) > _MOST_MESSAGE or len(bad.error.param or "") > 100:
        raise Finding("a message that is as long as the input")
    envelope = bad.envelope
    if envelope.id is not None and not 1 <= len(envelope.id) <= 256:
        raise Finding("an envelope whose id no result may have")
    # A result repeats the envelope: it must be possible to write.
    msgspec.json.encode({"id": envelope.id, "model": envelope.model, "error": bad.error})


class ShapeDecoder(_Trees):
    """`shapes.read` by a mapping of each shape, and the result that it is answered with."""

    name = "shapes"
    formats = ("json", "msgpack")
    examples: ClassVar[list[Any]] = [
        {"id": 1, "text": "a text", "price": 2.5, "tags": ["a"], "__deleted": "false"},
        {
            "schema": {"type": "struct", "fields": [{"field": "id", "type": "int64"}]},
            "payload": {"id": 1, "text": "t"},
        },
        {"before": {"id": 1}, "after": {"id": 1, "text": "t"}, "op": "u", "ts_ms": 1},
        {"before": {"id": 1}, "after": None, "op": "d"},
        {
            "specversion": "1.0",
            "id": "e",
            "source": "/s",
            "type": "t",
            "data": {"text": "t"},
            "data_base64": "eA==",
        },
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"input": ["a", "b"], "dimensions": 64},
        },
        {
            "specversion": "1.0",
            "id": "e",
            "source": "/s",
            "type": "t",
            "data": "x",
            "datacontenttype": "text/plain",
        },
    ]

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        shapes: tuple[dict[str, Any], ...] = (
            {"id": "id", "columns": "*", "output": {"key": "source"}},
            {"shape": "connect", "columns": "*", "output": {"format": "connect"}},
            {"shape": "debezium", "id": "id", "text": "{text}{price?}"},
            {"shape": "cloudevents", "columns": "*", "null_text": "delete"},
            {"shape": "openai-batch"},
        )
        self._mappings = [mapping(**part) for part in shapes]

    def decode(self, given: Any) -> str:
        data, format = given
        headers = [("content-type", b"application/msgpack")] if format == "msgpack" else []
        said = set()
        for one in self._mappings:
            try:
                found = reading(one, data, *headers, key=data[:40])
            except BadRow as bad:
                if bad.code not in _CODES or len(str(bad)) > _MOST_MESSAGE or len(bad.param or "") > 100:
                    raise Finding(f"an error of code {bad.code}, or as long as the input") from None
                continue
            said.add(type(found).__name__)
            if isinstance(found, Embeddable) and isinstance(found.answer, FlatAnswer):
                json.loads(found.answer.value(bytes(8), _VERSION, truncated=False))
        return " ".join(sorted(said)) or "refused"


class HeaderDecoder(Decoder):
    """`headers.parse` and `format_of`, which never raise."""

    name = "headers"
    _names: ClassVar[tuple[str, ...]] = (
        *("correlation-id", "kafka_correlationId", "REPLY_CORRELATION_ID", "reply-topic", "kafka_replyTopic"),
        *(
            "REPLY_TOPIC",
            "reply-partition",
            "kafka_replyPartition",
            "REPLY_PARTITION",
            "deadline",
            "content-type",
        ),
        *("Content-Type", "traceparent", "tracestate", "__TypeId__", "", "ä", "embedq-status", "x" * 1000),
    )
    _values: ClassVar[tuple[bytes | None, ...]] = (
        *(
            None,
            b"",
            b"embed.replies",
            b"\x00\x00\x00\x05",
            struct.pack(">i", -1),
            struct.pack(">i", 2**31 - 1),
        ),
        *(
            b"1700000000000",
            b"-1",
            b"9" * 18,
            b"9" * 19,
            b"9" * 20,
            b"9" * 5000,
            b"1_000",
            b" 12",
            "١٢".encode(),
        ),
        *(
            b"application/json",
            b"APPLICATION/MsgPack; charset=utf-8",
            b"application/\xff",
            b"..",
            b".",
            b"\xff\xfe",
        ),
    )

    def input(self, number: int) -> list[tuple[str, bytes | None]]:
        draw = random.Random(self.seed * 1_000_003 + number)
        found: list[tuple[str, bytes | None]] = []
        for _ in range(draw.choice((0, 1, 1, 2, 3, 5, 40))):
            value = draw.choice(self._values)
            if value and draw.random() < 0.4:
                value = damaged(value, draw)
            found.append((draw.choice(self._names), value))
        return found

    def decode(self, given: Any) -> str:
        parsed = headers.parse(given)
        if len(parsed.echo) > 5 or any((name, value) not in given for name, value in parsed.echo if value):
            raise Finding("an echo that nobody sent")
        if parsed.reply_topic is not None and not 1 <= len(parsed.reply_topic) <= 249:
            raise Finding("a reply topic that is no name")
        if parsed.reply_partition is not None and not 0 <= parsed.reply_partition < 2**31:
            raise Finding("a reply partition that cannot be")
        if parsed.deadline_ms is not None and not 0 <= parsed.deadline_ms < 2**63:
            raise Finding("a deadline that cannot be")
        for problem in (parsed.bad_address, parsed.bad_deadline):
            if problem is not None and (problem.code not in _CODES or len(problem.message) > _MOST_MESSAGE):
                raise Finding(f"an error that is none: {problem}")
        format_of(parsed.content_type)
        return "bad" if parsed.bad_address or parsed.bad_deadline else "read"


def _result(format: str, dtype: str, count: int, **more: Any) -> dict[str, Any]:
    vector = np.arange(1, 65, dtype=np.float32) / np.float32(300)
    raw, scale = quantize(vector, dtype)  # type: ignore[arg-type]
    embedding: Any = raw if format == "msgpack" else vector.tolist()
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": embedding,
            "tokens": 3,
            "truncated": False,
            "cached": index % 2 == 0,
            "error": None,
            **({"scale": scale} if scale is not None else {}),
        }
        for index in range(count)
    ]
    return {
        "object": "list",
        "id": "j",
        "model": "default",
        "model_version": _VERSION,
        "dimensions": 64,
        "dtype": dtype,
        "data": data,
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
        "timings": {"queue": 0.1, "tokenize": None, "compute": 0.2},
        "metadata": {"a": 1},
        "part": 0,
        "parts": 1,
        **more,
    }


_FAILURE: Final[dict[str, Any]] = {
    "object": "error",
    "id": "j",
    "model": "default",
    "model_version": _VERSION,
    "error": {"code": "malformed", "message": "expected", "param": None, "retryable": False},
    "metadata": None,
}


def _spans() -> dict[str, Any]:
    found = _result("json", "float32", 3)
    for index, datum in enumerate(found["data"]):
        datum |= {"index": index // 2, "span": [10 * index, 10 * index + 9]}
    return found


def _partly() -> dict[str, Any]:
    found = _result("json", "float32", 2, part=1, parts=3)
    found["data"][1] |= {"embedding": None, "error": _FAILURE["error"] | {"param": "input[1]"}}
    return found


class ResultDecoder(_Trees):
    """`decode_result`, the strict reader of the contract's own other half."""

    name = "result"
    formats = ("json", "msgpack")
    examples: ClassVar[list[Any]] = [
        _result("json", "float32", 2),
        _result("msgpack", "float16", 1),
        _result("msgpack", "int8", 2),
        _partly(),
        _spans(),
        _FAILURE,
    ]

    def decode(self, given: Any) -> str:
        data, format = given
        try:
            found = decode_result(data, format)
        except _UNDECODABLE as error:
            return type(error).__name__
        return type(found).__name__


class ReplyDecoder(_Trees):
    """What the SDK makes of a reply, up to arrays: only its documented errors come out."""

    name = "reply"
    formats = ("json", "msgpack")
    examples = ResultDecoder.examples
    _asked: ClassVar[tuple[Asked, ...]] = (
        Asked(),
        Asked(count=2, dtype="float32", dimensions=64, late=False),
        Asked(count=2, late=True),
    )

    def decode(self, given: Any) -> str:
        data, format = given
        try:
            reply = read_checked(data, b"application/msgpack" if format == "msgpack" else None)
            if isinstance(reply, ReadFailure):
                str(job_failed(reply.error))
                return "failure"
            asked = self._asked[len(data) % len(self._asked)]
            check_whole([reply], asked)
        except BadReply as bad:
            if len(str(bad)) > _MOST_MESSAGE:
                raise Finding("a message that is as long as the reply") from bad
            return "bad"
        count = asked.count or 1 + max(datum.index for datum in reply.data)
        try:
            made = assemble([FinishedJob(count=count, outcome=[reply])])
            made.checked()
        except EmbedError:
            return "error"
        if not np.isfinite(made.vectors).all():
            raise Finding("vectors that are not finite")
        return "embeddings"


class ControlDecoder(_Trees):
    """`decode_control`."""

    name = "control"
    examples: ClassVar[list[Any]] = [
        {"alias": "default", "version": 3, "path": "model-b", "command_id": "c-1"},
        {
            "alias": "default",
            "version": 2**40,
            "path": "/models/b",
            "command_id": "c" * 256,
            "digest": _VERSION,
            "policy": "resource_preserving",
            "min_cosine": 0.98,
            "fallback": "model-a",
        },
    ]

    def decode(self, given: Any) -> str:
        try:
            found = decode_control(given[0])
        except _UNDECODABLE as error:
            return type(error).__name__
        if decode_control(encode_record(found)) != found:
            raise Finding("a command that is encoded and decoded is another one")
        return "control"


class SplitDecoder(_Trees):
    """`Splits.see`, which raises nothing, whatever lies on the control topic."""

    name = "split"
    examples: ClassVar[list[Any]] = [
        {"alias": "ab", "version": 3, "command_id": "c-1", "split": {"a": 90, "b": 10}},
        {"alias": "ab", "version": 4, "command_id": "c-2", "split": {}},
        {"alias": "ab", "version": 2, "path": "model-b", "command_id": "c-3"},
    ]

    def decode(self, given: Any) -> str:
        splits = Splits()
        splits.see(b"ab", given[0])
        found = splits.newest("ab")
        if found is None:
            return "nothing"
        again = Splits()
        again.see(b"ab", encode_record(found))
        if again.newest("ab") != found:
            raise Finding("a split that is encoded and decoded is another one")
        if (splits.target("ab", "id") in found.split) != bool(found.split):
            raise Finding("a job of a split has another owner than its shares")
        return "split"


class StatusDecoder(_Trees):
    """`decode_status`."""

    name = "status"
    examples: ClassVar[list[Any]] = [
        {
            "replica": "host-1",
            "alias": "default",
            "version": None,
            "step": "serving",
            "state": "READY",
            "model_version": _VERSION,
            "error": None,
            "at": 1_700_000_000_000,
        },
        {
            "replica": "host-2",
            "alias": "default",
            "version": 7,
            "step": "check",
            "state": "FAILED",
            "model_version": None,
            "error": "config.json: expected",
            "at": 0,
            "command_id": "c-1",
        },
    ]

    def decode(self, given: Any) -> str:
        try:
            found = decode_status(given[0])
        except _UNDECODABLE as error:
            return type(error).__name__
        if decode_status(encode_record(found)) != found:
            raise Finding("a status that is encoded and decoded is another one")
        return "status"


class BatchDecoder(Decoder):
    """`BoundedRecords`: what a fetch brought, in every format and codec; nothing but a broker's fault raises."""

    name = "batches"
    _limit: ClassVar[int] = 1 << 20

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        records = [
            (b"key", b"value " * 20, [("a header", b"x"), ("ä", b"")]),
            (None, b"", []),
            (b"k", None, []),
        ]
        self._batches = [_batch(codec, records, magic=2) for codec in range(5)]
        self._batches += [_batch(codec, records[:1], magic=magic) for codec in (0, 1) for magic in (0, 1)]

    def input(self, number: int) -> bytes:
        draw = random.Random(self.seed * 1_000_003 + number)
        parts = [draw.choice(self._batches) for _ in range(draw.choice((1, 1, 2, 3)))]
        at = draw.randrange(len(parts))
        kept = bytearray(damaged(parts[at], draw))
        if draw.random() < 0.7 and len(kept) > 61:
            _seal(kept)  # else the checksum alone would stop nearly all of them
        parts[at] = bytes(kept)
        return b"".join(parts) if draw.random() < 0.9 else damaged(b"".join(parts), draw)

    def decode(self, given: Any) -> str:
        found = BoundedRecords(given, self._limit)
        seen = unreadable = size = 0
        try:
            while found.has_next():
                batch = found.next_batch()
                batch.validate_crc()
                if batch.is_control_batch:
                    continue
                for record in batch:
                    seen += 1
                    size += len(record.value or b"")
                    unreadable += isinstance(record.value, Unreadable)
                    if seen > len(given) + 10_000:
                        raise Finding("records without end")
        except CorruptRecordException:
            return "broker's fault"
        if size > 3 * self._limit:
            raise Finding("more bytes than the ceiling")
        return "unreadable" if unreadable else "read"


def _batch(codec: int, records: list[tuple[Any, Any, list[tuple[str, bytes]]]], *, magic: int) -> bytes:
    if magic == 2:
        new = DefaultRecordBatchBuilder(
            magic=2,
            compression_type=codec,
            is_transactional=0,
            producer_id=7,
            producer_epoch=1,
            base_sequence=3,
            batch_size=100_000,
        )
    else:
        new = LegacyRecordBatchBuilder(magic=magic, compression_type=codec, batch_size=100_000)
    for offset, (key, value, named) in enumerate(records):
        extra = {"headers": named} if magic == 2 else {}
        new.append(offset, timestamp=1_700_000_000_000, key=key, value=value, **extra)
    return bytes(new.build())


def _seal(batch: bytearray) -> None:
    """Give a batch the length and the checksum that its bytes have now."""
    struct.pack_into(">i", batch, 8, len(batch) - 12)
    if batch[16] < 2:
        struct.pack_into(">I", batch, 12, crc32(batch[16:]))
    else:
        struct.pack_into(">I", batch, 17, calc_crc32c(bytes(batch[21:])))


class CacheDecoder(Decoder):
    """`EntryCodec.unpack`: what is not our own entry for this very key is a miss with a reason."""

    name = "cache"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._codec = EntryCodec(b"s" * 32)
        self._entries: list[tuple[bytes, bytes]] = []
        vector = np.ones(64, dtype=np.float32) / np.float32(8)
        for number, dtype in enumerate(("float32", "float16", "int8", "binary")):
            raw, scale = quantize(vector, dtype)  # type: ignore[arg-type]
            key = cache_key(_VERSION, Text(f"text {number}"), 64, dtype)
            entry = CachedVector(tokens=3, truncated="", scale=scale, vector=raw)
            self._entries.append((key, self._codec.pack(key, entry)))

    def input(self, number: int) -> tuple[bytes, bytes]:
        draw = random.Random(self.seed * 1_000_003 + number)
        key, own = draw.choice(self._entries)
        other = draw.choice(self._entries)[1]
        match draw.randrange(5):
            case 0:
                return key, draw.randbytes(draw.choice((0, 1, len(own), len(own), 500)))
            case 1:
                return key, other
            case 2:
                cut = draw.randrange(len(own))
                return key, own[:cut] + other[cut:]
            case _:
                return key, damaged(own, draw)

    def decode(self, given: Any) -> str:
        key, value = given
        found = self._codec.unpack(key, value)
        if not isinstance(found, CachedVector):
            return found
        if dict(self._entries)[key] != value:
            raise Finding("an entry that nobody with the key wrote was taken")
        return "hit"


class ModelFileDecoder(Decoder):
    """`read_directory` over a directory one of whose files was changed: JSON files by structure, weights in their header."""

    name = "model"
    _files: ClassVar[tuple[str, ...]] = (
        *("config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "tokenizer_config.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "model.safetensors"),
        *("model.safetensors.index.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    )

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._root = Path(tempfile.mkdtemp(prefix="embedq-fuzz-", dir=_fast_folder()))
        self._model = make_tiny_gemma3(self._root / "model", dense=((128, "Tanh", True),))
        (self._model / "sentence_bert_config.json").write_text(
            '{"max_seq_length": 64, "do_lower_case": false}'
        )
        (self._model / "tokenizer.json").write_text(
            '{"version": "1.0", "model": {"type": "WordPiece", "vocab": {}}}'
        )
        self._good = {
            name: (self._model / name).read_bytes() for name in self._files if (self._model / name).exists()
        }
        self._mutators = {
            name: Mutator(seed, [json.loads(data)])
            for name, data in self._good.items()
            if name.endswith(".json")
        }
        header = {name: _header(data) for name, data in self._good.items() if name.endswith(".safetensors")}
        self._headers = {name: Mutator(seed, [tree]) for name, tree in header.items()}

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def input(self, number: int) -> tuple[str, bytes | None]:
        draw = random.Random(self.seed * 1_000_003 + number)
        name = draw.choice(list(self._good))
        if draw.random() < 0.01:
            return name, None  # not there
        if name.endswith(".json"):
            return name, self._mutators[name].input(number)[0]
        data = self._good[name]
        length = int.from_bytes(data[:8], "little")
        changed = self._headers[name].input(number)[0]
        claimed = (
            len(changed) if draw.random() < 0.8 else draw.choice((0, 1, length, 2**31, 2**63, 2**64 - 1))
        )
        return name, claimed.to_bytes(8, "little") + changed + data[8 + length :]

    def decode(self, given: Any) -> str:
        name, data = given
        file = self._model / name
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        try:
            read_directory(self._model)
        except ModelError as error:
            if len(str(error)) > 3 * _MOST_MESSAGE:
                raise Finding("a message that is as long as the file") from error
            return "refused"
        finally:
            file.write_bytes(self._good[name])
        return "read"


def _header(data: bytes) -> Any:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])


def _fast_folder() -> str | None:
    """Memory instead of a disk, where there is such a folder."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


DECODERS: Final[dict[str, type[Decoder]]] = {
    kind.name: kind
    for kind in (
        JobDecoder,
        ShapeDecoder,
        HeaderDecoder,
        ResultDecoder,
        ReplyDecoder,
        ControlDecoder,
        SplitDecoder,
        StatusDecoder,
        BatchDecoder,
        CacheDecoder,
        ModelFileDecoder,
    )
}

__all__ = ["DECODERS", "Decoder", "Finding"]
