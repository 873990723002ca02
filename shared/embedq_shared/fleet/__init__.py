"""How replicas of one alias agree on a roll-out, by the order of their records on the status topic; which jobs of an alias are
another one's, and which pool's. Pure: time is an argument."""

from embedq_shared.fleet.board import StatusBoard, is_live
from embedq_shared.fleet.rollback import rollback_of
from embedq_shared.fleet.routes import Routes
from embedq_shared.fleet.soak import died_in_soak, failed_in_soak, has_stood, is_soaking
from embedq_shared.fleet.splits import Splits, share_of
from embedq_shared.fleet.turns import Turns, failed_in_turn

__all__ = [
    "Routes",
    "Splits",
    "StatusBoard",
    "Turns",
    "died_in_soak",
    "failed_in_soak",
    "failed_in_turn",
    "has_stood",
    "is_live",
    "is_soaking",
    "rollback_of",
    "share_of",
]
