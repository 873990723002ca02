"""The text of a row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.shapes.rows import BadRow, Row
from embedq_consumer.shapes.template import NullText, Slot, Template


def rendered(template: str, **fields: Any) -> str:
    return Template.parse(template).render(Row(fields=fields))


def test_a_name_alone_is_that_field() -> None:
    assert rendered("title", title="Tides") == "Tides"
    assert rendered("my title?", **{"my title?": "odd, and a name all the same"}).startswith("odd")


def test_a_template_puts_fields_between_its_words() -> None:
    assert rendered("{title}, by {author.name}", title="Tides", author={"name": "Ann"}) == "Tides, by Ann"
    assert rendered("{{{a}}}", a="x") == "{x}"


def test_a_field_whose_name_has_a_dot_comes_before_a_path() -> None:
    row = Row(fields={"a.b": "the name", "a": {"b": "the path", "c.d": "inner"}})
    assert Template.parse("{a.b}").render(row) == "the name"
    assert Template.parse("{a.c.d}").render(row) == "inner"


def test_numbers_and_booleans_are_written_as_json_writes_them() -> None:
    assert rendered("{a} {b} {c}", a=3, b=2.5, c=True) == "3 2.5 true"


def test_an_optional_field_may_be_null_or_missing() -> None:
    assert rendered("{a}{b?}{c?}", a="x", b=None) == "x"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadRow, match="`body`: expected a field of this name") as caught:
        rendered("{title}{body}", title="x")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "body")


def test_a_null_field_says_so_for_the_mapping_to_decide() -> None:
    with pytest.raises(NullText) as caught:
        rendered("{title}", title=None)
    assert caught.value.args == ("title",)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"bytes"])
def test_what_is_no_text_is_an_error_that_does_not_repeat_it(value: object) -> None:
    with pytest.raises(BadRow, match="`title`: expected a string, a number or a boolean") as caught:
        rendered("title", title=value)
    assert "bytes" not in str(caught.value)


def test_a_large_column_that_debezium_left_out_is_never_embedded() -> None:
    with pytest.raises(BadRow, match="REPLICA IDENTITY to FULL"):
        rendered("{title}", title="__debezium_unavailable_value")


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("", "the name of a field"),
        ("{}", "the name of a field"),
        ("{ a}", "the name of a field"),
        ("{a", "single brace at character 0"),
        ("a}", "single brace at character 1"),
        ("{a{b}}", "single brace at character 0"),
        ("{{a}}", "at least one"),
    ],
)
def test_a_broken_template_says_where(template: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Template.parse(template)


@given(
    st.lists(
        st.one_of(
            st.text(max_size=8), st.builds(Slot, st.from_regex(r"[a-z_]{1,6}", fullmatch=True), st.booleans())
        )
    ),
    st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), st.text(max_size=8)),
)
def test_whatever_stands_between_the_fields_comes_out_as_it_is(
    parts: list[str | Slot], fields: dict[str, str]
) -> None:
    source = "".join(
        part.replace("{", "{{").replace("}", "}}")
        if isinstance(part, str)
        else f"{{{part.path}{'?' if part.optional else ''}}}"
        for part in parts
    )
    slots = [part for part in parts if isinstance(part, Slot)]
    if not slots:
        return
    fields |= {slot.path: fields.get(slot.path, "") for slot in slots if not slot.optional}
    expected = "".join(part if isinstance(part, str) else fields.get(part.path, "") for part in parts)
    assert Template.parse(source).render(Row(fields=fields)) == expected
