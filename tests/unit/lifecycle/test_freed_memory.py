"""What is freed while models change is the system's again; between changes it stays for the next micro-batch."""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Mapping

import pytest

from embedq_consumer.engine.safety.heaps import is_tuned

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")

FREES = """
import asyncio, ctypes, threading
from embedq_consumer.lifecycle.device import Device
from tests.helpers.many_reloads import anonymous_bytes

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def freed():
    # Megabytes that go when 40 are freed in pieces of one, made by a thread that has ended, as a load's has.
    pieces = []

    def make():
        for _ in range(40):
            pieces.append(libc.malloc(1 << 20))
            ctypes.memset(pieces[-1], 1, 1 << 20)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    before = anonymous_bytes()
    while pieces:
        libc.free(pieces.pop())
    return before - anonymous_bytes() >> 20

async def main():
    device = Device()
    await device.take_floor()
    await device.leave_floor()
    otherwise = freed()
    await device.take_floor()
    print(freed(), otherwise)
    await device.leave_floor()
    device.close()

asyncio.run(main())
"""


async def test_what_a_thread_frees_goes_to_the_system_while_a_model_changes_and_stays_for_reuse_otherwise() -> (
    None
):
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FREES, stdout=asyncio.subprocess.PIPE
    )  # its memory is its own
    said, _ = await child.communicate()
    changing, otherwise = map(int, said.split())
    assert changing >= 38
    assert otherwise <= 2


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"MALLOC_ARENA_MAX": "1"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=1000000"}, True),
    ],
)
def test_what_an_operator_has_set_of_malloc_stands(environ: Mapping[str, str], expected: bool) -> None:
    assert is_tuned(environ) is expected
