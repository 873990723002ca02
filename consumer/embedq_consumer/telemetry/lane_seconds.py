"""A histogram for values that come by the hundred."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from embedq_shared.topics import LANES, Lane


class LaneSeconds(Collector):
    """Seconds by lane. The client library's own histogram takes two locks for each value, which is a part of what a cached job
    costs; here many are noted in one call. Written on the event loop alone, and read in another thread.
    """

    def __init__(self, name: str, help: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """`bounds` are upper bounds, in order."""
        self.name = name
        self._help = help
        self._bounds = tuple(bounds)
        self._counts: dict[Lane, list[int]] = {lane: [0] * (len(bounds) + 1) for lane in LANES}
        self._sums: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
        registry.register(self)

    def observe(self, lane: Lane, seconds: Collection[float]) -> None:
        """Note these."""
        counts, bounds = self._counts[lane], self._bounds
        for value in seconds:
            counts[bisect_left(bounds, value)] += 1
        self._sums[lane] += sum(seconds)

    def collect(self) -> Iterator[Metric]:
        """What the metrics page shows."""
        family = HistogramMetricFamily(self.name, self._help, labels=["lane"])
        for lane in LANES:
            total = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*self._bounds, float("inf")), self._counts[lane], strict=True):
                total += count
                buckets.append((floatToGoString(bound), total))
            family.add_metric([lane], buckets, self._sums[lane])
        yield family
