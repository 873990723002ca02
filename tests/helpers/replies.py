"""Replies as the SDK reads them, one line each."""

from __future__ import annotations

from typing import Any

import numpy as np

from embedq_sdk.embeddings import FinishedJob, JobOutcome, ReadDatum, ReadError, ReadResult
from embedq_shared.vectors import quantize

UNIT = np.full(64, 0.125, dtype=np.float32)
V1, V2 = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def datum(index: int = 0, vector: np.ndarray = UNIT, dtype: Any = "float32", **more: Any) -> ReadDatum:
    raw, scale = quantize(vector, dtype)
    return ReadDatum(index=index, embedding=raw, scale=scale, tokens=index + 1, **more)


def failed(index: int = 0, code: str = "text_too_long") -> ReadDatum:
    return ReadDatum(index=index, error=ReadError(code=code, message="too long", param=f"input[{index}]"))


def result(*data: ReadDatum, version: str = V1, dtype: Any = "float32", **more: Any) -> ReadResult:
    return ReadResult(
        id="j", model="default", model_version=version, dimensions=64, dtype=dtype, data=list(data), **more
    )


def job(count: int, outcome: JobOutcome) -> FinishedJob:
    return FinishedJob(count=count, outcome=outcome)
