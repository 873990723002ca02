"""The service with a model that some texts kill: `python -m tests.helpers.deadly_model`.

By a word in the text: `tokenizer-kill` and `segfault` end the process in the tokenizer's thread, by SIGKILL and by a read
of address 0; `device-kill` by SIGKILL in the compute thread; `device-lost` breaks the device, which ends the process in
order.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from typing import Any

from embedq_consumer import opening, process
from embedq_consumer.engine import (
    DeviceLost,
    Encoder,
    Failed,
    Pending,
    Text,
    TextTooLong,
    Tokens,
    load_encoder,
)


class DeadlyModel:
    """A real encoder, but for those texts."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._on_device: dict[bytes, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def tokenize(self, texts: Sequence[Text]) -> Sequence[Tokens | TextTooLong | Failed]:
        found = self._encoder.tokenize(texts)
        for text, tokens in zip(texts, found, strict=True):
            if "tokenizer-kill" in text.text:
                os.kill(os.getpid(), signal.SIGKILL)
            if "segfault" in text.text:
                ctypes.string_at(0)
            for word in ("device-kill", "device-lost"):
                if word in text.text and isinstance(tokens, Tokens):
                    self._on_device[tokens.ids.tobytes()] = word
        return found

    def submit(self, batch: Sequence[Tokens]) -> Pending:
        for tokens in batch:
            match self._on_device.get(tokens.ids.tobytes()):
                case "device-kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "device-lost":
                    raise DeviceLost("device 0: an illegal memory access")
        return self._encoder.submit(batch)


def main() -> int:
    """Run the service."""

    def load(*args: Any, **kwargs: Any) -> Any:
        return DeadlyModel(load_encoder(*args, **kwargs))

    opening.load_encoder = load  # type: ignore[attr-defined]  # the one seam of a whole process
    return process.main()


if __name__ == "__main__":
    raise SystemExit(main())
