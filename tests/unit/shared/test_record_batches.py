"""What a fetch brought is read within bounds, and as aiokafka reads it where it can be read."""

from __future__ import annotations

import asyncio
import inspect
import struct
import tracemalloc
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import Fetcher, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.kafka import BoundedConsumer, Unreadable
from embedq_shared.kafka.reading import consumer
from embedq_shared.kafka.reading.inflation import InflatesTooMuch, Undecodable, inflate
from embedq_shared.kafka.reading.record_batches import BoundedRecords
from tests.helpers.record_batches import (
    CODECS,
    COMPRESS,
    GZIP,
    LZ4,
    NONE,
    SNAPPY,
    ZSTD,
    One,
    batch,
    bomb,
    legacy,
    payload,
)

LIMIT = 1 << 20
MEGABYTE = 1 << 20
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def read(data: bytes, *, limit: int = LIMIT, at: int = 0, records: Any = None) -> tuple[list[Any], int]:
    """What aiokafka's fetcher hands out of an answer, and the offset that it fetches next."""
    found = PartitionRecords(
        TopicPartition("t", 0),
        BoundedRecords(data, limit) if records is None else records,
        [],
        at,
        None,
        None,
        True,
        fetcher.READ_COMMITTED,
    )
    return list(found), found.next_fetch_offset


def brief(records: Iterable[Any]) -> list[tuple[int, Any]]:
    return [(r.offset, "BAD" if isinstance(r.value, Unreadable) else r.value) for r in records]


def packed(records: list[One], codec: int, **more: Any) -> bytes:
    return batch(COMPRESS[codec](payload(records)), codec=codec, count=len(records), **more)


# -- good batches --------------------------------------------------------------------------------------------------------

small = st.binary(max_size=40)
some_records = st.lists(
    st.builds(
        lambda value, key, headers: One(value, key, [(name.encode(), each) for name, each in headers]),
        st.none() | small,
        st.none() | small,
        st.lists(st.tuples(st.text(max_size=5), small), max_size=3),
    ),
    min_size=1,
    max_size=20,
)


@given(
    st.lists(st.tuples(st.sampled_from([NONE, GZIP, SNAPPY, LZ4, ZSTD]), some_records), max_size=4), st.data()
)
def test_good_batches_are_read_as_aiokafka_reads_them(
    batches: list[tuple[int, list[One]]], data: st.DataObject
) -> None:
    raw, base = b"", 0
    for codec, records in batches:
        raw += packed(records, codec, base=base)
        base += len(records)
    start = data.draw(st.integers(0, base))
    cut = raw[: data.draw(st.integers(0, len(raw)))]

    assert read(cut, at=start) == read(cut, at=start, records=MemoryRecords(cut))


@pytest.mark.parametrize("magic", [0, 1])
@pytest.mark.parametrize("codec", [NONE, GZIP, SNAPPY, LZ4])
def test_good_batches_of_old_formats_are_read_as_aiokafka_reads_them(magic: int, codec: int) -> None:
    if codec:
        inner = b"".join(legacy(b"%d" % n, magic=magic, offset=n) for n in range(3))
        raw = legacy(COMPRESS[codec](inner), magic=magic, codec=codec, offset=2)
    else:
        raw = b"".join(legacy(b"%d" % n, magic=magic, offset=n) for n in range(3))
    if (codec, magic) == (LZ4, 0):  # its frames had a checksum that nobody else computed so
        assert brief(read(raw)[0]) == [(2, "BAD")]
    else:
        assert read(raw) == read(raw, records=MemoryRecords(raw))
        assert len(read(raw)[0]) == 3


def test_a_batch_of_which_compaction_left_a_part_keeps_its_offsets() -> None:
    raw = packed([One(b"a", offset=3), One(b"b", offset=7)], ZSTD, base=10, last=19)

    assert (brief(read(raw)[0]), read(raw)[1]) == ([(13, b"a"), (17, b"b")], 20)


def test_control_batches_are_left_to_the_client() -> None:
    """They end transactions, and no producer can write one."""
    control = batch(payload([One(b"\0\0\0\0\0\0", key=b"\0\0\0\1")]), flags=0x20 | 0x10, base=1)
    raw = packed([One(b"a")], NONE) + control

    assert (brief(read(raw)[0]), read(raw)[1]) == ([(0, b"a")], 2)


# -- batches that inflate too much ---------------------------------------------------------------------------------------


@each_codec
def test_a_batch_over_the_ceiling_is_passed_as_a_whole_and_its_neighbors_are_read(codec: int) -> None:
    before, after = packed([One(b"a")], NONE), packed([One(b"b")], ZSTD, base=6)
    huge = bomb(codec, 4 * MEGABYTE, count=5, base=1)

    found, position = read(before + huge + after)

    assert brief(found) == [(0, b"a"), (5, "BAD"), (6, b"b")]
    assert position == 7
    assert found[1].value.first_offset == 1
    assert "5 records at offsets 1 to 5" in found[1].value.reason
    assert "more than 1,048,576" in found[1].value.reason
    assert (found[1].key, found[1].headers) == (None, ())


@each_codec
def test_a_batch_within_the_ceiling_is_read(codec: int) -> None:
    [record] = read(bomb(codec, LIMIT - 100))[0]
    assert record.value == bytes(LIMIT - 100)


@pytest.mark.parametrize("start", range(1, 6))
def test_a_position_within_the_batch_passes_it_too(start: int) -> None:
    assert read(bomb(ZSTD, 4 * MEGABYTE, count=5, base=1), at=start)[1] == 6


@pytest.mark.parametrize("size", [0, 1, 99, 255, 256, 257, 65_791, 65_792, LIMIT, LIMIT + 1, 3 * MEGABYTE])
@each_codec
def test_data_up_to_the_ceiling_inflates_and_no_more(codec: int, size: int) -> None:
    data = memoryview(COMPRESS[codec](bytes(size)))
    if size > LIMIT:
        with pytest.raises(InflatesTooMuch, match=r"more than 1,048,576"):
            inflate(codec, data, LIMIT)
    else:
        assert inflate(codec, data, LIMIT) == bytes(size)


@pytest.mark.parametrize(("codec", "claims"), [(GZIP, False), (SNAPPY, True), (LZ4, False), (ZSTD, True)])
def test_where_the_data_says_its_size_it_is_believed_if_that_is_too_much(codec: int, claims: bool) -> None:
    with pytest.raises(InflatesTooMuch) as error:
        inflate(codec, memoryview(COMPRESS[codec](bytes(2 * MEGABYTE))), LIMIT)
    assert str(error.value).startswith("says that it inflates to 2,097,152" if claims else "inflates to")


def test_an_lz4_frame_that_says_its_size_is_believed() -> None:
    frame = b"\x04\x22\x4d\x18" + bytes([0x68, 0x40]) + struct.pack("<Q", 1 << 40) + b"\0"
    with pytest.raises(InflatesTooMuch, match=r"says that it inflates to 1,099,511,627,776"):
        inflate(LZ4, memoryview(frame), LIMIT)


@pytest.mark.parametrize("codec", [GZIP, LZ4, ZSTD])
def test_a_claim_that_is_too_small_opens_no_door(codec: int) -> None:
    """As of a frame that is followed by others."""
    frames = COMPRESS[codec](b"a") + COMPRESS[codec](bytes(2 * MEGABYTE))
    with pytest.raises(InflatesTooMuch):
        inflate(codec, memoryview(frames), LIMIT)
    assert inflate(codec, memoryview(COMPRESS[codec](b"a") * 3), LIMIT) == b"aaa"


@each_codec
def test_inflating_takes_no_more_memory_than_the_ceiling(codec: int) -> None:
    data = memoryview(b"".join([COMPRESS[codec](bytes(30 * MEGABYTE))]))
    tracemalloc.start()
    try:
        with pytest.raises(InflatesTooMuch):
            inflate(codec, data, LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * LIMIT


# -- what else cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [NONE, ZSTD])
def test_a_record_whose_header_name_is_no_text_costs_no_other(codec: int) -> None:
    bad = One(b"x", headers=[(b"\xff\xfe", b"x")])
    raw = packed([One(b"a"), bad, bad, One(b"b"), bad], codec, base=3)

    found, position = read(raw)

    assert brief(found) == [(3, b"a"), (4, "BAD"), (5, "BAD"), (6, b"b"), (7, "BAD")]
    assert position == 8
    assert "UTF-8" in found[1].value.reason


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD, 5, 7])
def test_damaged_data_and_unknown_codecs_are_passed(codec: int) -> None:
    raw = batch(b"\x82SNAPPY\0\0\0\0\1\0\0\0\1\xff\xff\xff\xff", codec=codec, count=3)

    [record], position = read(raw)
    assert (brief([record]), position) == ([(2, "BAD")], 3)
    with pytest.raises(Undecodable):
        inflate(codec, memoryview(b"nonsense"), LIMIT)


def test_a_wrong_checksum_passes_the_batch_and_never_more() -> None:
    raw = bytearray(packed([One(b"a"), One(b"b")], NONE, base=4))
    raw[-1] ^= 1
    assert (brief(read(bytes(raw))[0]), read(bytes(raw))[1]) == ([(5, "BAD")], 6)

    struct.pack_into(">i", raw, 23, 1_000)  # the damage says that the batch reaches far
    both = bytes(raw) + packed([One(b"c")], NONE, base=6)
    assert brief(read(both)[0]) == [(5, "BAD"), (6, b"c")]


@pytest.mark.parametrize("count", [5, 2**31 - 1, -1, 0])
def test_a_wrong_number_of_records_ends_with_the_batch(count: int) -> None:
    raw = batch(payload([One(b"a"), One(b"b")]), count=count, last=1)
    found, position = read(raw)
    assert [each for each in brief(found) if each[1] != "BAD"] == [(0, b"a"), (1, b"b")][: max(count, 0)]
    assert position == 2


@given(st.binary(max_size=60), st.integers(0, 7), st.integers(-5, 50))
def test_whatever_is_in_a_batch_nothing_is_raised_and_the_position_is_after_it(
    junk: bytes, codec: int, count: int
) -> None:
    raw = batch(junk, codec=codec, count=count, base=7, last=9)
    found, position = read(raw, at=7)
    assert position == 10
    assert all(7 <= record.offset <= 9 for record in found)


@given(st.data())
def test_whatever_bits_flip_in_a_good_payload_nothing_is_raised(data: st.DataObject) -> None:
    plain = bytearray(payload([One(b"value", b"key", [(b"name", b"x")])] * 4))
    for _ in range(data.draw(st.integers(1, 4))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    found, position = read(batch(bytes(plain), count=4, base=2), at=2)
    assert position == 6
    offsets = [record.offset for record in found]
    assert offsets == sorted(set(offsets))


def test_old_formats_are_bounded_too() -> None:
    inner = legacy(bytes(4 * MEGABYTE))
    double = legacy(gzip_of(legacy(gzip_of(inner), codec=GZIP)), codec=GZIP, offset=3)
    endless = legacy(gzip_of(struct.pack(">qi", 0, -12) + bytes(40)), codec=GZIP, offset=4)
    empty = legacy(None, codec=GZIP, offset=5)
    wrong = bytearray(legacy(b"x", offset=6))
    wrong[-1] ^= 1
    raw = legacy(gzip_of(inner), codec=GZIP, offset=2) + double + endless + empty + bytes(wrong)
    raw += legacy(b"good", offset=7)

    found, position = read(raw)

    assert brief(found) == [*((n, "BAD") for n in range(2, 7)), (7, b"good")]
    assert position == 8
    assert "more than 1,048,576" in found[0].value.reason


@given(st.binary(min_size=14, max_size=60), st.integers(0, 1))
def test_whatever_an_old_message_holds_nothing_is_raised(junk: bytes, magic: int) -> None:
    data = struct.pack(">b", magic) + junk
    body = struct.pack(">I", zlib.crc32(data)) + data
    assert read(struct.pack(">qi", 5, len(body)) + body, at=5)[1] == 6


@pytest.mark.parametrize("length", [-1, -12, 3])
def test_batches_that_do_not_fit_together_are_the_brokers_fault(length: int) -> None:
    with pytest.raises(CorruptRecordException):
        read(struct.pack(">qi", 0, length) + bytes(100))


def gzip_of(data: bytes) -> bytes:
    return COMPRESS[GZIP](data)


# -- where aiokafka is intercepted -------------------------------------------------------------------------------------------


def test_the_fetcher_makes_its_records_by_the_name_that_is_replaced() -> None:
    """If one of these fails, a new aiokafka reads fetches in another way: `kafka/reading/consumer.py` must follow it."""
    assert fetcher.MemoryRecords is consumer._records
    assert "MemoryRecords(part_data[-1])" in inspect.getsource(Fetcher)
    methods = {name for name in dir(MemoryRecords) if not name.startswith("_")}
    assert methods == {name for name in dir(BoundedRecords) if not name.startswith("_")}


async def test_whoever_waits_for_records_is_woken_by_the_fetch_that_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aiokafka's own routine would wake them rounds of the event loop later, and is told that nobody is left to be woken."""
    brought = False

    async def fetched(self: Fetcher, assignment: Any, node: int, request: Any) -> bool:
        return brought

    monkeypatch.setattr(Fetcher, "_proc_fetch_request", fetched)
    assert "has_new_data = any(fut.result() for fut in done_pending)" in inspect.getsource(Fetcher)
    found = consumer.PromptFetcher.__new__(consumer.PromptFetcher)
    found._loop, found._fetch_waiters = asyncio.get_running_loop(), set()
    waiter = found._create_fetch_waiter()
    assert not await found._proc_fetch_request(None, 1, None)
    assert not waiter.done()
    brought = True
    assert not await found._proc_fetch_request(None, 1, None)
    assert waiter.done()


class Fetching:
    """A fetcher without a client, whose records a test puts there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there: dict[TopicPartition, list[Any]] = {}
        self.fetcher = consumer.PromptFetcher.__new__(consumer.PromptFetcher)
        self.fetcher._loop, self.fetcher._fetch_waiters = asyncio.get_running_loop(), set()
        self.fetcher._closed = False
        monkeypatch.setattr(Fetcher, "fetched_records", self._fetched)

    async def _fetched(
        self, partitions: Any, timeout: float, most: int | None
    ) -> dict[TopicPartition, list[Any]]:
        assert not timeout
        return self.there

    def put(self) -> None:
        self.there = {TopicPartition("t", 0): ["record"]}
        self.wake()

    def wake(self) -> None:
        for waiter in self.fetcher._fetch_waiters:
            self.fetcher._notify(waiter)

    def poll(self, timeout: float) -> asyncio.Task[Any]:
        return asyncio.create_task(self.fetcher.fetched_records([], timeout, 10))


async def test_a_poll_waits_for_records_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching = Fetching(monkeypatch)
    poll = fetching.poll(3600)
    await asyncio.sleep(0)
    fetching.wake()  # for records of other partitions, or that another poll took
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not poll.done()
    fetching.put()
    assert await poll == fetching.there
    assert await fetching.poll(3600) == fetching.there
    assert not fetching.fetcher._fetch_waiters


async def test_a_poll_that_nothing_comes_for_ends_in_time_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching = Fetching(monkeypatch)
    assert await fetching.poll(0) == {}
    assert await fetching.poll(0.001) == {}


async def test_a_poll_that_is_cancelled_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching = Fetching(monkeypatch)
    poll = fetching.poll(3600)
    await asyncio.sleep(0)
    poll.cancel()
    await asyncio.wait({poll})
    assert poll.cancelled()
    assert not fetching.fetcher._fetch_waiters


async def test_only_our_consumers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a consumer's start, and what they start, have its ceiling, and nobody else."""
    seen: dict[str, list[Any]] = {}

    async def start(self: Any) -> None:
        self._fetcher = Fetcher.__new__(Fetcher)

        async def fetch() -> None:
            made = fetcher.MemoryRecords(b"")
            seen.setdefault(type(self).__name__, []).append(getattr(made, "_limit", None))

        await asyncio.create_task(fetch())

    monkeypatch.setattr(AIOKafkaConsumer, "start", start)
    consumers = [BoundedConsumer(max_inflated_bytes=7), AIOKafkaConsumer(), BoundedConsumer()]
    for each in consumers:
        await each.start()
        each._closed = True  # they have nothing to close

    assert seen == {"BoundedConsumer": [7, 64 << 20], "AIOKafkaConsumer": [None]}
    kinds = [type(each._fetcher) for each in consumers]
    assert kinds == [consumer.PromptFetcher, Fetcher, consumer.PromptFetcher]
    assert isinstance(fetcher.MemoryRecords(b""), MemoryRecords)
