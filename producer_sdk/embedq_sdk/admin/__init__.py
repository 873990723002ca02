"""What operators do: reload a model, take it back, see the status, create the topics."""

from __future__ import annotations

from embedq_sdk.admin.commands import NothingBefore, UnexpectedVersion
from embedq_sdk.admin.control import (
    LaneLag,
    LostRace,
    ServiceStatus,
    live_replicas,
    reload_model,
    rollback_model,
    service_status,
)
from embedq_sdk.admin.rollout import ReplicaView, RolloutUpdate
from embedq_sdk.admin.topics import TopicReport, create_topics

__all__ = [
    "LaneLag",
    "LostRace",
    "NothingBefore",
    "ReplicaView",
    "RolloutUpdate",
    "ServiceStatus",
    "TopicReport",
    "UnexpectedVersion",
    "create_topics",
    "live_replicas",
    "reload_model",
    "rollback_model",
    "service_status",
]
