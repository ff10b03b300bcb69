"""Seconds of compilation, as JAX itself reports them: tracing, lowering, and the compiler or its cache on disk."""

from __future__ import annotations

import time
from typing import Any

import jax

_EVENTS = "/jax/core/compile/"


class _Spans:
    """Seconds in which at least one of JAX's events of compilation went on; what is compiled while tracing counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._counted: list[tuple[float, float]] = []

    def hear(self, event: str, start: float, end: float, **_: Any) -> None:
        """Told at the end of each event, so that those within another come before it."""
        if not event.startswith(_EVENTS):
            return
        while self._counted and self._counted[-1][0] >= start:
            within = self._counted.pop()
            self.seconds -= within[1] - within[0]
        self._counted.append((start, end))
        self.seconds += end - start


_spans = _Spans()
jax.monitoring.register_event_time_span_listener(_spans.hear)


def compile_seconds() -> float:
    """Seconds that this process has compiled since this module was imported."""
    return _spans.seconds


def working_seconds() -> float:
    """A clock that stands still while something is compiled; seconds from an arbitrary beginning."""
    return time.perf_counter() - compile_seconds()
