"""Batches run to their end, whatever happens on the way: kills, two gateways at once, a storage that fails."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from embedq_gateway.batches.batch import DAY_S, ENDED, Batch
from embedq_gateway.batches.files import File, Files
from embedq_gateway.batches.identities import new_id, owner_folder
from embedq_gateway.batches.register import Register
from embedq_gateway.batches.running.lines import Answer
from embedq_gateway.batches.running.runner import RunOptions, TryAgain
from embedq_gateway.batches.running.worker import BatchWorker, WorkerOptions
from embedq_gateway.batches.storage import Objects, ObjectWriter, StorageError, Stored
from tests.helpers.support import patient, wait_until
from tests.unit.gateway.batches.test_batch import seen

OWNER = "anna"
Given = TypeVar("Given")


class Lines:
    """Runs lines: each text's answer is its length, and texts that begin with `!` fail."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.let = asyncio.Event()
        self.let.set()
        self.after: int | None = None
        """So many lines are answered, and the others wait for `let`."""
        self.refuse_first = 0
        self.model = "v1"

    async def __call__(self, batch: Batch, body: bytes, timeout: float) -> Answer:
        text = json.loads(body)["input"]
        if self.refuse_first:
            self.refuse_first -= 1
            raise TryAgain("Kafka is away")
        if self.after is not None and sum(self.ran.values()) >= self.after:
            self.let.clear()
            self.after = None
        await self.let.wait()
        await asyncio.sleep(0)
        self.ran[text] += 1
        if text.startswith("!"):
            return Answer(status=400, body=b'{"error":{"code":"invalid_value"}}')
        body = json.dumps({"length": len(text), "model_version": self.model}).encode()
        return Answer(status=200, body=body, tokens=1, model_version=self.model)


class Place:
    """What gateways share, and a clock that can be set forward."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.ahead = 0.0
        self.register = Register(objects, now=self.now)
        self.files = Files(objects, now=self.now)
        self.reports: list[str] = []

    def now(self) -> float:
        return 1.8e9 + self.ahead

    async def upload(self, data: bytes) -> File:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(data), 1000):
                yield data[start : start + 1000]

        return await self.files.upload(OWNER, chunks(), lambda: ("lines.jsonl", None))

    async def begin(self, data: bytes, **more: Any) -> Batch:
        now = int(self.now())
        batch = Batch(
            id=new_id("batch", self.now()),
            owner=OWNER,
            endpoint="/v1/embeddings",
            input_file_id=(await self.upload(data)).id,
            completion_window="24h",
            created_at=now,
            expires_at=now + DAY_S,
            **more,
        )
        await self.register.add(batch)
        return batch

    async def get(self, batch: Batch) -> Batch:
        found = await self.register.get(batch.owner, batch.id)
        assert found is not None
        return found

    async def status(self, batch: Batch, *statuses: str) -> bool:
        return (await self.get(batch)).status in statuses

    async def until(self, batch: Batch, *statuses: str) -> Batch:
        await wait_until(lambda: self.status(batch, *statuses, *ENDED), what=f"{statuses}", within=60)
        found = await self.get(batch)
        assert found.status in statuses, found.faults
        return found

    async def read(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        file = await self.files.get(OWNER, file_id)
        assert file is not None
        content = b"".join([chunk async for chunk in self.files.read(file)])
        assert len(content) == file.size
        return [json.loads(line) for line in content.splitlines()]

    async def ids(self, batch: Batch) -> tuple[list[str], list[str]]:
        """The custom ids of the output file and of the error file."""
        output, errors = await self.read(batch.output_file_id), await self.read(batch.error_file_id)
        return [line["custom_id"] for line in output], [line["custom_id"] for line in errors]

    def worker(self, lines: Lines, *, lease_s: float = 30.0, **run: Any) -> BatchWorker:
        options = WorkerOptions(
            run=RunOptions(**({"in_flight_texts": 8, "beat_s": lease_s / 3} | run)),
            lease_s=lease_s,
            look_every_s=0.02,
        )
        report = lambda what, error: self.reports.append(f"{what}: {error!r}")
        return BatchWorker(uuid.uuid4().hex, self.register, self.files, lines, options, report)


@asynccontextmanager
async def running(*workers: BatchWorker) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Gateways that are killed at the end: no lease of theirs is given back."""
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.fixture
def place(objects: Objects) -> Place:
    return Place(objects)


def jsonl(texts: Iterable[str]) -> bytes:
    return b"".join(
        json.dumps(
            {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/embeddings", "body": {"input": text}}
        ).encode()
        + b"\n"
        for n, text in enumerate(texts)
    )


def expected(count: int) -> list[str]:
    return sorted(f"id-{n}" for n in range(count))


# -- to the end -------------------------------------------------------------------------------------------------------


async def test_a_batch_has_each_line_once_and_failed_ones_in_a_file_of_their_own(place: Place) -> None:
    texts = [f"{'!' if n % 10 == 3 else ''}text {n}" for n in range(50)]
    batch = await place.begin(jsonl(texts))
    async with running(place.worker(Lines())):
        batch = await place.until(batch, "completed")
        await wait_until(lambda: nothing_to_do(place))
    output, errors = await place.ids(batch)
    assert sorted(errors) == sorted(f"id-{n}" for n in range(50) if n % 10 == 3)
    assert sorted(output + errors) == expected(50)
    assert seen(batch)["request_counts"] == {"total": 50, "completed": 45, "failed": 5}
    assert batch.tokens == 45
    assert batch.model_versions == {"v1": 45}


async def test_each_line_says_which_model_made_it_when_that_changes_on_the_way(place: Place) -> None:
    lines = Lines()
    lines.after = 20
    batch = await place.begin(jsonl(f"text {n}" for n in range(50)))
    async with running(place.worker(lines)):
        await wait_until(lambda: not lines.let.is_set())
        lines.model = "v2"
        lines.let.set()
        batch = await place.until(batch, "completed")
    versions = Counter(
        line["response"]["body"]["model_version"] for line in await place.read(batch.output_file_id)
    )
    assert versions == batch.model_versions
    assert set(versions) == {"v1", "v2"}


async def test_no_more_texts_are_in_flight_than_may_be(place: Place) -> None:
    most = now = 0

    class Counting(Lines):
        async def __call__(self, batch: Batch, body: bytes, timeout: float) -> Answer:
            nonlocal most, now
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1
            return await super().__call__(batch, body, timeout)

    batch = await place.begin(jsonl(f"text {n}" for n in range(100)))
    async with running(place.worker(Counting(), in_flight_texts=5)):
        await place.until(batch, "completed")
    assert most == 5


async def test_while_kafka_is_away_lines_are_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_gateway.batches.running.runner._FIRST_PAUSE_S", 0.01)
    lines = Lines()
    lines.refuse_first = 3
    batch = await place.begin(jsonl(["a", "b", "c", "d"]))
    async with running(place.worker(lines)):
        batch = await place.until(batch, "completed")
    assert batch.completed == 4


async def test_a_file_that_is_no_batch_is_refused_with_its_lines(place: Place) -> None:
    batch = await place.begin(jsonl(["a"]) + b"nonsense\n" + jsonl(["a"]))
    async with running(place.worker(Lines())):
        batch = await place.until(batch, "failed")
    assert [(fault.code, fault.line) for fault in batch.faults] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
    ]
    assert batch.output_file_id is batch.error_file_id is None


@pytest.mark.parametrize("found", ["before it is read", "by who takes over"])
async def test_a_batch_whose_input_has_gone_fails_and_says_so(place: Place, found: str) -> None:
    batch = await place.begin(jsonl(["a"]))
    if found == "by who takes over":
        await place.register.change(OWNER, batch.id, lambda batch: batch.validated(1, int(place.now())))
    file = await place.files.get(OWNER, batch.input_file_id)
    assert file is not None
    await place.files.delete(file)
    async with running(place.worker(Lines())):
        batch = await place.until(batch, "failed")
    assert [fault.code for fault in batch.faults] == ["input_file_missing"]


async def test_a_fault_of_ours_ends_the_batch_with_a_reason_and_others_go_on(place: Place) -> None:
    class Broken(Lines):
        async def __call__(self, batch: Batch, body: bytes, timeout: float) -> Answer:
            if b"bad" in body:
                raise KeyError("a bug")
            return await super().__call__(batch, body, timeout)

    bad = await place.begin(jsonl(["bad"]))
    good = await place.begin(jsonl(["good"]))
    async with running(place.worker(Broken())):
        bad, good = await place.until(bad, "failed"), await place.until(good, "completed")
    assert [fault.code for fault in bad.faults] == ["internal_error"]
    assert "KeyError" in "".join(place.reports)


# -- cancelled, expired -----------------------------------------------------------------------------------------------


async def test_a_cancelled_batch_ends_soon_with_what_is_done_and_says_of_the_rest_that_it_was_not_run(
    place: Place,
) -> None:
    lines = Lines()
    lines.after = 20
    batch = await place.begin(jsonl(f"text {n}" for n in range(50)))
    worker = place.worker(lines)
    async with running(worker):
        await wait_until(lambda: not lines.let.is_set())
        await place.register.change(OWNER, batch.id, lambda batch: batch.cancel(int(place.now())))
        worker.poke(batch.id)
        batch = await place.until(batch, "cancelled")
    output, errors = await place.ids(batch)
    assert len(output) >= 20
    assert sorted(output + errors) == expected(50)
    assert {line["error"]["code"] for line in await place.read(batch.error_file_id)} == {"batch_cancelled"}


async def test_a_batch_that_nobody_has_begun_is_cancelled_without_files(place: Place) -> None:
    batch = await place.begin(jsonl(["a"]))
    await place.register.change(OWNER, batch.id, lambda batch: batch.cancel(int(place.now())))
    lines = Lines()
    async with running(place.worker(lines)):
        batch = await place.until(batch, "cancelled")
    assert batch.output_file_id is batch.error_file_id is None
    assert not lines.ran


async def test_what_is_not_done_within_the_window_is_in_the_error_file(place: Place) -> None:
    lines = Lines()
    lines.after = 10
    batch = await place.begin(jsonl(f"text {n}" for n in range(30)))
    async with running(place.worker(lines)):
        await wait_until(lambda: not lines.let.is_set())
        await place.until(batch, "in_progress")
    place.ahead = DAY_S
    async with running(place.worker(Lines(), lease_s=0.3)):
        batch = await place.until(batch, "expired")
    output, errors = await place.ids(batch)
    assert sorted(output + errors) == expected(30)
    assert {line["error"]["code"] for line in await place.read(batch.error_file_id)} == {"batch_expired"}


# -- kills and handing over -------------------------------------------------------------------------------------------


async def test_a_batch_survives_any_number_of_kills_and_holds_each_line_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_gateway.batches.running.segment_buffer.SHORTEST_WAIT_S", 0.005)
    texts = [f"{'!' if n % 7 == 0 else ''}text {n}" for n in range(300)]
    batch = await place.begin(jsonl(texts))
    every, kills, seed = Counter[str](), 0, random.Random(7)
    while not await place.status(batch, "completed"):
        lines = Lines()
        lines.after = seed.randrange(1, 60)  # so that it can't be done before it is killed
        before = len((await place.get(batch)).done)

        async def blocked(lines: Lines = lines) -> bool:
            return not lines.let.is_set() or await place.status(batch, "completed")

        async def further(before: int = before) -> bool:
            return await done(place, batch, before + 1) or await place.status(batch, "completed")

        async with running(place.worker(lines, lease_s=0.05)):
            await wait_until(blocked, within=60)
            if kills % 2:
                await wait_until(further, within=60)
            else:
                await asyncio.sleep(seed.random() * 0.03)  # at any moment of writing down
        every += lines.ran
        kills += 1
    batch = await place.get(batch)
    output, errors = await place.ids(batch)
    assert sorted(output + errors) == expected(300)
    assert set(every) == set(texts)
    assert kills > 5
    # Nothing is left of what killed gateways wrote and did not count.
    async with running(place.worker(Lines())):
        await wait_until(lambda: nothing_to_do(place))
    pieces = await place.objects.names(f"{owner_folder(OWNER)}/pieces/{batch.id}")
    assert len(pieces) == len(batch.outputs) + len(batch.failures)


async def nothing_to_do(place: Place) -> bool:
    return not await place.register.listed()


async def test_two_gateways_share_batches_and_run_none_twice(place: Place) -> None:
    batches = [await place.begin(jsonl(f"{n} {m}" for m in range(60))) for n in range(6)]
    lines = [Lines(), Lines()]
    async with running(*(place.worker(each) for each in lines)):
        for batch in batches:
            output, _ = await place.ids(await place.until(batch, "completed"))
            assert sorted(output) == expected(60)
    assert set((lines[0].ran + lines[1].ran).values()) == {1}
    assert lines[0].ran
    assert lines[1].ran


async def test_a_gateway_that_leaves_hands_its_batch_over_at_once_and_nothing_is_run_twice(
    place: Place,
) -> None:
    first, second = Lines(), Lines()
    first.after = 30
    batch = await place.begin(jsonl(f"text {n}" for n in range(100)))
    leaving = place.worker(first, lease_s=3600)
    async with running(leaving) as [task]:
        await wait_until(lambda: not first.let.is_set())
        leaving.stop()
        await asyncio.wait_for(task, patient(30))
    assert len((await place.get(batch)).done) == sum(first.ran.values()) < 100
    async with running(place.worker(second, lease_s=3600)):
        batch = await place.until(batch, "completed")
    assert sorted((await place.ids(batch))[0]) == expected(100)
    assert set((first.ran + second.ran).values()) == {1}


async def test_a_gateway_that_slept_through_its_lease_counts_nothing_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_gateway.batches.running.segment_buffer.SHORTEST_WAIT_S", 0.01)
    first, second = Lines(), Lines()
    first.after = 30
    batch = await place.begin(jsonl(f"text {n}" for n in range(100)))
    async with running(place.worker(first, lease_s=3600)):
        await wait_until(lambda: not first.let.is_set())
        await wait_until(lambda: done(place, batch, 1))
        taken = await place.register.change(
            OWNER, batch.id, lambda batch: batch.claimed("another").released("another")
        )
        async with running(place.worker(second, lease_s=3600)):
            ended = await place.until(batch, "completed")
            first.let.set()  # it wakes up, and has results to write down
            await wait_until(lambda: sum(first.ran.values()) >= 30 + 8)
    assert taken.lease is None
    assert await place.get(batch) == ended
    assert sorted((await place.ids(ended))[0]) == expected(100)


async def done(place: Place, batch: Batch, least: int) -> bool:
    return len((await place.get(batch)).done) >= least


class Unreliable:
    """A storage of which some calls fail, some of them after they have done what was asked."""

    def __init__(self, objects: Objects, seed: int) -> None:
        self._objects = objects
        self._random = random.Random(seed)
        self.failing = True
        self.failures = 0

    async def _call(self, work: Callable[[], Awaitable[Given]]) -> Given:
        dice = self._random.random() if self.failing else 1.0
        self.failures += dice < 0.2
        if dice < 0.1:
            raise StorageError("it is away")
        answer = await work()
        if dice < 0.2:
            raise StorageError("its answer was lost")
        return answer

    async def open(self) -> None:
        await self._objects.open()

    async def get(self, key: str) -> Stored | None:
        return await self._call(lambda: self._objects.get(key))

    async def put(self, key: str, data: bytes) -> None:
        await self._call(lambda: self._objects.put(key, data))

    async def create(self, key: str, data: bytes) -> bool:
        return await self._call(lambda: self._objects.create(key, data))

    async def replace(self, key: str, data: bytes, version: str) -> bool:
        return await self._call(lambda: self._objects.replace(key, data, version))

    async def delete(self, keys: Sequence[str]) -> None:
        await self._call(lambda: self._objects.delete(keys))

    async def names(self, folder: str) -> list[str]:
        return await self._call(lambda: self._objects.names(folder))

    async def read(self, key: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._objects.read(key)) as chunks:
            async for chunk in chunks:
                yield await self._call(partial(_given, chunk))

    def writing(self, key: str) -> AbstractAsyncContextManager[ObjectWriter]:
        return self._objects.writing(key)

    async def close(self) -> None:
        await self._objects.close()


async def _given(value: Given) -> Given:
    return value


@pytest.mark.parametrize("seed", range(3))
async def test_a_storage_that_fails_now_and_then_delays_a_batch_and_loses_nothing(
    objects: Objects, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq_gateway.batches.running.worker._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("embedq_gateway.batches.running.worker._LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr("embedq_gateway.batches.running.segment_buffer.SHORTEST_WAIT_S", 0.01)
    unreliable = Unreliable(objects, seed)
    unreliable.failing = False
    place = Place(unreliable)
    batch = await place.begin(jsonl(f"text {n}" for n in range(200)))
    unreliable.failing = True
    async with running(place.worker(Lines(), lease_s=0.3)):
        await wait_until(lambda: tried(place, batch), within=60)
    unreliable.failing = False
    batch = await place.get(batch)
    assert batch.status == "completed"
    assert sorted((await place.ids(batch))[0]) == expected(200)
    assert unreliable.failures


async def tried(place: Place, batch: Batch) -> bool:
    try:
        return await place.status(batch, "completed", "failed")
    except StorageError:
        return False


# -- housekeeping -----------------------------------------------------------------------------------------------------


async def test_files_and_batches_go_when_their_time_is_over(place: Place, tmp_path: Path) -> None:
    batch = await place.begin(jsonl(["a", "!b"]))
    async with running(place.worker(Lines())):
        batch = await place.until(batch, "completed")
    place.ahead = 31 * DAY_S
    young = await place.upload(b"young")
    async with running(place.worker(Lines())):
        await wait_until(lambda: gone(place, batch))
    left = [path for path in (tmp_path / "files").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name for path in left} == {young.id}
    assert len(left) == 2  # its document and its content


async def gone(place: Place, batch: Batch) -> bool:
    return await place.register.get(batch.owner, batch.id) is None


async def test_a_file_that_a_batch_still_reads_stays(place: Place) -> None:
    batch = await place.begin(jsonl(["a"]))
    long = replace(batch, id=new_id("batch", place.now()), expires_at=batch.expires_at + 60 * DAY_S)
    await place.register.add(long)
    place.ahead = 31 * DAY_S
    lines = Lines()
    lines.let.clear()
    worker = place.worker(lines)
    async with running(worker):
        await wait_until(lambda: worker._swept_at is not None)
        lines.let.set()
        long = await place.until(long, "completed")
    assert long.completed == 1
