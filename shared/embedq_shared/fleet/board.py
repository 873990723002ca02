"""The last status of every replica."""

from __future__ import annotations

from embedq_shared.messages import STATUS_STALE_AFTER_S, Status


def is_live(status: Status, now: float) -> bool:
    """Whether a replica's last status, at epoch seconds `now`, shows it alive."""
    return status.state != "STOPPED" and now - status.at / 1000 <= STATUS_STALE_AFTER_S


class StatusBoard:
    """The last status of every replica and alias, alive or not."""

    def __init__(self) -> None:
        self._last: dict[str, Status] = {}

    def see(self, key: str, status: Status) -> None:
        """Take a status and its record's key. They come in the topic's order, so the last one of a key counts."""
        self._last[key] = status

    def forget(self, key: str) -> None:
        """Take a tombstone: the replica is long gone."""
        self._last.pop(key, None)

    def all(self) -> list[Status]:
        """The last status of each, those of replicas that are gone too."""
        return list(self._last.values())

    def live(self, now: float, alias: str | None = None) -> list[Status]:
        """The statuses of live replicas, sorted by name, of one alias or of all (None)."""
        return sorted(
            (s for s in self._last.values() if is_live(s, now) and alias in (None, s.alias)),
            key=lambda s: (s.replica, s.alias),
        )

    def followers(self, now: float, alias: str, pool: str | None) -> list[Status]:
        """The statuses of live replicas that follow an alias's commands in a pool, sorted by name."""
        return [status for status in self.live(now, alias) if status.pool == pool]
