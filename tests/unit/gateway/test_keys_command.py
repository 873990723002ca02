"""`embedq gateway keys`: a key is shown once, and the file says what it may do."""

from __future__ import annotations

from pathlib import Path

import msgspec
from click.testing import CliRunner, Result

from embedq_gateway.keys.command import keys
from embedq_gateway.keys.door import Door
from embedq_gateway.keys.key_file import read_keys


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(keys, [*arguments], env={"EMBEDQ_GATEWAY_KEYS_FILE": str(path)})


def test_a_key_is_printed_once_and_opens_the_door(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = run(path, "add", "search", "--alias", "default", "--tokens-per-minute", "500", "--in-flight", "3")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    caller = Door(read_keys(path)).caller({b"authorization": f"Bearer {key}".encode()})
    assert caller.name == "search"
    assert (caller.scopes, caller.aliases) == (frozenset({"embed"}), frozenset({"default"}))
    assert caller.allowance.limits.in_flight == 3
    assert key not in made.stderr
    assert key not in path.read_text()


def test_the_list_shows_rights_and_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run(path, "add", "ops", "--scope", "admin", "--scope", "embed", "--scope", "admin", "--lane", "bulk")
    shown = msgspec.json.decode(run(path, "list").stdout)
    assert shown == {
        "name": "ops",
        "scopes": ["admin", "embed"],
        "aliases": None,
        "lane": "bulk",
        "tokens_per_minute": None,
        "in_flight": None,
    }


def test_a_key_that_is_removed_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run(path, "add", "ops")
    assert run(path, "remove", "ops").exit_code == 0
    assert read_keys(path) == []


def test_what_cannot_be_done_is_one_line_and_a_code(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run(path, "add", "ops")
    for arguments, code, said in (
        (("add", "ops"), 1, "has a key named ops"),
        (("remove", "nobody"), 1, "has no key named nobody"),
        (("add", "with blank"), 2, "NAME"),
        (("add", "x", "--in-flight", "0"), 2, "--in-flight"),
    ):
        found = run(path, *arguments)
        assert (found.exit_code, said in found.stderr) == (code, True), found.output
        assert found.stdout == ""
    assert [entry.name for entry in read_keys(path)] == ["ops"]
