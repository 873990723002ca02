"""How large each kind of file in a model directory may be, and how large a model its configuration may ask for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec

__all__ = ["BOUNDS", "HEADER_BYTES", "MOST_ENTRIES", "NUMBERS", "Bound", "limit_of", "too_large"]

_MIB: Final = 1024 * 1024
HEADER_BYTES: Final = 16 * _MIB
"""Of a safetensors header. The format allows 100 MB, which would take gigabytes to parse; a model of 100,000 tensors has 12 MB."""
MOST_ENTRIES: Final = 10_000
"""Files and folders below a model directory. A model has some dozens; a wrong path, such as `/`, has millions."""


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of file, by the shell pattern of its name, and the bytes that it may have; None: its content bounds it."""

    pattern: str
    limit: int | None


BOUNDS: Final = (
    # The largest that are known (Gemma 3, Llama 4, NLLB) have 28 to 34 MB.
    Bound(pattern="tokenizer*.json", limit=64 * _MIB),
    Bound(pattern="vocab.*", limit=64 * _MIB),
    Bound(pattern="merges.txt", limit=64 * _MIB),
    Bound(pattern="*.model", limit=64 * _MIB),  # SentencePiece, tiktoken
    Bound(pattern="*.tiktoken", limit=64 * _MIB),
    # 100 bytes for each tensor: that of 100,000 tensors.
    Bound(pattern="*.index.json", limit=16 * _MIB),
    # Configurations have kilobytes, some with a label for each class a megabyte.
    Bound(pattern="*.json", limit=4 * _MIB),
    Bound(pattern="*.jinja", limit=4 * _MIB),
    Bound(pattern="*.txt", limit=4 * _MIB),
    # The header says how many bytes there are; then the device's or the machine's memory must hold them.
    Bound(pattern="*.safetensors", limit=None),
)
"""The first that fits counts. A file of another kind is never read, so that it may have any size."""

NUMBERS: Final[Mapping[str, int]] = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 27,
    "num_attention_heads": 1 << 12,
    "num_hidden_layers": 1 << 11,
    "num_key_value_heads": 1 << 12,
    "type_vocab_size": 1 << 16,
    "vocab_size": 1 << 24,
}
"""Numbers of `config.json` and the largest that is believed, well above any model's: transformers makes modules and tables of
this size before it looks at the weights."""


def limit_of(name: str) -> int | None:
    """The bytes that a file of this name may have; None if no size is too large."""
    return next((bound.limit for bound in BOUNDS if fnmatchcase(name, bound.pattern)), None)


def too_large(config: Mapping[str, Any]) -> str | None:
    """What is wrong with a number in `config.json`, also of its `text_config`; None if all are plausible."""
    nested = config.get("text_config")
    for prefix, fields in (("", config), ("text_config.", nested if isinstance(nested, dict) else {})):
        for name, most in NUMBERS.items():
            value = fields.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                return f"{prefix}{name}: expected a number from 0 to {most}"
    return None
