"""Two models run one after the other, as the service runs them, so that one GPU is enough; and what differs between them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from rich.markup import escape
from rich.table import Table

from embedq_consumer.engine import (
    Encoder,
    Failed,
    Quantization,
    Text,
    TextTooLong,
    Tokens,
    default_batch_tokens,
    load_encoder,
)
from embedq_consumer.engine.text.prompts import prompt_for
from embedq_consumer.verify import similarity
from embedq_consumer.verify.sample_texts import sample_texts
from embedq_shared.grouping import batched_by
from embedq_shared.messages import Job

_SHOWN_CHARACTERS = 40


class Unusable(Exception):
    """The texts or the options cannot be used; the message says why."""


class Line(msgspec.Struct, frozen=True):
    """One text, and its line number in the file, from 1 on."""

    number: int
    text: str


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """How one model is loaded."""

    path: Path
    device: str
    quantization: Quantization
    keep_bf16: tuple[int, ...]


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One model and how it ran."""

    path: str
    device: str
    quantization: Quantization
    keep_bf16: tuple[int, ...]
    model_version: str
    hidden_size: int
    tokens: int
    seconds: float
    """In the encoder, one micro-batch after the other."""
    tokens_per_second: float
    cut: int
    """Texts longer than the model takes, whose end was cut off."""
    without_vector: tuple[int, ...]
    """Lines whose vector is zero or not finite."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One of the texts that changed most; `cosine` is None where the vectors differ in length."""

    line: int
    cosine: float | None
    agreement: float
    text: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    texts: int
    """Texts compared: not empty, not equal to an earlier one, and with a vector from both models."""
    dimensions: tuple[int, int]
    model: Side
    against: Side
    cosine: similarity.Cosines | None
    neighbors: similarity.Neighbors
    worst: tuple[Pair, ...]
    missed: tuple[str, ...]
    """The thresholds that are not met, and texts without a vector."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Options for both models, and the thresholds."""

    dimensions: int | None
    top_k: int
    input_type: Literal["query", "document"] | None
    instruction: str | None
    threads: int | None
    threshold: float
    min_cosine: float | None
    min_agreement: float | None
    worst: int


def lines_of(source: Path | None) -> Iterator[Line]:
    """The texts to compare: without empty ones, and the first of equal ones, which would be neighbors in no fixed order."""
    seen: set[str] = set()
    for number, text in enumerate(_texts(source), 1):
        if text.strip() and text not in seen:
            seen.add(text)
            yield Line(number, text)


def _texts(source: Path | None) -> Iterator[str]:
    if source is None:
        yield from sample_texts()
        return
    objects = source.suffix in (".jsonl", ".ndjson")
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if objects and line.strip():
                    yield msgspec.json.decode(line, type=_Object).text
                else:
                    yield line.decode().rstrip("\r\n")
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Unusable(f"{source}: line {number}: {error}") from None


class _Object(msgspec.Struct):
    text: str


def layers(listed: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in listed.split(",") if number.strip())
    except ValueError:
        raise Unusable(f"--keep-bf16: expected layer numbers separated by commas, got {listed!r}") from None


def compare(lines: Sequence[Line], setups: Sequence[Setup], asked: Asked) -> Report:
    if len(lines) < 2:
        raise Unusable(f"expected at least two different texts, got {len(lines)}")
    (one, first), (other, second) = (_run(lines, setup, asked) for setup in setups)
    failed = {*one.without_vector, *other.without_vector}
    kept = [n for n, line in enumerate(lines) if line.number not in failed]
    if len(kept) < 2:
        raise Unusable(f"only {len(kept)} of {len(lines)} texts have a vector from both models")
    a, b = (similarity.unit(vectors[kept], asked.dimensions) for vectors in (first, second))
    k = min(asked.top_k, len(kept) - 1)
    neighbors, shares = similarity.agreements(similarity.nearest(a, k), similarity.nearest(b, k))
    comparable = a.shape[1] == b.shape[1]
    angles = similarity.cosines(a, b).tolist() if comparable else [None] * len(kept)
    order = np.argsort(similarity.cosines(a, b) if comparable else shares, kind="stable")[: asked.worst]
    cosine = similarity.summary(a, b, asked.threshold) if comparable else None
    return Report(
        texts=len(kept),
        dimensions=(a.shape[1], b.shape[1]),
        model=one,
        against=other,
        cosine=cosine,
        neighbors=neighbors,
        worst=tuple(
            Pair(
                line=lines[kept[n]].number,
                cosine=angles[n],
                agreement=float(shares[n]),
                text=lines[kept[n]].text[:_SHOWN_CHARACTERS],
            )
            for n in order.tolist()
        ),
        missed=tuple(_missed(one, other, cosine, neighbors, asked)),
    )


def _missed(
    one: Side,
    other: Side,
    cosine: similarity.Cosines | None,
    neighbors: similarity.Neighbors,
    asked: Asked,
) -> Iterator[str]:
    for side in (one, other):
        if side.without_vector:
            count = len(side.without_vector)
            texts = "1 text has" if count == 1 else f"{count} texts have"
            yield f"{texts} no vector from {side.path}, the first of them in line {side.without_vector[0]}"
    if asked.min_cosine is not None:
        if cosine is None:
            yield "--min-cosine: the vectors differ in length, so they have no cosine"
        elif cosine.min < asked.min_cosine:
            yield f"the lowest cosine is {cosine.min:.6f}, below {asked.min_cosine:g}"
    if asked.min_agreement is not None and neighbors.mean < asked.min_agreement:
        yield f"the mean neighbor agreement is {neighbors.mean:.4f}, below {asked.min_agreement:g}"


def _run(lines: Sequence[Line], setup: Setup, asked: Asked) -> tuple[Side, npt.NDArray[np.float32]]:
    """Load, encode, unload: the measurements, and float32 (lines, hidden_size), which may hold NaN."""
    encoder = load_encoder(
        setup.path,
        device=setup.device,
        threads=asked.threads,
        quantization=setup.quantization,
        keep_bf16=setup.keep_bf16,
        root=setup.path.resolve().parent,  # as the service's own, unless it is set
    )
    try:
        if asked.dimensions is not None and asked.dimensions > encoder.hidden_size:
            raise Unusable(f"--dimensions: {setup.path} gives at most {encoder.hidden_size} components")
        job = Job(input="", input_type=asked.input_type, instruction=asked.instruction)
        prompt = prompt_for(job, encoder)
        tokens = _tokens(encoder, lines, prompt, setup.path)
        vectors, seconds = _encode(
            encoder, tokens, default_batch_tokens(setup.device, asked.threads, setup.quantization)
        )
    finally:
        encoder.close()
        gc.collect()  # cycles that hold device memory must be gone before the next model loads
    usable = np.isfinite(vectors).all(axis=1) & vectors[:, : asked.dimensions].any(axis=1)
    count = sum(len(found.ids) for found in tokens)
    side = Side(
        path=str(setup.path),
        device=setup.device,
        quantization=setup.quantization,
        keep_bf16=setup.keep_bf16,
        model_version=encoder.model_version,
        hidden_size=vectors.shape[1],
        tokens=count,
        seconds=seconds,
        tokens_per_second=count / seconds,
        cut=sum(found.truncated for found in tokens),
        without_vector=tuple(lines[n].number for n in np.flatnonzero(~usable).tolist()),
    )
    return side, vectors


def _tokens(encoder: Encoder, lines: Sequence[Line], prompt: str, model: Path) -> list[Tokens]:
    tokens: list[Tokens] = []
    texts = [Text(line.text, prompt=prompt, truncate="end") for line in lines]
    for line, found in zip(lines, encoder.tokenize(texts), strict=True):
        if isinstance(found, Failed):
            raise Unusable(f"{model}: the tokenizer cannot read line {line.number}: {found.reason}")
        if isinstance(found, TextTooLong):
            raise RuntimeError("a text that may be cut is never too long. This is a bug.")  # noqa: TRY004
        tokens.append(found)
    return tokens


def _encode(encoder: Encoder, tokens: Sequence[Tokens], budget: int) -> tuple[npt.NDArray[np.float32], float]:
    """Vectors, and seconds without a first run of the first micro-batch, which warms up."""
    batches = list(_micro_batches(tokens, budget))
    encoder.submit(batches[0]).result()
    begin = time.perf_counter()
    vectors = np.concatenate([encoder.submit(batch).result() for batch in batches])
    return vectors, time.perf_counter() - begin


def _micro_batches(tokens: Sequence[Tokens], budget: int) -> Iterator[list[Tokens]]:
    return batched_by(tokens, lambda found: found.cost, budget)


def tables(report: Report) -> Iterator[Table]:
    models = Table("", title=f"{report.texts} texts")
    for name in ("model", "against"):
        models.add_column(name, overflow="fold")
    sides = (report.model, report.against)
    for name, values in (
        ("path", [side.path for side in sides]),
        ("version", [side.model_version for side in sides]),
        ("device", [side.device for side in sides]),
        ("quantization", [_quantization(side) for side in sides]),
        ("vector", [f"{n} of {side.hidden_size}" for n, side in zip(report.dimensions, sides, strict=True)]),
        ("tokens", [f"{side.tokens:,}" for side in sides]),
        ("tokens/s", [f"{side.tokens_per_second:,.0f}" for side in sides]),
        ("texts cut", [str(side.cut) for side in sides]),
        ("without vector", [str(len(side.without_vector)) for side in sides]),
    ):
        models.add_row(name, *values)
    yield models
    yield _similarity_table(report)
    if report.worst:
        worst = Table("line", "cosine", "agreement", "text", title="least similar")
        for pair in report.worst:
            cosine = "" if pair.cosine is None else f"{pair.cosine:.6f}"
            worst.add_row(str(pair.line), cosine, f"{pair.agreement:.2f}", escape(repr(pair.text)[1:-1]))
        yield worst


def _quantization(side: Side) -> str:
    kept = ", ".join(map(str, side.keep_bf16))
    return f"{side.quantization}, except layers {kept}" if kept else side.quantization


def _similarity_table(report: Report) -> Table:
    table = Table("similarity", "value")
    cosine = report.cosine
    if cosine is None:
        table.add_row("cosine", "none: the vectors differ in length")
    else:
        for name, value in (
            ("cosine, min", f"{cosine.min:.6f}"),
            ("cosine, 1 %", f"{cosine.p1:.6f}"),
            ("cosine, 5 %", f"{cosine.p5:.6f}"),
            ("cosine, 50 %", f"{cosine.p50:.6f}"),
            ("cosine, mean", f"{cosine.mean:.6f}"),
            (f"cosine below {cosine.threshold:g}", f"{cosine.below_threshold:.2%} of the texts"),
            ("largest difference", f"{cosine.largest_difference:.2e}"),
        ):
            table.add_row(name, value)
    found = report.neighbors
    table.add_row(f"top-{found.k} agreement, mean", f"{found.mean:.4f}")
    table.add_row(f"top-{found.k} agreement, min", f"{found.min:.2f}")
    table.add_row(f"top-{found.k} unchanged", f"{found.unchanged:.2%} of the texts")
    return table
