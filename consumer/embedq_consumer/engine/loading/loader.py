"""From a model directory to an encoder: read, checked, proved on a few random tokens, captured."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine import ModelError, Quantization
from embedq_consumer.engine.devices import current
from embedq_consumer.engine.encoder import PackedEncoder, release
from embedq_consumer.engine.loading.load_cache import LoadCache, ModelSnapshot, key_of
from embedq_consumer.engine.loading.load_timer import Phases
from embedq_consumer.engine.loading.memory_check import DeviceMemory, need_of, refuse_if_too_large
from embedq_consumer.engine.loading.model_version import model_version, tensor_digests
from embedq_consumer.engine.loading.weights import CheckpointWeights, known_model_of
from embedq_consumer.engine.model_directory import ModelDirectory, read_directory
from embedq_consumer.engine.text.tokenizer import TextTokenizer

__all__ = ["kept_layers", "load"]

Ids = npt.NDArray[np.int32]

_PROBE_LENGTHS = (3, 1, 9, 3)
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def load(
    path: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    quantization: Quantization = "none",
    keep_bf16: Collection[int] = (),
    deterministic: bool = False,
    known_models: LoadCache | None = None,
) -> PackedEncoder:
    """Load `path`, and prove on a few random tokens that packed it computes what transformers' own code does.

    `threads` is how many threads PyTorch may use on the CPU; it holds for the whole process, as PyTorch has it.

    Raises:
        ModelError: the directory or the device cannot be used.
    """
    target = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with current(target):
        return _load(path, target, threads, quantization, keep_bf16, deterministic, known_models)


def _load(
    path: Path,
    target: torch.device,
    threads: int | None,
    quantization: Quantization,
    keep_bf16: Collection[int],
    deterministic: bool,
    known_models: LoadCache | None,
) -> PackedEncoder:
    phases = Phases(wait=lambda: _wait_for(target))
    with phases.step("directory"):
        directory = read_directory(path)
    kept = kept_layers(keep_bf16, directory, quantization)
    with phases.step("memory"):
        _refuse_if_too_large(directory, target, quantization)
    with ThreadPoolExecutor(2, thread_name_prefix="beside") as beside:
        # The digest reads every byte once more: it does so while transformers is imported, if it has to be.
        digests = beside.submit(tensor_digests, directory.tensors, threads)
        key, parts = "", None
        if known_models is not None:
            with phases.step("digest"):
                key = key_of(directory, _kind(target), digests.result())
            known = known_models.find(key)
            if known is not None:
                kernels = beside.submit(_import_kernels, known.architecture, target)
                parts = _parts_of(known, directory, target, phases)
                with phases.step("imports"):
                    kernels.result()
        if parts is None:
            parts = _by_transformers(directory, target, phases)
        with phases.step("digest"):
            version = model_version(
                directory,
                max_tokens=parts.max_tokens,
                threads=threads,
                quantization=quantization,
                keep_bf16=kept,
                deterministic=deterministic,
                digests=digests.result(),
            )
    try:
        with phases.step("forward"):
            encoder = PackedEncoder(
                directory,
                parts.model,
                parts.tokenizer,
                version=version,
                max_tokens=parts.max_tokens,
                position_offset=parts.position_offset,
                quantization=quantization,
                keep_bf16=kept,
                deterministic=deterministic,
            )
        with phases.step("proof"):
            encoder.prove(parts.sequences, parts.expected)
        with phases.step("graphs"):
            encoder.capture()
    except NotImplementedError as error:
        model_type = directory.config["model_type"]
        raise ModelError(
            f"{directory.checkpoint / 'config.json'}: model_type {model_type}: {error}"
        ) from error
    if known_models is not None and parts.new is not None:
        known_models.keep(key, parts.new)
    encoder.phases = phases.seconds
    return encoder


class _Parts(msgspec.Struct, frozen=True):
    """What an encoder is made of and proved on."""

    model: Any
    tokenizer: TextTokenizer
    max_tokens: int
    position_offset: int
    sequences: list[Ids]
    expected: Tensor
    """Hidden states of `sequences` by transformers' own code: float32 (tokens, hidden), on the model's device."""
    new: ModelSnapshot | None = None
    """What the next load may know without transformers."""


def _by_transformers(directory: ModelDirectory, target: torch.device, phases: Phases) -> _Parts:
    """Ask transformers. Where a forward is written out for the model, transformers' own copy is gone when this returns."""
    with phases.step("transformers"):
        import transformers.modeling_utils  # noqa: F401  # which takes as long as PyTorch itself
    with phases.step("weights"), _quiet_transformers():
        model = _load_model(directory, target)
    max_tokens, position_offset = _limits(directory, model)
    with phases.step("tokenizer"), _quiet_transformers():
        tokenizer = TextTokenizer.load(directory, max_tokens)
    with phases.step("device"):
        if model.device != target:
            model.to(target)
    with phases.step("reference"):
        sequences = _probe(model, max_tokens)
        expected = _reference(model, sequences)
    known = None
    if directory.quantization_method is None and PackedEncoder.is_written_out(model):
        known = known_model_of(
            model,
            directory,
            max_tokens=max_tokens,
            position_offset=position_offset,
            tokenizer=tokenizer.to_json(),
            sequences=sequences,
            expected=expected,
        )
    if known is None:
        return _Parts(model, tokenizer, max_tokens, position_offset, sequences, expected)
    release(model)
    # What serves is what the next start will serve, and this start proves it.
    return msgspec.structs.replace(_parts_of(known, directory, target, phases), new=known)


def _parts_of(
    known: ModelSnapshot, directory: ModelDirectory, target: torch.device, phases: Phases
) -> _Parts:
    """The same without transformers."""
    with phases.step("weights"):
        model = CheckpointWeights(known, directory, target)
    with phases.step("tokenizer"):
        tokenizer = TextTokenizer.from_json(known.tokenizer, known.max_tokens)
    expected = np.frombuffer(known.expected, np.float32).reshape(sum(map(len, known.sequences)), -1)
    return _Parts(
        model,
        tokenizer,
        known.max_tokens,
        known.position_offset,
        [np.array(ids, dtype=np.int32) for ids in known.sequences],
        torch.from_numpy(expected.copy()).to(target),
    )


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _import_kernels(architecture: str, device: torch.device) -> None:
    """Import what the forward will import, while weights are on their way. Never beside an import of transformers: each
    would find the other's modules half done."""
    if device.type != "cuda" or architecture != "Qwen3Model":
        return
    for name in (
        "embedq_consumer.engine.models.qwen3_cuda",
        "flash_attn.cute",
        "embedq_consumer.engine.kernels.gated_epilogue",
    ):
        with suppress(Exception):  # whoever needs it tries again, and says what follows
            importlib.import_module(name)


def kept_layers(
    numbers: Collection[int], directory: ModelDirectory, quantization: Quantization
) -> frozenset[int]:
    """Which layers stay in bf16, from 0 on: of `numbers`, negative ones count from the end.

    Raises:
        ModelError: the model has no such layer, or none is in anything but bf16.
    """
    if not numbers:
        return frozenset()
    if quantization == "none":
        raise ModelError("keep_bf16: without quantization every layer is kept")
    layers = int(directory.config.get("num_hidden_layers", 0))
    unknown = [number for number in numbers if not -layers <= number < layers]
    if unknown:
        raise ModelError(f"keep_bf16: there is no layer {unknown[0]}: the model has {layers}")
    return frozenset(number % layers for number in numbers)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _refuse_if_too_large(directory: ModelDirectory, target: torch.device, quantization: Quantization) -> None:
    """Before a weight is read. On the CPU weights alone count, against all memory: it swaps before it fails."""
    on_cuda = target.type == "cuda"
    need = need_of(
        directory.tensors,
        directory.config,
        dtype="bf16" if on_cuda else "float32",
        quantized=quantization == "fp8",
    )
    if on_cuda:
        free, total = torch.cuda.mem_get_info(target)
        # What PyTorch holds of it and does not use is free to us too.
        free += torch.cuda.memory_reserved(target) - torch.cuda.memory_allocated(target)
        room = DeviceMemory(str(target), free, total)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        need, room = msgspec.structs.replace(need, activations=0), DeviceMemory("the machine", total, total)
    refuse_if_too_large(str(directory.checkpoint), need, room)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports on stderr: what matters in them is checked and raised."""
    from transformers.utils import logging as module

    logging: Any = module
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_model(directory: ModelDirectory, target: torch.device) -> Any:
    """The base model without a head, in evaluation mode, with transformers' own attention.

    It lies on the CPU; a quantized one where it will run, if accelerate is there: GPTQ's and AWQ's layers, which need
    that package, are chosen for the device.
    """
    from transformers import AutoModel

    file = directory.checkpoint / "config.json"
    quantized = directory.quantization_method is not None
    in_place = quantized and target.type == "cuda" and importlib.util.find_spec("accelerate") is not None
    try:
        model, loading = AutoModel.from_pretrained(
            str(directory.checkpoint),
            dtype=torch.bfloat16 if target.type == "cuda" else torch.float32,
            device_map={"": target} if in_place else None,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and its config validation raise many kinds
        raise ModelError(
            f"{file}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        ) from error
    if quantized and getattr(model, "hf_quantizer", None) is None:
        raise ModelError(
            f"{file}: quantization_config: transformers cannot load {directory.quantization_method}"
        )
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(
            f"{directory.tensors[0].file}: {len(missing)} tensors are missing, among them {missing[0]}"
        )
    if loading["mismatched_keys"]:
        raise ModelError(
            f"{directory.tensors[0].file}: shapes differ from config.json's: {loading['mismatched_keys']}"
        )
    hidden = getattr(model.config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise ModelError(f"{file}: hidden_size: missing")
    if directory.pooling_dimension not in (None, hidden):
        raise ModelError(
            f"{file}: hidden_size is {hidden}, but the pooling's configuration expects {directory.pooling_dimension}"
        )
    if directory.dense and directory.dense[0].width_in != hidden:
        raise ModelError(
            f"{file}: hidden_size is {hidden}, but the first Dense module takes {directory.dense[0].width_in}"
        )
    foreign = sorted(set(getattr(model.config, "layer_types", None) or ()) - _LAYER_TYPES)
    if foreign:
        raise ModelError(f"{file}: layer_types: {', '.join(foreign)}: not served")
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def _limits(directory: ModelDirectory, model: Any) -> tuple[int, int]:
    """The longest input in tokens, and the position of a text's first token.

    RoBERTa and its kin count positions from one behind the padding's, which costs them as many tokens.
    """
    offset = 0
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [directory.max_seq_length]
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - offset)
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ModelError(f"{directory.checkpoint / 'config.json'}: max_position_embeddings: missing")
    return min(known), offset


def _probe(model: Any, max_tokens: int) -> list[Ids]:
    """A few sequences of random tokens, none of them padding, which some models skip when they count positions.

    Where attention has a window, one is longer than that, unless no text can be.
    """
    window = getattr(model.config, "sliding_window", None)
    lengths = list(_PROBE_LENGTHS)
    if isinstance(window, int) and window < max_tokens:
        lengths.append(min(2 * window + 3, window + 300, max_tokens))
    random = np.random.default_rng(0)
    vocabulary = np.arange(model.config.vocab_size, dtype=np.int32)
    padding = getattr(model.config, "pad_token_id", None)
    usable = vocabulary if padding is None else np.delete(vocabulary, padding)
    return [random.choice(usable, n) for n in lengths]


@torch.inference_mode()
def _reference(model: Any, sequences: Sequence[Ids]) -> Tensor:
    """Hidden states of each sequence alone, by transformers' own code: float32 (tokens, hidden)."""
    rows = [torch.from_numpy(ids.astype(np.int64)).to(model.device).unsqueeze(0) for ids in sequences]
    return torch.cat([model(input_ids=row).last_hidden_state[0].float() for row in rows])
