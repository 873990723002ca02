"""`embedq gateway keys …`: make, list and remove API keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NoReturn, get_args

import click
import msgspec

from embedq_gateway.keys.key_file import (
    KeyEntry,
    KeyFileError,
    Scope,
    add_key,
    hash_of,
    new_key,
    read_keys,
    remove_key,
)
from embedq_shared.topics import LANES, Lane

_FAILED: Final = 1
_FILE = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="EMBEDQ_GATEWAY_KEYS_FILE",
    required=True,
    show_envvar=True,
    help="The file of keys. The gateway follows it: a change is in force a second later.",
)


@click.group()
def keys() -> None:
    """API keys of the gateway. The file holds their hashes alone."""


@keys.command()
@click.argument("name")
@_FILE
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(get_args(Scope)),
    multiple=True,
    default=("embed",),
    show_default=True,
    help="What it may do; several times for several. embed: vectors. admin: status, reloads, metrics. metrics: metrics alone.",
)
@click.option("--alias", "aliases", multiple=True, help="A model that it may use. Default: all.")
@click.option("--lane", type=click.Choice(LANES), help="The only lane of its jobs. Default: either.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Default: no limit.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests at once. Default: no limit.")
def add(
    name: str,
    path: Path,
    scopes: tuple[Scope, ...],
    aliases: tuple[str, ...],
    lane: Lane | None,
    tokens_per_minute: int | None,
    in_flight: int | None,
) -> None:
    """Make a key for NAME, and print it: nobody can look it up later."""
    key = new_key()
    entry = KeyEntry(
        name=name,
        hash=hash_of(key),
        scopes=tuple(dict.fromkeys(scopes)),
        aliases=aliases or None,
        lane=lane,
        tokens_per_minute=tokens_per_minute,
        in_flight=in_flight,
    )
    try:
        msgspec.convert(msgspec.to_builtins(entry), KeyEntry)
    except msgspec.ValidationError:
        raise click.BadParameter(
            "expected 1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit",
            param_hint="NAME",
        ) from None
    try:
        add_key(path, entry)
    except KeyFileError as error:
        _fail(error)
    click.echo(key.reveal())
    click.echo(f"embedq: added {name} to {path}; the key is not kept anywhere else", err=True)


@keys.command(name="list")
@_FILE
def list_keys(path: Path) -> None:
    """Print each key's name and rights, one JSON object a line, without the hash."""
    try:
        entries = read_keys(path)
    except KeyFileError as error:
        _fail(error)
    for entry in entries:
        shown = {field: value for field, value in msgspec.structs.asdict(entry).items() if field != "hash"}
        click.echo(msgspec.json.encode(shown))


@keys.command()
@click.argument("name")
@_FILE
def remove(name: str, path: Path) -> None:
    """Take NAME's key out: a second later it is refused. Requests that have come in go on."""
    try:
        remove_key(path, name)
    except KeyFileError as error:
        _fail(error)
    click.echo(f"embedq: removed {name} from {path}", err=True)


def _fail(error: KeyFileError) -> NoReturn:
    click.echo(f"embedq: {error}", err=True)
    sys.exit(_FAILED)
