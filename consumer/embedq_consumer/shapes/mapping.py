"""What a mapping says: which records it reads, which of their fields are the text and the id, and what comes of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping as Map
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from embedq_consumer.shapes.template import Template
from embedq_shared.messages import Job

Shape = Literal["row", "connect", "debezium", "cloudevents", "openai-batch"]
OutputFormat = Literal["json", "connect", "avro", "json-schema", "protobuf"]
ColumnType = Literal["string", "boolean", "int32", "int64", "float", "double", "json"]
"""As Kafka Connect names them; `json` is a string that holds JSON."""
VectorForm = Literal["array", "text", "base64"]

MAPPING_HEADER: Final = "embedq-mapping"
"""Names the mapping of a record on a job topic."""
REGISTERED: Final[frozenset[OutputFormat]] = frozenset({"avro", "json-schema", "protobuf"})
"""Formats whose schema is in a Schema Registry."""


class Column(msgspec.Struct, frozen=True):
    """A column that travels on: its name in the result, and its path in the row."""

    name: str
    path: str


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """The flat results of a mapping, and where they go. The names are those of the result's own fields."""

    topic: str
    format: OutputFormat = "json"
    key: Literal["id", "source"] = "id"
    """`id`: the id as text. `source`: the record's own key, byte for byte."""
    vector_form: VectorForm = "array"
    id: str = "id"
    vector: str = "vector"
    model_version: str = "model_version"
    truncated: str = "truncated"
    nest: str | None = None
    """The object that holds the columns; None: they are beside the id."""
    constants: Map[str, str | int | float | bool] = {}

    @property
    def own_names(self) -> tuple[str, ...]:
        """What no column may be called."""
        return (self.id, self.vector, self.model_version, self.truncated, *self.constants)


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """One mapping, checked. `options` are fields of the job that each row becomes, and `job` is such a job."""

    name: str
    shape: Shape
    output: Output
    topics: tuple[str, ...] = ()
    text: Template | None = None
    """None for `openai-batch`, whose lines say what their input is."""
    id: str | None = None
    """The id's path; None: the record's key, the event's id."""
    columns: tuple[Column, ...] | None = ()
    """None: all of the row's columns but the id's."""
    types: Map[str, ColumnType] = {}
    options: Map[str, Any] = {}
    job: Job = Job(input="")
    deletes: bool = True
    """A deleted row deletes its result; otherwise its record is refused."""
    ordered: bool = True
    null_text: Literal["refuse", "delete"] = "refuse"

    @property
    def keeps_order(self) -> bool:
        """Whether an answer may not overtake an earlier one of its key."""
        return self.ordered and self.shape != "openai-batch"

    @property
    def says_truncated(self) -> bool:
        """Whether results say if their text was cut, since it may be."""
        return self.options.get("truncate") in ("start", "end")


class Mappings:
    """All mappings of the service, by topic and by name."""

    def __init__(self, mappings: Sequence[Mapping] = ()) -> None:
        self._by_name = {mapping.name: mapping for mapping in mappings}
        self._by_topic = {topic: mapping for mapping in mappings for topic in mapping.topics}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_name)

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that mappings read."""
        return tuple(self._by_topic)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The topics that results go to."""
        return tuple(dict.fromkeys(mapping.output.topic for mapping in self._by_name.values()))

    @property
    def registered(self) -> list[str]:
        """The names of mappings that need a Schema Registry for their results."""
        return [one.name for one in self._by_name.values() if one.output.format in REGISTERED]

    def of_topic(self, topic: str) -> Mapping | None:
        """The mapping that reads a topic."""
        return self._by_topic.get(topic)

    def named(self, name: str) -> Mapping | None:
        """The mapping of this name."""
        return self._by_name.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._by_name)
