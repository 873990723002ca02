"""`embedq pull`: the only command that fetches a model; the service never does."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from embedq_sdk.cli.running import FAILED, NO_ANSWER, say


@click.command()
@click.argument("id")
@click.option("--revision", help="A branch, a tag or a commit. Default: main.")
@click.option("--name", help="The directory below the model root. Default: ID.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="EMBEDQ_MODEL_ROOT",
    show_envvar=True,
    help="The model root. Default: where EMBEDQ_MODEL lies.",
)
@click.option("--endpoint", envvar="HF_ENDPOINT", show_envvar=True, help="Another hub's address.")
def pull(id: str, revision: str | None, name: str | None, root: Path | None, endpoint: str | None) -> None:
    """Fetch the model ID, such as Qwen/Qwen3-Embedding-0.6B, from the Hugging Face Hub into the model root.

    Weights in safetensors, configuration and tokenizer, each checked by the hub's digest and noted in embedq_manifest.json. The
    directory appears when it is whole. Where it is there already, its files are compared with the manifest, and the hub is not
    asked. A private or gated model needs HF_TOKEN.

    Exit code 0: it is there. 1: it is not. 2: wrong usage.
    """
    from embedq_sdk.errors import InvalidArgument
    from embedq_sdk.hub import PullFailed
    from embedq_sdk.hub import pull as fetch
    from embedq_sdk.hub.pulling import default_root

    root = root or default_root()
    if root is None:
        say("expected --root, or EMBEDQ_MODEL_ROOT or EMBEDQ_MODEL in the environment")
        sys.exit(NO_ANSWER)
    try:
        pulled = fetch(
            id, root, revision=revision, name=name, endpoint=endpoint, tell=lambda line: click.echo(line)
        )
    except InvalidArgument as error:
        say(str(error))
        sys.exit(NO_ANSWER)
    except PullFailed as error:
        say(str(error))
        sys.exit(FAILED)
    what = "pulled" if pulled.fetched else "is there already, unchanged"
    click.echo(
        f"{pulled.name} at {pulled.manifest.revision} {what}: {len(pulled.manifest.files)} files, "
        f"{pulled.manifest.size:,} bytes; next: embedq reload {pulled.name}"
    )
