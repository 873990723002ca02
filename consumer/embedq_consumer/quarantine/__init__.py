"""Records that may have killed a process are counted across crashes, run alone, and at last not run any more."""

from embedq_consumer.quarantine.custody import Claimant
from embedq_consumer.quarantine.quarantine import Quarantine
from embedq_consumer.quarantine.suspects import Suspects

__all__ = ["Claimant", "Quarantine", "Suspects"]
