"""The list of metrics: what each begins with, and that a test somewhere asserts the value of each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_args

import pytest
from prometheus_client import Metric

from embedq_consumer.cache.entries import Refused
from embedq_consumer.cache.link import Reason
from embedq_consumer.telemetry.metrics import Metrics
from embedq_shared.messages import ErrorCode, ResultStatus
from embedq_shared.topics import LANES
from tests.helpers.metric_values import sample_value

TESTS: Final = Path(__file__).parents[2]
NAME: Final = re.compile(r"(?:embedq_)?([a-z_]+)")


def families() -> list[Metric]:
    return [family for family in Metrics().registry.collect() if family.name.startswith("embedq_")]


def samples(family: Metric) -> set[str]:
    """The names under which a test may ask for it, without `embedq_`."""
    suffixes = {"counter": ["_total"], "histogram": ["_count", "_sum", "_bucket"], "info": ["_info"]}
    return {family.name.removeprefix("embedq_") + suffix for suffix in suffixes.get(family.type, [""])}


def asserted(source: str) -> Iterator[str]:
    """The names at the beginning of strings in the assertions of a file: `sample("jobs_total", …) == 3`.

    A test that waits for a value asserts it, too.
    """
    for node in ast.walk(ast.parse(source)):
        waits = isinstance(node, ast.Call) and "wait_until" in ast.unparse(node.func)
        if isinstance(node, ast.Assert) or waits:
            for inner in ast.walk(node):
                # The first part of an f-string is a constant of its own.
                text = inner.value if isinstance(inner, ast.Constant) else None
                if isinstance(text, str) and (name := NAME.match(text)):
                    yield name[1]


def test_what_a_test_asserts_is_found() -> None:
    source = """
name = "ready"
assert sample("embedq_jobs_total", lane="bulk") == 3
assert found[f'paused{{lane="{lane}"}}'] == 0
await wait_until(lambda: sample("lag_records") == 0)
"""
    assert {"jobs_total", "paused", "lag_records"} <= set(asserted(source))
    assert "ready" not in set(asserted(source))


def test_every_metric_has_a_test_that_asserts_its_value() -> None:
    sources = (path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__))
    wanted = set().union(*map(samples, families()))
    likely = (source for source in sources if any(name in source for name in wanted - {"ready", "paused"}))
    named = {name for source in likely for name in asserted(source)}
    unproven = [family.name for family in families() if not samples(family) & named]
    assert unproven == []


def test_series_that_alerts_watch_begin_at_zero() -> None:
    """Prometheus sees no increase in a series whose first value is 1."""
    registry = Metrics().registry
    for lane in LANES:
        assert sample_value(registry, "embedq_records_total", {"lane": lane}) == 0
        for status in get_args(ResultStatus):
            assert sample_value(registry, "embedq_jobs_total", {"lane": lane, "status": status}) == 0
    for code in get_args(ErrorCode):
        assert sample_value(registry, "embedq_errors_total", {"code": code}) == 0
        assert sample_value(registry, "embedq_dead_letters_total", {"code": code}) == 0
    for outcome in ("ready", "failed", "superseded"):
        assert sample_value(registry, "embedq_reload_seconds_count", {"outcome": outcome}) == 0
    for name, outcomes in {
        "reloads": ("ready", "failed", "superseded", "ignored"),
        "commits": ("ok", "error", "fenced"),
        "cache_lookups": ("hit", "miss", "corrupt", "error", "bypass"),
        "cache_writes": ("ok", "error", "bypass"),
    }.items():
        for outcome in outcomes:
            assert sample_value(registry, f"embedq_{name}_total", {"outcome": outcome}) == 0
    for name, reasons in {"cache_corrupt": get_args(Refused), "cache_failures": get_args(Reason)}.items():
        for reason in reasons:
            assert sample_value(registry, f"embedq_{name}_total", {"reason": reason}) == 0


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_a_help_text_is_a_sentence(family: Metric) -> None:
    assert family.documentation[0].isupper() or family.documentation[0].isdigit()
    assert family.documentation.endswith(".")


def test_two_registries_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.deduplicated.inc()
    assert sample_value(other.registry, "embedq_deduplicated_total") == 0
