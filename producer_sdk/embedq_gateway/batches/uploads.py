"""The body of an upload, `multipart/form-data`, as it comes in: its fields, and the file's bytes without keeping them. No I/O."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import Final

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

_MOST_FIELDS: Final = 16
_MOST_FIELD_BYTES: Final = 4096
_MOST_HEADER_BYTES: Final = 8192
"""Of one part: its name, the file's name, a content type."""


class BadUpload(Exception):
    """The body is no form, or one that an upload is not; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UploadForm:
    """A form with one file, `file`, and some short fields, in any order."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise BadUpload("expected a body of type multipart/form-data with a boundary")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """None until the file's part has begun."""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ends,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_end": self._form_ends,
            },
        )
        self._ended = False
        self._name: bytes = b""
        self._value: bytes = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._field: str | None = None
        """The field of the part that is read; None: it is the file."""
        self._data = bytearray()
        self._file: list[bytes] = []

    async def file(self, body: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
        """The file's bytes, while the body is read to its end.

        Raises:
            BadUpload.
        """
        async for chunk in body:
            for data in self.feed(chunk):
                yield data
        self.end()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Read on; what of the file was in it.

        Raises:
            BadUpload.
        """
        self._file = []
        try:
            self._parser.write(chunk)
        except MultipartParseError:
            raise BadUpload("expected a well-formed multipart/form-data body") from None
        return self._file

    def end(self) -> None:
        """The body is over.

        Raises:
            BadUpload: the form is not, or has no file.
        """
        if not self._ended:
            raise BadUpload("expected the form to be complete, and the body ends before its last boundary")
        if self.filename is None:
            raise BadUpload("expected a file in the field `file`", "file")

    def _part_begins(self) -> None:
        self._headers, self._header_bytes, self._data = {}, 0, bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += self._header_part(data, start, end)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._header_part(data, start, end)

    def _header_part(self, data: bytes, start: int, end: int) -> bytes:
        self._header_bytes += end - start
        if self._header_bytes > _MOST_HEADER_BYTES:
            raise BadUpload("expected short headers in each part of the form")
        return data[start:end]

    def _header_ends(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options or name == "file":
            if name != "file" or self.filename is not None:
                raise BadUpload("expected one file, in the field `file`", "file")
            self._field = None
            self.filename = options.get(b"filename", b"").decode(errors="replace") or "upload.jsonl"
            return
        if not name or len(self.fields) >= _MOST_FIELDS:
            raise BadUpload(f"expected at most {_MOST_FIELDS} fields, each with a name")
        self._field = name

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._file.append(bytes(data[start:end]))
            return
        self._data += data[start:end]
        if len(self._data) > _MOST_FIELD_BYTES:
            raise BadUpload(f"expected at most {_MOST_FIELD_BYTES:,} bytes in a field", self._field)

    def _part_ends(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._data.decode(errors="replace")

    def _form_ends(self) -> None:
        self._ended = True
