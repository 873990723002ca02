"""`embedq gateway`: the HTTP gateway, as a command.

A plug-in of the command line (entry point `embedq.commands`), whose help needs this file: so it imports what serves only when
it serves.
"""

from __future__ import annotations

import os
import sys
from typing import Final

import click

from embedq_gateway.keys.command import keys
from embedq_gateway.settings import PREFIX, GatewaySettings, SettingsError, kafka_settings
from embedq_shared.settings.words import described, settings_text

WRONG_SETTING: Final = 2


class _WithSettings(click.Group):
    """A command whose help lists its environment variables."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\nEnvironment variables, beside EMBEDQ_KAFKA_… and EMBEDQ_TOPIC_PREFIX:\n")
        formatter.write("\n".join(settings_text(described(GatewaySettings, PREFIX))) + "\n")


@click.group(cls=_WithSettings, invoke_without_command=True)
@click.option("--host", help=f"Instead of {PREFIX}HOST.")
@click.option("--port", type=click.IntRange(0, 65535), help=f"Instead of {PREFIX}PORT.")
@click.option("--workers", type=click.IntRange(1), help=f"Instead of {PREFIX}WORKERS.")
@click.pass_context
def gateway(context: click.Context, host: str | None, port: int | None, workers: int | None) -> None:
    """Serve OpenAI's embeddings interface, and others, over HTTP.

    Runs until SIGTERM or Ctrl-C, and then answers what it has accepted. Exit codes: 0 after a stop, 1 after a failure, 2 for a
    wrong setting.
    """
    if context.invoked_subcommand is not None:
        return
    given = {"HOST": host, "PORT": port, "WORKERS": workers}
    # The processes that serve read the environment, too.
    os.environ.update({f"{PREFIX}{name}": str(value) for name, value in given.items() if value is not None})
    try:
        settings = GatewaySettings.from_env(os.environ)
        kafka_settings(os.environ)
        from embedq_gateway.serving import serve

        code = serve(settings)
    except SettingsError as error:
        _say(str(error))
        code = WRONG_SETTING
    except ModuleNotFoundError as missing:
        _say(f"gateway needs {missing.name}: pip install 'embedq[gateway]'")
        code = WRONG_SETTING
    sys.exit(code)


gateway.add_command(keys)


def _say(line: str) -> None:
    click.echo(f"embedq: {line}", err=True)
