"""Which storage a setting names."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from embedq_gateway.batches.storage.directory import DirectoryObjects
from embedq_gateway.batches.storage.objects import Objects, StorageUnfit, check_conditions

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


def storage_at(address: StorageAddress) -> Objects:
    """The storage, which is not asked for anything yet.

    Raises:
        StorageUnfit: the extra `embedq[gateway-s3]` is not installed.
    """
    if address.directory is not None:
        return DirectoryObjects(address.directory)
    try:
        from embedq_gateway.batches.storage.s3 import S3Objects
    except ModuleNotFoundError as missing:
        raise StorageUnfit(
            f"{missing.name} is not installed: pip install 'embedq[gateway-s3]' for files on S3"
        ) from None
    return S3Objects(address.bucket, address.prefix)


async def prepare(objects: Objects, name: str) -> None:
    """Open a storage, and prove that it can do what batches need; `name` is this process's, for the proof.

    Raises:
        StorageUnfit: it cannot.
        StorageError: it does not answer now.
    """
    await objects.open()
    await check_conditions(objects, f"{_PROBE}/{name}")
