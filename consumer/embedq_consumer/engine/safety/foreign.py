"""What a configuration may not ask for: code or files from elsewhere. Pure.

transformers would look for some of it on a hub; a service has no business there, and it is told so (`HF_HUB_OFFLINE`). Others
make it read another file than the one that the model version is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["OFFLINE", "foreign_config", "foreign_tokenizer"]

OFFLINE: Final[Mapping[str, str]] = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""What Hugging Face's libraries read from the environment when they are imported: a model is what its directory holds."""
_OTHER_CONFIGS: Final = ("configuration_files", "transformers_weights", "gguf_file")
_OTHER_TOKENIZERS: Final = ("fast_tokenizer_files", "gguf_file", "init_inputs")
_IDLE_PATHS: Final = frozenset(
    {
        "added_tokens_file",
        "chat_template_file",
        "special_tokens_map_file",
        "tokenizer_config_file",
        "tokenizer_file",
    }
)
"""Left over from where the tokenizer was saved; transformers takes the directory's own files."""
_HUB_KERNEL: Final = re.compile(r"^[^/]+/[^/]+$")
"""`org/repo`, and maybe `@revision` or `:function`, as transformers reads an attention implementation."""
_DEEPEST: Final = 16


def foreign_config(config: Mapping[str, Any]) -> str | None:
    """Why `config.json` cannot be served, if it asks for code or files from elsewhere: the field and what was expected."""
    for name in _OTHER_CONFIGS:
        if config.get(name):
            return f"{name}: the model's own files alone are read"
    for name, value in _fields(config):
        if name == "auto_map" and (code := _code(value, "AutoModel")):
            return f"auto_map: the model needs code {code}, which is never run"
        if name in ("use_kernels", "kernel_config") and value:
            return f"{name}: kernels from a hub are never loaded"
        if "implementation" in name:
            for kernel in (value, *value.values()) if isinstance(value, dict) else (value,):
                if isinstance(kernel, str) and _HUB_KERNEL.match(kernel.rpartition("|")[2]):
                    return f"{name}: {kernel[:100]!r} is a kernel from a hub, which is never loaded"
    return None


def foreign_tokenizer(config: Mapping[str, Any]) -> str | None:
    """The same for `tokenizer_config.json`."""
    for name in _OTHER_TOKENIZERS:
        if config.get(name):
            return f"{name}: tokenizer.json alone is read"
    for name, value in config.items():
        if name == "auto_map" and (code := _code(value, "AutoTokenizer")):
            return f"auto_map: the tokenizer needs code {code}, which is never run"
        foreign = isinstance(value, str) and ("/" in value or "\\" in value or value.startswith("."))
        if foreign and name.endswith("_file") and name not in _IDLE_PATHS:
            return f"{name}: expected a file name without a folder"
    return None


def _code(auto_map: object, needed: str) -> str | None:
    """Where the code lies that an `auto_map` needs; None if transformers' own classes do."""
    if isinstance(auto_map, dict):
        listed = {name: value for name, value in auto_map.items() if value}
    else:
        listed = {needed: auto_map} if auto_map else {}
    for name, value in listed.items():
        parts = value if isinstance(value, list | tuple) else (value,)
        if any("--" in str(part) for part in parts):
            return f"from a hub ({name})"
    return "from its own directory" if needed in listed else None


def _fields(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every field at any depth: a configuration holds those of its parts."""
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from _fields(value, depth + 1)
