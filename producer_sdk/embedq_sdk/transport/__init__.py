"""Jobs out, replies in: what a client does between a caller's texts and Kafka."""

from __future__ import annotations

from embedq_sdk.transport.job_runner import Deadline, JobRunner, JobTransport
from embedq_sdk.transport.kafka import KafkaConnection
from embedq_sdk.transport.kafka_transport import KafkaTransport
from embedq_sdk.transport.lifetime import Lifetime
from embedq_sdk.transport.pending_jobs import PendingJob

__all__ = [
    "Deadline",
    "JobRunner",
    "JobTransport",
    "KafkaConnection",
    "KafkaTransport",
    "Lifetime",
    "PendingJob",
]
