"""The rights of each role, as docs/security.md lists them, and as a broker is told of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

PAGE: Final = Path(__file__).parents[2] / "docs" / "security.md"

_ROW: Final = re.compile(
    r"\| (?P<role>[^|]*)\| (?P<kind>topic|group|transactional id) \| `(?P<name>[^`]+)` \| (?P<operations>[\w, ]+) \|"
)
_KINDS: Final = {"topic": 2, "group": 3, "transactional id": 5}
_LITERAL, _PREFIXED = 3, 4
_OPERATIONS: Final = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10}
_ALLOW: Final = 3


class Right(NamedTuple):
    """What one role may do with one resource. A name that ends with `*` stands for all that begin so."""

    role: str
    kind: str
    name: str
    operations: frozenset[str]


def rights() -> list[Right]:
    """The table, row by row."""
    return list(_rows(PAGE.read_text(encoding="utf-8")))


def _rows(page: str) -> Iterator[Right]:
    role = ""
    for row in _ROW.finditer(page):
        if named := re.match(r"`(\w+)`", row["role"].strip()):
            role = named[1]
        yield Right(role, row["kind"], row["name"], frozenset(row["operations"].split(", ")))


async def grant(servers: str, given: Iterable[Right]) -> None:
    """Tell the broker."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        for role, kind, name, operations in given:
            pattern = _PREFIXED if name.endswith("*") else _LITERAL
            for operation in operations:
                request = CreateAclsRequest(
                    *(_KINDS[kind], name.rstrip("*"), pattern, f"User:{role}", "*"),
                    *(_OPERATIONS[operation], _ALLOW),
                )
                response = await admin._send_request(request)
                assert [code for code, *_ in response.creation_responses] == [0], response
    finally:
        await admin.close()
