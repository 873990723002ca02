"""What happens to a product before it is written, in quack-kernels' language, whose package this module needs.

The package names its compiled kernels after the source of these functions, and takes only plain ones.
"""

# What the package traces is neither annotated nor typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-not-found, import-untyped"

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _nothing_to_compile() -> Iterator[None]:
    """The package hands functions to torch.compile that are never called here; that would import a compiler for two seconds."""
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


with _nothing_to_compile():
    from quack.activation import swiglu
    from quack.epilogue import gemm_epilogue, unpack

__all__ = ["gate"]


@gemm_epilogue(outputs=("out",), mode="acc_pair")
def gate(acc):
    """silu(a)·b of neighboring columns a and b: half as many come out."""
    a, b = unpack(acc)
    return {"out": swiglu(a, b)}
