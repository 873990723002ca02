"""Which command comes next: from what was commanded before, and what the live replicas serve. Pure."""

from __future__ import annotations

import re
import uuid
from typing import Final

import msgspec

from embedq_sdk.errors import EmbedError, InvalidArgument
from embedq_shared.messages import Control, Quantization, Rollout, Status

__all__ = ["DEFAULT_WAVE", "NothingBefore", "checked_wave", "command_back", "next_command", "rollout_of"]

DEFAULT_WAVE: Final = "25%"
"""As Kubernetes has it: enough for speed, and three quarters go on serving as they did."""
_PERCENT: Final = re.compile(r"([1-9][0-9]?|100)%")
_WAVE_EXPECTED: Final = "a number of replicas of at least 1, a percentage from 1% to 100%, or None for all"


class NothingBefore(EmbedError):
    """There is nothing to take {alias} back to: {reason}"""

    alias: str
    reason: str


def next_command(command: Control, earlier: list[Control], live: list[Status]) -> Control:
    """The command with the next version, and with a fallback directory that is known to load.

    What live replicas follow counts, too: the control topic may have been deleted and made again, and their versions only rise.
    The fallback is the directory that all live replicas serve, if they say so. Else it is the current command's path if a live
    replica serves it (in a roll-out: if all do), else that command's own fallback.
    """
    followed = max((status.version or 0 for status in live), default=0)
    current = max(earlier, key=lambda record: record.version, default=None)
    fallback, quantization = _served_before(current, live)
    return msgspec.structs.replace(
        command,
        version=max(current.version if current else 0, followed) + 1,
        fallback=fallback,
        fallback_quantization=quantization,
    )


def _served_before(current: Control | None, live: list[Status]) -> tuple[str | None, Quantization | None]:
    """The directory that serves now, and how it is quantized (None: as the replicas' settings say)."""
    served = {status.path for status in live if status.serving}
    path = next(iter(served)) if len(served) == 1 else None
    if current is None:
        return path, None
    ready = [status.version == current.version and status.state == "READY" for status in live]
    through = any(ready) if current.rollout is None else ready != [] and all(ready)
    if through:
        return path or current.path, current.quantization
    return path or current.fallback, current.fallback_quantization


def command_back(alias: str, earlier: list[Control], live: list[Status]) -> Control:
    """The command that brings back what served before the current one.

    Raises:
        NothingBefore: that is not known, or a rollback brought it back already.
    """
    current = max(earlier, key=lambda record: record.version, default=None)
    if current is None:
        raise NothingBefore(alias=alias, reason="no command was ever written for it")
    if current.fallback is None:
        raise NothingBefore(
            alias=alias, reason=f"version {current.version} does not say what served before it"
        )
    if current.fallback == current.path:
        raise NothingBefore(
            alias=alias,
            reason=f"{current.path}, which version {current.version} names, is what served before it",
        )
    followed = max((status.version or 0 for status in live), default=0)
    return Control(
        alias=alias,
        version=max(current.version, followed) + 1,
        path=current.fallback,
        command_id=uuid.uuid4().hex,
        quantization=current.fallback_quantization,
        policy=current.policy,
        fallback=current.path,
        fallback_quantization=current.quantization,
        rollback_of=current.version,
        reason="embedq rollback",
    )


def checked_wave(max_unavailable: int | str | None) -> int | str | None:
    """The number of replicas, or their percentage."""
    percent = isinstance(max_unavailable, str) and _PERCENT.fullmatch(max_unavailable)
    whole = (
        isinstance(max_unavailable, int) and not isinstance(max_unavailable, bool) and max_unavailable >= 1
    )
    if not (percent or whole or max_unavailable is None):
        raise InvalidArgument(argument="max_unavailable", expected=_WAVE_EXPECTED, got=repr(max_unavailable))
    return max_unavailable


def rollout_of(wave: int | str | None, canary: bool, live: int) -> Rollout | None:
    """How so many live replicas follow a command."""
    if isinstance(wave, str):
        wave = max(1, live * int(wave.rstrip("%")) // 100)
    return None if wave is None and not canary else Rollout(max_unavailable=wave, canary=canary)
