"""The two ways to say how a model is loaded have the same fields."""

from __future__ import annotations

import msgspec

from embedq_consumer.engine import LoadArguments, LoadOptions


def test_keyword_arguments_are_the_fields_of_the_options() -> None:
    assert [field.name for field in msgspec.structs.fields(LoadOptions)] == list(
        LoadArguments.__annotations__
    )
