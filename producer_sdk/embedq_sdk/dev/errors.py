"""Errors of the local stack.

DevStackError
├── MissingPackagesError   the extra `embedq[dev]` is not installed
└── StartError             a server did not start; the message ends with the last lines of its log
    └── PortTakenError     another process took its port; `DevStack` tries again with other ports
"""


class DevStackError(RuntimeError):
    """The local Kafka or Redis cannot do what was asked."""


class MissingPackagesError(DevStackError):
    """A package that contains one of the servers is not installed."""


class StartError(DevStackError):
    """A server did not start within its deadline."""


class PortTakenError(StartError):
    """Another process took the port after it was chosen and before the server bound it."""
