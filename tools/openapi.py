"""Writes the gateway's OpenAPI document and a page of it, from what each room declares of its paths (`Operation`).

`python -m tools.openapi` writes `producer_sdk/embedq_gateway/openapi/openapi.json` and `page.html`; `--check` exits with 1 if one
of them is stale.
"""

from __future__ import annotations

import argparse
import html
import inspect
import json
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Final

import msgspec

import embedq_gateway.openapi
from embedq_gateway.batches import shapes
from embedq_gateway.dialects import cohere, openai, tei
from embedq_gateway.errors import KINDS
from embedq_gateway.http.exchange import REQUEST_ID
from embedq_gateway.http.operation import COMMON, KEYED, Operation, Parameter
from embedq_gateway.operations import admin, health
from embedq_shared.topics import JSON
from tools.schemas import complete, tidy

Schema = dict[str, Any]

FOLDER: Final = Path(embedq_gateway.openapi.__file__).parent

_REF: Final = "#/components/schemas/{name}"
_HEADERS: Final = {
    REQUEST_ID: "The request's id, as it came or as it was made.",
    "x-embedq-model-version": "What made the vectors.",
    "retry-after": "Seconds after which trying again is worth it.",
}
_ABOUT: Final = """Embeddings over HTTP in front of embedq's queue. A request becomes a job in Kafka, so a replica that is killed costs its
caller nothing, and a burst waits with a deadline. Beside OpenAI's interface there are those of text-embeddings-inference and Cohere."""


def operations() -> tuple[Operation, ...]:
    """Every path, in the order of the page."""
    rooms = (
        openai.OPERATIONS,
        shapes.OPERATIONS,
        tei.OPERATIONS,
        cohere.OPERATIONS,
        health.OPERATIONS,
        admin.OPERATIONS,
        embedq_gateway.openapi.OPERATIONS,
    )
    return tuple(chain.from_iterable(rooms))


def document(of: Iterable[Operation]) -> Schema:
    """The whole document."""
    known = list(of)
    types = [each for one in known for each in (one.body, one.answer, one.error) if each is not None]
    schemas, parts = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {repr(kind): tidy(schema) for kind, schema in zip(types, schemas, strict=True)}
    parts = {name: tidy(part) for name, part in parts.items()}
    complete(parts)
    paths: dict[str, Schema] = {}
    for one in known:
        paths.setdefault(one.path, {})[one.method] = _operation(one, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedq gateway",
            "version": "1",
            "description": " ".join(_ABOUT.split()),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(parts.items())),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, where the gateway asks for one.",
                }
            },
        },
    }


def _operation(one: Operation, by_type: dict[str, Schema]) -> Schema:
    found: Schema = {
        "tags": [one.tag],
        "summary": one.summary,
        "operationId": f"{one.method}{''.join(c if c.isalnum() else '_' for c in one.path)}",
        "responses": _responses(one, by_type),
    }
    if one.parameters:
        found["parameters"] = [_parameter(each) for each in one.parameters]
    if one.body is not None:
        found["requestBody"] = {
            "required": True,
            "content": {one.body_media: {"schema": by_type[repr(one.body)]}},
        }
    if one.scope is not None:
        found["security"] = [{}, {"key": []}]
    return found


def _parameter(one: Parameter) -> Schema:
    return {
        "name": one.name,
        "in": one.place,
        "required": one.place == "path",
        "description": one.meaning,
        "schema": one.schema,
    }


def _responses(one: Operation, by_type: dict[str, Schema]) -> Schema:
    body: Schema = {} if one.answer is None else {"schema": by_type[repr(one.answer)]}
    found: Schema = {
        "200": {
            "description": one.summary,
            "headers": _headers((REQUEST_ID, *one.answer_headers)),
            "content": {one.answer_media: body},
        }
    }
    by_status: dict[int, list[str]] = {}
    for code in (*(KEYED if one.scope is not None else ()), *one.codes, *COMMON):
        by_status.setdefault(KINDS[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        found[str(status)] = {
            "description": "; ".join(f"`{code}`: {KINDS[code].meaning}" for code in codes),
            "headers": _headers((REQUEST_ID, *(["retry-after"] if status in (429, 503) else []))),
            "content": {JSON: {"schema": by_type[repr(one.error)]}},
        }
    return found


def _headers(names: Iterable[str]) -> Schema:
    return {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}


# -- the page ---------------------------------------------------------------------------------------------------------------

_STYLE: Final = """:root { color-scheme: light dark; --line: #8884; --soft: #8882 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem } h3 { border-top: 1px solid var(--line); padding-top: 1.2rem }
code, .method { font-family: ui-monospace, monospace; font-size: .92em }
.method { background: var(--soft); border-radius: .3rem; padding: .1rem .4rem; text-transform: uppercase }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line) } th { font-weight: 600 } caption { text-align: left; font-weight: 600; padding: .8rem 0 .2rem }
summary { cursor: pointer; padding: .6rem 0 }"""


def page(of: Schema) -> str:
    """The document as one page of HTML, which needs no other file and runs no script."""
    tags = list(dict.fromkeys(one["tags"][0] for methods in of["paths"].values() for one in methods.values()))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(of['info']['title'])}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{_text(of['info']['title'])}</h1><p>{_prose(of['info']['description'])}</p>",
        '<p><a href="openapi.json">openapi.json</a></p>',
    ]
    for tag in tags:
        parts.append(f"<h2>{_text(tag)}</h2>")
        for path, methods in of["paths"].items():
            for method, one in methods.items():
                if one["tags"][0] == tag:
                    parts += _section(path, method, one, of["components"]["schemas"])
    return "\n".join([*parts, "</main></body></html>", ""])


def _section(path: str, method: str, one: Schema, schemas: Schema) -> list[str]:
    parts = [
        f'<h3 id="{one["operationId"]}"><span class="method">{method}</span> <code>{_text(path)}</code></h3>',
        f"<p>{_prose(one['summary'])}</p>",
    ]
    if parameters := one.get("parameters"):
        rows = [(each["name"], each["in"], each["description"]) for each in parameters]
        parts.append(_table("Parameters", ("name", "in", "meaning"), rows))
    if body := one.get("requestBody"):
        [content] = body["content"].values()
        parts += _fields("Body", content["schema"], schemas)
    [content] = one["responses"]["200"]["content"].values()
    parts += _fields("Answer", content.get("schema", {}), schemas)
    statuses = [(status, each["description"]) for status, each in one["responses"].items()]
    parts.append("<details><summary>Statuses</summary>")
    parts.append(_table("", ("status", "meaning"), statuses))
    parts.append("</details>")
    return parts


def _fields(title: str, schema: Schema, schemas: Schema) -> list[str]:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    found = schemas.get(name, schema)
    if "properties" not in found:
        return []
    required = set(found.get("required", ()))
    rows = [
        (
            field,
            _type(each),
            f"{each.get('description', '')}{' Required.' if field in required else ''}".strip(),
        )
        for field, each in found["properties"].items()
    ]
    return [_table(title, ("field", "type", "meaning"), rows)]


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return ", ".join("null" if each is None else str(each) for each in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema["anyOf"]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}" if schema.get("items") else "list"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    caption = f"<caption>{_text(title)}</caption>" if title else ""
    top = "".join(f'<th scope="col">{_text(each)}</th>' for each in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><code>{_text(cell)}</code></td>" if n == 0 else f"<td>{_prose(cell)}</td>"
            for n, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _text(text: str) -> str:
    return html.escape(text)


def _prose(text: str) -> str:
    """Text in which `…` is code."""
    pieces = html.escape(" ".join(inspect.cleandoc(text).split())).split("`")
    return "".join(f"<code>{each}</code>" if n % 2 else each for n, each in enumerate(pieces))


# -- the files --------------------------------------------------------------------------------------------------------------


def render() -> dict[str, str]:
    """File name → text, for both files."""
    whole = document(operations())
    return {
        "openapi.json": json.dumps(whole, indent=1, ensure_ascii=False) + "\n",
        "page.html": page(whole),
    }


def stale(folder: Path = FOLDER) -> list[str]:
    """Names of files that are missing or differ."""
    return [
        name
        for name, text in render().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Write the files, or with `--check` say which are stale; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.openapi", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    if parser.parse_args().check:
        found = stale()
        for name in found:
            sys.stderr.write(f"stale: {(FOLDER / name).name}; run make contract\n")
        return bool(found)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
