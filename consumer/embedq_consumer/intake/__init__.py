"""Records come in from Kafka, become jobs or rejections, and their offsets are kept until they are answered."""

from embedq_consumer.intake.admission import AdmissionPolicy, PartitionCount, Rejection, UnknownAddress
from embedq_consumer.intake.jobs import InputVector, JobState, Outcome, Request, Span, Spans, input_param
from embedq_consumer.intake.jobs_consumer import IntakeOptions, JobsClients, make_jobs_clients
from embedq_consumer.intake.poll_loop import Intake
from embedq_consumer.intake.records import Record
from embedq_consumer.intake.result_sizes import cost_of, datum_bytes, fixed_bytes, held_bytes

__all__ = [
    "AdmissionPolicy",
    "InputVector",
    "Intake",
    "IntakeOptions",
    "JobState",
    "JobsClients",
    "Outcome",
    "PartitionCount",
    "Record",
    "Rejection",
    "Request",
    "Span",
    "Spans",
    "UnknownAddress",
    "cost_of",
    "datum_bytes",
    "fixed_bytes",
    "held_bytes",
    "input_param",
    "make_jobs_clients",
]
