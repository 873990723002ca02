"""What a metric shows now."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry


def sample_value(
    registry: CollectorRegistry, name: str, labels: Mapping[str, str] | None = None
) -> float | None:
    """The value of one sample, or None if there is none of that name and these labels.

    The registry itself makes the samples of all its metrics to find it, for most of a millisecond, and a test that waits for a value
    asks hundreds of times. It need not where it knows by name who has it.
    """
    wanted = dict(labels or {})
    for metric in registry.restricted_registry([name]).collect():
        for sample in metric.samples:
            if sample.name == name and sample.labels == wanted:
                return sample.value
    return registry.get_sample_value(name, wanted)
