"""Every metric of the service, in one list. Each is counted where it happens; no label has values that users choose."""

from __future__ import annotations

from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
)

from embedq_consumer.telemetry.lane_seconds import LaneSeconds
from embedq_shared.messages import ErrorCode, ResultStatus
from embedq_shared.topics import LANES

_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
_RELOAD_SECONDS = (
    0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 900.0,
)  # fmt: skip
"""From a small model on a warm disk to the default of EMBEDQ_LOAD_TIMEOUT_S; 15 s is what an alert watches."""
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics in a registry of their own, so that a test or a second service in one process starts from zero."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"embedq_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"embedq_{name}", help, labels, registry=registry)

        def seconds(name: str, help: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"embedq_{name}_seconds", help, labels, registry=registry, buckets=buckets)

        def lane_seconds(name: str, help: str) -> LaneSeconds:
            return LaneSeconds(f"embedq_{name}_seconds", help, _SECONDS, registry)

        # Intake
        self.records = counter("records_total", "Job records polled.", "lane")
        self.jobs = counter("jobs_total", "Jobs answered, by the status of their result.", "lane", "status")
        self.inputs = counter("inputs_total", "Texts answered with a vector.", "lane")
        self.errors = counter("errors_total", "Jobs and single inputs that failed, by error code.", "code")
        self.deduplicated = counter(
            "deduplicated_total", "Texts that shared the computation of an equal text under way."
        )
        self.truncated = counter("truncated_total", "Texts that were cut, as their job allowed.")
        self.dead_letters = counter(
            "dead_letters_total", "Records copied to the dead-letter topic, by error code.", "code"
        )
        self.retries = counter(
            "retries_total",
            "Bulk jobs that wait in a retry topic instead of being answered, by tier and error code.",
            "tier",
            "reason",
        )
        self.in_flight_jobs = gauge("in_flight_jobs", "Jobs accepted and not yet finished.", "lane")
        self.in_flight_bytes = gauge(
            "in_flight_bytes", "Bytes of the jobs that are accepted and not yet finished.", "lane"
        )
        self.parked_jobs = gauge(
            "parked_jobs", "Of these, jobs that wait undecoded until their client may start them.", "lane"
        )
        self.paused = gauge("paused", "1 while the lane is full and takes no records.", "lane")
        self.lag = gauge(
            "lag_records",
            "Records between the committed offset and the end of the partition.",
            "topic",
            "partition",
        )
        self.overtaken = gauge(
            "overtaken_seconds",
            "For how long the first unfinished record of a partition has been overtaken by later ones, at most.",
        )
        self.commits = counter("commits_total", "Offset commits: ok, error, fenced.", "outcome")
        self.rebalances = counter("rebalances_total", "Partition assignments received.")
        self.topics_remade = counter(
            "topics_remade_total",
            "Jobs topics that were found to be deleted and made again under their name.",
        )
        self.deleted_unread = counter(
            "deleted_unread_records_total",
            "Records that Kafka deleted, by age or size, before any replica had read them.",
            "topic",
        )
        self.assigned = gauge("assigned_partitions", "Partitions that this replica reads.")

        # Quarantine
        self.deaths = counter(
            "deaths_total", "Partitions taken over from a process that ended without giving them up."
        )
        self.suspected_partitions = gauge(
            "suspected_partitions",
            "Partitions of this replica with records that may have killed a process, which run in groups or alone.",
        )

        # Stages of a job
        self.queue = lane_seconds("queue", "From the poll of a job to the start of its micro-batch.")
        self.tokenize = seconds("tokenize", "Tokenizing the texts of one poll.")
        self.compute = seconds("compute", "Running one micro-batch.")
        self.publish = seconds("publish", "From encoding results to the broker's acknowledgement.")
        self.job = lane_seconds("job", "From the poll of a job to its acknowledged result.")

        # Micro-batches
        self.batch_tokens = Histogram(
            "embedq_batch_tokens", "Tokens in a micro-batch.", registry=registry, buckets=_TOKENS
        )
        self.batch_items = Histogram(
            "embedq_batch_items", "Texts in a micro-batch.", registry=registry, buckets=_ITEMS
        )
        self.batch_fill = Histogram(
            "embedq_batch_fill_ratio",
            "Tokens in a micro-batch over the token budget.",
            registry=registry,
            buckets=(0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0),
        )
        self.batch_budget = gauge(
            "batch_budget_tokens", "Tokens that a micro-batch may hold; lowered when device memory runs out."
        )
        self.batch_splits = counter("batch_splits_total", "Micro-batches halved after they failed.")
        self.tokens = counter("tokens_total", "Tokens run through the model.")
        self.waiting_tokens = gauge("waiting_tokens", "Tokens waiting for a micro-batch.", "lane")

        # Cache
        self.cache = counter(
            "cache_lookups_total", "Cache look-ups: hit, miss, corrupt, error, bypass.", "outcome"
        )
        self.cache_corrupt = counter(
            "cache_corrupt_total",
            "Entries in Redis that were not believed: of the wrong size, of another format, not signed with our key, or "
            "values that no vector of length 1 has.",
            "reason",
        )
        self.cache_failures = counter(
            "cache_failures_total",
            "Round trips to Redis that failed: timeout, connection, tls, password, permission, protocol, refused.",
            "reason",
        )
        self.cache_writes = counter("cache_writes_total", "Cache writes: ok, error, bypass.", "outcome")
        self.cache_warmed = counter(
            "cache_warmed_total",
            "Vectors that a model was to have ready in the cache before it served: computed, found there already, left as time ran "
            "out, failed.",
            "outcome",
        )
        self.cache_seconds = seconds(
            "cache", "One round trip to Redis, by operation: ping, get, put.", "operation"
        )
        self.cache_open = gauge(
            "cache_breaker_open",
            "1 while the circuit breaker keeps the cache from asking Redis.",
        )

        # Results
        self.results = counter(
            "results_total", "Records acknowledged by the brokers: results, dead letters and status."
        )
        self.result_bytes = counter("result_bytes_total", "Bytes of their values.")
        self.producer_restarts = counter(
            "producer_restarts_total", "Kafka producers replaced after an error."
        )

        # Model
        self.model = Info(
            "embedq_model", "The model that serves an alias of the replica.", ["alias"], registry=registry
        )
        self.reloads = counter(
            "reloads_total", "Control records: ready, failed, superseded, ignored.", "outcome"
        )
        self.reload_seconds = seconds(
            "reload",
            "A whole reload, from its command to its outcome: ready, failed, superseded.",
            "outcome",
            buckets=_RELOAD_SECONDS,
        )
        self.reload_running = gauge(
            "reload_running_seconds",
            "For how long the reload under way has been running; 0 while there is none.",
        )
        self.reload_step_seconds = seconds(
            "reload_step", "Time spent in each step of a reload.", "step", buckets=_RELOAD_SECONDS
        )
        self.gpu_used = gauge(
            "gpu_memory_used_bytes", "Memory of the GPU that is taken, by anybody; 0 on a CPU."
        )
        self.gpu_total = gauge("gpu_memory_total_bytes", "Memory of the GPU; 0 on a CPU.")
        self.gpu_reserved = gauge(
            "gpu_memory_reserved_bytes", "Memory of the GPU that this process holds, in use or not."
        )
        self.gpu_peak = gauge(
            "gpu_memory_peak_bytes", "The most memory of the GPU that this process had in use at once."
        )
        self.ready = gauge("ready", "1 while the replica takes jobs.")
        self.heartbeat_age = gauge(
            "loop_heartbeat_age_seconds", "Age of the last heartbeat of the slowest loop."
        )

        # Every series exists from the start, at 0: Prometheus sees no increase in a series that begins at 1.
        for lane in LANES:
            self.records.labels(lane)
            for status in get_args(ResultStatus):
                self.jobs.labels(lane, status)
        for code in get_args(ErrorCode):
            self.errors.labels(code)
            self.dead_letters.labels(code)
        for outcome in ("ready", "failed", "superseded", "ignored"):
            self.reloads.labels(outcome)
        for outcome in ("ready", "failed", "superseded"):
            self.reload_seconds.labels(outcome)
        for outcome in ("ok", "error", "fenced"):
            self.commits.labels(outcome)
        for outcome in ("hit", "miss", "corrupt", "error", "bypass"):
            self.cache.labels(outcome)
        for outcome in ("ok", "error", "bypass"):
            self.cache_writes.labels(outcome)
        for outcome in ("computed", "found", "left", "failed"):
            self.cache_warmed.labels(outcome)
        for reason in ("size", "format", "signature", "values"):
            self.cache_corrupt.labels(reason)
        for reason in ("timeout", "connection", "tls", "password", "permission", "protocol", "refused"):
            self.cache_failures.labels(reason)
