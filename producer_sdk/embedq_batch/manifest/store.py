"""The manifest: an SQLite file, which survives a kill at any time.

What it says is done is in the target: it is written after the target has acknowledged. What the target has, and the manifest
does not know, is written again.

Many rows are one statement, with their ids as one JSON array: SQLite works through it without Python, whose lock it would take and
give back for each row otherwise, in turn with the event loop.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Final, Self

import msgspec

from embedq_batch.content.rows import HASH_BYTES, Problem, RowId
from embedq_batch.errors import BadTarget, OtherRun, RunBusy
from embedq_batch.manifest.plan import Done, Failed

_SCHEMA: Final = """
create table if not exists facts (name text primary key, value blob not null);
create table if not exists versions (number integer primary key, name text not null unique);
create table if not exists done (
    id primary key, hash blob not null, version integer not null, round integer not null,
    part integer not null, start integer not null, count integer not null
) without rowid;
create table if not exists failed (
    id primary key, hash blob not null, round integer not null, code text not null, message text not null
) without rowid;
create table if not exists seen (id primary key) without rowid;
"""
_FORMAT: Final = 2
"""Of the tables above, and of the hash of a row. A manifest of another format is refused."""
_DIGITS: Final = 12
"""Of a number in what is written of rows with several vectors."""
_WROTE: Final = f"""
insert or replace into done
select value, substr(:hashes, key * {HASH_BYTES} + 1, {HASH_BYTES}), :version, :round, :part, :start + key, 1 from json_each(:ids)
"""
_WROTE_SEVERAL: Final = f"""
insert or replace into done
select value, substr(:hashes, key * {HASH_BYTES} + 1, {HASH_BYTES}), :version, :round, :part,
    cast(substr(:starts, key * {_DIGITS} + 1, {_DIGITS}) as integer),
    cast(substr(:counts, key * {_DIGITS} + 1, {_DIGITS}) as integer)
from json_each(:ids)
"""
_DONE: Final = """
select json_group_array(json_array(done.id, hex(hash), version, round, count))
from json_each(?) as asked cross join done on done.id = asked.value
"""
_FAILED: Final = """
select json_group_array(json_array(failed.id, hex(hash), round))
from json_each(?) as asked cross join failed on failed.id = asked.value
"""
_done_rows: Final = msgspec.json.Decoder(list[tuple[RowId, str, int, int, int]])
_failed_rows: Final = msgspec.json.Decoder(list[tuple[RowId, str, int]])
_AT_ONCE: Final = 500
"""Ids that are handed out at once."""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest belongs to: another run must not go on with it."""

    source: str
    target: str
    job: dict[str, Any]
    """All that decides what a vector is, but for the model's version."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is."""

    round: int = 0
    complete: bool = True
    only_changed: bool = False
    started: float = 0.0
    ended: float = 0.0
    command: str = ""
    total: int | None = None
    since: int | list[tuple[int, int]] | None = None
    """Where a topic's records begin to count, as epoch milliseconds or offsets of partitions: "2h" ago is another time when a run goes on."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """Rows whose vectors of one model version are in the target, in the order in which they were written: in the file part
    `part` those of the first one begin at `start`, and the others' follow. `counts` is how many each has; None: one."""

    ids: list[RowId]
    hashes: list[bytes]
    version: str
    counts: list[int] | None = None
    part: int = 0
    start: int = 0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a manifest: rows, those among them of each model version, failures."""

    done: int
    failed: int
    versions: dict[str, int]


class Manifest:
    """One run's manifest. Its methods may be called from any thread, and take turns.

    Raises:
        RunBusy: another process has it open.
        OtherRun: it belongs to another source, target or job.
        BadTarget: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = _locked(path)
        self._turn = threading.Lock()
        try:
            self._db = _connected(path)
            self._db.executescript(_SCHEMA)
            self._check_format()
        except sqlite3.Error as error:
            self._lock_file.close()
            raise BadTarget(target=str(path), reason=f"expected a manifest: {error}") from None
        self._versions: dict[str, int] = {
            name: number for number, name in self._db.execute("select number, name from versions")
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        with self._turn:
            self._db.close()
            self._lock_file.close()

    def _check_format(self) -> None:
        found = self._fact("format")
        if found is None:
            self._put("format", _FORMAT)
        elif found != _FORMAT:
            raise BadTarget(
                target=str(self.path), reason=f"expected a manifest of format {_FORMAT}, got {found}"
            )

    # -- whose it is, and how far ---------------------------------------------------------------------------------------

    def claim(self, about: About, *, again: bool) -> None:
        """Say what the manifest is for. With `again` it may have been for another job before."""
        with self._turn:
            found = self._fact("about")
            known = None if found is None else msgspec.convert(found, About)
            if known is not None and known != about and not again:
                raise OtherRun(manifest=str(self.path), differences=_differences(known, about))
            self._put("about", about)

    @property
    def about(self) -> About | None:
        """What it is for."""
        with self._turn:
            found = self._fact("about")
        return None if found is None else msgspec.convert(found, About)

    @property
    def state(self) -> State:
        """How far it is."""
        with self._turn:
            found = self._fact("state")
        return State() if found is None else msgspec.convert(found, State)

    @state.setter
    def state(self, state: State) -> None:
        with self._turn:
            self._put("state", state)

    def _fact(self, name: str) -> Any:
        row = self._db.execute("select value from facts where name = ?", (name,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0])

    def _put(self, name: str, value: Any) -> None:
        with self._db:
            self._db.execute("insert or replace into facts values (?, ?)", (name, msgspec.json.encode(value)))

    # -- rows -------------------------------------------------------------------------------------------------------------

    def known(self, ids: Sequence[RowId]) -> tuple[dict[RowId, Done], dict[RowId, Failed]]:
        """What is known of these rows."""
        asked = _as_json(ids)
        with self._turn:
            done = self._db.execute(_DONE, (asked,)).fetchone()[0]
            failed = self._db.execute(_FAILED, (asked,)).fetchone()[0]
            names = {number: name for name, number in self._versions.items()}
        return (
            {
                id: Done(bytes.fromhex(hash), names[version], round, count)
                for id, hash, version, round, count in _done_rows.decode(done)
            },
            {id: Failed(bytes.fromhex(hash), round) for id, hash, round in _failed_rows.decode(failed)},
        )

    def wrote(self, rows: Written, round: int) -> None:
        """These rows are in the target."""
        given: dict[str, Any] = {
            "ids": _as_json(rows.ids),
            "hashes": b"".join(rows.hashes),
            "round": round,
            "part": rows.part,
        }
        if rows.counts is None:
            statement = _WROTE
            given["start"] = rows.start
        else:
            statement = _WROTE_SEVERAL
            starts = list(accumulate(rows.counts, initial=rows.start))[:-1]
            given |= {"starts": _as_digits(starts), "counts": _as_digits(rows.counts)}
        with self._turn, self._db:
            self._db.execute(statement, given | {"version": self._version(rows.version)})
            self._db.execute(
                "delete from failed where id in (select value from json_each(:ids))", {"ids": given["ids"]}
            )

    def failed(self, rows: Iterable[tuple[RowId, bytes, Problem]], round: int) -> None:
        """These rows failed."""
        with self._turn, self._db:
            self._db.executemany(
                "insert or replace into failed values (?, ?, ?, ?, ?)",
                [(id, hash, round, problem.code, problem.message) for id, hash, problem in rows],
            )

    def forget(self, ids: Sequence[RowId], keep_failures: bool = False) -> None:
        """These rows are no longer in the target."""
        with self._turn, self._db:
            for table in ("done",) if keep_failures else ("done", "failed"):
                self._db.execute(
                    f"delete from {table} where id in (select value from json_each(?))", (_as_json(ids),)
                )

    def _version(self, name: str) -> int:
        if name not in self._versions:
            number = len(self._versions) + 1
            self._db.execute("insert into versions values (?, ?)", (number, name))
            self._versions[name] = number
        return self._versions[name]

    # -- which rows are still in the source ---------------------------------------------------------------------------

    def begin_seeing(self) -> None:
        """Forget which rows were seen."""
        with self._turn, self._db:
            self._db.execute("delete from seen")

    def saw(self, ids: Sequence[RowId]) -> None:
        """The source has these rows."""
        with self._turn, self._db:
            self._db.execute("insert or ignore into seen select value from json_each(?)", (_as_json(ids),))

    def missing(self) -> Iterator[list[RowId]]:
        """Rows that are in the target and were not seen, some at a time. Each is to be forgotten before the next are asked for."""
        return self._some_at_a_time("select id from done where id not in (select id from seen) limit ?")

    def failed_and_stale(self, version: str, round: int) -> Iterator[list[RowId]]:
        """Rows that failed in this round and are in the target with another model version; in the same way."""
        return self._some_at_a_time(
            "select id from done where version <> ? and id in (select id from failed where round = ?) limit ?",
            self._versions.get(version, 0),
            round,
        )

    def _some_at_a_time(self, query: str, *arguments: Any) -> Iterator[list[RowId]]:
        while True:
            with self._turn:
                found = [id for (id,) in self._db.execute(query, (*arguments, _AT_ONCE))]
            if not found:
                return
            yield found

    # -- figures --------------------------------------------------------------------------------------------------------

    def figures(self) -> Figures:
        """Counts."""
        with self._turn:
            return figures_of(self._db)

    def stale(self, version: str) -> int:
        """Number of rows of other model versions than this one."""
        with self._turn:
            number = self._versions.get(version, 0)
            return int(
                self._db.execute("select count(*) from done where version <> ?", (number,)).fetchone()[0]
            )

    def failures(self) -> Iterator[tuple[RowId, Problem]]:
        """All rows that failed, by id."""
        after: Any = None
        while True:
            with self._turn:
                found = self._db.execute(
                    "select id, code, message from failed where ?1 is null or id > ?1 order by id limit ?2",
                    (after, _AT_ONCE),
                ).fetchall()
            if not found:
                return
            for id, code, message in found:
                yield id, Problem(code, message)
            after = found[-1][0]

    def some(self, count: int) -> list[RowId]:
        """Ids of that many rows, at random."""
        with self._turn:
            return [
                id for (id,) in self._db.execute("select id from done order by random() limit ?", (count,))
            ]

    # -- parts of files -----------------------------------------------------------------------------------------------

    def parts(self) -> dict[int, int]:
        """The file parts in which rows are, by number, in order, and the number of vectors that count in each."""
        with self._turn:
            return dict(
                self._db.execute("select part, sum(count) from done group by part order by part").fetchall()
            )

    def in_part(self, part: int) -> list[tuple[int, int]]:
        """Where the vectors of each row of a part begin, and how many they are, in order."""
        with self._turn:
            return self._db.execute(
                "select start, count from done where part = ? order by start", (part,)
            ).fetchall()


def figures_of(db: sqlite3.Connection) -> Figures:
    """Counts of a manifest that is open."""
    versions = dict(
        db.execute(
            "select name, count(*) from done join versions on number = version group by version"
        ).fetchall()
    )
    failed = db.execute("select count(*) from failed").fetchone()[0]
    return Figures(done=sum(versions.values()), failed=failed, versions=versions)


def glance(path: Path) -> tuple[About | None, State, Figures]:
    """What a manifest says, while a run may be at work on it.

    Raises:
        sqlite3.Error: it is none.
    """
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
    try:
        facts: Mapping[str, Any] = {
            name: msgspec.json.decode(value) for name, value in db.execute("select name, value from facts")
        }
        about = msgspec.convert(facts["about"], About) if "about" in facts else None
        state = msgspec.convert(facts["state"], State) if "state" in facts else State()
        return about, state, figures_of(db)
    finally:
        db.close()


def is_locked(path: Path) -> bool:
    """Whether a process works on a manifest."""
    try:
        _locked(path).close()
    except RunBusy:
        return True
    return False


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, check_same_thread=False)
    db.execute("pragma journal_mode = wal")  # a look at it while it is written
    db.execute("pragma synchronous = normal")  # what a power cut takes back is written again
    return db


def _locked(path: Path) -> IO[bytes]:
    """A file that one process alone can hold, until it ends in whatever way."""
    file = open(f"{path}.lock", "ab")  # noqa: SIM115  # closed by who asked
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows, where two runs on one output are not told apart
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunBusy(manifest=os.fspath(path)) from None
    return file


def _as_json(ids: Sequence[RowId]) -> str:
    """Ids as `json_each` takes them. None has a null character, at which some of SQLite's versions end a text of JSON."""
    return msgspec.json.encode(ids).decode()


def _as_digits(numbers: Sequence[int]) -> bytes:
    """Numbers of a fixed width, of which SQLite finds one by its place."""
    return "".join(f"{number:{_DIGITS}}" for number in numbers).encode()


def _differences(known: About, about: About) -> str:
    found = [
        f"{name} was {old}, is {new}"
        for name, old, new in (("source", known.source, about.source), ("target", known.target, about.target))
        if old != new
    ]
    found += [
        f"{name} was {known.job.get(name)!r}, is {about.job.get(name)!r}"
        for name in sorted(known.job.keys() | about.job.keys())
        if known.job.get(name) != about.job.get(name)
    ]
    return ", ".join(found)


def now() -> float:
    """The time, as manifests have it."""
    return time.time()
