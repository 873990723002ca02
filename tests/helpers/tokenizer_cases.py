"""Tiny tokenizers of the kinds that transformers 5 reads otherwise than transformers 4, as the files of a directory.

Vocabularies are written out, since what a trainer makes depends on the library's version. Imports nothing of ours, so that
any version of transformers can be asked what it makes of the same files.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CASES", "TEXTS", "write_case"]

TEXTS = (
    "the Cat",
    "ｃａｔ ﬁ Cafe\u0301",
    "日本 cat<mask>",
    " a</s> cat",
)
"""Two words; characters that NFKC, NFC or a lost accent change; signs without spaces and a special token; leading space."""

_LETTERS = (*string.ascii_letters, "é", "\u0301", "ﬁ", "日", "本", *"ｃａｔ<>/")


def write_case(name: str, path: Path) -> Path:
    """Write `config.json`, `tokenizer.json` and what else belongs to a case, and return `path`."""
    path.mkdir(parents=True, exist_ok=True)
    for file, content in CASES[name].items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (path / file).write_text(text, encoding="utf-8")
    return path


def _file(
    model: Mapping[str, Any],
    special: Sequence[str],
    *,
    normalizer: Any = None,
    splitter: Any = None,
    around: str | None = None,
) -> dict[str, Any]:
    """A `tokenizer.json`. `special` are the first tokens of the vocabulary, `around` such as "<s> $A </s>"."""
    ids = {token: number for number, token in enumerate(special)}
    parts = (around or "").split()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, number in ids.items()
        ],
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": None
        if around is None
        else {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}}
                if part == "$A"
                else {"SpecialToken": {"id": part, "type_id": 0}}
                for part in parts
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in parts if part in ids
            },
        },
        "decoder": None,
        "model": model,
    }


def _word_piece(normalizer: Any) -> dict[str, Any]:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<mask>", "</s>")
    words = ("the", "The", "cat", "Cat", "fi", "cafe", "Cafe", "café", "Café", "日本")
    pieces = (*special, *words, *_LETTERS, *(f"##{letter}" for letter in _LETTERS))
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {piece: number for number, piece in enumerate(pieces)},
    }
    return _file(
        model,
        special,
        normalizer=normalizer,
        splitter={"type": "BertPreTokenizer"},
        around="[CLS] $A [SEP]",
    )


def _unigram(*normalizers: str) -> dict[str, Any]:
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    pieces = (*special, "▁", "▁the", "▁cat", "▁Cat", "▁fi", *_LETTERS)
    model = {
        "type": "Unigram",
        "unk_id": 3,
        "vocab": [[piece, -float(number)] for number, piece in enumerate(pieces)],
        "byte_fallback": False,
    }
    return _file(
        model,
        special,
        normalizer={"type": "Sequence", "normalizers": [{"type": kind} for kind in normalizers]},
        splitter={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        around="<s> $A </s>",
    )


def _bpe(
    special: Sequence[str], alphabet: str, space: str, fields: Mapping[str, Any], **parts: Any
) -> dict[str, Any]:
    merges = [["t", "h"], ["th", "e"], ["a", "t"], ["c", "at"], [space, "cat"], [space, "the"]]
    pieces = (*special, *alphabet, *("".join(merge) for merge in merges))
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": merges,
        **fields,
    }
    return _file(model, special, **parts)


def _byte_level(
    *, prefix: bool = False, inside: bool = False, normalizer: Any = None, around: str | None = None
) -> dict[str, Any]:
    splitter: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": prefix,
        "trim_offsets": True,
        "use_regex": True,
    }
    if inside:
        splitter = {"type": "Sequence", "pretokenizers": [splitter]}
    return _bpe(
        ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"),
        # The bytes of é and of a lone accent, as this alphabet writes them.
        f"{string.ascii_letters}Ġ</>Ã©Ìģ",
        "Ġ",
        {},
        normalizer=normalizer,
        splitter=splitter,
        around=around,
    )


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_SPACES: dict[str, dict[str, Any]] = {
    "normalizer": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _REPLACE]}
    },
    "metaspace": {
        "splitter": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    },
}


def _sentence_piece(
    around: str | None, *, spaces: str = "normalizer", bos: str = "<s>", eos: str = "</s>"
) -> dict[str, Any]:
    return _bpe(
        ("<unk>", bos, eos),
        f"▁{string.ascii_letters}</>é",
        "▁",
        {"unk_token": "<unk>", "fuse_unk": True},
        around=around,
        **_SPACES[spaces],
    )


def _bert(lowercase: bool, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": lowercase,
    } | fields


def _case(
    tokenizer: dict[str, Any], model_type: str, tokenizer_class: str | None, **settings: Any
) -> dict[str, Any]:
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    return {
        "tokenizer.json": tokenizer,
        "config.json": {"model_type": model_type},
        "tokenizer_config.json": named | settings,
    }


_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BOTH = {"add_bos_token": True, "add_eos_token": True}
_ROBERTA = _ENDS | {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
_NFKC_BERT = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, _bert(True)]}

CASES: dict[str, dict[str, Any]] = {
    # The first and the final token.
    "e5-mistral": _case(
        _sentence_piece("<s> $A"), "mistral", "LlamaTokenizer", **_ENDS, **_BOTH, legacy=True
    ),
    "mistral of no class": _case(_sentence_piece("<s> $A"), "mistral", None, **_ENDS, **_BOTH),
    "llama, final token alone": _case(
        _sentence_piece("<s> $A"), "llama", "LlamaTokenizerFast", add_bos_token=False, add_eos_token=True
    ),
    "llama, one flag": _case(_sentence_piece("$A </s>"), "llama", "LlamaTokenizer", add_bos_token=True),
    "gemma": _case(
        _sentence_piece(None, bos="<bos>", eos="<eos>"), "gemma2", "GemmaTokenizer", add_eos_token=True
    ),
    "gpt-neox": _case(_byte_level(), "gpt_neox", "GPTNeoXTokenizer", **_ENDS, add_eos_token=True),
    "flags of a class that ignored them": _case(
        _byte_level(around="<s> $A"), "modernbert", "PreTrainedTokenizerFast", **_ENDS, add_eos_token=True
    ),
    # How spaces are written.
    "llama, no prefix": _case(
        _sentence_piece("<s> $A"), "llama", "LlamaTokenizer", **_ENDS, add_prefix_space=False
    )
    | {"tokenizer.model": ""},
    "llama, not legacy": _case(
        _sentence_piece("<s> $A"), "llama", "LlamaTokenizer", **_ENDS, add_prefix_space=True, legacy=False
    )
    | {"tokenizer.model": ""},
    "llama, legacy": _case(
        _sentence_piece("<s> $A", spaces="metaspace"),
        "llama",
        "LlamaTokenizer",
        **_ENDS,
        add_prefix_space=True,
    )
    | {"tokenizer.model": ""},
    "roberta, prefix": _case(
        _byte_level(around="<s> $A </s>"), "roberta", "RobertaTokenizer", **_ROBERTA, add_prefix_space=True
    ),
    "gpt2, no prefix": _case(
        _byte_level(prefix=True), "gpt2", "GPT2Tokenizer", **_ENDS, add_prefix_space=False
    ),
    "bloom, prefix inside": _case(
        _byte_level(inside=True), "bloom", "BloomTokenizerFast", **_ENDS, add_prefix_space=True
    ),
    # Normalizers.
    "xlm-roberta, nfkc": _case(_unigram("NFKC"), "xlm-roberta", "XLMRobertaTokenizer"),
    "camembert, lower case": _case(_unigram("NFKC", "Lowercase"), "camembert", "CamembertTokenizer"),
    "qwen2 without normalizer": _case(
        _byte_level(inside=True, around="$A <|endoftext|>"),
        "qwen3",
        "Qwen2Tokenizer",
        add_bos_token=False,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ),
    "bert, nfkc": _case(_word_piece(_NFKC_BERT), "bert", "BertTokenizer", do_lower_case=False),
    "bert, no flag": _case(_word_piece(_bert(True)), "bert", "BertTokenizer"),
    "bert, case kept": _case(_word_piece(_bert(True)), "bert", "BertTokenizer", do_lower_case=False),
    "bert, accents kept": _case(
        _word_piece(_bert(False)), "bert", None, do_lower_case=True, strip_accents=False
    ),
    "bert, signs kept": _case(
        _word_piece(_bert(True)), "bert", "BertTokenizerFast", tokenize_chinese_chars=False
    ),
    "mpnet, a flag that it ignored": _case(
        _word_piece(_bert(True)),
        "mpnet",
        "MPNetTokenizerFast",
        tokenize_chinese_chars=False,
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    ),
    # Tokens that stand beside the file.
    "parts of words as tokens": _case(
        _word_piece(_bert(True)), "bert", "BertTokenizer", additional_special_tokens=["th", "ca"]
    ),
    "special_tokens_map.json": _case(_word_piece(_bert(True)), "bert", "BertTokenizer")
    | {"special_tokens_map.json": {"additional_special_tokens": ["at"], "cls_token": "[CLS]"}},
    "added_tokens.json": _case(_word_piece(_bert(True)), "bert", "BertTokenizer")
    | {"added_tokens.json": {"he": 700, "ca": 701}},
    "added_tokens_decoder": _case(
        _word_piece(_bert(True)),
        "bert",
        "BertTokenizer",
        added_tokens_decoder={
            "5": {
                "content": "<mask>",
                "lstrip": True,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            },
            "8": {
                "content": "at",
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
                "special": False,
            },
        },
    ),
    "special tokens as text": _case(
        _word_piece(_bert(True)), "bert", "BertTokenizer", split_special_tokens=True
    ),
}
"""The files of a directory, by name."""
