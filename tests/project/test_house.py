"""The house rules that a reader relies on: what a folder holds, which room may use which, and how large a part may be.

A room is a folder; where a folder has folders of its own, each of its files is a room, too. Every import counts: those
for annotations alone, and those inside functions, which would otherwise hide a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, takewhile
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = {
    "embedq_batch": ROOT / "producer_sdk/embedq_batch",
    "embedq_consumer": ROOT / "consumer/embedq_consumer",
    "embedq_gateway": ROOT / "producer_sdk/embedq_gateway",
    "embedq_sdk": ROOT / "producer_sdk/embedq_sdk",
    "embedq_shared": ROOT / "shared/embedq_shared",
}

MOST_FILES: Final = 12
MOST_LINES: Final = 300
MOST_PARAMETERS: Final = 6

Floors = tuple[tuple[str, ...], ...]
SERVICE: Final[Floors] = (
    ("threads",),
    ("telemetry", "engine", "fairness", "shapes"),
    ("group",),
    ("retries",),
    ("cache", "intake"),
    ("batching", "quarantine"),
    ("delivery",),
    ("exactly_once",),
    ("lifecycle",),
    ("rollout",),
    ("pipeline",),
    ("settings",),
    ("usage",),
    ("leaving",),
    ("opening",),
    ("service",),
    ("supervisor",),
    ("process",),
    ("__main__",),
)
"""From low to high. A room uses only rooms of lower floors, so two of one floor know nothing of each other."""

SDK: Final[Floors] = (
    ("errors",),
    ("job_options", "shown"),
    ("hub",),
    ("embeddings",),
    ("reply_checks",),
    ("transport",),
    ("result_reader", "stream"),
    ("client",),
    ("admin", "blocking"),
    ("adapters",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
GATEWAY: Final[Floors] = (
    ("errors", "settings", "joining"),
    ("keys",),
    ("http",),
    ("fleet",),
    ("embedding",),
    ("dialects", "operations", "console"),
    ("batches",),
    ("openapi",),
    ("app",),
    ("serving",),
    ("command",),
    ("__main__",),
)
BATCH: Final[Floors] = (
    ("errors",),
    ("content",),
    ("manifest", "clients"),
    ("sources", "sinks"),
    ("corpus",),
    ("switching", "running"),
    ("following", "origins"),
    ("api",),
    ("__init__",),
    ("command",),
    ("sink_command", "switch_command", "corpus_command"),
    ("reembed_command",),
)
ENGINE: Final[Floors] = (("kernels",), ("models",), ("loading",))
"""The engine's other rooms may stand anywhere, as long as there is no circle."""


class Leaf(NamedTuple):
    """A room apart from the floors: who may use it, and what of its own package it may use, by prefix."""

    users: frozenset[str]
    uses: frozenset[str]


LEAVES: Final = {
    "embedq_consumer.verify": Leaf(frozenset(), frozenset({"embedq_consumer.engine"})),
    "embedq_sdk.dev": Leaf(
        frozenset({"embedq_sdk.cli.commands"}), frozenset({"embedq_sdk.admin", "embedq_sdk.errors"})
    ),
}


class Module(NamedTuple):
    """One file and what it imports of our packages."""

    name: str
    path: Path
    tree: ast.Module
    imports: frozenset[str]


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """The trees of all files are half a million objects, through which the collector would go for ever after."""
    yield
    modules.cache_clear()


@cache
def modules() -> Mapping[str, Module]:
    paths = {
        _name(package, folder, path): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        found[name] = Module(name, path, tree, frozenset(_imports(name, path, tree, paths)) - {name})
    return found


def _name(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _imports(name: str, path: Path, tree: ast.Module, known: Iterable[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield from (each for each in [whole if whole in known else source] if each in known)


@cache
def room(name: str) -> str:
    """The folder of a module, or the module where its folder has folders."""
    path = modules()[name].path
    folder = path.parent
    divided = any(child.is_dir() and child.name != "__pycache__" for child in folder.iterdir())
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    if divided:
        return f"{package}.__init__" if path.stem == "__init__" else name
    return package


@cache
def rooms() -> Mapping[str, frozenset[str]]:
    """Which rooms each room uses."""
    used: dict[str, set[str]] = {}
    for module in modules().values():
        here = room(module.name)
        used.setdefault(here, set()).update(room(name) for name in module.imports)
    return {here: frozenset(others - {here}) for here, others in used.items()}


def why(one: str, other: str) -> str:
    """The files that make one room use another."""
    return ", ".join(
        f"{module.name} imports {name}"
        for module in modules().values()
        if room(module.name) == one
        for name in sorted(module.imports)
        if room(name) == other
    )


def said(found: Iterable[str]) -> str:
    """What a failed rule shows: each breach on a line of its own."""
    return "\n" + "\n".join(found)


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of which each member reaches each other one (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": "b", "b": "cd", "c": "a", "d": ""}) == [["a", "b", "c"]]
    assert circles({"a": "bc", "b": "c", "c": ""}) == []


# -- folders and imports -----------------------------------------------------------------------------------------------


def test_no_folder_holds_more_than_twelve_files() -> None:
    folders = (
        path
        for folder in PACKAGES.values()
        for path in [folder, *folder.rglob("*")]
        if path.is_dir() and path.name != "__pycache__"
    )
    counts = {folder: sum(child.is_file() for child in folder.iterdir()) for folder in folders}
    found = [
        f"{folder.relative_to(ROOT)}: {count} files" for folder, count in counts.items() if count > MOST_FILES
    ]
    assert not found, said(found)


def test_no_files_import_each_other_in_a_circle() -> None:
    found = circles({module.name: module.imports for module in modules().values()})
    assert not found, said(", ".join(group) for group in found)


def test_no_rooms_use_each_other_in_a_circle() -> None:
    found = circles(rooms())
    assert not found, said(
        why(one, other) for group in found for one in group for other in group if other in rooms()[one]
    )


def test_the_shared_package_uses_no_other_gateway_and_batch_the_sdk_and_nobody_the_service() -> None:
    allowed = {
        "embedq_shared": {"embedq_shared"},
        "embedq_sdk": {"embedq_sdk", "embedq_shared"},
        "embedq_gateway": {"embedq_gateway", "embedq_sdk", "embedq_shared"},
        "embedq_batch": {"embedq_batch", "embedq_sdk", "embedq_shared"},
        "embedq_consumer": {"embedq_consumer", "embedq_shared"},
    }
    found = [
        f"{module.name} imports {name}"
        for module in modules().values()
        for name in sorted(module.imports)
        if _package(name) not in allowed[_package(module.name)] and room(module.name) not in LEAVES
    ]
    assert not found, said(found)


@pytest.mark.parametrize(
    ("package", "floors"),
    [
        ("embedq_consumer", SERVICE),
        ("embedq_sdk", SDK),
        ("embedq_gateway", GATEWAY),
        ("embedq_batch", BATCH),
        ("embedq_consumer.engine", ENGINE),
    ],
    ids=["service", "sdk", "gateway", "batch", "engine"],
)
def test_a_room_uses_only_rooms_of_lower_floors(package: str, floors: Floors) -> None:
    floor_of = {name: number for number, floor in enumerate(floors) for name in floor}
    found = []
    for one, others in rooms().items():
        here = _part(one, package)
        for other in sorted(others):
            there = _part(other, package)
            if here in floor_of and there in floor_of and here != there and floor_of[there] >= floor_of[here]:
                found.append(f"{here} uses {there}: {why(one, other)}")
    assert not found, said(found)


@pytest.mark.parametrize(
    ("package", "floors"),
    [("embedq_consumer", SERVICE), ("embedq_sdk", SDK), ("embedq_gateway", GATEWAY), ("embedq_batch", BATCH)],
)
def test_every_room_has_its_floor(package: str, floors: Floors) -> None:
    """A new room is given its place above, so that the one who adds it decides what it may use."""
    placed = {*chain.from_iterable(floors), *(name.rpartition(".")[2] for name in LEAVES), "__init__"}
    parts = {part for each in rooms() if (part := _part(each, package))}
    assert parts <= placed, f"not in the floors: {', '.join(sorted(parts - placed))}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_nothing_uses_a_leaf_and_a_leaf_uses_little(leaf: str) -> None:
    may = LEAVES[leaf]
    found = [why(one, leaf) for one, others in rooms().items() if leaf in others and one not in may.users]
    found += [
        why(leaf, other)
        for other in sorted(rooms()[leaf])
        if _package(other) == _package(leaf) and not any(other.startswith(each) for each in may.uses)
    ]
    assert not found, said(found)


def _package(name: str) -> str:
    return name.partition(".")[0]


def _part(name: str, package: str) -> str | None:
    """The first name below a package: `intake` of embedq_consumer.intake.offsets."""
    return name.removeprefix(f"{package}.").partition(".")[0] if name.startswith(f"{package}.") else None


# -- sizes -------------------------------------------------------------------------------------------------------------


def classes() -> Iterator[tuple[str, Path, ast.ClassDef]]:
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                yield f"{module.name}.{node.name}", module.path, node


def reason(path: Path, node: ast.stmt, words: str) -> bool:
    """Whether the comment right above a definition gives the reason for an exception: `# More than …: why`."""
    above = path.read_text(encoding="utf-8").splitlines()[: node.lineno - 1]
    comment = takewhile(lambda line: line.lstrip().startswith("#"), reversed(above))
    return any(f"# more than {words}: " in line.lower() for line in comment)


def test_a_class_has_at_most_300_lines_or_says_why_not() -> None:
    found = []
    for name, path, node in classes():
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MOST_LINES and not reason(path, node, f"{MOST_LINES} lines"):
            found.append(f"{name}: {lines} lines")
    assert not found, said(found)


def test_a_constructor_has_at_most_six_parameters_or_says_why_not() -> None:
    found = []
    for name, path, node in classes():
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                taken = method.args
                count = len([*taken.posonlyargs, *taken.args, *taken.kwonlyargs]) - 1
                if count > MOST_PARAMETERS and not reason(path, method, "six parameters"):
                    found.append(f"{name}: {count} parameters")
    assert not found, said(found)
