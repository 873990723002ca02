"""A histogram for many values at once shows what the client library's own would show."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from embedq_consumer.telemetry.lane_seconds import LaneSeconds
from tests.helpers.metric_values import sample_value

BOUNDS = (0.001, 0.5, 2.0)


@given(st.lists(st.lists(st.floats(0, 10) | st.sampled_from(BOUNDS))))
def test_it_counts_as_the_librarys_own_does(batches: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    many = LaneSeconds("seconds", "Seconds.", BOUNDS, ours)
    one = Histogram("seconds", "Seconds.", ["lane"], registry=theirs, buckets=BOUNDS)
    one.labels("bulk")
    for values in batches:
        many.observe("bulk", values)
        for value in values:
            one.labels("bulk").observe(value)
    for sample in (sample for family in theirs.collect() for sample in family.samples):
        if not sample.name.endswith("_created"):
            found = sample_value(ours, sample.name, sample.labels)
            assert found is not None
            assert abs(found - sample.value) < 1e-6
    assert sample_value(ours, "seconds_count", {"lane": "interactive"}) == 0
