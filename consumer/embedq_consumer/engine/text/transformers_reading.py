"""Whether the installed transformers reads a directory's tokenizer otherwise than we do; an operator is told so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tokenizers import Tokenizer, models, normalizers

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.safety.panics import first_line, panics_caught

__all__ = ["differs_from_transformers"]

_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor")


def differs_from_transformers(directory: ModelDirectory, ours: Tokenizer, texts: Sequence[str]) -> str | None:
    """In which parts transformers' tokenizer differs, if it gives one of the `texts` other ids; None if it agrees.

    Raises:
        ModelError: it takes a class that does not use `tokenizer.json` at all.
    """
    import transformers
    from transformers import AutoTokenizer

    named = f"transformers {transformers.__version__}"
    try:
        with panics_caught():
            wrapper: Any = AutoTokenizer.from_pretrained(
                str(directory.checkpoint), local_files_only=True, trust_remote_code=False
            )
            theirs = getattr(wrapper, "backend_tokenizer", None)
            if not isinstance(theirs, Tokenizer):
                raise ModelError(
                    f"{directory.checkpoint / 'tokenizer.json'}: {type(wrapper).__name__} is not a fast tokenizer"
                )
            if directory.lower_case:
                rest = [theirs.normalizer] if theirs.normalizer is not None else []
                theirs.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
            theirs.no_truncation()
            theirs.no_padding()
            if isinstance(theirs.model, models.BPE):
                theirs.model._resize_cache(0)  # noqa: SLF001  # what it remembered would stay (shared_tokenizers.py)
            if all(ours.encode(text).ids == theirs.encode(text).ids for text in texts):
                return None
            parts = _different_parts(ours, theirs)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever its classes raise: the file is read without them
        return f"{named} cannot read this tokenizer ({first_line(error)}); tokenizer.json counts"
    return f"{named} reads this tokenizer otherwise ({', '.join(parts)}); tokenizer.json and the flags that transformers 4 obeyed count"


def _different_parts(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    found = [name for name in _PARTS if _state(ours, name) != _state(theirs, name)]
    if _added(ours) != _added(theirs):
        found.append("added tokens")
    return found or ["model"]


def _state(tokenizer: Tokenizer, part: str) -> object:
    found = getattr(tokenizer, part)
    return None if found is None else found.__getstate__()


def _added(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: repr(token) for number, token in tokenizer.get_added_tokens_decoder().items()}
