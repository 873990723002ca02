"""Errors of the local stack.

DevStackError
├── MissingPackagesError   the extra `embedq[dev]` is not installed
└── StartError             a server did not come up; the message ends with the tail of its log
"""


class DevStackError(RuntimeError):
    """The local Kafka or Redis cannot do what was asked of it."""


class MissingPackagesError(DevStackError):
    """A package that carries one of the servers is not installed."""


class StartError(DevStackError):
    """A server did not come up within its deadline."""


class PortTakenError(StartError):
    """Another process took the port between our choosing it and the server's binding it."""
