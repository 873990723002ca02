"""A model directory's vectors of some texts: `python -m embedq_consumer.verify.golden_vectors MODEL`, which `embedq golden` runs.

A process of its own, since the command line imports nothing of the service, and a model that crashes shall not take it along. Standard
input is JSON, `{"texts": [{"text", "input_type"}, …], "device", "quantization"}`; standard output `{"model_version", "vectors"}`. What
cannot be done is a line on standard error, and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import msgspec

from embedq_consumer.engine import (
    DeviceLost,
    Encoder,
    ModelError,
    OutOfMemory,
    Quantization,
    Text,
    Tokens,
    load_encoder,
)
from embedq_consumer.engine.text.prompts import prompt_for
from embedq_shared.messages import InputType, Job

_UNUSABLE: Final = 2


class GoldenInput(msgspec.Struct, frozen=True):
    """One text."""

    text: str
    input_type: InputType | None = None


class Asked(msgspec.Struct, frozen=True):
    """What comes in."""

    texts: list[GoldenInput]
    device: str = "auto"
    quantization: Quantization = "none"


class Given(msgspec.Struct, frozen=True):
    """What goes out; a vector is as the model gives it, not normalized."""

    model_version: str
    vectors: list[list[float]]


def main(model: Path) -> int:
    """Load, compute, and say it."""
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    try:
        encoder = load_encoder(
            model,
            device=asked.device,
            quantization=asked.quantization,
            root=model.resolve().parent,  # as the service's own, unless it is set
        )
        vectors = [_vector(encoder, each) for each in asked.texts]
    except (ModelError, OutOfMemory, DeviceLost) as error:
        sys.stderr.write(f"{error}\n")
        return _UNUSABLE
    sys.stdout.buffer.write(msgspec.json.encode(Given(encoder.model_version, vectors)))
    return 0


def _vector(encoder: Encoder, given: GoldenInput) -> list[float]:
    """Computed alone, as a reload's check does."""
    prompt = prompt_for(Job(input=given.text, input_type=given.input_type), encoder)
    [found] = encoder.tokenize([Text(given.text, prompt, "end")])
    if not isinstance(found, Tokens):
        raise ModelError(f"the tokenizer cannot read {given.text[:40]!r}")
    [vector] = encoder.submit([found]).result().tolist()
    return list(vector)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
