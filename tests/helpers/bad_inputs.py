"""Every kind of bad input that the wire contract names, and a few that it only implies: what is sent, what must come back.

`BAD` are records that get an error, `ODD` records that look wrong and are jobs all the same. Each case is data: the test
sends all of them to one replica, a good job after each, and judges every answer by itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from embedq_shared.messages import MAX_INSTRUCTION_BYTES, MAX_METADATA_BYTES
from embedq_shared.topics import Topics

Headers = tuple[tuple[str, bytes | None], ...]

CANARY: Final = "canary7f3a"
"""Stands in texts, metadata and header values: no error may repeat it."""
NAN_TOKEN: Final = "<|im_start|>"
"""The model under test answers NaN to it."""
HIDDEN: Final = 256
MAX_TEXT_BYTES: Final = 1_000_000
MAX_RESULT_BYTES: Final = 900_000
PARTITIONS: Final = 4
"""Of every topic but control and status."""

MSGPACK: Final = ("content-type", b"application/msgpack")


@dataclass(frozen=True)
class Bad:
    """A record, and the error that it must get.

    `id` is the one that the answer repeats, None where it cannot be read. `input` is the place in a list of an input that
    fails alone. `buried`: copied to the dead letters; `whole`: with its value, since that fits there. `ran`: the
    model took it up, so the answer says which. `bare`: the answer has no room for the record's own key, or headers.
    """

    name: str
    value: bytes | None
    code: str
    param: str | None = None
    headers: Headers = ()
    key: bytes | None = None
    id: str | None = None
    model: str | None = None
    metadata: Any = None
    to: Literal["results", "replies"] = "results"
    partition: int | None = None
    buried: bool = False
    whole: bool = True
    ran: bool = False
    bare: Literal["key", "headers"] | None = None
    input: int | None = None

    @property
    def format(self) -> Literal["json", "msgpack"]:
        """How it is answered."""
        return "msgpack" if MSGPACK in self.headers and self.code != "unsupported_content_type" else "json"


@dataclass(frozen=True)
class Odd:
    """A job, and the texts as the model must get them."""

    name: str
    value: bytes
    texts: tuple[str, ...]
    dimensions: int = HIDDEN
    dtype: str = "float32"
    headers: Headers = ()
    echoed: Headers = ()
    key: bytes | None = None
    id: str | None = None
    metadata: Any = None
    to: Literal["results", "replies"] = "results"
    partition: int | None = None
    base64: bool = False
    truncated: Literal["start", "end"] | None = None

    @property
    def format(self) -> Literal["json", "msgpack"]:
        """How it is answered."""
        kind = dict(self.headers).get("content-type") or b""
        return "msgpack" if b"msgpack" in kind.lower() else "json"


@dataclass
class _Table:
    cases: list[Bad] = field(default_factory=list)

    def job(
        self,
        name: str,
        code: str,
        param: str | None = None,
        /,
        *,
        answer: Mapping[str, Any] = MappingProxyType({}),
        headers: Headers = (),
        key: bytes | None = None,
        **fields: Any,
    ) -> None:
        """A value that is an object in JSON. Its id, model and metadata come back, unless `answer` says otherwise."""
        sent = {"input": f"{CANARY} {name}", "id": name, "metadata": {"case": name, "of": [CANARY]}} | fields
        sent = {field: found for field, found in sent.items() if found is not _ABSENT}
        known: dict[str, Any] = {
            "id": sent["id"], "model": sent.get("model"), "metadata": sent["metadata"], **answer,
        }  # fmt: skip
        if known.get("ran"):
            known["model"] = "default"
        self.cases.append(Bad(name, json.dumps(sent).encode(), code, param, headers, key, **known))

    def raw(self, name: str, value: bytes | None, **about: Any) -> None:
        """A value that does not decode."""
        about.setdefault("buried", True)
        self.cases.append(Bad(name, value, "malformed", **about))

    def packed(self, name: str, value: Any, code: str, param: str | None = None, **about: Any) -> None:
        """The same in MessagePack."""
        data = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
        about.setdefault("headers", (MSGPACK,))
        about.setdefault("buried", code == "malformed")
        self.cases.append(Bad(name, data, code, param, **about))

    def address(self, name: str, *headers: tuple[str, bytes | None], param: str = "reply-topic") -> None:
        """A reply address that can't be used: not computed, answered on the results topic, and kept."""
        self.job(name, "invalid_header", param, headers=headers, answer=_BURIED)


_UNREAD: Final[dict[str, Any]] = {"id": None, "metadata": None}
_BURIED: Final[dict[str, Any]] = {"buried": True}
_RAN: Final[dict[str, Any]] = {"ran": True}
_ABSENT: Final = object()


def _field(name: str) -> dict[str, Any]:
    """A field that no keyword argument could name."""
    return {name: CANARY}


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


# fmt: off
# One case, one line where that can be: the formatter would spread them over a thousand.


def bad_inputs(topics: Topics, poison: str) -> list[Bad]:
    """The table. `poison` is a text with a token that the model under test does not know."""
    table = _Table()
    job, raw, packed, address = table.job, table.raw, table.packed, table.address
    replies = ("reply-topic", topics.replies.encode())

    # -- fields --
    job("input missing", "invalid_value", "input", input=_ABSENT)
    job("input null", "invalid_value", "input", input=None)
    job("input an empty list", "invalid_value", "input", input=[])
    job("input a number", "invalid_value", "input", input=7)
    job("input a boolean", "invalid_value", "input", input=True)
    job("input an object", "invalid_value", "input", input={"text": CANARY})
    job("input tokens", "invalid_value", "input[0]", input=[101, 2023, 102])
    job("input lists of tokens", "invalid_value", "input[0]", input=[[101, 102], [103]])
    job("input nested lists of texts", "invalid_value", "input[1]", input=[CANARY, [CANARY]])
    job("input with a null", "invalid_value", "input[1]", input=[CANARY, None])
    job("2,049 inputs", "too_many_inputs", "input", input=["a"] * 2049)
    job("10,000 inputs", "too_many_inputs", "input", input=[CANARY] * 10_000)
    job("id empty", "invalid_value", "id", id="", answer={"id": None})
    job("id of 257 characters", "invalid_value", "id", id="i" * 257, answer={"id": None})
    job("id a number", "invalid_value", "id", id=7, answer={"id": None})
    job("id of 1 MB", "invalid_value", "id", id=CANARY * 100_000, answer={"id": None})
    job("model unknown", "unknown_model", "model", model=CANARY)
    job("model empty", "unknown_model", "model", model="")
    job("model a number", "invalid_value", "model", model=7, answer={"model": None})
    job("model of 1 MB", "unknown_model", "model", model=CANARY * 100_000, answer={"model": None})
    job("model_version unknown", "unknown_model_version", "model_version", model="default", model_version=CANARY, answer=_RAN)
    job("model_version empty", "invalid_value", "model_version", model_version="")
    job("model_version of 257 characters", "invalid_value", "model_version", model_version="v" * 257)
    job("dimensions 0", "invalid_value", "dimensions", dimensions=0)
    job("dimensions 31", "invalid_value", "dimensions", dimensions=31)
    job("dimensions above the model's", "invalid_value", "dimensions", dimensions=HIDDEN + 1)
    job("dimensions 64.0", "invalid_value", "dimensions", dimensions=64.0)
    job("dimensions true", "invalid_value", "dimensions", dimensions=True)
    job("dimensions text", "invalid_value", "dimensions", dimensions="64")
    job("dimensions negative", "invalid_value", "dimensions", dimensions=-64)
    job("dimensions of 31 digits", "invalid_value", "dimensions", dimensions=10**30)
    job("dimensions a list", "invalid_value", "dimensions", dimensions=[64])
    job("dtype unknown", "invalid_value", "dtype", dtype="float64")
    job("dtype a number", "invalid_value", "dtype", dtype=32)
    job("binary of 36 dimensions", "invalid_value", "dimensions", dtype="binary", dimensions=36)
    job("encoding_format unknown", "invalid_value", "encoding_format", encoding_format="hex")
    job("input_type unknown", "invalid_value", "input_type", input_type="passage")
    job("instruction a number", "invalid_value", "instruction", instruction=7)
    job(
        "instruction with a document",
        "invalid_value",
        "instruction",
        instruction=CANARY,
        input_type="document",
    )
    job(
        "instruction over its limit",
        "invalid_value",
        "instruction",
        instruction="x" * (MAX_INSTRUCTION_BYTES + 1),
    )
    job("instruction of 900 KB for 2,048 inputs", "invalid_value", "instruction",
        instruction=CANARY * 90_000, input=["a"] * 2048)
    job("truncate unknown", "invalid_value", "truncate", truncate="middle")
    job("truncate a boolean", "invalid_value", "truncate", truncate=True)
    late = {"mode": "late", "tokens": 8}
    job("chunk a string", "invalid_value", "chunk", chunk="late")
    job("chunk a list", "invalid_value", "chunk", chunk=[CANARY])
    job("chunk a number", "invalid_value", "chunk", chunk=256)
    job("chunk without a mode", "invalid_value", "chunk.mode", chunk={"tokens": 64})
    job("chunk without anything", "invalid_value", "chunk.mode", chunk={})
    job("chunk of an unknown mode", "invalid_value", "chunk.mode", chunk={"mode": CANARY})
    job("chunk of mode null", "invalid_value", "chunk.mode", chunk={"mode": None})
    for tokens in (7, 0, -64, 64.0, True, "64", [64], 1e300):
        job(f"chunk of {tokens!r} tokens", "invalid_value", "chunk.tokens", chunk={"mode": "mean", "tokens": tokens})
    job("chunk with an unknown field", "unknown_field", "chunk", chunk={"mode": "late", CANARY: 1})
    job("chunk in a job that may be cut", "invalid_value", "truncate", chunk=late, truncate="end")
    job("more spans than a job may have", "too_many_inputs", "chunk", input="a b " * 10_000, chunk=late, answer=_RAN)
    job("more spans than a job may have, in all texts together", "too_many_inputs", "chunk",
        input=["a b " * 500] * 40, chunk=late, answer=_RAN)
    job("chunks of a text over the service's limit", "text_too_long", "input", chunk=late,
        input="x" * (MAX_TEXT_BYTES + 1), answer=_RAN)
    job("chunks after an instruction of 16 KB", "text_too_long", "input", chunk=late,
        instruction="a" * MAX_INSTRUCTION_BYTES, answer=_RAN)
    for mode in ("late", "mean"):
        job(f"NaN in one chunk, mode {mode}", "non_finite", "input", chunk=late | {"mode": mode},
            input=f"a b c d {NAN_TOKEN} {CANARY} " * 9, answer=_RAN)
        job(f"a chunk that the model cannot run, mode {mode}", "invalid_value", "input", chunk=late | {"mode": mode},
            input="a b c d e f g h i j k l m " + poison, answer=_RAN)
    job("metadata a list", "invalid_value", "metadata", metadata=[CANARY], answer={"metadata": None})
    job("metadata text", "invalid_value", "metadata", metadata=CANARY, answer={"metadata": None})
    job("metadata a number", "invalid_value", "metadata", metadata=7, answer={"metadata": None})
    job(
        "metadata over 16 KB",
        "invalid_value",
        "metadata",
        metadata={"a": "x" * MAX_METADATA_BYTES},
        answer={"metadata": None},
    )
    job(
        "metadata of 5 MB",
        "invalid_value",
        "metadata",
        metadata={"a": CANARY * 500_000},
        answer={"metadata": None},
    )
    job(
        "metadata nested 65 levels",
        "malformed",
        "metadata",
        metadata=_nested(64),
        answer={"metadata": None, "buried": True},
    )
    job("unknown field", "unknown_field", "inputs", inputs=CANARY)
    job("unknown field: a known one in capitals", "unknown_field", "Input", Input=CANARY)
    job("unknown field without a name", "unknown_field", "", **_field(""))
    job("unknown field with a name of 10 KB", "unknown_field", "n" * 64 + "…", **_field("n" * 10_000))

    # -- values that do not decode --
    raw("value empty", b"")
    raw("value null", None)
    raw("value blank", b"   \n")
    raw("value cut short", b'{"input": "' + CANARY.encode())
    raw("value with a BOM", b'\xef\xbb\xbf{"input": "a"}')
    raw("value in UTF-16", '{"input": "a"}'.encode("utf-16"))
    raw("text that is not UTF-8", b'{"id": "x", "input": "' + CANARY.encode() + b'\xff"}')
    raw("metadata that is not UTF-8", b'{"input": "a", "metadata": {"a": "\xff"}}')
    raw("lone surrogate", b'{"input": "\\ud800"}')
    raw("lone surrogate in metadata", b'{"input": "a", "metadata": {"a": "\\udfff"}}')
    raw("NaN", b'{"input": "a", "dimensions": NaN}')
    raw("Infinity in metadata", b'{"input": "a", "metadata": {"a": Infinity}}')
    raw("-Infinity in user", b'{"input": "a", "user": -Infinity}')
    raw("a number that no double holds", b'{"input": "a", "id": "n", "metadata": {"a": 1e999}}',
        param="metadata", id="n")
    for digits in (310, 4300):
        raw(f"an integer of {digits} digits", b'{"input": "a", "id": "n", "metadata": {"a": ' + b"9" * digits + b"}}",
            param="metadata", id="n")
    raw("bytes after the object", b'{"input": "a"} ' + CANARY.encode())
    raw("two objects", b'{"input": "a"}{"input": "a"}')
    raw("top level a list", b'[{"input": "a"}]')
    raw("top level a number", b"7")
    raw("top level a string", b'"' + CANARY.encode() + b'"')
    raw("top level null", b"null")
    raw("nested 2,000 levels", b'{"input": "a", "user": ' + b"[" * 2000 + b"]" * 2000 + b"}")
    raw("100,000 brackets", b"[" * 100_000)
    raw("single quotes", b"{'input': 'a'}")
    raw("a schema registry's magic byte", b'\x00\x00\x00\x00\x07{"input": "a"}')
    raw("5 MB of zeros", bytes(5_000_000), whole=False)
    raw("5 MB that end in the middle of a text", b'{"input": "' + CANARY.encode() * 500_000, whole=False)
    packed("msgpack empty", b"", "malformed")
    packed("msgpack cut short", msgspec.msgpack.encode({"input": CANARY})[:-2], "malformed")
    packed("msgpack: JSON in disguise", b'{"input": "a"}', "malformed")
    packed("msgpack list", ["a"], "malformed")
    packed("msgpack with bytes after it", msgspec.msgpack.encode({"input": "a"}) + b"\xc0", "malformed")
    packed("msgpack of integer keys", {1: "a"}, "malformed")
    packed("msgpack text that is not UTF-8", b"\x81\xa5input\xa2\xff\xfe", "malformed")
    packed("msgpack NaN", {"input": "a", "id": "nan", "metadata": {"a": float("nan")}}, "malformed",
           "metadata", id="nan")
    packed("msgpack input of bytes", {"input": b"abc", "id": "bin"}, "invalid_value", "input", id="bin")
    packed("msgpack metadata of bytes", {"input": "a", "id": "b", "metadata": {"a": b"x"}}, "invalid_value",
           "metadata", id="b")
    packed("msgpack extension", {"input": "a", "id": "e", "metadata": {"a": msgspec.msgpack.Ext(5, b"x")}},
           "invalid_value", "metadata", id="e")
    packed("msgpack encoding_format", {"input": "a", "id": "f", "encoding_format": "float"}, "invalid_value",
           "encoding_format", id="f")
    packed("msgpack unknown field", {"input": "a", "id": "u", "inputs": CANARY}, "unknown_field", "inputs",
           id="u")

    # -- headers --
    for kind in (
        b"text/plain",
        b"",
        b"application/jsonx",
        b"application/avro",
        b"\xff\xfe",
        b"x" * 10_000,
    ):
        job(f"content type {kind[:20]!a}", "unsupported_content_type", "content-type",
            headers=(("content-type", kind),), answer=_UNREAD | _BURIED)
    for deadline in (b"soon", b"-1", b"1.5", b"", b"9" * 20, b" 1", "٣".encode(), b"0x10"):
        job(f"deadline {deadline!r}", "invalid_header", "deadline", headers=(("deadline", deadline),))
    job("deadline invalid, with a reply address", "invalid_header", "deadline",
        headers=(replies, ("deadline", CANARY.encode())), answer={"to": "replies"})
    job(
        "deadline past",
        "expired",
        "deadline",
        headers=(replies, ("deadline", b"1")),
        answer={"to": "replies"},
    )
    for topic in (*topics.lanes, topics.control, topics.status, topics.dead_letters, f"{topics.prefix}.retry",
                  f"{topics.prefix}.retry.5s", "__consumer_offsets", "__transaction_state"):
        address(f"reply to {topic.removeprefix(topics.prefix)}", ("reply-topic", topic.encode()))
    address("reply to an unknown topic", ("reply-topic", f"{topics.prefix}.{CANARY}".encode()))
    address("reply topic empty", ("reply-topic", b""))
    for name in ("kafka_replyTopic", "REPLY_TOPIC"):
        address(f"{name} of an unknown topic", (name, f"{topics.prefix}.{CANARY}".encode()), param=name)
        address(f"{name} of a topic that is not allowed", (name, topics.control.encode()), param=name)
    for name in ("kafka_replyPartition", "REPLY_PARTITION"):
        address(f"{name} out of range", replies, (name, struct.pack(">i", PARTITIONS)), param=name)
    address("reply topic of 300 characters", ("reply-topic", b"t" * 300))
    address("reply topic with a blank", ("reply-topic", b"a b"))
    address("reply topic of two dots", ("reply-topic", b".."))
    address("reply topic that is not UTF-8", ("reply-topic", b"\xff\xfe"))
    address("Spring's reply topic that is not UTF-8", ("kafka_replyTopic", b"\xff"), param="kafka_replyTopic")
    address("a good reply topic, and a bad one after it", replies, ("reply-topic", b"\xff"))
    wrong: dict[str, bytes] = {
        "of 3 bytes": b"\0\0\0", "of 5 bytes": bytes(5), "empty": b"", "in ASCII": b"0",
        "negative": struct.pack(">i", -1), "out of range": struct.pack(">i", PARTITIONS),
        "of 2**31 - 1": struct.pack(">i", 2**31 - 1),
    }
    for shown, partition in wrong.items():
        address(f"reply partition {shown}", replies, ("reply-partition", partition), param="reply-partition")
    address("reply partition out of range, of the results topic", ("reply-partition", struct.pack(">i", 99)),
            param="reply-partition")
    raw("unreadable, with a reply address", b"{", headers=(replies, ("reply-partition", struct.pack(">i", 2))),
        to="replies", partition=2)
    table.cases.append(
        Bad(
            "unreadable, and a bad reply address",
            b"{",
            "invalid_header",
            "reply-topic",
            headers=(("reply-topic", b""),),
            buried=True,
        )
    )

    # -- sizes --
    long = "a b " * 1000
    job("text over the model's limit", "text_too_long", "input", input=long, answer=_RAN)
    job("text over the model's limit in a list", "text_too_long", "input[1]", input=["a", long, "b"],
        answer=_RAN | {"input": 1})
    huge = "x" * (MAX_TEXT_BYTES + 1)
    job("text over the service's limit, may it be cut or not", "text_too_long", "input", input=huge,
        truncate="end", answer=_RAN)
    job("5 MB of text", "text_too_long", "input", input=CANARY * 500_000, answer=_RAN)
    job("5 MB of text in a list", "text_too_long", "input[0]", input=[CANARY * 500_000, "a"],
        answer=_RAN | {"input": 0})
    job("a key that leaves no room for a result", "result_too_large", key=b"k" * MAX_RESULT_BYTES,
        answer={"metadata": None, "bare": "key"})
    job("a correlation id that leaves no room", "result_too_large",
        headers=(("kafka_correlationId", CANARY.encode() * 100_000),),
        answer={"metadata": None, "bare": "headers"})

    # -- the model --
    job("NaN from the model", "non_finite", "input", input=f"{NAN_TOKEN} {CANARY}", answer=_RAN)
    job("NaN from the model in a list", "non_finite", "input[1]", input=["a", f"b {NAN_TOKEN}", "c"],
        answer=_RAN | {"input": 1})
    job("a text that the model cannot run", "invalid_value", "input", input=poison, answer=_RAN)
    job("a text in a list that the model cannot run", "invalid_value", "input[2]", input=["a", "b", poison],
        answer=_RAN | {"input": 2})
    names = [case.name for case in table.cases]
    assert len(set(names)) == len(names)
    return table.cases


def odd_jobs(topics: Topics) -> list[Odd]:
    """Jobs that look wrong, and are right."""
    replies = ("reply-topic", topics.replies.encode())
    raw_id = bytes(range(240, 256))
    text = "an odd job"

    def job(**fields: Any) -> bytes:
        return json.dumps({"input": text} | fields).encode()

    def packed(**fields: Any) -> bytes:
        return msgspec.msgpack.encode({"input": text} | fields)

    def one(name: str, value: bytes, /, **about: Any) -> Odd:
        return Odd(name, value, (text,), **about)

    def reply(partition: int) -> bytes:
        return struct.pack(">i", partition)

    nulls = dict.fromkeys(("id", "model", "dimensions", "dtype", "encoding_format", "input_type", "instruction",
                           "truncate", "metadata", "user"))
    many = tuple(f"t {i}" for i in range(2048))
    long = "a b " * 1000
    return [
        one("nothing but a text", job()),
        one("null in every optional field", job(**nulls)),
        one("null in every optional field of MessagePack", packed(**nulls), headers=(MSGPACK,)),
        one("user an object", job(user={"a": [1, None]})),
        one("user a number", job(user=7)),
        one("a key repeated, the last one right", b'{"dimensions": "no", "input": 7, "id": 1, "id": "twice", '
            b'"dimensions": 64, "input": "an odd job"}', dimensions=64, id="twice"),
        one("a key repeated, both right", job(id="a")[:-1] + b', "id": "b"}', id="b"),
        one("blanks around the object", b" \r\n\t" + job() + b"\n "),
        one("escapes instead of letters", b'{"input": "an\\u0020odd\\u0020job"}'),
        one("id of 256 characters", job(id="ü" * 256), id="ü" * 256),
        one("an id that looks like another record's", job(id="x-0-0"), id="x-0-0"),
        one("an empty key", job(), key=b""),
        one("a key of raw bytes", job(), key=b"\xff\x00\xfe"),
        one("metadata just under 16 KB", job(metadata={"a": "x" * (MAX_METADATA_BYTES - 9)}),
            metadata={"a": "x" * (MAX_METADATA_BYTES - 9)}),
        one("metadata nested 64 levels with the job", job(metadata=_nested(63)), metadata=_nested(63)),
        one("metadata empty", job(metadata={}), metadata={}),
        one("metadata in MessagePack", packed(metadata={"a": [1, 2.5, "ü", None]}), headers=(MSGPACK,),
            metadata={"a": [1, 2.5, "ü", None]}),
        Odd("text empty", b'{"input": ""}', ("",)),
        Odd("text blank", b'{"input": " \\n\\t"}', (" \n\t",)),
        Odd("an empty text in a list", b'{"input": ["a", "", "b"]}', ("a", "", "b")),
        Odd("one text many times", job(input=["a"] * 300, dimensions=32), ("a",) * 300, 32),
        Odd("chunk null", job(chunk=None), (text,)),
        Odd("a mean over one window", job(chunk={"mode": "mean", "tokens": None}), (text,)),
        Odd("emoji", job(input="🧑🏽‍🚀 ok"), ("🧑🏽‍🚀 ok",)),
        Odd("letters as they are, in UTF-8", '{"input": "Straße 月"}'.encode(), ("Straße 月",)),
        Odd("a NUL in the text", job(input="a\0b"), ("a\0b",)),
        Odd("a special token in the text", job(input="a <|im_end|> b"), ("a <|im_end|> b",)),
        Odd("2,048 inputs", job(input=many, dimensions=32), many, 32),
        Odd("2,048 inputs whose result is split", job(input=many, dimensions=64), many, 64),
        Odd("an instruction", job(instruction="find"), (f"Instruct: find\nQuery:{text}",)),
        Odd("an empty instruction", job(instruction=""), (f"Instruct: \nQuery:{text}",)),
        Odd("an instruction at its limit", job(instruction="a" * MAX_INSTRUCTION_BYTES, truncate="end"),
            (f"Instruct: {'a' * MAX_INSTRUCTION_BYTES}\nQuery:{text}",), truncated="end"),
        Odd("a text cut at the end", job(input=long, truncate="end", dimensions=32), (long,), 32, truncated="end"),
        one("float16", job(dtype="float16"), dtype="float16"),
        one("int8", job(dtype="int8", dimensions=33), dimensions=33, dtype="int8"),
        one("binary", job(dtype="binary", dimensions=40), dimensions=40, dtype="binary"),
        one("float32 in base64", job(encoding_format="base64"), base64=True),
        one("int8 in base64", job(dtype="int8", encoding_format="base64"), dtype="int8", base64=True),
        one("float16 in MessagePack", packed(dtype="float16"), dtype="float16", headers=(MSGPACK,)),
        one("binary in MessagePack", packed(dtype="binary"), dtype="binary",
            headers=(("content-type", b"application/x-msgpack"),)),
        one("a content type in capitals with a parameter", job(),
            headers=(("Content-Type", b"Application/JSON; charset=utf-8"),)),
        one("a vendor's MessagePack", packed(), headers=(("content-type", b"application/vnd.msgpack"),)),
        one("Spring's headers", job(), to="replies", partition=3,
            headers=(("kafka_correlationId", raw_id), ("kafka_replyTopic", topics.replies.encode()),
                     ("kafka_replyPartition", reply(3)), ("__TypeId__", b"java.lang.String")),
            echoed=(("kafka_correlationId", raw_id),)),
        one("SmallRye's headers", job(), to="replies", partition=1,
            headers=(("REPLY_CORRELATION_ID", b"7d0c2f6e"), ("REPLY_TOPIC", topics.replies.encode()),
                     ("REPLY_PARTITION", reply(1))), echoed=(("REPLY_CORRELATION_ID", b"7d0c2f6e"),)),
        one("three families, each field by itself", job(), to="replies", partition=2,
            headers=(("REPLY_CORRELATION_ID", b"s"), ("kafka_correlationId", b"k"), ("REPLY_TOPIC", b"\xff"),
                     replies, ("kafka_replyPartition", reply(2))),
            echoed=(("kafka_correlationId", b"k"), ("REPLY_CORRELATION_ID", b"s"))),
        one("headers twice, the last right", job(), to="replies", partition=0,
            headers=(("reply-topic", b"\xff"), ("content-type", b"text/plain"), ("deadline", b"1"),
                     ("reply-partition", b"no"), replies, ("content-type", b"application/json"),
                     ("reply-partition", reply(0)), ("deadline", b"9" * 15))),
        one("a partition of the results topic", job(), headers=(("reply-partition", reply(1)),), partition=1),
        one("a trace", job(), headers=(("traceparent", b"00-ab-cd-01"), ("tracestate", b"x=\xff")),
            echoed=(("traceparent", b"00-ab-cd-01"), ("tracestate", b"x=\xff"))),
        one("a correlation id of 100 KB", job(), headers=(("kafka_correlationId", b"\xff" * 100_000),),
            echoed=(("kafka_correlationId", b"\xff" * 100_000),)),
        one("an unknown header without a value", job(), headers=(("whatever", None),)),
        one("null in every header", job(), headers=tuple((name, None) for name in (
            "content-type", "kafka_correlationId", "reply-topic", "REPLY_TOPIC", "reply-partition",
            "deadline", "traceparent"))),
        one("a thousand headers", job(), headers=tuple((f"h{i}", b"x") for i in range(1000))),
    ]
