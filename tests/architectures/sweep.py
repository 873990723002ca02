"""Each architecture that transformers knows is served with the vectors that transformers gives, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_consumer.engine import Encoder, ModelError, load_encoder
from tests.architectures.tiny_configs import Unmade, make
from tests.helpers.encoders import normalized

__all__ = ["TOLERANCE", "Found", "judge", "sweep"]

TOLERANCE = 1e-5
_LENGTHS = (1, 3, 17, 17, 40, 300, 2)
"""Tokens of the texts: equal and different ones, shorter and longer than any window."""

Vectors = npt.NDArray[np.float32]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one architecture."""

    kind: str
    verdict: Literal["served", "refused", "unmade", "wrong", "escaped"]
    """The last two must not be: other vectors than transformers', or an exception that is no `ModelError` of one line."""
    detail: str


def sweep(kinds: Iterable[str], folder: Path, say: Callable[[Found], object]) -> list[Found]:
    """Judge all `kinds`, one at a time below `folder`."""
    found = []
    for kind in kinds:
        path = folder / kind.replace("/", "_")
        found.append(judge(kind, path))
        say(found[-1])
        shutil.rmtree(path, ignore_errors=True)
    return found


def judge(kind: str, path: Path, **fields: Any) -> Found:
    """Make a tiny `kind` at `path`, with these `fields` of its configuration, and serve it on the CPU."""
    try:
        make(kind, path, **fields)
    except Unmade as error:
        return Found(kind=kind, verdict="unmade", detail=_line(error))
    try:
        encoder = load_encoder(path, device="cpu")
    except ModelError as error:
        named = "\n" not in str(error) and f"{path}" in str(error)
        return Found(kind=kind, verdict="refused" if named else "escaped", detail=str(error))
    except Exception as error:  # noqa: BLE001  # which is what this looks for
        return Found(kind=kind, verdict="escaped", detail=_line(error))
    try:
        difference = _difference(encoder, path)
    except Exception as error:  # noqa: BLE001
        return Found(kind=kind, verdict="escaped", detail=_line(error))
    finally:
        encoder.close()
    verdict: Literal["served", "wrong"] = "served" if difference <= TOLERANCE else "wrong"
    return Found(kind=kind, verdict=verdict, detail=f"{difference:.1e} {dict(encoder.kernels)}")


def _difference(encoder: Encoder, path: Path) -> float:
    """The largest one of any component to transformers' own vectors of each text alone."""
    random = np.random.default_rng(1)
    ids = [random.integers(5, 400, length).astype(np.int32) for length in _LENGTHS]
    expected = _alone(ids, path)
    together = encoder.encode(ids)
    apart = np.concatenate([encoder.encode([each]) for each in ids])
    return max(float(np.abs(normalized(found) - normalized(expected)).max()) for found in (together, apart))


def _alone(ids: list[npt.NDArray[np.int32]], path: Path) -> Vectors:
    """The mean over the hidden states of each text, by transformers on a copy of its own for each text."""
    import torch
    import transformers

    from embedq_consumer.engine.model_directory import ENCODERS, read_directory

    kind: Any = getattr(transformers, ENCODERS.get(read_directory(path).config["model_type"], "AutoModel"))
    model = kind.from_pretrained(path).eval()
    model.config.use_cache = False
    takes = model.forward.__code__.co_varnames if hasattr(model.forward, "__code__") else ()
    means = []
    with torch.inference_mode():
        for each in ids:
            row = torch.from_numpy(each.astype(np.int64)).unsqueeze(0)
            mask = {"attention_mask": torch.ones_like(row)} if "attention_mask" in takes else {}
            means.append(model(input_ids=row, **mask).last_hidden_state[0].float().mean(0).numpy())
    return np.stack(means)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
