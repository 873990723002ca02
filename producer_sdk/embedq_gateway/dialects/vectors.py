"""How vectors are written in JSON."""

from __future__ import annotations

import msgspec
import numpy as np
import orjson

from embedq_shared.messages import Dtype
from embedq_shared.vectors import NUMPY


def numbers(raw: bytes, dtype: Dtype) -> msgspec.Raw:
    """A vector's bytes as a JSON list: floats by the fewest digits that read back the same, which msgspec cannot write for
    float32; int8 as integers; binary as its packed bytes, from 0 to 255."""
    return msgspec.Raw(
        orjson.dumps(np.frombuffer(raw, dtype=NUMPY[dtype]), option=orjson.OPT_SERIALIZE_NUMPY)
    )
