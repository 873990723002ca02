"""Micro-batches on a CUDA device without a gap: packed into few sizes, each a CUDA graph, copied asynchronously.

A part is what runs at once: some sequences side by side in a row of a fixed size. Its inputs go to the device in one copy
from pinned memory, its vectors come back in another, and the host waits for a part only when it wants the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine import Tokens
from embedq_consumer.engine.loading.memory_check import PART_TOKENS
from embedq_consumer.engine.prefix_cache import (
    LONGEST_PREFIX,
    MARGIN,
    Prefix,
    PrefixCache,
    key_ends,
    moves_of,
)

if TYPE_CHECKING:
    from embedq_consumer.engine.models.qwen3_cuda import PackedQwen3

__all__ = [
    "Forward",
    "Graphs",
    "Pending",
    "Row",
    "Shared",
    "best_fit",
    "fill",
    "fill_shared",
    "graph_limit",
    "input_length",
    "rooms_of",
    "shared_length",
    "sizes_up_to",
]

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

_GRAPH_TOKENS = 16384
_GRAPH_TOKENS_TORCH = 1024
"""PyTorch's own attention launches work for the longest sequence that a graph may hold, for every sequence."""
_POOL_ROWS = 2048
"""Tokens of shared prefixes that are held at once; one takes 147 KB of the device in the shape of Qwen3-Embedding-4B."""
_KEYS_A_TOKEN = 4
"""Room for keys in a part with shared prefixes, for each token of a part that runs."""
_WHOLE_TOKENS = 64
"""So few tokens take the time of reading the weights, prefixes and all: nothing is gained by sharing."""
_LEAST_SAVED = 64
"""Sharing has to save one token in so many: to lay out the keys takes a hundredth of a token's time for each of them."""
_FIXED_TOKENS = 1024
"""Rows of the deterministic mode: every text that fits runs in a row of this one size."""
_ROOMS_MATTER = 2048
"""Rows of up to so many tokens take kernels of their own for few places."""
_SLOTS = 4
"""Parts on their way at once: one runs, one waits behind it, two are being filled or emptied."""

# PyTorch's own annotations leave these two out.
_new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
_idle_streams: list[torch.cuda.Stream] = []
_NONE: Ids = np.empty(0, dtype=np.int32)


def graph_limit(attention: Callable[..., Tensor], longest: int | None = None) -> int:
    """The largest row, in tokens, that a graph is made for.

    `attention` is what `cuda_kernel` chose; `longest` the longest text, where the forward tells attention of it.
    """
    if attention.__name__ == "flash_attn_4" or (longest is not None and longest <= _GRAPH_TOKENS_TORCH):
        return _GRAPH_TOKENS
    return _GRAPH_TOKENS_TORCH


def sizes_up_to(limit: int) -> tuple[int, ...]:
    """The rows' sizes in tokens: powers of two, from 1,024 on with three more between each two.

    32 is left out: it takes as long as 64, both being bound by the weights, and in FP8 a tenth longer.
    """
    sizes = [16, 64]
    while sizes[-1] < limit:
        last = sizes[-1]
        step = last if last < 1024 else (1 << (last.bit_length() - 1)) // 4
        sizes.append(last + step)
    return tuple(size for size in sizes if size <= limit)


def rooms_of(size: int) -> tuple[int, ...]:
    """For how many sequences rows of `size` tokens are made, ascending: attention pays for each place, used or not."""
    return tuple(sorted({max(16, size // tokens) for tokens in (128, 32, 8)}))


def best_fit(
    lengths: Sequence[int],
    size: int,
    most: int,
    window: int = 256,
    *,
    prefixes: Sequence[int] | None = None,
    prefix_room: int = 0,
) -> list[list[int]]:
    """Indices of `lengths` in parts of at most `size` tokens and `most` sequences; a longer sequence is a part alone.

    `prefixes`: tokens that each has beside these, in all at most `prefix_room` in a part.

    A part takes sequences in their order while there is ample room, then the longest that still fits among the next
    `window`: so all parts but the last are full, and long and short ones stay mixed, which evens out their attention.
    """
    beside = [0] * len(lengths) if prefixes is None else prefixes
    waiting = deque(range(len(lengths)))
    parts: list[list[int]] = []
    while waiting:
        part = [waiting.popleft()]
        room = size - lengths[part[0]]
        spare = prefix_room - beside[part[0]]
        while (
            waiting
            and len(part) < most
            and lengths[waiting[0]] <= room
            and beside[waiting[0]] <= spare
            and room > size // 8
        ):
            part.append(waiting.popleft())
            room -= lengths[part[-1]]
            spare -= beside[part[-1]]
        near = [waiting[place] for place in range(min(window, len(waiting)))]
        for index in sorted(near, key=lambda index: -lengths[index]):
            if len(part) < most and lengths[index] <= room and beside[index] <= spare:
                part.append(index)
                room -= lengths[index]
                spare -= beside[index]
                waiting.remove(index)
        parts.append(part)
    return parts


class Shared(msgspec.Struct, frozen=True):
    """What a part with shared prefixes has beside its row, on the device; see prefixes.py for what is moved where."""

    pool: Tensor
    """(layers, rows, 2 · kv_heads · head_dim): keys and values of prefixes."""
    cu: Tensor
    """int32 (places + 1,): 0, then where each text's keys end, its prefix's and its own."""
    count: Tensor
    """int32 (1,): so many moves."""
    moves: Tensor
    """int32 (room, 2), source and target. There is room for as many keys."""
    longest: int
    """No text has more keys."""


class Row(msgspec.Struct, frozen=True):
    """One part's inputs on the device, int32: places without a text hold filler, and nobody reads their vectors."""

    ids: Tensor
    """(size,)"""
    positions: Tensor
    """(size,): which token of its text each is, from 0 on."""
    cu: Tensor
    """(places + 1,): 0, then where each text ends."""
    last: Tensor
    """(places,): each text's last token."""
    shared: Shared | None = None
    """For parts in which a text has its prefix's keys from the pool; its own tokens alone are in the row then."""


Forward = Callable[[Row, int, Tensor], None]
"""(row, longest, out): writes one pooled vector for each place to `out`, float32 (places, hidden)."""


class _Text(msgspec.Struct, frozen=True):
    """One sequence of a part: `ids`, of which the first `len(prefix)` are not run but read, from these rows of the pool."""

    ids: Ids
    prefix: Ids

    @property
    def own(self) -> Ids:
        return self.ids[len(self.prefix) :]


class _Outputs:
    """A part's vectors, and each one's largest absolute value: not finite exactly where the vector is not.

    They lie side by side, so that one copy brings both to the host.
    """

    def __init__(self, flat: Tensor, places: int, hidden: int) -> None:
        self._flat = flat
        self._places = places
        self._hidden = hidden
        self.largest = flat[:places]
        self.vectors = flat[places:].view(places, hidden)

    @classmethod
    def empty(cls, places: int, hidden: int, device: torch.device | None = None) -> _Outputs:
        """On `device`, else in the host's pinned memory."""
        flat = torch.zeros(places * (1 + hidden), dtype=torch.float32, device=device)
        return cls(flat if device is not None else flat.pin_memory(), places, hidden)

    def first(self, count: int) -> Tensor:
        """The part of the memory that holds the first `count` vectors and all of `largest`."""
        return self._flat[: self._places + count * self._hidden]


class _Slot(msgspec.Struct, frozen=True):
    """Pinned memory of one part on its way."""

    inputs: Tensor
    outputs: _Outputs
    done: torch.cuda.Event


class _Part(msgspec.Struct, eq=False):
    """One part on its way, until its vectors are in place."""

    texts: list[_Text]
    slot: _Slot | None
    source: _Outputs
    done: torch.cuda.Event
    vectors: Vectors
    indices: list[int]
    spoilt: list[int] = []
    """Which of `indices` have no finite vector; known once it is collected."""
    collected: bool = False


class Pending:
    """Vectors that the device computes, or has computed."""

    def __init__(self, graphs: Graphs, vectors: Vectors, parts: Sequence[_Part]) -> None:
        self._graphs = graphs
        self._vectors = vectors
        self._parts = parts

    def result(self) -> Vectors:
        """Wait for them: float32 (sequences, hidden), in the order of `submit`. From any thread, once."""
        for part in self._parts:
            self._graphs.finish(part)
        return self._vectors


class Graphs:
    """Runs `forward` over parts of a batch. One thread submits; another may wait for what it submitted.

    Invariants: everything runs on one stream, in the order of `submit`; the device's input and output buffers are the
    same for all sizes, so a part's copy in, graph and copy out never overlap another's; captured graphs share one pool
    of memory for the same reason. A part larger than the largest size runs without a graph, in exactly its own size.

    With a `pool`, the keys and values of prefixes that texts share are computed once, by a part of their own, and read
    by the parts behind it. Parts in which no text has one run as they would without.

    `deterministic`: how a text is computed depends on its own length alone, not on what runs beside it. Rows have one
    size and one number of places, and a text longer than that is alone in a row of its own length's size.
    """

    def __init__(
        self,
        forward: Forward,
        hidden: int,
        device: torch.device,
        *,
        graph_limit: int,
        part_tokens: int,
        pool: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        assert pool is None or not deterministic, "a shared prefix rounds as its batch does. This is a bug."
        self._forward = forward
        self._hidden = hidden
        self._device = device
        self._deterministic = deterministic
        self._sizes = sizes_up_to(graph_limit)
        # One and a half of a power of two is near enough where a prefix is saved.
        self._shared_sizes = tuple(size for size in self._sizes if size & (size - 1) == 0 or not size % 3)
        self.part_tokens = _FIXED_TOKENS if deterministic else part_tokens
        """Larger batches are cut into parts of so many tokens."""
        self._key_room = _KEYS_A_TOKEN * max(part_tokens, self._sizes[-1]) + MARGIN
        self._pool = pool
        self._prefixes = None if pool is None else PrefixCache(pool.shape[1])
        idle = [stream for stream in _idle_streams if stream.device == device]
        self._stream = idle[-1] if idle else _new_stream(device)
        if idle:
            _idle_streams.remove(self._stream)
        self._places = {shared: self._all_places(shared) for shared in (False, True)}
        self._memory = torch.cuda.graph_pool_handle()
        self._tried: set[tuple[int, ...]] = set()  # which kinds of rows ran without a graph
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        size = self._sizes[-1]
        places = rooms_of(size)[-1]
        length = input_length(size, places)
        if pool is not None:
            length = shared_length(size, places, self._key_room)
        self._inputs = torch.zeros(length, dtype=torch.int32, device=device)
        self._outputs = _Outputs.empty(places, hidden, device)
        self._free = [
            _Slot(
                torch.zeros(length, dtype=torch.int32).pin_memory(),
                _Outputs.empty(places, hidden),
                _new_event(),
            )
            for _ in range(_SLOTS)
        ]
        self._running: deque[_Part] = deque()
        self._feeding = RLock()  # held while parts go to the device, whose buffers all parts share
        self._books = Lock()  # held while `_free` or `_running` changes, and a part's vectors leave its slot
        torch.cuda.current_stream(device).synchronize()

    @classmethod
    def over(cls, forward: PackedQwen3, norm: Tensor, *, deterministic: bool = False) -> Self:
        """For last tokens: `norm` is the weight of the last norm."""

        def run(row: Row, longest: int, out: Tensor) -> None:
            forward.pooled(row, longest, norm, out)

        return cls(
            run,
            forward.hidden_size,
            forward.device,
            graph_limit=graph_limit(forward.attention),
            part_tokens=PART_TOKENS,
            pool=forward.prefix_pool(_POOL_ROWS) if forward.causal and not deterministic else None,
            deterministic=deterministic,
        )

    @property
    def shares_prefixes(self) -> bool:
        return self._pool is not None

    def capture(self) -> None:
        """Capture every size, largest first: the smaller ones then find their memory in the pool."""
        for shared in (False, True) if self.shares_prefixes else (False,):
            for size, room in reversed(self._places[shared]):
                self._graph(size, room, shared)
        torch.cuda.empty_cache()  # what running each size once without a graph took

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        """Start computing one vector for each text; one of no tokens gets zeros.

        Returns when all is handed to the device, which waits for earlier parts where no slot is free.
        """
        vectors = np.zeros((len(batch), self._hidden), dtype=np.float32)
        present = [index for index, text in enumerate(batch) if len(text.ids)]
        with self._feeding:
            texts = self._with_prefixes([batch[index] for index in present])
            started = [
                self._start([texts[i] for i in part], [present[i] for i in part], vectors)
                for part in self._parts(texts)
            ]
        return Pending(self, vectors, started)

    def encode(self, batch: Sequence[Ids]) -> Vectors:
        """`submit`, and wait, for plain ids."""
        return self.submit([Tokens(ids) for ids in batch]).result()

    def finish(self, part: _Part) -> None:
        """Wait for one part, put its vectors in place, and run again what is not finite."""
        self._collect(part)
        if len(part.indices) > 1 and part.spoilt:
            self._each_alone(part)

    def _collect(self, part: _Part) -> None:
        """Wait for one part and put its vectors in place; doing it again changes nothing."""
        if part.collected:
            return  # its event may be a later part's by now
        part.done.synchronize()
        with self._books:
            if part.collected:
                return
            count = len(part.indices)
            part.vectors[part.indices] = part.source.vectors[:count].numpy()
            finite = np.isfinite(part.source.largest[:count].numpy())
            part.spoilt = np.flatnonzero(~finite).tolist()
            part.collected = True
            if part.slot is not None:
                self._running.remove(part)
                self._free.append(part.slot)

    def _each_alone(self, part: _Part) -> None:
        """Compute again, each alone, the vectors that are not finite: most of them come from a neighbour.

        Attention reads its keys and values in tiles that end in the next sequence and weighs what is too much by zero,
        but zero times NaN is NaN. So one text that the model cannot compute would take others with it. A prefix may have
        left the pool by now, so they run whole.
        """
        with self._feeding:
            for place in part.spoilt:
                text = _Text(part.texts[place].ids, _NONE)
                self._collect(self._start([text], [part.indices[place]], part.vectors))

    def _with_prefixes(self, batch: Sequence[Tokens]) -> list[_Text]:
        """The texts with the rows of their prefixes; what is new of these is computed first.

        A part may read rows that a later one writes anew: the device does both in the order in which they are started.
        """
        tokens, saved = sum(len(text.ids) for text in batch), sum(text.shared for text in batch)
        if self._prefixes is None or tokens <= _WHOLE_TOKENS or saved * _LEAST_SAVED < tokens:
            return [_Text(text.ids, _NONE) for text in batch]
        places, new = self._prefixes.place(batch)
        try:
            while new:
                self._keep(new[0])
                del new[0]
        finally:
            for prefix in new:
                self._prefixes.forget(prefix)
        return [
            _Text(text.ids, _NONE if rows is None else rows) for text, rows in zip(batch, places, strict=True)
        ]

    def _keep(self, prefix: Prefix) -> None:
        """Compute one prefix into the pool, alone: what is wrong with another one must not stay in its rows."""
        self._start([_Text(prefix.ids, _NONE)], [0], np.empty((1, self._hidden), np.float32), prefix.rows)

    def _parts(self, texts: Sequence[_Text]) -> list[list[int]]:
        lengths, prefixes = [len(text.own) for text in texts], [len(text.prefix) for text in texts]
        prefix_room = self._key_room - MARGIN - max(self.part_tokens, self._sizes[-1])
        whole = sum(lengths) <= self.part_tokens and sum(prefixes) <= prefix_room
        if whole and self._fitting(sum(lengths), len(lengths), any(prefixes)):
            return [list(range(len(lengths)))] if lengths else []
        most = rooms_of(self.part_tokens)[-1] - 1
        return best_fit(lengths, self.part_tokens, most, prefixes=prefixes, prefix_room=prefix_room)

    def _all_places(self, shared: bool) -> list[tuple[int, int]]:
        """Every size and number of places that has a graph, ascending."""
        if shared:
            return [(size, rooms_of(size)[-1]) for size in self._shared_sizes]
        if self._deterministic:
            larger = [(size, rooms_of(size)[0]) for size in self._sizes if size > _FIXED_TOKENS]
            return [(_FIXED_TOKENS, rooms_of(_FIXED_TOKENS)[-1]), *larger]
        return [(size, room) for size in self._sizes for room in rooms_of(size)]

    def _fitting(self, tokens: int, sequences: int, shared: bool) -> tuple[int, int] | None:
        """The smallest size with room and its smallest room, None if none has; a tail that is unused takes a place too."""
        return next(
            (
                (size, room)
                for size, room in self._places[shared]
                if size >= tokens and room >= sequences + (size > tokens)
            ),
            None,
        )

    def _start(
        self, texts: list[_Text], indices: list[int], vectors: Vectors, kept: Ids | None = None
    ) -> _Part:
        """Start one part; `kept`: rows of the pool that its first tokens' keys and values go to."""
        lengths = np.array([len(text.own) for text in texts], dtype=np.int32)
        shared = kept is not None or any(len(text.prefix) for text in texts)
        fitting = self._fitting(int(lengths.sum()), len(texts), shared)
        if fitting is None:
            return self._start_alone(texts, lengths, indices, vectors, kept)
        size, room = fitting
        graph = self._graph(size, room, shared)
        slot = self._free_slot()
        length = _lay_out(slot.inputs.numpy(), texts, lengths, size, room, kept, shared=shared)
        outputs = slot.outputs.first(len(texts))
        with self._here():
            self._inputs[:length].copy_(slot.inputs[:length], non_blocking=True)
            graph.replay()
            outputs.copy_(self._outputs.first(len(texts)), non_blocking=True)
            slot.done.record()
        part = _Part(texts, slot, slot.outputs, slot.done, vectors, indices)
        with self._books:
            self._running.append(part)
        return part

    def _free_slot(self) -> _Slot:
        with self._books:
            if self._free:
                return self._free.pop()
            oldest = self._running[0]
        self._collect(oldest)
        return self._free_slot()

    def _start_alone(
        self,
        texts: list[_Text],
        lengths: Ids,
        indices: list[int],
        vectors: Vectors,
        kept: Ids | None,
    ) -> _Part:
        """Without a graph, in memory of its own and in its own size, rounded up to what the products like."""
        room = -(-(len(texts) + 1) // 16) * 16
        size = -(-int(lengths.sum()) // 128) * 128
        shared = kept is not None or any(len(text.prefix) for text in texts)
        key_room = (
            size + MARGIN + sum(len(text.prefix) for text in texts) + (0 if kept is None else len(kept))
        )
        length = shared_length(size, room, key_room) if shared else input_length(size, room)
        host = torch.empty(length, dtype=torch.int32).pin_memory()
        _lay_out(host.numpy(), texts, lengths, size, room, kept, shared=shared)
        outputs = _Outputs.empty(room, self._hidden)
        with self._here():
            inputs = host.to(self._device, non_blocking=True)
            out = _Outputs.empty(room, self._hidden, self._device)
            self._compute(self._row(inputs, size, room, key_room if shared else 0), int(lengths.max()), out)
            outputs.first(len(texts)).copy_(out.first(len(texts)), non_blocking=True)
            done = _new_event()
            done.record()
        return _Part(texts, None, outputs, done, vectors, indices)

    @contextmanager
    def _here(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.inference_mode():
            yield

    def _graph(self, size: int, room: int, shared: bool) -> torch.cuda.CUDAGraph:
        if (size, room, shared) not in self._graphs:
            self._graphs[size, room, shared] = self._captured(size, room, shared)
        return self._graphs[size, room, shared]

    def _captured(self, size: int, room: int, shared: bool) -> torch.cuda.CUDAGraph:
        row = self._row(self._inputs, size, room, self._key_room if shared else 0)
        with self._here():
            self._inputs.zero_()  # else another size's ids would be read as this one's positions
            # Once without a graph: kernels are compiled and libraries choose theirs, which a capture forbids. In long
            # rows that is the same whatever their room, and takes most of a start's time on the device.
            kinds = (size, shared) if size > _ROOMS_MATTER else (size, shared, room)
            if kinds not in self._tried:
                self._compute(row, size, self._outputs)
                self._tried.add(kinds)
            self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.inference_mode(),
            torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            self._compute(row, size, self._outputs)
        return graph

    def _compute(self, row: Row, longest: int, outputs: _Outputs) -> None:
        places = len(row.last)
        vectors = outputs.vectors[:places]
        self._forward(row, longest, vectors)
        torch.linalg.vector_norm(vectors, torch.inf, dim=1, out=outputs.largest[:places])

    def _row(self, inputs: Tensor, size: int, rooms: int, key_room: int) -> Row:
        """The parts of one copy: ids, positions, last tokens and cumulated lengths; with room for keys, what these need."""
        whole = inputs[: input_length(size, rooms)]
        ids, positions, last, cu = torch.split(whole, [size, size, rooms, rooms + 1])
        if self._pool is None or not key_room:
            return Row(ids, positions, cu, last)
        ends, count, moves = _split_shared(inputs, size, rooms)
        pairs = moves[: 2 * key_room].view(-1, 2)
        longest = min(size + LONGEST_PREFIX, key_room)
        return Row(ids, positions, cu, last, Shared(self._pool, ends, count, pairs, longest))

    def close(self) -> None:
        """Give the stream back, for the next encoder: libraries keep workspaces of 32 MiB for each that they ever saw."""
        self._stream.synchronize()
        self._graphs.clear()
        self._pool = None
        _idle_streams.append(self._stream)


def _lay_out(
    inputs: Ids,
    texts: Sequence[_Text],
    lengths: Ids,
    size: int,
    rooms: int,
    kept: Ids | None,
    *,
    shared: bool,
) -> int:
    """Write one part's inputs; so many of the numbers are in use."""
    length = input_length(size, rooms)
    fill(inputs[:length], [text.own for text in texts], lengths, size, rooms)
    return (
        fill_shared(inputs, [text.prefix for text in texts], lengths, kept, size, rooms) if shared else length
    )


def input_length(size: int, rows: int) -> int:
    """Numbers in a part's inputs: cumulated lengths come last, their number being odd."""
    return 2 * size + 2 * rows + 1


def shared_length(size: int, rows: int, moves: int) -> int:
    """The same for a part with shared prefixes and so many moves; each of the pieces begins at a multiple of 16."""
    return _aligned(input_length(size, rows)) + _aligned(rows + 1) + 16 + 2 * moves


def _aligned(length: int) -> int:
    return -(-length // 16) * 16


def _split_shared(inputs: Any, size: int, rows: int) -> tuple[Any, Any, Any]:
    """(where each text's keys end, how many moves there are, all of the moves) out of a tensor or an array."""
    begin = _aligned(input_length(size, rows))
    middle = begin + _aligned(rows + 1)
    return inputs[begin : begin + rows + 1], inputs[middle : middle + 1], inputs[middle + 16 :]


def fill(inputs: Ids, sequences: Sequence[Ids], lengths: Ids, size: int, rows: int) -> None:
    """Lay one part out in `inputs`. The tail that no text uses is token 0 in short sequences, as many as have places.

    They belong to sequences because attention must write every row: a row that is never written may hold NaN, which
    spreads to the sequence in front (see `_each_alone`).
    """
    count, tokens = len(sequences), int(lengths.sum())
    ids, positions, last, cu = np.split(inputs, [size, 2 * size, 2 * size + rows])
    ends = np.cumsum(lengths, dtype=np.int32)
    np.concatenate(sequences, out=ids[:tokens])
    ids[tokens:] = 0
    np.subtract(np.arange(tokens, dtype=np.int32), np.repeat(ends - lengths, lengths), out=positions[:tokens])
    positions[tokens:] = 0
    last[:count] = ends - 1
    last[count:] = 0
    cu[0] = 0
    cu[1 : count + 1] = ends
    if count < rows:
        piece = max(64, -(-(size - tokens) // (rows - count)))
        np.minimum(
            tokens + piece * np.arange(1, rows - count + 1), size, out=cu[count + 1 :], casting="unsafe"
        )


def fill_shared(
    inputs: Ids, prefixes: Sequence[Ids], lengths: Ids, kept: Ids | None, size: int, rows: int
) -> int:
    """Lay out what shared prefixes add to a part that `fill` has laid out; so many of the numbers are in use.

    `prefixes`: each text's rows of the pool, maybe none; its positions go on behind them.
    """
    behind = np.array([len(rows_) for rows_ in prefixes], dtype=np.int32)
    inputs[size : size + int(lengths.sum())] += np.repeat(behind, lengths)
    length = input_length(size, rows)
    cu = inputs[length - rows - 1 : length]
    ends, count, room = _split_shared(inputs, size, rows)
    moves = moves_of(cu, prefixes, kept)
    ends[:] = key_ends(cu, prefixes)
    count[0] = len(moves)
    room[: moves.size] = moves.reshape(-1)
    return len(inputs) - len(room) + moves.size
