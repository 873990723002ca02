"""Beside the old model if there is room for both, else in its place; and refused, with the arithmetic, if there is room for neither."""

from __future__ import annotations

import pytest

from embedq_consumer.engine import Inspection
from embedq_consumer.lifecycle.gates.checks import ModelRejected
from embedq_consumer.lifecycle.gates.policy import choose_policy
from embedq_shared.messages import Policy

GB = 10**9
BESIDE: Policy = "availability_preserving"
IN_PLACE: Policy = "resource_preserving"


def device(needed: int, free: int) -> Inspection:
    return Inspection(needed=needed * GB, free=free * GB, total=80 * GB, device="cuda:0", hidden_size=None)


@pytest.mark.parametrize(
    ("wanted", "needed", "free", "serving", "chosen"),
    [
        (None, 8, 8, 0, BESIDE),
        (None, 9, 8, 1, IN_PLACE),
        (BESIDE, 8, 8, 8, BESIDE),
        (IN_PLACE, 8, 8, 8, IN_PLACE),
        (IN_PLACE, 16, 8, 8, IN_PLACE),
        (IN_PLACE, 1, 8, 0, IN_PLACE),
    ],
)
def test_the_command_decides_and_else_what_is_free(
    wanted: Policy | None, needed: int, free: int, serving: int, chosen: Policy
) -> None:
    assert choose_policy(wanted, device(needed, free), serving * GB) == chosen


def test_a_command_that_wants_both_models_at_once_is_told_what_would_do() -> None:
    with pytest.raises(ModelRejected) as refused:
        choose_policy(BESIDE, device(9, 8), 8 * GB)
    assert str(refused.value) == (
        "memory: needs 9.0 GB at least beside the old model; cuda:0 has 8.0 GB free of 80.0 GB; the policy "
        "resource_preserving unloads the old model first"
    )


@pytest.mark.parametrize("wanted", [None, IN_PLACE])
def test_a_model_that_does_not_fit_without_the_old_one_either_is_refused(wanted: Policy | None) -> None:
    with pytest.raises(ModelRejected) as refused:
        choose_policy(wanted, device(17, 8), 8 * GB)
    assert str(refused.value) == (
        "memory: needs 17.0 GB at least; cuda:0 has 8.0 GB free of 80.0 GB, and 8.0 GB more without the old model"
    )
