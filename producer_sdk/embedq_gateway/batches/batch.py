"""A batch: all that is known of it in one document, and what may happen to it. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from embedq_gateway.batches.identities import result_file_id
from embedq_gateway.batches.line_set import LineSet

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
UnfinishedCode = Literal["batch_expired", "batch_cancelled"]

ENDED: Final[frozenset[Status]] = frozenset({"failed", "completed", "expired", "cancelled"})
DAY_S: Final = 24 * 3600
_MOST_FAULTS: Final = 100
"""What is wrong with an input file is said of its first lines; a file that is no batch at all has nothing but wrong ones."""


class WrongStatus(Exception):
    """The batch's status does not allow what is asked."""


class LeaseLost(Exception):
    """Another gateway runs the batch now."""


class FileFault(msgspec.Struct, frozen=True, kw_only=True):
    """Why an input file is refused, as OpenAI says it. `line` counts from 1; None: the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Piece(msgspec.Struct, frozen=True):
    """A part of a file: the key of an object, and its bytes."""

    key: str
    size: int


class Lease(msgspec.Struct, frozen=True):
    """Who runs the batch. `beat` rises with each sign of life."""

    holder: str
    beat: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Results of some lines that were written down together."""

    lines: Sequence[int]
    output: Piece | None = None
    """Of the lines that were answered with 200."""
    failures: Piece | None = None
    """Of the others."""
    completed: int = 0
    failed: int = 0
    unrun: int = 0
    """Of the failed ones, those that were not run at all."""
    tokens: int = 0
    model_versions: Mapping[str, int] = msgspec.field(default_factory=dict)
    """How many lines each model version answered."""


class Batch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One batch, whole: what its owner sees, and how far it is.

    Invariants:
        - A line is in `done` if and only if its result is in exactly one piece of `outputs` or `failures`.
        - Only the holder of the lease changes what is done; anybody may cancel.
        - An ended batch changes no more.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    """Seconds since 1970, as all times here."""
    expires_at: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    aliases: tuple[str, ...] | None = None
    """Models that the owner's key may use, as they were when the batch was made; None: all."""
    output_seconds: int | None = None
    """How long the output file is kept; None: as long as the gateway keeps files."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    unrun: int = 0
    tokens: int = 0
    model_versions: dict[str, int] = msgspec.field(default_factory=dict)
    done: LineSet = LineSet()
    outputs: tuple[Piece, ...] = ()
    failures: tuple[Piece, ...] = ()
    faults: tuple[FileFault, ...] = ()
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    lease: Lease | None = None

    # -- what happens to it -------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ENDED

    @property
    def ended_at(self) -> int | None:
        """When it ended."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at

    def validated(self, total: int, now: int) -> Batch:
        """The input file is good, and has so many lines."""
        self._require("validating")
        return replace(self, status="in_progress", in_progress_at=now, total=total)

    def refused(self, faults: Sequence[FileFault], now: int) -> Batch:
        """The input file is not good, for these reasons, or went away while the batch ran."""
        self._require("validating", "in_progress", "finalizing", "cancelling")
        return replace(self, status="failed", failed_at=now, lease=None, faults=tuple(faults[:_MOST_FAULTS]))

    def advanced(self, segment: Segment) -> Batch:
        """Lines are done, and their results are where the segment says. The same segment twice is the same once."""
        self._require("in_progress", "finalizing", "cancelling")
        if segment.output in self.outputs or segment.failures in self.failures:
            return self
        done = self.done.with_(segment.lines)
        if len(done) != len(self.done) + len(segment.lines) or len(done) > self.total:
            raise RuntimeError("a line of a batch was finished twice. This is a bug.")
        versions = dict(self.model_versions)
        for version, lines in segment.model_versions.items():
            versions[version] = versions.get(version, 0) + lines
        return replace(
            self,
            done=done,
            outputs=self.outputs if segment.output is None else (*self.outputs, segment.output),
            failures=self.failures if segment.failures is None else (*self.failures, segment.failures),
            completed=self.completed + segment.completed,
            failed=self.failed + segment.failed,
            unrun=self.unrun + segment.unrun,
            tokens=self.tokens + segment.tokens,
            model_versions=versions,
        )

    def finalizing(self, now: int) -> Batch:
        """No line will be run any more: all are done, or the time is over."""
        self._require("in_progress")
        if len(self.done) < self.total and now < self.expires_at:
            raise WrongStatus("lines of the batch are not done, and there is time left")
        return replace(self, status="finalizing", finalizing_at=now)

    def cancel(self, now: int) -> Batch:
        """Its owner does not want it any more. Doing so twice does nothing.

        Raises:
            WrongStatus: it has ended, or is about to.
        """
        if self.status in ("cancelling", "cancelled"):
            return self
        self._require("validating", "in_progress")
        return replace(self, status="cancelling", cancelling_at=now)

    @property
    def unfinished(self) -> UnfinishedCode:
        """What is said of the lines that were not run."""
        return "batch_cancelled" if self.status == "cancelling" else "batch_expired"

    def end(self, now: int) -> Batch:
        """The files are there. Every line must be done: run, or said to be unfinished."""
        self._require("finalizing", "cancelling")
        if len(self.done) < self.total:
            raise RuntimeError("a batch ends before its lines. This is a bug.")
        ended = replace(self, lease=None)
        if self.status == "cancelling":
            return replace(ended, status="cancelled", cancelled_at=now)
        if self.unrun:
            return replace(ended, status="expired", expired_at=now)
        return replace(ended, status="completed", completed_at=now)

    def _require(self, *statuses: Status) -> None:
        if self.status not in statuses:
            raise WrongStatus(f"the batch is {self.status}; it would have to be {' or '.join(statuses)}")

    # -- who runs it --------------------------------------------------------------------------------------------------

    def claimed(self, holder: str) -> Batch:
        """Somebody takes it. Whether it may is `LeaseWatch`'s to say."""
        return replace(self, lease=Lease(holder, 1 if self.lease is None else self.lease.beat + 1))

    def beaten(self, holder: str) -> Batch:
        """A sign of life of its holder.

        Raises:
            LeaseLost: somebody else's.
        """
        if self.lease is None or self.lease.holder != holder:
            raise LeaseLost(f"batch {self.id} is run by another gateway now")
        return replace(self, lease=Lease(holder, self.lease.beat + 1))

    def released(self, holder: str) -> Batch:
        """Its holder stops: whoever comes first may take it.

        Raises:
            LeaseLost: somebody else's.
        """
        return replace(self.beaten(holder), lease=None)

    # -- how its owner sees it ----------------------------------------------------------------------------------------

    @property
    def output_file_id(self) -> str | None:
        """The file of results, once the batch has ended."""
        return result_file_id(self.id, "output") if self.outputs and self.ended else None

    @property
    def error_file_id(self) -> str | None:
        """The file of lines that failed, once the batch has ended."""
        return result_file_id(self.id, "errors") if self.failures and self.ended else None
