"""Records to Kafka, acknowledged: each place by itself, so that one which fails is the trouble of its own records alone.

A place (`Destination`) is a topic and partition. All that work share a producer. One that fails, or is silent while others are not,
is set apart: it gets a producer with few others, and returns after a probation (`Lanes`). Records that wait too long are given
up (`Places`), unless Kafka takes nothing at all: then everything waits. What each error means is in `broker_errors.py`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from itertools import count
from typing import Any, Final

import structlog

from embedq_consumer.delivery.broker_errors import meaning_of, name_of
from embedq_consumer.delivery.destination import Destination, Parcel, Settled
from embedq_consumer.delivery.kafka_producer import MakeProducers, Producer
from embedq_consumer.delivery.lane import UNREACHABLE, Lane, Lanes, Spawn
from embedq_consumer.delivery.outgoing import Outgoing, Place
from embedq_consumer.delivery.places import Ended, Places
from embedq_consumer.delivery.topic_directory import TopicDirectory
from embedq_consumer.fairness import BulkTurns, InteractiveTraffic
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.kafka import BatchFull, Evicted, KafkaError

log = structlog.get_logger()

_TICK_S: Final = 0.1
_STOOD_STILL_S: Final = 1.0
"""A tick that comes later than this found no turn: the process was stopped or starved, or a call of ours blocked its loop."""
_TOPICS_AGE_S: Final = 10.0
_FEW: Final = 8
"""Records of a delivery that are handed over while it is sent. Of more each place gets few at a time, and a round of the loop is little
beside what is done for them."""
_SENT_A_TURN: Final = 64
_TAKEN_A_TURN: Final = 256
"""Records that are handed to producers, and answers that are taken of them, in one of bulk's turns: a millisecond or two."""

Answer = tuple[Destination, Sequence[Parcel], "asyncio.Future[Any]"]
"""Of the parcels that a place had in one batch."""
Fail = Callable[[Destination, BaseException, float], None]


class _Pump:
    """Hands to each place's producer what it may have, and collects the producers' answers, of which `woken` tells.

    While interactive work comes, a producer gets less at once of what is not express.
    """

    def __init__(self, lanes: Lanes, bulk_turns: BulkTurns, spawn: Spawn, fail: Fail) -> None:
        """`fail` hears of a place that does not work, why, and since when."""
        self._lanes = lanes
        self._bulk_turns = bulk_turns
        self._spawn = spawn
        self._fail = fail
        self._looking: set[Place] = set()
        self._sent: dict[asyncio.Future[Any], tuple[Destination, list[Parcel]]] = {}
        self._answers: deque[Answer] = deque()
        self.woken = asyncio.Event()
        self.closed = False

    def run(
        self, destination: Destination, now: float, *, express: bool = False, most: int = sys.maxsize
    ) -> int:
        """Hand to the place's producer what it may have now, or the `express` part of it; what it may not have yet is tried
        again at the next tick. Returns how many it got, `most` at most."""
        if not destination.has_waiting:
            return 0
        destination.used_at = now
        lane = self._lanes.choose(destination)
        if lane is None or lane.producer is None:
            return 0
        if not lane.producer.has_leader(destination.place):
            self._look_up(destination, lane)
            return 0
        parcels = destination.take(now, beside=self._bulk_turns.needed, express=express, most=most)
        return self._hand_over(destination, parcels, lane.producer, now)

    def _hand_over(
        self, destination: Destination, parcels: Sequence[Parcel], producer: Producer, now: float
    ) -> int:
        """Hand these to the producer, a batch at a time; what it has no room for now waits again. How many it got."""
        records = [parcel.record for parcel in parcels]
        sent = 0
        while sent < len(parcels):
            try:
                sending, count = producer.send(destination.place, records[sent:] if sent else records)
            except BatchFull:
                for parcel in parcels[sent:]:
                    destination.add(parcel)
                break
            except KafkaError as error:
                sending, count = _failed(error), 1
            together = parcels[sent : sent + count]
            destination.opened(together, sending, now)
            if (batch := self._sent.get(sending)) is not None:  # records of a batch have one answer
                batch[1].extend(together)
            else:
                self._sent[sending] = destination, list(together)
                sending.add_done_callback(self._note)
            sent += count
        return sent

    @property
    def answered(self) -> bool:
        """Whether there are answers that nobody has taken."""
        return bool(self._answers)

    def answers(self, most: int) -> Iterator[Answer]:
        """Take the answers of so many parcels at most."""
        while self._answers and most > 0:
            destination, parcels, sending = self._answers.popleft()
            if len(parcels) > most:
                self._answers.appendleft((destination, parcels[most:], sending))
                parcels = parcels[:most]
            most -= len(parcels)
            yield destination, parcels, sending

    def _note(self, sending: asyncio.Future[Any]) -> None:
        self._answers.append((*self._sent.pop(sending), sending))
        self.woken.set()
        if self.closed and not sending.cancelled():
            sending.exception()  # nobody will look at it again, of which asyncio would complain

    def _look_up(self, destination: Destination, lane: Lane) -> None:
        """Ask the brokers about a place that its producer does not know, or that has no leader."""
        place, producer = destination.place, lane.producer
        if place in self._looking or producer is None or destination.pauses(time.monotonic()):
            return
        self._looking.add(place)
        asked_at = time.monotonic()

        async def look_up() -> None:
            try:
                await producer.look_up(place)
            except UNREACHABLE as error:
                self._fail(destination, error, asked_at)
            finally:
                self._looking.discard(place)
            self.run(destination, time.monotonic())

        self._spawn(look_up())


class Publisher:
    """Sends records; says of each, through `settled`, that the brokers have it, or why they will not.

    Invariants:
        - Every parcel is settled exactly once, unless the publisher is closed before.
        - A parcel without a time-out is settled with an error only if the brokers refuse the record itself.
        - State changes on the event loop alone; the producers' answers are taken in one task.
        - While interactive work comes, its results are sent at once, and what else there is to do is done in bulk's turns.
    """

    # More than six parameters: what it needs of the service, and what tests replace.
    def __init__(
        self,
        make: MakeProducers,
        metrics: Metrics,
        *,
        max_held: int,
        hinder: Callable[[str | None], None] = lambda reason: None,
        topics: TopicDirectory | None = None,
        ours: Collection[str] = (),
        bulk_turns: BulkTurns | None = None,
    ) -> None:
        """`max_held`: records that wait for failing places, all together. `hinder` is told why this replica is not ready.
        `ours`: embedq's own topics."""
        self._bulk_turns = bulk_turns or BulkTurns(InteractiveTraffic())
        self._metrics = metrics
        self._hinder = hinder
        self._running: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._serial = count()
        self._fresh: dict[Place, Destination] = {}
        self._express: dict[Place, Destination] = {}
        self._left = asyncio.Event()
        self._lanes = Lanes(make, self._spawn, metrics)
        self._pump = _Pump(self._lanes, self._bulk_turns, self._spawn, self._fail)
        self.topics = topics or TopicDirectory()
        self._places = Places(self.topics.partitions, max_held=max_held, now=time.monotonic(), ours=ours)
        self.presence = self._places.presence

    # -- life -----------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, learn the topics, and begin to work. After an error it may be called again.

        Raises:
            KafkaError, TimeoutError, OSError: no broker answers, or lets us in.
        """
        producer = await self._lanes.common.connect()
        try:
            await self.topics.refresh(producer, since=time.monotonic())
        except BaseException:
            await self._lanes.common.close()
            raise
        self._spawn(self._run())
        self._spawn(self._run_in_turns())
        self._spawn(self._keep_topics())

    async def watch(self) -> None:
        """Wait until something here fails that is no doing of the brokers, and raise it."""
        await asyncio.shield(self._failure)

    async def close(self) -> None:
        """Disconnect. What was not acknowledged was not committed either."""
        self._pump.closed = True
        for task in self._running:
            task.cancel()
        await self._lanes.close()

    # -- what others ask ------------------------------------------------------------------------------------------------

    def send(self, parcels: Sequence[Parcel]) -> None:
        """Send records; what each has for `settled` is called once, later. Without a time-out it waits until its place works; with
        one, also no longer for a place that fails once it is `urgent`."""
        now = time.monotonic()
        wanted = self._places.wanted([parcel.record for parcel in parcels])
        places: dict[Destination, bool] = {}  # whether somebody waits for something there
        for parcel, partition in zip(parcels, wanted, strict=True):
            parcel.accept(next(self._serial), now)
            destination = self._places.destination_of(parcel.record, partition, now)
            if not destination.given_up or destination.accepts(parcel, now):
                destination.add(parcel)
                places[destination] = places.get(destination, False) or parcel.record.express
            else:
                asyncio.get_running_loop().call_soon(parcel.settled, destination.undelivered(now))
        for destination, express in places.items():
            if (
                express and len(parcels) <= _FEW
            ):  # at once: to wake a task for it would take a round of the event loop
                self._pump.run(destination, now, express=True)
            if destination.has_waiting:  # its producer gets it in a moment, with that of other deliveries
                self._fresh[destination.place] = destination
                if express:
                    self._express[destination.place] = destination
                self._pump.woken.set()

    async def publish(
        self, records: Sequence[Outgoing], *, timeout_s: float | None = None
    ) -> list[Exception | None]:
        """Send all and wait for all. For each record None, or why the brokers will not have it."""
        outcomes = [_outcome() for _ in records]
        self.send(
            [
                Parcel(record, _into(outcome), timeout_s)
                for record, outcome in zip(records, outcomes, strict=True)
            ]
        )
        return list(await asyncio.gather(*outcomes))

    async def announce(self, records: Sequence[Outgoing], *, within: float) -> None:
        """Send what will soon be out of date, and wait for it, at most so long. It may get lost."""
        try:
            async with asyncio.timeout(within):
                await self.publish(records, timeout_s=within)
        except TimeoutError:
            self._places.withdraw(records)

    async def refresh_topics(self) -> None:
        """See topics that were made since, and those that are gone. While Kafka is away, this waits for it."""
        await self.topics.refresh_at_last(lambda: self._lanes.common.producer)

    def _pump_in_turn(self, destination: Destination, now: float) -> None:
        if not self._bulk_turns.needed:
            self._pump.run(destination, now)
        elif destination.has_waiting:
            self._pump.run(destination, now, express=True)
            self._fresh[destination.place] = destination
            self._left.set()

    # -- from the producers -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Take the producers' answers as they come, and look at every place now and then."""
        next_tick = 0.0
        self._pump.woken.set()
        while True:
            await self._pump.woken.wait()
            self._pump.woken.clear()
            now = time.monotonic()
            if self._bulk_turns.needed:
                for destination in self._express.values():
                    self._pump.run(destination, now, express=True)
                self._left.set()
            else:
                self._take_answers(now)
                fresh, self._fresh = self._fresh, {}
                for destination in fresh.values():
                    self._pump.run(destination, now)
            self._express.clear()
            if now >= next_tick:
                if 0.0 < next_tick < now - _STOOD_STILL_S:
                    self._places.excuse(now - next_tick, now)
                self._tick(now)
                next_tick = now + _TICK_S
                asyncio.get_running_loop().call_later(_TICK_S, self._pump.woken.set)

    async def _run_in_turns(self) -> None:
        """Do what is left in bulk's turns: in each, take some answers, or else send some records."""
        while True:
            await self._left.wait()
            await self._bulk_turns.turn()
            now, left = time.monotonic(), _SENT_A_TURN
            if self._pump.answered:
                self._take_answers(now, _TAKEN_A_TURN)
            while self._fresh and left > 0:
                place, destination = next(iter(self._fresh.items()))
                left -= self._pump.run(destination, now, most=left)
                if left > 0:
                    del self._fresh[place]
            if not self._pump.answered and not self._fresh:
                self._left.clear()

    def _take_answers(self, now: float, most: int = sys.maxsize) -> None:
        taken = size = 0
        touched: dict[Destination, bool] = {}  # whether the brokers took something there
        for destination, sent, sending in self._pump.answers(most):
            error = KafkaError("the producer was closed") if sending.cancelled() else sending.exception()
            parcels = [one for one in sent if one.sending is sending]  # the others were taken back meanwhile
            if not parcels:
                continue
            if error is not None:
                touched.setdefault(destination, False)
                for parcel in parcels:
                    self._take_back(destination, parcel, error)
                continue
            if not touched.get(destination):
                touched[destination] = True
                destination.note_taken(now)
            for parcel in parcels:
                destination.closed(parcel)
                taken += 1
                size += len(parcel.record.value or b"")
                parcel.settled(None)
        if taken:
            self._metrics.results.inc(taken)
            self._metrics.result_bytes.inc(size)
            if self._places.note_taken(now):
                log.info("kafka_back")
        for destination in touched:
            self._pump_in_turn(destination, now)

    def _take_back(self, destination: Destination, parcel: Parcel, error: BaseException) -> None:
        """A parcel failed: it is refused, or waits again."""
        shared = destination.shared(parcel)
        destination.closed(parcel)
        if isinstance(error, Evicted):
            destination.add(parcel)
        elif meaning_of(error).scope == "record":
            # Nothing is wrong with the place, but the producer's sequence may have a gap there.
            destination.set_apart()
            self._lanes.leave(destination.place)
            if shared:
                parcel.alone = True
                destination.add(parcel)
            else:
                parcel.settled(_plain(error))
        else:
            destination.add(parcel)
            self._fail(destination, error, parcel.sent_at)

    def _fail(self, destination: Destination, error: BaseException, since: float) -> None:
        """A place does not work; `since` is when what failed was sent."""
        if destination.failing_since is None:
            topic, partition = destination.place
            log.warning("destination_set_apart", topic=topic, partition=partition, reason=name_of(error))
        destination.note_failure(error, time.monotonic(), since)
        self._lanes.leave(destination.place)
        if meaning_of(error).action == "refuse":
            timed = [parcel for parcel in destination.waiting() if parcel.timeout_s is not None]
            destination.remove(timed)
            _settle([(parcel, _plain(error)) for parcel in timed])

    # -- the tick -----------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        presence = self._places.presence
        if self._places.just_went_away(now):
            log.warning("kafka_away", reason=self._lanes.said(presence.taken_at))
        for destination in self._places:
            if destination.busy:
                self._look_at(destination, now)
        _settle(self._places.excess(now))
        for place, forgotten in self._places.forget_idle(now):
            self._lanes.let_go(place)
            if forgotten and not self._places.knows(place[0]):
                self._lanes.forget(place[0])
        for place in self._lanes.keep():
            self._lanes.strand(self._places.at(place))
        said = self._lanes.said(presence.taken_at)
        self._lanes.renew_if(presence.away_since is not None, now, said, self._start_anew)
        self._hinder(self._places.trouble(said, now))

    def _look_at(self, destination: Destination, now: float) -> None:
        """One place: is it silent, are its records overdue, may they go elsewhere, may it return?"""
        place = destination.place
        lane = self._lanes.get(place)
        silent_since = None if lane is None else self._places.silent(destination, lane.patience_s, now)
        if silent_since is not None and lane is not None and lane.producer is not None:
            said = lane.producer.last_error(place, silent_since)
            self._lanes.recall(destination)
            self._fail(destination, said or TimeoutError(), silent_since)
        if ended := self._places.overdue(destination, now):
            if destination.confirmed(now):
                self.topics.forget(place[0])
            _settle(ended)
        for other in self._places.elsewhere(destination, now):
            self._pump.run(other, now)
        if destination.apart and destination.may_return(now) and self._lanes.may_return(place, now):
            destination.rejoin()
        self._pump_in_turn(destination, now)

    def _start_anew(self) -> None:
        """The common producer was replaced since nothing went through it: everything begins with the new one."""
        for destination in self._places:
            self._lanes.strand(destination)
            destination.rejoin()
            self._pump.run(destination, time.monotonic())

    # -- tasks --------------------------------------------------------------------------------------------------------------

    async def _keep_topics(self) -> None:
        """Look at all topics now and then, so that one which was deleted is noticed."""
        while True:
            await asyncio.sleep(_TOPICS_AGE_S)
            await self.refresh_topics()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._failure.done():
            self._failure.set_exception(error)


def _settle(ended: Sequence[Ended]) -> None:
    for parcel, reason in ended:
        parcel.settled(reason)


def _outcome() -> asyncio.Future[Exception | None]:
    return asyncio.get_running_loop().create_future()


def _into(outcome: asyncio.Future[Exception | None]) -> Settled:
    def settle(error: Exception | None) -> None:
        if not outcome.done():  # whoever waited may have given up
            outcome.set_result(error)

    return settle


def _failed(error: KafkaError) -> asyncio.Future[Any]:
    """What `send` would have returned, had it not raised at once."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def _plain(error: BaseException) -> Exception:
    if not isinstance(error, Exception):
        raise error
    return error
