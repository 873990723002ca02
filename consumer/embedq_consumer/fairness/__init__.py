"""Who goes next, and who may hold how much, when several clients want more than there is.

`rounds` says whose turn it is (deficit round robin), `fair_queue` is a queue in that order, `shares` bounds what each
client holds of a resource by what is left free, and `parking` joins the three for records that wait to be started, which `starter` does. `turns` is a lock in fair order.
"""

from embedq_consumer.fairness.fair_queue import FairQueue
from embedq_consumer.fairness.parking import Cost, Limits, Parking
from embedq_consumer.fairness.rounds import Flow, Rounds
from embedq_consumer.fairness.shares import Shares
from embedq_consumer.fairness.starter import Starter
from embedq_consumer.fairness.turns import Turns

__all__ = ["Cost", "FairQueue", "Flow", "Limits", "Parking", "Rounds", "Shares", "Starter", "Turns"]
