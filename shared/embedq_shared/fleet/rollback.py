"""The command that takes back a command."""

from __future__ import annotations

from typing import Final

import msgspec

from embedq_shared.messages import Control

_SUFFIX: Final = "-rollback"
_MOST_ID_CHARS: Final = 256 - len(_SUFFIX)
_MOST_REASON_CHARS: Final = 1000
"""Of what people read; the status of the replica that failed has it whole."""


def rollback_of(command: Control, reason: str) -> Control | None:
    """The next command, which brings back what served before this one; None if that is not known, or if this one is such a command.

    All but `reason` follows from the command alone, so it does not matter who writes it, nor how many do: their records are
    repeats of one command.
    """
    if command.rollback_of is not None or command.fallback is None:
        return None
    rollout = command.rollout
    return Control(
        alias=command.alias,
        version=command.version + 1,
        path=command.fallback,
        command_id=command.command_id[:_MOST_ID_CHARS] + _SUFFIX,
        quantization=command.fallback_quantization,
        policy=command.policy,
        pool=command.pool,
        rollout=None if rollout is None else msgspec.structs.replace(rollout, canary=False, soak_s=None),
        fallback=command.fallback,
        fallback_quantization=command.fallback_quantization,
        rollback_of=command.version,
        reason=reason[:_MOST_REASON_CHARS],
    )
