"""The blocking client has the async client's calls: the same names, parameters, defaults and types."""

from __future__ import annotations

import inspect
import re

import pytest

from embedq_sdk import EmbedClient as AsyncClient
from embedq_sdk.blocking import EmbedClient

OF_ASYNC_ALONE = {"__aenter__", "__aexit__"}
OF_BLOCKING_ALONE = {"__enter__", "__exit__", "__reduce__", "begin"}


def public(kind: type) -> dict[str, object]:
    own = {name: value for each in reversed(kind.__mro__[:-1]) for name, value in vars(each).items()}
    kept = OF_ASYNC_ALONE | OF_BLOCKING_ALONE | {"__init__"}
    return {name: value for name, value in own.items() if not name.startswith("_") or name in kept}


ASYNC = public(AsyncClient)
BLOCKING = public(EmbedClient)
BOTH = sorted(ASYNC.keys() - OF_ASYNC_ALONE)


def without_async(annotation: object) -> str:
    """What a blocking call takes and returns in the place of this."""
    text = str(annotation).replace(" | AsyncIterable[str]", "")
    return re.sub(r"AsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]", text)


def test_both_have_the_same_calls() -> None:
    assert ASYNC.keys() - OF_ASYNC_ALONE == BLOCKING.keys() - OF_BLOCKING_ALONE
    assert ASYNC.keys() >= OF_ASYNC_ALONE
    assert BLOCKING.keys() >= OF_BLOCKING_ALONE


@pytest.mark.parametrize("name", BOTH)
def test_a_call_takes_and_returns_the_same(name: str) -> None:
    one, other = ASYNC[name], BLOCKING[name]
    assert isinstance(one, property) == isinstance(other, property)
    if isinstance(one, property) and isinstance(other, property):
        one, other = one.fget, other.fget
    assert callable(one)
    assert callable(other)
    asked, offered = inspect.signature(one), inspect.signature(other)
    assert [
        (each.name, each.kind, each.default, without_async(each.annotation))
        for each in asked.parameters.values()
    ] == [(each.name, each.kind, each.default, str(each.annotation)) for each in offered.parameters.values()]
    assert without_async(asked.return_annotation) == str(offered.return_annotation)
    assert not inspect.iscoroutinefunction(other)
    assert (other.__doc__ or "").strip() or name == "__init__"
