"""Which models are alive, as statuses say."""

from __future__ import annotations

from typing import Any

from embedq_gateway.fleet.fleet import Fleet, Model
from embedq_shared.messages import STATUS_STALE_AFTER_S
from tests.helpers.fake_gateway import a_status
from tests.helpers.fake_service import NEW, OLD

NOW = 1_000_000.0


def fleet(*statuses: dict[str, Any]) -> Fleet:
    found = Fleet()
    for n, more in enumerate(statuses):
        found.board.see(f"r{n}", a_status(f"r{n}", **({"at": int(NOW * 1000)} | more)))
    return found


def test_an_alias_is_alive_while_a_replica_serves_it() -> None:
    one = fleet({})
    assert one.model("default", NOW) == Model(
        alias="default",
        model_version=OLD,
        dimensions=64,
        max_tokens=512,
        since_ms=int(NOW * 1000),
        replicas=1,
    )
    assert one.model("default", NOW + STATUS_STALE_AFTER_S + 1) is None
    assert one.model("other", NOW) is None


def test_a_replica_that_loads_its_first_model_serves_nothing() -> None:
    assert fleet({"state": "LOADING", "serving": False, "model_version": None}).models(NOW) == []


def test_a_replica_that_reloads_serves_on() -> None:
    [model] = fleet({"state": "LOADING", "step": "load"}, {"state": "FAILED", "step": "check"}).models(NOW)
    assert model.replicas == 2


def test_during_a_reload_the_newest_command_counts() -> None:
    [model] = fleet({"version": 7, "model_version": NEW}, {"version": 6}, {"version": None}).models(NOW)
    assert (model.model_version, model.replicas) == (NEW, 3)


def test_of_an_alias_that_has_moved_the_replicas_of_its_pool_count() -> None:
    moved = {"version": 7, "model_version": NEW, "pool": "big"}
    [model] = fleet(moved, {"version": 6}, {"version": 6}).models(NOW)
    assert (model.model_version, model.replicas) == (NEW, 1)


def test_since_when_a_version_is_known_does_not_change() -> None:
    one = fleet({})
    first = one.model("default", NOW)
    again = one.model("default", NOW + 3)
    assert first is not None
    assert again is not None
    assert again.since_ms == first.since_ms


def test_an_alias_is_unknown_only_while_others_are_alive() -> None:
    assert fleet({}).is_unknown("nobody", NOW)
    assert not fleet({}).is_unknown("default", NOW)
    assert not fleet().is_unknown("nobody", NOW)
    assert not fleet({}).is_unknown("nobody", NOW + STATUS_STALE_AFTER_S + 1)
    gone = fleet({"alias": "gone", "at": 0}, {})
    assert not gone.is_unknown("gone", NOW)


def test_a_split_that_a_replica_tells_of_is_known_and_no_model_of_its_own() -> None:
    one = fleet({"splits": {"ab": {"default": 1}}})
    assert not one.is_unknown("ab", NOW)
    assert one.is_unknown("ba", NOW)
    assert [model.alias for model in one.models(NOW)] == ["default"]
