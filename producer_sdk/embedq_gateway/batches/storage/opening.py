"""Which storage a setting names."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from embedq_gateway.batches.storage.directory import DirectoryObjects
from embedq_gateway.batches.storage.objects import Objects, StorageError, check_conditions

_PROBE: Final = "probe"


class StorageAddress(msgspec.Struct, frozen=True):
    """A directory, or a bucket and what its keys begin with."""

    directory: Path | None = None
    bucket: str = ""
    prefix: str = ""

    @classmethod
    def of(cls, setting: str) -> StorageAddress:
        """What a setting says: `s3://BUCKET/PREFIX`, or a directory's path.

        Raises:
            ValueError: it is another address, or names no bucket.
        """
        if "://" not in setting:
            return cls(directory=Path(setting).absolute())
        address = urlsplit(setting)
        if address.scheme != "s3" or not address.hostname or address.query or address.fragment:
            raise ValueError("expected a directory, or s3://BUCKET or s3://BUCKET/PREFIX")
        return cls(bucket=address.netloc, prefix=address.path.strip("/"))


async def open_storage(address: StorageAddress, name: str) -> Objects:
    """Open it, and prove that it can do what batches need; `name` is this process's, for the proof.

    Raises:
        StorageError: it cannot be used; or the extra `embedq[gateway-s3]` is not installed.
    """
    if address.directory is not None:
        directory = DirectoryObjects(address.directory)
        await directory.open()
        await check_conditions(directory, f"{_PROBE}/{name}")
        return directory
    try:
        from embedq_gateway.batches.storage.s3 import S3Objects
    except ModuleNotFoundError as missing:
        raise StorageError(
            f"{missing.name} is not installed: pip install 'embedq[gateway-s3]' for files on S3"
        ) from None
    bucket = S3Objects(address.bucket, address.prefix)
    try:
        await check_conditions(bucket, f"{_PROBE}/{name}")
    except BaseException:
        await bucket.close()
        raise
    return bucket
