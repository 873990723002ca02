"""Where files and batches are kept: a directory, or S3-compatible storage, behind one small protocol."""

from embedq_gateway.batches.storage.objects import Objects, ObjectWriter, StorageError, StorageUnfit, Stored
from embedq_gateway.batches.storage.opening import StorageAddress, prepare, storage_at

__all__ = [
    "ObjectWriter",
    "Objects",
    "StorageAddress",
    "StorageError",
    "StorageUnfit",
    "Stored",
    "prepare",
    "storage_at",
]
