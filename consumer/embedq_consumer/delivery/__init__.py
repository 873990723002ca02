"""Outcomes become result records, are acknowledged by the brokers, and only then is a job's record finished."""

from embedq_consumer.delivery.deliverer import FEW_INPUTS, Deliverer, Finish, Sink, large
from embedq_consumer.delivery.postprocess import assembled_outcomes_of, outcomes_of
from embedq_consumer.delivery.result_records import ResultEncoder

__all__ = [
    "FEW_INPUTS",
    "Deliverer",
    "Finish",
    "ResultEncoder",
    "Sink",
    "assembled_outcomes_of",
    "large",
    "outcomes_of",
]
