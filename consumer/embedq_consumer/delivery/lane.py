"""Producers and the places that use them: one for all that work, a few for those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from embedq_consumer.delivery.broker_errors import name_of
from embedq_consumer.delivery.destination import Destination
from embedq_consumer.delivery.kafka_producer import MakeProducers, Producer
from embedq_consumer.delivery.outgoing import Place
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.backoff import backoff
from embedq_shared.kafka import KafkaError

log = structlog.get_logger()

UNREACHABLE: Final = (KafkaError, TimeoutError, OSError)
"""The brokers failed, as opposed to this program."""
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_COMMON_PATIENCE_S: Final = 3.0
"""A few tries, and a leader that moves. Until then a slow place costs those that share its requests a second at most."""
_APART_PATIENCE_S: Final = 7.0
"""Longer than a request there may take, so that the broker's reason comes first."""
_APART_LANES: Final = 8
"""With more places set apart, some share one."""
_RENEW_S: Final = 60.0
"""Between two common producers that are made so that places can return to one."""

_RENEWALS_S: Final = (1.0, 5.0, 10.0, 20.0, 30.0)
"""Between two new producers while Kafka is away: what it takes then may be known to a new one alone. The first is the pause
after a connection that failed; each one that connects lets the next one wait longer."""

Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Lane:
    """One producer. `patience_s`: how long it may keep silent about a record while other records are taken.

    `closed_to` are places that it must not be given any more.
    """

    def __init__(self, make: Callable[[], Producer], *, patience_s: float, born: float = 0.0) -> None:
        self._make = make
        self.patience_s = patience_s
        self.born = born
        self.producer: Producer | None = None
        self.error: BaseException | None = None
        """Why it is not connected, if it is not."""
        self.users: set[Place] = set()
        self.closed_to: set[Place] = set()

    async def connect(self) -> Producer:
        """One try.

        Raises:
            KafkaError, TimeoutError, OSError: no broker answers.
        """
        producer = self._make()
        try:
            await producer.start()
        except BaseException:
            await producer.abandon()
            raise
        self.producer = producer
        return producer

    async def connect_at_last(self) -> None:
        """Try until it works."""
        attempt = 0
        while True:
            try:
                await self.connect()
                return
            except UNREACHABLE as error:
                self.error = error
            await asyncio.sleep(backoff(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
            attempt += 1

    def shut(self, place: Place) -> None:
        """Take back what the producer has of this place, and give it no more."""
        self.closed_to.add(place)
        if self.producer is not None:
            self.producer.evict(place)

    @property
    def broken(self) -> bool:
        """Whether its producer has ended by itself."""
        return self.producer is not None and not self.producer.alive

    async def close(self) -> None:
        """Disconnect, within a bounded time."""
        producer, self.producer = self.producer, None
        if producer is not None:
            with contextlib.suppress(*UNREACHABLE):
                await producer.abandon()


class Lanes:
    """The producers: one in common for the places that work, and a few for those that are set apart.

    Invariants:
        - A place has records in one producer at a time: it changes only once none has any.
        - What the common producer gave up of a place makes a gap in its sequence there; that place uses another one from then on.
    """

    def __init__(self, make: MakeProducers, spawn: Spawn, metrics: Metrics) -> None:
        """`spawn` runs work in a task."""
        self._make = make
        self._spawn = spawn
        self._metrics = metrics
        self._lane_of: dict[Place, Lane] = {}
        self._apart: list[Lane] = []
        self._retired: set[Lane] = set()
        self.common = self._new_common(0.0)
        self.renewing = False
        self._renewals = 0
        self._renew_at = 0.0

    async def close(self) -> None:
        """Disconnect all."""
        await asyncio.gather(*(lane.close() for lane in {self.common, *self._apart, *self._retired}))

    def get(self, place: Place) -> Lane | None:
        """The lane that a place uses now."""
        return self._lane_of.get(place)

    def choose(self, destination: Destination) -> Lane | None:
        """The lane for a place's next records; None: wait until its producer is done with those before."""
        place = destination.place
        lane = self._lane_of.get(place)
        if lane is not None:
            fits = lane in self._apart if destination.apart else lane is self.common
            if fits and place not in lane.closed_to:
                return lane
            if not destination.idle:
                return None
        if place in self.common.closed_to:
            destination.set_apart()
        self.let_go(place)
        lane = self._emptiest() if destination.apart else self.common
        lane.users.add(place)
        self._lane_of[place] = lane
        return lane

    def leave(self, place: Place) -> None:
        """A place that is set apart takes nothing more from the producer of those that work."""
        lane = self._lane_of.get(place)
        if lane is not None and lane not in self._apart and place not in lane.closed_to:
            lane.shut(place)

    def let_go(self, place: Place) -> None:
        """A place uses no lane."""
        if (lane := self._lane_of.pop(place, None)) is not None:
            lane.users.discard(place)

    def forget(self, topic: str) -> None:
        """Nothing was sent to this topic for a while."""
        if self.common.producer is not None:
            self.common.producer.forget(topic)

    def recall(self, destination: Destination) -> None:
        """Take back what the place's producer has."""
        destination.recall()
        lane = self._lane_of.get(destination.place)
        if lane is not None and lane.producer is not None:
            lane.producer.evict(destination.place)

    def strand(self, destination: Destination) -> None:
        """The place's producer is given up."""
        self.recall(destination)
        self.let_go(destination.place)

    def may_return(self, place: Place, now: float) -> bool:
        """Whether the common producer may have this place; if not, the next one may, which is made now and then."""
        if place not in self.common.closed_to:
            return True
        if now - self.common.born > _RENEW_S:
            self.renew("places that work again", lambda: None)
        return False

    def keep(self) -> list[Place]:
        """Close what nobody uses, and what has ended by itself: the places whose records must be taken back."""
        for lane in [one for one in self._retired if not one.users]:
            self._retired.discard(lane)
            self._spawn(lane.close())
        stranded: list[Place] = []
        for lane in [one for one in self._apart if not one.users or one.broken]:
            self._apart.remove(lane)
            stranded += lane.users
            self._spawn(lane.close())
        return stranded

    def renew_if(self, away: bool, now: float, reason: str, renewed: Callable[[], None]) -> None:
        """Another common producer where this one has ended, and now and then while Kafka is away."""
        if not away:
            self._renewals = 0
        if self.common.broken or (away and now >= self._renew_at):
            self._renew_at = now + _RENEWALS_S[0]
            self.renew(reason, renewed)

    def renew(self, reason: str, renewed: Callable[[], None]) -> None:
        """A new common producer. Once it is connected `renewed` is called, and places change over as they come."""
        if self.renewing:
            return
        self.renewing = True
        lane = self._new_common(time.monotonic())

        async def renew() -> None:
            try:
                await lane.connect()
            except UNREACHABLE as error:
                self.common.error = error
                return
            finally:
                self.renewing = False
            self._metrics.producer_restarts.inc()
            log.warning("producer_replaced", reason=reason)
            self._retired.add(self.common)
            self.common = lane
            self._renewals += 1
            pause = _RENEWALS_S[min(self._renewals, len(_RENEWALS_S) - 1)]
            self._renew_at = time.monotonic() + pause
            renewed()

        self._spawn(renew())

    def said(self, since: float) -> str:
        """What the brokers said last, or why they cannot be asked."""
        lanes = (self.common, *self._apart)
        for lane in lanes:
            for place in lane.users:
                error = None if lane.producer is None else lane.producer.last_error(place, since)
                if error is not None:
                    return name_of(error)
        return next((name_of(lane.error) for lane in lanes if lane.error is not None), "no answer")

    def _emptiest(self) -> Lane:
        """Of the lanes for places set apart the one with the fewest, or a new one."""
        emptiest = min(self._apart, key=lambda lane: len(lane.users), default=None)
        if emptiest is not None and (not emptiest.users or len(self._apart) >= _APART_LANES):
            return emptiest
        lane = Lane(self._make.apart, patience_s=_APART_PATIENCE_S)
        self._apart.append(lane)
        self._spawn(lane.connect_at_last())
        return lane

    def _new_common(self, now: float) -> Lane:
        return Lane(self._make.common, patience_s=_COMMON_PATIENCE_S, born=now)
