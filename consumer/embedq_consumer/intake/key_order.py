"""Whose answer may go out among records of one key. Pure: no clock, no I/O, one owner (the intake)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from embedq_consumer.group import Ticket
from embedq_shared.kafka import TopicPartition

Go = Callable[[bool], None]
"""Hears once that its record's answer may go out now; or, with False, that the record is another replica's to answer."""


class KeyOrder:
    """Records of one key in one partition are answered in the order of their offsets: a deleted row must not come back because
    its former text took longer.

    Invariants:
        - An answer goes out only after all earlier ones of its partition and key were acknowledged.
        - What an assignment that is over still holds goes out nowhere: the partition's next owner answers it, and a late answer
          might replace a newer one.
        - A record that never began here waits for nobody.
    """

    def __init__(self, epoch: Callable[[TopicPartition], int | None]) -> None:
        """`epoch`: of a partition's present assignment, None if it is not ours."""
        self._epoch = epoch
        self._queues: dict[tuple[TopicPartition, int, bytes], deque[Ticket]] = {}
        self._keys: dict[Ticket, bytes] = {}
        self._waiting: dict[Ticket, Go] = {}

    def __len__(self) -> int:
        """Records that are not answered."""
        return len(self._keys)

    def begin(self, ticket: Ticket, key: bytes) -> None:
        """A record was polled. Those of a partition come in order."""
        self._keys[ticket] = key
        self._queues.setdefault((ticket.partition, ticket.epoch, key), deque()).append(ticket)

    def when_first(self, ticket: Ticket, go: Go) -> None:
        """Call `go` once the record's answer may go out; at once, if it may now."""
        if self._epoch(ticket.partition) != ticket.epoch:
            go(False)
            return
        key = self._keys.get(ticket)
        if key is None or self._queues[ticket.partition, ticket.epoch, key][0] == ticket:
            go(True)
        else:
            self._waiting[ticket] = go

    def finish(self, ticket: Ticket) -> None:
        """A record is answered, or will not be: the next of its key is first. A second time changes nothing."""
        key = self._keys.pop(ticket, None)
        if key is None:
            return
        self._waiting.pop(ticket, None)
        place = ticket.partition, ticket.epoch, key
        queue = self._queues[place]
        queue.remove(ticket)
        if not queue:
            del self._queues[place]
        elif (go := self._waiting.pop(queue[0], None)) is not None:
            go(True)

    def follow(self) -> None:
        """Other partitions are ours: forget the records of those that went. Who waits for one hears that it need not."""
        gone = [ticket for ticket in self._keys if self._epoch(ticket.partition) != ticket.epoch]
        for ticket in gone:
            self._queues.pop((ticket.partition, ticket.epoch, self._keys.pop(ticket)), None)
        for go in [self._waiting.pop(ticket) for ticket in gone if ticket in self._waiting]:
            go(False)
