"""A model is loaded, checked, swapped in while nothing is in flight, and reported on the status topic."""

from embedq_consumer.lifecycle.control_topic import ControlTopic
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.model_slot import ModelSlot, NoModel
from embedq_consumer.lifecycle.served_model import BatchOptions, ModelOptions, ServedModel
from embedq_consumer.lifecycle.served_models import AliasOptions, ServedModels

__all__ = [
    "AliasOptions",
    "BatchOptions",
    "ControlTopic",
    "ModelOptions",
    "ModelRejected",
    "ModelSlot",
    "NoModel",
    "ServedModel",
    "ServedModels",
]
