"""What a model directory says, read and checked before any weight is loaded.

The layout is sentence-transformers' own (`modules.json` and the folders it names); a directory without `modules.json`
is a bare Hugging Face checkpoint. Every setting that changes vectors is either understood here or refused by name: one
that was silently skipped would give wrong vectors that look right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from embedq_consumer.engine.adapters.reading import ADAPTER_CONFIG, Adapter, base_of, read_adapter
from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.pooling import POOLINGS
from embedq_consumer.engine.safety.bounds import too_large
from embedq_consumer.engine.safety.files import confines_of, read_bounded, survey
from embedq_consumer.engine.safety.foreign import foreign_config, foreign_tokenizer
from embedq_consumer.engine.safety.headers import TensorSlice, read_header

__all__ = ["ENCODERS", "Activation", "Dense", "ModelDirectory", "read_directory"]

Activation = Literal["identity", "tanh"]

ENCODERS: Final[Mapping[str, str]] = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
"""transformers' class of the encoder alone, for the encoder-decoder models that are served as sentence-transformers does: without
their decoder."""

_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
}
# What these settings choose, embedq chooses itself: the dtype, the attention, the side of padding, what is cached.
_HARMLESS_KWARGS = frozenset(
    {
        "attn_implementation",
        "dtype",
        "model_max_length",
        "padding_side",
        "torch_dtype",
        "use_cache",
        "use_fast",
    }
)
_SHOWN = 80
"""Characters of a value in an error's message."""


class Dense(msgspec.Struct, frozen=True):
    """A linear layer after the pooling, with or without a bias: `activation(weight · vector + bias)`."""

    weight: TensorSlice
    bias: TensorSlice | None
    activation: Activation

    @property
    def width_in(self) -> int:
        return self.weight.shape[1]

    @property
    def width_out(self) -> int:
        return self.weight.shape[0]


class ModelDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """One checked directory. Only the paths depend on where it lies."""

    root: Path
    checkpoint: Path
    """Where config, weights and tokenizer lie: `root`, or the folder that `modules.json` names for the Transformer."""
    config: dict[str, Any]
    """`config.json` as it is."""
    tokenizer_config: dict[str, Any]
    pooling: tuple[str, ...]
    """Names in `POOLINGS`: the vectors of several are put one after the other."""
    pooling_dimension: int | None
    """The vector's length according to the pooling's configuration; None if it does not say."""
    dense: tuple[Dense, ...]
    """The layers that the pooled vector goes through, in order; each takes the output of the one before."""
    prompts: dict[str, str]
    default_prompt: str
    lower_case: bool
    """Lower-case the text before the tokenizer sees it."""
    max_seq_length: int | None
    """The limit that these files set, in tokens with special tokens; None if they set none."""
    tensors: tuple[TensorSlice, ...]
    adapter: Adapter | None = None
    """What is merged into these weights; then `root` is the adapter's directory, and all else is the base model's."""

    @property
    def all_tensors(self) -> tuple[TensorSlice, ...]:
        """The weights, and those of the adapter."""
        return self.tensors if self.adapter is None else (*self.tensors, *self.adapter.tensors)

    @property
    def quantization_method(self) -> str | None:
        """The method that `config.json` says the weights were quantized with (`gptq`, `awq`, …); None if they were not."""
        settings = self.config.get("quantization_config")
        return str(settings.get("quant_method", "unknown")) if settings else None


def read_directory(path: Path, root: Path | None = None) -> ModelDirectory:
    """Read and check `path`, a model or a LoRA adapter over one; of the weights, only the headers are read. Links may lead to files below `root`; see `safety/files.py`.

    Raises:
        ModelError: a file is missing or malformed, is no regular file or too large, or asks for something that embedq does not
            run.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory")
    survey(path, confines_of(path, root))
    if (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists():
        adapter = read_adapter(path)
        base = read_directory(base_of(path, root), root)
        if base.quantization_method is not None:
            raise ModelError(
                f"{path / ADAPTER_CONFIG}: base_model_name_or_path: {base.root} is quantized ({base.quantization_method}); adapters "
                "are merged into unquantized weights"
            )
        return msgspec.structs.replace(base, root=path, adapter=adapter)
    modules, dense_folders = _modules(path)
    checkpoint = path / modules["Transformer"] if modules else path
    config = _read_object(checkpoint / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{checkpoint / 'config.json'}: model_type: expected a string")
    _refuse_foreign_checkpoints(checkpoint, config)
    if not (checkpoint / "tokenizer.json").is_file():
        raise ModelError(
            f"{checkpoint / 'tokenizer.json'}: missing; only fast tokenizers are served (AutoTokenizer's save_pretrained makes one)"
        )
    _refuse_no_object(checkpoint / "tokenizer.json")
    tokenizer_config = _read_optional(checkpoint / "tokenizer_config.json")
    if problem := foreign_tokenizer(tokenizer_config):
        raise ModelError(f"{checkpoint / 'tokenizer_config.json'}: {problem}")
    lower_case, max_seq_length = _transformer_settings(checkpoint)
    if "Pooling" in modules:
        pooling, dimension = _pooling(path / modules["Pooling"] / "config.json")
    elif modules:
        raise ModelError(f"{path / 'modules.json'}: expected a Pooling module")
    else:
        pooling, dimension = _bare_pooling(config), None
    prompts, default_prompt = _prompts(path / "config_sentence_transformers.json")
    model_max_length = _positive(checkpoint / "tokenizer_config.json", tokenizer_config, "model_max_length")
    return ModelDirectory(
        root=path,
        checkpoint=checkpoint,
        config=config,
        tokenizer_config=tokenizer_config,
        pooling=pooling,
        pooling_dimension=dimension,
        dense=_dense(tuple(path / folder for folder in dense_folders)),
        prompts=prompts,
        default_prompt=default_prompt,
        lower_case=lower_case,
        max_seq_length=max_seq_length or model_max_length,
        tensors=_tensors(checkpoint),
    )


def _modules(path: Path) -> tuple[dict[str, str], list[str]]:
    """The folder of each kind of module, and the folders of the Dense ones in order."""
    file = path / "modules.json"
    if not file.exists():
        return {}, []
    entries = _read_json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ModelError(f"{file}: expected a list of objects")
    found: dict[str, str] = {}
    dense: list[str] = []
    for entry in entries:
        kind = str(entry.get("type", "")).rpartition(".")[2]
        folder = entry.get("path", "")
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize") or kind in found:
            raise ModelError(
                f"{file}: type: embedq runs one Transformer, one Pooling, Dense modules and one Normalize, "
                f"got {_shown(entry.get('type'))}"
            )
        if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ModelError(f"{file}: path: expected a folder below the model's own, got {_shown(folder)}")
        if kind == "Dense" and list(found) == ["Transformer", "Pooling"]:
            dense.append(folder)
        else:
            found[kind] = folder
    if list(found) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            f"{file}: expected a Transformer, then a Pooling, then maybe Dense modules, then maybe a Normalize"
        )
    return found, dense


def _dense(folders: tuple[Path, ...]) -> tuple[Dense, ...]:
    layers: list[Dense] = []
    for folder in folders:
        layer = _dense_layer(folder)
        if layers and layers[-1].width_out != layer.width_in:
            raise ModelError(
                f"{folder / 'config.json'}: in_features is {layer.width_in}, but the Dense module before it "
                f"gives {layers[-1].width_out}"
            )
        layers.append(layer)
    return tuple(layers)


def _dense_layer(folder: Path) -> Dense:
    file = folder / "config.json"
    settings = _read_object(file)
    # Without the field, sentence-transformers takes the last one.
    name = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(f"{file}: activation_function: expected Identity or Tanh, got {_shown(name)}")
    for field in ("module_input_name", "module_output_name"):
        if settings.get(field) not in (None, "sentence_embedding"):
            raise ModelError(f"{file}: {field}: expected sentence_embedding, got {_shown(settings[field])}")
    if _flag(file, settings, "use_residual", False):
        raise ModelError(f"{file}: use_residual: true is not supported")
    tensors = {tensor.name: tensor for tensor in _tensors(folder)}
    width_in, width_out = (_positive(file, settings, name) for name in ("in_features", "out_features"))
    shapes: dict[str, tuple[int | None, ...]] = {"linear.weight": (width_out, width_in)}
    if _flag(file, settings, "bias", True):
        shapes["linear.bias"] = (width_out,)
    found: dict[str, tuple[int | None, ...]] = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        raise ModelError(
            f"{next(iter(tensors.values())).file}: expected tensors of the shapes {shapes}, got {found}"
        )
    return Dense(tensors["linear.weight"], tensors.get("linear.bias"), _ACTIVATIONS[name])


def _refuse_foreign_checkpoints(checkpoint: Path, config: Mapping[str, Any]) -> None:
    if (checkpoint / "adapter_config.json").exists():
        raise ModelError(
            f"{checkpoint / 'adapter_config.json'}: an adapter and a whole model in one directory; expected one of them"
        )
    file = checkpoint / "config.json"
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise ModelError(f"{file}: quantization_config: expected an object")
    if config.get("is_encoder_decoder") and config["model_type"] not in ENCODERS:
        raise ModelError(
            f"{file}: is_encoder_decoder: of encoder-decoder models, embedq serves the encoders of {', '.join(ENCODERS)}, "
            f"got model_type {_shown(config['model_type'])}"
        )
    if problem := foreign_config(config) or too_large(config):
        raise ModelError(f"{file}: {problem}")


def _transformer_settings(checkpoint: Path) -> tuple[bool, int | None]:
    file = next((f for name in _TRANSFORMER_CONFIGS if (f := checkpoint / name).exists()), None)
    if file is None:
        return False, None
    settings = _read_object(file)
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise ModelError(f"{file}: transformer_task: expected feature-extraction")
    if settings.get("module_output_name", "token_embeddings") != "token_embeddings":
        raise ModelError(f"{file}: module_output_name: expected token_embeddings")
    modalities = settings.get("modality_config")
    if modalities is not None and (not isinstance(modalities, dict) or "text" not in modalities):
        raise ModelError(f"{file}: modality_config: expected text")
    for field in (
        "query_length",
        "document_length",
        "query_expansion",
        "processing_kwargs",
        "tokenizer_name_or_path",
    ):
        if settings.get(field):
            raise ModelError(f"{file}: {field}: not supported")
    for field in (
        "model_args",
        "model_kwargs",
        "config_args",
        "config_kwargs",
        "tokenizer_args",
        "processor_kwargs",
    ):
        value = settings.get(field) or {}
        foreign = set(value) - _HARMLESS_KWARGS if isinstance(value, dict) else {"(not an object)"}
        if foreign:
            raise ModelError(f"{file}: {field}: not supported: {', '.join(sorted(foreign))}")
    limits = [
        _positive(file, source, name)
        for source, name in (
            (settings.get("processor_kwargs") or {}, "model_max_length"),
            (settings.get("tokenizer_args") or {}, "model_max_length"),
            (settings, "max_seq_length"),
        )
    ]
    return _flag(file, settings, "do_lower_case", False), next((n for n in limits if n is not None), None)


def _pooling(file: Path) -> tuple[tuple[str, ...], int | None]:
    settings = _read_object(file)
    if not _flag(file, settings, "include_prompt", True):
        raise ModelError(f"{file}: include_prompt: false is not supported")
    modes = settings.get("pooling_mode")
    field = "pooling_mode"
    if modes is None:
        # All flags false or absent: sentence-transformers takes the mean.
        flags = [name for name in _LEGACY_POOLING if _flag(file, settings, name, False)]
        field = ", ".join(flags)
        modes = [_LEGACY_POOLING[name] for name in flags] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if (
        not isinstance(modes, list)
        or not modes
        or not all(isinstance(mode, str) and mode in POOLINGS for mode in modes)
    ):
        raise ModelError(
            f"{file}: {field}: expected one or more of {', '.join(POOLINGS)}, got {_shown(modes)}"
        )
    if len(set(modes)) < len(modes):
        raise ModelError(f"{file}: {field}: expected each pooling once, got {', '.join(modes)}")
    names = ("embedding_dimension", "word_embedding_dimension")
    dimension = next((_positive(file, settings, name) for name in names if name in settings), None)
    return tuple(modes), dimension


def _bare_pooling(config: Mapping[str, Any]) -> tuple[str]:
    """Without `modules.json`: the last token for a causal language model, else the mean, as sentence-transformers does."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    causal = str(first).endswith("ForCausalLM") and config.get("is_causal", True)
    return ("lasttoken",) if causal else ("mean",)


def _prompts(file: Path) -> tuple[dict[str, str], str]:
    settings = _read_optional(file)
    if settings.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ModelError(
            f"{file}: model_type: expected SentenceTransformer, got {_shown(settings['model_type'])}"
        )
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(p, str | None) for p in prompts.values()):
        raise ModelError(f"{file}: prompts: expected an object of strings")
    texts = {name: prompt or "" for name, prompt in prompts.items()}
    name = settings.get("default_prompt_name")
    if name is None:
        return texts, ""
    if not isinstance(name, str) or name not in texts:
        raise ModelError(f"{file}: default_prompt_name: {_shown(name)} is not among prompts")
    return texts, texts[name]


def _tensors(checkpoint: Path) -> tuple[TensorSlice, ...]:
    """Every tensor of the weights, sorted by name."""
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: weight_map: expected an object of tensor and file names")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index}: weight_map: expected file names without a folder")
        files = [checkpoint / name for name in names]
    else:
        pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in checkpoint.glob(pattern))
        reason = f"; pickled weights ({', '.join(pickled)}) are never loaded" if pickled else ""
        raise ModelError(f"{single}: missing{reason}")
    tensors: dict[str, TensorSlice] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise ModelError(f"{file}: tensor {tensor.name} is also in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    if not tensors:
        raise ModelError(f"{files[0]}: no tensors")
    return tuple(tensors[name] for name in sorted(tensors))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(read_bounded(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON") from error


def _refuse_no_object(file: Path) -> None:
    """The tokenizer's file is checked without making Python's objects of it, which would take many times its size."""
    try:
        msgspec.json.decode(read_bounded(file), type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise ModelError(f"{file}: expected an object") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON") from error


def _read_object(file: Path) -> dict[str, Any]:
    value = _read_json(file)
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected an object")
    return value


def _read_optional(file: Path) -> dict[str, Any]:
    return _read_object(file) if file.exists() else {}


def _flag(file: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"{file}: {name}: expected true or false")
    return value


def _positive(file: Path, settings: Mapping[str, Any], name: str) -> int | None:
    """An integer above 0, or None when absent. Hugging Face writes 1e30, as an integer or a float, for "no limit"."""
    value = settings.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise ModelError(f"{file}: {name}: expected a positive number")
    return int(value) if value < 1e9 else None


def _shown(value: Any) -> str:
    """A value in an error's message: what is short, as it is; it may be as long as its file, and nested as deeply."""
    match value:
        case dict():
            return "an object"
        case [str() as only]:
            return repr([only[:_SHOWN]])
        case list():
            return "a list"
        case str():
            return repr(value[:_SHOWN])
        case _:
            return repr(value)[:_SHOWN]
