"""From a model directory to an encoder: read, checked, proved on a few random tokens, captured."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from embedq_consumer.engine.adapters.merging import Merger
from embedq_consumer.engine.api import DeviceLost, LoadOptions, ModelError, OutOfMemory, Quantization
from embedq_consumer.engine.device import means_out_of_memory, translate_errors
from embedq_consumer.engine.encoder import PackedEncoder, release
from embedq_consumer.engine.loading.dry_run import dry_run
from embedq_consumer.engine.loading.inspection import available, device_named, footprint_of, needed
from embedq_consumer.engine.loading.load_cache import LoadCache, ModelSnapshot, key_of
from embedq_consumer.engine.loading.load_timer import LoadTimer
from embedq_consumer.engine.loading.memory_check import MemoryEstimate, refuse_if_too_large
from embedq_consumer.engine.loading.model_version import model_version, tensor_digests
from embedq_consumer.engine.loading.probes import limits_of, probes_of, reference
from embedq_consumer.engine.loading.weights import CheckpointWeights, snapshot_of
from embedq_consumer.engine.model_directory import ENCODERS, ModelDirectory, read_directory
from embedq_consumer.engine.models import registry
from embedq_consumer.engine.models.any_transformers import unsteady
from embedq_consumer.engine.models.traits import Limits, Probe
from embedq_consumer.engine.pooling import pooling_of
from embedq_consumer.engine.safety.cancellation import Abandoned, Cancellation
from embedq_consumer.engine.safety.panics import first_line, panics_caught
from embedq_consumer.engine.text.effective import EffectiveTokenizer
from embedq_consumer.engine.text.tokenizer import TextTokenizer

__all__ = ["kept_layers", "load"]


def load(path: Path, options: LoadOptions, cancel: Cancellation | None = None) -> PackedEncoder:
    """Load `path`, and prove on a few random tokens that packed it computes what transformers' own code does.

    `cancel` is looked at between the steps, and while weights are read: what was loaded is freed then. Not within an import, a
    read of the weights by transformers, the proof, or the capture of the graphs.

    Raises:
        ModelError: the directory or the device cannot be used.
        Abandoned: `cancel` was set meanwhile.
    """
    target = device_named(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with translate_errors(target), panics_caught():
            return _load(path, target, options, cancel or Cancellation())
    except (ModelError, DeviceLost, Abandoned):
        raise
    except OutOfMemory as error:
        raise ModelError(f"{path}: the device has too little memory left to load it") from error
    except Exception as error:  # whatever a directory holds, it costs this load alone
        raise ModelError(f"{path}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


def _load(path: Path, target: torch.device, options: LoadOptions, cancel: Cancellation) -> PackedEncoder:
    timer = LoadTimer(wait=lambda: _wait_for(target), cancel=cancel)
    cache = None if options.known_models is None else LoadCache(options.known_models)
    with timer.step("directory"):
        directory = read_directory(path, options.root)
    layers = kept_layers(options.keep_bf16, directory, options.quantization)
    options = msgspec.structs.replace(options, keep_bf16=layers)
    with timer.step("memory"):
        estimate = needed(directory, target, options.quantization)
        _refuse_if_too_large(directory, target, estimate)
    with ExitStack() as unless_it_serves:
        with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
            # The digest reads every byte once more: it does so while transformers is imported, if it has to be.
            digests = pool.submit(tensor_digests, directory.all_tensors, options.threads, cancel)
            key, source = "", None
            if cache is not None:
                with timer.step("digest"):
                    key = key_of(directory, _kind(target), digests.result())
                snapshot = cache.get(key)
                if snapshot is not None:
                    kernels = pool.submit(registry.import_ahead, snapshot.architecture, target)
                    source = _from_snapshot(snapshot, directory, target, timer, cancel)
                    unless_it_serves.callback(release, source.model)
                    with timer.step("imports"):
                        kernels.result()
            if source is None:
                if options.dry_run_s is not None and not (cache is not None and cache.was_tried(key)):
                    with timer.step("dry_run"):
                        transformers = pool.submit(_import_transformers)
                        dry_run(path, options.root, within_s=options.dry_run_s, cancel=cancel)
                        transformers.result()
                    if cache is not None:
                        cache.note_tried(key)
                source = _from_transformers(directory, target, timer, cancel)
                unless_it_serves.callback(release, source.model)
            with timer.step("digest"):
                version = model_version(
                    directory,
                    options,
                    tokenizer=source.tokenizer.effective.digest,
                    max_tokens=source.limits.max_tokens,
                    digests=digests.result(),
                )
        encoder = _built(directory, source, version, options, timer, unless_it_serves)
        unless_it_serves.pop_all()
    if cache is not None:
        if source.new is not None:
            cache.put(key, source.new)
        cache.note_tried(key)
    encoder.phases = timer.seconds
    encoder.weight_bytes = estimate.weights
    encoder.footprint = footprint_of(
        directory,
        _kind(target),
        options,
        dtype=estimate.dtype,
        max_tokens=encoder.max_tokens,
        kernels=encoder.kernels,
    )
    return encoder


def _built(
    directory: ModelDirectory,
    source: _Source,
    version: str,
    options: LoadOptions,
    timer: LoadTimer,
    unless_it_serves: ExitStack,
) -> PackedEncoder:
    """The encoder, proved and captured.

    Raises:
        ModelError: packed, it does not compute what transformers' own code does.
    """
    try:
        with timer.step("forward"):
            encoder = PackedEncoder(
                directory,
                source.model,
                source.tokenizer,
                version=version,
                limits=source.limits,
                options=options,
            )
            unless_it_serves.callback(encoder.close)
        with timer.step("proof"):
            encoder.prove(source.probes, source.expected)
        with timer.step("graphs"):
            encoder.capture()
    except NotImplementedError as error:
        model_type = directory.config["model_type"]
        raise ModelError(
            f"{directory.checkpoint / 'config.json'}: model_type {model_type}: {error}"
        ) from error
    return encoder


def _import_transformers() -> None:
    """Which takes as long as PyTorch itself."""
    import transformers.modeling_utils  # noqa: F401


class _Source(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder is made of and proved on."""

    model: Any
    tokenizer: TextTokenizer
    limits: Limits
    probes: list[Probe]
    expected: Tensor
    """Hidden states of `probes` by transformers' own code: float32 (tokens, hidden), on the model's device."""
    new: ModelSnapshot | None = None
    """What lets the next load do without transformers."""


def _from_transformers(
    directory: ModelDirectory, target: torch.device, timer: LoadTimer, cancel: Cancellation
) -> _Source:
    """Ask transformers. Where a forward is written out for the model, transformers' own copy is gone when this returns."""
    with timer.step("transformers"):
        _import_transformers()
    with timer.step("weights"), _quiet_transformers():
        model = _load_model(directory, target)
    with _freed_on_failure(model):
        limits = limits_of(directory, model)
        with timer.step("tokenizer"), _quiet_transformers():
            tokenizer = TextTokenizer.load(directory, limits.max_tokens, int(model.config.vocab_size))
        _refuse_token_types(directory, model, tokenizer)
        with timer.step("device"):
            if model.device != target:
                model.to(target)
            elif target.type == "cpu":
                # Before it runs: afterwards some layers have made others of their weights.
                _copy_from_files(model)
        Merger(directory.adapter, (name for name, _ in model.named_parameters())).merge_into(model)
        with timer.step("reference"):
            probes, expected = _asked(directory, model, limits)
        snapshot = None
        if directory.quantization_method is None and registry.is_written_out(model):
            snapshot = snapshot_of(
                model,
                directory,
                limits,
                tokenizer=tokenizer.effective,
                probes=probes,
                expected=expected,
            )
    if snapshot is None:
        return _Source(model=model, tokenizer=tokenizer, limits=limits, probes=probes, expected=expected)
    release(model)
    # What serves now is what the next start will serve, and so this start proves it.
    return msgspec.structs.replace(_from_snapshot(snapshot, directory, target, timer, cancel), new=snapshot)


@contextmanager
def _freed_on_failure(model: Any) -> Iterator[None]:
    """Without this, the collector would free it some day: modules refer to each other in cycles."""
    try:
        yield
    except BaseException:
        release(model)
        raise


def _refuse_if_too_large(directory: ModelDirectory, target: torch.device, estimate: MemoryEstimate) -> None:
    """Before a weight is read. On a CPU against all of its memory: what others have taken may be swapped out."""
    memory = available(target)
    if target.type == "cpu":
        memory = msgspec.structs.replace(memory, free=memory.total)
    refuse_if_too_large(str(directory.checkpoint), estimate, memory)


def _from_snapshot(
    snapshot: ModelSnapshot,
    directory: ModelDirectory,
    target: torch.device,
    timer: LoadTimer,
    cancel: Cancellation,
) -> _Source:
    """The same without transformers."""
    with timer.step("weights"):
        model = CheckpointWeights(snapshot, directory, target, cancel)
    with timer.step("tokenizer"):
        effective = EffectiveTokenizer(
            snapshot.tokenizer,
            split_special_tokens=snapshot.split_special_tokens,
            notes=snapshot.tokenizer_notes,
        )
        tokenizer = TextTokenizer(effective, snapshot.max_tokens, int(model.config.vocab_size))
    expected = np.frombuffer(snapshot.expected, np.float32).reshape(sum(map(len, snapshot.sequences)), -1)
    return _Source(
        model=model,
        tokenizer=tokenizer,
        limits=Limits(
            max_tokens=snapshot.max_tokens,
            position_offset=snapshot.position_offset,
            padding=snapshot.padding,
        ),
        probes=[
            Probe(np.array(ids, dtype=np.int32), start)
            for ids, start in zip(snapshot.sequences, snapshot.starts, strict=True)
        ],
        expected=torch.from_numpy(expected.copy()).to(target),
    )


def _copy_from_files(model: Any) -> None:
    """Make `model`'s weights its own: on a CPU they are the file's pages, and go with it when somebody replaces its content."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def kept_layers(
    numbers: Collection[int], directory: ModelDirectory, quantization: Quantization
) -> tuple[int, ...]:
    """The layers that FP8 leaves in bf16, ascending and counted from 0 on; negative `numbers` count from the end.

    Raises:
        ModelError: the model has no such layer, or does not run in FP8.
    """
    if not numbers:
        return ()
    if quantization != "fp8":
        raise ModelError("keep_bf16: needs quantization fp8: otherwise all layers run alike")
    layers = int(directory.config.get("num_hidden_layers", 0))
    unknown = [number for number in numbers if not -layers <= number < layers]
    if unknown:
        raise ModelError(f"keep_bf16: expected layers of the model, which has {layers}, got {unknown[0]}")
    return tuple(sorted({number % layers for number in numbers}))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and load reports on stderr: what matters in them is checked and raised."""
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

    It lies on the CPU, but a quantized one where it will run, if accelerate is installed: GPTQ's and AWQ's layers, which
    need that package, are chosen for the device.
    """
    import transformers

    file = directory.checkpoint / "config.json"
    quantized = directory.quantization_method is not None
    in_place = quantized and target.type == "cuda" and importlib.util.find_spec("accelerate") is not None
    try:
        with panics_caught():
            kind: Any = getattr(transformers, ENCODERS.get(directory.config["model_type"], "AutoModel"))
            model, loading = kind.from_pretrained(
                str(directory.checkpoint),
                dtype=torch.bfloat16 if target.type == "cuda" else torch.float32,
                device_map={"": target} if in_place else None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and its config validation raise many kinds
        raise ModelError(f"{file}: {first_line(error)}") from error
    with _freed_on_failure(model):
        _check(model, loading, directory)
    for module in model.modules():
        # Only saves memory, and fails on lengths that it does not divide.
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def _check(model: Any, loading: Mapping[str, Any], directory: ModelDirectory) -> None:
    """What transformers has loaded is the whole model, and fits what comes after it.

    Raises:
        ModelError: it is not, or does not.
    """
    file = directory.checkpoint / "config.json"
    if directory.quantization_method is not None and getattr(model, "hf_quantizer", None) is None:
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
    if problem := unsteady(model.config):
        raise ModelError(f"{file}: {problem}")
    hidden = getattr(model.config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise ModelError(f"{file}: hidden_size: missing")
    if directory.pooling_dimension not in (None, hidden):
        raise ModelError(
            f"{file}: hidden_size is {hidden}, but the pooling's configuration expects {directory.pooling_dimension}"
        )
    pooled = pooling_of(directory.pooling).width(hidden)
    if directory.dense and directory.dense[0].width_in != pooled:
        raise ModelError(
            f"{file}: hidden_size is {hidden}, so that {' and '.join(directory.pooling)} pooling gives {pooled} components, "
            f"but the first Dense module takes {directory.dense[0].width_in}"
        )


def _refuse_token_types(directory: ModelDirectory, model: Any, tokenizer: TextTokenizer) -> None:
    """Every token runs as type 0.

    Raises:
        ModelError: sentence-transformers would give the model others.
    """
    others = tokenizer.token_types() - {0}
    names = directory.tokenizer_config.get("model_input_names", ["token_type_ids"])
    if (
        others
        and "token_type_ids" in names
        and "token_type_ids" in inspect.signature(model.forward).parameters
    ):
        raise ModelError(
            f"{directory.checkpoint / 'tokenizer.json'}: post_processor: expected tokens of type 0 alone, got {min(others)}"
        )


def _asked(directory: ModelDirectory, model: Any, limits: Limits) -> tuple[list[Probe], Tensor]:
    """A few random texts, and their hidden states by transformers' own code: float32 (tokens, hidden).

    Raises:
        ModelError: transformers' code does not make a hidden state of each token.
    """
    expectation = (
        f"{directory.checkpoint / 'config.json'}: model_type {directory.config['model_type']}: expected a model that makes a "
        f"hidden state of each token of a text of any length, but {type(model).__name__}"
    )
    try:
        probes = probes_of(model, limits)
        expected = reference(model, probes, limits)
    except Exception as error:  # an architecture may fail in any way
        if means_out_of_memory(error):
            raise
        raise ModelError(f"{expectation} raises {type(error).__name__}: {first_line(error)}") from error
    tokens, hidden = sum(len(probe.ids) for probe in probes), model.config.hidden_size
    if expected.shape != (tokens, hidden):
        raise ModelError(
            f"{expectation} makes {tuple(expected.shape)} of {tokens} tokens and hidden_size {hidden}"
        )
    return probes, expected
