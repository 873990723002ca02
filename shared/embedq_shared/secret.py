"""Text that must not be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NoReturn, Self

_SHOWN: Final = "***"
_MOST_BYTES: Final = 64 * 1024
"""Of a file with a secret: a token of a large organization takes some kilobytes."""


class Secret(str):
    """A password, key or token. It is the text for whoever joins or encodes it, as Kafka's and Redis's clients do; shown,
    printed or formatted it is `***`, also inside of a struct or a dictionary. msgspec does not encode it; `json` does.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """A secret of a secret is the same one: `str` would make it of what is shown."""
        return text if isinstance(text, cls) else super().__new__(cls, text)

    def __repr__(self) -> str:
        """Not the text."""
        return _SHOWN if self else "''"

    def __str__(self) -> str:
        """Not the text."""
        return _SHOWN if self else ""

    def __format__(self, spec: str) -> str:
        """Not the text."""
        return format(str(self), spec)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Never: what is pickled is stored."""
        raise TypeError("a secret cannot be pickled")

    def reveal(self) -> str:
        """The text."""
        return "".join(self)


def read_secret(path: str | Path) -> Secret:
    """The content of a file, without the line end that editors add. Blocks.

    Raises:
        ValueError: it cannot be read, is empty, too long or no text; the message is the end of a sentence that begins with
            the file, and holds nothing of its content.
    """
    try:
        with Path(path).open("rb") as file:
            found = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or type(error).__name__})") from None
    if len(found) > _MOST_BYTES:
        raise ValueError(f"is longer than {_MOST_BYTES:,} bytes")
    try:
        text = found.decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("is empty")
    return Secret(text)
