"""What operators do: reload a model, see the status, create the topics."""

from __future__ import annotations

from embedq_sdk.admin.control import LaneLag, LostRace, ServiceStatus, reload_model, service_status
from embedq_sdk.admin.rollout import RolloutUpdate
from embedq_sdk.admin.topics import TopicReport, create_topics

__all__ = [
    "LaneLag",
    "LostRace",
    "RolloutUpdate",
    "ServiceStatus",
    "TopicReport",
    "create_topics",
    "reload_model",
    "service_status",
]
