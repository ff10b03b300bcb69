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
    """Inside, a collection looks at what was made inside; afterwards at everything again, even what was frozen: Python
    can only let go of all."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
