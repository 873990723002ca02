"""How a command runs and ends. Exit codes: 0 success, 1 something failed, 2 wrong usage or no answer in time, 3 no Kafka, 4 a reload
failed and left replicas with different models."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from typing import Any, Final

import click

from embedq_sdk.cli.text_sources import BadSource
from embedq_sdk.errors import EmbedError, InvalidArgument, KafkaUnavailable

FAILED: Final = 1
NO_ANSWER: Final = 2
NO_KAFKA: Final = 3
MIXED: Final = 4


def run(work: Coroutine[Any, Any, int]) -> None:
    """Run a command and exit with its code. What a user can put right is reported in one line, never as a traceback."""
    import asyncio

    try:
        code = asyncio.run(work)
    except KafkaUnavailable as error:
        say(str(error))
        code = NO_KAFKA
    except (InvalidArgument, BadSource) as error:
        say(str(error))
        code = NO_ANSWER
    except EmbedError as error:
        say(str(error))
        code = FAILED
    except BrokenPipeError:
        raise  # whoever read our output has enough; click ends quietly
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        code = FAILED
    sys.exit(code)


def say(line: str) -> None:
    """A line for the user, apart from the output."""
    click.echo(f"embedq: {line}", err=True)
