"""Which models are alive, as the replicas' statuses say. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from embedq_sdk.admin.rollout import ReplicaView, view_of
from embedq_shared.fleet import StatusBoard
from embedq_shared.messages import Status


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One alias that is alive, and the model that its newest replica serves."""

    alias: str
    model_version: str
    dimensions: int | None
    """The model's hidden size; None where its replicas are too old to say."""
    max_tokens: int | None
    """The longest input, special tokens included; None where its replicas are too old to say."""
    since_ms: int
    """Epoch milliseconds at which this gateway first saw this model version."""
    replicas: int
    """How many serve the alias now."""


class Fleet:
    """The replicas of all aliases.

    Invariant: an alias is unknown only if replicas are alive and none of all that were ever seen serves it. While none is
    alive, a request may wait in Kafka for one that starts.
    """

    def __init__(self, board: StatusBoard | None = None) -> None:
        self.board = StatusBoard() if board is None else board
        self._since_ms: dict[tuple[str, str], int] = {}

    def models(self, now: float) -> list[Model]:
        """The aliases that are alive at epoch seconds `now`, sorted by name."""
        by_alias: dict[str, list[Status]] = {}
        for status in self.board.live(now):
            if serves(status):
                by_alias.setdefault(status.alias, []).append(status)
        return [self._model(alias, found, now) for alias, found in sorted(by_alias.items())]

    def model(self, alias: str, now: float) -> Model | None:
        """An alias, if it is alive."""
        found = [status for status in self.board.live(now, alias) if serves(status)]
        return self._model(alias, found, now) if found else None

    def is_unknown(self, alias: str, now: float) -> bool:
        """Whether waiting for this alias would be in vain."""
        if any(status.alias == alias or alias in (status.splits or ()) for status in self.board.all()):
            return False
        return bool(self.board.live(now))

    def replicas(self, now: float) -> list[ReplicaView]:
        """The live replicas, sorted by name."""
        return [view_of(status, now) for status in self.board.live(now)]

    def _model(self, alias: str, found: Iterable[Status], now: float) -> Model:
        """During a reload replicas differ: the one that follows the newest command counts, and those of its pool."""
        statuses = list(found)
        newest = max(statuses, key=lambda status: (status.version or 0, status.at))
        version = newest.model_version or ""
        since = self._since_ms.setdefault((alias, version), int(now * 1000))
        return Model(
            alias=alias,
            model_version=version,
            dimensions=newest.dimensions,
            max_tokens=newest.max_tokens,
            since_ms=since,
            replicas=sum(status.pool == newest.pool for status in statuses),
        )


def serves(status: Status) -> bool:
    """Whether a model serves there, whatever became of a reload."""
    return status.model_version is not None and view_of(status, status.at / 1000).state == "READY"
