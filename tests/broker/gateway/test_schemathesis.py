"""The gateway against its own OpenAPI document: requests that follow it and requests that break it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.gateway_process import GatewayProcess
from tests.helpers.support import patient

pytestmark = [pytest.mark.kafka, pytest.mark.asyncio(loop_scope="session")]

_ROOT: Final = Path(__file__).parents[3]
CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
"""Not that all which fits the document is accepted: no schema knows how wide a model is."""


def command(url: str, examples: int) -> list[str]:
    """`schemathesis` with so many random requests for each operation, after those that cover its schema."""
    return [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(examples), "--continue-on-failure", "--warnings", "off"),
        # It would write a command.
        *("--exclude-path", "/admin/reload"),
        # A request that has a millisecond may be answered with 504.
        *("-H", f"x-request-timeout: {patient(60):.0f}", "--request-timeout", f"{patient(60):.0f}"),
    ]


async def test_no_request_makes_it_fail_or_answer_what_is_not_documented(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    assert gateway.url is not None
    done = await asyncio.to_thread(
        subprocess.run,
        command(gateway.url, 5),
        cwd=tmp_path,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "tests.helpers.schemathesis_hooks",
            "PYTHONPATH": str(_ROOT),
        },
        capture_output=True,
        text=True,
        timeout=patient(110),
        check=False,
    )
    assert done.returncode == 0, done.stdout
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) > 200
