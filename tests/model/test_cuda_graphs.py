"""Parts, rows and prefixes as they run, on the CPU: a graph is replayed by computing again, and a stream is the thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedq_consumer.engine import Tokens, cuda_graphs
from embedq_consumer.engine.cuda_graphs import Graphs
from embedq_consumer.engine.row import PooledForward, Row

Ids = npt.NDArray[np.int32]
CPU = torch.device("cpu")
BAD = 666
"""A token that the model cannot compute; it spoils the text before its own, too, as tiles of attention do."""


class Stream:
    """Work is done when it is submitted."""

    device = CPU

    def synchronize(self) -> None:
        pass

    def record(self) -> None:
        pass


class Replay:
    def __init__(self, graphs: Graphs, row: Row, size: int) -> None:
        self._graphs, self._row, self._size = graphs, row, size

    def replay(self) -> None:
        self._graphs._compute(self._row, self._size, self._graphs._outputs)


class CpuGraphs(Graphs):
    @contextmanager
    def _here(self) -> Iterator[None]:
        yield

    def _captured(self, size: int, slots: int, shared: bool) -> Any:
        row = self._row(self._inputs, size, slots, self.sizes.key_room if shared else 0)
        return Replay(self, row, size)


class Forward:
    """A text's vector: the sum of its ids, that of their positions, and its number of tokens, all its keys counted.

    A key is (id, position), in a pool of one layer.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        """(texts, tokens that ran) of each row."""

    def run(self, row: Row, longest: int, out: torch.Tensor) -> None:
        own = torch.stack([row.ids, row.positions], dim=1).long()
        ends, keys = row.cu_seqlens, own
        if row.shared is not None:
            pool = row.shared.pool[0]
            keys = torch.zeros(len(row.shared.copies), 2, dtype=torch.long)
            for source, target in row.shared.copies[: int(row.shared.count)].tolist():
                value = own[source] if source >= 0 else pool[-1 - source]
                (keys if target >= 0 else pool)[target if target >= 0 else -1 - target] = value
            ends = row.shared.cu_seqlens
        used = [(a, b) for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False) if keys[a:b, 0].any()]
        self.rows.append((len(used), len(row.ids)))
        out.zero_()
        for slot, (begin, end) in enumerate(used):
            text = keys[begin:end]
            out[slot] = torch.tensor([*text.sum(0).tolist(), end - begin], dtype=torch.float32)
            if (text[:, 0] == BAD).any():
                out[max(0, slot - 1) : slot + 1] = torch.nan

    def pooled(
        self, *, pool: bool = False, attention: str = "flash_attn_4", padding: int | None = None
    ) -> PooledForward:
        def kernel(*_: Any) -> torch.Tensor:
            raise NotImplementedError

        kernel.__name__ = attention
        return PooledForward(
            run=self.run,
            hidden_size=3,
            device=CPU,
            attention=kernel,
            padding=padding,
            prefix_pool=(lambda rows: torch.zeros(1, rows, 2, dtype=torch.long)) if pool else None,
        )


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_new_stream", lambda _: Stream())
    monkeypatch.setattr(cuda_graphs, "_new_event", Stream)
    monkeypatch.setattr(cuda_graphs, "_idle_streams", [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def text_of(length: int, first: int = 1) -> Tokens:
    return Tokens(np.arange(first, first + length, dtype=np.int32) % 600 + 1)


def vector_of(text: Tokens) -> list[float]:
    count = len(text.ids)
    return [float(text.ids.sum()), count * (count - 1) / 2, float(count)]


def wanted(batch: list[Tokens]) -> npt.NDArray[np.float32]:
    return np.array([vector_of(text) for text in batch], dtype=np.float32).reshape(-1, 3)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=30,
)
@given(st.lists(st.integers(0, 400) | st.just(3000), max_size=20), st.booleans())
def test_vectors_come_in_the_order_of_the_texts(lengths: list[int], deterministic: bool) -> None:
    graphs = CpuGraphs(Forward().pooled(), part_tokens=2048, deterministic=deterministic)
    batch = [text_of(length, first) for first, length in enumerate(lengths)]
    assert np.array_equal(graphs.submit(batch).result(), wanted(batch))


def test_more_parts_than_staging_memory_wait_for_earlier_ones() -> None:
    graphs = CpuGraphs(Forward().pooled(), part_tokens=64)
    first, second = [text_of(60, n) for n in range(12)], [text_of(40, n) for n in range(9)]
    pending = [graphs.submit(batch) for batch in (first, second)]
    assert np.array_equal(pending[1].result(), wanted(second))
    assert np.array_equal(pending[0].result(), wanted(first))
    assert np.array_equal(pending[0].result(), wanted(first))


def test_graphs_go_some_at_a_time_until_none_is_left() -> None:
    graphs = CpuGraphs(Forward().pooled(), part_tokens=512)
    for length in (10, 60, 120, 250, 500):
        graphs.submit([text_of(length)]).result()
    went = []
    while graphs.drop(2):
        went.append(len(graphs._graphs))
    assert went == [3, 1, 0]
    graphs.close()


def test_a_text_that_is_too_long_for_every_graph_runs_in_its_own_size() -> None:
    forward = Forward()
    graphs = CpuGraphs(forward.pooled(attention="torch_varlen"), part_tokens=512)
    assert graphs.sizes.largest[0] == 1024
    batch = [text_of(1300), text_of(5)]
    assert np.array_equal(graphs.submit(batch).result(), wanted(batch))
    assert (1, 1408) in forward.rows


@pytest.mark.parametrize("length", [20, 1300], ids=["in a graph", "too long for every graph"])
def test_padding_that_a_text_spells_does_not_count_for_the_tokens_after_it(length: int) -> None:
    padding = 7
    graphs = CpuGraphs(Forward().pooled(attention="torch_varlen", padding=padding), part_tokens=512)
    text = text_of(length)
    text.ids[[2, 3, length - 1]] = padding
    counted = int((text.ids != padding).sum())
    assert counted < length
    found = graphs.submit([text_of(5, padding), text]).result()
    # The padding has the position 0 wherever it stands, and the others are counted from 1 on.
    assert found[1, 1] == counted * (counted + 1) / 2


def test_a_text_that_gives_nan_spoils_no_neighbor() -> None:
    graphs = CpuGraphs(Forward().pooled(), part_tokens=512)
    bad = Tokens(np.array([4, BAD, 5], dtype=np.int32))
    batch = [text_of(20), text_of(9), bad, text_of(7)]
    found = graphs.submit(batch).result()
    assert np.isnan(found[2]).all()
    kept = [0, 1, 3]
    assert np.array_equal(found[kept], wanted(batch)[kept])


def test_a_shared_prefix_runs_once_and_counts_for_every_text() -> None:
    forward = Forward()
    graphs = CpuGraphs(forward.pooled(pool=True), part_tokens=512)
    assert graphs.shares_prefixes
    prompt = np.arange(100, 140, dtype=np.int32)
    batch = [Tokens(np.concatenate([prompt, text_of(5, 9 * n).ids])) for n in range(8)]
    plain = text_of(30, 400)
    assert np.array_equal(graphs.submit([*batch, plain]).result(), wanted([*batch, plain]))
    assert forward.rows == [(1, 64), (9, 128)]  # the prompt's 40 tokens, then 8 · 5 + 30
    assert np.array_equal(graphs.submit(batch).result(), wanted(batch))
    assert forward.rows[2:] == [(8, 64)]
    assert graphs.known_prefixes([batch[0].ids, plain.ids]) == [40, 0]


def test_a_batch_that_saves_too_little_shares_nothing() -> None:
    forward = Forward()
    graphs = CpuGraphs(forward.pooled(pool=True), part_tokens=512)
    prompt = np.arange(100, 110, dtype=np.int32)
    batch = [Tokens(np.concatenate([prompt, text_of(7, 9 * n).ids])) for n in range(4)]
    assert np.array_equal(graphs.submit(batch).result(), wanted(batch))
    assert forward.rows == [(4, 128)]


def test_instructions_that_begin_alike_share_what_they_have_in_common_and_each_what_is_its_own() -> None:
    forward = Forward()
    graphs = CpuGraphs(forward.pooled(pool=True), part_tokens=4096)
    common = np.arange(100, 140, dtype=np.int32)
    tenants = [np.arange(first, first + 20, dtype=np.int32) for first in (200, 300)]
    batch = [
        Tokens(np.concatenate([common, tenant, text_of(5, 9 * n).ids]))
        for tenant in tenants
        for n in range(20)
    ]
    few = [Tokens(np.concatenate([common, text_of(25, 400 + 9 * n).ids])) for n in range(3)]
    assert np.array_equal(graphs.submit([*batch, *few]).result(), wanted([*batch, *few]))
    # 60 tokens, the 20 of the other tenant behind the common 40, and then 40 · 5 + 3 · 25 of the texts' own.
    assert forward.rows == [(1, 64), (1, 64), (43, 512)]
    assert np.array_equal(graphs.submit(few).result(), wanted(few))


def test_where_sharing_leaves_a_row_of_the_same_size_texts_run_whole() -> None:
    forward = Forward()
    graphs = CpuGraphs(forward.pooled(pool=True), part_tokens=4096)
    prompt = np.arange(100, 140, dtype=np.int32)
    batch = [Tokens(np.concatenate([prompt, text_of(5, 9 * n).ids])) for n in range(8)]
    graphs.submit(batch).result()
    forward.rows.clear()
    mixed = [batch[0], text_of(900, 200)]
    assert np.array_equal(graphs.submit(mixed).result(), wanted(mixed))
    assert forward.rows == [(2, 1024)]


def test_a_trial_of_the_memory_runs_every_token() -> None:
    forward = Forward()
    graphs = CpuGraphs(forward.pooled(pool=True), part_tokens=2048)
    texts = [Tokens(text_of(200).ids, whole=True)] * 10
    assert np.array_equal(graphs.submit(texts).result(), wanted(texts))
    assert np.array_equal(graphs.encode([text.ids for text in texts]), wanted(texts))
    assert forward.rows == [(10, 2048)] * 2


def test_the_deterministic_mode_shares_no_prefixes() -> None:
    assert not CpuGraphs(Forward().pooled(pool=True), deterministic=True).shares_prefixes


def test_a_closed_engine_knows_no_prefix_any_more() -> None:
    graphs = CpuGraphs(Forward().pooled(pool=True))
    batch = [Tokens(np.concatenate([np.arange(3, 43), np.full(30, n)]).astype(np.int32)) for n in range(40)]
    graphs.submit(batch).result()
    assert graphs.known_prefixes([batch[0].ids]) == [40]
    graphs.close()
    assert graphs.known_prefixes([batch[0].ids]) == [0]


def test_a_closed_engine_leaves_its_stream_to_the_next() -> None:
    first = CpuGraphs(Forward().pooled())
    stream = first._stream
    first.close()
    assert CpuGraphs(Forward().pooled())._stream is stream
