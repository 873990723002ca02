"""Where a key goes, beside aiokafka's partitioner and figures of Kafka's own."""

from __future__ import annotations

from random import Random

from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from embedq_shared.kafka import partition_of, partitions_of


@given(st.binary(max_size=300), st.integers(1, 1000))
def test_a_key_goes_where_aiokafka_would_put_it(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == DefaultPartitioner()(key, list(range(partitions)), [])


def test_a_key_goes_to_the_partition_where_kafkas_own_clients_put_it() -> None:
    # From Kafka's own test of its partitioner's hash, whose sign bit is taken off.
    assert [partition_of(key, 1 << 31) for key in (b"21", b"foobar", b"abc")] == [
        -973932308 & 0x7FFFFFFF,
        -790332482 & 0x7FFFFFFF,
        479470107,
    ]


@given(
    st.lists(st.binary(max_size=40) | st.binary(min_size=17, max_size=17), max_size=60), st.integers(1, 1000)
)
def test_keys_that_are_looked_at_together_go_where_each_would_go_alone(
    keys: list[bytes], partitions: int
) -> None:
    assert partitions_of(keys, partitions) == [partition_of(key, partitions) for key in keys]


@given(st.integers(0, 40), st.integers(8, 40), st.integers(1, 1 << 31), st.randoms())
def test_many_keys_of_one_length_go_where_each_would_go_alone(
    length: int, count: int, partitions: int, chance: Random
) -> None:
    keys = [chance.randbytes(length) for _ in range(count)]
    assert partitions_of(keys, partitions) == [partition_of(key, partitions) for key in keys]
