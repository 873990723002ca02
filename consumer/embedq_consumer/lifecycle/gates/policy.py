"""Whether a new model is loaded beside the old one or in its place, by what its device has free. Pure."""

from __future__ import annotations

from embedq_consumer.engine import Inspection
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_shared.messages import Policy

__all__ = ["choose_policy"]


def choose_policy(wanted: Policy | None, found: Inspection, serving_bytes: int) -> Policy:
    """The policy of a reload: that of the command, else beside the old model if there is room for both.

    `serving_bytes` are what the device gets back when the old model goes. What is needed is a lower bound, so that nothing is
    refused that could run; where it says too little, the trial finds out, and the old model serves.

    Raises:
        ModelRejected: the model cannot fit. The message gives the arithmetic.
    """
    beside = found.needed <= found.free
    if wanted == "availability_preserving" and not beside:
        raise ModelRejected(
            f"memory: needs {_gb(found.needed)} at least beside the old model; {found.device} has {_gb(found.free)} free of "
            f"{_gb(found.total)}; the policy resource_preserving unloads the old model first"
        )
    if not beside and found.needed > found.free + serving_bytes:
        raise ModelRejected(
            f"memory: needs {_gb(found.needed)} at least; {found.device} has {_gb(found.free)} free of {_gb(found.total)}, and "
            f"{_gb(serving_bytes)} more without the old model"
        )
    if wanted is not None:
        return wanted
    return "availability_preserving" if beside else "resource_preserving"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
