"""The Schema Registry: what it said is known at once, and what it has not said yet is asked for in threads, until it answers."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

import msgspec
import structlog

from embedq_consumer.shapes.registry.schemas import (
    Fetch,
    Given,
    Reader,
    Refused,
    Registration,
    Want,
    reader_of,
)
from embedq_consumer.threads import WorkerThreads
from embedq_shared.backoff import backoff
from embedq_shared.secret import Secret

log = structlog.get_logger()

Answer = TypeVar("Answer")

_THREADS: Final = 4
"""Requests at once. A registry that hangs holds these and nothing else."""
_TIMEOUT_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_MOST_KNOWN: Final = 10_000
"""Schemas that are remembered; the one that was asked for longest ago is forgotten first."""
_REFUSED_FOR_S: Final = 30.0
"""A schema that was not there may be registered meanwhile; but each record of it must not cost a request."""
_MOST_REASON: Final = 160
_LOOKS: Final = 3
"""For a schema that is not there: a registry's follower may learn of it a moment after who wrote it."""


class Unreachable(Exception):
    """The registry does not answer, or not to us. `args[0]` says why; that may heal."""


class Client(Protocol):
    """What is asked of a registry. The calls block."""

    def fetch(self, schema: int | str) -> Given | Refused:
        """The schema of this number or GUID; raises Unreachable."""

    def register(self, wanted: Registration) -> int | Refused:
        """The schema's number, new or not; raises Unreachable."""

    def close(self) -> None:
        """Disconnect."""


class RegistryOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the registry is, and how to log in."""

    url: str
    username: str = ""
    password: Secret = Secret("")
    cafile: str = ""


class SchemaRegistry:
    """Knows schemas, and learns those that it does not know.

    Invariants:
        - `reader` and `number` never wait; `learn` returns only once each is known or refused.
        - A registry that is away costs no record: whoever waits for it waits. It is never a refusal.
        - Of one schema there is one request at a time.
    """

    def __init__(
        self,
        client: Client,
        hinder: Callable[[str | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hinder` hears why the registry is not there, or None."""
        self._client = client
        self._hinder = hinder
        self._clock = clock
        self._readers: OrderedDict[Fetch, Reader] = OrderedDict()
        self._numbers: OrderedDict[Registration, int] = OrderedDict()
        self._refused: OrderedDict[Want, tuple[float, Refused]] = OrderedDict()
        self._learning: dict[Want, asyncio.Task[None]] = {}
        self._threads = WorkerThreads("schemas", _THREADS)

    def reader(self, want: Fetch) -> Reader | Refused | None:
        """Who reads values of a schema; None if the registry must be asked first."""
        return self._readers.get(want) or self._refusal(want)

    def number(self, want: Registration) -> int | Refused | None:
        """A schema's number; None if the registry must be asked first."""
        found = self._numbers.get(want)
        return self._refusal(want) if found is None else found

    async def learn(self, want: Want) -> None:
        """Ask for it, and again until the registry answers."""
        task = self._learning.get(want)
        if task is None:
            task = self._learning[want] = asyncio.create_task(self._learn(want), name="learn_schema")
            task.add_done_callback(lambda _: self._learning.pop(want, None))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Ask no more. A request that hangs is left behind."""
        for task in list(self._learning.values()):
            task.cancel()
        await asyncio.gather(*self._learning.values(), return_exceptions=True)
        if await asyncio.to_thread(self._threads.close):
            await asyncio.to_thread(self._client.close)

    def _refusal(self, want: Want) -> Refused | None:
        found = self._refused.get(want)
        return found[1] if found is not None and self._clock() < found[0] else None

    async def _learn(self, want: Want) -> None:
        tries = looks = 0
        while True:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, want)
            except Unreachable as error:
                if tries == 0:
                    log.warning("waiting_for_schema_registry", reason=error.args[0])
                self._hinder(f"waiting for the Schema Registry: {error.args[0]}")
                await asyncio.sleep(backoff(tries, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
                tries += 1
                continue
            self._hinder(None)
            looks += 1
            if isinstance(found, Refused) and found.may_come and looks < _LOOKS:
                await asyncio.sleep(backoff(looks, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
                continue
            self._note(want, found)
            return

    def _ask(self, want: Want) -> Reader | int | Refused:
        """In a thread."""
        if isinstance(want, Registration):
            return self._client.register(want)
        given = self._client.fetch(want.schema)
        return given if isinstance(given, Refused) else _usable(given)

    def _note(self, want: Want, found: Reader | int | Refused) -> None:
        if isinstance(found, Refused):
            log.warning("schema_refused", reason=found.reason)
            _remember(self._refused, want, (self._clock() + _REFUSED_FOR_S, found))
        elif isinstance(found, int):
            _remember(self._numbers, want, found)
        else:
            _remember(self._readers, want, found)


def _usable(given: Given) -> Reader | Refused:
    try:
        return reader_of(given)
    except ValueError as error:
        return Refused(str(error))


def _remember(known: OrderedDict[Any, Any], want: Want, found: object) -> None:
    known[want] = found
    while len(known) > _MOST_KNOWN:
        known.popitem(last=False)


# -- the real one ------------------------------------------------------------------------------------------------------


class MissingExtra(Exception):
    """The packages of the extra `schema-registry` are not installed."""


def connect(options: RegistryOptions) -> Client:
    """A client of confluent-kafka's. Asks nothing yet.

    Raises:
        MissingExtra: its packages are not installed.
        ValueError: the address cannot be used.
    """
    try:
        import fastavro  # noqa: F401  # said now, not with the first record
        import google.protobuf  # noqa: F401
        from confluent_kafka.schema_registry import SchemaRegistryClient
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'embedq[schema-registry]'") from None
    settings: dict[str, Any] = {"url": options.url, "timeout": _TIMEOUT_S, "max.retries": 0}
    if options.username:
        settings["basic.auth.user.info"] = f"{options.username}:{options.password.reveal()}"
    if options.cafile:
        settings["ssl.ca.location"] = options.cafile
    return ConfluentClient(SchemaRegistryClient(settings))


class ConfluentClient:
    """confluent-kafka's client, with its errors told apart: what the registry says of a schema, and that it does not answer."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def fetch(self, schema: int | str) -> Given | Refused:
        """The schema of this number or GUID."""
        return self._asked(lambda: self._given(schema))

    def register(self, wanted: Registration) -> int | Refused:
        """The schema's number, new or not."""
        from confluent_kafka.schema_registry import Schema

        schema = Schema(wanted.text, wanted.kind)
        return self._asked(lambda: int(self._client.register_schema(wanted.subject, schema)))

    def close(self) -> None:
        """Disconnect."""
        self._client.close()

    def _given(self, schema: int | str) -> Given:
        # Protobuf's text form has no parser in Python: the registry serializes it. Others ignore the format.
        if isinstance(schema, int):
            found = self._client.get_schema(schema, fmt="serialized")
        else:
            found = self._client.get_schema_by_guid(schema, fmt="serialized")
        references: OrderedDict[str, str] = OrderedDict()
        self._collect(found, references, 0)
        return Given(
            kind=found.schema_type or "AVRO", text=found.schema_str, references=tuple(references.items())
        )

    def _collect(self, schema: Any, found: OrderedDict[str, str], depth: int) -> None:
        """The schemas that one refers to, each after those that it refers to itself."""
        for reference in schema.references or ():
            if reference.name in found or depth > 32:
                continue
            its = self._client.get_version(
                reference.subject, reference.version, deleted=True, fmt="serialized"
            )
            self._collect(its.schema, found, depth + 1)
            found[reference.name] = its.schema.schema_str

    def _asked(self, ask: Callable[[], Answer]) -> Answer | Refused:
        from confluent_kafka.schema_registry.error import SchemaRegistryError

        try:
            return ask()
        except SchemaRegistryError as error:
            status = error.http_status_code
            said = " ".join(str(error.error_message).split())[:_MOST_REASON]
            if status in (404, 409, 422):
                return Refused(f"the registry says {status}: {said}", may_come=status == 404)
            raise Unreachable(f"it answers {status}: {said}") from None
        except Exception as error:  # noqa: BLE001  # httpx's and the system's, whose classes differ by version: no answer
            raise Unreachable(f"{type(error).__name__}: no answer") from None
