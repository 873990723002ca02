"""What `embedq embed` reads a file as, and what it refuses to take for lines of text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from embedq_sdk.cli.text_sources import BadSource, Format, SourceText, count_lines, open_texts

ROWS = [SourceText("one", "r1"), SourceText("two, \u2028 too", 2), SourceText("", None)]
TEXTS = ["one", "two", ""]


def read(path: str, data: bytes = b"", format: Format | None = None) -> list[SourceText]:
    with open_texts(path, format, io.BytesIO(data)) as texts:
        return list(texts)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(name: str, data: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


@pytest.mark.parametrize("name", ["t.txt", "texts", "t.md", "t.TXT"])
def test_a_file_has_a_text_on_each_line_and_only_a_line_feed_ends_one(file: Any, name: str) -> None:
    path = file(name, "one\r\n two \u2028 too\x0b\n\nlast")
    assert read(path) == [SourceText(text) for text in ("one", " two \u2028 too\x0b", "", "last")]
    assert count_lines(path) == 4


def test_an_empty_file_has_no_texts(file: Any) -> None:
    for name in ("t.txt", "t.jsonl"):
        assert read(file(name, "")) == []
    with pytest.raises(BadSource, match="a column `text`"):
        read(file("t.csv", ""))


JSON_LINES = '{"id": "r1", "text": "one", "price": 3}\n{"text": "two, \u2028 too", "id": 2}\n\n{"text": ""}'


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.JSONL"])
def test_json_lines_give_their_texts_and_ids(file: Any, name: str) -> None:
    assert read(file(name, JSON_LINES)) == ROWS


def test_csv_and_tsv_give_their_columns_text_and_id(file: Any) -> None:
    rows = [SourceText("one", "r1"), SourceText('two, "too"\nthree', "2"), SourceText("", "")]
    assert read(file("t.csv", 'id,n,text\nr1,3,one\n2,4,"two, ""too""\nthree"\n,,\n')) == rows
    assert read(file("t.tsv", 'text\tid\none\tr1\n"two, ""too""\nthree"\t2\n\t\n')) == rows
    assert read(file("e.csv", "\ufefftext\r\none\r\n")) == [SourceText("one")]  # as spreadsheets save it


def test_a_column_holds_as_long_a_text_as_a_job_does(file: Any) -> None:
    long = "x" * 900_000
    assert read(file("t.csv", f"text\n{long}\n")) == [SourceText(long)]


def test_a_format_that_is_named_counts(file: Any) -> None:
    assert read(file("t.txt", JSON_LINES), format="jsonl") == ROWS
    assert [one.text for one in read(file("t.jsonl", JSON_LINES), format="lines")] == JSON_LINES.split("\n")
    assert read("-", JSON_LINES.encode(), "jsonl") == ROWS
    assert read("-", b"one\n{\n") == [SourceText("one"), SourceText("{")]


@pytest.mark.parametrize("name", ["t.txt", "-"])
@pytest.mark.parametrize("first", ['{"id": "r1", "text": "one"}', ' {"a": 1}\r', "{}"])
def test_objects_that_no_name_announces_are_refused_with_both_ways_to_read_them(
    file: Any, name: str, first: str
) -> None:
    data = f"{first}\n{first}\n"
    with pytest.raises(
        BadSource, match=r"first line is a JSON object: --format jsonl reads .*--format lines"
    ):
        read(name if name == "-" else file(name, data), data.encode())


@pytest.mark.parametrize("data", ["[\n  {", "{\n", '[{"text": "one"},\n', '[{"text": "one"}]'])
def test_json_that_is_no_line_of_text_is_refused_with_the_command_to_use(file: Any, data: str) -> None:
    with pytest.raises(BadSource, match=r"looks like JSON.*jq -c '\.\[\]'.*embedq embed - --format jsonl"):
        read(file("t.txt", data))
    assert read(file("t.txt", data), format="lines")[0].text == data.split("\n")[0]


@pytest.mark.parametrize(
    "text", ["{not json}", "[1] is a footnote", "[a note]", '"quoted"', "{{ template }}"]
)
def test_lines_that_only_begin_like_json_are_texts(file: Any, text: str) -> None:
    assert read(file("t.txt", text)) == [SourceText(text)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("t.json", r"jq -c '\.\[\]' .*t\.json \| embedq embed - --format jsonl"),
        ("t.parquet", r"read_parquet\('.*t\.parquet'\)"),
        ("t.txt.gz", r"gzip -dc .*t\.txt\.gz \| embedq embed -"),
        ("t.npy", "embed_many"),
        ("t.xlsx", "CSV"),
        ("t.PDF", "pdftotext"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name_with_the_command_to_use(
    file: Any, name: str, told: str
) -> None:
    with pytest.raises(BadSource, match=told):
        read(file(name, "whatever"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"PAR1\x15", "read_parquet"),
        (b"\x1f\x8b\x08", "gzip -dc FILE"),
        (b"\x93NUMPY\x01", "numpy.load"),
        (b"%PDF-1.7\n", "pdftotext"),
    ],
)
def test_what_is_no_text_is_refused_by_its_first_bytes(data: bytes, told: str) -> None:
    with pytest.raises(BadSource, match=told):
        read("-", data)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("t.txt", b"good\n\xff\xfe\n", "UTF-8, got other bytes in line 2"),
        ("t.csv", b"text\n\xff\n", "UTF-8, got other bytes in line 2"),
        ("t.jsonl", b'{"text": "a"}\n{"id": 1}\n', "line 2: expected a JSON object with a string in `text`"),
        ("t.jsonl", b'{"text": 7}\n', r"line 1: .* - at `\$.text`"),
        ("t.jsonl", b"one\n", "line 1: expected a JSON object"),
        ("t.jsonl", b"\xff\n", "line 1: expected a JSON object"),
        ("t.jsonl", b"[" * 100_000, "line 1: expected a JSON object"),
        ("t.csv", b"title,body\na,b\n", "a column `text` in the first line, got 'title', 'body'"),
        ("t.csv", b"id,text\n1\n", "line 2: ends before the column `text`"),
        ("t.csv", b'text\na\n"open', "line [23]: unexpected end of data"),
    ],
)
def test_a_bad_record_is_named_by_its_line(file: Any, name: str, data: bytes, told: str) -> None:
    with pytest.raises(BadSource, match=told):
        read(file(name, data))


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=r"nosuch\.txt: No such file or directory"):
        read(str(tmp_path / "nosuch.txt"))


def test_what_was_good_is_given_out_before_the_bad_line(file: Any) -> None:
    with open_texts(file("t.jsonl", b'{"text": "a"}\n{"text": "b"}\nno\n'), None, io.BytesIO()) as texts:
        assert [next(texts).text, next(texts).text] == ["a", "b"]
        with pytest.raises(BadSource, match="line 3"):
            next(texts)
