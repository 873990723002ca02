"""In which pool each alias lives, and so where its jobs go. Pure."""

from __future__ import annotations

from embedq_shared.codec import UNDECODABLE, decode_control
from embedq_shared.fleet.splits import Splits
from embedq_shared.messages import DEFAULT_ALIAS, Control

__all__ = ["Routes"]


class Routes:
    """What the control topic says of aliases: their pools, and the splits. Records come in its order.

    Invariants:
        - The highest version of an alias counts, of equal ones the first; a tombstone removes it. What is no command changes nothing.
        - Of a command and a split by one name the last counts, which is what compaction keeps.
        - The alias `default` is the default pool's, whatever a record says: a job that names no model goes where it always went, and
          nothing must be read to know that.
    """

    def __init__(self) -> None:
        self.splits = Splits()
        self._newest: dict[str, Control] = {}

    def see(self, key: bytes | None, value: bytes | None) -> None:
        """Take a record of the control topic."""
        if key is None:
            return
        alias = key.decode(errors="replace")
        split = self.splits.newest(alias)
        self.splits.see(key, value)
        if value is None or self.splits.newest(alias) is not split:
            self._newest.pop(alias, None)
            return
        try:
            command = decode_control(value)
        except UNDECODABLE:
            return
        before = self._newest.get(alias)
        if command.alias.encode() == key and (before is None or command.version > before.version):
            self._newest[alias] = command

    def pool(self, alias: str) -> str | None:
        """Where an alias lives; None for the default pool, and for an alias of which nothing is said."""
        command = self._newest.get(alias)
        return None if command is None or alias == DEFAULT_ALIAS else command.pool

    def pool_of_job(self, alias: str, id: str) -> str | None:
        """Where the job `id` of an alias is run: of a split that is the pool of the alias whose share the job is."""
        share = None if alias in self._newest else self.splits.target(alias, id)
        return self.pool(share or alias)

    def pools(self) -> set[str]:
        """All pools that some alias lives in, without the default one."""
        return {pool for alias in self._newest if (pool := self.pool(alias)) is not None}
