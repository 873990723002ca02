"""Who goes next, and who may hold how much, when several clients want more than there is.

`rounds` says whose turn it is (deficit round robin), `fair_queue` is a queue in that order, and `turns` a lock. `parking` keeps
the records that wait to be started, which `starter` does: in turns, and while a client holds less than is left free.
"""

from embedq_consumer.fairness.fair_queue import FairQueue
from embedq_consumer.fairness.parking import Cost, Limits, Parking
from embedq_consumer.fairness.rounds import Flow, Rounds
from embedq_consumer.fairness.starter import Starter
from embedq_consumer.fairness.turns import Turns, TurnsByPlace

__all__ = ["Cost", "FairQueue", "Flow", "Limits", "Parking", "Rounds", "Starter", "Turns", "TurnsByPlace"]
