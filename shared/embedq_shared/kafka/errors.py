"""Every error of aiokafka's, and those of the protocol that it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import getmembers, isclass

import aiokafka.errors
from aiokafka.errors import BrokerResponseError


class UnsupportedCompressionTypeError(BrokerResponseError):  # type: ignore[misc]  # aiokafka has no type information
    """A broker of this version, or this topic, does not take the batch's codec."""

    errno = 76
    message = "UNSUPPORTED_COMPRESSION_TYPE"


class InvalidRecordError(BrokerResponseError):  # type: ignore[misc]
    """The broker checked the record and does not take it: on a compacted topic, one without a key."""

    errno = 87
    message = "INVALID_RECORD"


# aiokafka's table ends at 79; what it lacks comes out as `UnknownError`, as if the broker itself were broken.
for _kind in (UnsupportedCompressionTypeError, InvalidRecordError):
    aiokafka.errors.kafka_errors.setdefault(_kind.errno, _kind)


def error_kinds() -> Iterator[type[Exception]]:
    """Each class of error that aiokafka has, once, and those above."""
    found = {kind for _, kind in getmembers(aiokafka.errors, isclass) if issubclass(kind, Exception)}
    found |= {UnsupportedCompressionTypeError, InvalidRecordError}
    yield from sorted(found, key=lambda kind: kind.__name__)
