"""What happens to a product before it is written, in quack-kernels' language, whose package this module needs.

The package names its compiled kernels after the source of these functions and of every function that they refer to, and refuses those
that it cannot name. So they refer to modules alone, which are known by their names: what lies behind a function leads into CUTLASS's
own state, unless both packages are in a folder called `site-packages`.
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
    from quack import activation
    from quack.epilogue import gemm_epilogue, math

__all__ = ["gate"]


@gemm_epilogue(outputs=("out",), mode="acc_pair")
def gate(acc):
    """silu(a)·b of neighboring columns a and b: half as many come out."""
    a, b = math.unpack(acc)
    return {"out": activation.swiglu(a, b)}
