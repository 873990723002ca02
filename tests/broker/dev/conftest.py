from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedq_sdk.dev import DevStack
from tests.helpers.programs import own_environ


@pytest.fixture(scope="module")
def own_stack() -> Iterator[DevStack]:
    """A stack of this module's own, whatever the environment names: its tests stop and break it."""
    with DevStack(environ=own_environ(), kafka_properties={"message.max.bytes": "3000000"}) as stack:
        yield stack
