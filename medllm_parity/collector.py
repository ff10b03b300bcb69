"""Python's collector while layers come and go.

Modules refer to themselves in circles, so the weights of a layer that is dropped wait for a collection, and whoever holds one
layer at a time collects after each. A collection looks at every object there is: a million of two frameworks, which would cost
more than the layer.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def seeing_only_what_is_new() -> Iterator[None]:
    """Inside, a collection looks at what was made inside; afterwards at everything again.

    Where the process had frozen objects by itself, they stay frozen, and with them what was there at the beginning: Python can
    only let go of all.
    """
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
