"""The tokenizer that a directory means: `tokenizer.json`, and the flags beside it that transformers 4's class obeyed.

It is built from the file with the tokenizers library alone. What the flags change is changed in the file's own form, so that
one text is what serves, what the load cache keeps, and what the model version is made of, whichever transformers is
installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import AddedToken, Tokenizer

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.safety.files import read_bounded
from embedq_consumer.engine.safety.panics import first_line, panics_caught
from embedq_consumer.engine.text.old_classes import old_class_of

__all__ = ["EffectiveTokenizer", "effective_tokenizer"]

_COUNTS: Final = ("added_tokens", "model", "normalizer", "post_processor", "pre_tokenizer")
"""The parts of the file that ids follow from. Truncation and padding are off, and nothing is decoded."""
_SPECIAL: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
_ADDED_FIELDS: Final = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_SPACE: Final = "▁"
"""What SentencePiece writes for a space."""
_MISTRAL: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where words end, as transformers 4.57.6 has it."""

Parts = dict[str, msgspec.Raw]
"""The file's top level. The vocabulary stays raw: Python's objects of it would take many times its size."""


class EffectiveTokenizer:
    """One tokenizer as the text of a `tokenizer.json`. Immutable."""

    def __init__(self, text: bytes, *, split_special_tokens: bool = False, notes: Sequence[str] = ()) -> None:
        self.text: Final = text
        self.split_special_tokens: Final = split_special_tokens
        """A text that spells a special token is read as ordinary characters."""
        self.notes: Final = tuple(notes)
        """What an operator should know of how the files were read."""

    def build(self) -> Tokenizer:
        """The library's object. Raises what the Rust side raises."""
        tokenizer = Tokenizer.from_buffer(self.text)
        tokenizer.encode_special_tokens = self.split_special_tokens
        return tokenizer

    def noting(self, note: str) -> EffectiveTokenizer:
        """The same with one more note."""
        return EffectiveTokenizer(
            self.text, split_special_tokens=self.split_special_tokens, notes=(*self.notes, note)
        )

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything that ids follow from. How the file is indented does not count."""
        parts = msgspec.json.decode(self.text, type=Parts)
        total = hashlib.sha256(b"1" if self.split_special_tokens else b"0")
        for name in _COUNTS:
            raw = parts.get(name, msgspec.Raw(b"null"))
            if name == "model":
                value = bytes(msgspec.json.format(raw, indent=-1))
            else:
                value = json.dumps(msgspec.json.decode(raw), sort_keys=True).encode()
            for part in (name.encode(), value):
                total.update(len(part).to_bytes(8, "little"))
                total.update(part)
        return total.hexdigest()


def effective_tokenizer(directory: ModelDirectory) -> EffectiveTokenizer:
    """The tokenizer of a checked directory. Flags that are not written change nothing.

    Raises:
        ModelError: a file is malformed; or a flag is not written, and transformers takes another value for it than
            `tokenizer.json` has.
    """
    file = directory.checkpoint / "tokenizer.json"
    try:
        with panics_caught():
            return _Reading(directory, file).read()
    except ModelError:
        raise
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{file}: {first_line(error)}") from error


class _Reading:
    """One reading of a directory's files, part by part."""

    def __init__(self, directory: ModelDirectory, file: Path) -> None:
        self._directory = directory
        self._file = file
        self._config_file = directory.checkpoint / "tokenizer_config.json"
        self._settings = _settings_of(directory)
        self._class_name, self._class = old_class_of(directory.config, directory.tokenizer_config)
        self._content = read_bounded(file)
        self._parts: Parts = msgspec.json.decode(self._content, type=Parts)
        self._notes: list[str] = []
        self._changed = False

    def read(self) -> EffectiveTokenizer:
        if self._class_name == "RoFormerTokenizer":
            raise ModelError(
                f"{self._config_file}: tokenizer_class: RoFormerTokenizer splits words by a dictionary that tokenizer.json "
                "cannot hold; not served"
            )
        self._normalizer_flags()
        self._prefix_space()
        self._mended_words()
        if self._directory.lower_case:
            rest = self._part("normalizer")
            lower = {"type": "Lowercase"}
            self._put(
                "normalizer", {"type": "Sequence", "normalizers": [lower, *([] if rest is None else [rest])]}
            )
        tokenizer = self._result().build()
        self._added_tokens(tokenizer)
        self._first_and_final(tokenizer)
        return self._result()

    def _result(self) -> EffectiveTokenizer:
        return EffectiveTokenizer(
            msgspec.json.encode(self._parts) if self._changed else self._content,
            split_special_tokens=self._flag("split_special_tokens") or False,
            notes=self._notes,
        )

    def _part(self, name: str) -> Any:
        return msgspec.json.decode(self._parts.get(name, msgspec.Raw(b"null")))

    def _put(self, name: str, value: object) -> None:
        self._parts[name] = msgspec.Raw(msgspec.json.encode(value))
        self._changed = True

    def _flag(self, name: str) -> bool | None:
        """A flag that may be left out."""
        value = self._settings.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise ModelError(f"{self._config_file}: {name}: expected true or false")

    def _normalizer_flags(self) -> None:
        """BERT's flags. They set a `BertNormalizer` at the top, and nothing else."""
        normalizer = self._part("normalizer")
        if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
            return
        for flag, (field, default) in self._class.normalizer_flags.items():
            found = normalizer.get(field)
            # Of the accents null means: as the case.
            written = flag in self._settings and (self._settings[flag] is not None or default is None)
            wanted = self._flag(flag) if written else default
            if found == wanted or _same_accents(field, found, wanted, normalizer):
                continue
            if not written:
                self._refuse_unwritten(flag, default, f"normalizer.{field}", found)
            normalizer = {**normalizer, field: wanted}
            self._put("normalizer", normalizer)
            self._obeyed(flag)

    def _prefix_space(self) -> None:
        """`add_prefix_space`: whether a text begins as if a space stood before it."""
        wanted = self._flag("add_prefix_space")
        splitter = self._part("pre_tokenizer")
        if self._class.converts and wanted is not None:
            self._convert_spaces(splitter, wanted)
        elif isinstance(splitter, dict) and isinstance(found := splitter.get("add_prefix_space"), bool):
            if wanted is None and found and self._class.own_prefix:
                self._refuse_unwritten("add_prefix_space", False, "pre_tokenizer.add_prefix_space", found)
            if wanted is None and found:
                self._notes.append(
                    f"{self._config_file.name}: add_prefix_space is not written, so tokenizer.json's true counts; transformers 4 "
                    "took false"
                )
            if wanted is not None and wanted != found:
                self._put("pre_tokenizer", {**splitter, "add_prefix_space": wanted})
                self._obeyed("add_prefix_space")
        elif wanted and self._class.prefix_anywhere and (prefixed := _prefixed(splitter)) != splitter:
            self._put("pre_tokenizer", prefixed)
            self._obeyed("add_prefix_space")

    def _convert_spaces(self, splitter: Any, prefix: bool) -> None:
        """Llama's: what transformers 4 made of `tokenizer.model` where the flag is written, in one of two forms."""
        if not (self._directory.checkpoint / "tokenizer.model").is_file():
            return  # it could not load such a directory
        if splitter is not None and splitter.get("type") != "Metaspace":
            return  # a tokenizer of another kind under Llama's name
        normalizer: Any = None
        if self._flag("legacy") is False:
            splitter = {
                "type": "Metaspace",
                "replacement": _SPACE,
                "prepend_scheme": "first" if prefix else "never",
                "split": False,
            }
        else:
            splitter = None
            prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
            normalizer = {"type": "Sequence", "normalizers": [*prepend, replace]}
        if (self._part("normalizer"), self._part("pre_tokenizer")) != (normalizer, splitter):
            self._put("normalizer", normalizer)
            self._put("pre_tokenizer", splitter)
            self._obeyed("add_prefix_space")

    def _mended_words(self) -> None:
        """`fix_mistral_regex`: Mistral's own pattern, in place of one that splits some words wrongly."""
        splitter = self._part("pre_tokenizer")
        steps = splitter.get("pretokenizers") if isinstance(splitter, dict) else None
        if not self._flag("fix_mistral_regex") or not steps or steps[0].get("type") != "Split":
            return
        mended = {"type": "Split", "pattern": {"Regex": _MISTRAL}, "behavior": "Isolated", "invert": False}
        if steps[0] != mended:
            self._put("pre_tokenizer", {**splitter, "pretokenizers": [mended, *steps[1:]]})
            self._obeyed("fix_mistral_regex")

    def _added_tokens(self, tokenizer: Tokenizer) -> None:
        """Tokens that the files beside `tokenizer.json` name. One that is new gets an id after all others."""
        known = tokenizer.get_added_tokens_decoder()
        shown = {repr(token) for token in known.values()}
        names = self._special_tokens()
        new = [token for token in self._decoder_tokens(special={*names}) if repr(token) not in shown]
        contents = {token.content for token in (*known.values(), *new)}
        new += [token for content, token in names.items() if content not in contents]
        if not new:
            return
        tokenizer.add_tokens(new)
        found = tokenizer.get_added_tokens_decoder()
        if {number: repr(token) for number, token in found.items()} == {
            number: repr(token) for number, token in known.items()
        }:
            return
        self._put(
            "added_tokens",
            [
                {"id": number, **{field: getattr(token, field) for field in _ADDED_FIELDS}}
                for number, token in sorted(found.items())
            ],
        )
        self._notes.append(
            f"{self._config_file.name}: names special tokens that tokenizer.json does not list; they are read as tokens"
        )

    def _decoder_tokens(self, special: set[str]) -> Iterator[AddedToken]:
        """Those of `added_tokens_decoder`, or of `added_tokens.json` where there is none, by id."""
        listed = self._settings.get("added_tokens_decoder")
        if listed is None:
            file = self._directory.checkpoint / "added_tokens.json"
            added = _object(file) if file.exists() else {}
            listed = {
                number: {
                    "content": content,
                    "special": content in special,
                    "normalized": content not in special,
                }
                for content, number in added.items()
            }
        if not isinstance(listed, dict):
            raise ModelError(f"{self._config_file}: added_tokens_decoder: expected an object")
        try:
            by_id = sorted(listed.items(), key=lambda entry: int(entry[0]))
        except (TypeError, ValueError):
            raise ModelError(f"{self._config_file}: added_tokens_decoder: expected ids as keys") from None
        for _, value in by_id:
            yield self._token("added_tokens_decoder", value, special)

    def _special_tokens(self) -> dict[str, AddedToken]:
        """Those that have a role, by content, in transformers' own order."""
        values = [(name, self._settings.get(name)) for name in _SPECIAL]
        for name in _LISTS:
            more = self._settings.get(name) or []
            if isinstance(more, dict):
                more = list(more.values())
            if not isinstance(more, list):
                raise ModelError(f"{self._config_file}: {name}: expected a list")
            values += [(name, value) for value in more]
        found: dict[str, AddedToken] = {}
        for name, value in values:
            if value is not None:
                token = self._token(name, value)
                found.setdefault(token.content, token)
        return found

    def _token(self, name: str, value: object, special: set[str] | None = None) -> AddedToken:
        """A token as it is written; one without a set of `special` ones to be among is special itself."""
        if isinstance(value, str):
            value = {"content": value, "special": True}
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise ModelError(
                f"{self._config_file}: {name}: expected tokens, strings or objects with `content`"
            )
        fields = {field: value[field] for field in _ADDED_FIELDS if field in value}
        if special is None or fields["content"] in special:
            fields["special"] = True
        try:
            return AddedToken(**fields)
        except TypeError:
            raise ModelError(f"{self._config_file}: {name}: expected true or false in its flags") from None

    def _first_and_final(self, tokenizer: Tokenizer) -> None:
        """`add_bos_token` and `add_eos_token`, where the class obeyed them and at least one is written."""
        if self._class.adds is None:
            return
        written = {name: self._flag(f"add_{name}_token") for name in ("bos", "eos")}
        unwritten = not any(flag is not None for flag in written.values())
        ends: list[list[tuple[str, int]]] = []
        for (name, flag), default in zip(written.items(), self._class.adds, strict=True):
            ends.append([])
            if default if flag is None else flag:
                end = self._end_token(tokenizer, name)
                if end is None and unwritten:
                    return
                if end is None:
                    raise ModelError(
                        f"{self._config_file}: add_{name}_token: true needs a {name}_token of the vocabulary"
                    )
                ends[-1].append(end)
        first, final = ends
        bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        if full == [*(number for _, number in first), *bare, *(number for _, number in final)]:
            return
        if unwritten:
            self._notes.append(
                f"{self._config_file.name}: neither add_bos_token nor add_eos_token is written, so the first and final tokens "
                f"of tokenizer.json count; {self._class_name} of transformers 4 took others"
            )
            return
        self._put("post_processor", _template(first, final))
        before, after = (end[0][0] if end else "nothing" for end in (first, final))
        self._notes.append(
            f"{self._config_file.name}: add_bos_token and add_eos_token are obeyed ({before} before each text, {after} after "
            f"it), as {self._class_name} of transformers 4 did; tokenizer.json alone says otherwise"
        )

    def _end_token(self, tokenizer: Tokenizer, name: str) -> tuple[str, int] | None:
        """The token that begins or ends a text, and its id; None if there is none."""
        value = self._settings.get(f"{name}_token", self._class.bos if name == "bos" else self._class.eos)
        content = value["content"] if isinstance(value, dict) else value
        number = tokenizer.token_to_id(content) if isinstance(content, str) else None
        return None if number is None else (content, number)

    def _obeyed(self, flag: str) -> None:
        self._notes.append(
            f"{self._config_file.name}: {flag}: {json.dumps(self._settings[flag])} is obeyed, as {self._class_name} of "
            "transformers 4 did; tokenizer.json alone says otherwise"
        )

    def _refuse_unwritten(self, flag: str, default: object, part: str, found: object) -> None:
        raise ModelError(
            f"{self._config_file}: {flag}: expected true or false to be written: {self._class_name} of transformers takes "
            f"{json.dumps(default)} without it, and tokenizer.json has {json.dumps(found)} ({part})"
        )


def _settings_of(directory: ModelDirectory) -> Mapping[str, Any]:
    """`tokenizer_config.json`; where it lists no added tokens, `special_tokens_map.json` wins, as it did of old."""
    settings = directory.tokenizer_config
    file = directory.checkpoint / "special_tokens_map.json"
    if "added_tokens_decoder" in settings or not file.exists():
        return settings
    return {**settings, **_object(file)}


def _object(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(read_bounded(file), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: expected a JSON object") from error


def _same_accents(field: str, found: object, wanted: object, normalizer: Mapping[str, Any]) -> bool:
    """Whether both say the same of accents: without a word of their own they go with the case."""
    if field != "strip_accents":
        return False
    case = bool(normalizer.get("lowercase"))
    return (case if found is None else found) == (case if wanted is None else wanted)


def _prefixed(part: Any) -> Any:
    """The same with `add_prefix_space` true at every depth."""
    if isinstance(part, dict):
        return {
            key: True if key == "add_prefix_space" and value is False else _prefixed(value)
            for key, value in part.items()
        }
    return [_prefixed(each) for each in part] if isinstance(part, list) else part


def _template(first: Sequence[tuple[str, int]], final: Sequence[tuple[str, int]]) -> dict[str, object]:
    """A post-processor that adds these tokens around each text."""

    def end(tokens: Sequence[tuple[str, int]], kind: int) -> list[dict[str, object]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}} for token, _ in tokens]

    def side(name: str, kind: int) -> list[dict[str, object]]:
        return [*end(first, kind), {"Sequence": {"id": name, "type_id": kind}}, *end(final, kind)]

    return {
        "type": "TemplateProcessing",
        "single": side("A", 0),
        "pair": [*side("A", 0), *side("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in (*first, *final)
        },
    }
