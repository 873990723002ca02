"""Jobs whose results go to the results topic."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from embedq_sdk import EmbedClient, InvalidArgument, UnknownModel
from embedq_shared.messages import ErrorBody
from tests.helpers.fake_service import Answer, Received, expected
from tests.helpers.responder import Responder
from tests.helpers.support import patient

pytestmark = pytest.mark.kafka

Clients = Callable[..., EmbedClient]
Responders = Callable[..., Responder]


async def collect(embedq: EmbedClient, ids: set[str], **settings: Any) -> dict[str, Any]:
    """Results by id, until all of `ids` are there."""
    found: dict[str, Any] = {}
    async with aclosing(embedq.results(timeout=patient(20), **settings)) as results:
        async for result in results:
            assert result.id is not None
            assert result.id not in found, "a repeat"
            found[result.id] = result
            if ids <= found.keys():
                break
    return found


@pytest.mark.parametrize("format", ["json", "msgpack"])
async def test_a_submitted_job_is_answered_on_the_results_topic(
    client: Clients, responder: Responders, format: Any
) -> None:
    async with responder() as other, client() as embedq:
        named = uuid.uuid4().hex
        assert await embedq.submit("one", id=named, metadata={"row": 7}, format=format) == named
        drawn = await embedq.submit(["two", "three"], format=format)
        found = await collect(embedq, {named, drawn}, from_beginning=True)

    assert np.allclose(found[named].embeddings.vectors[0], expected("one"))
    assert found[named].metadata == {"row": 7}
    assert found[drawn].embeddings.vectors.shape == (2, 64)
    assert all(job.topic.endswith(".jobs.bulk") for job in other.received)
    assert other.received[0].headers.reply_topic is None


async def test_parts_repeats_and_failures_on_the_results_topic(
    client: Clients, responder: Responders
) -> None:
    def behave(job: Received) -> list[Answer]:
        match job.texts:
            case ["fails"]:
                return [other.failure(job, ErrorBody.of("unknown_model", "m"))]
            case ["twice"]:
                return [other.good(job), other.good(job)]
            case _:
                return [*reversed(other.parts(job, 2)), *other.parts(job, 2)]

    async with responder() as other, client() as embedq:
        other.behave = behave
        split = await embedq.submit([str(n) for n in range(5)])
        fails = await embedq.submit("fails")
        twice = await embedq.submit("twice")
        found = await collect(embedq, {split, fails, twice}, from_beginning=True)

    assert np.array_equal(found[split].embeddings.vectors, np.stack([expected(str(n)) for n in range(5)]))
    assert isinstance(found[fails].error, UnknownModel)
    assert found[fails].embeddings is None


async def test_a_group_goes_on_where_it_stopped(client: Clients, responder: Responders) -> None:
    group = f"readers-{uuid.uuid4().hex[:8]}"
    async with responder(), client() as embedq:
        first = {await embedq.submit(f"first {n}") for n in range(3)}
        seen = await collect(embedq, first, group=group)
        second = {await embedq.submit(f"second {n}") for n in range(3)}
        later = await collect(embedq, second, group=group)

    assert first <= seen.keys()
    # The result at which the first reader stopped was not taken back yet: at least once.
    assert len(first & later.keys()) <= 1


async def test_what_no_job_can_hold_is_refused(client: Clients) -> None:
    async with client(max_inputs=3) as embedq:
        with pytest.raises(InvalidArgument, match="at most 3 texts"):
            await embedq.submit(["x"] * 4)
        with pytest.raises(InvalidArgument, match="`id`"):
            await embedq.submit("x", id="")
        with pytest.raises(InvalidArgument, match="`format`"):
            await embedq.submit("x", format="xml")  # type: ignore[arg-type]
