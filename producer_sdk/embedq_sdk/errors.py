"""The exceptions of the SDK.

    EmbedError
    ├── InvalidArgument (ValueError)     refused before anything was sent
    ├── ClientClosed                     the client is closed
    │   └── ClientNotOpened              it was never opened
    ├── WrongEventLoop (RuntimeError)    the client was opened in another event loop, or in another thread's
    ├── Overloaded                       too much in flight here, for longer than the deadline
    ├── KafkaUnavailable                 no broker answers
    │   └── KafkaRefused                 one answers, and lets us not in, or not do this: trying again will not help
    ├── TopicMissing                     Kafka answers, but a topic of embedq does not exist
    ├── DeadlineExceeded (TimeoutError)  Kafka answers, but no result arrived in time
    ├── UnreadableReply                  a reply does not follow the wire contract
    ├── MixedModelVersions               the model was reloaded between two parts of one call
    ├── PartialFailure                   some inputs of a list failed
    └── JobFailed                        the service answered with an error
        ├── InvalidJob                   the job breaks a rule; the same job will fail again
        ├── TextTooLong                  a text is over the model's limit
        ├── UnknownModel                 the service has no model of this alias
        ├── UnknownModelVersion          the alias has another version than the one that was asked for
        ├── Expired                      the job reached the service after its deadline
        ├── NonFinite                    the model gave NaN or infinity for a text
        ├── ServiceOverloaded            retried until the deadline, still too busy
        └── InternalError                retried until the deadline, still failing

The first line of each docstring is the message; its fields are attributes of the exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class EmbedError(Exception):
    """embedq failed."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)
        template = (type(self).__doc__ or type(self).__name__).splitlines()[0]
        super().__init__(template.format_map(facts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind: type[EmbedError], facts: Mapping[str, Any]) -> EmbedError:
    return kind(**facts)


class InvalidArgument(EmbedError, ValueError):
    """`{argument}`: expected {expected}, got {got}"""

    argument: str
    expected: str
    got: str


class ClientClosed(EmbedError):
    """This EmbedClient is closed: make a new one"""


class ClientNotOpened(ClientClosed):
    """This EmbedClient is not opened yet: use it inside `async with EmbedClient(...) as client`, or call `await client.open()`"""


class WrongEventLoop(EmbedError, RuntimeError):
    """This EmbedClient belongs to another event loop, {where}. Make and open one client in each loop, and use it there"""

    where: str


class Overloaded(EmbedError):
    """{texts} texts and {size} bytes are in flight in this client, and too few finished within {timeout:g} s"""

    texts: int
    size: int
    timeout: float


class KafkaUnavailable(EmbedError):
    """Kafka at {servers} does not answer: {reason}"""

    servers: str
    reason: str


class KafkaRefused(KafkaUnavailable):
    """Kafka at {servers} refuses this client: {reason}

    A wrong password or token, a certificate that is not trusted, a missing right, the wrong security protocol.
    """


class TopicMissing(EmbedError):
    """Kafka at {servers} has no topic {topic}, or does not show it to this user: `embedq topics create` creates it"""

    servers: str
    topic: str


class DeadlineExceeded(EmbedError, TimeoutError):
    """No result within {timeout:g} s ({progress}): is a consumer running? See `embedq status`"""

    timeout: float
    progress: str


class UnreadableReply(EmbedError):
    """A reply cannot be read: {detail}. This is a bug in embedq, or something else writes to its topics"""

    detail: str


class MixedModelVersions(EmbedError):
    """The vectors come from different models ({shown}) and cannot be compared: the model was reloaded during the call

    `versions` holds each input's model version, in the order of the inputs.
    """

    versions: list[str | None]
    shown: str


class PartialFailure(EmbedError):
    """{failed} of {total} inputs failed; the first, input {index}: {first}

    `vectors` is a numpy masked array of all inputs in which the failed rows are masked; `errors` maps the index of each
    failed input to its error.
    """

    vectors: np.ma.MaskedArray[Any, Any]
    errors: dict[int, EmbedError]
    failed: int
    total: int
    index: int
    first: str


class JobFailed(EmbedError):
    """{code}: {message}

    `param` is a path in the job such as `dimensions` or `input[3]`, or None.
    """

    code: str
    message: str
    param: str | None
    retryable: bool


class InvalidJob(JobFailed):
    """{code}: {message}"""


class TextTooLong(JobFailed):
    """{code}: {message}"""


class UnknownModel(JobFailed):
    """{code}: {message}"""


class UnknownModelVersion(JobFailed):
    """{code}: {message}"""


class Expired(JobFailed):
    """{code}: {message}"""


class NonFinite(JobFailed):
    """{code}: {message}"""


class ServiceOverloaded(JobFailed):
    """{code}: {message}"""


class InternalError(JobFailed):
    """{code}: {message}"""
