"""A manifest as it is read while a run may be at work on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from embedq_batch.content.rows import RowId
from embedq_batch.errors import BadTarget
from embedq_batch.manifest.plan import Done, Failed
from embedq_batch.manifest.store import About, State, figures_of

_AT_ONCE: Final = 500
"""Ids in one query; SQLite takes 999 parameters in its older builds."""


class Look:
    """What a manifest says. It locks nobody out, and is used in one thread.

    Raises:
        BadTarget: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
            facts: Mapping[str, Any] = {
                name: msgspec.json.decode(value)
                for name, value in self._db.execute("select name, value from facts")
            }
            self._names: dict[int, str] = dict(self._db.execute("select number, name from versions"))
        except sqlite3.Error as error:
            raise BadTarget(target=str(path), reason=f"expected a manifest: {error}") from None
        self.about = msgspec.convert(facts["about"], About) if "about" in facts else None
        self.state = msgspec.convert(facts["state"], State) if "state" in facts else State()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @property
    def versions(self) -> dict[str, int]:
        """Rows of each model version."""
        return figures_of(self._db).versions

    @property
    def vectors(self) -> int:
        """Of all rows."""
        return self._number("select coalesce(sum(count), 0) from done")

    @property
    def failed(self) -> int:
        """Rows that failed and have no vectors."""
        return self._number("select count(*) from failed where id not in (select id from done)")

    def _number(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])

    def known(self, ids: Sequence[RowId]) -> tuple[dict[RowId, Done], dict[RowId, Failed]]:
        """What is known of these rows."""
        done: dict[RowId, Done] = {}
        failed: dict[RowId, Failed] = {}
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            rows = self._db.execute(
                f"select id, hash, version, round, count from done where id in ({marks})", some
            )
            done.update({id: Done(hash, self._name(number), *rest) for id, hash, number, *rest in rows})
            rows = self._db.execute(f"select id, hash, round from failed where id in ({marks})", some)
            failed.update({id: Failed(hash, round) for id, hash, round in rows})
        return done, failed

    def _name(self, number: int) -> str:
        if number not in self._names:  # a run saw another version meanwhile
            self._names = dict(self._db.execute("select number, name from versions"))
        return self._names[number]
