"""Forms as clients send them, read a chunk at a time."""

from __future__ import annotations

import contextlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_gateway.batches.uploads import BadUpload, UploadForm


def a_form(content: bytes, name: str = "lines.jsonl", **fields: str) -> tuple[str, bytes]:
    """As httpx, and so openai's client, writes it."""
    request = httpx.Request("POST", "http://x", data=fields, files={"file": (name, content)})
    return request.headers["content-type"], request.read()


def read(kind: str, body: bytes, cuts: list[int] | None = None) -> tuple[UploadForm, bytes]:
    form = UploadForm(kind)
    ends = sorted(cuts or [])
    pieces = [body[start:end] for start, end in zip([0, *ends], [*ends, len(body)], strict=True)]
    content = b"".join(data for piece in pieces for data in form.feed(piece))
    form.end()
    return form, content


def written(*parts: bytes) -> tuple[str, bytes]:
    """A form written by hand, whose boundary is `b`."""
    return "multipart/form-data; boundary=b", b"".join(
        b"--b\r\n" + part + b"\r\n" for part in parts
    ) + b"--b--\r\n"


def field(name: str, value: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), value)


FILE = b'Content-Disposition: form-data; name="file"; filename="f"\r\nContent-Type: a/b\r\n\r\nbytes'


@given(st.binary(max_size=300), st.data())
def test_whatever_is_in_a_file_and_however_the_form_is_cut_its_bytes_come_out(
    content: bytes, data: st.DataObject
) -> None:
    kind, body = a_form(content, purpose="batch")
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=6))
    form, found = read(kind, body, cuts)
    assert found == content
    assert form.filename == "lines.jsonl"
    assert form.fields == {"purpose": "batch"}


def test_fields_may_come_after_the_file() -> None:
    form, content = read(*written(FILE, field("purpose", b"batch")))
    assert (content, form.fields, form.filename) == (b"bytes", {"purpose": "batch"}, "f")


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data"])
def test_another_type_is_refused(kind: str) -> None:
    with pytest.raises(BadUpload, match="multipart/form-data"):
        UploadForm(kind)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((field("purpose", b"batch"),), "expected a file"),
        ((FILE, FILE), "one file"),
        ((FILE.replace(b'"file"', b'"other"'),), "one file"),
        ((field("purpose", b"x" * 5000), FILE), "4,096 bytes"),
        (tuple(field(f"f{n}", b"") for n in range(17)), "16 fields"),
        ((b"X-Long: " + b"x" * 9000 + b"\r\n\r\n",), "short headers|well-formed"),
        ((b"Content-Disposition: form-data\r\n\r\nx",), "each with a name"),
    ],
)
def test_a_form_that_is_no_upload_is_refused(parts: tuple[bytes, ...], words: str) -> None:
    with pytest.raises(BadUpload, match=words):
        read(*written(*parts))


def test_a_form_that_ends_early_is_refused() -> None:
    kind, body = written(FILE)
    with pytest.raises(BadUpload, match="complete"):
        read(kind, body[:-9])


def test_what_is_no_form_is_refused() -> None:
    with pytest.raises(BadUpload, match="well-formed"):
        read("multipart/form-data; boundary=b", b"--another\r\n\r\n")


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_be_refused(body: bytes) -> None:
    with contextlib.suppress(BadUpload):
        read("multipart/form-data; boundary=b", b"--b" + body)
