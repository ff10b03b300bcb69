"""A limit on what a program of the user's may do: a chat template has loops, and nothing else ends them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STEPS = 2_000_000
"""Lines of Python; a conversation takes a few thousand, its template's first reading a hundred thousand."""


class TooMuchWork(Exception):
    """It ran longer than it may."""


@contextmanager
def limited_work(steps: int = STEPS) -> Iterator[None]:
    """Count the lines of Python that run inside, in this thread, and stop behind ``steps`` of them.

    Raises:
        TooMuchWork: there were more.
    """
    left = steps

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooMuchWork(f"it takes more than {steps} steps")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
