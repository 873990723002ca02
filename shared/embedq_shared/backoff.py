"""How long to wait before trying again."""

from __future__ import annotations

import random
from collections.abc import Callable


def backoff(
    attempt: int, *, first_s: float, longest_s: float, draw: Callable[[], float] = random.random
) -> float:
    """Seconds to wait after attempt number `attempt` (from 0) failed: doubles each time, up to `longest_s`.

    Half of it is random, so that clients that failed together do not come back together. `draw` is from 0 to 1.
    """
    longest = min(longest_s, first_s * 2.0 ** min(attempt, 64))
    return longest * (0.5 + 0.5 * draw())
