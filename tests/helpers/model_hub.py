"""A hub on this machine, as huggingface_hub's client speaks to one: repositories of files, by revision."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

import msgspec

from tests.helpers.http_server import serving

_LARGE: Final = frozenset({"safetensors", "bin"})
"""Endings of files in large-file storage, whose digest is SHA-256; of the others it is git's."""
_INFO: Final = re.compile(r"/api/models/(?P<id>[^?]+?)(/revision/(?P<revision>[^/?]+))?(\?.*)?")
_FILE: Final = re.compile(r"/(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?")


class Repository(msgspec.Struct, kw_only=True):
    """One model: its commit, its files, and how it answers."""

    commit: str = "0123456789abcdef0123456789abcdef01234567"
    files: Mapping[str, bytes]
    gated: bool = False
    lies: frozenset[str] = frozenset()
    """Files whose content is not what the hub says of them."""
    breaks: dict[str, int] = {}
    """Files that break off after so many bytes, once each."""


class Hub:
    """What is there, and what was asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.address = ""

    def downloads(self) -> list[str]:
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        ]


@contextmanager
def a_hub() -> Iterator[Hub]:
    """A hub that listens until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        of = hub

    with serving(Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub


def digest(name: str, content: bytes) -> str:
    if name.rpartition(".")[2] in _LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    of: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test says what it saw."""

    def _answer(self) -> None:
        self.of.asked.append((self.command, self.path, self.headers.get("range")))
        if found := _INFO.fullmatch(self.path):
            self._info(found["id"], found["revision"])
        elif found := _FILE.fullmatch(self.path):
            self._file(found["id"], found["revision"], found["file"])
        else:
            self._send(404, b"{}", {})

    def _known(self, name: str, revision: str | None) -> Repository | None:
        model = self.of.models.get(name)
        if model is None:
            self._send(
                401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        elif model.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif revision not in (None, "main", model.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})
        else:
            return model
        return None

    def _info(self, name: str, revision: str | None) -> None:
        if (model := self._known(name, revision)) is None:
            return
        siblings: list[dict[str, Any]] = []
        for file, content in model.files.items():
            told = digest(file, content)
            known: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": told}
            if file.rpartition(".")[2] in _LARGE:
                known["lfs"] = {"sha256": told, "size": len(content), "pointerSize": 130}
            siblings.append(known)
        info = {
            "id": name,
            "modelId": name,
            "sha": model.commit,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        self._send(200, json.dumps(info | {"likes": 0, "siblings": siblings}).encode(), {})

    def _file(self, name: str, revision: str, file: str) -> None:
        if (model := self._known(name, revision)) is None:
            return
        if file not in model.files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        content = model.files[file]
        headers = {"X-Repo-Commit": model.commit, "ETag": f'"{digest(file, content)}"'}
        if file in model.lies:
            content = bytes(reversed(content))
        if self.command == "HEAD":
            self._send(200, content, headers)
            return
        begin = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
            begin = int(found[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if (most := model.breaks.pop(file, None)) is not None:
            self._send(200, content, headers, most=most)
            self.close_connection = True
            return
        self._send(206 if begin else 200, content[begin:], headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, most: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:most])
