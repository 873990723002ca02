"""Which command comes next: from what was commanded before, and what the live replicas serve. Pure."""

from __future__ import annotations

import re
import uuid
from typing import Final, get_args

import msgspec

from embedq_sdk.errors import EmbedError, InvalidArgument
from embedq_shared.messages import (
    DEFAULT_ALIAS,
    MAX_INTEGER,
    MAX_SOAK_S,
    Control,
    Policy,
    Quantization,
    Rollout,
    Status,
)
from embedq_shared.topics import DEFAULT_POOL, pool_named

__all__ = [
    "DEFAULT_WAVE",
    "NothingBefore",
    "UnexpectedVersion",
    "check_alias",
    "checked_command",
    "checked_pool",
    "checked_soak",
    "checked_version",
    "checked_wave",
    "command_back",
    "home_of",
    "next_command",
    "refuse_unexpected",
    "rollout_of",
]

DEFAULT_WAVE: Final = "25%"
"""As Kubernetes has it: enough for speed, and three quarters go on serving as they did."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_ALIAS_CHARS: Final = 256
_MAX_PATH_CHARS: Final = 4096
_PERCENT: Final = re.compile(r"([1-9][0-9]?|100)%")
_WAVE_EXPECTED: Final = "a number of replicas of at least 1, a percentage from 1% to 100%, or None for all"


class NothingBefore(EmbedError):
    """There is nothing to take {alias} back to: {reason}"""

    alias: str
    reason: str


class UnexpectedVersion(EmbedError):
    """Version {version} of {alias} is in force, not {expected}: nothing was written"""

    alias: str
    version: int
    expected: int


# More than six parameters: the fields of a command, each by its name.
def checked_command(
    path: str,
    alias: str,
    *,
    digest: str | None = None,
    policy: Policy | None = None,
    quantization: Quantization | None = None,
    min_cosine: float | None = None,
    golden: str | None = None,
    golden_min_cosine: float | None = None,
    min_dimensions: int | None = None,
) -> Control:
    """The command, checked, but for its version.

    Raises:
        InvalidArgument: a field cannot be used.
    """
    _check_text("path", path, _MAX_PATH_CHARS)
    check_alias(alias)
    if golden is not None:
        _check_text("golden", golden, _MAX_PATH_CHARS)
    if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise InvalidArgument(
            argument="digest", expected="sha256: and 64 lower-case hex digits", got="something else"
        )
    _check_choice("policy", policy, get_args(Policy))
    _check_choice("quantization", quantization, get_args(Quantization))
    if min_dimensions is not None:
        _check_count("min_dimensions", min_dimensions, least=1)
    return Control(
        alias=alias,
        version=1,
        path=path,
        command_id=uuid.uuid4().hex,
        digest=digest,
        policy=policy,
        quantization=quantization,
        min_cosine=_cosine("min_cosine", min_cosine),
        golden=golden,
        golden_min_cosine=_cosine("golden_min_cosine", golden_min_cosine),
        min_dimensions=min_dimensions,
    )


def check_alias(alias: object) -> None:
    """
    Raises:
        InvalidArgument: it is no alias.
    """
    _check_text("alias", alias, _MAX_ALIAS_CHARS)


def checked_pool(pool: str | None) -> str | None:
    """The pool of this name; None for the default one, which is also what no name means.

    Raises:
        InvalidArgument: no pool can have this name.
    """
    if pool is None:
        return None
    if not isinstance(pool, str):
        raise InvalidArgument(argument="pool", expected="a name, or None", got=type(pool).__name__)
    try:
        return pool_named(pool)
    except ValueError as error:
        raise InvalidArgument(argument="pool", expected=str(error), got=repr(pool[:80])) from None


def home_of(alias: str, asked: str | None, earlier: list[Control], live: list[Status]) -> str | None:
    """The pool that a command for an alias is for: the one that was asked for, else that of its current command, else that whose
    replicas serve it; None for the default one.

    Raises:
        InvalidArgument: replicas of several pools serve it and nobody says which one is meant; or the alias can't live there.
    """
    pools = {status.pool for status in live}
    current = max(earlier, key=lambda record: record.version, default=None)
    if asked is not None:
        pool = checked_pool(asked)
    elif current is not None:
        pool = current.pool
    elif len(pools) > 1:
        names = ", ".join(sorted(pool or DEFAULT_POOL for pool in pools))
        raise InvalidArgument(
            argument="pool", expected=f"one of {names}, whose replicas serve {alias}", got="none"
        )
    else:
        pool = next(iter(pools), None)
    if pool is not None and alias == DEFAULT_ALIAS:
        expected = f"{DEFAULT_POOL} for the alias {alias}, since jobs that name no model go there"
        raise InvalidArgument(argument="pool", expected=expected, got=repr(pool))
    return pool


def checked_version(expected: int | None) -> int | None:
    """The version that must be in force, 0 for none at all; None: whichever."""
    if expected is not None:
        _check_count("expected_version", expected, least=0)
    return expected


def refuse_unexpected(alias: str, expected: int | None, earlier: list[Control]) -> None:
    """
    Raises:
        UnexpectedVersion: another command is in force than the one that is expected.
    """
    version = max((command.version for command in earlier), default=0)
    if expected not in (None, version):
        raise UnexpectedVersion(alias=alias, version=version, expected=expected)


def _check_text(name: str, value: object, most: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        got = f"{len(value):,}" if isinstance(value, str) else type(value).__name__
        raise InvalidArgument(argument=name, expected=f"a string of 1 to {most:,} characters", got=got)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise InvalidArgument(
            argument=name, expected=f"one of {', '.join(choices)}, or None", got=repr(value)
        )


def _check_count(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_INTEGER:
        raise InvalidArgument(argument=name, expected=f"an integer of at least {least}", got=repr(value))


def _cosine(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1 <= value <= 1:
        raise InvalidArgument(argument=name, expected="a number from -1 to 1", got=repr(value))
    return float(value)


def next_command(command: Control, earlier: list[Control], live: list[Status]) -> Control:
    """The command with the next version, and with a fallback directory that is known to load.

    What live replicas of any pool follow counts, too: the control topic may have been deleted and made again, and their versions only
    rise. The fallback is the directory that all live replicas of the command's pool serve, if they say so. Else it is the current
    command's path if a live replica serves it (in a roll-out: if all do), else that command's own fallback; if that is of this pool.
    """
    followed = max((status.version or 0 for status in live), default=0)
    current = max(earlier, key=lambda record: record.version, default=None)
    before = current if current is not None and current.pool == command.pool else None
    fallback, quantization = _served_before(
        before, [status for status in live if status.pool == command.pool]
    )
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
    """The command that brings back what served before the current one, in its pool: an alias that has moved does not move back.

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
        pool=current.pool,
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


def checked_soak(soak: float, canary: bool) -> float | None:
    """Seconds that the canary must serve before others follow; None for none."""
    if isinstance(soak, bool) or not isinstance(soak, (int, float)) or not 0 <= soak <= MAX_SOAK_S:
        raise InvalidArgument(argument="soak", expected=f"seconds from 0 to {MAX_SOAK_S:.0f}", got=repr(soak))
    if soak and not canary:
        raise InvalidArgument(argument="soak", expected="0 without a canary", got=repr(soak))
    return float(soak) or None


def rollout_of(
    wave: int | str | None, canary: bool, live: int, soak_s: float | None = None
) -> Rollout | None:
    """How so many live replicas follow a command."""
    if isinstance(wave, str):
        wave = max(1, live * int(wave.rstrip("%")) // 100)
    if wave is None and not canary:
        return None
    return Rollout(max_unavailable=wave, canary=canary, soak_s=soak_s)
