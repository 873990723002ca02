from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from itertools import chain

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "redis", "click", "rich", "embedq_consumer", "embedq_sdk.dev"}


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_the_sdk_imports_nothing_heavy() -> None:
    loaded = modules_after("import embedq_sdk, embedq_sdk.admin.topics, embedq_sdk.admin.control")

    assert "aiokafka" in loaded
    assert not loaded & HEAVY


SLOW = HEAVY - {"click", "embedq_consumer"} | {
    "numpy",
    "aiokafka",
    "asyncio",
    "cramjam",
    "prometheus_client",
    "structlog",
}
"""What takes longer to import than the command line does to answer: only a command that needs it imports it."""


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "embed --help",
        "reload --help",
        "status --help",
        "topics create --help",
        "dev --help",
        "dlq --help",
        "dlq replay --help",
        "golden write --help",
        "verify --help",
        "gateway --help",
        "embed",  # wrong usage
    ],
)
def test_help_imports_nothing_that_only_a_running_command_needs(arguments: str) -> None:
    loaded = modules_after(
        f"import sys\nsys.argv = ['embedq', *{arguments.split()!r}]\nfrom embedq_sdk.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert "click" in loaded
    assert not loaded & (SLOW | {"difflib", "ssl", "subprocess"})


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        ("--help", {}),
        ("", {}),
        ("", {"EMBEDQ_KAFKA_SERVERS": "kafka:9092", "EMBEDQ_MODEL": "/m", "EMBEDQ_MODLE": "/m"}),
        ("", {"EMBEDQ_KAFKA_SERVERS": "kafka", "EMBEDQ_MODEL": "/m"}),
        ("", {"EMBEDQ_KAFKA_SERVERS": "kafka:9092", "EMBEDQ_MODEL": "/m", "EMBEDQ_FP8_KEEP": "1"}),
    ],
    ids=["help", "nothing", "mistyped", "no port", "does not fit"],
)
def test_a_wrong_setting_of_the_service_is_named_before_the_service_is_imported(
    arguments: str, environ: dict[str, str]
) -> None:
    loaded = modules_after(
        f"import os, runpy, sys\nos.environ |= {environ!r}\nsys.argv[1:] = {arguments.split()!r}\n"
        "try:\n    runpy.run_module('embedq_consumer', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == (0 if sys.argv[1:] else 2), end.code"
    )
    assert "embedq_consumer.settings" in loaded
    assert not loaded & (SLOW - {"asyncio"})


def test_the_command_line_says_what_to_install_when_click_is_missing() -> None:
    program = "import sys; sys.modules['click'] = None\nfrom embedq_sdk.cli import main\nmain()"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "embedq: the command line needs click, orjson and rich: pip install 'embedq[cli]'\n"


def test_everything_in_all_is_there_and_documented() -> None:
    import embedq_sdk

    for name in embedq_sdk.__all__:
        assert getattr(embedq_sdk, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'EmbeddClient'"):
        embedq_sdk.EmbeddClient  # type: ignore[attr-defined]  # noqa: B018


def test_the_names_of_the_package_are_where_type_checkers_look_for_them() -> None:
    """They are written down three times: for checkers, for `import *`, and for the interpreter."""
    import embedq_sdk

    for_checkers = {
        node.module: tuple(alias.name for alias in node.names)
        for node in ast.walk(ast.parse(inspect.getsource(embedq_sdk)))
        if isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "typing")
    }
    assert for_checkers == embedq_sdk._HOMES  # type: ignore[attr-defined]
    assert sorted(chain.from_iterable(for_checkers.values())) == sorted(embedq_sdk.__all__)


def test_nothing_is_logged_to_a_screen_unless_logging_is_configured() -> None:
    """aiokafka alone wrote 352 lines for one script whose broker was down."""
    program = """
import logging, sys
import embedq_sdk.admin.control, embedq_sdk.dev, embedq_sdk.transport
if sys.argv[1:]:
    logging.basicConfig(format="%(name)s %(message)s")
for name in ("aiokafka.conn", "embedq_sdk.dev.stack", "embedq_shared.kafka.group_member"):
    logging.getLogger(name).error("gone")
"""

    def logged(*more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *more], capture_output=True, text=True, check=True
        )
        return done.stderr.splitlines()

    assert logged() == []
    assert logged("configured") == [
        "aiokafka.conn gone",
        "embedq_sdk.dev.stack gone",
        "embedq_shared.kafka.group_member gone",
    ]
