"""What a directory's tokenizer is: `tokenizer.json` and the flags that transformers 4 obeyed, whichever transformers is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from embedq_consumer.engine import Failed, ModelError, Text, Tokens, load_encoder
from embedq_consumer.engine.model_directory import ModelDirectory
from embedq_consumer.engine.text.effective import effective_tokenizer
from embedq_consumer.engine.text.tokenizer import TextTokenizer
from tests.helpers.tiny_models import make_tiny_bert, make_tiny_mistral
from tests.helpers.tokenizer_cases import CASES, TEXTS, write_case
from tests.model.test_model_directory import edit

# What AutoTokenizer of transformers 4.57.6 with tokenizers 0.22.2 and sentencepiece 0.2.3 gave for TEXTS in the directories that
# `write_case` writes: [AutoTokenizer.from_pretrained(directory)(text)["input_ids"] for text in TEXTS]. Where a case has a
# `tokenizer.model`, it was a SentencePiece BPE model of the same pieces, with the merges' order as scores.
IDS: dict[str, list[list[int]]] = {
    "e5-mistral": [
        [1, 65, 3, 32, 62, 2],
        [1, 3, 0, 3, 0, 3, 32, 4, 9, 8, 0, 2],
        [1, 3, 0, 64, 56, 16, 4, 22, 14, 58, 2],
        [1, 3, 3, 4, 2, 3, 64, 2],
    ],
    "mistral of no class": [
        [1, 65, 3, 32, 62, 2],
        [1, 3, 0, 3, 0, 3, 32, 4, 9, 8, 0, 2],
        [1, 3, 0, 64, 56, 16, 4, 22, 14, 58, 2],
        [1, 3, 3, 4, 2, 3, 64, 2],
    ],
    "llama, final token alone": [
        [65, 3, 32, 62, 2],
        [3, 0, 3, 0, 3, 32, 4, 9, 8, 0, 2],
        [3, 0, 64, 56, 16, 4, 22, 14, 58, 2],
        [3, 3, 4, 2, 3, 64, 2],
    ],
    "llama, one flag": [
        [1, 65, 3, 32, 62],
        [1, 3, 0, 3, 0, 3, 32, 4, 9, 8, 0],
        [1, 3, 0, 64, 56, 16, 4, 22, 14, 58],
        [1, 3, 3, 4, 2, 3, 64],
    ],
    "gemma": [
        [1, 65, 3, 32, 62, 2],
        [1, 3, 0, 3, 0, 3, 32, 4, 9, 8, 0, 2],
        [1, 3, 0, 64, 56, 16, 4, 22, 14, 58, 2],
        [1, 3, 3, 4, 56, 57, 22, 58, 64, 2],
    ],
    "gpt-neox": [
        [67, 58, 34, 68, 2],
        [65, 58, 65, 58, 34, 6, 11, 10, 64, 65, 2],
        [70, 4, 2],
        [58, 6, 2, 70, 2],
    ],
    "flags of a class that ignored them": [
        [0, 67, 58, 34, 68],
        [0, 65, 58, 65, 58, 34, 6, 11, 10, 64, 65],
        [0, 70, 4],
        [0, 58, 6, 2, 70],
    ],
    "llama, no prefix": [
        [1, 61, 3, 32, 62],
        [1, 0, 3, 0, 3, 32, 4, 9, 8, 0],
        [1, 0, 64, 56, 16, 4, 22, 14, 58],
        [1, 3, 4, 2, 64],
    ],
    "llama, not legacy": [
        [1, 65, 3, 32, 62],
        [1, 3, 0, 3, 0, 3, 32, 4, 9, 8, 0],
        [1, 3, 0, 64, 56, 16, 4, 22, 14, 58],
        [1, 3, 4, 2, 64],
    ],
    "llama, legacy": [
        [1, 65, 3, 32, 62],
        [1, 3, 0, 3, 0, 3, 32, 4, 9, 8, 0],
        [1, 3, 0, 64, 56, 16, 4, 22, 14, 58],
        [1, 3, 3, 4, 2, 3, 64],
    ],
    "roberta, prefix": [
        [0, 71, 58, 34, 68, 2],
        [0, 58, 65, 58, 65, 58, 34, 6, 11, 10, 64, 65, 2],
        [0, 58, 70, 4, 2],
        [0, 58, 6, 2, 70, 2],
    ],
    "gpt2, no prefix": [[67, 58, 34, 68], [65, 58, 65, 58, 34, 6, 11, 10, 64, 65], [70, 4], [58, 6, 2, 70]],
    "bloom, prefix inside": [
        [71, 58, 34, 68],
        [58, 65, 58, 65, 58, 34, 6, 11, 10, 64, 65],
        [58, 70, 4],
        [58, 6, 2, 70],
    ],
    "xlm-roberta, nfkc": [
        [0, 6, 8, 2],
        [0, 7, 9, 5, 38, 10, 15, 62, 2],
        [0, 5, 65, 66, 7, 4, 2],
        [0, 5, 10, 2, 7, 2],
    ],
    "camembert, lower case": [
        [0, 6, 7, 2],
        [0, 7, 9, 5, 12, 10, 15, 62, 2],
        [0, 5, 65, 66, 7, 4, 2],
        [0, 5, 10, 2, 7, 2],
    ],
    "qwen2 without normalizer": [
        [67, 58, 34, 68, 5],
        [65, 58, 65, 58, 34, 6, 11, 10, 64, 65, 5],
        [70, 4, 5],
        [58, 6, 2, 70, 5],
    ],
    "bert, nfkc": [[2, 7, 9, 3], [2, 9, 11, 12, 3], [2, 72, 73, 9, 5, 3], [2, 17, 6, 9, 3]],
    "bert, no flag": [[2, 7, 9, 3], [2, 74, 138, 139, 71, 12, 3], [2, 72, 73, 9, 5, 3], [2, 17, 6, 9, 3]],
    "bert, case kept": [
        [2, 7, 10, 3],
        [2, 74, 138, 139, 71, 13, 133, 3],
        [2, 72, 73, 9, 5, 3],
        [2, 17, 6, 9, 3],
    ],
    "bert, accents kept": [
        [2, 7, 9, 3],
        [2, 74, 138, 139, 71, 12, 133, 3],
        [2, 72, 73, 9, 5, 3],
        [2, 17, 6, 9, 3],
    ],
    "bert, signs kept": [[2, 7, 9, 3], [2, 74, 138, 139, 71, 12, 3], [2, 16, 9, 5, 3], [2, 17, 6, 9, 3]],
    "mpnet, a flag that it ignored": [
        [2, 7, 9, 3],
        [2, 74, 138, 139, 71, 12, 3],
        [2, 72, 73, 9, 5, 3],
        [2, 17, 6, 9, 3],
    ],
    "parts of words as tokens": [
        [2, 143, 21, 9, 3],
        [2, 74, 138, 139, 71, 12, 3],
        [2, 72, 73, 144, 36, 5, 3],
        [2, 17, 6, 144, 36, 3],
    ],
    "special_tokens_map.json": [
        [2, 7, 19, 143, 3],
        [2, 74, 138, 139, 71, 12, 3],
        [2, 72, 73, 19, 143, 5, 3],
        [2, 17, 6, 19, 143, 3],
    ],
    "added_tokens.json": [
        [2, 36, 143, 144, 36, 3],
        [2, 74, 138, 139, 71, 144, 22, 84, 3],
        [2, 72, 73, 144, 36, 5, 3],
        [2, 17, 6, 144, 36, 3],
    ],
    "added_tokens_decoder": [
        [2, 7, 19, 143, 3],
        [2, 74, 138, 139, 71, 12, 3],
        [2, 72, 73, 19, 143, 5, 3],
        [2, 17, 6, 19, 143, 3],
    ],
    "special tokens as text": [
        [2, 7, 9, 3],
        [2, 74, 138, 139, 71, 12, 3],
        [2, 72, 73, 9, 77, 29, 80, 98, 90, 78, 3],
        [2, 17, 77, 79, 35, 78, 9, 3],
    ],
}


def directory_of(path: Path, *, lower_case: bool = False) -> ModelDirectory:
    """A checked directory without weights."""
    return ModelDirectory(
        root=path,
        checkpoint=path,
        config=json.loads((path / "config.json").read_text()),
        tokenizer_config=json.loads((path / "tokenizer_config.json").read_text()),
        pooling=("mean",),
        pooling_dimension=None,
        dense=(),
        prompts={},
        default_prompt="",
        lower_case=lower_case,
        max_seq_length=None,
        tensors=(),
    )


def case(name: str, path: Path, **settings: Any) -> ModelDirectory:
    """The directory of a case, with these settings of `tokenizer_config.json` changed; None takes one away."""
    write_case(name, path)
    file = path / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return directory_of(path)


def ids_of(directory: ModelDirectory) -> list[list[int]]:
    tokenizer = effective_tokenizer(directory).build()
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers_4(name: str, tmp_path: Path) -> None:
    assert ids_of(case(name, tmp_path)) == IDS[name]


@pytest.mark.parametrize(
    "name", ["e5-mistral", "xlm-roberta, nfkc", "bert, nfkc", "qwen2 without normalizer"]
)
def test_where_the_installed_transformers_reads_otherwise_a_note_says_so(name: str, tmp_path: Path) -> None:
    """Each of these is another tokenizer in transformers 5; which one was taken is logged."""
    *_, note = TextTokenizer.load(case(name, tmp_path), 64, 1000).notes
    assert note.startswith("transformers 5.")
    assert "reads this tokenizer otherwise" in note


def test_a_flag_that_changes_what_tokenizer_json_says_is_noted(tmp_path: Path) -> None:
    [note] = effective_tokenizer(case("bert, case kept", tmp_path)).notes
    assert note.startswith("tokenizer_config.json: do_lower_case: false is obeyed")


def test_a_tokenizer_that_all_read_alike_has_no_notes(tmp_path: Path) -> None:
    assert TextTokenizer.load(case("bert, no flag", tmp_path), 64, 1000).notes == ()


@pytest.mark.parametrize(
    ("name", "normalizer", "flag"),
    [
        ("bert, no flag", {"lowercase": False}, "do_lower_case"),
        ("bert, no flag", {"strip_accents": False}, "strip_accents"),
        ("bert, no flag", {"handle_chinese_chars": False}, "tokenize_chinese_chars"),
    ],
)
def test_a_flag_that_is_not_written_and_that_transformers_takes_otherwise_is_refused_by_name(
    name: str, normalizer: dict[str, bool], flag: str, tmp_path: Path
) -> None:
    directory = case(name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["normalizer"] |= normalizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=f"tokenizer_config.json: {flag}: expected true or false to be written"
    ):
        effective_tokenizer(directory)


def test_so_is_a_prefix_that_roberta_would_drop(tmp_path: Path) -> None:
    directory = case("roberta, prefix", tmp_path, add_prefix_space=None)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="add_prefix_space: expected true or false to be written"):
        effective_tokenizer(directory)


def test_a_tokenizer_that_tokenizer_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="RoFormerTokenizer"):
        effective_tokenizer(case("bert, no flag", tmp_path, tokenizer_class="RoFormerTokenizer"))


def test_ends_of_which_no_flag_speaks_are_those_of_tokenizer_json(tmp_path: Path) -> None:
    """transformers 4 took its classes' defaults; transformers 5 and tokenizer.json agree."""
    directory = case("llama, one flag", tmp_path, add_bos_token=None)
    assert [ids[-1] for ids in ids_of(directory)] == [2] * len(TEXTS)
    [note] = effective_tokenizer(directory).notes
    assert "neither add_bos_token nor add_eos_token is written" in note


def test_a_final_token_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="add_eos_token: true needs a eos_token of the vocabulary"):
        effective_tokenizer(case("gemma", tmp_path, tokenizer_class="LlamaTokenizer", add_bos_token=False))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_eos_token", "yes"),
        ("additional_special_tokens", "x"),
        ("additional_special_tokens", [3]),
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"a": {"content": "x"}}),
        ("added_tokens_decoder", {"1": {"content": "x", "lstrip": 3}}),
        ("split_special_tokens", 1),
    ],
)
def test_a_malformed_setting_is_refused_by_name(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"tokenizer_config.json: {field}: expected"):
        effective_tokenizer(case("e5-mistral", tmp_path, **{field: value}))


def test_a_tokenizer_written_out_by_transformers_4_is_the_same_one(tmp_path: Path) -> None:
    """It saves what the flags made of the file; the digest, and with it the model version, stays."""
    flagged = case("e5-mistral", tmp_path / "flags")
    written = case("e5-mistral", tmp_path / "written")
    file = tmp_path / "flags" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.save(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0",
        pair="<s>:0 $A:0 </s>:0 <s>:1 $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer.save(str(tmp_path / "written" / "tokenizer.json"), pretty=False)
    assert effective_tokenizer(written).digest == effective_tokenizer(flagged).digest


@pytest.mark.parametrize(
    ("name", "settings", "same"),
    [
        ("e5-mistral", {"add_eos_token": False}, False),
        ("bert, no flag", {"do_lower_case": True}, True),
        ("bert, no flag", {"do_lower_case": False}, False),
        (
            "bert, no flag",
            {"chat_template": "x", "backend": "tokenizers", "clean_up_tokenization_spaces": True},
            True,
        ),
        ("bert, no flag", {"split_special_tokens": True}, False),
        ("bert, no flag", {"additional_special_tokens": ["th"]}, False),
        ("flags of a class that ignored them", {"add_eos_token": None}, True),
    ],
)
def test_the_digest_changes_with_what_texts_become_and_with_nothing_else(
    name: str, settings: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    before = effective_tokenizer(case(name, tmp_path / "before"))
    after = effective_tokenizer(case(name, tmp_path / "after", **settings))
    assert (before.digest == after.digest) is same


def test_mistrals_mended_pattern_is_taken_where_the_flag_is_written(tmp_path: Path) -> None:
    """Compared with transformers 4.57.6 on a vocabulary of 100,000: it looks at no smaller one."""
    directory = case("qwen2 without normalizer", tmp_path, fix_mistral_regex=True)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    wrong = {"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Isolated", "invert": False}
    settings["pre_tokenizer"]["pretokenizers"].insert(0, wrong)
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    words = effective_tokenizer(directory).build().pre_tokenizer
    assert words is not None
    assert [word for word, _ in words.pre_tokenize_str("theCat")] == ["the", "Cat"]


def test_lower_case_of_sentence_transformers_comes_before_everything_else(tmp_path: Path) -> None:
    case("bert, case kept", tmp_path)
    cased, lower = (effective_tokenizer(directory_of(tmp_path, lower_case=flag)) for flag in (False, True))
    assert cased.build().encode("Cat").tokens == ["[CLS]", "Cat", "[SEP]"]
    assert lower.build().encode("Cat").tokens == ["[CLS]", "cat", "[SEP]"]
    assert cased.digest != lower.digest


# -- served ------------------------------------------------------------------------------------------------------------


def test_a_final_token_that_transformers_5_drops_is_served_and_counts_for_the_version(tmp_path: Path) -> None:
    """Last-token pooling takes its vector: without it every vector is another one."""
    path = make_tiny_mistral(tmp_path / "mistral")
    flags = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    before = load_encoder(path, device="cpu").model_version
    edit("tokenizer_config.json", **flags, **ends)(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    encoder = load_encoder(path, device="cpu")
    [found] = encoder.tokenize([Text("the moon")])
    assert isinstance(found, Tokens)
    assert tokenizer.decode(found.ids.tolist(), skip_special_tokens=False) == "<|im_start|>the moon<|im_end|>"
    assert encoder.model_version != before
    assert any("add_eos_token are obeyed" in note for note in encoder.notes)


def test_a_start_from_what_is_known_of_a_model_reads_its_tokenizer_alike(tmp_path: Path) -> None:
    path, known = make_tiny_bert(tmp_path / "model"), tmp_path / "known"
    edit("tokenizer_config.json", split_special_tokens=True, do_lower_case=False)(path)
    encoders = [load_encoder(path, device="cpu", known_models=known) for _ in range(2)]
    assert len(list(known.glob("*.model"))) == 1
    first, second = (encoder.tokenize([Text("The [MASK] moon")]) for encoder in encoders)
    assert isinstance(first[0], Tokens)
    assert isinstance(second[0], Tokens)
    assert first[0].ids.tolist() == second[0].ids.tolist()
    assert Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("[MASK]") not in first[0].ids
    assert encoders[0].model_version == encoders[1].model_version
    assert encoders[0].notes == encoders[1].notes != ()


# -- ids beyond the embedding table ------------------------------------------------------------------------------------


def add_token(path: Path, content: str, number: int) -> None:
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": number, "content": content})
    (path / "tokenizer.json").write_text(json.dumps(settings))


def rows_of(path: Path) -> int:
    return int(json.loads((path / "config.json").read_text())["vocab_size"])


def test_a_text_with_an_added_token_that_the_model_does_not_know_fails_alone(tmp_path: Path) -> None:
    path = make_tiny_bert(tmp_path)
    rows = rows_of(path)
    add_token(path, "<extra>", rows)
    encoder = load_encoder(path, device="cpu")
    fine, failed, cut = encoder.tokenize(
        [Text("the moon"), Text("the <extra> moon"), Text("moon " * 500 + "<extra>", truncate="end")]
    )
    assert isinstance(fine, Tokens)
    assert isinstance(cut, Tokens)  # nothing of it is left
    assert isinstance(failed, Failed)
    assert failed.beyond == (rows, rows)
    assert encoder.encode([fine.ids]).shape == (1, encoder.hidden_size)
    [note] = encoder.notes
    assert f"the embedding table has {rows} rows" in note


def test_a_token_of_every_text_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    path = make_tiny_bert(tmp_path)
    rows = rows_of(path)
    add_token(path, "<end>", rows)
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [rows]
    (path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=f"tokenizer.json: every text gets the token .* of id {rows}, .* has {rows} rows"
    ):
        load_encoder(path, device="cpu")


def test_a_vocabulary_beyond_the_embedding_table_is_refused(tmp_path: Path) -> None:
    path = make_tiny_bert(tmp_path)
    rows = rows_of(path)
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["model"]["vocab"]["harbourmaster"] = rows + 3
    (path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=f"tokenizer.json: .*'harbourmaster' of id {rows + 3}, .* has {rows} rows"
    ):
        load_encoder(path, device="cpu")
