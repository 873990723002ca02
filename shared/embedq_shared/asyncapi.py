"""The AsyncAPI 3.0.0 document: what flows over which topic, from the service's point of view.

`embedq_shared.contract` writes it. Topic names are those of the default prefix.
"""

from __future__ import annotations

from typing import Any, Final

from embedq_shared import topics

Object = dict[str, Any]

CONTRACT_VERSION: Final = "1.0.0"
KAFKA_BINDING: Final = "0.5.0"
TOPICS: Final = topics.Topics()

_VERSION: Final = "sha256:9f2c4e0b7a5d18336c0e4f9b2d7a61c85e3f0b9d4a7c2e6f1b8d5a3c7e9f0b24"
_TRACEPARENT: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_BYTES: Final = "MessagePack writes vectors as raw little-endian bytes (`bin`), shown here as a string."


def document(schemas: dict[str, Object]) -> Object:
    """The whole document, with each JSON Schema (file stem → schema) as a component."""
    return {
        "asyncapi": "3.0.0",
        "id": "urn:embedq:v1",
        "info": {
            "title": "embedq",
            "version": CONTRACT_VERSION,
            "description": "Text embeddings over Kafka. A job on a jobs topic is answered by at least one result, "
            "at the reply address in its headers or on the results topic; errors are results. Written from the "
            "service's point of view: it receives jobs and sends results. Topic names have the default prefix, "
            "`embed`. WIRE.md beside this file has every rule.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": topics.JSON,
        "servers": {
            "local": {
                "host": "localhost:9092",
                "protocol": "kafka",
                "description": "A broker on this machine. The contract asks nothing of a broker but the topics.",
                "bindings": {"kafka": {"bindingVersion": KAFKA_BINDING}},
            }
        },
        "channels": _channels(),
        "operations": _operations(),
        "components": {"schemas": _components(schemas), "messages": _messages()},
    }


# -- channels ---------------------------------------------------------------------------------------------------------


def _channels() -> Object:
    jobs = ("job", "jobMsgpack")
    answers = ("result", "resultMsgpack", "failure", "failureMsgpack")
    return {
        "jobs": _channel(TOPICS.jobs, "Interactive jobs.", jobs),
        "bulk": _channel(TOPICS.bulk, "Bulk jobs: they wait while interactive ones are there.", jobs),
        "results": _channel(TOPICS.results, "Answers to jobs that name no usable reply address.", answers),
        "replies": _channel(
            TOPICS.replies,
            "Answers to clients, each of which reads one partition of its own choice.",
            answers,
        ),
        "control": _channel(
            TOPICS.control,
            "Desired state: for each alias the last record counts.",
            ("control",),
            partitions=1,
            compacted=True,
        ),
        "status": _channel(
            TOPICS.status,
            "What each replica does: for each replica the last record counts.",
            ("status",),
            compacted=True,
        ),
        "deadLetters": _channel(
            TOPICS.dead_letters, "Records that no result could answer fully, as they came.", ("deadLetter",)
        ),
        "replyAddress": {
            "address": None,
            "title": "A job's own reply address",
            "description": "The topic that a job's headers name. The service sends to any existing topic that its "
            "setting `reply_topics` allows, but never to Kafka's own nor to embedq's jobs, control, status, "
            "dead-letter or retry topics.",
            "messages": {name: _ref("components", "messages", name) for name in answers},
        },
    }


def _channel(
    topic: str,
    description: str,
    messages: tuple[str, ...],
    *,
    partitions: int | None = None,
    compacted: bool = False,
) -> Object:
    kafka: Object = {"topic": topic}
    if partitions is not None:
        kafka["partitions"] = partitions
    if compacted:
        kafka["topicConfiguration"] = {"cleanup.policy": ["compact"]}
    return {
        "address": topic,
        "title": topic,
        "description": description,
        "messages": {name: _ref("components", "messages", name) for name in messages},
        "bindings": {"kafka": {**kafka, "bindingVersion": KAFKA_BINDING}},
    }


# -- operations -------------------------------------------------------------------------------------------------------


def _operations() -> Object:
    jobs = ("job", "jobMsgpack")
    answers = ("result", "resultMsgpack", "failure", "failureMsgpack")
    return {
        "receiveJob": _receive_jobs("jobs", "Take an interactive job.", jobs, answers),
        "receiveBulkJob": _receive_jobs("bulk", "Take a bulk job.", jobs, answers),
        "sendResult": _operation("send", "results", "Answer a job that names no reply address.", answers),
        "sendReply": _operation("send", "replies", "Answer a job at its reply address.", answers),
        "receiveControl": _operation(
            "receive",
            "control",
            "Learn which model each alias shall serve. Each replica reads the whole topic, outside of any group.",
            ("control",),
        ),
        "sendStatus": _operation("send", "status", "Tell each step of a reload, and repeat it.", ("status",)),
        "sendDeadLetter": _operation(
            "send", "deadLetters", "Keep a record that could not be answered fully.", ("deadLetter",)
        ),
    }


def _operation(action: str, channel: str, summary: str, messages: tuple[str, ...]) -> Object:
    return {
        "action": action,
        "channel": _ref("channels", channel),
        "summary": summary,
        "messages": [_ref("channels", channel, "messages", name) for name in messages],
        "bindings": {"kafka": {"bindingVersion": KAFKA_BINDING}},
    }


def _receive_jobs(channel: str, summary: str, jobs: tuple[str, ...], answers: tuple[str, ...]) -> Object:
    operation = _operation("receive", channel, summary, jobs)
    operation["bindings"]["kafka"] = {
        "groupId": {"type": "string", "enum": [topics.GROUP]},
        "bindingVersion": KAFKA_BINDING,
    }
    operation["reply"] = {
        "address": {
            "location": f"$message.header#/{topics.REPLY_TOPIC[0]}",
            "description": f"Absent: `{TOPICS.results}`.",
        },
        "channel": _ref("channels", "replyAddress"),
        "messages": [_ref("channels", "replyAddress", "messages", name) for name in answers],
    }
    return operation


# -- messages ---------------------------------------------------------------------------------------------------------


def _messages() -> Object:
    job_key = {"type": ["string", "null"], "description": "Any bytes; the result has the same key."}
    result_key = {"type": "string", "description": "The job's key, else the id."}
    no_format = {"type": "object", "properties": {"encoding_format": {"type": "null"}}}
    return {
        "job": _message(
            "Job",
            "A text or texts to embed.",
            _ref("components", "schemas", "Job"),
            _job_headers(topics.JSON),
            key=job_key,
            correlated=True,
            examples=[
                {
                    "name": "least",
                    "summary": "Answered on the results topic.",
                    "payload": {"input": "The tide turns twice a day."},
                },
                {
                    "name": "full",
                    "summary": "Answered at its reply address, in base64.",
                    "headers": {
                        "correlation-id": "7d0c2f6e-0f58-4f0c-9a3a-6a1f5f1f2f10",
                        "reply-topic": TOPICS.replies,
                        "deadline": "1767225600000",
                        "traceparent": _TRACEPARENT,
                        "content-type": topics.JSON,
                    },
                    "payload": {
                        "input": ["How long do cats sleep?", "Why is the sea salty?"],
                        "id": "faq-17",
                        "model": "default",
                        "dimensions": 256,
                        "dtype": "int8",
                        "encoding_format": "base64",
                        "instruction": "Given a question, find passages that answer it",
                        "truncate": "end",
                        "metadata": {"row": 17},
                    },
                },
                {
                    "name": "lateChunks",
                    "summary": "One pass over the text, and a vector for each span of at most 128 tokens.",
                    "payload": {
                        "input": "The tide turns twice a day.",
                        "chunk": {"mode": "late", "tokens": 128},
                    },
                },
            ],
        ),
        "jobMsgpack": _message(
            "JobMsgpack",
            "A job in MessagePack. `encoding_format` must be absent: vectors come as raw bytes.",
            {"allOf": [_ref("components", "schemas", "Job"), no_format]},
            _job_headers(topics.MSGPACK, sorted(topics.MSGPACK_TYPES)),
            content_type=topics.MSGPACK,
            key=job_key,
            correlated=True,
        ),
        "result": _message(
            "Result",
            "The vectors of one job, or one part of them.",
            _ref("components", "schemas", "Result"),
            _answer_headers(topics.JSON, ["ok", "partial", "error"], versioned=True),
            key=result_key,
            correlated=True,
            examples=[
                {"name": "oneFailed", "summary": "int8; the second text failed alone.", **_PARTIAL},
                {"name": "lateChunks", "summary": "Two spans of one text, in binary.", **_CHUNKED},
            ],
        ),
        "resultMsgpack": _message(
            "ResultMsgpack",
            f"The result of a MessagePack job. {_BYTES}",
            _ref("components", "schemas", "Result"),
            _answer_headers(topics.MSGPACK, ["ok", "partial", "error"], versioned=True),
            content_type=topics.MSGPACK,
            key=result_key,
            correlated=True,
        ),
        "failure": _message(
            "Failure",
            "The answer to a job that failed whole.",
            _ref("components", "schemas", "Failure"),
            _answer_headers(topics.JSON, ["error"], versioned=False),
            key=result_key,
            correlated=True,
            examples=[{"name": "tooFewDimensions", "summary": "A field out of range.", **_FAILED}],
        ),
        "failureMsgpack": _message(
            "FailureMsgpack",
            "The answer to a MessagePack job that failed whole.",
            _ref("components", "schemas", "Failure"),
            _answer_headers(topics.MSGPACK, ["error"], versioned=False),
            content_type=topics.MSGPACK,
            key=result_key,
            correlated=True,
        ),
        "control": _message(
            "Control",
            "The desired model of one alias, complete.",
            _ref("components", "schemas", "Control"),
            key={"type": "string", "description": "The alias."},
            examples=[
                {
                    "name": "reload",
                    "summary": "Serve another directory once its vectors prove close to the old model's.",
                    "payload": {
                        "alias": "default",
                        "version": 2,
                        "path": "Qwen3-Embedding-0.6B",
                        "command_id": "c0ffee00-3b1e-4d52-8f43-2f1f6f0f4b1a",
                        "policy": "availability_preserving",
                        "min_cosine": 0.99,
                        "fallback": "all-MiniLM-L6-v2",
                    },
                }
            ],
        ),
        "status": _message(
            "Status",
            "What one replica serves and does.",
            _ref("components", "schemas", "Status"),
            key={"type": "string", "description": "The replica."},
            examples=[
                {
                    "name": "ready",
                    "summary": "The swap is done.",
                    "payload": {
                        "replica": "embedq-0",
                        "alias": "default",
                        "version": 2,
                        "step": "serving",
                        "state": "READY",
                        "model_version": _VERSION,
                        "error": None,
                        "at": 1767225600000,
                        "command_id": "c0ffee00-3b1e-4d52-8f43-2f1f6f0f4b1a",
                    },
                }
            ],
        ),
        "deadLetter": _message(
            "DeadLetter",
            "A record as it came: key, value, headers and timestamp, with the reason added to the headers.",
            {"description": "The value as it came: any bytes, or null."},
            _dead_letter_headers(),
            content_type="application/octet-stream",
            key={"type": ["string", "null"], "description": "The key as it came."},
        ),
    }


def _message(
    name: str,
    summary: str,
    payload: Object,
    headers: Object | None = None,
    *,
    key: Object,
    content_type: str = topics.JSON,
    correlated: bool = False,
    examples: list[Object] | None = None,
) -> Object:
    message: Object = {"name": name, "title": name, "summary": summary, "contentType": content_type}
    if headers is not None:
        message["headers"] = headers
    message["payload"] = payload
    if correlated:
        message["correlationId"] = {
            "location": f"$message.header#/{topics.CORRELATION[0]}",
            "description": "Opaque bytes, echoed byte for byte; never decode them.",
        }
    message["bindings"] = {"kafka": {"key": key, "bindingVersion": KAFKA_BINDING}}
    if examples:
        message["examples"] = examples
    return message


def _job_headers(content_type: str, spellings: list[str] | None = None) -> Object:
    """A job's headers. Nothing is required, and unknown ones are ignored."""
    return {
        "type": "object",
        "properties": {
            **_each(topics.CORRELATION, "Opaque bytes, echoed in the answer."),
            **_each(topics.REPLY_TOPIC, "Where the answer goes, in UTF-8."),
            **_each(topics.REPLY_PARTITION, "A partition of the reply topic: 4 bytes, big-endian."),
            topics.DEADLINE: {
                "type": "string",
                "pattern": "^[0-9]{1,19}$",
                "description": "Epoch milliseconds in ASCII. A job that is not computed by then is `expired`.",
            },
            **_trace(),
            topics.CONTENT_TYPE: {
                "type": "string",
                "description": "Case is ignored, and so are parameters."
                + (" Absent means this one." if spellings is None else ""),
                **({"const": content_type} if spellings is None else {"enum": spellings}),
            },
        },
    }


def _answer_headers(content_type: str, statuses: list[str], *, versioned: bool) -> Object:
    """An answer's headers: the job's correlation and trace as they came, and the outcome for those who skip values."""
    required = [topics.CONTENT_TYPE, topics.STATUS]
    return {
        "type": "object",
        "properties": {
            **_each(topics.CORRELATION, "The job's, byte for byte, under each name in which it came."),
            **_trace(),
            topics.CONTENT_TYPE: {"type": "string", "const": content_type},
            topics.STATUS: {"type": "string", "enum": statuses},
            topics.MODEL_VERSION: {"type": "string", "description": "As in the value."},
        },
        "required": [*required, topics.MODEL_VERSION] if versioned else required,
    }


def _dead_letter_headers() -> Object:
    text = {"type": "string"}
    return {
        "type": "object",
        "description": "The record's own headers, then Spring's (`kafka_dlt-…`), Kafka Connect's "
        "(`__connect.errors.…`) and ours. A name that came in stays; the last one of a name is ours.",
        "properties": {
            "embedq-error-code": {**text, "description": "An error code of a result."},
            "embedq-error-message": {**text, "description": "What was expected; never the record's content."},
            "embedq-attempts": {**text, "description": "How often the record was tried, ASCII decimal."},
            "embedq-result-sent": {
                **text,
                "enum": ["true", "false"],
                "description": "Whether an error result was sent too.",
            },
        },
        "required": ["embedq-error-code", "embedq-error-message", "embedq-attempts", "embedq-result-sent"],
    }


def _each(names: tuple[str, ...], description: str) -> Object:
    owners = ("", " Spring Kafka's name.", " SmallRye's name.")
    return {
        name: {"type": "string", "description": description + owner}
        for name, owner in zip(names, owners, strict=True)
    }


def _trace() -> Object:
    return {name: {"type": "string", "description": "W3C trace context, echoed."} for name in topics.TRACE}


# -- parts ------------------------------------------------------------------------------------------------------------


def _components(schemas: dict[str, Object]) -> Object:
    """The same schemas in one flat name space. They keep to what 2020-12 and AsyncAPI's draft-07 share."""
    flat: Object = {}
    for schema in schemas.values():
        root = {key: value for key, value in schema.items() if key not in ("$schema", "$id", "$defs")}
        flat |= {**schema.get("$defs", {}), schema["title"]: root}
    return {name: _point_to_components(schema) for name, schema in sorted(flat.items())}


def _point_to_components(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_point_to_components(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace("#/$defs/", "#/components/schemas/")
        if key == "$ref"
        else _point_to_components(value)
        for key, value in schema.items()
    }


def _ref(*path: str) -> Object:
    return {"$ref": "#/" + "/".join(path)}


_PARTIAL: Final[Object] = {
    "headers": {
        "correlation-id": "7d0c2f6e-0f58-4f0c-9a3a-6a1f5f1f2f10",
        "content-type": topics.JSON,
        "embedq-status": "partial",
        "embedq-model-version": _VERSION,
    },
    "payload": {
        "object": "list",
        "id": "faq-17",
        "model": "default",
        "model_version": _VERSION,
        "dimensions": 32,
        "dtype": "int8",
        "data": [
            {
                "object": "embedding",
                "index": 0,
                "embedding": "fuCKP2WnsW0yhu1/8oUucLajYkOM230FgRt3xphVU5Y=",
                "tokens": 9,
                "truncated": False,
                "cached": True,
                "scale": 0.0019451015,
                "error": None,
            },
            {
                "object": "embedding",
                "index": 1,
                "embedding": None,
                "tokens": None,
                "truncated": None,
                "cached": None,
                "error": {
                    "code": "text_too_long",
                    "message": "`input[1]`: expected at most 512 tokens, got 611",
                    "param": "input[1]",
                    "retryable": False,
                },
            },
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
        "timings": {"queue": 0.0021, "tokenize": None, "compute": None},
        "metadata": {"row": 17},
        "part": 0,
        "parts": 1,
    },
}

_CHUNKED: Final[Object] = {
    "headers": {"content-type": topics.JSON, "embedq-status": "ok", "embedq-model-version": _VERSION},
    "payload": {
        "object": "list",
        "id": "embed.jobs-3-4712",
        "model": "default",
        "model_version": _VERSION,
        "dimensions": 32,
        "dtype": "binary",
        "data": [
            {
                "object": "embedding",
                "index": 0,
                "embedding": embedding,
                "tokens": tokens,
                "truncated": False,
                "cached": False,
                "span": span,
                "error": None,
            }
            for embedding, tokens, span in (
                ([201, 14, 77, 3], 121, [0, 530]),
                ([9, 130, 76, 35], 40, [530, 702]),
            )
        ],
        "usage": {"prompt_tokens": 163, "total_tokens": 163},
        "timings": {"queue": 0.0021, "tokenize": 0.0004, "compute": 0.0061},
        "metadata": None,
        "part": 0,
        "parts": 1,
    },
}

_FAILED: Final[Object] = {
    "headers": {"content-type": topics.JSON, "embedq-status": "error"},
    "payload": {
        "object": "error",
        "id": "embed.jobs-3-4711",
        "model": None,
        "model_version": None,
        "error": {
            "code": "invalid_value",
            "message": "`dimensions`: expected an integer from 32 to the model's hidden size",
            "param": "dimensions",
            "retryable": False,
        },
        "metadata": None,
    },
}
