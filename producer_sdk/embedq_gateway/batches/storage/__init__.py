"""Where files and batches are kept: a directory, or S3-compatible storage, behind one small protocol."""

from embedq_gateway.batches.storage.objects import Objects, ObjectWriter, StorageError, Stored
from embedq_gateway.batches.storage.opening import StorageAddress, open_storage

__all__ = ["ObjectWriter", "Objects", "StorageAddress", "StorageError", "Stored", "open_storage"]
