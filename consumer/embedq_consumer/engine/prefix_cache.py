"""Prefixes that texts share, found in their tokens: which pay, and in which of the pool's rows their keys and values lie.

All of this is decided here, without a device; cuda_graphs.py executes it, and row.py lays out what a part copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["LONGEST_PREFIX", "MARGIN", "RUN_COST", "ZEROS", "Prefix", "PrefixCache"]

Ids = npt.NDArray[np.int32]

LONGEST_PREFIX = 1024
"""Tokens; anything longer is not an instruction, and attention is given a bound on the keys of a text."""
MARGIN = 256
"""Rows of zeros after the last key: attention reads whole tiles, and what lies there times zero must be zero."""
ZEROS = 0
"""The pool's row that no prefix gets: it is zero and stays zero."""
RUN_COST = 256
"""Tokens of a full row that run in the time of one small row, which reads all weights for itself: 3.1 ms at 79,000 tokens a
second with Qwen3-Embedding-4B's shape in bf16 on an H200, a third more in FP8."""
_LEAST = 8
"""Tokens of the shortest prefix that is computed by itself: rows with shared prefixes come in fewer sizes."""
_NEVER = -(1 << 40)
_LEAST_SAVED = 64
"""Sharing has to save one token in 64: laying out the keys takes a hundredth of a token's time for each of them."""
_IN_USE = 64
"""Batches for which a prefix counts as in use: others that have still to pay for themselves do not displace it."""
_REMEMBERED = 2048
"""Nodes of the tree that are remembered beyond those of the last batch; each holds up to `LONGEST_PREFIX` tokens of 4 bytes."""
_TOKEN = 4
"""Bytes of an id. The tree's edges are bytes: comparing and hashing them is quicker than of small arrays."""


class Prefix(msgspec.Struct, frozen=True):
    """A prefix that is new to the pool, and is to be computed into it.

    Of its `ids`, the first `len(read)` are read from the rows `read`, since they are a shorter prefix that is there by then; the
    others get the rows `written`.
    """

    ids: Ids
    read: Ids
    written: Ids


class _Node:
    """A beginning that texts have in common, or that one text has: `segment` are the ids by which it is longer than its parent's."""

    __slots__ = ("begin", "children", "earlier", "end", "gain", "parent", "rows", "segment", "texts", "used")

    def __init__(self, segment: bytes, parent: _Node | None, begin: int) -> None:
        self.segment = segment
        self.parent = parent
        self.begin = begin
        """Tokens of the parent's beginning."""
        self.end = begin + len(segment) // _TOKEN
        """Tokens of this one."""
        self.children: dict[bytes, _Node] = {}
        """By their first token."""
        self.rows: Ids | None = None
        """The pool's rows of all tokens up to the segment's end, if they are cached."""
        self.used = 0
        """The last batch with a text that begins like this."""
        self.texts = 0
        """How many texts of that batch do."""
        self.earlier = 0
        """How many texts of batches before it did, since this is known and not cached."""
        self.gain = 0
        """Tokens that caching this saves, with what pays below it."""

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return self.end - self.begin

    def path(self) -> Iterator[_Node]:
        """This node, its parent and so on; not the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class PrefixCache:
    """Which of the pool's rows hold which prefix, one row for each token.

    What texts begin with is kept in a radix tree, so that of `Instruct: find the contract of the customer A` and `… B` the common
    part is found, and what every further text of A shares beyond it. What is cached with a node is cached with the nodes above it,
    whose rows it shares.

    A prefix is cached once the texts that came with it would have saved what it costs: its own tokens, and a run. Texts that come
    in one batch count at once. Thus a batch by itself never costs more than without sharing, and a prefix that comes again and
    again costs at most twice what it would if the future were known.

    Invariants:
    - No prefix of a batch is evicted for another of the same batch; of all others the least recently used goes first.
    - Rows that an earlier batch still reads may be assigned anew: the device writes them after that batch, in the order of
      `assign`.
    - At least one token of each text is its own: something has to run.
    """

    def __init__(self, rows: int) -> None:
        self._free = [row for row in range(rows) if row != ZEROS]
        self._root = _Node(b"", None, 0)
        self._nodes = 0
        self._cached: set[_Node] = set()
        self._batch = 0
        self._touched: list[_Node] = []

    def known(self, ids: Ids) -> int:
        """How many of a text's first tokens are cached now."""
        head, node, at = _head(ids), self._root, 0
        while at < len(head):
            child = node.children.get(head[at : at + _TOKEN])
            if child is None or child.rows is None:
                break
            if not head.startswith(child.segment, at):
                return node.end + _common(child.segment, head[at : at + len(child.segment)])
            node, at = child, at + len(child.segment)
        return node.end

    def assign(self, batch: Sequence[Ids]) -> tuple[list[Ids | None], list[Prefix]]:
        """For each text its prefix's rows, None if it runs whole; and the new prefixes, to be computed first and in this order."""
        self._forget_old()
        self._batch += 1
        self._touched = []
        ends = [self._insert(_head(ids)) for ids in batch]
        new = self._worth_caching()
        found = [self._deepest(end, new) for end in ends]
        if sum(node.end for node in found) * _LEAST_SAVED < sum(map(len, batch)):
            new, found = {}, [self._root] * len(batch)
        prefixes = self._allocate(new)
        for node in self._touched:
            node.earlier = 0 if node.rows is not None else node.earlier + node.texts
        return [node.rows for node in found], prefixes

    @staticmethod
    def _deepest(node: _Node, new: dict[_Node, None]) -> _Node:
        """The longest beginning of this one that is cached, or is to be; else the root."""
        while node.parent is not None and node.rows is None and node not in new:
            node = node.parent
        return node

    def forget(self, prefix: Prefix) -> None:
        """Drop a prefix that was not computed after all."""
        head, node, at = prefix.ids.tobytes(), self._root, 0
        while at < len(head):
            node = node.children[head[at : at + _TOKEN]]
            at += len(node.segment)
            if node.end > len(prefix.read):
                self._evict(node)

    # -- the tree --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let all nodes go. They know their parents, so that they would wait for the garbage collector: megabytes of a busy model,
        and a service collects all but never."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            node.children.clear()
        self._cached.clear()
        self._touched.clear()
        self._nodes = 0

    def _insert(self, head: bytes) -> _Node:
        """The node of exactly this beginning, made if there is none; those on the way there have a text more."""
        node, at = self._root, 0
        while at < len(head):
            key = head[at : at + _TOKEN]
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(head[at:], node, node.end)
                self._nodes += 1
            elif not head.startswith(child.segment, at):
                child = self._split(child, _common(child.segment, head[at : at + len(child.segment)]))
            self._touch(child)
            node, at = child, at + len(child.segment)
        return node

    def _touch(self, node: _Node) -> None:
        if node.used != self._batch:
            node.used = self._batch
            node.texts = 0
            self._touched.append(node)
        node.texts += 1

    def _split(self, node: _Node, tokens: int) -> _Node:
        """A new parent for `node`, of the first tokens of its segment."""
        parent = node.parent
        assert parent is not None
        upper = _Node(node.segment[: tokens * _TOKEN], parent, node.begin)
        upper.used, upper.texts, upper.earlier = node.used, node.texts, node.earlier
        parent.children[upper.segment[:_TOKEN]] = upper
        node.segment = node.segment[len(upper.segment) :]
        node.parent, node.begin = upper, upper.end
        upper.children[node.segment[:_TOKEN]] = node
        if node.rows is not None:
            upper.rows = node.rows[: upper.end]
            self._cached.add(upper)
        if upper.used == self._batch:
            self._touched.append(upper)
        self._nodes += 1
        return upper

    def _forget_old(self) -> None:
        """Forget beginnings that came longest ago, where there are too many."""
        if self._nodes <= 2 * _REMEMBERED:
            return
        nodes, found = [self._root], list[_Node]()
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            found += node.children.values()
        # A node was used when one of its children was, or later: so these go first.
        for node in sorted(found, key=lambda node: (node.used, -node.begin))[: len(found) - _REMEMBERED]:
            if node.rows is None and not node.children:
                assert node.parent is not None
                del node.parent.children[node.segment[:_TOKEN]]
                self._nodes -= 1

    # -- what pays -------------------------------------------------------------------------------------------------------

    def _worth_caching(self) -> dict[_Node, None]:
        """The batch's nodes that are to be cached, parents first."""
        # What only one text ever began with, most of what there is, saves nothing, nor does what is below it.
        fresh = [node for node in self._touched if node.rows is None and node.texts + node.earlier > 1]
        if not fresh:
            return {}
        fresh.sort(key=lambda node: node.begin)
        # What pays with the texts that came before takes what is free and what nobody uses; if that is too little, what pays
        # within this batch takes the rows of everybody else.
        new = self._best(fresh, None, history=True)
        if new and _tokens_of(new) > self._room(self._batch - _IN_USE):
            new = self._best(fresh, None, history=False)
            room = self._room(self._batch)
            if _tokens_of(new) > room:
                new = self._best(fresh, _fitting(new, room), history=False)
        return new

    def _best(
        self, fresh: Sequence[_Node], allowed: dict[_Node, None] | None, *, history: bool
    ) -> dict[_Node, None]:
        """The nodes among `fresh`, parents first, that save most when cached; of those `allowed`, if given.

        Each costs its own tokens, and each that has none below it a run, which computes those above it as well.
        """
        below: dict[_Node, list[_Node]] = {}
        for node in reversed(fresh):
            if allowed is not None and node not in allowed:
                continue
            children = below.get(node, [])
            pays = [child for child in children if child.gain > 0] or sorted(
                (child for child in children if child.gain > -RUN_COST), key=lambda child: -child.gain
            )[:1]
            below[node] = pays
            texts = node.texts + node.earlier if history else node.texts
            alone = -RUN_COST if node.end >= _LEAST else _NEVER
            node.gain = (texts - 1) * node.length + (sum(child.gain for child in pays) if pays else alone)
            parent = node.parent
            if parent is not None and parent.rows is None:
                below.setdefault(parent, []).append(node)
        new: dict[_Node, None] = {}
        for node in fresh:
            parent = node.parent
            assert parent is not None
            top = parent.parent is None or parent.rows is not None
            if node in below and (node.gain > 0 if top else parent in new and node in below[parent]):
                new[node] = None
        return new

    # -- the pool's rows ---------------------------------------------------------------------------------------------------

    def _room(self, before: int) -> int:
        """Rows that are free, or hold prefixes that were last used before this batch."""
        return len(self._free) + sum(node.length for node in self._cached if node.used < before)

    def _allocate(self, new: dict[_Node, None]) -> list[Prefix]:
        """Rows for the nodes in `new`, and the runs that fill them."""
        need = _tokens_of(new)
        if need > len(self._free):
            # A node was used when one of its children was, or later: so these go first.
            for node in sorted(self._cached, key=lambda node: (node.used, -node.begin)):
                if need <= len(self._free):
                    break
                self._evict(node)
        for node in new:
            own = np.array([self._free.pop() for _ in range(node.length)], dtype=np.int32)
            parent = node.parent
            above = None if parent is None else parent.rows
            node.rows = own if above is None else np.concatenate([above, own])
            self._cached.add(node)
        ends = [node for node in new if not any(child in new for child in node.children.values())]
        written: set[_Node] = set()
        prefixes = []
        for end in ends:
            run = [node for node in end.path() if node in new and node not in written]
            written.update(run)
            assert end.rows is not None
            begin = run[-1].begin
            ids = np.frombuffer(b"".join(node.segment for node in [*end.path()][::-1]), dtype=np.int32)
            prefixes.append(Prefix(ids, end.rows[:begin], end.rows[begin:]))
        return prefixes

    def _evict(self, node: _Node) -> None:
        if node.rows is not None:
            self._free.extend(node.rows[node.begin :].tolist())
            node.rows = None
            node.earlier = 0
            self._cached.discard(node)


def _head(ids: Ids) -> bytes:
    """What of a text may be shared: all but its last token; nothing of a short one."""
    count = min(len(ids) - 1, LONGEST_PREFIX)
    return ids[:count].tobytes() if count >= _LEAST else b""


def _common(one: bytes, other: bytes) -> int:
    """How many first tokens are the same, of two beginnings that differ or of which one is longer."""
    count = min(len(one), len(other)) // _TOKEN
    differs = np.frombuffer(one, np.int32, count) != np.frombuffer(other, np.int32, count)
    return int(differs.argmax()) if differs.any() else count


def _tokens_of(nodes: Iterable[_Node]) -> int:
    return sum(node.length for node in nodes)


def _fitting(nodes: Iterable[_Node], room: int) -> dict[_Node, None]:
    """Those with the most texts that fit into `room`, each with the ones above it."""
    chosen: dict[_Node, None] = {}
    for node in sorted(nodes, key=lambda node: (-node.texts, node.begin)):
        # Those above have at least as many texts, so they were looked at before.
        above = node.parent
        fits = above is None or above.parent is None or above.rows is not None or above in chosen
        if fits and node.length <= room:
            chosen[node] = None
            room -= node.length
    return chosen
