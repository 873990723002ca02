"""The service with a model that fails on some texts: `python -m tests.helpers.ailing_model`.

By a word in the text: `incurable` fails always, `ailing` as long as the file that AILING names exists.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from embedq_consumer import opening, process
from embedq_consumer.engine import Encoder, Failed, Pending, Text, TextTooLong, Tokens, load_encoder

AILING: Final = "AILING"


class AilingModel:
    """A real encoder, but for those texts."""

    def __init__(self, encoder: Encoder, file: Path) -> None:
        self._encoder = encoder
        self._file = file
        self._sick: dict[bytes, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def tokenize(self, texts: Sequence[Text]) -> Sequence[Tokens | TextTooLong | Failed]:
        found = self._encoder.tokenize(texts)
        for text, tokens in zip(texts, found, strict=True):
            for word in ("incurable", "ailing"):
                if word in text.text and isinstance(tokens, Tokens):
                    self._sick[tokens.ids.tobytes()] = word
        return found

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        words = {self._sick.get(tokens.ids.tobytes()) for tokens in batch}
        if "incurable" in words or ("ailing" in words and self._file.exists()):
            raise RuntimeError("cannot run this")
        return self._encoder.submit(batch)


def main() -> int:
    """Run the service."""
    file = Path(os.environ[AILING])

    def load(*args: Any, **kwargs: Any) -> Any:
        return AilingModel(load_encoder(*args, **kwargs), file)

    opening.load_encoder = load  # type: ignore[attr-defined]  # the one seam of a whole process
    return process.main()


if __name__ == "__main__":
    raise SystemExit(main())
