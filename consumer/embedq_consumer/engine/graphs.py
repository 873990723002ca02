"""Micro-batches on a CUDA device without a gap: packed into few sizes, each a CUDA graph, copied asynchronously.

A part is what runs at once: some sequences side by side in a row of a fixed size. Its inputs go to the device in one copy
from pinned memory, its vectors come back in another, and the host waits for a part only when it wants the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, RLock
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from embedq_consumer.engine.qwen3 import PackedQwen3

__all__ = [
    "Forward",
    "Graphs",
    "Pending",
    "Row",
    "best_fit",
    "fill",
    "input_length",
    "rooms_of",
    "sizes_up_to",
]

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

_PART_TOKENS = 16384
"""What runs at once of a larger batch: 8,192 tokens are 1 % slower in FP8, 4,096 are 3 % (benchmarks/engine.py)."""
_GRAPH_TOKENS = 16384
_GRAPH_TOKENS_TORCH = 1024
"""PyTorch's own attention launches work for the longest sequence that a graph may hold, for every sequence."""
_SLOTS = 4
"""Parts on their way at once: one runs, one waits behind it, two are being filled or emptied."""

# PyTorch's own annotations leave these two out.
_new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
_idle_streams: list[torch.cuda.Stream] = []


def sizes_up_to(limit: int) -> tuple[int, ...]:
    """The rows' sizes in tokens: powers of two, from 1,024 on with three more between each two."""
    sizes = [16]
    while sizes[-1] < limit:
        last = sizes[-1]
        step = last if last < 1024 else (1 << (last.bit_length() - 1)) // 4
        sizes.append(last + step)
    return tuple(size for size in sizes if size <= limit)


def rooms_of(size: int) -> tuple[int, ...]:
    """For how many sequences rows of `size` tokens are made, ascending: attention pays for each place, used or not."""
    return tuple(sorted({max(16, size // tokens) for tokens in (128, 32, 8)}))


def best_fit(lengths: Sequence[int], size: int, most: int, window: int = 256) -> list[list[int]]:
    """Indices of `lengths` in parts of at most `size` tokens and `most` sequences; a longer sequence is a part alone.

    A part takes sequences in their order while there is ample room, then the longest that still fits among the next
    `window`: so all parts but the last are full, and long and short ones stay mixed, which evens out their attention.
    """
    waiting = deque(range(len(lengths)))
    parts: list[list[int]] = []
    while waiting:
        part = [waiting.popleft()]
        room = size - lengths[part[0]]
        while waiting and len(part) < most and lengths[waiting[0]] <= room and room > size // 8:
            part.append(waiting.popleft())
            room -= lengths[part[-1]]
        near = [waiting[place] for place in range(min(window, len(waiting)))]
        for index in sorted(near, key=lambda index: -lengths[index]):
            if len(part) < most and lengths[index] <= room:
                part.append(index)
                room -= lengths[index]
                waiting.remove(index)
        parts.append(part)
    return parts


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


Forward = Callable[[Row, int, Tensor], None]
"""(row, longest, out): writes one pooled vector for each place to `out`, float32 (places, hidden)."""


class _Slot(msgspec.Struct, frozen=True):
    """Pinned memory of one part on its way."""

    inputs: Tensor
    outputs: Tensor
    done: torch.cuda.Event


class _Part(msgspec.Struct):
    """One part on its way, until its vectors are in place."""

    sequences: list[Ids]
    slot: _Slot | None
    source: Vectors
    done: torch.cuda.Event
    vectors: Vectors
    indices: list[int]
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
    """

    def __init__(
        self, forward: Forward, hidden: int, device: torch.device, *, graph_limit: int, part_tokens: int
    ) -> None:
        self._forward = forward
        self._hidden = hidden
        self._device = device
        self._sizes = sizes_up_to(graph_limit)
        self.part_tokens = part_tokens
        """Larger batches are cut into parts of so many tokens."""
        idle = [stream for stream in _idle_streams if stream.device == device]
        self._stream = idle[-1] if idle else _new_stream(device)
        if idle:
            _idle_streams.remove(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        sequences = rooms_of(self._sizes[-1])[-1]
        self._inputs = torch.zeros(input_length(self._sizes[-1], sequences), dtype=torch.int32, device=device)
        self._outputs = torch.zeros(sequences, hidden, dtype=torch.float32, device=device)
        self._free = [
            _Slot(
                torch.zeros(len(self._inputs), dtype=torch.int32).pin_memory(),
                torch.zeros(sequences, hidden, dtype=torch.float32).pin_memory(),
                _new_event(),
            )
            for _ in range(_SLOTS)
        ]
        self._running: deque[_Part] = deque()
        self._feeding = RLock()  # held while parts go to the device, whose buffers all parts share
        self._books = Lock()  # held while a part's vectors are taken out of its slot
        torch.cuda.current_stream(device).synchronize()

    @classmethod
    def over(cls, forward: PackedQwen3, norm: Tensor) -> Self:
        """For last tokens: `norm` is the weight of the last norm."""

        def run(row: Row, longest: int, out: Tensor) -> None:
            forward.pooled(row, longest, norm, out)

        fast = forward.attention.__name__ == "flash_attn_4"
        return cls(
            run,
            forward.hidden_size,
            forward.device,
            graph_limit=_GRAPH_TOKENS if fast else _GRAPH_TOKENS_TORCH,
            part_tokens=_PART_TOKENS,
        )

    def capture(self) -> None:
        """Capture every size, largest first: the smaller ones then find their memory in the pool."""
        for size in reversed(self._sizes):
            for room in reversed(rooms_of(size)):
                self._graph(size, room)

    def submit(self, batch: Sequence[Ids]) -> Pending:
        """Start computing one vector for each sequence; a sequence of no tokens gets zeros.

        Returns when all is handed to the device, which waits for earlier parts where no slot is free.
        """
        vectors = np.zeros((len(batch), self._hidden), dtype=np.float32)
        present = [index for index, ids in enumerate(batch) if len(ids)]
        parts = self._parts([len(batch[index]) for index in present])
        started = []
        with self._feeding:
            for part in parts:
                indices = [present[i] for i in part]
                started.append(self._start([batch[i] for i in indices], indices, vectors))
        return Pending(self, vectors, started)

    def encode(self, batch: Sequence[Ids]) -> Vectors:
        """`submit`, and wait."""
        return self.submit(batch).result()

    def finish(self, part: _Part) -> None:
        """Wait for one part, put its vectors in place, and run again what is not finite."""
        self._collect(part)
        if len(part.indices) > 1 and not np.isfinite(part.vectors[part.indices].sum()):
            self._each_alone(part)

    def _collect(self, part: _Part) -> None:
        """Wait for one part and put its vectors in place; doing it again changes nothing."""
        part.done.synchronize()
        with self._books:
            if part.collected:
                return
            part.vectors[part.indices] = part.source
            part.collected = True
            if part.slot is not None:
                self._running.remove(part)
                self._free.append(part.slot)

    def _each_alone(self, part: _Part) -> None:
        """Compute again, each alone, the vectors that are not finite: most of them come from a neighbour.

        Attention reads its keys and values in tiles that end in the next sequence and weighs what is too much by zero,
        but zero times NaN is NaN. So one text that the model cannot compute would take others with it.
        """
        with self._feeding:
            for index, ids in zip(part.indices, part.sequences, strict=True):
                if not np.isfinite(part.vectors[index].sum()):
                    self._collect(self._start([ids], [index], part.vectors))

    def _parts(self, lengths: Sequence[int]) -> list[list[int]]:
        if sum(lengths) <= self.part_tokens and self._fitting(sum(lengths), len(lengths)):
            return [list(range(len(lengths)))] if lengths else []
        return best_fit(lengths, self.part_tokens, rooms_of(self.part_tokens)[-1] - 1)

    def _fitting(self, tokens: int, sequences: int) -> tuple[int, int] | None:
        """The smallest size with room and its smallest room, None if none has; a tail that is unused takes a place too."""
        return next(
            (
                (size, room)
                for size in self._sizes
                if size >= tokens
                for room in rooms_of(size)
                if room >= sequences + (size > tokens)
            ),
            None,
        )

    def _start(self, sequences: list[Ids], indices: list[int], vectors: Vectors) -> _Part:
        lengths = np.array([len(ids) for ids in sequences], dtype=np.int32)
        fitting = self._fitting(int(lengths.sum()), len(sequences))
        if fitting is None:
            return self._start_alone(sequences, lengths, indices, vectors)
        size, room = fitting
        slot = self._free_slot()
        length = input_length(size, room)
        fill(slot.inputs[:length].numpy(), sequences, lengths, size, room)
        outputs = slot.outputs[: len(sequences)]
        with self._here():
            graph = self._graph(size, room)
            self._inputs[:length].copy_(slot.inputs[:length], non_blocking=True)
            graph.replay()
            outputs.copy_(self._outputs[: len(sequences)], non_blocking=True)
            slot.done.record()
        part = _Part(sequences, slot, outputs.numpy(), slot.done, vectors, indices)
        self._running.append(part)
        return part

    def _free_slot(self) -> _Slot:
        with self._books:
            if self._free:
                return self._free.pop()
            oldest = self._running[0]
        self._collect(oldest)
        return self._free_slot()

    def _start_alone(self, sequences: list[Ids], lengths: Ids, indices: list[int], vectors: Vectors) -> _Part:
        """Without a graph, in memory of its own and in its own size, rounded up to what the products like."""
        room = -(-(len(sequences) + 1) // 16) * 16
        size = -(-int(lengths.sum()) // 128) * 128
        host = torch.empty(input_length(size, room), dtype=torch.int32).pin_memory()
        fill(host.numpy(), sequences, lengths, size, room)
        outputs = torch.empty(len(sequences), self._hidden, dtype=torch.float32).pin_memory()
        with self._here():
            inputs = host.to(self._device, non_blocking=True)
            out = torch.empty(room, self._hidden, dtype=torch.float32, device=self._device)
            self._forward(_row(inputs, size, room), int(lengths.max()), out)
            outputs.copy_(out[: len(sequences)], non_blocking=True)
            done = _new_event()
            done.record()
        return _Part(sequences, None, outputs.numpy(), done, vectors, indices)

    @contextmanager
    def _here(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.inference_mode():
            yield

    def _graph(self, size: int, room: int) -> torch.cuda.CUDAGraph:
        if (size, room) not in self._graphs:
            self._graphs[size, room] = self._captured(size, room)
        return self._graphs[size, room]

    def _captured(self, size: int, room: int) -> torch.cuda.CUDAGraph:
        row = _row(self._inputs, size, room)
        out = self._outputs[:room]
        with self._here():
            self._inputs.zero_()  # else another size's ids would be read as this one's positions
            # Once without a graph: kernels are compiled and libraries choose theirs, which a capture forbids.
            self._forward(row, size, out)
            self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.inference_mode(),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            self._forward(row, size, out)
        return graph

    def close(self) -> None:
        """Give the stream back, for the next encoder: libraries keep workspaces of 32 MiB for each that they ever saw."""
        self._stream.synchronize()
        self._graphs.clear()
        _idle_streams.append(self._stream)


def input_length(size: int, rows: int) -> int:
    return 2 * size + 2 * rows + 1


def _row(inputs: Tensor, size: int, rows: int) -> Row:
    """The parts of one copy: ids, positions, last tokens and cumulated lengths; these come last, their length being odd."""
    ids, positions, last, cu = torch.split(inputs[: input_length(size, rows)], [size, size, rows, rows + 1])
    return Row(ids, positions, cu, last)


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
