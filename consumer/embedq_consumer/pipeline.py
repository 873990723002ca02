"""The path of a job, a step a line.

take         the intake starts records that were polled and parked: in fair order by client, as far as there is room
admit        is it a job that can run here? If not: rejected, which `Deliverer` answers. A row that was deleted is answered at once,
             and one whose schema is not known yet waits in a task of its own
weigh        its texts and the size of its results count against its client's share
check        texts over the size limit are settled with an error; of equal inputs of a job only the first goes on
look up      what the cache holds is settled; meanwhile a lone job's texts become tokens, if the tokenizer has nothing else to do, and
             a lone short text runs, if the device has nothing else to do either (`HeadStart`); a hit answers, and what ran is dropped
join         an input whose text is under way already waits for that one's vector
tokenize     the first of equal texts becomes tokens and waits in its lane's queue; what expired meanwhile does not
             … `BatchLoop` takes a micro-batch, `BatchRunner` computes it and comes back with `computed` …
postprocess  each input's own outcome: finite, cut to the dimensions, normalized, quantized
settle       the job notes the outcome; with its last one it is complete
deliver      results are encoded, published and acknowledged; then `Deliverer` finishes the record, and only from
             there on may its offset be committed (`intake`)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from embedq_consumer.batching import (
    AssembledText,
    ComputedText,
    Early,
    First,
    JobInput,
    Settled,
    TextQueue,
    Vectors,
)
from embedq_consumer.cache import CachedVector, cache_key
from embedq_consumer.delivery import FEW_INPUTS, Deliverer, assembled_outcomes_of, large, outcomes_of
from embedq_consumer.engine import Encoder
from embedq_consumer.fairness import Cost
from embedq_consumer.group import Overtaken, Ticket
from embedq_consumer.intake.admission import (
    AdmissionPolicy,
    DeletedRow,
    Rejection,
    UnknownAddress,
    UnknownSchema,
)
from embedq_consumer.intake.jobs import InputVector, JobState
from embedq_consumer.intake.records import Death, Record
from embedq_consumer.intake.result_sizes import cost_of
from embedq_consumer.shapes import Want
from embedq_shared.codec import Envelope
from embedq_shared.grouping import batched_by
from embedq_shared.headers import JobHeaders
from embedq_shared.messages import ErrorBody
from embedq_shared.topics import LANES, Lane

_TEXTS_A_LOOKUP: Final = 512
"""Texts of jobs that are looked up together, in one round trip: a short job need not wait for those of several long ones."""
_TEXTS_A_TURN: Final = 64
"""Of a micro-batch of bulk texts while interactive ones come: their outcomes take a millisecond."""


class Cache(Protocol):
    """Remembers vectors as well as it can. Its methods never raise."""

    async def get_many(self, keys: Sequence[bytes]) -> list[CachedVector | None]:
        """The entry of each key, in order, or None."""

    async def put_many(self, items: Sequence[tuple[bytes, CachedVector]]) -> object:
        """Keep these entries."""


class Registry(Protocol):
    """Learns what admission must know of schemas."""

    async def learn(self, want: Want) -> None:
        """Return once it is known, or refused."""


class SetAside(Protocol):
    """Hears which records wait for something outside of the service: nobody need wonder that others overtake them."""

    def __call__(self, records: Iterable[Record], *, waits: bool) -> None:
        """They wait, or do no more."""


class Pipeline:
    """Takes polled records and answers each of them, whatever it holds.

    Every record given to `take` or `take_unreadable` is finished exactly once, by the deliverer. Work goes on in tasks of
    `tasks`, so a failure here ends the process, and the next one reads the unfinished records again. `serving` returns the
    encoder of each alias that accepts new jobs, and `queues` are where the texts of each wait; `weigh` is told what each job
    takes.
    """

    # More than six parameters: each is another part of the path, and a struct of them would be made for this call alone.
    def __init__(
        self,
        policy: AdmissionPolicy,
        serving: Callable[[], Mapping[str, Encoder]],
        cache: Cache,
        queues: Mapping[str, TextQueue],
        deliverer: Deliverer,
        tasks: asyncio.TaskGroup,
        weigh: Callable[[Record, Cost], None],
        registry: Registry | None = None,
        set_aside: SetAside = lambda records, *, waits: None,
    ) -> None:
        self._registry = registry
        self._set_aside = set_aside
        self._policy = policy
        self._serving = serving
        self._cache = cache
        self._queues = queues
        self._deliverer = deliverer
        self._tasks = tasks
        self._weigh = weigh
        self._given_up: set[Ticket] = set()
        self._looked_up = 0  # groups of jobs for which the cache is asked
        self._early: dict[tuple[int, int], Settled | None] = {}
        """What became of inputs that run while the cache is asked for them: a hit answers, however late."""

    # -- from the poll to the queue ----------------------------------------------------------------------------------

    def take(self, records: Iterable[Record]) -> None:
        """Start on these records, each weighed before the next is drawn. Returns at once."""
        jobs, rejected, unknown = self._admit(records)
        if rejected:
            self._spawn(self._deliverer.reject(rejected), "reject")
        if unknown:
            self._spawn(self._ask_for_topics(unknown), "ask_for_topics")
        self._start(jobs)

    def take_unreadable(self, record: Record, why: str) -> None:
        """Reject a record, or a batch of them, that could not be read. Its position is all that is known of it."""
        reason = ErrorBody.of("malformed", f"expected a record that can be read: {why}")
        rejection = Rejection(
            error=reason, format="json", headers=JobHeaders(), envelope=Envelope(), dead_letter=True
        )
        self._spawn(self._deliverer.reject([(record, rejection)]), "reject")

    def condemn(self, record: Record, deaths: Sequence[Death]) -> None:
        """Reject a record that killed processes."""
        rejection = self._policy.condemn(record, deaths, self._deliverer.partitions)
        self._spawn(self._deliverer.reject([(record, rejection)]), "condemn")

    def give_up(self, record: Record, overtaken: Overtaken) -> None:
        """Reject a job that holds up its partition. Whatever comes of it later is not sent any more."""
        self._given_up.add(record.ticket)
        error = ErrorBody.of(
            "internal", f"expected an answer; later jobs had been answered for {overtaken.seconds:.0f} s"
        )
        self._spawn(self._deliverer.reject([(record, self._policy.given_up(record, error))]), "give_up")

    def _admit(
        self, records: Iterable[Record]
    ) -> tuple[list[JobState], list[tuple[Record, Rejection]], list[tuple[Record, UnknownAddress]]]:
        models, now_ms = self._serving(), time.time() * 1000
        jobs: list[JobState] = []
        rejected: list[tuple[Record, Rejection]] = []
        unknown: list[tuple[Record, UnknownAddress]] = []
        deleted: list[tuple[Record, DeletedRow]] = []
        schemas: dict[Want, list[Record]] = {}
        for record in records:
            match self._policy.admit(record, models, now_ms, self._deliverer.partitions):
                case JobState() as job:
                    self._weigh(record, cost_of(job))
                    jobs.append(job)
                case Rejection() as rejection:
                    rejected.append((record, rejection))
                case UnknownAddress() as address:
                    unknown.append((record, address))
                case UnknownSchema(want):
                    schemas.setdefault(want, []).append(record)
                case DeletedRow() as row:
                    deleted.append((record, row))
        for want, waiting in schemas.items():
            self._spawn(self._ask_for_schema(want, waiting), "ask_for_schema")
        if deleted:
            self._spawn(self._deliverer.remove(deleted), "remove")
        return jobs, rejected, unknown

    async def _ask_for_schema(self, want: Want, waiting: Sequence[Record]) -> None:
        """Admit these again once the registry has said what their schema is; so long they are in flight."""
        if self._registry is None:
            raise RuntimeError("a schema is to be learned, and there is no registry. This is a bug.")
        self._set_aside(waiting, waits=True)
        await self._registry.learn(want)
        self._set_aside(waiting, waits=False)
        self.take(waiting)

    async def _ask_for_topics(self, waiting: Sequence[tuple[Record, UnknownAddress]]) -> None:
        """A reply topic or partition that is not known may be new. Only such jobs wait for the brokers' answer."""
        await self._deliverer.refresh_topics()
        jobs, rejected, unknown = self._admit(record for record, _ in waiting)
        rejected += [(record, self._policy.unknown_address(record, address)) for record, address in unknown]
        if rejected:
            await self._deliverer.reject(rejected)
        self._start(jobs)

    def _start(self, jobs: Iterable[JobState]) -> None:
        for group in batched_by(jobs, lambda job: len(job.distinct), _TEXTS_A_LOOKUP):
            inputs = self._check([(job, index) for job in group for index in job.distinct])
            early = self._begin_early(inputs) if len(group) == 1 else None
            self._looked_up += 1
            self._spawn(self._look_up_and_join(inputs, early), "look_up")

    def _begin_early(self, inputs: Sequence[JobInput]) -> Early | None:
        """What may begin with a lone job's inputs before the cache is asked, at once: the task that asks it has to be woken first."""
        queue = self._queues.get(inputs[0][0].alias) if inputs else None
        if queue is None:
            return None
        alone = not self._looked_up and all(map(_is_idle, self._queues.values()))
        early = queue.begin_early(inputs, alone=alone)
        if early is not None and early.runs:
            for job, index in inputs:
                self._early[job.number, index] = None
            self._tokenize_more(queue)
        return early

    async def _look_up_and_join(self, inputs: Sequence[JobInput], early: Early | None) -> None:
        ahead = self._queues[inputs[0][0].alias] if early is not None and early.runs else None
        missing = await self._look_up(inputs, ahead)
        self._looked_up -= 1
        if ahead is not None:
            ahead.answered(lacked=bool(missing))
            return
        for alias, queue in self._queues.items():
            its = missing if len(self._queues) == 1 else [one for one in missing if one[0].alias == alias]
            if its:
                queue.join(its, early)
                self._tokenize_more(queue)

    def _tokenize_more(self, queue: TextQueue) -> None:
        while (call := queue.next_call()) is not None:
            self._spawn(self._tokenize(queue, call), "tokenize")

    async def _tokenize(self, queue: TextQueue, call: Sequence[First]) -> None:
        self.settle(await queue.tokenize(call))
        self._tokenize_more(queue)

    def _check(self, inputs: Sequence[JobInput]) -> list[JobInput]:
        """Settle the inputs that must not even be tokenized; the others."""
        checked = [(job, index, self._policy.check_text(job.request, index)) for job, index in inputs]
        self.settle((job, index, error) for job, index, error in checked if error is not None)
        return [(job, index) for job, index, error in checked if error is None]

    async def _look_up(self, inputs: Sequence[JobInput], ahead: TextQueue | None) -> list[JobInput]:
        """Settle the inputs whose vector the cache holds; the others. An input with several vectors is not cached.

        `ahead`: where they wait for their vectors meanwhile."""
        cacheable = [(job, index) for job, index in inputs if not job.request.late]
        keys = [_key(job, index) for job, index in cacheable]
        entries = await self._cache.get_many(keys)
        missing = [(job, index) for job, index in inputs if job.request.late]
        found: list[Settled] = []
        for (job, index), key, entry in zip(cacheable, keys, entries, strict=True):
            early = None if ahead is None else self._early.pop((job.number, index))
            if (vector := _from_cache(job, entry)) is None:
                job.keys[index] = key
                missing.append((job, index))
                if early is not None:
                    found.append(early)
            else:
                if ahead is not None:
                    ahead.withdraw(job, index)
                found.append((job, index, vector))
        self.settle(found)
        return missing

    # -- from the micro-batch to the finished record -----------------------------------------------------------------

    def computed(self, texts: Sequence[ComputedText], vectors: Vectors) -> None:
        """Texts that ran whole; `vectors` is float32 (texts, hidden_size). Those of bulk jobs need not be ready first."""
        for lane in LANES:
            rows = [row for row, (text, _) in enumerate(texts) if text.lane == lane]
            if len(rows) == len(texts):
                self._computed(lane, texts, vectors)
                return
            if rows:
                self._computed(lane, [texts[row] for row in rows], vectors[rows])

    def _computed(self, lane: Lane, texts: Sequence[ComputedText], vectors: Vectors) -> None:
        if sum(len(waiters) for _, waiters in texts) <= FEW_INPUTS:
            self.settle(outcomes_of(texts, vectors))
        elif self._deliverer.takes_turns(lane):
            self._spawn(self._postprocess_in_turns(texts, vectors), "postprocess")
        else:
            self._spawn(self._postprocess(lane, outcomes_of, texts, vectors), "postprocess")

    def assembled(self, texts: Sequence[AssembledText]) -> None:
        """Texts whose last window ran."""
        for lane in LANES:
            if its := [each for each in texts if each[0].lane == lane]:
                self._spawn(self._postprocess(lane, assembled_outcomes_of, its), "postprocess")

    async def _postprocess(self, lane: Lane, work: Callable[..., list[Settled]], *results: Any) -> None:
        outcomes = await self._deliverer.in_thread(lane, work, *results)
        await self._deliverer.turn(lane)
        self.settle(outcomes)

    async def _postprocess_in_turns(self, texts: Sequence[ComputedText], vectors: Vectors) -> None:
        """For bulk texts: some at a time on the event loop, where no thread contends with interactive work for Python's lock."""
        for start in range(0, len(texts), _TEXTS_A_TURN):
            some = slice(start, start + _TEXTS_A_TURN)
            await self._deliverer.turn("bulk")
            self.settle(outcomes_of(texts[some], vectors[some]))

    def settle(self, outcomes: Iterable[Settled]) -> None:
        """Note what became of inputs. Jobs that have all of their outcomes are delivered."""
        if self._early:
            outcomes = [each for each in outcomes if not self._waits_for_the_cache(each)]
        complete = [job for job, index, outcome in outcomes if job.settle(index, outcome)]
        alone = [job for job in complete if large(job)]
        small = [job for job in complete if not large(job)] if alone else complete
        for lane in LANES:
            its, most = [job for job in small if job.record.lane == lane], self._deliverer.at_once(lane)
            for start in range(0, len(its), most):
                self._spawn(self._deliver(its[start : start + most]), "deliver")
        for job in alone:
            self._spawn(self._deliver([job]), "deliver")

    def _waits_for_the_cache(self, outcome: Settled) -> bool:
        job, index, _ = outcome
        if (job.number, index) not in self._early:
            return False
        self._early[job.number, index] = outcome
        return True

    async def _deliver(self, jobs: Sequence[JobState]) -> None:
        """Jobs of one lane."""
        await self._deliverer.turn(jobs[0].record.lane)
        if late := [job for job in jobs if job.record.ticket in self._given_up]:
            self._given_up -= {job.record.ticket for job in late}
            jobs = [job for job in jobs if job not in late]
            if not jobs:
                return
        if fresh := [entry for job in jobs for entry in _cacheable(job)]:
            # In a task of its own, since a slow cache must not delay the results; before these are sent, so that what a killed
            # process answered is not computed again. A lone job's goes a round of the loop later, behind the request with its result.
            lone = len(jobs) == 1 and jobs[0].record.lane == "interactive"
            self._spawn(self._remember(fresh) if lone else self._cache.put_many(fresh), "cache_write")
        await self._deliverer.deliver(jobs)

    async def _remember(self, fresh: Sequence[tuple[bytes, CachedVector]]) -> None:
        await asyncio.sleep(0)
        await self._cache.put_many(fresh)

    def _spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        self._tasks.create_task(work, name=name)


def _is_idle(queue: TextQueue) -> bool:
    return queue.idle


def _key(job: JobState, index: int) -> bytes:
    request = job.request
    return cache_key(job.encoder.model_version, request.text(index), request.dimensions, request.dtype)


def _from_cache(job: JobState, entry: CachedVector | None) -> InputVector | None:
    """The cached vector, unless its text was cut in another way than this job wants."""
    if entry is None or entry.truncated not in ("", job.request.truncate):
        return None
    return InputVector(entry.vector, entry.tokens, entry.truncated or None, entry.scale, cached=True)


def _cacheable(job: JobState) -> Iterable[tuple[bytes, CachedVector]]:
    """The vectors of a complete job that the cache does not have."""
    for index in job.distinct:
        outcome = job.outcomes[index]
        if isinstance(outcome, InputVector) and not outcome.cached:
            entry = CachedVector(
                tokens=outcome.tokens,
                truncated=outcome.truncated or "",
                scale=outcome.scale,
                vector=outcome.vector,
            )
            yield job.keys[index], entry
