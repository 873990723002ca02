"""The soak time of a canary: how long it must serve without an error before others follow. Pure.

All of it follows from the last status of each replica, so that whoever joins late decides as the others do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embedq_shared.messages import Control, Status

__all__ = ["died_in_soak", "failed_in_soak", "has_stood", "is_done", "is_soaking"]


def is_done(command: Control, status: Status) -> bool:
    """Whether a replica serves what a command asks for."""
    ours = status.version == command.version and status.command_id in (None, command.command_id)
    return ours and status.state == "READY"


def has_stood(command: Control, live: Iterable[Status]) -> bool:
    """Whether one of the live replicas has served a command's model for the soak time without an error, or none is asked for.

    A replica that does not say for how long it serves, since it is older than this rule, has stood.
    """
    soak_s = _soak_s(command)
    return soak_s == 0 or any(is_done(command, status) and _stood(status, soak_s) for status in live)


def is_soaking(command: Control, status: Status) -> bool:
    """Whether a replica's last status is one of its soak time."""
    return is_done(command, status) and (status.served_s is not None and status.served_s < _soak_s(command))


def failed_in_soak(command: Control, live: Sequence[Status]) -> str | None:
    """Why the soak time has failed, by the live replicas' last statuses; None if it has not, or nobody waits for its end."""
    soak_s = _soak_s(command)
    if soak_s == 0 or not _is_under_way(command, live):
        return None
    for status in live:
        after = status.first_error_s
        if is_done(command, status) and after is not None and after < soak_s:
            return f"{status.replica}: a text got no vector {after:.0f} s after the new model began to serve"
    return None


def died_in_soak(command: Control, last: Status, live: Sequence[Status]) -> str | None:
    """Why the soak time has failed, if the replica whose last status this is has fallen silent, or died."""
    if not is_soaking(command, last) or not _is_under_way(command, live):
        return None
    return f"{last.replica}: fell silent in its soak time"


def _is_under_way(command: Control, live: Sequence[Status]) -> bool:
    """Whether others wait for the end of the soak time. One that failed as it started waits for nothing."""
    return not has_stood(command, live) and any(
        status.serving is not False
        and not is_done(command, status)
        and not (status.version == command.version and status.state == "FAILED")
        for status in live
    )


def _stood(status: Status, soak_s: float) -> bool:
    if status.served_s is None:
        return True
    clean = status.first_error_s is None or status.first_error_s >= soak_s
    return clean and status.served_s >= soak_s


def _soak_s(command: Control) -> float:
    rollout = command.rollout
    return 0.0 if rollout is None or not rollout.canary else rollout.soak_s or 0.0
