"""OpenAI's interface to files and batches: `/v1/files`, `/v1/batches`. What they are is in `files.py` and `batch.py`."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import msgspec
from starlette.datastructures import QueryParams
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embedq_gateway.batches.batch import DAY_S, Batch, WrongStatus
from embedq_gateway.batches.files import File, Files, FileTooLarge
from embedq_gateway.batches.identities import new_id
from embedq_gateway.batches.register import BatchGone, Register
from embedq_gateway.batches.shapes import (
    ENDPOINT,
    HOUR_S,
    LONGEST_KEPT_S,
    LONGEST_WINDOW_S,
    MOST_BATCHES,
    MOST_FILES,
    OPERATIONS,
    BatchList,
    BatchRequest,
    FileDeleted,
    FileList,
    batch_object,
    file_object,
    page_of,
)
from embedq_gateway.batches.storage import StorageError
from embedq_gateway.batches.uploads import BadUpload, UploadForm
from embedq_gateway.errors import ApiError
from embedq_gateway.http.answers import JsonAnswer
from embedq_gateway.http.body import HungUp, read_json
from embedq_gateway.http.entrance import Handler, route
from embedq_gateway.http.exchange import Exchange

log = logging.getLogger("embedq.gateway")

_MOST_BODY_BYTES: Final = 64 * 1024
"""Of the request that makes a batch: its metadata is the most of it."""
_WINDOW: Final = re.compile(r"(\d{1,3})([hd])")

_requests: Final = msgspec.json.Decoder(BatchRequest)


def _route(path: str, handler: Handler, method: str) -> Route:
    """A path whose handler asks the storage: what goes wrong there is an answer, too."""

    async def told(exchange: Exchange) -> ASGIApp:
        try:
            return await handler(exchange)
        except StorageError as error:
            log.warning(
                "request_failed", extra={"request_id": exchange.request_id.decode(), "reason": str(error)}
            )
            raise ApiError(
                "storage_unavailable", "the storage of files and batches cannot be used now"
            ) from error

    return route(path, told, methods=[method])


class FileRoutes:
    """`/v1/files`."""

    def __init__(self, files: Files, register: Register) -> None:
        self._files = files
        self._register = register

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            _route("/v1/files", self.create, "POST"),
            _route("/v1/files", self.list, "GET"),
            _route("/v1/files/{id}", self.retrieve, "GET"),
            _route("/v1/files/{id}", self.delete, "DELETE"),
            _route("/v1/files/{id}/content", self.content, "GET"),
        ]

    async def create(self, exchange: Exchange) -> ASGIApp:
        """Keep an uploaded file."""
        caller = exchange.require("embed")
        try:
            form = UploadForm(exchange.headers.get(b"content-type", b"").decode("latin-1"))

            def described() -> tuple[str, int | None]:
                if form.fields.get("purpose") != "batch":
                    raise ApiError("invalid_value", "`purpose`: expected batch", "purpose")
                return form.filename or "", _kept(form.fields)

            async with aclosing(form.file(_body(exchange))) as content:
                file = await self._files.upload(caller.name, content, described)
        except BadUpload as error:
            raise ApiError("invalid_value", str(error), error.param) from None
        except FileTooLarge as error:
            # The rest is not read, so that the connection cannot be used again.
            raise ApiError(
                "body_too_large", str(error), "file", headers=((b"connection", b"close"),)
            ) from None
        return JsonAnswer.of(file_object(file))

    async def list(self, exchange: Exchange) -> ASGIApp:
        """The caller's files."""
        caller = exchange.require("embed")
        query = QueryParams(exchange.scope["query_string"])
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError("invalid_value", "`order`: expected asc or desc", "order")
        files, more = await self._files.page(
            caller.name,
            after=query.get("after"),
            limit=_limit(query, default=MOST_FILES, most=MOST_FILES),
            newest_first=order == "desc",
            purpose=query.get("purpose"),
        )
        return JsonAnswer.of(page_of(FileList, [file_object(file) for file in files], more))

    async def retrieve(self, exchange: Exchange) -> ASGIApp:
        """One file."""
        return JsonAnswer.of(file_object(await self._file(exchange)))

    async def delete(self, exchange: Exchange) -> ASGIApp:
        """Remove a file that no batch is reading."""
        file = await self._file(exchange)
        if any(batch.input_file_id == file.id for batch in await self._register.active()):
            raise ApiError("file_in_use", "a batch that has not ended reads this file: cancel it first", "id")
        await self._files.delete(file)
        return JsonAnswer.of(FileDeleted(id=file.id))

    async def content(self, exchange: Exchange) -> ASGIApp:
        """A file's bytes."""
        file = await self._file(exchange)
        return _Content(file, self._files.read(file))

    async def _file(self, exchange: Exchange) -> File:
        caller = exchange.require("embed")
        file = await self._files.get(caller.name, exchange.path_params["id"])
        if file is None:
            raise ApiError("not_found", "there is no file of this id", "id")
        return file


class BatchRoutes:
    """`/v1/batches`."""

    def __init__(self, files: Files, register: Register, poke: Callable[[str], None]) -> None:
        """`poke` is told of each batch that is made or cancelled here."""
        self._files = files
        self._register = register
        self._poke = poke

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            _route("/v1/batches", self.create, "POST"),
            _route("/v1/batches", self.list, "GET"),
            _route("/v1/batches/{id}", self.retrieve, "GET"),
            _route("/v1/batches/{id}/cancel", self.cancel, "POST"),
        ]

    async def create(self, exchange: Exchange) -> ASGIApp:
        """Begin a batch."""
        caller = exchange.require("embed")
        asked = _read(await read_json(exchange, _MOST_BODY_BYTES))
        if asked.endpoint != ENDPOINT:
            raise ApiError("invalid_value", f"`endpoint`: expected {ENDPOINT}", "endpoint")
        caller.lane_for("bulk")  # a key that is bound to the other lane makes no batches
        window_s = _window(asked.completion_window)
        if await self._files.get(caller.name, asked.input_file_id) is None:
            raise ApiError("not_found", "there is no file of this id", "input_file_id")
        now = self._register.now()
        kept = asked.output_expires_after
        batch = Batch(
            id=new_id("batch", now),
            owner=caller.name,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_at=int(now),
            expires_at=int(now) + window_s,
            metadata=asked.metadata,
            aliases=None if caller.aliases is None else tuple(sorted(caller.aliases)),
            output_seconds=None if kept is None else kept.seconds,
        )
        await self._register.add(batch)
        self._poke(batch.id)
        return JsonAnswer.of(batch_object(batch))

    async def list(self, exchange: Exchange) -> ASGIApp:
        """The caller's batches, the newest first."""
        caller = exchange.require("embed")
        query = QueryParams(exchange.scope["query_string"])
        batches, more = await self._register.page(
            caller.name, after=query.get("after"), limit=_limit(query, default=20, most=MOST_BATCHES)
        )
        return JsonAnswer.of(page_of(BatchList, [batch_object(batch) for batch in batches], more))

    async def retrieve(self, exchange: Exchange) -> ASGIApp:
        """One batch."""
        caller = exchange.require("embed")
        batch = await self._register.get(caller.name, exchange.path_params["id"])
        if batch is None:
            raise _no_batch()
        return JsonAnswer.of(batch_object(batch))

    async def cancel(self, exchange: Exchange) -> ASGIApp:
        """Stop a batch; what is done remains."""
        caller = exchange.require("embed")
        name = exchange.path_params["id"]
        if await self._register.get(caller.name, name) is None:
            raise _no_batch()
        now = int(self._register.now())
        try:
            batch = await self._register.change(caller.name, name, lambda batch: batch.cancel(now))
        except WrongStatus as error:
            raise ApiError("batch_ended", f"this batch cannot be cancelled: {error}", "id") from None
        except BatchGone:
            raise _no_batch() from None
        self._poke(name)
        return JsonAnswer.of(batch_object(batch))


class NoStorage:
    """`/v1/files` and `/v1/batches` where the gateway has no place to keep them."""

    def routes(self) -> list[Route]:
        """The paths."""
        return [route(one.path, self.refuse, methods=[one.method.upper()]) for one in OPERATIONS]

    async def refuse(self, exchange: Exchange) -> ASGIApp:
        """Say what is missing."""
        exchange.require("embed")
        raise ApiError(
            "not_found", "this gateway keeps no files and runs no batches: EMBEDQ_GATEWAY_FILES is not set"
        )


class _Content:
    """A file as the body of an answer, a chunk at a time."""

    def __init__(self, file: File, chunks: AsyncGenerator[bytes, None]) -> None:
        self._file = file
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. If the storage fails on the way, the connection ends before the length that was said."""
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", b"%d" % self._file.size),
            (b"content-disposition", b"attachment"),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._chunks) as chunks:
            if scope["method"] != "HEAD":
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _body(exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """The body as it comes in.

    Raises:
        HungUp: the client has gone before its end.
    """
    while True:
        message = await exchange.receive()
        if message["type"] != "http.request":
            raise HungUp
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _read(body: bytes) -> BatchRequest:
    try:
        return _requests.decode(body)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$\.([a-z_]+)|field `([a-z_]+)`", str(error))
        raise ApiError("invalid_value", str(error), found and (found[1] or found[2])) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("malformed", "expected a JSON object in UTF-8") from None


def _window(window: str) -> int:
    """Seconds of a completion window."""
    found = _WINDOW.fullmatch(window)
    seconds = 0 if found is None else int(found[1]) * (HOUR_S if found[2] == "h" else DAY_S)
    if not 0 < seconds <= LONGEST_WINDOW_S:
        raise ApiError(
            "invalid_value",
            "`completion_window`: expected 24h, or another time in hours or days, such as 3d, up to 14d",
            "completion_window",
        )
    return seconds


def _kept(fields: dict[str, str]) -> int | None:
    """For how long an upload asks to be kept."""
    given = fields.get("expires_after[seconds]")
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and HOUR_S <= int(given) <= LONGEST_KEPT_S):
        raise ApiError(
            "invalid_value",
            f"`expires_after`: expected from {HOUR_S:,} to {LONGEST_KEPT_S:,} seconds",
            "expires_after",
        )
    return int(given)


def _limit(query: QueryParams, *, default: int, most: int) -> int:
    given = query.get("limit")
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 9 and 1 <= int(given) <= most):
        raise ApiError("invalid_value", f"`limit`: expected an integer from 1 to {most:,}", "limit")
    return int(given)


def _no_batch() -> ApiError:
    return ApiError("not_found", "there is no batch of this id", "id")
