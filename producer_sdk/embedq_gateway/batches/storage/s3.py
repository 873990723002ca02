"""Objects in a bucket of S3, or of a storage that speaks its language and knows conditional writes (MinIO, Ceph, R2)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from embedq_gateway.batches.storage.objects import READ_CHUNK_BYTES, StorageError, Stored

PART_BYTES: Final = 8 << 20
"""Of a multipart upload; S3 takes 5 MiB at least, and 10,000 parts, which then hold 78 GiB."""
_THREADS: Final = 16
"""Calls at once, each in a thread and over a connection of its own."""
_MOST_DELETED: Final = 1000
"""Keys that one call deletes, by S3's own rule."""
_REFUSED: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
"""What S3 answers where a condition does not hold, or where another writer is quicker."""
_ABSENT: Final = frozenset({"NoSuchKey", "404", "NotFound"})

Answer = TypeVar("Answer")
Do = Callable[[str, Callable[[Any], Any]], Awaitable[Any]]
"""Runs a call of the client in a thread; the word is for the error."""


class S3Objects:
    """A bucket, or what is below a prefix of it.

    Address, region and credentials are what boto3 finds by its own rules: `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, its files, or the machine's role. boto3 blocks, so each call has a thread.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="embedq-s3")
        self._client: Any = None

    async def open(self) -> None:
        """Nothing: the bucket must be there."""

    async def get(self, key: str) -> Stored | None:
        """See `Objects`."""

        def get(client: Any) -> Stored | None:
            try:
                answer = client.get_object(Bucket=self._bucket, Key=self._key(key))
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise
            with contextlib.closing(answer["Body"]) as body:
                return Stored(body.read(), answer["ETag"])

        return await self._do("read", get)

    async def put(self, key: str, data: bytes) -> None:
        """See `Objects`."""
        await self._put(key, data)

    async def create(self, key: str, data: bytes) -> bool:
        """See `Objects`."""
        return await self._put(key, data, IfNoneMatch="*")

    async def replace(self, key: str, data: bytes, version: str) -> bool:
        """See `Objects`."""
        return await self._put(key, data, IfMatch=version)

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Objects`."""

        def delete(client: Any) -> None:
            for start in range(0, len(keys), _MOST_DELETED):
                some = [{"Key": self._key(key)} for key in keys[start : start + _MOST_DELETED]]
                answer = client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})
                if failed := answer.get("Errors"):
                    raise StorageError(
                        f"cannot delete in the bucket {self._bucket}: {failed[0].get('Message')}"
                    )

        await self._do("delete", delete)

    async def names(self, folder: str) -> list[str]:
        """See `Objects`."""
        prefix = f"{self._key(folder)}/"

        def names(client: Any) -> list[str]:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix, Delimiter="/"
            )
            found = []
            for page in pages:
                found += [each["Prefix"].rstrip("/") for each in page.get("CommonPrefixes", ())]
                found += [each["Key"] for each in page.get("Contents", ())]
            return sorted(name.removeprefix(prefix) for name in found)

        return await self._do("list", names)

    async def read(self, key: str) -> AsyncGenerator[bytes, None]:
        """See `Objects`."""
        body = await self._do(
            "read", lambda client: client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"]
        )
        with contextlib.closing(body):
            while chunk := await self._do("read", lambda _: body.read(READ_CHUNK_BYTES)):
                yield chunk

    @contextlib.asynccontextmanager
    async def writing(self, key: str) -> AsyncIterator[_PartWriter]:
        """See `Objects`. What a killed process leaves is an upload that never ends: a rule of the bucket should abort such."""
        writer = _PartWriter(self._do, self._bucket, self._key(key))
        try:
            yield writer
            await writer.end()
        except BaseException:
            await asyncio.shield(writer.abort())
            raise

    async def close(self) -> None:
        """See `Objects`."""
        if self._client is not None:
            await self._do("close", lambda client: client.close())
        self._threads.shutdown(wait=False)

    def _key(self, key: str) -> str:
        return f"{self._prefix}{key}"

    async def _put(self, key: str, data: bytes, **condition: str) -> bool:
        def put(client: Any) -> bool:
            try:
                client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, **condition)
            except ClientError as error:
                # A condition on an object that is gone: S3 says that it is not there.
                if condition and _code(error) in _REFUSED | _ABSENT:
                    return False
                raise
            return True

        return await self._do("write", put)

    async def _do(self, what: str, work: Callable[[Any], Answer]) -> Answer:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(self._made()))
        except (ClientError, BotoCoreError, OSError) as error:
            raise StorageError(f"cannot {what} in the bucket {self._bucket}: {error}") from error

    def _made(self) -> Any:
        """The client; making it reads files, so it is made in a thread."""
        if self._client is None:
            config = Config(
                max_pool_connections=_THREADS,
                connect_timeout=10,
                read_timeout=60,
                retries={"mode": "standard", "total_max_attempts": 5},
                # Only where an operation needs one: not every S3-compatible storage knows the newer checksums.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            self._client = boto3.client("s3", config=config)
        return self._client


class _PartWriter:
    """An upload in parts; one that fits into a part is a plain one."""

    def __init__(self, do: Do, bucket: str, key: str) -> None:
        self._do = do
        self._where = {"Bucket": bucket, "Key": key}
        self._upload: str | None = None
        self._waiting = bytearray()
        self._parts: list[dict[str, Any]] = []

    async def write(self, data: bytes) -> None:
        """See `ObjectWriter`."""
        self._waiting += data
        while len(self._waiting) >= PART_BYTES:
            await self._send(bytes(self._waiting[:PART_BYTES]))
            del self._waiting[:PART_BYTES]

    async def end(self) -> None:
        """Make the object be there."""
        rest = bytes(self._waiting)
        if self._upload is None:
            await self._do("write", lambda client: client.put_object(**self._where, Body=rest))
            return
        if rest:
            await self._send(rest)
        await self._do(
            "write",
            lambda client: client.complete_multipart_upload(
                **self._where, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
            ),
        )

    async def abort(self) -> None:
        """Forget the parts."""
        if self._upload is not None:
            with contextlib.suppress(StorageError):  # what ended the block is the error to be told
                await self._do(
                    "abort",
                    lambda client: client.abort_multipart_upload(**self._where, UploadId=self._upload),
                )

    async def _send(self, part: bytes) -> None:
        if self._upload is None:
            begun = await self._do("write", lambda client: client.create_multipart_upload(**self._where))
            self._upload = begun["UploadId"]
        number = len(self._parts) + 1
        sent = await self._do(
            "write",
            lambda client: client.upload_part(
                **self._where, UploadId=self._upload, PartNumber=number, Body=part
            ),
        )
        self._parts.append({"ETag": sent["ETag"], "PartNumber": number})


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
