"""What transformers 4's tokenizer classes made of a `tokenizer.json`, as data: which flags of `tokenizer_config.json` each obeyed.

transformers 5 builds many of these classes anew and drops what the file says. Models were trained and measured with what the
fourth made of it, so that is what counts here, whichever transformers is installed. Read off transformers 4.57.6. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

__all__ = ["GENERIC", "OldClass", "old_class_of"]


class OldClass(msgspec.Struct, frozen=True, kw_only=True):
    """One class, by what it did after it had read `tokenizer.json`."""

    normalizer_flags: Mapping[str, tuple[str, bool | None]] = {}
    """Flags that set a field of a `BertNormalizer`: the field, and what the class took where the flag is not written."""
    adds: tuple[bool, bool] | None = None
    """It replaced the post-processor by one that adds the first and the final token, as `add_bos_token` and `add_eos_token`
    say: what it took for each if it is not written. None: it ignored both."""
    bos: str | None = None
    eos: str | None = None
    """The tokens that `adds` means, unless the files name others."""
    converts: bool = False
    """With `add_prefix_space` it made its normalizer and pre-tokenizer anew, from `tokenizer.model`."""
    prefix_anywhere: bool = False
    """`add_prefix_space: true` reached pre-tokenizers inside a Sequence."""
    own_prefix: bool = False
    """`add_prefix_space` was its own argument, false if not written, and is so in transformers 5."""


GENERIC: Final = OldClass()
"""`PreTrainedTokenizerFast`, and every class that changed nothing."""

_CASE: Final[dict[str, tuple[str, bool | None]]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
}
_BERT: Final = OldClass(
    normalizer_flags=_CASE | {"tokenize_chinese_chars": ("handle_chinese_chars", True)},
)
_MPNET: Final = OldClass(normalizer_flags=_CASE)
_BYTE_LEVEL: Final = OldClass(own_prefix=True)
_LLAMA: Final = OldClass(adds=(True, False), bos="<s>", eos="</s>", converts=True)
_CLASSES: Final[dict[str, OldClass]] = {
    **dict.fromkeys(
        (
            "BertTokenizer",
            "ConvBertTokenizer",
            "DistilBertTokenizer",
            "DPRContextEncoderTokenizer",
            "DPRQuestionEncoderTokenizer",
            "DPRReaderTokenizer",
            "ElectraTokenizer",
            "FunnelTokenizer",
            "LayoutLMTokenizer",
            "LxmertTokenizer",
            "MobileBertTokenizer",
            "RealmTokenizer",
            "RetriBertTokenizer",
            "SqueezeBertTokenizer",
        ),
        _BERT,
    ),
    **dict.fromkeys(("MPNetTokenizer", "LayoutLMv2Tokenizer", "SplinterTokenizer"), _MPNET),
    **dict.fromkeys(
        (
            "BartTokenizer",
            "BlenderbotTokenizer",
            "CodeGenTokenizer",
            "DebertaTokenizer",
            "GPT2Tokenizer",
            "LEDTokenizer",
            "LongformerTokenizer",
            "MvpTokenizer",
            "RobertaTokenizer",
        ),
        _BYTE_LEVEL,
    ),
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": OldClass(adds=(True, False), bos="<s>", eos="</s>"),
    "GemmaTokenizer": OldClass(adds=(True, False), bos="<bos>", eos="<eos>"),
    "CohereTokenizer": OldClass(
        adds=(True, False), bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", prefix_anywhere=True
    ),
    "GPTNeoXTokenizer": OldClass(
        adds=(False, False), bos="<|endoftext|>", eos="<|endoftext|>", own_prefix=True
    ),
    "BloomTokenizer": OldClass(prefix_anywhere=True),
    # transformers 5's own: no older one has it, and it obeys what is written.
    "TokenizersBackend": OldClass(adds=(False, False)),
}
_OF_MODEL_TYPES: Final[dict[str, str]] = {
    model_type: name
    for name, model_types in {
        "BertTokenizer": "bert blip bros chinese_clip ernie megatron-bert nezha qdqbert visual_bert",
        "BartTokenizer": "bart",
        "BloomTokenizer": "bloom",
        "CodeGenTokenizer": "codegen phi",
        "CohereTokenizer": "cohere cohere2",
        "ConvBertTokenizer": "convbert",
        "DebertaTokenizer": "deberta",
        "DistilBertTokenizer": "distilbert",
        "DPRQuestionEncoderTokenizer": "dpr",
        "ElectraTokenizer": "electra",
        "FunnelTokenizer": "funnel",
        "GPT2Tokenizer": "dbrx exaone4 flex_olmo gpt2 gpt_bigcode gpt_neo gptj minimax olmo3 opt starcoder2",
        "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmo2 olmoe rwkv stablelm xlstm",
        "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma t5gemma",
        "LayoutLMTokenizer": "layoutlm",
        "LlamaTokenizer": "arcee deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe jamba jetmoe llama llama4 "
        "llama4_text ministral mistral mistral3 mixtral persimmon phi3 phimoe zamba zamba2",
        "LongformerTokenizer": "longformer",
        "LxmertTokenizer": "lxmert",
        "MobileBertTokenizer": "mobilebert",
        "MPNetTokenizer": "mpnet",
        "RoFormerTokenizer": "roformer",
        "RobertaTokenizer": "data2vec-text ibert mega mra roberta roberta-prelayernorm",
        "SplinterTokenizer": "splinter",
        "SqueezeBertTokenizer": "squeezebert",
    }.items()
    for model_type in model_types.split()
}
"""The class of a directory that names none, by the `model_type` of its `config.json`."""


def old_class_of(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> tuple[str, OldClass]:
    """The class that transformers 4's `AutoTokenizer` took for a directory: its name without "Fast", and what it did."""
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    if isinstance(named, str):
        name = named.removesuffix("Fast")
    else:
        name = _OF_MODEL_TYPES.get(str(config.get("model_type")), "PreTrainedTokenizer")
    return name, _CLASSES.get(name, GENERIC)
