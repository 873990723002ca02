"""What a mapped record is answered with: a flat result, or a line of an OpenAI batch. Pure."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping as Map
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import orjson

from embedq_consumer.shapes.columns import TypedColumn, plain
from embedq_consumer.shapes.mapping import Mapping, Output
from embedq_consumer.shapes.output_schemas import VECTOR, connect_schema, encode_avro, encode_protobuf
from embedq_consumer.shapes.registry.schemas import Registration
from embedq_consumer.shapes.registry.wire_format import FIRST_MESSAGE, frame
from embedq_consumer.shapes.rows import named
from embedq_consumer.shapes.template import Slot
from embedq_shared.messages import ErrorBody, Usage

_VERSION: Final = f"sha256:{'0' * 64}"
"""As long as any model version."""

HTTP_STATUS: Final[Map[str, int]] = {
    "unknown_model": 404,
    "unknown_model_version": 404,
    "result_too_large": 413,
    "text_too_long": 413,
    "expired": 504,
    "overloaded": 503,
    "internal": 500,
    "non_finite": 500,
    "crashed": 500,
    "undeliverable": 500,
}
"""Of an error in a batch line; everything else is 400."""


class FlatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A flat result without its vector. `size` is an upper bound of its bytes without the vector's, those of the key included."""

    mapping: Mapping
    id: int | str
    key: bytes
    columns: tuple[TypedColumn, ...] = ()
    registered: tuple[Registration, int] | None = None
    """The result's schema and its number, where it has one in a registry."""
    size: int = 0

    @property
    def output(self) -> Output:
        """Where it goes, and how it is written."""
        return self.mapping.output

    def explained(self, error: ErrorBody) -> ErrorBody:
        """An error of the job, which says of which mapping's field it is: the row has no `input`."""
        slots = (
            [part for part in self.mapping.text.parts if isinstance(part, Slot)] if self.mapping.text else []
        )
        message, param = error.message, error.param
        if param == "input" and len(slots) == 1:
            param = named(slots[0].path)
            message = message.replace("`input`", f"`{param}`", 1)
        return msgspec.structs.replace(error, message=f"mapping {self.mapping.name}: {message}", param=param)

    def sized(self) -> FlatAnswer:
        """The same with its size.

        Raises:
            ValueError, TypeError, OverflowError: its columns cannot be written in the output's format.
        """
        empty = self.value(b"", _VERSION, truncated=False)
        return msgspec.structs.replace(self, size=len(empty) + len(self.key))

    def value(self, vector: bytes, model_version: str, *, truncated: bool) -> bytes:
        """The record's value. `vector` is float32, little-endian."""
        output = self.output
        if output.format == "json":
            return msgspec.json.encode(self._json(vector, model_version, truncated=truncated))
        members = self._members(model_version, truncated=truncated)
        if output.format == "connect":
            values = {member.name: plain(member.value) for member in members}
            values[output.vector] = _json_vector(vector, output)
            return msgspec.json.encode({"schema": connect_schema(output, members), "payload": values})
        if self.registered is None:
            raise RuntimeError("a result's schema has no number. This is a bug.")
        registration, number = self.registered
        if output.format == "json-schema":
            values = {member.name: plain(member.value) for member in members}
            return frame(number, msgspec.json.encode(values | {output.vector: _json_vector(vector, output)}))
        typed = [*members, TypedColumn(output.vector, VECTOR[output.vector_form], _vector(vector, output))]
        if output.format == "avro":
            return frame(number, encode_avro(registration.text, typed))
        return frame(number, FIRST_MESSAGE + encode_protobuf(registration.text, typed))

    def _json(self, vector: bytes, model_version: str, *, truncated: bool) -> dict[str, Any]:
        output = self.output
        columns = {column.name: plain(column.value) for column in self.columns}
        found: dict[str, Any] = {**output.constants, output.id: self.id}
        found[output.vector] = _json_vector(vector, output)
        found[output.model_version] = model_version
        if self.mapping.says_truncated:
            found[output.truncated] = truncated
        return found | (columns if output.nest is None else {output.nest: columns})

    def _members(self, model_version: str, *, truncated: bool) -> list[TypedColumn]:
        return [*own_columns(self.mapping, self.id, model_version, truncated=truncated), *self.columns]


def own_columns(
    mapping: Mapping, id: int | str, model_version: str = "", *, truncated: bool = False
) -> list[TypedColumn]:
    """The members of a flat result that are no columns of its row, but for the vector."""
    output = mapping.output
    found = [TypedColumn(name, _of_constant(value), value) for name, value in output.constants.items()]
    found.append(TypedColumn(output.id, _required("int64" if isinstance(id, int) else "string"), id))
    found.append(TypedColumn(output.model_version, _required("string"), model_version))
    if mapping.says_truncated:
        found.append(TypedColumn(output.truncated, _required("boolean"), truncated))
    return found


def _of_constant(value: str | float | bool) -> Map[str, Any]:
    kinds = {str: "string", bool: "boolean", int: "int64", float: "double"}
    return _required(kinds[type(value)])


def _required(kind: str) -> Map[str, Any]:
    return {"type": kind, "optional": False}


def _vector(vector: bytes, output: Output) -> Any:
    if output.vector_form == "base64":
        return vector
    numbers = np.frombuffer(vector, dtype="<f4")
    if output.vector_form == "text":
        return orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return numbers.tolist()


def _json_vector(vector: bytes, output: Output) -> Any:
    if output.vector_form == "base64":
        return b64encode(vector).decode("ascii")
    # orjson writes a float32 with the fewest digits that read back the same; msgspec knows float64 alone.
    numbers = orjson.dumps(np.frombuffer(vector, dtype="<f4"), option=orjson.OPT_SERIALIZE_NUMPY)
    return numbers.decode() if output.vector_form == "text" else msgspec.Raw(numbers)


# -- OpenAI batches ----------------------------------------------------------------------------------------------------


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A line of an OpenAI batch's output. `name` is where its line came from."""

    mapping: Mapping
    custom_id: str
    name: str

    @property
    def output(self) -> Output:
        """Where it goes."""
        return self.mapping.output

    @property
    def key(self) -> bytes:
        """The line's own id."""
        return self.custom_id.encode()

    @property
    def size(self) -> int:
        """An upper bound of its bytes without the vectors'."""
        return 512 + 12 * len(self.custom_id.encode()) + 2 * len(self.name)

    def value(self, data: Sequence[msgspec.Raw], model: str, model_version: str, usage: Usage) -> bytes:
        """The line of a job that was run; `data` as results have them."""
        body = {
            "object": "list",
            "data": data,
            "model": model,
            "model_version": model_version,
            "usage": usage,
        }
        return self._line(200, body)

    def failure(self, error: ErrorBody) -> bytes:
        """The line of one that failed."""
        status = HTTP_STATUS.get(error.code, 400)
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
        return self._line(status, body)

    def _line(self, status: int, body: Map[str, Any]) -> bytes:
        return msgspec.json.encode(
            {
                "id": f"batch_req_{self.name}",
                "custom_id": self.custom_id,
                "response": {"status_code": status, "request_id": self.name, "body": body},
                "error": None,
            }
        )


Answer = FlatAnswer | BatchAnswer
