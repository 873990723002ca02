"""Writes the JSON Schemas of the wire contract, for readers who have no Python.

`python -m tools.schemas` writes `shared/embedq_shared/spec/*.schema.json`; `--check` exits with 1 and names the files that are
stale. Shapes come from `embedq_shared.messages`; what no type can say is added here: rules between fields, and what the
service always writes. `asyncapi.yaml`, which is kept by hand, refers to these files.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

import embedq_shared
from embedq_shared.messages import (
    DEFAULT_ALIAS,
    DEFAULT_MAX_INPUTS,
    Control,
    ErrorCode,
    Failure,
    Job,
    Result,
    Split,
    Status,
)

Schema = dict[str, Any]

SPEC: Final = Path(embedq_shared.__file__).parent / "spec"
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
MODEL_VERSION_PATTERN: Final = "^sha256:[0-9a-f]{64}$"

ROOTS: Final[dict[str, type[msgspec.Struct]]] = {
    "job": Job,
    "result": Result,
    "failure": Failure,
    "control": Control,
    "split": Split,
    "status": Status,
}
"""File stem → the struct that it describes."""

JOB_DEFAULTS: Final = {
    "model": DEFAULT_ALIAS,
    "dtype": "float32",
    "encoding_format": "float",
    "truncate": "error",
}


def schemas() -> dict[str, Schema]:
    """Each file's schema, by stem: self-contained JSON Schema 2020-12."""
    found: dict[str, Schema] = {}
    for stem, struct in ROOTS.items():
        _, parts = msgspec.json.schema_components([struct], ref_template="#/$defs/{name}")
        parts = {name: tidy(part) for name, part in parts.items()}
        complete(parts)
        root = parts.pop(struct.__name__)
        found[stem] = {"$schema": DIALECT, "$id": f"urn:embedq:v1:{stem}", **root}
        if parts:
            found[stem]["$defs"] = dict(sorted(parts.items()))
    return found


def render() -> dict[str, str]:
    """File name → text, for every generated file."""
    documents: dict[str, Schema] = {f"{stem}.schema.json": schema for stem, schema in schemas().items()}
    return {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in documents.items()
    }


def stale(folder: Path = SPEC) -> list[str]:
    """Names of generated files that are missing, differ, or should no longer be there."""
    wanted = render()
    wrong = [
        name
        for name, text in wanted.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    left_over = [path.name for path in folder.glob("*.json") if path.name not in wanted]
    return sorted(wrong + left_over)


# -- schemas: what msgspec wrote, said shorter and completed ----------------------------------------------------------


def tidy(schema: Any) -> Any:
    """`anyOf: [X, null]` as one schema, one-value enums as constants, descriptions without source indentation."""
    if isinstance(schema, list):
        return [tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: tidy(value) for key, value in schema.items()}
    if isinstance(schema.get("description"), str):
        schema["description"] = " ".join(inspect.cleandoc(schema["description"]).split())
    if "default" in schema and schema["default"] is None:
        del schema["default"]
    if schema.get("required") == []:
        del schema["required"]
    if isinstance(schema.get("enum"), list) and len(schema["enum"]) == 1:
        schema = {"const": schema.pop("enum")[0], **schema}
    match schema.get("anyOf"):
        case [{"type": str()} as only, {"type": "null"}]:
            del schema["anyOf"]
            schema = {**schema, **only, "type": [only["type"], "null"]}
        case [{"enum": [*_]} as only, {"type": "null"}]:
            del schema["anyOf"]
            schema = {**schema, **only, "enum": [*only["enum"], None]}
    return schema


def complete(parts: dict[str, Schema]) -> None:
    """Adds in place the rules that the structs' types cannot carry."""
    if job := parts.get("Job"):
        properties = job["properties"]
        for field, default in JOB_DEFAULTS.items():
            properties[field]["default"] = default
        properties["input"] = {
            "description": "A text, or a list of texts; empty and blank texts are embedded as they are. "
            f"A service takes at most {DEFAULT_MAX_INPUTS:,} in a job unless set otherwise.",
            "type": ["string", "array"],
            "items": {"type": "string"},
            "minItems": 1,
        }
        job["allOf"] = [
            {
                "$comment": "Bits are packed into bytes.",
                "if": _has("dtype", {"const": "binary"}),
                "then": {"properties": {"dimensions": {"multipleOf": 8}}},
            },
            {
                "$comment": "Documents take no instruction.",
                "if": _has("input_type", {"const": "document"}),
                "then": {"properties": {"instruction": {"type": "null"}}},
            },
            {
                "$comment": "Chunks cut nothing off.",
                "if": _has("chunk", {"type": "object"}),
                "then": {"properties": {"truncate": {"enum": ["error", None]}}},
            },
        ]
    if result := parts.get("Result"):
        _always_written(result)
        properties = result["properties"]
        properties["model_version"] = _MODEL_VERSION
        properties["dimensions"]["minimum"] = 1
        properties["data"]["minItems"] = 1
        properties["part"]["minimum"] = 0
        properties["parts"]["minimum"] = 1
        scaled = {"if": _embedded(), "then": {"required": ["scale"]}}
        result["allOf"] = [
            {
                "$comment": "int8 vectors need their scale, no others have one.",
                "if": _has("dtype", {"const": "int8"}),
                "then": {"properties": {"data": {"items": scaled}}},
                "else": {"properties": {"data": {"items": {"not": {"required": ["scale"]}}}}},
            }
        ]
    if datum := parts.get("Datum"):
        _always_written(datum, but=("scale", "span"))
        properties = datum["properties"]
        properties["object"] = {"const": "embedding"}
        properties["index"]["minimum"] = 0
        properties["tokens"]["minimum"] = 0
        properties["scale"]["exclusiveMinimum"] = 0
        properties["span"] = {
            "description": "Late chunks alone: where the span begins and ends in its input, in Unicode code points.",
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
        }
        properties["embedding"] = {
            "description": "Numbers, or base64 of the raw little-endian bytes; in MessagePack those bytes "
            "themselves; null for an input that failed alone.",
            "type": ["array", "string", "null"],
            "items": {"type": "number"},
        }
        datum["if"] = _embedded()
        datum["then"] = {
            "properties": {
                "tokens": {"type": "integer"},
                "truncated": {"type": "boolean"},
                "cached": {"type": "boolean"},
                "error": {"type": "null"},
            }
        }
        datum["else"] = {
            "properties": {"error": {"type": "object"}},
            "not": {"anyOf": [{"required": ["scale"]}, {"required": ["span"]}]},
        }
    if failure := parts.get("Failure"):
        _always_written(failure)
        failure["properties"]["model_version"] = {
            **_MODEL_VERSION,
            "description": "null where no model was chosen yet.",
            "type": ["string", "null"],
        }
    if error := parts.get("ErrorBody"):
        _always_written(error)
        error["properties"]["code"] = {
            "description": "New codes may come: treat an unknown one by `retryable`.",
            "anyOf": [{"enum": list(get_args(ErrorCode))}, {"type": "string"}],
        }
    for name in ("Usage", "Timings"):
        if part := parts.get(name):
            _always_written(part)
            for schema in part["properties"].values():
                schema["minimum"] = 0
    if status := parts.get("Status"):
        _always_written(status)
        status["properties"]["model_version"] = {
            **_MODEL_VERSION,
            "description": "null before the first model serves.",
            "type": ["string", "null"],
        }
    if control := parts.get("Control"):
        control["properties"]["digest"]["pattern"] = MODEL_VERSION_PATTERN


_MODEL_VERSION: Final[Schema] = {
    "description": "Digest over weights, tokenizer, pooling and prompts: equal exactly when vectors are comparable.",
    "type": "string",
    "pattern": MODEL_VERSION_PATTERN,
}


def _has(field: str, schema: Schema) -> Schema:
    return {"properties": {field: schema}, "required": [field]}


def _embedded() -> Schema:
    return _has("embedding", {"type": ["array", "string"]})


def _always_written(schema: Schema, but: tuple[str, ...] = ()) -> None:
    """The service leaves out no field; readers may count on it, so the schema says so."""
    schema["required"] = [name for name in schema["properties"] if name not in but]
    for properties in schema["properties"].values():
        properties.pop("default", None)


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Write the generated files, or with `--check` say which are stale; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.schemas", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check = parser.parse_args().check
    wrong = stale()
    if check:
        for name in wrong:
            sys.stderr.write(f"stale: {SPEC.name}/{name}; run python -m tools.schemas\n")
        return 1 if wrong else 0
    wanted = render()
    SPEC.mkdir(exist_ok=True)
    for name in wrong:
        if name in wanted:
            (SPEC / name).write_text(wanted[name], encoding="utf-8")
        else:
            (SPEC / name).unlink()
    sys.stdout.write(f"{SPEC.name}: {len(wanted)} files, {len(wrong)} written anew\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
