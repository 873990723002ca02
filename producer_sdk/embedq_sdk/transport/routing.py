"""Which job topic a job goes to: that of the pool in which its alias lives, as the control topic says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final, Protocol

from embedq_sdk.errors import EmbedError, KafkaRefused, KafkaUnavailable, TopicMissing
from embedq_sdk.transport.kafka import CLOSE_TIMEOUT_S, KafkaConnection
from embedq_sdk.transport.pending_jobs import PendingJob, Route
from embedq_shared.fleet import Routes
from embedq_shared.kafka import Polled, UnreadableRecord, WholePartition
from embedq_shared.messages import DEFAULT_ALIAS
from embedq_shared.topics import Topics

log = logging.getLogger(__name__)
logging.getLogger("embedq_sdk").addHandler(logging.NullHandler())  # silent, unless the program logs

_OPEN_S: Final = 30.0
"""The topic is compacted and small."""
_POLL_MS: Final = 1000
"""A new record comes at once all the same; this is how often a broker answers a client in whose service nothing changes."""
_PAUSE_S: Final = 1.0
"""Between two tries where Kafka is away."""
_REFUSED_PAUSE_S: Final = 30.0
"""Between two tries where it says that they will not help."""
_LOOK_S: Final = 10.0
"""Between two looks at which topics there are: pools are made by people."""


class ControlRecords(Protocol):
    """Where the router reads."""

    async def topics(self) -> Collection[str]:
        """The names of all topics that we may see."""

    async def open(self) -> Iterable[Polled]:
        """The control topic's records until now."""

    async def next(self) -> Iterable[Polled]:
        """Those since the last call; waits a moment for one."""

    async def close(self) -> None:
        """Disconnect. It may be opened again."""


class Router:
    """Owns what a client knows of pools. One task, `run`, reads; everything else is at once, but for `ready`.

    Invariants:
        - As long as no pool but the default one has lanes that we may see, nothing is read and every job goes to the default pool's.
        - A job that names no model, or `default`, goes there too, and waits for nothing.
        - The first job of another alias waits until the control topic was read; from then on its records are followed. Where we may
          not read it, jobs go to the default pool's lanes.
        - A job is sent to topics alone that are there.
        - One that was answered with `unknown_model` is sent once more if its alias lives elsewhere, as is known by then.
    """

    def __init__(self, topics: Topics, servers: str = "", records: ControlRecords | None = None) -> None:
        """Without `records` there is the default pool alone. `servers` is for messages."""
        self.topics = topics
        self._servers = servers
        self._records = records
        self._pools: frozenset[str] = frozenset()
        self._routes = Routes()
        self._read = asyncio.Event()
        self._asked = asyncio.Event()
        self._doubts: list[Callable[[], None]] = []
        self._looked_at = float("-inf")

    def see_topics(self, names: Collection[str]) -> None:
        """These are all topics that there are."""
        self._pools = frozenset(self.topics.pools_among(names))

    def topic(self, route: Route) -> str:
        """Where a job goes.

        Raises:
            TopicMissing: its alias lives in a pool that has no lanes, or none that we may see.
        """
        if route.model is None or is_fixed(route.model) or not self._pools:
            return self.topics.lane(route.lane)
        pool = self._routes.pool_of_job(route.model, route.id)
        found = self.topics.of(pool).lane(route.lane)
        if pool is not None and pool not in self._pools:
            self._asked.set()
            raise TopicMissing(servers=self._servers, topic=found)
        return found

    def knows(self, model: str | None) -> bool:
        """Whether it is known where jobs of an alias go, or needs no reading."""
        return self._read.is_set() or not self._pools or is_fixed(model)

    async def ready(self, model: str | None, until: float) -> None:
        """Wait until it is known where jobs of an alias go, until this time of the event loop's clock at most.

        Raises:
            KafkaUnavailable: it is not known by then.
        """
        if self.knows(model):
            return
        self._asked.set()
        try:
            async with asyncio.timeout_at(until):
                await self._read.wait()
        except TimeoutError:
            reason = "the control topic, which says where jobs go, was not read in time"
            raise KafkaUnavailable(servers=self._servers, reason=reason) from None

    def try_elsewhere(self, job: PendingJob, refusal: EmbedError, send: Callable[[PendingJob], None]) -> None:
        """End a job that no model was found for, by `refusal`, or send it once more: as soon as it is known where its alias lives,
        and if that is elsewhere."""
        route, job.route = job.route, None  # once is enough
        if route is None or is_fixed(route.model) or self._records is None:
            job.fail(refusal)
            return

        def decide() -> None:
            try:
                found = self.topic(route)
            except TopicMissing as missing:
                job.fail(missing)
                return
            if found == job.topic:
                job.fail(refusal)
            elif not job.future.done():
                job.topic = found
                job.begin_anew()
                send(job)

        if self._read.is_set() or (not self._pools and self._has_looked()):
            decide()
        else:
            self._doubts.append(decide)
            self._asked.set()

    # -- reading --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read what is asked for, until cancelled."""
        records = self._records
        if records is None:
            raise RuntimeError("a router without records has nothing to read. This is a bug.")
        await self._asked.wait()
        while True:
            pause = _PAUSE_S
            try:
                if not self._pools:
                    await self._look(records)
                self._asked.clear()
                if self._pools:
                    await self._follow(records)
                self._settle()
                await self._asked.wait()
                continue
            except (KafkaRefused, TopicMissing) as error:
                log.warning(
                    "the control topic can't be read: jobs of every alias go where they went before, or to the default pool: %s",
                    error,
                )
                self._know(self._routes)
                pause = _REFUSED_PAUSE_S
            except KafkaUnavailable:
                if not self._pools:
                    self._settle()  # nothing is known, as before
            finally:
                await records.close()
            await asyncio.sleep(pause)

    async def _follow(self, records: ControlRecords) -> None:
        """For ever, but for an error."""
        routes = Routes()  # from the beginning: what was removed meanwhile is gone
        _take(routes, await records.open())
        missing: set[str] = set()
        while True:
            before, missing = missing, routes.pools() - self._pools
            if missing - before or (self._asked.is_set() and not self._has_looked()):
                await self._look(records)
                self._asked.clear()
                missing = routes.pools() - self._pools
            self._know(routes)
            _take(routes, await records.next())

    async def _look(self, records: ControlRecords) -> None:
        """See which topics there are."""
        self.see_topics(await records.topics())
        self._looked_at = time.monotonic()

    def _know(self, routes: Routes) -> None:
        self._routes = routes
        self._read.set()
        self._settle()

    def _settle(self) -> None:
        doubts, self._doubts = self._doubts, []
        for decide in doubts:
            decide()

    def _has_looked(self) -> bool:
        """Whether it was a moment ago that we saw which topics there are."""
        return time.monotonic() - self._looked_at < _LOOK_S


def is_fixed(model: str | None) -> bool:
    """Whether jobs that name this model go to the default pool, whatever the control topic says."""
    return model is None or model == DEFAULT_ALIAS


def _take(routes: Routes, records: Iterable[Polled]) -> None:
    for record in records:
        if not isinstance(record, UnreadableRecord):
            routes.see(record.key, record.value)


class ControlReader:
    """The control topic on Kafka; a `ControlRecords`."""

    def __init__(
        self, connection: KafkaConnection, topics: Topics, names: Callable[[], Awaitable[Collection[str]]]
    ) -> None:
        """`names` asks for the topics that there are; raises `KafkaUnavailable`."""
        self._connection = connection
        self._topics = topics
        self._names = names
        self._partition: WholePartition | None = None

    async def topics(self) -> Collection[str]:
        """The names of all topics that we may see.

        Raises:
            KafkaUnavailable.
        """
        return await self._names()

    async def open(self) -> Iterable[Polled]:
        """The records until now.

        Raises:
            KafkaUnavailable, TopicMissing.
        """
        name = self._topics.control
        if name not in await self._names():  # asking for one by its name could create it
            raise TopicMissing(servers=self._connection.servers, topic=name)
        self._partition = self._connection.whole_partition(name, poll_ms=_POLL_MS)
        return await self._connection.call(_OPEN_S, "reading the control topic", self._partition.open())

    async def next(self) -> Iterable[Polled]:
        """Those since the last call; waits for one for a second at most.

        Raises:
            KafkaUnavailable.
        """
        if self._partition is None:
            raise RuntimeError("the control topic is followed before it was opened. This is a bug.")
        return await self._connection.call(_OPEN_S, "reading the control topic", self._partition.next())

    async def close(self) -> None:
        """Disconnect."""
        partition, self._partition = self._partition, None
        if partition is not None:
            await partition.close(CLOSE_TIMEOUT_S)
