"""Membership of the consumer group: which partitions are ours, how they change hands, how far they are committed."""

from embedq_consumer.group.commits import GroupCommits
from embedq_consumer.group.deletions import DeletionWatch
from embedq_consumer.group.hand_over import HandOver
from embedq_consumer.group.member import Member, OffsetStore, make_member
from embedq_consumer.group.offset_committer import Custodian, OffsetCommitter
from embedq_consumer.group.offsets import OffsetLedger, Ticket
from embedq_consumer.group.ownership import Ownership
from embedq_consumer.group.topic_watch import TopicWatch
from embedq_consumer.group.watch import WatermarkWatch
from embedq_consumer.group.watermark import Overtaken

__all__ = [
    "Custodian",
    "DeletionWatch",
    "GroupCommits",
    "HandOver",
    "Member",
    "OffsetCommitter",
    "OffsetLedger",
    "OffsetStore",
    "Overtaken",
    "Ownership",
    "Ticket",
    "TopicWatch",
    "WatermarkWatch",
    "make_member",
]
