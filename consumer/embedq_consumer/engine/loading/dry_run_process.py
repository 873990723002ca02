"""The process of a dry run; `dry_run.py` starts it. It reads what is wanted from stdin, and says its verdict on stdout."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from embedq_consumer.engine.api import ModelError
from embedq_consumer.engine.loading.dry_run import Verdict, Wanted
from embedq_consumer.engine.model_directory import ENCODERS, ModelDirectory, read_directory
from embedq_consumer.engine.safety.panics import Panic, panics_caught

_PR_SET_PDEATHSIG: Final = 1
_FILE_BYTES: Final = 16 * 1024 * 1024
"""Of anything that it writes: what a library says of a foreign file must not fill the disk."""
_MOST_MISSING: Final = 2
"""How many times the checkpoint's parameters a model may have. More are missing in the files, and would be made up first."""
_UNUSED: Final = "pooler."
"""Parameters that no embedding needs, and that many checkpoints lack."""
_FORMER_ENDS: Final = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def main() -> None:
    """Try what stdin names, within the limits that it names."""
    wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=Wanted)
    _confine(wanted)
    said = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no verdict
    try:
        with panics_caught():
            try_directory(read_directory(Path(wanted.path), Path(wanted.root) if wanted.root else None))
        verdict = Verdict(None)
    except ModelError as error:
        verdict = Verdict(str(error))
    except Panic as error:
        verdict = Verdict(f"{wanted.path}: a library panicked: {error}")
    except MemoryError:
        verdict = Verdict(
            f"{wanted.path}: a dry run of it needs more than {wanted.memory_bytes / 1e9:.1f} GB"
        )
    os.write(said, msgspec.json.encode(verdict))
    os._exit(0)  # nothing is left to do, and no library's own end may take the verdict back


def _confine(wanted: Wanted) -> None:
    """Limits that hold in native code, too: memory, time, files, and the life of who asked."""
    resource.setrlimit(resource.RLIMIT_DATA, (wanted.memory_bytes, wanted.memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(math.ceil(wanted.within_s) + 1)  # if whoever asked cannot end us any more
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != wanted.parent:
        os._exit(1)


def try_directory(directory: ModelDirectory) -> None:
    """Its tokenizer on texts of every kind, and the names and shapes of its weights against its configuration.

    Raises:
        ModelError: the tokenizer fails, or the weights are not those of the model that the configuration describes.
    """
    from embedq_consumer.engine.text.tokenizer import TextTokenizer

    rows = directory.config.get("vocab_size")
    TextTokenizer.load(
        directory, directory.max_seq_length or sys.maxsize, rows if isinstance(rows, int) else sys.maxsize
    )
    if directory.quantization_method is not None:
        return  # its layers have other shapes than its configuration says
    model = _described(directory)
    if model is None:
        return
    described = sum(
        math.prod(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith(_UNUSED)
    )
    held = sum(math.prod(tensor.shape) for tensor in directory.tensors)
    if described > _MOST_MISSING * held:
        raise ModelError(
            f"{directory.checkpoint / 'config.json'}: describes a model of {described:,} parameters, the weights have {held:,}"
        )
    if not _renames(model):
        _refuse_other_weights(directory, model)


def _described(directory: ModelDirectory) -> Any:
    """The model that the configuration describes, without weights; None if it cannot be built, which the load will explain."""
    import torch
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(directory.checkpoint), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            encoder = ENCODERS.get(directory.config["model_type"])
            return (
                transformers.AutoModel.from_config(config, trust_remote_code=False)
                if encoder is None
                else getattr(transformers, encoder)(config)
            )
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # transformers raises many kinds
        return None


def _renames(model: Any) -> bool:
    """Whether transformers makes this model's parameters out of tensors of other names or shapes: then only the load can tell."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # it lies elsewhere in this version
        return True
    parts = [part for part in model.modules() if hasattr(part, "config")]
    names = {type(part).__name__ for part in parts}
    names |= {str(getattr(part.config, "model_type", "")) for part in parts}
    return any(get_checkpoint_conversion_mapping(name) is not None for name in names)


def _refuse_other_weights(directory: ModelDirectory, model: Any) -> None:
    """
    Raises:
        ModelError: a parameter of `model` is not among the tensors, or has another shape there.
    """
    held = {_current(tensor.name, model.base_model_prefix): tensor for tensor in directory.tensors}
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)  # shared ones are written once
    missing = []
    for known in names.values():
        if known[0].startswith(_UNUSED):
            continue
        tensor = next((held[name] for name in known if name in held), None)
        shape = tuple(parameters[known[0]].shape)
        if tensor is None:
            missing.append(known[0])
        elif tensor.shape != shape:
            raise ModelError(
                f"{tensor.file}: tensor {tensor.name[:100]}: expected the shape {shape}, as config.json describes it, got "
                f"{tensor.shape}"
            )
    if missing:
        raise ModelError(
            f"{directory.tensors[0].file}: {len(missing)} tensors are missing, among them {missing[0]}"
        )


def _current(name: str, prefix: str) -> str:
    """A tensor's name as the base model has it: without the prefix that a model with a head adds, and not as TensorFlow's BERT
    named a norm's weights."""
    for old, new in _FORMER_ENDS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name.removeprefix(f"{prefix}.")


if __name__ == "__main__":
    main()
