"""Who goes next, and who may hold how much, when several clients want more than there is.

`rounds` says whose turn it is (deficit round robin), `fair_queue` is a queue in that order, and `turns` a lock. `parking` keeps
the records that wait to be started, which `starter` does: in turns, and while a client holds less than is left free.
`traffic` says whether interactive work came lately; as long as it does, all that is bulk has its turns on the event loop
(`bulk_turns`).
"""

from embedq_consumer.fairness.bulk_turns import BulkTurns
from embedq_consumer.fairness.fair_queue import FairQueue
from embedq_consumer.fairness.parking import Cost, Limits, Parking
from embedq_consumer.fairness.rounds import Flow, Rounds
from embedq_consumer.fairness.starter import Starter
from embedq_consumer.fairness.traffic import InteractiveTraffic
from embedq_consumer.fairness.turns import Turns, TurnsByPlace

__all__ = [
    "BulkTurns",
    "Cost",
    "FairQueue",
    "Flow",
    "InteractiveTraffic",
    "Limits",
    "Parking",
    "Rounds",
    "Starter",
    "Turns",
    "TurnsByPlace",
]
