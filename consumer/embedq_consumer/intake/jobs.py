"""A job in flight, from its record to its result."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from embedq_consumer.engine import Encoder, Text
from embedq_consumer.intake.records import Record
from embedq_consumer.shapes import Answer
from embedq_shared.codec import Format
from embedq_shared.headers import JobHeaders
from embedq_shared.messages import Chunking, Dtype, EncodingFormat, ErrorBody, Truncate

_NUMBERS = itertools.count(1)
_ONE: Final = (0,)
_NO_COPIES: Final[Mapping[int, Sequence[int]]] = {}


class InputVector(msgspec.Struct, frozen=True, gc=False):
    """The vector of one input, as it goes over the wire."""

    vector: bytes
    tokens: int
    truncated: Literal["start", "end"] | None
    """The policy by which it was cut; None if it was not."""
    scale: float | None
    """What int8 components are multiplied by; None for other dtypes."""
    cached: bool


class Span(msgspec.Struct, frozen=True, gc=False):
    """The vector of one span of an input, `[start, end)` in code points."""

    start: int
    end: int
    tokens: int
    vector: bytes
    scale: float | None


class Spans(msgspec.Struct, frozen=True):
    """The vectors of all spans of one input, in order; `tokens` is how many were run for it."""

    spans: tuple[Span, ...]
    tokens: int


Outcome = InputVector | Spans | ErrorBody


class Request(msgspec.Struct, frozen=True):
    """What an accepted job asks for, with every default filled in for the model that will run it."""

    id: str
    model: str
    texts: list[str]
    listed: bool
    """The input was a list, so that inputs fail one by one."""
    prompt: str
    dimensions: int
    dtype: Dtype
    encoding: EncodingFormat
    truncate: Truncate
    chunk: Chunking | None
    """Its `tokens` are filled in, and at most the model's limit."""
    max_spans: int
    """Of all its inputs together."""
    metadata: msgspec.Raw
    format: Format
    answer: Answer | None = None
    """How it is answered, if a mapping says so."""

    def text(self, index: int) -> Text:
        """What the model sees of one input: the single flight's identity and the cache key are made from it."""
        return Text(self.texts[index], self.prompt, self.truncate, self.chunk)

    @property
    def late(self) -> bool:
        """Whether an input gets several vectors."""
        return self.chunk is not None and self.chunk.mode == "late"


class JobState:
    """One job between the poll and its result. Touched on the event loop alone.

    It keeps the encoder that it was accepted for, so that no job is ever split over two model versions. Equal inputs are one
    piece of work: only the first of them, those of `distinct`, is looked up, tokenized and computed, and `settle` gives its
    outcome to its copies too.
    """

    __slots__ = (
        "alias",
        "compute_s",
        "copies",
        "device_s",
        "distinct",
        "encoder",
        "headers",
        "keys",
        "number",
        "outcomes",
        "queue_s",
        "record",
        "remaining",
        "request",
        "spans",
        "tokenize_s",
    )

    def __init__(
        self,
        record: Record,
        headers: JobHeaders,
        request: Request,
        encoder: Encoder,
        alias: str | None = None,
    ) -> None:
        """`alias` is the one whose model runs it; None: the one that it names."""
        self.alias = request.model if alias is None else alias
        self.number = next(_NUMBERS)
        """No other job of this process has it."""
        self.record = record
        self.headers = headers
        self.request = request
        self.encoder = encoder
        self.copies: Mapping[int, Sequence[int]] = _NO_COPIES
        """The indices of later inputs that are equal to one, by the index of the first."""
        self.distinct: Sequence[int] = _ONE
        """The index of the first of equal inputs, in order."""
        if len(request.texts) > 1:
            self.distinct, self.copies = _divided(request.texts)
        self.outcomes: list[Outcome | None] = [None] * len(request.texts)
        self.remaining = len(request.texts)
        self.keys: dict[int, bytes] = {}
        """Under which the cache has not got an input's vector, by its index."""
        self.spans = 0
        self.queue_s: float | None = None
        self.tokenize_s: float | None = None
        self.compute_s: float | None = None
        self.device_s: float | None = None

    @property
    def client(self) -> bytes:
        """Whose job it is."""
        return self.record.client

    def settle(self, index: int, outcome: Outcome) -> bool:
        """Give one input and its copies their outcome. True if that was the last one.

        Raises:
            RuntimeError: it has one already.
        """
        self._settle(index, outcome)
        for other in self.copies.get(index, ()):
            self._settle(other, _for_copy(outcome, self.request, index, other))
        return self.remaining == 0

    def _settle(self, index: int, outcome: Outcome) -> None:
        if self.outcomes[index] is not None:
            raise RuntimeError(f"input {index} settled twice. This is a bug.")
        if isinstance(outcome, Spans):
            self.spans += len(outcome.spans)
            if self.spans > self.request.max_spans:
                outcome = too_many_spans(self.request)
        self.outcomes[index] = outcome
        self.remaining -= 1

    def expired(self, now_ms: float) -> bool:
        """Whether the caller has given up by now."""
        return self.headers.deadline_ms is not None and self.headers.deadline_ms <= now_ms

    def failure(self) -> ErrorBody | None:
        """Why the job as a whole failed; None if any input has a vector, or if a list names its errors one by one."""
        errors = [outcome for outcome in self.outcomes if isinstance(outcome, ErrorBody)]
        if not errors:
            return None
        if over := next((error for error in errors if error.code == "too_many_inputs"), None):
            return over  # which inputs came first is chance: the whole job fails, the same way each time
        if len(errors) < len(self.outcomes):
            return None
        if not self.request.listed or all(error.code == "expired" for error in errors):
            return errors[0]
        return None


def _divided(texts: list[str]) -> tuple[list[int], dict[int, list[int]]]:
    """The first of equal texts, and the others by it. Equal ones become one object, so that a thousand take no memory."""
    first: dict[str, int] = {}
    copies: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        at = first.setdefault(text, index)
        if at != index:
            texts[index] = texts[at]
            copies.setdefault(at, []).append(index)
    return list(first.values()), copies


def _for_copy(outcome: Outcome, request: Request, index: int, other: int) -> Outcome:
    """The outcome of the input `index` as that of an equal one: an error names the input that it is about."""
    if not isinstance(outcome, ErrorBody) or outcome.param != input_param(request, index):
        return outcome
    param = input_param(request, other)
    return msgspec.structs.replace(
        outcome, param=param, message=outcome.message.replace(f"`{outcome.param}`", f"`{param}`", 1)
    )


def too_many_spans(request: Request) -> ErrorBody:
    """The error of a job whose spans are more than a job may have."""
    return ErrorBody.of(
        "too_many_inputs",
        f"`chunk`: expected at most {request.max_spans} spans in a job; `tokens` may be larger",
        "chunk",
    )


def input_param(request: Request, index: int) -> str:
    """How an error names one input."""
    return f"input[{index}]" if request.listed else "input"
