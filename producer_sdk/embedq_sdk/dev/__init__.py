"""A real Apache Kafka and a real Redis as processes of the caller, for development and tests.

with DevStack() as stack:
    ...  # stack.kafka_servers, stack.redis_url
"""

import sys

if sys.platform == "win32":
    raise ImportError("the local stack runs on Linux and macOS; on Windows use WSL, or docker compose")

from embedq_sdk.dev.errors import DevStackError, MissingPackagesError, StartError
from embedq_sdk.dev.stack import DevStack

__all__ = ["DevStack", "DevStackError", "MissingPackagesError", "StartError"]
