"""Micro-batches on a CUDA device without a gap: packed into rows of few sizes, each a CUDA graph, copied asynchronously.

A part is what runs at once: some texts in one row. Its inputs go to the device in one copy from pinned memory, its vectors
come back in another, and the host waits for a part only when it wants the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, RLock

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.api import Tokens
from embedq_consumer.engine.prefix_cache import LONGEST_PREFIX, MARGIN, Prefix, PrefixCache
from embedq_consumer.engine.row import (
    PART_TOKENS,
    PooledForward,
    Row,
    input_length,
    pack_prefixes,
    pack_row,
    shared_length,
    split_row,
)
from embedq_consumer.engine.row_sizes import RowSizes

__all__ = ["Graphs", "PendingBatch", "graph_limit"]

Ids = npt.NDArray[np.int32]
Vectors = npt.NDArray[np.float32]

_GRAPH_TOKENS = 16384
_GRAPH_TOKENS_TORCH = 1024
"""PyTorch's own attention launches work for the longest sequence that a graph may hold, for every sequence."""
_POOL_ROWS = 2048
"""Tokens of shared prefixes that are held at once; one takes 147 KB of the device in the shape of Qwen3-Embedding-4B."""
_WHOLE_TOKENS = 64
"""Up to this many tokens take no longer than reading the weights, prefixes and all: sharing gains nothing."""
_SLOTS_MATTER = 2048
"""Rows of up to this many tokens take other kernels for few slots than for many."""
_IN_FLIGHT = 4
"""Parts in flight at once: one runs, one is queued, two are being filled or emptied."""

# PyTorch's own annotations leave these two out.
_new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
_idle_streams: list[torch.cuda.Stream] = []
_NONE: Ids = np.empty(0, dtype=np.int32)


def graph_limit(attention: Callable[..., Tensor], longest: int | None = None) -> int:
    """The largest row, in tokens, that a graph is made for.

    `attention` is what `cuda_kernel` chose; `longest` the longest text, where the forward gives attention this bound.
    """
    if attention.__name__ == "flash_attn_4" or (longest is not None and longest <= _GRAPH_TOKENS_TORCH):
        return _GRAPH_TOKENS
    return _GRAPH_TOKENS_TORCH


class _Sequence(msgspec.Struct, frozen=True):
    """One text of a part: of its `ids`, the first `len(prefix)` are not run but read, from the rows `prefix` of the pool."""

    ids: Ids
    prefix: Ids

    @property
    def own(self) -> Ids:
        return self.ids[len(self.prefix) :]


class _Outputs:
    """A part's vectors, and each one's largest absolute value, which is finite exactly where the vector is.

    Both lie in one tensor, so that one copy brings them to the host.
    """

    def __init__(self, flat: Tensor, slots: int, hidden: int) -> None:
        self._flat = flat
        self._slots = slots
        self._hidden = hidden
        self.largest = flat[:slots]
        self.vectors = flat[slots:].view(slots, hidden)

    @classmethod
    def empty(cls, slots: int, hidden: int, device: torch.device | None = None) -> _Outputs:
        """On `device`, else in the host's pinned memory."""
        flat = torch.zeros(slots * (1 + hidden), dtype=torch.float32, device=device)
        return cls(flat if device is not None else flat.pin_memory(), slots, hidden)

    def first(self, count: int) -> Tensor:
        """The part of the memory that holds the first `count` vectors and all of `largest`."""
        return self._flat[: self._slots + count * self._hidden]


class _Staging(msgspec.Struct, frozen=True):
    """Pinned memory of one part in flight."""

    inputs: Tensor
    outputs: _Outputs
    done: torch.cuda.Event


class _Part(msgspec.Struct, eq=False, kw_only=True):
    """One part in flight, until its vectors are in place."""

    texts: list[_Sequence]
    staging: _Staging | None
    source: _Outputs
    done: torch.cuda.Event
    vectors: Vectors
    indices: list[int]
    nonfinite: list[int] = []
    """Positions in `indices` whose vectors are not finite; known once `collected`."""
    collected: bool = False


class PendingBatch:
    """Vectors that the device is computing, or has computed."""

    def __init__(self, graphs: Graphs, vectors: Vectors, parts: Sequence[_Part]) -> None:
        self._graphs = graphs
        self._vectors = vectors
        self._parts = parts

    @property
    def ready(self) -> bool:
        """False: the device may be computing."""
        return False

    def result(self) -> Vectors:
        """Wait for them: float32 (texts, hidden), in the order of `submit`. Call it once, from any thread."""
        for part in self._parts:
            self._graphs.finish(part)
        return self._vectors


class Graphs:
    """Runs a `PooledForward` over parts of a batch. One thread submits; another may wait for what it submitted.

    Invariants:
    - Everything runs on one stream, in the order of `submit`.
    - The device's input and output buffers are the same for all sizes, and captured graphs share one pool of memory: so a
      part's copy in, graph and copy out never overlap another's.
    - A part that fits no row of `sizes` runs without a graph, in exactly its own size.

    Where the forward has a `prefix_pool`, the keys and values of prefixes that texts share are computed once, by a part of
    their own, and read by the parts after it. Parts in which no text has one run as they would without the pool.

    `deterministic`: how a text is computed depends on its own length alone, not on the rest of its batch. Rows have one
    size and one number of slots, and a text longer than that is alone in a row whose size depends on its own length. No
    prefix is shared.
    """

    def __init__(
        self, forward: PooledForward, *, part_tokens: int = PART_TOKENS, deterministic: bool = False
    ) -> None:
        self._run = forward.run
        self._hidden = forward.hidden_size
        self._device = device = forward.device
        self._padding = forward.padding
        self.sizes = RowSizes(
            graph_limit(forward.attention, forward.longest), part_tokens, deterministic=deterministic
        )
        self._pool: Tensor | None = None
        if forward.prefix_pool is not None and not deterministic:  # a shared prefix rounds as its batch does
            self._pool = forward.prefix_pool(_POOL_ROWS)
        self._prefixes = None if self._pool is None else PrefixCache(_POOL_ROWS)
        # Held while `_prefixes` is looked at, as the tokenizer's threads do, too.
        self._finding = Lock()
        self._stream = _stream_of(device)
        self._memory = torch.cuda.graph_pool_handle()
        self._tried: set[tuple[int, ...]] = set()  # which kinds of rows ran without a graph
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        size, slots = self.sizes.largest
        length = input_length(size, slots)
        if self._pool is not None:
            length = shared_length(size, slots, self.sizes.key_room)
        self._inputs = torch.zeros(length, dtype=torch.int32, device=device)
        self._outputs = _Outputs.empty(slots, self._hidden, device)
        self._free = [_staging(length, slots, self._hidden) for _ in range(_IN_FLIGHT)]
        self._running: deque[_Part] = deque()
        # Held while parts go to the device, whose buffers all parts share.
        self._feeding = RLock()
        # Held while `_free` or `_running` changes, and while a part's vectors leave its staging memory.
        self._books = Lock()
        torch.cuda.current_stream(device).synchronize()

    @property
    def shares_prefixes(self) -> bool:
        return self._pool is not None

    def known_prefixes(self, texts: Iterable[Ids]) -> list[int]:
        """How many of each text's first tokens would not run if it ran now. From any thread."""
        with self._finding:
            return [0 if self._prefixes is None else self._prefixes.known(ids) for ids in texts]

    def capture(self) -> None:
        """Capture every size, largest first: the smaller ones then find their memory in the pool."""
        for shared in (False, True) if self.shares_prefixes else (False,):
            for size, slots in reversed(self.sizes.rows(shared=shared)):
                self._graph(size, slots, shared)
        torch.cuda.empty_cache()  # what the runs without a graph took

    def submit(self, batch: Sequence[Tokens]) -> PendingBatch:
        """Start computing one vector for each text; one of no tokens gets zeros.

        Returns once everything is handed to the device; waits for earlier parts where no staging memory is free.
        """
        vectors = np.zeros((len(batch), self._hidden), dtype=np.float32)
        present = [index for index, text in enumerate(batch) if len(text.ids)]
        with self._feeding:
            texts = self._with_prefixes([batch[index] for index in present])
            started = [
                self._start([texts[i] for i in part], [present[i] for i in part], vectors)
                for part in self.sizes.parts(
                    [len(text.own) for text in texts], [len(text.prefix) for text in texts]
                )
            ]
        return PendingBatch(self, vectors, started)

    def encode(self, batch: Sequence[Ids]) -> Vectors:
        """`submit`, and wait, for plain ids, all of which are computed."""
        return self.submit([Tokens(ids, whole=True) for ids in batch]).result()

    def finish(self, part: _Part) -> None:
        """Wait for one part, put its vectors in place, and compute again those that are not finite."""
        self._collect(part)
        if len(part.indices) > 1 and part.nonfinite:
            self._each_alone(part)

    def _collect(self, part: _Part) -> None:
        """Wait for one part and put its vectors in place. Idempotent."""
        if part.collected:
            return  # its event may belong to a later part by now
        part.done.synchronize()
        with self._books:
            if part.collected:
                return
            count = len(part.indices)
            part.vectors[part.indices] = part.source.vectors[:count].numpy()
            finite = np.isfinite(part.source.largest[:count].numpy())
            part.nonfinite = np.flatnonzero(~finite).tolist()
            part.collected = True
            if part.staging is not None:
                self._running.remove(part)
                self._free.append(part.staging)

    def _each_alone(self, part: _Part) -> None:
        """Compute the vectors that are not finite again, each alone: most of them were spoiled by a neighbor.

        Attention reads keys and values in tiles that reach into the next sequence and weighs the excess by zero, but zero
        times NaN is NaN. So one text that the model cannot compute would spoil others. A prefix may have left the pool by
        now, so they run whole.
        """
        with self._feeding:
            for n in part.nonfinite:
                text = _Sequence(part.texts[n].ids, _NONE)
                self._collect(self._start([text], [part.indices[n]], part.vectors))

    def _with_prefixes(self, batch: Sequence[Tokens]) -> list[_Sequence]:
        """The texts with their prefixes' rows in the pool; prefixes that are new to it are computed first.

        A part may read rows that a later part overwrites: the device does both in the order in which they were started.
        """
        texts = [_Sequence(text.ids, _NONE) for text in batch]
        able = [index for index, text in enumerate(batch) if not text.whole]
        tokens = sum(len(text.ids) for text in batch)
        if self._prefixes is None or tokens <= _WHOLE_TOKENS or not able:
            return texts
        with self._finding:
            rows, new = self._prefixes.assign([batch[index].ids for index in able])
        if not new and not self._smaller(
            tokens, sum(len(found) for found in rows if found is not None), len(batch)
        ):
            return texts
        try:
            while new:
                self._save(new[0])
                del new[0]
        finally:
            with self._finding:
                for prefix in new:
                    self._prefixes.forget(prefix)
        for index, found in zip(able, rows, strict=True):
            if found is not None:
                texts[index] = _Sequence(batch[index].ids, found)
        return texts

    def _smaller(self, tokens: int, saved: int, texts: int) -> bool:
        """Whether less runs where `saved` tokens are read: rows with shared prefixes come in fewer sizes."""
        whole = self.sizes.fitting(tokens, texts, shared=False)
        own = self.sizes.fitting(tokens - saved, texts, shared=True)
        return bool(saved) and (whole is None or own is None or own[0] < whole[0])

    def _save(self, prefix: Prefix) -> None:
        """Compute one prefix into the pool, alone: a NaN of another one must not stay in its rows."""
        text = _Sequence(prefix.ids, prefix.read)
        self._start([text], [0], np.empty((1, self._hidden), np.float32), prefix.written)

    def _start(
        self, texts: list[_Sequence], indices: list[int], vectors: Vectors, saved_rows: Ids | None = None
    ) -> _Part:
        """Start one part; `saved_rows`: rows of the pool that its first tokens' keys and values are saved in."""
        lengths = np.array([len(text.own) for text in texts], dtype=np.int32)
        shared = saved_rows is not None or any(len(text.prefix) for text in texts)
        fitting = self.sizes.fitting(int(lengths.sum()), len(texts), shared=shared)
        if fitting is None:
            return self._start_alone(texts, lengths, indices, vectors, saved_rows)
        size, slots = fitting
        graph = self._graph(size, slots, shared)
        staging = self._free_staging()
        length = _lay_out(
            staging.inputs.numpy(),
            texts,
            lengths,
            size,
            slots,
            saved_rows,
            shared=shared,
            padding=self._padding,
        )
        outputs = staging.outputs.first(len(texts))
        with self._here():
            self._inputs[:length].copy_(staging.inputs[:length], non_blocking=True)
            graph.replay()
            outputs.copy_(self._outputs.first(len(texts)), non_blocking=True)
            staging.done.record()
        part = _Part(
            texts=texts,
            staging=staging,
            source=staging.outputs,
            done=staging.done,
            vectors=vectors,
            indices=indices,
        )
        with self._books:
            self._running.append(part)
        return part

    def _free_staging(self) -> _Staging:
        with self._books:
            if self._free:
                return self._free.pop()
            oldest = self._running[0]
        self._collect(oldest)
        return self._free_staging()

    def _start_alone(
        self,
        texts: list[_Sequence],
        lengths: Ids,
        indices: list[int],
        vectors: Vectors,
        saved_rows: Ids | None,
    ) -> _Part:
        """Without a graph, in memory of its own and in its own size, rounded up to a size that suits the products."""
        slots = -(-(len(texts) + 1) // 16) * 16
        size = -(-int(lengths.sum()) // 128) * 128
        shared = saved_rows is not None or any(len(text.prefix) for text in texts)
        keys = (
            size
            + MARGIN
            + sum(len(text.prefix) for text in texts)
            + (0 if saved_rows is None else len(saved_rows))
        )
        length = shared_length(size, slots, keys) if shared else input_length(size, slots)
        host = torch.empty(length, dtype=torch.int32).pin_memory()
        _lay_out(host.numpy(), texts, lengths, size, slots, saved_rows, shared=shared, padding=self._padding)
        outputs = _Outputs.empty(slots, self._hidden)
        with self._here():
            inputs = host.to(self._device, non_blocking=True)
            out = _Outputs.empty(slots, self._hidden, self._device)
            self._compute(self._row(inputs, size, slots, keys if shared else 0), int(lengths.max()), out)
            outputs.first(len(texts)).copy_(out.first(len(texts)), non_blocking=True)
            done = _new_event()
            done.record()
        return _Part(texts=texts, staging=None, source=outputs, done=done, vectors=vectors, indices=indices)

    @contextmanager
    def _here(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.inference_mode():
            yield

    def _graph(self, size: int, slots: int, shared: bool) -> torch.cuda.CUDAGraph:
        if (size, slots, shared) not in self._graphs:
            self._graphs[size, slots, shared] = self._captured(size, slots, shared)
        return self._graphs[size, slots, shared]

    def _captured(self, size: int, slots: int, shared: bool) -> torch.cuda.CUDAGraph:
        row = self._row(self._inputs, size, slots, self.sizes.key_room if shared else 0)
        with self._here():
            self._inputs.zero_()  # else another size's ids would be read as positions
            # Once without a graph: kernels are compiled and libraries choose theirs, which a capture forbids. In long
            # rows that is the same whatever their slots, and takes most of a start's time on the device.
            kind = (size, shared) if size > _SLOTS_MATTER else (size, shared, slots)
            if kind not in self._tried:
                self._compute(row, size, self._outputs)
                self._tried.add(kind)
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
        slots = len(row.last)
        vectors = outputs.vectors[:slots]
        self._run(row, longest, vectors)
        torch.linalg.vector_norm(vectors, torch.inf, dim=1, out=outputs.largest[:slots])

    def _row(self, inputs: Tensor, size: int, slots: int, keys: int) -> Row:
        return split_row(inputs, size, slots, self._pool, LONGEST_PREFIX, keys)

    def drop(self, most: int) -> bool:
        """Let so many graphs go, the last captured first; nothing may be in flight or come. Whether there were any."""
        self._stream.synchronize()
        going = list(self._graphs)[-most:]
        for key in going:
            del self._graphs[key]
        return bool(going)

    def close(self) -> None:
        """Return the stream for the next encoder: libraries keep a workspace of 32 MiB for every stream they ever saw."""
        self._stream.synchronize()
        self._graphs.clear()
        self._pool = None
        if self._prefixes is not None:
            with self._finding:
                self._prefixes.close()
        _idle_streams.append(self._stream)


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One that an encoder has returned, else a new one."""
    for stream in reversed(_idle_streams):
        if stream.device == device:
            _idle_streams.remove(stream)
            return stream
    return _new_stream(device)


def _staging(length: int, slots: int, hidden: int) -> _Staging:
    """Pinned memory for inputs of this length and so many vectors."""
    inputs = torch.zeros(length, dtype=torch.int32).pin_memory()
    return _Staging(inputs, _Outputs.empty(slots, hidden), _new_event())


def _lay_out(
    inputs: Ids,
    texts: Sequence[_Sequence],
    lengths: Ids,
    size: int,
    slots: int,
    saved_rows: Ids | None,
    *,
    shared: bool,
    padding: int | None,
) -> int:
    """Write one part's inputs; returns the length in use."""
    length = input_length(size, slots)
    pack_row(inputs[:length], [text.own for text in texts], lengths, size, slots, padding)
    return (
        pack_prefixes(inputs, [text.prefix for text in texts], lengths, saved_rows, size, slots)
        if shared
        else length
    )
