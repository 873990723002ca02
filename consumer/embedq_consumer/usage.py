"""What a process is told, by its environment and on its command line. Imports nothing heavy, so that a wrong setting and
`--help` are answered at once, and must be asked before anything imports PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from embedq_consumer.engine.loading import compile_cache
from embedq_consumer.settings import PREFIX, Settings, SettingsError
from embedq_shared.settings.words import described, help_text

_ABOUT: Final = (
    "Run one replica of the embedq service, or one for each of EMBEDQ_DEVICES, until SIGTERM or Ctrl-C. It takes no "
    "arguments; these are its environment variables. Exit codes: 0 after a stop, 1 after a failure, 2 for a wrong "
    "setting or a Kafka that refuses it."
)


def explain_usage(arguments: Sequence[str]) -> int:
    """Print the settings if asked to, and else that there are no arguments; the exit code."""
    if set(arguments) <= {"-h", "--help"}:
        print(help_text("python -m embedq_consumer", _ABOUT, described(Settings, PREFIX)))  # noqa: T201
        return 0
    print("embedq: expected no arguments; --help shows the settings", file=sys.stderr)  # noqa: T201
    return 2


def settings_from(environ: MutableMapping[str, str]) -> Settings | None:
    """The settings; None if one is wrong, which is printed."""
    try:
        return _keep_compiled(Settings.from_env(environ).named(), environ)
    except SettingsError as error:
        print(f"embedq: {error}", file=sys.stderr)  # noqa: T201  # the logs are not set up yet
        return None


def _keep_compiled(settings: Settings, environ: MutableMapping[str, str]) -> Settings:
    """`settings` with the full path of the compile cache, or with none.

    A directory that was asked for must be usable; the default one may be missing.

    Raises:
        SettingsError: the directory that was asked for cannot be made.
    """
    chosen = settings.compile_cache
    try:
        place = Path(chosen) if chosen else compile_cache.default_directory(environ)
        compile_cache.enable(place, environ)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        if chosen:
            raise SettingsError(
                f"EMBEDQ_COMPILE_CACHE: cannot make {chosen} ({type(error).__name__})"
            ) from error
        return settings
    return msgspec.structs.replace(settings, compile_cache=str(place))
