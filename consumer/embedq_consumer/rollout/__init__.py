"""This replica's part in roll-outs: it takes its turn, and takes back what has failed."""

from embedq_consumer.rollout.member import FleetMember
from embedq_consumer.rollout.status_topic import StatusTopic

__all__ = ["FleetMember", "StatusTopic"]
