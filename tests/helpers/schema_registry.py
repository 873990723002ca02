"""A Schema Registry for tests: the part of its HTTP interface that clients use, over a dictionary.

No registry of anybody's can be had from the package registries that tests may use. What talks to this one is confluent-kafka's
own client, in the service and in the tests, so requests and answers are as those expect them.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.http_server import serving


class RegistryServer:
    """Schemas by number. While `away`, every request gets a 503; schemas that hold a word of `refused` get a 409."""

    def __init__(self) -> None:
        self.schemas: list[dict[str, Any]] = []
        self.versions: dict[str, list[int]] = {}
        self.away = False
        self.refused: set[str] = set()
        self.requests: list[str] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*owner._get(urlsplit(self.path).path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*owner._post(urlsplit(self.path).path, body))

            def _answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._handler = Handler
        self.url = ""
        """While it serves."""

    def _get(self, path: str) -> tuple[int, Any]:
        self.requests.append(f"GET {path}")
        if self.away:
            return 503, {"error_code": 50301, "message": "away"}
        if found := re.fullmatch(r"/schemas/ids/(\d+)", path):
            number = int(found[1])
            if not 1 <= number <= len(self.schemas):
                return 404, {"error_code": 40403, "message": "Schema not found"}
            return 200, self.schemas[number - 1]
        if found := re.fullmatch(r"/schemas/guids/([0-9a-f-]+)", path):
            for number, schema in enumerate(self.schemas, 1):
                if schema["guid"] == found[1]:
                    return 200, {**schema, "id": number}
            return 404, {"error_code": 40403, "message": "Schema not found"}
        if found := re.fullmatch(r"/subjects/([^/]+)/versions/(\d+)", path):
            subject, version = unquote(found[1]), int(found[2])
            number = self.versions[subject][version - 1]
            return 200, {"subject": subject, "version": version, "id": number, **self.schemas[number - 1]}
        return 404, {"error_code": 404, "message": "no such page"}

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append(f"POST {path}")
        if self.away:
            return 503, {"error_code": 50301, "message": "away"}
        if any(word in body["schema"] for word in self.refused):
            return 409, {"error_code": 409, "message": "Schema being registered is incompatible"}
        found = re.fullmatch(r"/subjects/([^/]+)(/versions)?", path)
        if found is None:
            return 404, {"error_code": 404, "message": "no such page"}
        subject = unquote(found[1])
        with self._lock:
            same = [
                n for n, known in enumerate(self.schemas, 1) if {**known, "guid": 0} == {**body, "guid": 0}
            ]
            if not same:
                self.schemas.append({**body, "guid": str(uuid.uuid4())})
            number = same[0] if same else len(self.schemas)
            versions = self.versions.setdefault(subject, [])
            if number not in versions:
                versions.append(number)
        known = self.schemas[number - 1]
        return 200, {
            "id": number,
            "guid": known["guid"],
            "subject": subject,
            "version": versions.index(number) + 1,
            **known,
        }

    @contextmanager
    def serving(self) -> Iterator[RegistryServer]:
        with serving(self._handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            yield self
