"""Memory of the host."""

from __future__ import annotations

import ctypes
import sys


def release_free_memory() -> None:
    """Give memory that was freed back to the system, where its allocator is asked to (glibc).

    Reading weights and compiling leave gaps of some hundred MB that the large buffers of a training step do not fit into.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
