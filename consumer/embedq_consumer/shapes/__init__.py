"""Records as Kafka's world writes them, by mappings: rows, change events, envelopes and events in; flat results out.

A mapping says which field is the text, which the id, and which columns travel on. `reading` makes a job of a record, `answers`
what is written in the end; both are pure. `registry` is the one part that talks to somebody.
"""

from embedq_consumer.shapes.answers import Answer, BatchAnswer, FlatAnswer
from embedq_consumer.shapes.hints import hint
from embedq_consumer.shapes.mapping import MAPPING_HEADER, Mapping, Mappings
from embedq_consumer.shapes.mapping_file import BadMappings, parse_mappings, read_mappings
from embedq_consumer.shapes.reading import BadLine, Embeddable, Message, Removal, Unknown, read
from embedq_consumer.shapes.registry.schema_registry import (
    MissingExtra,
    RegistryOptions,
    SchemaRegistry,
    connect,
)
from embedq_consumer.shapes.registry.schemas import NoRegistry, Schemas, Want
from embedq_consumer.shapes.rows import BadRow

__all__ = [
    "MAPPING_HEADER",
    "Answer",
    "BadLine",
    "BadMappings",
    "BadRow",
    "BatchAnswer",
    "Embeddable",
    "FlatAnswer",
    "Mapping",
    "Mappings",
    "Message",
    "MissingExtra",
    "NoRegistry",
    "RegistryOptions",
    "Removal",
    "SchemaRegistry",
    "Schemas",
    "Unknown",
    "Want",
    "connect",
    "hint",
    "parse_mappings",
    "read",
    "read_mappings",
]
