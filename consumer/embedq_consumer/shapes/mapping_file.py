"""The file of mappings: YAML in, checked mappings out, or an error that names the place in the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from embedq_consumer.shapes.mapping import (
    Column,
    ColumnType,
    Mapping,
    Mappings,
    Output,
    OutputFormat,
    Shape,
    VectorForm,
)
from embedq_consumer.shapes.template import Template
from embedq_shared.codec import BadJob, decode_job
from embedq_shared.messages import Job
from embedq_shared.topics import Topics, is_topic_name

Part = TypeVar("Part")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OWN: Final = ("id", "vector", "model_version", "truncated")
_NOT_OPTIONS: Final = {
    "input": "the mapping's `text` says what it is",
    "id": "the mapping's `id` says where it is",
    "metadata": "`columns` travel instead",
    "user": "it means nothing here",
    "dtype": "flat results hold float32",
    "encoding_format": "`output.vector` says how vectors are written",
}
"""Fields of a job that a mapping cannot set, and why."""
_KEPT_FOR_BATCHES: Final = ("dtype", "encoding_format", "user", "metadata")
"""Of those, what a batch line's body has, and so a mapping may set for all of them."""
_AT: Final = re.compile(r" - at `\$(.*)`\Z", re.DOTALL)


class BadMappings(Exception):
    """The file cannot be used; the message says where, and what was expected."""


class _OutputPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    topic: str
    format: OutputFormat = "json"
    key: Literal["id", "source"] = "id"
    vector: VectorForm = "array"
    names: dict[str, str] = {}
    nest: str | None = None
    constants: dict[str, str | int | float | bool] = {}


class _MappingPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    shape: Shape = "row"
    topics: list[str] = []
    text: str | None = None
    id: str | None = None
    columns: Literal["*"] | list[str] | dict[str, str] = []
    types: dict[str, ColumnType] = {}
    options: dict[str, Any] = {}
    deletes: bool = True
    ordered: bool = True
    null_text: Literal["refuse", "delete"] = "refuse"
    output: _OutputPart


class _File(msgspec.Struct, forbid_unknown_fields=True):
    mappings: dict[str, Any]


def read_mappings(path: Path, topics: Topics) -> Mappings:
    """The mappings of a file, beside the service's own topics.

    Raises:
        BadMappings: it cannot be read, or says something that cannot be.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BadMappings(f"{path}: expected a file that can be read ({error.strerror})") from None
    return parse_mappings(source, topics, str(path))


def parse_mappings(source: bytes, topics: Topics, path: str) -> Mappings:
    """The same from the file's bytes."""
    import yaml

    try:
        document = yaml.safe_load(source)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f", broken at line {mark.line + 1}" if mark is not None else ""
        raise BadMappings(f"{path}: expected YAML{where}") from None
    # One after the other: msgspec would not say which.
    parts = {
        name: _converted(part, _MappingPart, path, f"mappings.{name}")
        for name, part in _converted(document, _File, path, "").mappings.items()
    }
    problems = list(_problems(parts, topics))
    if problems:
        raise BadMappings(f"{path}: {problems[0]}")
    mappings = []
    for name, part in parts.items():
        try:
            mappings.append(_mapping(name, part))
        except ValueError as error:
            raise BadMappings(f"{path}: mappings.{name}.{error}") from None
    return Mappings(mappings)


def _converted(value: Any, kind: type[Part], path: str, place: str) -> Part:
    """A part of the file; an error says at which place, and what was expected there."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        at = _AT.search(str(error))
        said = str(error)[: at.start()] if at else str(error)
        where = (place + (at[1] if at else "")).lstrip(".")
        said = said[:1].lower() + said[1:]
        raise BadMappings(f"{path}: {where}: {said}" if where else f"{path}: {said}") from None


def _problems(parts: Map[str, _MappingPart], topics: Topics) -> Iterator[str]:
    """What no type can express, each with its place."""
    ours = {*topics.lanes, topics.results, topics.replies, topics.control, topics.status, topics.dead_letters}
    readers = Counter(topic for part in parts.values() for topic in part.topics)
    if not parts:
        yield "mappings: expected at least one"
    for name, part in parts.items():
        place = f"mappings.{name}"
        if not _NAME.fullmatch(name):
            yield f"{place}: expected a name of letters, digits, '.', '_' and '-'"
        for topic in part.topics:
            if not is_topic_name(topic):
                yield f"{place}.topics: expected names of topics, got {topic[:80]!r}"
            elif topic in ours or topics.is_internal(topic):
                yield (
                    f"{place}.topics: expected topics of your own, got {topic}; a record on a job topic names its mapping in the "
                    "header embedq-mapping"
                )
            elif readers[topic] > 1:
                yield f"{place}.topics: expected a topic that one mapping reads, got {topic} twice"
        out = part.output.topic
        if not is_topic_name(out):
            yield f"{place}.output.topic: expected the name of a topic, got {out[:80]!r}"
        elif topics.is_internal(out) or out == topics.replies:
            yield f"{place}.output.topic: expected a topic for results, got {out}"
        elif out in readers:
            yield f"{place}.output.topic: expected a topic that no mapping reads, got {out}"
        yield from (f"{place}.{problem}" for problem in _part_problems(part))


def _part_problems(part: _MappingPart) -> Iterator[str]:
    output = part.output
    if part.shape == "openai-batch":
        for field in ("text", "id", "nest"):
            if getattr(part, field, None) or (field == "nest" and output.nest):
                where = "output." if field == "nest" else ""
                yield f"{where}{field}: expected nothing with shape openai-batch, whose lines say it themselves"
        if part.columns or part.types or output.names or output.constants:
            yield "columns: expected none with shape openai-batch, which is answered with batch lines"
        if output.format != "json" or output.vector != "array" or output.key != "id":
            yield "output: expected a topic and nothing else with shape openai-batch"
        return
    if part.text is None:
        yield "text: expected the field that is the text, or a template such as '{title}: {body}'"
    for own in output.names:
        if own not in _OWN:
            yield f"output.names.{own}: expected one of {', '.join(_OWN)}"
    names = [output.names.get(own, own) for own in _OWN] + list(output.constants)
    columns = [column.name for column in _columns_of(part) or ()]
    beside = names + ([output.nest] if output.nest else columns)
    for name, count in Counter(beside).items():
        if count > 1:
            yield f"output: expected each name once, got {name!r} {count} times; `output.names` and `columns` give others"
    if len(set(columns)) < len(columns):
        yield "columns: expected each name once"
    for name in part.types:
        if part.columns != "*" and name not in columns:
            yield f"types.{name}: expected one of the columns"
    if output.nest is not None and output.format != "json":
        yield f"output.nest: expected nothing with format {output.format}, whose results are flat"
    if output.format == "protobuf" and part.columns == "*":
        yield "columns: expected a list with format protobuf, whose fields have numbers by its order"


def _columns_of(part: _MappingPart) -> tuple[Column, ...] | None:
    if part.columns == "*":
        return None
    if isinstance(part.columns, dict):
        return tuple(Column(name, path) for name, path in part.columns.items())
    return tuple(Column(path.replace(".", "_"), path) for path in part.columns)


def _mapping(name: str, part: _MappingPart) -> Mapping:
    """One checked mapping; raises ValueError with the rest of the place and what was expected."""
    text = None
    if part.text is not None:
        try:
            text = Template.parse(part.text)
        except ValueError as error:
            raise ValueError(f"text: {error}") from None
    output = part.output
    return Mapping(
        name=name,
        shape=part.shape,
        topics=tuple(part.topics),
        text=text,
        id=part.id,
        columns=_columns_of(part),
        types=part.types,
        options=part.options,
        job=_job_of(part),
        deletes=part.deletes,
        ordered=part.ordered,
        null_text=part.null_text,
        output=Output(
            topic=output.topic,
            format=output.format,
            key=output.key,
            vector_form=output.vector,
            nest=output.nest,
            constants=output.constants,
            **output.names,
        ),
    )


def _job_of(part: _MappingPart) -> Job:
    batch = part.shape == "openai-batch"
    for name in _forbidden(part.options, batch=batch):
        raise ValueError(f"options.{name}: expected no such option: {_NOT_OPTIONS[name]}")
    try:
        job = decode_job(_json({**part.options, "input": "a text"}), "json")
    except BadJob as bad:
        raise ValueError(f"options: {bad}") from None
    if job.chunk is not None and job.chunk.mode == "late" and not batch:
        raise ValueError("options.chunk.mode: expected mean, since a row has one vector")
    return job


def _forbidden(options: Map[str, Any], *, batch: bool) -> Iterable[str]:
    return [name for name in options if name in _NOT_OPTIONS and not (batch and name in _KEPT_FOR_BATCHES)]


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"options: expected what JSON can hold ({type(error).__name__})") from None
