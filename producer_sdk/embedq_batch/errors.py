"""What ends a run before its time. As in the SDK, the first line of each docstring is the message."""

from __future__ import annotations

from embedq_sdk.errors import EmbedError


class BadSource(EmbedError):
    """{source}: {reason}"""

    source: str
    reason: str


class BadTarget(EmbedError):
    """{target}: {reason}"""

    target: str
    reason: str


class TargetAway(EmbedError):
    """{target} does not answer: {reason}

    It may come back: the run waits, and writes the same rows again.
    """

    target: str
    reason: str


class RowsRefused(EmbedError):
    """{target} refuses rows: {reason}

    What was given in one call is then not stored, none of it; who called tries with fewer rows.
    """

    target: str
    reason: str


class OtherRun(EmbedError):
    """{manifest} belongs to another run: {differences}. Give another --manifest or output, or --again to begin anew"""

    manifest: str
    differences: str


class RunBusy(EmbedError):
    """{manifest} is in use: another process works on the same output"""

    manifest: str


class ModelChanged(EmbedError):
    """The model changed from {old} to {new} while {done:,} rows were done: --on-model-change finish does them again, restart begins anew"""

    old: str
    new: str
    done: int


class TooManyFailures(EmbedError):
    """{failed:,} of {handled:,} rows failed, more than --max-error-share {share:g} allows; the first: {first}"""

    failed: int
    handled: int
    share: float
    first: str


class DocumentRefused(EmbedError):
    """The record {where} cannot be stored: {code}: {reason}. With --dead-letters TOPIC such records go there, and the others on"""

    where: str
    code: str
    reason: str


class MissingPackage(EmbedError):
    """{what} needs {package}: pip install 'embedq[{extra}]'"""

    what: str
    package: str
    extra: str
