"""Small requests of one moment become one job: what Kafka, client and service do for each job they then do once for several.

It costs a request nothing: who comes in the same turn of the event loop is taken along, and nobody is waited for. Only requests
that ask for the same, in the same lane and as the same client, and that have the same time, share a job. The service answers
for each input by itself; where a job fails whole, its requests run again alone, so that none suffers for another one's text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from embedq_sdk.embeddings import FinishedJob, JobOutcome, ReadDatum, ReadResult, job_failed
from embedq_sdk.errors import EmbedError, Expired
from embedq_sdk.job_options import JobOptions
from embedq_shared.messages import Usage

_MOST_BYTES: Final = 32 * 1024
"""Of the characters of one job: what is longer than a few pages is worth a job of its own."""


class Client(Protocol):
    """What carries jobs: the SDK's `EmbedClient`, something around it, or a fake in tests."""

    async def embed_raw(
        self, texts: Sequence[str], options: JobOptions, *, timeout: float
    ) -> list[FinishedJob]:
        """The replies to a call as they came."""


class _Member(msgspec.Struct, frozen=True, eq=False):
    """One request in a shared job: its texts, and where its outcome goes."""

    texts: Sequence[str]
    outcome: asyncio.Future[list[FinishedJob]]


class _Group:
    """The requests that came in one turn and ask for the same."""

    def __init__(self) -> None:
        self.members: list[_Member] = []
        self.texts = 0
        self.size = 0

    def add(self, texts: Sequence[str], size: int) -> _Member:
        member = _Member(texts, asyncio.get_running_loop().create_future())
        self.members.append(member)
        self.texts += len(texts)
        self.size += size
        return member


class JoiningClient:
    """A client that joins small calls of one moment.

    Invariants:
        - A call has the outcome that it would have had alone.
        - A group is closed one turn of the event loop after its first call; then nobody joins it.
        - A call that is cancelled stops nobody else's; a job for which nobody waits any more is cancelled.
    """

    def __init__(self, client: Client, most_texts: int) -> None:
        self._client = client
        self._most_texts = most_texts
        self._open: dict[tuple[JobOptions, float], _Group] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def embed_raw(
        self, texts: Sequence[str], options: JobOptions, *, timeout: float
    ) -> list[FinishedJob]:
        """The replies to a call, as the client gives them.

        Raises:
            EmbedError: what the client raises.
        """
        size = sum(map(len, texts))
        if options.late or len(texts) >= self._most_texts or size >= _MOST_BYTES or not texts:
            return await self._client.embed_raw(texts, options, timeout=timeout)
        key = (options, timeout)
        group = self._open.get(key)
        if group is not None and (
            group.texts + len(texts) <= self._most_texts and group.size + size <= _MOST_BYTES
        ):
            return await group.add(texts, size).outcome
        group = self._open[key] = _Group()  # one that was full is closed by whoever opened it
        mine = group.add(texts, size)
        try:
            await asyncio.sleep(0)
        finally:  # also where this call is cancelled: the others may have come already
            if self._open.get(key) is group:
                del self._open[key]
            if len(group.members) > 1:
                self._start(group, options, timeout)
        if len(group.members) == 1:
            return await self._client.embed_raw(texts, options, timeout=timeout)
        return await mine.outcome

    def _start(self, group: _Group, options: JobOptions, timeout: float) -> None:
        task = asyncio.create_task(self._run(group.members, options, timeout))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        left = len(group.members)

        def one_less(outcome: asyncio.Future[list[FinishedJob]]) -> None:
            nonlocal left
            left -= 1
            if not left:
                task.cancel()  # does nothing to one that has ended

        def ended(task: asyncio.Task[None]) -> None:
            """Whatever the client raised, each of those who wait is told."""
            if not task.cancelled() and (error := task.exception()) is not None:
                for member in group.members:
                    if not member.outcome.done():
                        member.outcome.set_exception(error)

        task.add_done_callback(ended)
        for member in group.members:
            member.outcome.add_done_callback(one_less)

    async def _run(self, members: list[_Member], options: JobOptions, timeout: float) -> None:
        texts = [text for member in members for text in member.texts]
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        [job] = await self._client.embed_raw(texts, options, timeout=timeout)
        if isinstance(job.outcome, list):
            for member, outcome in zip(members, split(job.outcome, members), strict=True):
                if not member.outcome.done():
                    member.outcome.set_result([outcome])
            return
        left = end - loop.time()
        if isinstance(job.outcome, Expired) or left <= 0:
            for member in members:
                if not member.outcome.done():
                    member.outcome.set_result([FinishedJob(count=len(member.texts), outcome=job.outcome)])
            return
        await asyncio.gather(*(self._run_alone(member, options, left) for member in members))

    async def _run_alone(self, member: _Member, options: JobOptions, timeout: float) -> None:
        if member.outcome.done():
            return
        try:
            outcome = await self._client.embed_raw(member.texts, options, timeout=timeout)
        except EmbedError as error:
            if not member.outcome.done():
                member.outcome.set_exception(error)
        else:
            if not member.outcome.done():
                member.outcome.set_result(outcome)


def split(parts: list[ReadResult], members: Sequence[_Member]) -> list[FinishedJob]:
    """What each request of a shared job would have had as its own job's outcome."""
    data = [datum for part in parts for datum in part.data]
    found = []
    first = 0
    for member in members:
        count = len(member.texts)
        found.append(FinishedJob(count=count, outcome=_own(parts[0], data[first : first + count], first)))
        first += count
    return found


def _own(head: ReadResult, data: list[ReadDatum], first: int) -> JobOutcome:
    if len(data) == 1 and (error := data[0].error) is not None:  # a job of one text fails whole
        message = error.message.replace(f"`input[{first}]`", "`input`", 1)
        return job_failed(msgspec.structs.replace(error, message=message, param="input"))
    tokens = sum(datum.tokens or 0 for datum in data)
    own = [msgspec.structs.replace(datum, index=n) for n, datum in enumerate(data)] if first else data
    return [msgspec.structs.replace(head, data=own, usage=Usage(tokens, tokens), part=0, parts=1)]
