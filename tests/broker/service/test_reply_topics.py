"""Where a job may have its reply sent, by default and by the setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedq_sdk.dev import DevStack
from embedq_shared.headers import value_of
from tests.helpers.service_process import Replica, fresh_prefix, make_topics, producer, reader, replicas

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120)]


@pytest.mark.parametrize("setting", ["", "*"], ids=["by default", "with a pattern for all"])
async def test_a_producer_cannot_have_the_service_write_into_other_programs_topics(
    stack: DevStack, models: Path, tmp_path: Path, setting: str
) -> None:
    """By default not into any topic but ours; with a pattern for all, still not where others keep their state."""
    prefix = fresh_prefix()
    team, control = f"{prefix}-team.replies", f"{prefix}-other.control"
    topics = await make_topics(stack, prefix, names=[team, control])
    replica = Replica(stack, topics, models / "a", tmp_path / "log", redis=False, reply_topics=setting)
    async with (
        replicas(replica),
        producer(stack) as client,
        reader(stack, topics.results) as results,
        reader(stack, topics.replies) as replies,
        reader(stack, team) as at_team,
        reader(stack, control) as at_control,
        reader(stack, topics.dead_letters) as dead,
    ):
        for id, topic in {"ours": topics.replies, "team": team, "control": control}.items():
            headers = [("reply-topic", topic.encode()), ("correlation-id", id.encode())]
            await client.send_and_wait(
                topics.jobs, json.dumps({"input": "a", "id": id}).encode(), headers=headers
            )
        refused = {"control"} if setting else {"team", "control"}
        [own] = await replies.until(1)
        assert json.loads(own.value)["object"] == "list"
        errors = {json.loads(record.value)["id"]: record for record in await results.until(len(refused))}
        assert set(errors) == refused
        for record in errors.values():
            error = json.loads(record.value)["error"]
            assert (error["code"], error["param"]) == ("invalid_header", "reply-topic")
            assert "`reply_topics`" in error["message"]
        assert {value_of(record.headers, "correlation-id") for record in await dead.until(len(refused))} == {
            id.encode() for id in refused
        }
        if setting:
            await at_team.until(1)
        assert await replica.stop() == 0
        assert await at_control.all() == []
        assert len(await at_team.all()) == (1 if setting else 0)
