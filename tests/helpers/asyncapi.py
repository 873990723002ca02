"""The AsyncAPI document, with its references followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tools.schemas import SPEC

DOCUMENT: Any = yaml.safe_load((SPEC / "asyncapi.yaml").read_text(encoding="utf-8"))
MESSAGES: Any = DOCUMENT["components"]["messages"]


def resolve(node: Any, root: Any = DOCUMENT, folder: Path = SPEC) -> Any:
    """A part of the document with its references filled in, those to the schema files beside it too."""
    if isinstance(node, list):
        return [resolve(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        file, _, path = node["$ref"].partition("#")
        found = root = json.loads((folder / file).read_text(encoding="utf-8")) if file else root
        for step in filter(None, path.split("/")):
            found = found[step]
        return resolve(found, root)
    return {key: resolve(value, root) for key, value in node.items()}
