"""The lines of an input file, one at a time, and the lines of output and error files. Nothing here does I/O."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from embedq_gateway.batches.batch import FileFault, UnfinishedCode
from embedq_gateway.batches.identities import request_id

MAX_LINE_BYTES: Final = 8 << 20
"""2,048 texts of 4 KB. A line is in memory whole, and several at once."""
MAX_CUSTOM_ID: Final = 512
"""Characters; they come back in each line of the output."""
_MOST_FAULTS: Final = 20
"""After so many wrong lines the rest of the file need not be read."""

_UNFINISHED: Final = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed because the batch was cancelled.",
}


class LineTooLong(Exception):
    """A line has more bytes than a line may have; `number` counts from 0."""

    def __init__(self, number: int) -> None:
        super().__init__(f"line {number + 1} is longer than {MAX_LINE_BYTES:,} bytes")
        self.number = number


class InputLine(msgspec.Struct, frozen=True):
    """A line that is not blank. `number` counts such lines from 0, `place` all lines of the file from 1."""

    number: int
    place: int
    data: bytes


class Request(msgspec.Struct, frozen=True):
    """A line's envelope, as OpenAI has it. Other fields are ignored; the body is for whoever runs it."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=MAX_CUSTOM_ID)]
    method: str
    url: str
    body: msgspec.Raw


class _Counted(msgspec.Struct, frozen=True):
    input: list[Any] | Any = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What running a line's body gave: as HTTP would have answered, with what is counted of it."""

    status: int
    body: bytes
    """JSON."""
    tokens: int = 0
    model_version: str | None = None


_requests: Final = msgspec.json.Decoder(Request)
_envelopes: Final[msgspec.json.Decoder[dict[str, msgspec.Raw]]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_counts: Final = msgspec.json.Decoder(_Counted)


async def split(chunks: AsyncIterable[bytes]) -> AsyncGenerator[InputLine, None]:
    """The lines of a file, with a line or two and a chunk in memory. A final newline, a BOM and CRLF are as good as none.

    Raises:
        LineTooLong.
    """
    rest = b""
    number = place = 0
    first = True
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for data in whole:
            place += 1
            if first:
                data, first = data.removeprefix(b"\xef\xbb\xbf"), False
            if len(data) > MAX_LINE_BYTES:
                raise LineTooLong(place - 1)
            if not data.isspace() and data:
                yield InputLine(number, place, data)
                number += 1
        if len(rest) > MAX_LINE_BYTES:
            raise LineTooLong(place)
    if first:
        rest = rest.removeprefix(b"\xef\xbb\xbf")
    if rest and not rest.isspace():
        yield InputLine(number, place + 1, rest)


def read_request(line: InputLine) -> Request:
    """A line of a file that was found good.

    Raises:
        msgspec.DecodeError: it is another file than the one that was looked at.
    """
    return _requests.decode(line.data)


def text_count(body: msgspec.Raw) -> int:
    """About how many texts a body asks for: a bound for what its answer takes; whoever runs it counts exactly."""
    try:
        asked = _counts.decode(body).input
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 1
    return max(1, len(asked)) if isinstance(asked, list) else 1


class Validation:
    """Looks at each line of an input file once, and remembers 16 bytes of each `custom_id`."""

    def __init__(self, endpoint: str, most_lines: int) -> None:
        self._endpoint = endpoint
        self._most_lines = most_lines
        self._seen: set[bytes] = set()
        self.faults: list[FileFault] = []
        self.total = 0

    @property
    def enough(self) -> bool:
        """Whether the verdict can't change, and the reasons are plenty."""
        return len(self.faults) >= _MOST_FAULTS or self.total > self._most_lines

    def add(self, line: InputLine) -> None:
        """Look at the next line."""
        self.total += 1
        fault = self._fault(line)
        if fault is not None:
            self.faults.append(fault)

    def too_long(self, error: LineTooLong) -> None:
        """A line could not even be looked at."""
        self.faults.append(FileFault(code="line_too_long", message=str(error), line=error.number + 1))

    def end(self) -> list[FileFault]:
        """The verdict after the last line: why the file is refused; empty if it is not."""
        if self.total > self._most_lines:
            message = f"expected at most {self._most_lines:,} requests in a batch, and the file has more"
            return [FileFault(code="too_many_requests", message=message), *self.faults]
        if not self.total and not self.faults:
            return [
                FileFault(code="empty_file", message="expected at least one request, and the file has none")
            ]
        return self.faults

    def _fault(self, line: InputLine) -> FileFault | None:
        try:
            line.data.decode()  # a body is not looked into here, and must be text all the same
            fields = _envelopes.decode(line.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _at(line, "invalid_json_line", "expected a JSON object on one line, in UTF-8")
        for name in ("custom_id", "method", "url", "body"):
            if name not in fields:
                return _at(line, "missing_required_parameter", f"expected a field `{name}`", name)
        try:
            request = read_request(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _at(
                line,
                "invalid_value",
                f"expected strings in `method` and `url`, and in `custom_id` one of 1 to {MAX_CUSTOM_ID} characters",
            )
        if request.method != "POST":
            return _at(line, "invalid_method", "expected `method` to be POST", "method")
        if request.url != self._endpoint:
            return _at(
                line, "invalid_url", f"expected `url` to be the batch's endpoint, {self._endpoint}", "url"
            )
        if not bytes(request.body).lstrip().startswith(b"{"):
            return _at(line, "invalid_value", "expected `body` to be an object", "body")
        mark = hashlib.blake2b(request.custom_id.encode(), digest_size=16).digest()
        if mark in self._seen:
            return _at(
                line,
                "duplicate_custom_id",
                "expected each `custom_id` once, and this one came before",
                "custom_id",
            )
        self._seen.add(mark)
        return None


def _at(line: InputLine, code: str, message: str, param: str | None = None) -> FileFault:
    return FileFault(code=code, message=f"{message} (line {line.place})", param=param, line=line.place)


# -- output -----------------------------------------------------------------------------------------------------------


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _LineError(msgspec.Struct, frozen=True):
    code: str
    message: str


class _OutputLine(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    custom_id: str
    response: _Response | None = None
    error: _LineError | None = None


def answered(batch: str, number: int, custom_id: str, answer: Answer) -> bytes:
    """The line of the output file, or with another status than 200 of the error file, with its newline."""
    name = request_id(batch, number)
    response = _Response(answer.status, name, msgspec.Raw(answer.body))
    return msgspec.json.encode(_OutputLine(id=name, custom_id=custom_id, response=response)) + b"\n"


def unfinished(batch: str, number: int, custom_id: str, code: UnfinishedCode) -> bytes:
    """The line of the error file for a line that was not run, with its newline."""
    error = _LineError(code, _UNFINISHED[code])
    line = _OutputLine(id=request_id(batch, number), custom_id=custom_id, error=error)
    return msgspec.json.encode(line) + b"\n"


Destination = Literal["output", "failures"]


def destination(answer: Answer) -> Destination:
    """Which file an answer's line belongs to."""
    return "output" if answer.status == 200 else "failures"
